"""The calls of a video generator, on checkpoints that are small and not trained."""

import logging
import re
from pathlib import Path

import pytest
import torch
from entry import ROOT

from avdiffusion import checkpoint, io
from avdiffusion.diffusion.known import Replace
from avdiffusion.diffusion.noise import Noise
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.video_generator import VideoGenerator

WORDS = [
    "~exp",
    "name=small",
    "data=moving_shapes",
    "model=video",
    "model/net=video_tiny",
    "model/path=cosine",
    "model.diffusion.target=v",  # with the others an untrained network is far from any clip
    "model/codec=patches",
    "model.codec.patch.video=[1,4,4]",
    "model.diffusion.net.video_channels=48",
    "model.diffusion.net.channels=8",
    "model.diffusion.net.num_heads=2",
    "data.frames=4",
    "data.size=[8,8]",
    "sampler=ddim",
    "sampler.steps=3",
    "paths.run=run",
]
SIZE = (3, 4, 8, 8)


def written(path, *words, size=0.02):
    """A checkpoint as training writes it, of a network whose average has been somewhere."""
    torch.manual_seed(0)
    config = checkpoint.plain(checkpoint.compose([*WORDS, *words]))
    system = checkpoint.build(config["model"])
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    content = {"state_dict": system.state_dict(), "hyper_parameters": config}
    system.on_save_checkpoint(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("run") / "checkpoints" / "best.ckpt")


@pytest.fixture(scope="module")
def generator(file):
    return VideoGenerator(file)


@pytest.fixture
def asked(generator):
    """How many clips the network is asked for, call by call."""
    net, sizes = generator.system.ema.ema_model.net, []
    hook = net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    yield sizes
    hook.remove()


def clips(count=1, size=SIZE, seed=0):
    """Smooth ones in [-1, 1], all different."""
    rng = torch.Generator().manual_seed(seed)
    rough = torch.rand(count, size[0], 2, 2, 2, generator=rng) * 1.6 - 0.8
    return torch.nn.functional.interpolate(rough, size[1:], mode="trilinear")


def rms(x):
    return float(x.square().mean().sqrt())


# -------------------------------------------------------------------------------- whose it is


def test_checkpoints_are_found(file, tmp_path, monkeypatch):
    first = VideoGenerator(file).generate(1, num_steps=1)
    for name in (file.parent.parent, f"{file.parent.parent}/best"):
        assert torch.equal(VideoGenerator(name).generate(1, num_steps=1), first)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").symlink_to(file.parent.parent)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no last\.ckpt below runs"):
        VideoGenerator("last")


def test_the_newest_best_is_the_default(tmp_path, monkeypatch, generator):
    written(tmp_path / "runs" / "x" / "one" / "checkpoints" / "best.ckpt")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(VideoGenerator().generate(1, seed=4), generator.generate(1, seed=4))


def test_other_models_are_refused(tmp_path):
    sound = written(tmp_path / "joint.ckpt", "data=toy", "model=joint", "model/net=tiny", *JOINT)
    with pytest.raises(ValueError, match=r"joint\.ckpt makes video and audio, or"):
        VideoGenerator(sound)


JOINT = [
    "model.codec.patch.audio=[16]",
    "data.sample_rate=4000",
    "data.samples=1600",
    "model.diffusion.net.audio_channels=16",
    "model.diffusion.net.channel_mult=[1,2]",
    "model.diffusion.net.cross_attention_resolutions=[2]",
    "model.diffusion.net.cross_attention_windows=[2]",
    "model.diffusion.net.head_channels=8",
]


# -------------------------------------------------------------------------------- new videos


def test_videos_are_those_of_the_system(generator, asked):
    made = generator.generate(3, seed=5)
    assert asked == [3] * 3  # the checkpoint's own steps
    assert made.shape == (3, *SIZE)
    system = generator.system.sample(3, seed=5, micro_batch=3)["video"].clamp(-1, 1)
    assert torch.equal(made, system)
    assert torch.allclose(generator.generate(1, seed=5), made[:1], atol=1e-5)
    assert not torch.equal(generator.generate(1, seed=6), made[:1])


@pytest.mark.parametrize("size", [(1, 8, 8), (7, 4, 12), (4, 24, 8)])
def test_other_lengths_and_sizes(generator, size):
    frames, height, width = size
    made = generator.generate(2, frames, height, width, num_steps=2)
    assert made.shape == (2, 3, *size)
    assert generator.system.shapes == {"video": list(SIZE)}  # it stays what it was
    assert generator.generate(1, num_steps=1).shape == (1, *SIZE)


def test_sizes_that_cannot_be_are_named(generator):
    with pytest.raises(ValueError, match=r"video \[3, 4, 10, 8\] does not divide into blocks"):
        generator.generate(1, height=10)
    with pytest.raises(ValueError, match="num=0"):
        generator.generate(0)


