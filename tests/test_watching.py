"""A run of the default callbacks holds what docs/wandb.md says, in every logger."""

import csv
import itertools
import os
import re
from base64 import b64decode
from importlib.util import find_spec
from io import BytesIO

import pytest
import torch
import yaml
from entry import ROOT, Project
from PIL import Image
from wandb_reader import history, records, summary

from avdiffusion import checkpoint

PAGE = (ROOT / "docs" / "wandb.md").read_text()
# What the quickstart on this machine does not log: columns "metric" and "when" of the table.
ABSENT = {"learned variance", "val_metrics=[fvd,kvd,fad,kad]", "autoencoders"}
ABSENT |= {"super-resolution, autoencoders, video to video"}
ABSENT |= {f"val_metrics=[{name}]" for name in ("restoration", "lpips", "flicker", "stft")}
ABSENT |= set() if torch.cuda.is_available() else {"GPU"}
MEDIA = {"sample/clips", "sample/strips", "sample/evolution"}
RUN = """python train.py debug=fast trainer.max_steps=6 data.batch_size=8 sampler.steps=1
callbacks.samples.every=2 callbacks.samples.num=2 callbacks.samples.final_num=2
callbacks.samples.micro_batch=2 callbacks.samples.real_num=4""".replace("\n", " ")
RUN += ' "val_metrics=[sync,toy_f1,kvd_thumbnail]"'

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")


def table():
    """Names of the page's table, and when each is logged."""
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", PAGE.split("## What is logged")[1], re.M)
    return {name: when.strip("` ") for names, when in rows for name in re.findall("`(.+?)`", names)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run with all loggers that are installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("WANDB_MODE", "offline")
        project = Project(tmp_path_factory.mktemp("watched"))
        board = ",tensorboard" if find_spec("tensorboard") else ""
        result = project(f'{RUN} "logger=[csv,wandb{board}]"')
        project.close()
    assert result.status == 0, result.err
    (folder,) = project.folder.glob("runs/quickstart/*")
    return folder


@pytest.fixture(scope="module")
def logged(run):
    """W&B's rows: name to {step: value}, the last where a step has several."""
    (folder,) = run.glob("wandb/offline-run-*")
    found = {}
    for row in history(folder):
        for name, value in row.items():
            name = re.sub(r"(sample/(clips|strips|evolution))\..*", r"\1", name)
            if not name.startswith("_") and name != "trainer/global_step":
                found.setdefault(name, {})[row["trainer/global_step"]] = value
    return found


@pytest.mark.slow
@forks
def test_wandb_holds_every_metric_of_the_page_and_no_other(logged):
    assert len(table()) > 60
    assert {name for name, when in table().items() if when not in ABSENT} == set(logged)


@pytest.mark.slow
@forks
def test_clips_play_with_sound_and_pictures_are_there(run):
    av = pytest.importorskip("av")
    (folder,) = run.glob("wandb/offline-run-*/files/media")
    pages = list(folder.glob("html/sample/clips_*.html"))
    assert len(pages) == 3
    for page in pages:
        clips = re.findall(r'<video[^>]+src="data:video/mp4;base64,([^"]+)"', page.read_text())
        assert len(clips) == 2
        for clip in clips:
            with av.open(BytesIO(b64decode(clip))) as file:
                assert sum(1 for _ in file.decode(video=0)) == 16
                file.seek(0)
                samples = sum(frame.samples for frame in file.decode(audio=0))
                assert samples / file.streams.audio[0].rate == pytest.approx(1.6, abs=0.3)
    for name in ("strips", "evolution"):
        pictures = [Image.open(f) for f in folder.glob(f"images/sample/{name}_*.png")]
        assert len(pictures) == 3
        assert all(picture.width > 500 for picture in pictures)
    heights = sorted(picture.height for picture in pictures)
    assert heights[0] < heights[1] < heights[2]  # a row for every step


@pytest.mark.slow
@forks
def test_wandb_holds_the_config_and_the_command(run):
    (folder,) = run.glob("wandb/offline-run-*")
    config = yaml.safe_load((run / "config.yaml").read_text())
    told = summary(folder)["config"]
    assert {name: told[name] for name in config} == config
    assert "debug=fast" in next(r["args"] for r in records(folder, "environment") if "args" in r)
    assert (folder / "files" / "requirements.txt").read_text().count("==") > 10


@pytest.mark.slow
@forks
def test_the_other_loggers_hold_the_same_numbers(run, logged):
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = {}
    for row in rows:
        for name, value in row.items():
            if value and name != "step":
                table.setdefault(name, {})[int(row["step"])] = pytest.approx(float(value), rel=1e-5)
    assert {name: steps for name, steps in logged.items() if name not in MEDIA} == table
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    board = {
        name: {e.step: e.value for e in events.Scalars(name)} for name in events.scalars.Keys()
    }
    assert board == table
    assert {"sample/strips", "sample/evolution"} <= set(events.Tags()["images"])


def test_the_sweep_file_makes_commands_that_compose():
    """The words are made by W&B's own agent."""
    pytest.importorskip("wandb")
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    (text,) = re.findall(r"```yaml\n(program: .*?)```", PAGE, re.DOTALL)
    sweep = yaml.safe_load(text)
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["command"][-1] == "${args_no_hyphens}"
    assert sweep["metric"]["name"] in table()
    fixed = [word for word in sweep["command"] if "$" not in word]
    choices = [p.get("values", [p.get("min"), p.get("max")]) for p in sweep["parameters"].values()]
    points = list(itertools.product(*choices))
    assert len(points) == 8
    for point in points:
        given = dict(zip(sweep["parameters"], point, strict=True))
        args = {"args": {name: {"value": value} for name, value in given.items()}}
        words = create_sweep_command_args(args)["args_no_hyphens"]
        config = checkpoint.compose([*fixed, *words])
        assert config.model.optimizer.lr == given["model.optimizer.lr"]
        assert config.model.diffusion.target == given["model.diffusion.target"]
