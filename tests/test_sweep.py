"""Sweeps: one command, readable folders, a table; what fails or is killed costs no more."""

import csv
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from entry import ROOT, Project

from avdiffusion import checkpoint, run_folder, runs
from avdiffusion.sweep import Point, PointFailed, ended

commands = pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")
STEPS = 9
SMALL = (
    f"trainer.max_steps={STEPS} trainer.val_check_interval=3 logger=csv data.batch_size=4 "
    "data.train.num=10 data.val.num=4 callbacks.checkpoint.every=3 callbacks.samples.every=0 "
    "callbacks.samples.num=2 callbacks.samples.final_num=2 callbacks.samples.save=[wav] "
    "sampler.steps=2 val_metrics=[]"
)
GRID = "model.optimizer.lr=1e-3,1e-2,10 seed=0,1"
POINTS = [f"model.optimizer.lr-{lr}_seed-{s}" for lr in ("0.001", "0.01", "10") for s in (0, 1)]


@pytest.fixture
def project(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    project = Project(tmp_path_factory.mktemp("project"))
    yield project
    project.close()


def folder(project, name="quickstart"):
    """The only sweep there is."""
    (found,) = project.folder.glob(f"runs/{name}/multirun/*")
    return found


def objectives(root):
    return {row["run"]: row["objective"] for row in runs.read_all(root)[0]}


# ------------------------------------------------------------------------------------- one point


def point(tmp_path, error, run=True):
    if run:
        (tmp_path / ".hydra").mkdir(parents=True)
        (tmp_path / ".hydra" / "overrides.yaml").write_text("- seed=0\n")
    with Point(str(tmp_path), known=(ValueError,), message=checkpoint.message):
        raise error


def test_an_error_is_recorded_and_can_be_sent_by_a_worker(tmp_path, caplog):
    folder = tmp_path / "batch_size-3"
    with pytest.raises(PointFailed) as failed:
        point(folder, ValueError("batch_size=3\nis odd"))
    assert run_folder.status(folder)["status"] == "failed"
    assert run_folder.status(folder)["error"] == "batch_size=3 is odd"
    assert not any(each.exc_info for each in caplog.records if each.name == "avdiffusion")
    copy = pickle.loads(pickle.dumps(failed.value))
    assert str(copy) == str(failed.value) == "batch_size-3: batch_size=3 is odd"
    assert ended(copy) == str(copy)


def test_an_unexpected_error_leaves_its_traceback(tmp_path, caplog):
    with caplog.at_level(logging.ERROR, "avdiffusion"), pytest.raises(PointFailed):
        point(tmp_path, RuntimeError("shapes differ"))
    assert "RuntimeError: shapes differ" in run_folder.status(tmp_path)["error"]
    assert "in point" in caplog.text


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit(143)])
def test_a_signal_ends_the_sweep(tmp_path, end):
    with pytest.raises(BaseException) as raised:  # noqa: PT011
        point(tmp_path, end)
    assert not isinstance(raised.value, Exception)
    assert run_folder.status(tmp_path) == {}


def test_a_folder_that_is_no_run_gets_no_record(tmp_path):
    with pytest.raises(PointFailed) as failed:
        point(tmp_path, ValueError("no"), run=False)
    assert list(tmp_path.iterdir()) == []
    assert ended(failed.value) == "no"


# --------------------------------------------------------------------------------- whole commands


