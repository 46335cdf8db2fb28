"""Pictures as clips of one frame: what is seen of them, and which are refused."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from avdiffusion import io
from avdiffusion.data.images import Images
from avdiffusion.data.index import side

SIZE = {"size": (24, 32)}
CORNERS = [[250, 20, 20], [20, 250, 20], [20, 20, 250], [230, 230, 20]]  # of a picture, row by row


def quadrants(height=48, width=64):
    """Another colour in each quarter."""
    small = np.array(CORNERS, np.uint8).reshape(2, 2, 3)
    return Image.fromarray(np.kron(small, np.ones((height // 2, width // 2, 1), np.uint8)))


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def seen(item):
    """uint8 [H, W, 3]."""
    return item["video"][:, 0].permute(1, 2, 0).numpy()


def corners(item):
    pixels = seen(item)
    h, w = (n // 4 for n in pixels.shape[:2])
    return [pixels[y, x].tolist() for y in (h, 3 * h) for x in (w, 3 * w)]


def alone(root, **settings):
    return Images(root, **{"split": "all", **SIZE, **settings})


def test_items(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("b.png", "a.JPG", "below/c.webp", "d.bmp", "e.jpeg"):
        quadrants().save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("a")
    (tmp_path / ".hidden.png").write_text("not looked at")
    images = alone(tmp_path)
    assert images.files == ["a.JPG", "b.png", "below/c.webp", "d.bmp", "e.jpeg"]
    assert len(images) == 5
    assert images.report.ignored == ["labels.csv"]
    assert str(images.report) == f"{tmp_path}: 5 files used, 1 that are no media"
    for i in range(5):
        item = images[i]
        assert item.keys() == {"video", "index"}
        assert item["index"] == i
        assert item["video"].shape == (3, 1, 24, 32)
        assert item["video"].dtype == torch.uint8
        assert np.abs(np.array(corners(item)) - CORNERS).max() < 12
        assert torch.equal(images[i]["video"], item["video"])
    with pytest.raises(IndexError):
        images[5]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_pictures_are_upright(orientation, suffix, tmp_path):
    """What a camera held another way stores: the inverse of what its EXIF tells to do."""
    stored = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p),
        7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }[orientation](np.asarray(quadrants()))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(stored))
    picture.save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    assert np.abs(np.array(corners(alone(tmp_path)[0])) - CORNERS).max() < 12


def test_every_kind_of_pixel_becomes_rgb_on_black(tmp_path):
    colour = Image.new("RGBA", (8, 8), (200, 100, 40, 128))
    pictures = {
        "grey": (Image.new("L", (8, 8), 90), [90, 90, 90]),
        "bits": (Image.new("1", (8, 8), 1), [255, 255, 255]),
        "deep": (Image.fromarray(np.full((8, 8), 90 * 257 + 100, np.uint16)), [90, 90, 90]),
        "half": (colour, [100, 50, 20]),
        "half_grey": (Image.new("LA", (8, 8), (200, 128)), [100, 100, 100]),
        "nothing": (Image.new("RGBA", (8, 8), (200, 100, 40, 0)), [0, 0, 0]),
        "palette": (Image.new("RGB", (8, 8), (255, 0, 0)).quantize(4), [255, 0, 0]),
    }
    for name, (picture, _) in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    images = alone(tmp_path, size=(4, 4))
    expected = {name: pixel for name, (_, pixel) in pictures.items()} | {"print": [254, 0, 0]}
    for name, item in zip(images.files, images, strict=True):
        assert np.abs(seen(item) - np.array(expected[name.split(".")[0]])).max() <= 2, name


@pytest.mark.parametrize("shape", [(100, 60), (60, 100), (24, 32), (31, 77), (12, 16)])
def test_crop_and_letterbox(shape, tmp_path):
    """Beside Pillow's own, which cuts in fractions of a pixel."""
    smooth = noise(6, 6).resize(shape[::-1], Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.png")
    fitted = {
        "crop": ImageOps.fit(smooth, (32, 24), Image.Resampling.BICUBIC),
        "letterbox": ImageOps.pad(smooth, (32, 24), Image.Resampling.BICUBIC),
    }
    for fit, expected in fitted.items():
        ours = np.float32(seen(alone(tmp_path, fit=fit)[0]))
        near = [np.roll(ours, move, axis) for move in (-1, 0, 1) for axis in (0, 1)]
        assert min(np.abs(each - np.float32(expected)).mean() for each in near) < 9, fit


def test_a_large_jpeg_is_read_in_part_and_looks_the_same(tmp_path):
    picture = noise(12, 16).resize((1600, 1200), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "b.png")
    part, whole = (seen(item).astype(int) for item in alone(tmp_path))
    assert np.abs(part - whole).max() < 8


def test_cut_takes_the_pixels_as_they_are(tmp_path):
    noise(30, 45).save(tmp_path / "large.png")
    noise(12, 64).save(tmp_path / "low.png")
    images = alone(tmp_path, fit="cut", flip=0)
    pixels = np.asarray(noise(30, 45))
    windows = {
        pixels[y : y + 24, x : x + 32].tobytes(): (y, x) for y in range(7) for x in range(14)
    }
    assert windows[seen(images[0]).tobytes()] == (3, 6)
    drawn = [seen(images.draw(0, np.random.default_rng(k))) for k in range(300)]
    places = {windows[each.tobytes()] for each in drawn}
    assert len(places) > 60
    either = alone(tmp_path, fit="cut", flip=0.5)
    drawn = [seen(either.draw(0, np.random.default_rng(k))) for k in range(300)]
    turned = {windows.get(each[:, ::-1].tobytes()) for each in drawn} - {None}
    assert {y for y, _ in turned} == {y for y, _ in places}  # wherever they lie
    low = noise(12, 64).resize((128, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(seen(images[1]), np.asarray(low)[:, 48:80])


def test_draws_are_mirrored_as_often_as_told(tmp_path):
    quadrants().save(tmp_path / "a.png")
    images = alone(tmp_path, flip=0.3)
    fixed, mirrored = seen(images[0]), 0
    for k in range(200):
        drawn = seen(images.draw(0, np.random.default_rng(k)))
        mirrored += np.array_equal(drawn, fixed[:, ::-1])
        assert np.array_equal(drawn, fixed) or np.array_equal(drawn, fixed[:, ::-1])
    assert mirrored == pytest.approx(60, abs=25)


def test_split_is_by_file_and_that_of_clips(tmp_path):
    for k in range(20):
        noise(8, 8, k).save(tmp_path / f"{k:02}.png")
    both = [Images(tmp_path, split=s, val_fraction=0.3, **SIZE).files for s in ("train", "val")]
    assert sorted(both[0] + both[1]) == alone(tmp_path).files
    assert set(both[1]) == side({f"{k:02}.png" for k in range(20)}, "val", 0.3, tmp_path)
    assert 1 <= len(both[1]) < 12


@pytest.fixture
def bad_folder(tmp_path):
    for name in ("a.png", "b.jpg", "c.webp", "d.png"):
        noise(40, 40).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no picture\n" * 50)
    (tmp_path / "empty.jpg").touch()
    return tmp_path


def test_broken_pictures_are_refused_in_one_line(bad_folder):
    with pytest.raises(ValueError, match="cannot be used") as caught:
        alone(bad_folder)
    message = str(caught.value)
    assert message.startswith(
        f"2 of 6 files in {bad_folder} cannot be used: empty.jpg (unreadable:"
    )
    assert "data.train.clips.on_bad=skip" in message
    assert "\n" not in message


def test_broken_pictures_are_skipped_and_reported(bad_folder, caplog):
    with caplog.at_level(logging.INFO):
        images = alone(bad_folder, on_bad="skip")
    assert images.files == ["a.png", "b.jpg", "c.webp", "d.png"]
    assert [name for name, _ in images.report.bad] == ["empty.jpg", "text.png"]
    assert all("cannot identify image file it" in why for _, why in images.report.bad)
    assert str(images.report) == f"{bad_folder}: 4 files used, 2 left out (unreadable)"
    assert str(images.report) in caplog.text


@pytest.mark.parametrize("name", ["a.png", "b.jpg", "c.webp"])
def test_a_picture_cut_off_is_found_when_it_is_read(name, bad_folder, caplog):
    (bad_folder / "text.png").unlink()
    (bad_folder / "empty.jpg").unlink()
    data = (bad_folder / name).read_bytes()
    strict, lenient = alone(bad_folder), alone(bad_folder, on_bad="skip")
    (bad_folder / name).write_bytes(data[: len(data) // 2])
    number = strict.files.index(name)
    with pytest.raises(io.MediaError, match=rf"{name}: unreadable: "):
        strict[number]
    assert lenient[number]["index"] == number + 1  # says which one it is
    assert lenient.draw(number, np.random.default_rng(0))["index"] != number
    assert lenient.report.bad == [(name, "found broken while being read")]
    assert lenient.report.used == 3
    assert caplog.text.count("left out from now on") == 1
    for other in lenient.files:
        (bad_folder / other).unlink()
    with pytest.raises(io.MediaError, match="unreadable"):
        lenient[0]


def test_workers_tell_which_broke(tmp_path):
    for name in "abc":
        noise(40, 40).save(tmp_path / f"{name}.png")
    images = alone(tmp_path, on_bad="skip")
    (tmp_path / "b.png").unlink()
    seen_there = [batch["index"].item() for batch in DataLoader(images, num_workers=1)]
    assert seen_there == [0, 2, 2]
    assert [name for name, _ in images.report.bad] == ["b.png"]


@pytest.mark.filterwarnings("ignore")  # Pillow's own, of what it puts up with
def test_spoilt_bytes_are_never_another_kind_of_error(tmp_path):
    """Headers, EXIF, palettes and data, as a worn disk would have them."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "held upright"
    for suffix in ("png", "jpg", "webp", "bmp"):
        noise(20, 20).save(tmp_path / f"a.{suffix}", exif=exif)
        data = (tmp_path / f"a.{suffix}").read_bytes()
        (tmp_path / f"a.{suffix}").unlink()
        refused = 0
        for k in range(60):
            spoilt = bytearray(data)
            for place in rng.integers(0, len(data) if k % 2 else 120, 4):
                spoilt[place] = rng.integers(0, 256)
            (tmp_path / f"a.{suffix}").write_bytes(spoilt)
            try:
                shape = alone(tmp_path)[0]["video"].shape
            except ValueError as error:
                shape = (3, 1, 24, 32) if f"a.{suffix}" in str(error) else None
                refused += 1
            assert shape == (3, 1, 24, 32)
        assert refused > 10
        (tmp_path / f"a.{suffix}").unlink()


def test_a_tag_that_makes_no_sense_spoils_no_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "held upright"
    noise(20, 20).save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    good = seen(alone(tmp_path)[0])
    tag = data.index(b"\x01\x0e\x00\x02") + 1
    for number in (0, 26):  # the text as width and as resolution, which Pillow cannot store anew
        (tmp_path / "a.jpg").write_bytes(data[:tag] + bytes([number]) + data[tag + 1 :])
        assert np.array_equal(seen(alone(tmp_path)[0]), good)


def test_pictures_too_small_are_counted(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(24, 32).save(tmp_path / "fits.png")
    noise(40, 31).save(tmp_path / "narrow.png")
    noise(32, 24).save(tmp_path / "turned.jpg", exif=exif)
    said = f"%d of 3 files in {tmp_path} are smaller than 24x32: enlarged, they are blurred"
    alone(tmp_path)
    assert said % 1 in caplog.text
    caplog.clear()
    alone(tmp_path, fit="letterbox")
    assert "smaller" not in caplog.text
    alone(tmp_path, size=(48, 48), fit="letterbox")
    assert "3 of 3 files" in caplog.text


def test_nothing_to_use(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.root is no folder: .*missing"):
        Images(tmp_path / "missing")
    (tmp_path / "a.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"no png, jpg, webp or bmp .* \(1 other files\)"):
        Images(tmp_path)
    (tmp_path / "a.png").touch()
    for on_bad in ("error", "skip"):
        with pytest.raises(ValueError, match=r"1 of 1 files .* cannot be used: a\.png"):
            Images(tmp_path, on_bad=on_bad)
    with pytest.raises(ValueError, match="fit is one of crop, letterbox, cut, not stretch"):
        Images(tmp_path, fit="stretch")
    with pytest.raises(ValueError, match="on_bad is one of error, skip, not replace"):
        Images(tmp_path, on_bad="replace")
