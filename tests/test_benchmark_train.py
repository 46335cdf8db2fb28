"""The training benchmark at the smallest size, and what all benchmarks report."""

import importlib.util
import json
import mmap
import time

import numpy as np
import pytest
import torch
from entry import ROOT
from test_plan import TINY


@pytest.fixture(scope="module")
def bench():
    """benchmarks/train.py, its measuring done in this process, and benchmarks/machine.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        modules = []
        for name in ("machine", "train"):
            file = ROOT / "benchmarks" / f"{name}.py"
            spec = importlib.util.spec_from_file_location(f"benchmark_{name}", file)
            modules.append(importlib.util.module_from_spec(spec))
            spec.loader.exec_module(modules[-1])
        machine, train = modules
        patch.setattr(train, "ProcessPoolExecutor", Here)
        patch.setattr(train, "conv_rate", lambda *_: 100.0)
        patch.setattr(train, "matmul_rate", lambda *_: 200.0)
        patch.setattr(train, "copy_rate", lambda *_: 10.0)
        yield machine, train


class Here:
    """Runs a task at once."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *arguments):
        found = function(*arguments)
        return type("Future", (), {"result": lambda self: found})()


def test_steps_on_noise_and_on_data(bench, tmp_path, capsys):
    _, train = bench
    words = ["exp=quickstart", *TINY[:-1], "--device", "cpu", "--repeats", "1"]
    train.main([*words, "--batches", "1,2", "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["benchmark"] == "train"
    assert found["machine"]["torch"] == torch.__version__
    assert [row["batch"] for row in found["rows"]] == [1, 2]
    for row in found["rows"]:
        parts = sum(row[f"{name}_ms"] for name in ("data", *train.plan.PARTS))
        assert parts / 1e3 == pytest.approx(row["step_s"])
        assert row["clips_per_s"] == pytest.approx(row["batch"] / row["step_s"])
        assert row["of_conv"] == pytest.approx(2 * row["of_matmul"])
    train.main([*words, "--batches", "2", "--data", "--against", str(tmp_path / "a.json")])
    text = capsys.readouterr().out
    assert "data=real" in text
    assert "most clips a second" in text


def test_doubling_ends_where_memory_does(bench, monkeypatch, capsys):
    _, train = bench
    row = {"net": None, "batch": 0, "precision": "32-true", "mode": "eager", "checkpoint": "false"}

    def measure(overrides, args, batch, *rest):
        if batch > 8:
            return None
        return {**row, "batch": batch, "clips_per_s": float(batch != 4), "peak_mib": 1.0}

    monkeypatch.setattr(train, "measure", measure)
    train.main(["--batches", "double", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "out of memory with 16 clips, 32-true, eager, false" in text
    assert "most clips a second: 1 with batch 1," in text


def test_reports_are_compared_row_by_row(bench, tmp_path, capsys):
    machine, _ = bench
    report = machine.Report("some", {"device": "cpu"})
    report.add({"size": "tiny", "batch": 2, "seconds": 2.0, "mib": None})
    report.add({"size": "base", "batch": 2, "seconds": 8.0, "mib": 1.0})
    report.limit({"copy": 10.0})
    report.write(tmp_path / "old.json")
    new = machine.Report("some", {"device": "cpu"})
    new.add({"size": "base", "batch": 2, "seconds": 4.0, "mib": 3.0})
    new.add({"size": "huge", "batch": 2, "seconds": 4.0, "mib": 3.0})
    new.limit({"copy": 15.0})
    capsys.readouterr()
    new.compare(tmp_path / "old.json")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["batch=2", "size=huge:", "new"],
        ["limits"],
        ["copy", "10", "15", "1.500"],
        ["batch=2", "size=base"],
        ["seconds", "8", "4", "0.500"],
        ["mib", "1", "3", "3.000"],
    ]
    other = machine.Report("other", {})
    with pytest.raises(SystemExit, match="error: reports of some and other differ"):
        other.compare(tmp_path / "old.json")


def test_rates_and_times_are_of_what_was_done(bench):
    machine, _ = bench
    cpu, waits = torch.device("cpu"), [0.4, 0.2] + 40 * [0.1]  # the first calls are slower
    seconds = machine.best_time(lambda: time.sleep(waits.pop(0)), cpu, 4)
    assert len(waits) <= 42 - 7  # as fast as can be, and then four more
    assert 0.1 <= seconds < 0.2
    with machine.PeakMemory(cpu) as memory:
        held = mmap.mmap(-1, 2**26)  # 64 MiB that no other test has left behind
        np.frombuffer(held, np.uint8)[:] = 1
    assert 60 < memory.mib < 120
    assert machine.shown(None) == "-"
    assert machine.shown(12345.6) == "12,346"
    del held
