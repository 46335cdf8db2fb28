"""The calls of video to video: a model is loaded, a video made of another, pairs are read."""

import re

import numpy as np
import pytest
import torch
from entry import ROOT
from media_files import make_media

from avdiffusion import checkpoint, io
from avdiffusion.data.pairs import Pairs
from avdiffusion.diffusion.noise import key
from avdiffusion.restore import restore
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.video_to_video import (
    Trainer,
    VideoDataset,
    VideoToVideoDiffusion,
    generate_video,
)

SMALL = [
    "~exp",
    "name=small",
    "data=spoilt_shapes",
    "model=video",
    "model/net=video_tiny",
    "model/conditioner=source",
    "model.diffusion.net.concat_channels=3",
    "model.diffusion.net.channels=8",
    "data.frames=4",
    "data.size=[16,16]",
    "sampler=ddim",
    "sampler.steps=3",
    "paths.run=run",
]


def written(path, *words):
    """A checkpoint as training writes it, of a network whose average has been somewhere."""
    torch.manual_seed(0)
    config = checkpoint.plain(checkpoint.compose([*SMALL, *words]))
    system = checkpoint.build(config["model"])
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    content = {"state_dict": system.state_dict(), "hyper_parameters": config, "global_step": 7}
    system.on_save_checkpoint(content)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("run") / "checkpoint.pt")


@pytest.fixture(scope="module")
def model(file):
    return VideoToVideoDiffusion.load_checkpoint(file)[0]


@pytest.fixture
def given(tmp_path):
    path = tmp_path / "input.mp4"
    make_media(path, seconds=0.44, size=(32, 48), codecs=("libx264", "aac"))
    return path


def test_a_checkpoint_and_what_it_holds(file, model):
    again, content = VideoToVideoDiffusion.load_checkpoint(file)
    assert content["global_step"] == 7
    assert content["hyper_parameters"]["name"] == "small"
    for name, value in model.state_dict().items():
        assert torch.equal(value, content["state_dict"][name])
        assert torch.equal(value, again.state_dict()[name])


def test_models_of_nothing_given_are_refused(tmp_path):
    words = ["model/conditioner=none", "model.diffusion.net.concat_channels=0"]
    plain = written(tmp_path / "plain.ckpt", *words)
    with pytest.raises(ValueError, match=r"plain\.ckpt makes no video of another one"):
        VideoToVideoDiffusion.load_checkpoint(plain)


def test_training_has_one_way(tmp_path):
    for call in (
        lambda: VideoToVideoDiffusion({"latent_dim": 4}),
        lambda: Trainer(model=None, optimizer=None, train_dataloader=[]),
    ):
        with pytest.raises(ValueError, match=r"python train\.py exp=v2v_seed"):
            call()


def test_a_video_is_made_of_another(model, given, tmp_path):
    output = generate_video(
        model=model,
        input_video_path=str(given),
        output_path=str(tmp_path / "output.mp4"),
        sampler_type="ddim",
        num_inference_steps=2,
    )
    assert output.shape == (3, 11, 32, 48)
    before, after = io.probe(given), io.probe(tmp_path / "output.mp4")
    for name in ("fps", "height", "width", "sample_rate", "video_end", "audio_end"):
        assert getattr(before, name) == getattr(after, name), name
    own = io.read_clip(tmp_path / "output.mp4")
    assert torch.equal(output, torch.from_numpy(own["video"]).float() / 127.5 - 1)
    heard = io.read_clip(given, modalities=["audio"])["audio"]
    assert np.array_equal(own["audio"][:, : heard.shape[1]], heard[:, : own["audio"].shape[1]])


@pytest.mark.parametrize(("name", "sampler"), [("ddim", DDIM), ("ddpm", DDPM)])
def test_it_is_what_restoring_makes(name, sampler, model, given, tmp_path):
    found = generate_video(model, given, tmp_path / "a.mp4", name, 3, seed=2)
    options = {"seed": 2, "sampler": sampler(steps=3), "frames": 4}
    restore(model, given, tmp_path / "b.mp4", index=key("clip", "input.mp4"), **options)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    other = generate_video(model, given, tmp_path / "a.mp4", name, 3, seed=3)
    assert not torch.equal(found, other)


def test_wrong_calls_are_named(model, given, tmp_path):
    with pytest.raises(ValueError, match="sampler_type='heun' is not one of ddim, ddpm"):
        generate_video(model, given, tmp_path / "x.mp4", "heun")
    with pytest.raises(ValueError, match=r"input\.mp4 is the video that is given"):
        generate_video(model, given, given)
    with pytest.raises(ValueError, match="source_type='huggingface' is not one of list, directory"):
        VideoDataset("t2ance/APE-data", source_type="huggingface")


def test_pairs_by_the_names_of_the_original(tmp_path):
    for side in ("input", "target"):
        (tmp_path / side).mkdir()
        for k in range(3):
            make_media(tmp_path / side / f"{k}.mp4", seconds=1, codecs=("libx264", None))
    video_pairs = [
        {side: str(tmp_path / side / f"{k}.mp4") for side in ("input", "target")} for k in range(3)
    ]
    settings = {"num_frames": 5, "resolution": (24, 32)}
    listed = VideoDataset(data_source=video_pairs, source_type="list", **settings)
    folder = VideoDataset(tmp_path, "directory", **settings)
    plain = Pairs(tmp_path, split="all", frames=5, size=(24, 32))
    assert len(listed) == len(folder) == len(plain) == 3
    for k in range(3):
        for name in ("source", "video"):
            assert listed[k][name].shape == (3, 5, 24, 32)
            assert torch.equal(listed[k][name], plain[k][name])
            assert torch.equal(folder[k][name], plain[k][name])
    shorter = VideoDataset(video_pairs, "list", fps=25, **settings)
    assert len(shorter) > len(listed)


def test_the_page_runs(file, given, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "video_to_video.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for side in ("input", "target"):
        (tmp_path / side).mkdir()
        for k in (1, 2):
            make_media(tmp_path / side / f"{k}.mp4", seconds=2, codecs=("libx264", None))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint.pt").symlink_to(file)
    scope = {}
    exec(code.replace("num_inference_steps=20", "num_inference_steps=1"), scope)
    assert scope["output"].shape == (3, 11, 32, 48)
    assert scope["dataset"][1]["source"].shape == (3, 16, 256, 256)