def test_steps_and_samplers_are_counted(generator, asked):
    plain = generator.generate(2, num_steps=7)
    assert asked == [2] * 7
    asked.clear()
    other = generator.generate(2, num_steps=4, sampler=DDPM())
    assert asked == [2] * 4
    assert not torch.equal(plain, other)
    asked.clear()
    generator.generate(5, num_steps=1, micro_batch=2)
    assert asked == [2] * 3  # filled up


def test_pixels_and_files(generator, tmp_path):
    values = generator.generate(2, num_frames=6, height=16, width=16, num_steps=2)
    levels = generator.generate(
        2, num_frames=6, height=16, width=16, num_steps=2, return_uint8=True
    )
    assert levels.dtype == torch.uint8
    assert torch.equal(levels, ((values + 1) * 127.5).round().byte())
    smooth = clips(2, (3, 6, 16, 16))
    (*_, path) = generator.save(smooth, tmp_path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["000000.mp4", "000001.mp4"]
    clip = io.read_clip(path)
    assert clip["fps"] == generator.system.rates["video"]
    back = torch.from_numpy(clip["video"]).float() / 127.5 - 1
    assert float((back - smooth[1]).abs().mean()) < 6 / 127.5
    rows = clips(6, (3, 6, 16, 16)).unflatten(0, (2, 3))
    assert len(generator.save(rows, tmp_path / "rows")) == 6


# ------------------------------------------------------------------------- between two videos


def test_rows_from_one_video_to_another(generator, asked):
    first, second = clips(2), clips(2, seed=1)
    rows = generator.interpolate(first, second, 4, 5, batch_size=6)
    # four clips go up, each step a guess and three corrections; ten come down
    assert asked == [4] * 4 * (1 + 3) + [6] * 4 + [4] * 4
    assert rows.shape == (2, 5, *SIZE)
    one = generator.interpolate(first[:1], second[:1], 4, 5)
    assert torch.allclose(one, rows[:1], atol=1e-4)
    glued = generator.interpolate(first, second, 4, 5, concat=True)
    assert glued.shape == (2, 3, 20, 8, 8)
    assert torch.allclose(glued[:, :, 4:8], rows[:, 1], atol=1e-4)
    assert generator.interpolate(first, second, 4, 1).shape == (2, 1, *SIZE)


@pytest.mark.parametrize("path", ["cosine", "linear", "flow"])
def test_both_ends_are_the_given_videos(path, tmp_path):
    """Of a network that bends little, so that corrections find where each came from."""
    generator = VideoGenerator(written(tmp_path / "x.ckpt", f"model/path={path}", size=0.01))
    first, second = clips(2), clips(2, seed=1)

    def ends(refine):
        rows = generator.interpolate(first, second, 10, 3, refine=refine)
        assert rms(rows[:, 1] - rows[:, 0]) > 0.1
        return rms(rows[:, 0] - first), rms(rows[:, -1] - second)

    assert max(ends(3)) < 0.3 * min(ends(0)) + 0.01
    exact = generator.interpolate(first, second, 2, 3, clip_endpoints=True)
    assert torch.equal(exact[:, 0], first)
    assert torch.equal(exact[:, -1], second)
    assert not torch.equal(exact[:, 1], first)


def test_noise_that_both_share(generator, asked):
    first, second = clips(2), clips(2, seed=1)
    options = {"encode": "noise", "batch_size": 10}
    rows = generator.interpolate(first, second, 4, 5, **options)
    assert asked == [10] * 4
    assert rows.shape == (2, 5, *SIZE)
    assert torch.equal(rows, generator.interpolate(first, second, 4, 5, **options))
    other = generator.interpolate(first, second, 4, 5, seed=1, **options)
    assert not torch.allclose(rows, other, atol=1e-3)
    # next to no noise leaves next to nothing to be made
    (near,) = generator.interpolate(first[:1], second[:1], 1, 3, strength=1e-3, encode="noise")
    blend = torch.stack([torch.lerp(first[0], second[0], w) for w in (0, 0.5, 1)])
    assert rms(near - blend) < 0.05


def test_the_shared_noise_is_that_of_the_sample(generator):
    """What goes down is alpha x + sigma eps with the eps of the video's number and the seed."""
    seen = []
    net = generator.system.ema.ema_model.net
    hook = net.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    first, second = clips(2), clips(2, seed=1)
    generator.interpolate(first, second, 1, 2, encode="noise", seed=3, batch_size=9)
    hook.remove()
    path = generator.system.model.path
    t = torch.tensor(0.5, dtype=torch.float64)
    x = generator.system.codec._fold("video", torch.stack((first, second), 1).flatten(0, 1))
    eps = Noise(3, [0, 1], "interpolate").like(x[:2]).repeat_interleave(2, 0)
    assert torch.allclose(seen[0], path.alpha(t) * x + path.sigma(t) * eps, atol=1e-5)


@pytest.mark.parametrize("encode", ["ddim_inversion", "noise"])
def test_a_video_that_turns_into_another(generator, encode, asked):
    first, second = clips(2), clips(2, seed=1)
    options = {"mode": "transition", "encode": encode, "strength": 0.01, "refine": 1}
    made = generator.interpolate(first, second, 2, **options)
    assert asked[-2:] == [2, 2]
    assert made.shape == first.shape
    at = torch.linspace(0, 1, 4).view(4, 1, 1)
    assert rms(made - torch.lerp(first, second, at)) < 0.2
    assert rms(first - second) > 0.3
    exact = generator.interpolate(first, second, 2, clip_endpoints=True, **options)
    assert torch.equal(exact[:, :, 0], first[:, :, 0])
    assert torch.equal(exact[:, :, -1], second[:, :, -1])
    assert torch.equal(exact[:, :, 1:-1], made[:, :, 1:-1])


def test_frames_between(generator, asked, monkeypatch):
    first, second = clips(2, (3, 5, 8, 8)), clips(2, (3, 3, 8, 8), seed=1)
    made = generator.interpolate(first, second, 4, 6, mode="between")
    assert asked == [2] * 4
    assert made.shape == (2, 3, 2 + 6 + 2, 8, 8)
    assert torch.equal(made[:, :, :2], first[:, :, -2:])
    assert torch.equal(made[:, :, -2:], second[:, :, :2])
    again = generator.interpolate(first, second, 4, 6, mode="between", seed=1)
    assert torch.equal(again[:, :, :2], made[:, :, :2])
    assert not torch.allclose(again[:, :, 2:-2], made[:, :, 2:-2], atol=1e-3)
    still = generator.interpolate(first[:, :, :1], second[:, :, :1], 2, 1, mode="between")
    assert still.shape == (2, 3, 3, 8, 8)
    # new frames are led to where the network would find the known ones by itself
    monkeypatch.setattr("avdiffusion.video_generator.Reconstruct", Replace)
    other = generator.interpolate(first, second, 4, 6, mode="between")
    assert float((other - made)[:, :, 2:-2].abs().max()) > 1e-3


def test_what_is_wrong_is_named(generator, caplog):
    first, second = clips(), clips(1, (3, 4, 8, 12))
    for words, (one, two), options in (
        ("no middle", (first, second), {}),
        ("no middle", (first, second), {"mode": "between"}),
        ("no middle", (first, first[:, :, :3]), {}),
        (r"a video is \[B, 3, T, H, W\]", (first[0], first[0]), {}),
        ("num_interp_frames=0", (first, first), {"num_interp_frames": 0}),
        ("strength=2", (first, first), {"strength": 2}),
        ("mode='mid'", (first, first), {"mode": "mid"}),
        ("encode='vae'", (first, first), {"encode": "vae"}),
    ):
        with pytest.raises(ValueError, match=words):
            generator.interpolate(one, two, **options)
    levels = ((first + 1) * 127.5).round().byte()
    with caplog.at_level(logging.WARNING):
        options = {"num_steps": 1, "num_interp_frames": 1, "encode": "noise"}
        made = generator.interpolate(levels, levels, **options)
        assert not caplog.text
        assert rms(made - generator.interpolate(first, first, **options)) < 0.02
        generator.interpolate(255 * first, first, **options)
    assert "models know clips in [-1, 1]" in caplog.text


# ---------------------------------------------------------------------------------- as printed


@pytest.mark.slow
def test_the_readme_of_the_original_runs(tmp_path, monkeypatch):
    """Its calls as they stand there, but for the module's name."""
    written(tmp_path / "checkpoints" / "best_model.pt", *COARSE)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    generator = VideoGenerator("checkpoints/best_model.pt")

    video1 = torch.randn(1, 3, 8, 64, 64)
    video2 = torch.randn(1, 3, 8, 64, 64)

    interpolated = generator.interpolate(video1, video2, num_steps=50, num_interp_frames=20)
    assert interpolated.shape == (1, 20, 3, 8, 64, 64)
    assert interpolated.isfinite().all()
    for num_steps in (20, 100):
        videos = generator.generate(
            num_samples=4, num_frames=8, height=64, width=64, num_steps=num_steps
        )
        assert videos.shape == (4, 3, 8, 64, 64)
        assert float(videos.abs().max()) <= 1


COARSE = [
    "model.codec.patch.video=[1,16,16]",
    "model.diffusion.net.video_channels=768",
    "model.diffusion.net.channel_mult=[1]",
    "model.diffusion.net.conv=2d",
    "data.size=[32,32]",
]


def test_the_page_runs(tmp_path, monkeypatch):
    written(tmp_path / "runs" / "x" / "one" / "checkpoints" / "best.ckpt")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "video.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    small = {
        "64": "8",
        "num_steps=50": "num_steps=2",
        "num_interp_frames=20": "num_interp_frames=3",
    }
    for long, short in small.items():
        assert long in code
        code = code.replace(long, short)
    exec(code, {})
    assert sorted(file.name for file in Path("new").iterdir()) == ["000000.mp4", "000001.mp4"]
    assert len(list(Path("between").iterdir())) == 3