@commands
@pytest.mark.slow
def test_a_sweep_of_six_points_and_its_table(project):
    """One command; folders say what differs; the table names the best, also as CSV."""
    result = project(f"python train.py -m {SMALL} {GRID}")
    assert result.status == 0, result.err
    root = folder(project)
    assert sorted(f.parent.name for f in root.glob("*/run.json")) == POINTS
    scores = {f.parent.name: json.loads(f.read_text()) for f in root.glob("*/run.json")}
    assert {each["status"] for each in scores.values()} == {"finished"}
    best = min(scores, key=lambda name: scores[name]["objective"]["value"])
    assert best.startswith("model.optimizer.lr-0.01")  # 10 diverges, 1e-3 is slow
    last = result.out.strip().splitlines()[-1]
    assert last.startswith(f"best: {best}, val/loss ")
    assert (project.folder / last.split(": ")[-1]).is_file()

    done = subprocess.run(
        [sys.executable, "-m", "avdiffusion.runs", str(root), "--csv", str(root / "table.csv")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[1].startswith(best)
    with (root / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["run"] == best
    assert {row["model.optimizer.lr"] for row in rows} == {"0.001", "0.01", "10"}
    values = [float(row["objective"]) for row in rows]
    assert values == sorted(each["objective"]["value"] for each in scores.values())


@commands
@pytest.mark.slow
def test_a_point_that_cannot_work_does_not_stop_the_others(project):
    result = project(f"python train.py -m {SMALL} data.micro_batch=3,2 seed=0,1")
    assert result.status == 1
    error = result.err.strip().splitlines()[-1]
    assert error.startswith("error: 2 of 4 points failed: data.micro_batch-3_seed-0, ")
    assert "does not divide" in error
    root = folder(project)
    status = {f.parent.name: json.loads(f.read_text())["status"] for f in root.glob("*/run.json")}
    assert status == {
        f"data.micro_batch-{size}_seed-{seed}": "failed" if size == 3 else "finished"
        for size in (2, 3)
        for seed in (0, 1)
    }
    assert "does not divide" in (root / "data.micro_batch-3_seed-1" / "train.log").read_text()
    assert "best: data.micro_batch-2_seed" in result.out


def content(point):
    """Everything of a run but Hydra's records of the command, and the log."""
    files = [f for f in Path(point).rglob("*") if f.is_file() and ".hydra" not in f.parts]
    return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files if f.name != "train.log"}


def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@commands
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_was_ended_trains_only_what_is_missing(project, number):
    whole = project(f"python train.py -m name=whole {SMALL} {GRID}")
    assert whole.status == 0, whole.err

    running = project.start(f"python train.py -m name=ended {SMALL} {GRID}")
    third = f"runs/ended/multirun/*/{POINTS[2]}/checkpoints/last.ckpt"
    wait_for(lambda: list(project.folder.glob(third)))
    running.kill() if number == signal.SIGKILL else running.send(number)
    assert running.wait().status == (-9 if number == signal.SIGKILL else 143)
    root = folder(project, "ended")
    ended = {f.name: run_folder.status(f).get("status") for f in run_folder.folders(root)}
    assert [ended.get(name) for name in POINTS[:2]] == ["finished", "finished"]
    assert ended[POINTS[2]] != "finished"
    assert POINTS[4] not in ended
    before = {name: content(root / name) for name in POINTS[:2]}

    again = project(f"python train.py -m name=ended {SMALL} {GRID} ckpt=auto")
    assert again.status == 0, again.err
    assert folder(project, "ended") == root
    assert {name: content(root / name) for name in POINTS[:2]} == before
    states = {name: run_folder.status(root / name) for name in POINTS}
    assert {state["status"] for state in states.values()} == {"finished"}
    assert {name: state["starts"] for name, state in states.items() if state["starts"] > 1} == {
        POINTS[2]: 2
    }
    assert objectives(root) == objectives(folder(project, "whole"))
    best = whole.out.strip().splitlines()[-1].split(":")[1]
    assert again.out.strip().splitlines()[-1].split(":")[1] == best


# -------------------------------------------------------------------------------------- launchers


INSTALLED = find_spec("hydra_plugins") is not None
LAUNCHERS = pytest.mark.skipif(not INSTALLED, reason='needs pip install -e ".[sweep]"')


def train(folder, words, **env):
    """Runs train.py in a process of its own: launchers start more of them."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    env.pop("HYDRA_FULL_ERROR", None)
    command = [sys.executable, str(ROOT / "train.py"), "-m", *words.split()]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done


@commands
@pytest.mark.skipif(INSTALLED, reason="they are installed here")
def test_a_launcher_that_is_missing_is_named_with_the_remedy(project):
    for launcher in ("parallel", "slurm"):
        result = project(f"python train.py -m hydra/launcher={launcher} seed=0,1")
        assert result.status == 1
        assert result.error.startswith("this launcher is not installed: pip install")
        assert ".[sweep]" in result.error
    assert project.files() == set()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@LAUNCHERS
@pytest.mark.parametrize("launcher", ["parallel", "submitit_local"])
def test_points_side_by_side(tmp_path, launcher):
    """Also with workers that load data; one point fails, the others are what they are alone."""
    words = f"{SMALL} data.num_workers=1 data.micro_batch=2,3 seed=0,1"
    done = train(tmp_path, f"hydra/launcher={launcher} {words}")
    assert done.returncode == 1, done.stderr
    assert "error: 2 of 4 points failed" in done.stderr.strip().splitlines()[-1]
    (root,) = tmp_path.glob("runs/quickstart/multirun/*")
    side_by_side = objectives(root)
    assert sorted(name for name, value in side_by_side.items() if value is not None) == [
        "data.micro_batch-2_seed-0",
        "data.micro_batch-2_seed-1",
    ]
    alone = train(tmp_path, f"name=alone {words.replace('=2,3', '=2').replace('=0,1', '=1')}")
    assert alone.returncode == 0, alone.stderr
    (value,) = objectives(tmp_path / "runs" / "alone").values()
    assert side_by_side["data.micro_batch-2_seed-1"] == pytest.approx(value, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@LAUNCHERS
def test_a_job_that_runs_out_of_time_is_saved_and_queued_again(tmp_path):
    """The signal that SLURM sends before the time is over; submitit's local queue starts anew."""
    long = SMALL.replace(f"max_steps={STEPS}", "max_steps=200").replace("interval=3", "interval=50")
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=submitit_local"]
    command += [*long.split(), "seed=0", "ckpt=auto", "callbacks.checkpoint.every=1000"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "out").open("w") as out:
        running = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=out)
    ids = "runs/quickstart/multirun/*/.submitit/*/*_submitted.pkl"
    metrics = "runs/quickstart/multirun/*/*/metrics.csv"
    wait_for(lambda: list(tmp_path.glob(metrics)))
    controller = next(iter(tmp_path.glob(ids))).name.split("_")[0]
    (worker,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(worker), signal.SIGUSR2)
    assert running.wait(timeout=900) == 0, (tmp_path / "out").read_text()
    (record,) = tmp_path.glob("runs/quickstart/multirun/*/*/run.json")
    record = json.loads(record.read_text())
    assert (record["status"], record["step"], record["starts"]) == ("finished", 200, 2)


@LAUNCHERS
def test_the_job_that_slurm_is_asked_for(tmp_path):
    """One task for each device, the limits of the preset, a readable name."""
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {"sbatch": f'cp "$1" {tmp_path}/job; echo Submitted batch job 7', "srun": "exit 1"}
    for name, text in {**scripts, "sacct": "exit 1", "scontrol": "exit 1"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=slurm", "seed=0,1"]
    command += ["trainer.accelerator=gpu", "trainer.devices=4", "hydra.launcher.partition=long"]
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    waits = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for((tmp_path / "job").is_file)
    waits.kill()  # it would wait for the jobs
    waits.wait()
    asked = {line for line in (tmp_path / "job").read_text().splitlines() if "#SBATCH" in line}
    for option in ("array=0-1%2", "nodes=1", "gpus-per-node=4", "ntasks-per-node=4"):
        assert f"#SBATCH --{option}" in asked
    for option in ("job-name=quickstart", "time=1440", "signal=USR2@300", "partition=long"):
        assert f"#SBATCH --{option}" in asked


# ----------------------------------------------------------------------------------------- search


@commands
@pytest.mark.slow
def test_the_search_of_the_page(project):
    """As it stands in docs/sweeps.md, with fewer steps and a stand-in that tries two rates."""
    page = (ROOT / "docs" / "sweeps.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    small = ", ".join(repr(word) for word in SMALL.split())
    script = script.replace('"trainer.max_steps=400"', small)
    (project.folder / "search.py").write_text(script)
    (project.folder / "optuna.py").write_text(OPTUNA)
    result = project("python search.py")
    assert result.status == 0, result.err
    values = objectives(project.folder / "runs" / "search")
    assert list(values) == ["000", "001"]
    assert result.out.strip().splitlines()[-1] == str({"lr": 0.01})
    assert values["001"] < values["000"]


OPTUNA = """
from types import SimpleNamespace


class Study:
    def optimize(self, objective, n_trials, catch):
        assert n_trials > 1
        rates, values = (1e-4, 1e-2), {}
        for number, rate in enumerate(rates):
            trial = SimpleNamespace(number=number, suggest_float=lambda *_, log: rate)
            values[rate] = objective(trial)
        self.best_params = {"lr": min(values, key=values.get)}


def create_study(*, study_name, storage, load_if_exists):
    return Study()
"""
