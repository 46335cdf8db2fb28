"""Which run goes on, and what a command line becomes before Hydra sees it."""

import json
import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from avdiffusion import launch, run_folder
from avdiffusion.checkpoint import CONFIGS, compose, plain

FAST = ["debug=fast", "logger=csv"]


@pytest.fixture
def begun(tmp_path):
    """Makes run folders as `train.py` leaves them, each newer than the one before."""

    def make(folder, *overrides, status="running", name="quickstart"):
        path = tmp_path / "runs" / name / folder
        (path / "checkpoints").mkdir(parents=True)
        config = compose([*FAST, f"paths.runs={tmp_path}/runs", *overrides])
        OmegaConf.update(config, "paths.run", str(path))
        OmegaConf.save(OmegaConf.create(plain(config)), path / "config.yaml")
        (path / "run.json").write_text(json.dumps({"status": status}))
        make.age += 10
        for file in path.iterdir():
            os.utime(file, (make.age, make.age))
        return path

    make.age = 1_700_000_000
    return make


def words(tmp_path, *given):
    return launch.words([*FAST, f"paths.runs={tmp_path}/runs", *given], CONFIGS)


def place(tmp_path, *given):
    """The folder that a command goes on in, None if it begins a run."""
    extra = words(tmp_path, *given)[len(FAST) + 1 + len(given) :]
    if not extra:
        return None
    (word,) = extra
    assert word.startswith("hydra.run.dir=")
    return word.removeprefix("hydra.run.dir=").strip("'")


def test_the_newest_unfinished_run_of_the_same_config_goes_on(tmp_path, begun):
    assert place(tmp_path, "ckpt=auto") is None
    older = begun("a", status="stopped")
    newer = begun("b", status="failed")
    begun("c", status="finished")
    begun("d", "model.optimizer.lr=0.5")
    begun("e", name="other")
    assert place(tmp_path, "ckpt=auto") == str(newer)
    assert place(tmp_path, "+ckpt=auto") == place(tmp_path, "ckpt='auto'") == str(newer)
    (newer.parent / "damaged").mkdir()
    (newer.parent / "damaged" / "config.yaml").write_text("paths: {run: '")
    assert place(tmp_path, "ckpt=auto") == str(newer)
    (newer / "run.json").write_text(json.dumps({"status": "finished"}))
    assert place(tmp_path, "ckpt=auto") == str(older)
    assert place(tmp_path) is None
    assert place(tmp_path, "ckpt=last") is None
    assert place(tmp_path, "ckpt=auto", "seed=3") is None


@pytest.mark.parametrize(
    "word", ["data.num_workers=2", "data.micro_batch=1", "trainer.devices=1", "logger=none"]
)
def test_what_may_differ(tmp_path, begun, word):
    run = begun("a")
    assert place(tmp_path, "ckpt=auto", word) == str(run)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.max_steps=5", "model.lr_schedule.total_steps was 4, is 5"),
        ("data.batch_size=4", "data.batch_size was 2, is 4"),
        ("+model.new=1", "model.new was not there, is 1"),
    ],
)
def test_what_may_not_differ(tmp_path, begun, word, said):
    run = begun("a")
    assert place(tmp_path, "ckpt=auto", word) is None
    config = compose([*FAST, f"paths.runs={tmp_path}/elsewhere", word])
    assert launch.difference(config, run) == said


def test_a_folder_that_is_given_is_left_alone(tmp_path, begun):
    begun("a")
    given = ["ckpt=auto", f"hydra.run.dir={tmp_path}/x"]
    assert words(tmp_path, *given)[-2:] == given
    for flag in ("--help", "--cfg"):
        assert words(tmp_path, "ckpt=auto", flag)[-1] == flag
    with pytest.raises(ValueError, match="--config-name"):
        words(tmp_path, "ckpt=auto", "--config-name=other")


def test_a_run_that_another_process_trains_is_left_alone(tmp_path, begun):
    run = begun("a")
    holder = (
        "import sys; from avdiffusion import run_folder; from pathlib import Path\n"
        "held = run_folder.hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is training"):
            run_folder.hold(run)
        assert place(tmp_path, "ckpt=auto") is None
        run_folder.fail(run, "no data")
        assert run_folder.status(run)["status"] == "running"
    finally:
        process.kill()
        process.wait()
    assert place(tmp_path, "ckpt=auto") == str(run)


def test_processes_beside_the_first_leave_no_folder(tmp_path, begun, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    quiet = ["hydra.output_subdir=null", f"hydra.job_logging.handlers.file.filename={os.devnull}"]
    assert words(tmp_path)[3:] == ["hydra.run.dir=.", *quiet]
    assert words(tmp_path, "ckpt=auto")[4:] == ["hydra.run.dir=.", "ckpt=null", *quiet]
    run = begun("a")
    assert words(tmp_path, "ckpt=auto")[4:] == [f"hydra.run.dir='{run}'", *quiet]
    spawned = ["hydra.job.name=train_ddp_process_1", "ckpt=auto"]
    assert words(tmp_path, *spawned)[3:] == spawned


def test_torchrun_decides_on_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert words(tmp_path)[3:] == ["trainer.devices=4", "trainer.num_nodes=2", "strategy=ddp"]
    config = compose(words(tmp_path))
    assert (config.trainer.devices, config.trainer.num_nodes) == (4, 2)
    assert "DDP" in config.trainer.strategy._target_
    with pytest.raises(ValueError, match="one torchrun command for each point"):
        words(tmp_path, "-m", "seed=0,1")
    given = ["trainer.devices=4", "strategy=auto"]
    assert words(tmp_path, *given)[3:] == [*given, "trainer.num_nodes=2"]


def test_the_newest_checkpoint_that_can_be_read(tmp_path, begun, monkeypatch, caplog):
    run = begun("a")
    assert launch.newest(run) is None
    for name in ("last.ckpt", "step0000020.ckpt", "step0000010.ckpt"):
        (run / "checkpoints" / name).write_bytes(b"half")
    assert launch.newest(run) is None
    assert "the one before it is tried" in caplog.text
    good = run / "checkpoints" / "step0000010.ckpt"

    def read(path, mmap):
        if path != good:
            raise launch.CheckpointError(f"{path} is damaged")

    monkeypatch.setattr(launch, "read", read)
    assert launch.newest(run) == good
