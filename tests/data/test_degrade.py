"""What is made worse, against OpenCV, Pillow and the laws of its chance."""

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
from avdiffusion.data import degrade
from avdiffusion.data.clips import Clips
from avdiffusion.data.degrade import Degrade, Degraded, resized
from avdiffusion.data.images import Images
from avdiffusion.data.module import DataModule
from avdiffusion.data.toy import Toy

PUBLISHED = {"kernel": "bicubic_aliased", "noise": 20, "jpeg": [20, 80]}
WITHOUT_SOUND = {"sample_rate": None, "samples": None}


def rng(seed=0):
    return np.random.default_rng(seed)


def frames(*shape, seed=0):
    return torch.from_numpy(rng(seed).integers(0, 256, (3, *shape), dtype=np.uint8))


def smooth(height, width, count=1):
    """Frames that JPEG and resizing leave mostly as they are."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    planes = [128 + 90 * np.sin(5 * x + 3 * y + k) for k in range(3)]
    return torch.from_numpy(np.repeat(np.stack(planes)[:, None], count, 1).astype(np.uint8))


def levels(low_res):
    """0..255 again."""
    return (low_res + 1) * 127.5


factors = st.sampled_from([1, 1.5, 2, 3, 4, 5.5, 8])


@settings(deadline=None, max_examples=40)
@given(h=st.integers(1, 20), w=st.integers(1, 20), t=st.integers(1, 3), s=factors, f=factors)
def test_the_published_kernel_is_opencvs(h, w, t, s, f):
    cv2 = pytest.importorskip("cv2")
    video = frames(t, round(h * s), round(w * f))
    ours = resized(video, (h, w), "bicubic_aliased")
    whole = levels(Degrade(size=(h, w), kernel="bicubic_aliased")(video, rng()))
    for k in range(t):
        picture = np.ascontiguousarray(video[:, k].permute(1, 2, 0).numpy())
        exact = cv2.resize(np.float32(picture), (w, h), interpolation=cv2.INTER_CUBIC)
        assert np.abs(ours[:, k].permute(1, 2, 0).numpy() - exact).max() < 2e-2
        stored = cv2.resize(picture, (w, h), interpolation=cv2.INTER_CUBIC)  # in fixed point
        assert np.abs(whole[:, k].permute(1, 2, 0).numpy() - np.float32(stored)).max() < 1.01


@settings(deadline=None, max_examples=40)
@given(h=st.integers(1, 20), w=st.integers(2, 20), s=factors, f=factors)
def test_the_clean_kernels_are_pillows(h, w, s, f):
    """From two columns on: torch gets a picture of one wrong."""
    video = frames(1, round(h * s), round(w * f))
    plane = Image.fromarray(np.float32(video[0, 0].numpy()))
    bicubic = np.asarray(plane.resize((w, h), Image.Resampling.BICUBIC))
    assert np.abs(resized(video, (h, w), "bicubic")[0, 0].numpy() - bicubic).max() < 2e-2
    if s == int(s) and f == int(f):
        area = np.asarray(plane.resize((w, h), Image.Resampling.BOX))
        assert np.abs(resized(video, (h, w), "area")[0, 0].numpy() - area).max() < 2e-2


def test_only_the_published_kernel_overlooks_pixels():
    video = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    video[..., 1::8] = 255  # never among the four columns in the middle of eight
    seen = {k: levels(Degrade(scale=8, kernel=k)(video, rng())) for k in degrade.KERNELS}
    assert seen["bicubic_aliased"].abs().max() < 1e-4
    assert (seen["area"] - 255 / 8).abs().max() < 0.6
    assert seen["bicubic"].mean() == pytest.approx(255 / 8, abs=2)


def test_clean_is_the_default_and_has_256_levels():
    low = Degrade()(frames(3, 24, 40), rng())
    assert low.shape == (3, 3, 6, 10)
    assert low.dtype == torch.float32
    whole = levels(low)
    assert (whole - whole.round()).abs().max() < 1e-4
    assert low.min() >= -1
    assert low.max() <= 1
    assert torch.equal(low, Degrade()(frames(3, 24, 40), rng(1)))  # nothing is drawn
    video = torch.full((3, 1, 8, 8), 255, dtype=torch.uint8)
    assert torch.equal(Degrade()(video, rng()), torch.ones(3, 1, 2, 2))
    assert torch.equal(Degrade()(0 * video, rng()), -torch.ones(3, 1, 2, 2))


def test_noise_has_the_deviation_that_was_drawn():
    video = torch.full((3, 4, 64, 64), 100, dtype=torch.uint8)
    spoil, deviations = Degrade(scale=2, noise=20), []
    for k in range(400):
        change = levels(spoil(video, rng(k))) - 100
        per_frame = change.std((0, 2, 3))
        assert per_frame.max() <= 1.1 * per_frame.min()  # shared by the frames
        if per_frame[0] > 0:
            assert change.mean().abs() < 5 * per_frame[0] / 12288**0.5
            assert (change[:, 0] - change[:, 1]).std() == pytest.approx(
                2**0.5 * per_frame[0].item(), rel=0.1
            )  # but not the noise itself
            deviations.append(per_frame.mean().item())
    assert len(deviations) == pytest.approx(200, abs=40)
    quartiles = np.quantile(deviations, [0, 0.25, 0.5, 0.75, 1])
    assert quartiles == pytest.approx([0, 5, 10, 15, 20], abs=2)
    always = Degrade(scale=2, noise=20, noise_share=1)
    assert all(always(video, rng(k)).std() > 0 for k in range(20))


def test_noise_leaves_the_range_and_jpeg_comes_back():
    white = torch.full((3, 1, 32, 32), 255, dtype=torch.uint8)
    noisy = Degrade(scale=1, noise=20, noise_share=1)
    assert noisy(white, rng(1)).max() > 1.05
    packed = Degrade(scale=1, noise=20, noise_share=1, jpeg=(80, 81), jpeg_share=1)
    assert packed(white, rng(1)).max() <= 1


def test_jpeg_is_a_round_trip_of_each_frame():
    video = smooth(48, 64, 3)
    video[:, 1] = video[:, 1].flip(-1)
    low = levels(Degrade(scale=1, jpeg=(30, 31), jpeg_share=1)(video, rng()))
    for k in range(3):
        file = BytesIO()
        Image.fromarray(video[:, k].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=30)
        expected = np.asarray(Image.open(file))
        assert np.abs(low[:, k].permute(1, 2, 0).numpy() - expected).max() < 1e-4
        assert (low[:, k] - video[:, k].float()).abs().max() > 2
    assert torch.equal(low[:, 0], low[:, 2])


def test_jpeg_keeps_colours_apart():
    video = torch.tensor([200, 40, 90], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 16, 16)
    low = levels(Degrade(scale=1, jpeg=(90, 91), jpeg_share=1)(video, rng()))
    assert low.mean((1, 2, 3)).tolist() == pytest.approx([200, 40, 90], abs=4)


def test_qualities_are_whole_numbers_below_the_upper_one(monkeypatch):
    seen = []
    monkeypatch.setattr(
        degrade, "through_jpeg", lambda video, quality: seen.append(quality) or video
    )
    spoil = Degrade(jpeg=(20, 80))
    for k in range(2000):
        spoil(smooth(8, 8), rng(k))
    assert len(seen) == pytest.approx(1000, abs=120)
    assert sorted(set(seen)) == list(range(20, 80))
    assert all(type(quality) is int for quality in seen)


def test_noise_and_jpeg_are_drawn_independently():
    video, kinds = smooth(32, 32), []
    clean = Degrade(scale=1)(video, rng())
    for k in range(400):
        noisy = Degrade(scale=1, noise=20)(video, rng(k))
        packed = Degrade(scale=1, jpeg=(20, 80))(video, rng(k))
        kinds.append((not torch.equal(noisy, clean), not torch.equal(packed, clean)))
        both = Degrade(scale=1, noise=20, jpeg=(20, 80))(video, rng(k))
        if not kinds[-1][1]:
            assert torch.equal(both, noisy)
    counts = [kinds.count(kind) for kind in [(a, b) for a in (0, 1) for b in (0, 1)]]
    assert counts == pytest.approx([100] * 4, abs=35)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (16, 12)),
        ({"scale": 1}, (64, 48)),
        ({"scale": 1.6}, (40, 30)),
        ({"size": (5, 7)}, (5, 7)),
        ({"scale": 3, "size": [5, 7]}, (5, 7)),
    ],
)
def test_sizes(options, size):
    assert Degrade(**options)(frames(2, 64, 48), rng()).shape == (3, 2, *size)


@pytest.mark.parametrize("kernel", degrade.KERNELS)
def test_without_a_scale_nothing_changes(kernel):
    video = frames(1, 8, 8)
    same = levels(Degrade(scale=1, kernel=kernel)(video, rng()))
    assert (same - video.float()).abs().max() < 1e-4


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"frames of 64x50 cannot be made 4 times smaller: data\."):
        Degrade()(frames(1, 64, 50), rng())
    with pytest.raises(ValueError, match=r"as uint8, not as torch\.float32"):
        Degrade()(frames(1, 8, 8) / 127.5 - 1, rng())
    with pytest.raises(ValueError, match="kernel is one of bicubic, bicubic_aliased, area, not x"):
        Degrade(kernel="x")


class Listed:
    """A data set that draws nothing and has more to say of its items."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        audio = torch.zeros(1, 100)
        return {"video": frames(1, 8, 8, seed=i), "audio": audio, "label": i, "index": i}


