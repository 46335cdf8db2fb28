"""What is spoilt, against the laws of optics and of chance, and against Pillow and OpenCV."""

from io import BytesIO
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import make_media
from PIL import Image

from avdiffusion import checkpoint
from avdiffusion.data.degrade import Degraded
from avdiffusion.data.shapes import MovingShapes
from avdiffusion.data.spoil import Spoil, blurred

EVERYTHING = {"blur": [1, 2], "scale": [1, 3], "dark": [0.3, 0.6]}
EVERYTHING |= {"poisson": [50, 90], "noise": [5, 20], "jpeg": [20, 80]}


def rng(seed=0):
    return np.random.default_rng(seed)


def frames(*shape, seed=0):
    return torch.from_numpy(rng(seed).integers(0, 256, (3, *shape), dtype=np.uint8))


def flat(level, size=128, count=2):
    return torch.full((3, count, size, size), level, dtype=torch.uint8)


def moments(video):
    return video.double().mean().item(), video.double().var().item()


def jpeg(video, quality):
    """Pillow's round trip of each frame."""
    out = torch.empty_like(video)
    for k in range(video.shape[1]):
        file = BytesIO()
        Image.fromarray(video[:, k].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        out[:, k] = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    return out


dimensions = st.integers(1, 20)


@settings(deadline=None, max_examples=30)
@given(t=st.integers(1, 3), h=dimensions, w=dimensions, seed=st.integers(0, 99))
def test_shape_and_type_stay(t, h, w, seed):
    video = frames(t, h, w)
    before = video.clone()
    worse = Spoil(**EVERYTHING)(video, rng(seed))
    assert worse.shape == video.shape
    assert worse.dtype == torch.uint8
    assert torch.equal(video, before)
    assert torch.equal(worse, Spoil(**EVERYTHING)(video, rng(seed)))
    for nothing in ({}, {"blur": [0, 0], "noise": [0, 0], "poisson": [0, 0], "dark": [0, 0]}):
        assert torch.equal(Spoil(**nothing)(video, rng(seed)), video)


@pytest.mark.parametrize("deviation", [2.0, 10.0, 25.0])
def test_noise_has_its_deviation(deviation):
    mean, variance = moments(Spoil(noise=[deviation] * 2)(flat(128), rng()).double())
    assert mean == pytest.approx(128, abs=5 * deviation / 98304**0.5)
    assert variance**0.5 == pytest.approx((deviation**2 + 1 / 12) ** 0.5, rel=0.015)


def test_values_are_drawn_evenly_once_a_clip():
    spoil, deviations = Spoil(noise=[10, 30]), []
    for seed in range(300):
        per_frame = spoil(flat(128, 32, 3), rng(seed)).double().std((0, 2, 3))
        assert per_frame.max() < 1.15 * per_frame.min()
        deviations.append(per_frame.mean().item())
    quartiles = np.quantile(deviations, [0, 0.25, 0.5, 0.75, 1])
    assert quartiles == pytest.approx([10, 15, 20, 25, 30], abs=2)


@pytest.mark.parametrize("level", [20, 90, 220])
@pytest.mark.parametrize("photons", [20.0, 300.0])
def test_the_variance_of_shot_noise_is_proportional_to_the_signal(level, photons):
    """Of N photons the variance is N; below white, clipping takes nothing away."""
    worse = Spoil(poisson=[photons] * 2)(flat(level), rng()).double()
    expected = level * 255 / photons
    if level + 5 * expected**0.5 < 255:
        mean, variance = moments(worse)
        assert mean == pytest.approx(level, abs=5 * (expected / 98304) ** 0.5 + 0.05)
        assert variance == pytest.approx(expected, rel=0.05, abs=0.2)
    spaced = (worse[worse < 255] * photons / 255 + 0.5) % 1 - 0.5  # whole photons
    assert spaced.abs().max() <= 0.5 * photons / 255 + 1e-9


def test_the_dark_has_fewer_photons_and_the_same_read_noise():
    dark = {"dark": [0.25, 0.25]}
    assert torch.equal(Spoil(**dark)(flat(160), rng()), flat(40))
    mean, variance = moments(Spoil(**dark, poisson=[100, 100])(flat(160), rng()))
    assert mean == pytest.approx(40, abs=0.2)
    assert variance == pytest.approx(40 * 255 / 100, rel=0.04)
    _, variance = moments(Spoil(**dark, noise=[6, 6])(flat(160), rng()))
    assert variance**0.5 == pytest.approx(6, rel=0.02)
    means = [moments(Spoil(dark=[0.2, 0.8])(flat(200, 1), rng(s)))[0] for s in range(300)]
    assert np.quantile(means, [0, 0.5, 1]) == pytest.approx([40, 100, 160], abs=8)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(6, 40), k=st.integers(0, 4), deviation=st.floats(0.8, 3))
def test_a_gaussian_damps_waves_by_its_transform(n, k, deviation):
    """Waves with mirrors at both edges stay what they are, smaller by exp(-(s w)^2 / 2)."""
    wave = torch.cos(torch.pi * k / n * (torch.arange(n) + 0.5))
    damped = np.exp(-0.5 * (deviation * np.pi * k / n) ** 2)
    rows, columns = wave.expand(1, 2, 5, n), wave[:, None].expand(1, 2, n, 5)
    for picture in (rows, columns):
        assert (blurred(picture, deviation) - damped * picture).abs().max() < 2e-3


@settings(deadline=None, max_examples=30)
@given(h=dimensions, w=dimensions, deviation=st.floats(0.3, 4))
def test_blur_keeps_the_mean(h, w, deviation):
    video = frames(2, h, w).float()
    before, after = (v.mean((-1, -2)) for v in (video, blurred(video, deviation)))
    assert (before - after).abs().max() < 1e-2


