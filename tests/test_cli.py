"""Command lines as people type them: what cannot work ends in one line that says why."""

import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from entry import Project
from media_files import make_media

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked"),
    pytest.mark.timeout(600),
]
FOLDER = "python train.py exp=folder logger=csv debug=fast data.num_workers=0"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Commands that share caches and an offline W&B of their own."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("WANDB_MODE", "offline")
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        project = Project(folder)
        yield project
        project.close()


@pytest.fixture
def refused(project):
    """Runs a command that has to fail in one line, and leave nothing behind."""

    def run(command):
        before = project.files()
        result = project(command)
        assert result.status == 1, result
        assert project.files() == before
        return result.error

    return run


def clip(path, **options):
    options = {"seconds": 2, "sample_rate": 16000, **options}
    return make_media(path, **options).path


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    return folder


# ---------------------------------------------------------------------------------------- folders


def test_missing_and_empty_folders(refused, clips):
    assert "data.root is needed" in refused(FOLDER)
    assert f"no folder: {clips}/nowhere" in refused(f"{FOLDER} data.root={clips}/nowhere")
    assert "no audio or video files" in refused(f"{FOLDER} data.root={clips}")
    (clips / "notes.txt").write_text("nothing to see")
    assert "1 other files" in refused(f"{FOLDER} data.root={clips}")