def test_items_are_those_of_the_clips_and_always_the_same():
    toy = Toy(num=6, size=(16, 16), frames=4, samples=6400)
    made = Degraded(toy, degrade=Degrade(**PUBLISHED))
    assert len(made) == 6
    assert made.clips is toy
    item = made[4]
    assert item.keys() == toy[4].keys() - {"audio"} | {"low_res"}
    assert torch.equal(item["video"], toy[4]["video"])
    assert item["video"].dtype == torch.uint8
    assert item["low_res"].shape == (3, 4, 4, 4)
    for _ in range(2):
        assert torch.equal(made[4]["low_res"], item["low_res"])
    always = {"noise": 20, "noise_share": 1}
    one, other = (Degraded(toy, degrade=Degrade(**always), seed=s)[4]["low_res"] for s in (0, 1))
    assert not torch.equal(one, other)
    noisy, clean = (Degraded(toy, degrade=Degrade(**how)) for how in (always, {}))
    first, second = (noisy[i]["low_res"] - clean[i]["low_res"] for i in (0, 1))
    assert not torch.allclose(first / first.std(), second / second.std(), atol=0.1)
    with pytest.raises(IndexError):
        made[6]


def test_draws_are_keyed_by_the_generator():
    always = {"noise": 20, "noise_share": 1}
    made = Degraded(Listed(3), degrade=Degrade(**always))
    item = made.draw(1, rng(5))
    assert item["label"] == 1
    assert torch.equal(item["video"], Listed(3)[1]["video"])
    assert torch.equal(item["low_res"], made.draw(1, rng(5))["low_res"])
    assert not torch.equal(item["low_res"], made.draw(1, rng(6))["low_res"])


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 60), num=st.integers(1, 70))
def test_a_number_of_items_is_spread_evenly(count, num):
    made = Degraded(Listed(count), degrade=Degrade(), num=num)
    labels = [made[i]["label"] for i in range(len(made))]
    assert len(labels) == min(count, num)
    assert labels == sorted(set(labels))
    gaps = np.diff([-0.5, *labels, count - 0.5])
    assert gaps[1:-1].max(initial=1) - gaps[1:-1].min(initial=1) <= count / len(labels)
    assert abs(gaps[0] - gaps[-1]) <= 1
    if num >= count:
        assert labels == list(range(count))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for k in range(3):
        make_media(root / f"{k}.mp4", seconds=1 + k / 2, codecs=("libx264", None))
    return root