def test_blur_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    video = frames(2, 30, 41)
    picture = np.float32(video[:, 1].permute(1, 2, 0).numpy())
    exact = cv2.GaussianBlur(picture, (13, 13), 1.5, borderType=cv2.BORDER_REFLECT)
    ours = Spoil(blur=[1.5, 1.5])(video, rng())[:, 1].permute(1, 2, 0).numpy()
    assert np.abs(ours - exact).max() < 0.51


def test_fewer_pixels_lose_fine_lines_alone():
    assert torch.equal(Spoil(scale=[3, 3])(flat(77, 32), rng()), flat(77, 32))
    lines = flat(0, 64)
    lines[..., ::2] = 200
    assert (Spoil(scale=[4, 4])(lines, rng()).double() - 100).abs().max() < 12
    y, x = np.mgrid[:64, :64]
    broad = torch.from_numpy((128 + 90 * np.sin(x / 10 + y / 14)).astype(np.uint8))
    broad = broad.expand(3, 2, 64, 64)
    change = Spoil(scale=[4, 4])(broad, rng()).double() - broad.double()
    assert change.abs().mean() < 2
    assert change.abs().max() > 2


def test_noise_of_fewer_pixels_is_coarse():
    """The sensor is small, and what it saw is enlarged."""

    def neighbours(spoil):
        noise = spoil(flat(128), rng()).double() - 128
        return np.corrcoef(noise[..., 1:].flatten(), noise[..., :-1].flatten())[0, 1]

    assert abs(neighbours(Spoil(noise=[20, 20]))) < 0.02
    assert neighbours(Spoil(noise=[20, 20], scale=[4, 4])) > 0.8


def test_jpeg_comes_last_and_is_pillows():
    video = frames(3, 24, 32) // 4 + 90
    noisy = Spoil(noise=[5, 15])(video, rng(3))
    both = Spoil(noise=[5, 15], jpeg=[40, 40])(video, rng(3))
    assert torch.equal(both, jpeg(noisy, 40))
    assert not torch.equal(both, noisy)
    seen = {bytes(Spoil(jpeg=[30, 33])(video, rng(s)).numpy()) for s in range(60)}
    assert seen == {bytes(jpeg(video, quality).numpy()) for quality in (30, 31, 32)}


def test_only_noise_is_each_frames_own():
    still = frames(1, 24, 24).expand(3, 4, 24, 24)
    for name, limits in EVERYTHING.items():
        worse = Spoil(**{name: limits})(still, rng())
        assert not torch.equal(worse, still), name
        same = [torch.equal(worse[:, 0], worse[:, k]) for k in (1, 2, 3)]
        assert same == [name not in ("noise", "poisson")] * 3, name
    one, other = Spoil(noise=[10, 10])(flat(128), rng()).double().unbind(1)
    assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.03


def test_one_setting_does_not_change_what_is_drawn_of_another():
    video = flat(100)
    means = [
        moments(Spoil(dark=[0.2, 0.9], **more)(video, rng(7)))[0]
        for more in ({}, {"noise": [1, 3]}, {"blur": [1, 2], "poisson": [500, 900]})
    ]
    assert means == pytest.approx([means[0]] * 3, abs=0.6)


def test_wrong_settings_of_spoil_are_named():
    with pytest.raises(ValueError, match=r"noise \[30, 10\] must be \[low, high\], 0 or more"):
        Spoil(noise=[30, 10])
    with pytest.raises(ValueError, match=r"blur \[-1, 2\] must be"):
        Spoil(blur=[-1, 2])
    with pytest.raises(ValueError, match=r"scale \[0\.5, 2\] must be \[low, high\], 1 or more"):
        Spoil(scale=[0.5, 2])
    with pytest.raises(ValueError, match=r"as uint8, not as torch\.float32"):
        Spoil()(frames(1, 8, 8) / 127.5 - 1, rng())


def test_spoilt_items_have_a_source():
    shapes = MovingShapes(num=6, size=(16, 16), frames=4)
    made = Degraded(shapes, degrade=Spoil(**EVERYTHING), entry="source", seed=2)
    item = made[4]
    assert item.keys() == shapes[4].keys() | {"source"}
    assert torch.equal(item["video"], shapes[4]["video"])
    assert item["source"].shape == item["video"].shape
    assert item["source"].dtype == torch.uint8
    assert torch.equal(item["source"], Spoil(**EVERYTHING)(item["video"], rng((2, 4))))
    assert torch.equal(made[4]["source"], item["source"])
    other = Degraded(shapes, degrade=Spoil(**EVERYTHING), entry="source", seed=3)
    assert not torch.equal(other[4]["source"], item["source"])
    drawn = [made.draw(4, rng(seed))["source"] for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("option", ["spoilt", "spoilt_shapes"])
def test_spoilt_clips_are_configured(option, tmp_path):
    words = [f"data={option}", "data.size=[32,48]", "data.frames=4", "data.num_workers=0"]
    if option == "spoilt":
        for k in range(3):
            make_media(tmp_path / f"{k}.mp4", seconds=1, codecs=("libx264", None))
        words.append(f"data.root={tmp_path}")
    config = checkpoint.compose(["~exp", *words, "data.batch_size=2"]).data
    data = checkpoint.build(config)
    assert data.train.degrade == data.val.degrade == Spoil(blur=[0.5, 1.5], noise=[10, 40])
    data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1)
    (batch,) = islice(data.train_dataloader(), 1)
    for name in ("video", "source"):
        assert batch[name].shape == (2, 3, 4, 32, 48)
        assert batch[name].dtype == torch.uint8
    for item in islice(data.val, 2):
        error = (item["source"].double() - item["video"].double()).square().mean() ** 0.5
        assert 5 < error < 60