def test_files_that_are_no_clips(refused, clips):
    clip(clips / "silent.mp4", silent=True)
    assert "silent.mp4 (silent from beginning to end)" in refused(f"{FOLDER} data.root={clips}")
    whole = clip(clips / "whole.mp4").read_bytes()
    (clips / "silent.mp4").unlink()
    (clips / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (clips / "text.mp4").write_text("this is no video\n" * 100)
    (clips / "empty.mp4").touch()
    clip(clips / "mute.mp4", codecs=("libx264", None))
    clip(clips / "short.mp4", seconds=0.5)
    error = refused(f"{FOLDER} data.root={clips}")
    assert "5 of 6 files" in error
    assert "data.train.on_bad=skip" in error
    assert "cut.mp4" in error
    for name in ("whole", "cut", "text", "mute"):
        (clips / f"{name}.mp4").unlink()
    error = refused(f"{FOLDER} data.root={clips} data.train.on_bad=skip")
    assert "2 of 2 files" in error
    assert "shorter than the window" in error


@pytest.mark.parametrize("name", ["a, b = [c] ~d", "clips $HOME 'quoted'"])
def test_a_root_with_spaces_brackets_and_signs(refused, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    quoted = str(folder).replace("'", "\\'")
    word = shlex.quote(f"data.root='{quoted}'")
    assert str(folder) in refused(f"{FOLDER} {word}")


# --------------------------------------------------------------------------------- sizes and words


def test_sizes_that_do_not_fit(refused):
    fast = "python train.py logger=csv debug=fast"
    error = refused(f"{fast} data.samples=6000")
    assert "1.5000 s" in error
    assert "1.6000 s" in error
    assert "6400" in error
    error = refused(f'{fast} exp=folder data=toy "data.size=[36,32]"')
    assert "36x32" in error
    error = refused(f"{fast} data.batch_size=6 data.micro_batch=4")
    assert "micro_batch=4" in error


def test_words_that_are_no_settings(refused):
    assert "ddim ddpm" in refused("python train.py sampler=nope")
    assert "sampler/nope" in refused("python sample.py ckpt=x sampler=nope")
    assert "frame_rate" in refused("python train.py data.frame_rate=10")
    assert "ckpt='a=b.ckpt'" in refused("python train.py ckpt=a=b.ckpt")
    assert "kind 'bounces'" in refused("python train.py data.train.kind=bounces debug=fast")


# ------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_that_are_none(refused, tmp_path):
    assert "ckpt is needed" in refused("python sample.py")
    for name in ("sample", "train"):
        assert "no checkpoint at x.ckpt" in refused(f"python {name}.py '+ckpt=\"x.ckpt\"'")
    assert "train first" in refused("python sample.py ckpt=last")
    assert "no run folder" in refused(f"python sample.py ckpt={tmp_path}")
    other = tmp_path / "other.ckpt"
    other.write_text("text")
    assert "other.ckpt" in refused(f"python sample.py ckpt={other}")
    torch.save({"state_dict": {}, "epoch": 1}, other)
    assert "no avdiffusion checkpoint" in refused(f"python sample.py ckpt={other}")
    assert "no avdiffusion checkpoint" in refused(f"python train.py ckpt={other} debug=fast")
    torch.save({"avdiffusion": {"format": 999, "version": "9"}}, other)
    assert "format 999" in refused(f"python sample.py ckpt={other}")
    torch.save(np.random.default_rng, other)
    assert "refused" in refused(f"python sample.py ckpt={other}")


HOSTILE = {
    "writes": {"_target_": "pathlib.Path.write_text", "self": "written", "data": "x"},
    "opens": {"_target_": "builtins.open", "file": "written", "mode": "w"},
    "runs": {"_target_": "os.system", "command": "touch written"},
    "fetches": {"_target_": "urllib.request.urlopen", "url": "http://localhost:9/"},
    "ours": {"_target_": "avdiffusion.nn.blocks.torch.load", "f": "written"},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_configs_are_refused_by_name(refused, project, tmp_path, kind):
    config = {"model": {"_target_": "avdiffusion.systems.diffusion.DiffusionSystem"}}
    config |= {"sampler": {}, "guide": {"clamp": HOSTILE[kind]}, "name": "x"}
    stored = {"avdiffusion": {"format": 1, "version": "0.1.0"}, "hyper_parameters": config}
    path = tmp_path / "hostile.ckpt"
    torch.save({**stored, "state_dict": {}}, path)
    error = refused(f"python sample.py ckpt={path}")
    assert HOSTILE[kind]["_target_"] in error
    assert not (project.folder / "written").exists()


# ------------------------------------------------------------------------------- what has to work


@pytest.fixture(scope="module")
def trained(project):
    """The run folder of a quickstart of four steps."""
    few = " ".join(f"callbacks.samples.{name}=2" for name in ("num", "final_num", "real_num"))
    result = project(f"python train.py debug=fast callbacks.samples.micro_batch=2 {few}")
    assert result.status == 0, result.err
    return max(project.folder.glob("runs/quickstart/*/"), key=lambda f: f.stat().st_mtime)


def test_train_then_sample(project, trained):
    assert {"config.yaml", "metrics.csv", "checkpoints", "samples"} <= {
        f.name for f in trained.iterdir()
    }
    result = project("python sample.py ckpt=last num=2 out=clips micro_batch=2")
    assert result.status == 0, result.err
    assert str(Path("clips", "gallery.html")) in result.out
    names = {f.name for f in (project.folder / "clips").iterdir()}
    assert {"000000.mp4", "000001.wav", "samples.json", "gallery.html"} <= names


def test_samples_of_other_settings_are_kept_apart(project, trained, refused):
    assert project(f"python sample.py ckpt={trained} num=1 micro_batch=1 out=kept").status == 0
    assert "overwrite=true" in refused(
        f"python sample.py ckpt={trained} num=1 micro_batch=1 out=kept seed=3"
    )
    assert "steps" in refused(f"python sample.py ckpt={trained} sampler.steps=0 out=none")
    assert "avi" in refused(f'python sample.py ckpt={trained} "save=[avi]" out=none')


@pytest.mark.slow
def test_a_sweep_has_a_folder_for_each_point(project):
    result = project("python train.py -m seed=0,1 debug=fast logger=csv")
    assert result.status == 0, result.err
    points = list(project.folder.glob("runs/quickstart/multirun/*/*/checkpoints/last.ckpt"))
    assert sorted(p.parts[-3] for p in points) == ["seed-0", "seed-1"]
    assert len({torch.load(p, weights_only=True)["hyper_parameters"]["seed"] for p in points}) == 2


@pytest.mark.slow
def test_resuming_goes_on_from_the_last_step(project, trained):
    result = project(f"python train.py debug=fast trainer.max_steps=6 ckpt={trained} logger=csv")
    assert result.status == 0, result.err
    newest = max(project.folder.glob("runs/quickstart/*/"), key=lambda f: f.stat().st_mtime)
    assert newest != trained
    assert (newest / "checkpoints" / "step0000006.ckpt").is_file()


@pytest.mark.slow
def test_a_folder_with_bad_files_trains_without_them(project, clips):
    for number in range(4):
        clip(clips / f"{number}.mp4")
    clip(clips / "silent.mp4", silent=True)
    shutil.copy(clips / "0.mp4", clips / "a [strange] = name.mp4")
    small = '"data.size=[16,16]" data.frames=8 data.samples=12800 sampler.steps=1'
    result = project(f"{FOLDER} {small} data.root={clips} data.train.on_bad=skip")
    assert result.status == 0, result.err
    assert "5 files used, 1 left out (silent from beginning to end)" in result.out + result.err


def test_a_sweep_that_would_start_processes_is_refused(project):
    before = project.files()
    result = project(
        "python train.py -m seed=0,1 debug=fast logger=csv strategy=ddp trainer.devices=2"
    )
    assert result.status == 1
    assert "a sweep cannot start 2 processes a point: use trainer.devices=1" in result.err
    assert not [name for name in project.files() - before if name.endswith(".ckpt")]


def test_weights_alone_are_nothing_to_train_on_from(project, refused, tmp_path):
    path = tmp_path / "averaged.ckpt"
    assert project(f"python train.py debug=fast logger=csv paths.runs={tmp_path}/r").status == 0
    (last,) = tmp_path.glob("r/quickstart/*/checkpoints/last.ckpt")
    stored = torch.load(last, weights_only=True)
    del stored["optimizer_states"]
    torch.save(stored, path)
    error = refused(f"python train.py debug=fast logger=csv ckpt={path}")
    assert "no state to train on from" in error