def test_random_windows_are_those_of_the_clips(videos):
    clips = Clips(videos, split="all", frames=2, size=(32, 64), modalities=["video"])
    made = Degraded(clips, degrade=Degrade(**PUBLISHED))
    for k in range(5):
        assert torch.equal(made.draw(k, rng(k))["video"], clips.draw(k, rng(k))["video"])


def batches(data, count):
    data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1)
    return list(islice(data.train_dataloader(), count))


def test_batches_do_not_depend_on_workers(videos):
    clips = Clips(videos, frames=1, size=(32, 64), modalities=["video"])
    made = Degraded(clips, degrade=Degrade(**PUBLISHED))
    shape = {"fps": 10, "frames": 1, "size": [32, 64], "batch_size": 4} | WITHOUT_SOUND
    runs = [batches(DataModule(train=made, num_workers=n, **shape), 3) for n in (0, 2)]
    for one, other in zip(*runs, strict=True):
        assert one.keys() == {"index", "video", "low_res", "position"}
        assert one["video"].shape == (4, 3, 1, 32, 64)
        assert one["low_res"].shape == (4, 3, 1, 8, 16)
        assert one["low_res"].dtype == torch.float32
        for name in ("video", "low_res", "index"):
            assert torch.equal(one[name], other[name])


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("option", ["frames", "frames_published"])
def test_frames_from_videos_are_configured(option, keep, videos):
    words = [f"data={option}", f"data.root={videos}", "data.size=[32,48]", "data.num_workers=0"]
    words += ["data.train.degrade.scale=2", f"data.train.clips.keep={str(keep).lower()}"]
    config = checkpoint.compose(["~exp", *words, "data.batch_size=2"]).data
    data = checkpoint.build(config)
    assert data.train.degrade == data.val.degrade
    assert data.train.degrade.scale == 2
    assert data.train.degrade == Degrade(scale=2, **({} if option == "frames" else PUBLISHED))
    assert data.train.clips.request == data.val.clips.request
    assert data.train.clips.files != data.val.clips.files
    assert data.val.clips.flip == 0
    (batch,) = batches(data, 1)
    assert batch["video"].shape == (2, 3, 1, 32, 48)
    assert batch["low_res"].shape == (2, 3, 1, 16, 24)
    for item in data.val:
        assert item["low_res"].shape == (3, 1, 16, 24)


def test_pictures_are_configured(tmp_path):
    for k in range(4):
        Image.fromarray(frames(40, 40, seed=k).permute(1, 2, 0).numpy()).save(tmp_path / f"{k}.png")
    words = ["data=images", f"data.root={tmp_path}", "data.size=[32,32]", "data.batch_size=2"]
    words += ["data.num_workers=0", "data.train.clips.fit=cut"]
    data = checkpoint.build(checkpoint.compose(["~exp", *words]).data)
    assert isinstance(data.train.clips, Images)
    assert data.val.clips.fit == "cut"
    assert len(data.train) + len(data.val) == 4
    assert data.val[0]["low_res"].shape == (3, 1, 8, 8)
    (batch,) = batches(data, 1)
    assert batch["low_res"].shape == (2, 3, 1, 8, 8)
