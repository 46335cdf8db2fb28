"""A run that is killed at any moment and goes on is the run that was not killed, bit for bit.

Real commands in processes of their own; they end by SIGKILL, SIGTERM or what has been done to them.
"""

import csv
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

import pytest
import torch
from entry import Project
from media_files import make_media

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked"),
    pytest.mark.timeout(1800),
]
STEPS = 12
TRAIN = (
    f"python train.py name=short trainer.max_steps={STEPS} trainer.val_check_interval=3 "
    "trainer.log_every_n_steps=1 logger=csv "
    "data.batch_size=4 data.micro_batch=2 data.train.num=10 data.val.num=4 model/ema=warmup "
    "callbacks.checkpoint.every=2 callbacks.samples.every=5 callbacks.samples.num=2 "
    "callbacks.samples.final_num=2 callbacks.samples.save=[wav] sampler.steps=2 val_metrics=[] "
    "+callbacks.recorder._target_=recorder.Recorder"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        project = Project(tmp_path_factory.mktemp("project"))
        yield project
        project.close()


class Run:
    """Commands that train one run, whose steps are recorded in one place."""

    def __init__(self, project, folder, *words):
        self.project, self.folder = project, folder
        self.folder.mkdir(parents=True)
        self.record = folder / "record"
        self.command = " ".join(
            [TRAIN, f"paths.runs={folder}/runs", f"+callbacks.recorder.path={self.record}", *words]
        )

    def start(self, *words, processes=1):
        """The processes of the command, on its way."""
        command = " ".join([self.command, "ckpt=auto", *words])
        if processes == 1:
            return [self.project.start(command)]
        return self.project.spread(command, processes)

    def finish(self, *words, processes=1):
        before = [len(self.lines(rank)) for rank in range(2)]
        results = [each.wait() for each in self.start(*words, processes=processes)]
        assert all(result.status == 0 for result in results), results
        # of this start: an earlier one may have had another number of processes
        lines = [self.lines(rank)[before[rank] :] for rank in range(2)]
        seen = [{p for line in each for p in line["positions"]} for each in lines]
        if processes == 2:  # that had work to do, and shared it
            assert len(seen[0]) == len(seen[1])
            assert not seen[0] & seen[1]
        return self

    def lines(self, rank=0):
        """What one process has recorded so far; a line cut by a kill is left out."""
        file = self.folder / f"record.{rank}"
        whole = file.read_text().splitlines(keepends=True) if file.is_file() else []
        return [json.loads(line) for line in whole if line.endswith("\n")]

    @property
    def finished(self):
        files = list(self.folder.glob("runs/short/*/run.json"))
        return any(json.loads(file.read_text())["status"] == "finished" for file in files)

    @property
    def run(self):
        """The run's folder, of which there is one."""
        (folder,) = (self.folder / "runs" / "short").iterdir()
        return folder

    def steps(self):
        """(step, {position: (id, losses)}) as every start of the command recorded it.

        A step's micro-batches on all processes are put together; steps cut by a kill are left out.
        """
        lines = [line for rank in range(2) for line in self.lines(rank)]
        found = []
        # a recorded step counts finished ones: the last micro-batch of a step has its number
        for line in lines:
            position = line["positions"][0]
            found.append((position // 4 + 1, line))
        found.sort(key=lambda item: item[0])
        for step, group in groupby(found, key=lambda item: item[0]):
            seen = {}
            for _, line in group:
                for i, position in enumerate(line["positions"]):
                    entry = (line["ids"][i], {k: v[i] for k, v in line["losses"].items()})
                    seen.setdefault(position, []).append(entry)
            yield step, seen

    def files(self):
        """Everything the commands left, but for what has a time in its name."""
        names = {str(f.relative_to(self.run)) for f in self.run.rglob("*") if f.is_file()}
        return names | {f.name for f in self.folder.iterdir() if f.is_file()}

    def state(self):
        """The last checkpoint's tensors: weights, average, and what the optimiser keeps."""
        last = torch.load(self.run / "checkpoints" / "last.ckpt", weights_only=True)
        moments = last["optimizer_states"][0]["state"]
        state = {f"{i}.{name}": v for i, each in moments.items() for name, v in each.items()}
        return last["state_dict"] | state | {"schedule": last["lr_schedulers"]}


def same(one, other, tolerance=0.0):
    """Asserts that every step of every start saw and gave the same."""
    reference = dict(one.steps())
    assert list(reference) == list(range(1, len(reference) + 1))
    for step, seen in other.steps():
        assert seen.keys() == reference[step].keys()
        for position, entries in seen.items():
            number, losses = reference[step][position][0]
            for again, values in entries:
                assert again == number
                for name, value in values.items():
                    assert value == pytest.approx(losses[name], rel=tolerance, abs=0)


def equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if torch.is_tensor(value):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def killed(run, moment, *, processes=1, words=()):
    """Starts the run and kills it a random moment after so many micro-batches were recorded."""
    before = len(run.lines())
    started = run.start(*words, processes=processes)
    wait = time.monotonic() + 120
    while len(run.lines()) < before + moment.randrange(1, STEPS) and time.monotonic() < wait:
        time.sleep(0.002)
        if len(run.lines()) >= STEPS + before:
            break
    time.sleep(moment.uniform(0, 0.15))
    for each in started:
        each.kill()
    return [each.wait().status for each in started]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments(project, tmp_path, processes, workers):
    words = [f"data.num_workers={workers}", "model.diffusion.net.dropout=0.1"]
    whole = Run(project, tmp_path / "whole", *words).finish(processes=processes)
    moment, kills = random.Random(10 * processes + workers), 0
    for number in range(3):
        run = Run(project, tmp_path / f"killed{number}", *words)
        for _ in range(2):
            if not run.finished:
                kills += -signal.SIGKILL in killed(run, moment, processes=processes)
        if not run.finished:
            run.finish(processes=processes)
        same(whole, run)
        equal(whole.state(), run.state())
    assert kills >= 5


def logged(run):
    """The rows of metrics.csv in any order, without what depends on time and machine."""
    found = []
    with (run.run / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            names = [n for n in row if n.startswith(("val/", "train/loss", "train/lr", "sample/"))]
            if values := {name: row[name] for name in names if row[name]}:
                found.append((int(row["step"]), sorted(values.items())))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6])
def test_metrics_of_a_killed_run(project, tmp_path, step):
    """Validation, clips and checkpoints on one step: killed before them, and two steps later."""
    words = ["trainer.max_steps=8", "trainer.val_check_interval=4"]
    words += ["callbacks.samples.every=4", "callbacks.checkpoint.every=4"]
    whole = Run(project, tmp_path / "whole", *words).finish()
    kill = ["+callbacks.kill._target_=recorder.Kill", f"+callbacks.kill.step={step}"]
    run = Run(project, tmp_path / "run", *words, *kill, f"+callbacks.kill.path={tmp_path}/killed")
    (process,) = run.start()
    assert process.wait().status == -signal.SIGKILL
    run.finish()
    assert json.loads((run.run / "run.json").read_text())["starts"] == 2
    rows = logged(whole)
    assert {at for at, _ in rows} == set(range(1, 9))
    names = [name for at, values in rows if at == 4 for name, _ in values]
    assert {"val/loss", "train/loss", "train/lr", "sample/nonfinite"} <= set(names)
    assert logged(run) == rows


@pytest.mark.slow
def test_goes_on_with_other_processes_and_workers(project, tmp_path):
    whole = Run(project, tmp_path / "whole").finish()
    moment = random.Random(7)
    for name, plan in {"more": [(1, 0), (2, 2), (1, 1)], "fewer": [(2, 1), (1, 2), (2, 0)]}.items():
        run = Run(project, tmp_path / name)
        for processes, workers in plan[:-1]:
            if not run.finished:
                words = [f"data.num_workers={workers}"]
                killed(run, moment, processes=processes, words=words)
        processes, workers = plan[-1]
        if not run.finished:
            run.finish(f"data.num_workers={workers}", processes=processes)
        same(whole, run, tolerance=1e-5)


def close(one, other):
    """The largest difference of two states relative to the largest entry of each tensor."""
    worst = 0.0
    for name, value in one.items():
        if torch.is_tensor(value) and value.is_floating_point():
            scale = value.abs().max().clamp_min(1e-3)
            worst = max(worst, float((value - other[name]).abs().max() / scale))
    return worst


@pytest.mark.slow
def test_two_processes_train_as_one(project, tmp_path):
    words = ["trainer.max_steps=20", "callbacks.samples.every=0", "callbacks.samples.final_num=0"]
    one = Run(project, tmp_path / "one", *words).finish()
    two = Run(project, tmp_path / "two", *words).finish(processes=2)
    same(one, two, tolerance=1e-5)
    assert close(one.state(), two.state()) < 1e-4
    assert len(two.lines(1)) == 20
    assert two.files() == one.files() | {"record.1"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_launchers(project, tmp_path, launcher):
    """The commands of the documentation, with nothing prepared for them."""
    run = Run(project, tmp_path / "run", "trainer.max_steps=4")
    words = shlex.split(run.command)[1:]
    begin = [sys.executable]
    if launcher == "lightning":
        words += ["strategy=ddp", "trainer.devices=2"]
    else:
        begin += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*begin, *words],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(run.lines(0)) == len(run.lines(1)) == 4
    assert done.stdout.count("short: ") == 1
    assert (run.run / "checkpoints" / "last.ckpt").is_file()


# ------------------------------------------------------------------------------------------ signals


@pytest.fixture
def run(project, tmp_path):
    return Run(project, tmp_path / "run", "callbacks.checkpoint.every=1000")


def reached(run, lines):
    """Waits until so many micro-batches are recorded."""
    end = time.monotonic() + 60
    while len(run.lines()) < lines:
        assert time.monotonic() < end
        time.sleep(0.01)


def appears(run, samples):
    """Waits until clips of this name are being made."""
    end = time.monotonic() + 120
    while not list(run.folder.glob(f"runs/short/*/samples/{samples}")):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_and_says_how_to_go_on(run, name):
    (process,) = run.start("trainer.max_steps=1000")
    reached(run, 6)
    number = signal.Signals[name]
    process.send(number)
    result = process.wait()
    assert result.status == 128 + number
    assert not [line for line in result.err.splitlines() if "%|" not in line], result.err
    assert f"{name}: stopping after this step" in result.out
    said = result.out.splitlines()[-1]
    step = json.loads((run.run / "run.json").read_text())["step"]
    assert 3 <= step < 1000
    assert said.startswith(f"stopped after step {step}; to go on: python train.py name=short ")
    assert said.endswith(" ckpt=auto")
    assert [f.name for f in sorted((run.run / "checkpoints").iterdir())] == [
        "last.ckpt",
        f"step{step:07d}.ckpt",
    ]
    assert json.loads((run.run / "run.json").read_text())["status"] == "stopped"
    assert not list(run.run.rglob("*.part"))


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(run):
    first, second = run.start("trainer.max_steps=1000", processes=2)
    reached(run, 4)
    second.send(signal.SIGTERM)
    assert second.wait().status == 0  # not to have the first killed by a launcher
    assert first.wait().status == 143
    assert json.loads((run.run / "run.json").read_text())["status"] == "stopped"
    assert (run.run / "checkpoints" / "last.ckpt").is_file()


def test_a_signal_to_all_processes_of_a_run_spares_its_workers(run):
    """As `timeout`, torchrun and schedulers send it."""
    (process,) = run.start("trainer.max_steps=1000", "data.num_workers=2")
    reached(run, 6)
    os.killpg(process.pid, signal.SIGTERM)
    result = process.wait()
    assert result.status == 143, result
    assert result.out.splitlines()[-1].startswith("stopped after step ")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_clips_that_a_signal_prevented_are_made_when_it_goes_on(project, tmp_path):
    words = ["sampler.steps=80", "callbacks.samples.every=6", "callbacks.samples.final_num=0"]
    run = Run(project, tmp_path / "run", *words)
    (process,) = run.start()
    appears(run, "step0000006")
    process.send(signal.SIGTERM)
    assert process.wait().status == 143
    page = run.run / "samples" / "step0000006" / "gallery.html"
    assert not page.is_file()
    run.finish()
    assert page.is_file()
    assert [step for step, _ in run.steps()] == list(range(1, STEPS + 1))


def test_a_folder_that_holds_a_run_takes_no_other(run):
    run.finish(f"hydra.run.dir={run.folder}/runs/short/x")
    before = run.files()
    (process,) = [run.project.start(f"{run.command} hydra.run.dir={run.run} seed=1")]
    result = process.wait()
    assert result.status == 1
    assert "already holds a run: go on with ckpt=auto" in result.err
    assert run.files() == before


def test_a_signal_while_it_samples_for_the_last_time(project, tmp_path):
    words = ["trainer.max_steps=4", "sampler.steps=1000", "callbacks.samples.every=0"]
    run = Run(project, tmp_path / "run", *words)
    (process,) = run.start()
    appears(run, "final")
    time.sleep(0.3)
    process.send(signal.SIGTERM)
    assert process.wait().status == 143
    assert json.loads((run.run / "run.json").read_text())["status"] == "stopped"
    run.finish("sampler.steps=2")  # which is not the same config: a new run
    assert len(list((run.folder / "runs" / "short").iterdir())) == 2


def test_a_kill_while_it_samples_costs_no_step(project, tmp_path):
    words = ["sampler.steps=1000", "callbacks.samples.every=6", "callbacks.checkpoint.every=6"]
    run = Run(project, tmp_path / "run", *words)
    (process,) = run.start()
    appears(run, "step0000006")
    process.kill()
    process.wait()
    assert (run.run / "checkpoints" / "step0000006.ckpt").is_file()


@pytest.mark.slow
def test_what_is_left_after_the_last_step_is_done_when_it_goes_on(project, tmp_path):
    """A run killed in its last validation or sampling has every step but no result yet."""
    words = ["trainer.max_steps=6", "callbacks.checkpoint.every=1", "sampler.steps=80"]
    run = Run(project, tmp_path / "run", *words)
    (process,) = run.start()
    appears(run, "final")
    process.kill()
    process.wait()
    assert not run.finished
    before = len(run.lines())
    run.finish()
    assert len(run.lines()) == before
    told = json.loads((run.run / "run.json").read_text())
    assert told["status"] == "finished"
    assert told["objective"]["value"] is not None
    assert (run.run / "samples" / "final" / "samples.json").is_file()


# ------------------------------------------------------------------------------------------- faults


def test_a_full_disk_costs_messages_and_not_the_run(project, tmp_path):
    run = Run(project, tmp_path / "run", "callbacks.checkpoint.every=4")
    (process,) = run.start("+callbacks.full._target_=recorder.FullDisk")
    result = process.wait()
    assert result.status == 0, result
    assert result.out.count("no checkpoint can be written, training goes on") == 1
    assert result.out.count("checkpoints can be written again") == 1
    names = {f.name for f in (run.run / "checkpoints").iterdir()}
    assert names == {"step0000012.ckpt", "last.ckpt", "best.ckpt"}


def test_out_of_memory_says_what_to_change(project, tmp_path):
    run = Run(project, tmp_path / "run")
    (process,) = run.start("+callbacks.hungry._target_=recorder.Hungry")
    result = process.wait()
    assert result.status == 1
    (line,) = [x for x in result.err.splitlines() if x.startswith("error: ")]
    for words in ("2 clips a device", "16 frames of 24x24", "precision 32-true", "micro_batch=1"):
        assert words in line
    assert "checkpoint=true" in line
    assert json.loads((run.run / "run.json").read_text())["status"] == "failed"


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in "abc":
        make_media(folder / f"{name}.mp4", seconds=3, sample_rate=16000)
    return folder


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_a_clip_that_breaks_while_it_trains(project, tmp_path, clips, on_bad):
    words = ["exp=folder", f"data.root={clips}", "data.size=[32,32]"]
    run = Run(project, tmp_path / "run", *words, f"data.train.on_bad={on_bad}")
    run.command = re.sub(r"data\.\w+\.num=\d+ ", "", run.command)  # of toy data
    (process,) = run.start()
    reached(run, 4)
    (clips / "b.mp4").write_bytes((clips / "b.mp4").read_bytes()[:1000])
    result = process.wait()
    told = json.loads((run.run / "run.json").read_text())
    if on_bad == "error":
        assert result.status == 1, result
        assert "b.mp4" in next(x for x in result.err.splitlines() if x.startswith("error: "))
        assert told["status"] == "failed"
        assert (run.run / "checkpoints" / f"step{told['step']:07d}.ckpt").is_file()
    else:
        assert result.status == 0, result
        assert "left out from now on, other clips take its place" in result.out + result.err
        assert told["step"] == STEPS


def test_gradients_that_are_not_finite_are_passed_over(project, tmp_path):
    run = Run(project, tmp_path / "run")
    (process,) = run.start("+callbacks.poison._target_=recorder.Poison")
    result = process.wait()
    assert result.status == 0, result
    assert result.out.count("1 step skipped: the gradient is not finite") == 2, result.out
    state = torch.load(run.run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(v.isfinite().all() for v in state.values() if v.is_floating_point())
