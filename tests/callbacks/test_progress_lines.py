"""What a run says about itself."""

import csv
import logging
import re
import sys

from tiny_system import fit

from avdiffusion.callbacks.loggers import Csv
from avdiffusion.callbacks.progress import Progress
from avdiffusion.callbacks.speed import Speed

SHOWN = {"enable_progress_bar": True}


def test_lines_where_there_is_no_terminal(caplog, capsys):
    with caplog.at_level(logging.INFO, "avdiffusion"):
        fit(Progress(lines=4), Speed(), steps=10, **SHOWN)
    lines = [r.getMessage() for r in caplog.records if r.name == "avdiffusion"]
    lines = [line for line in lines if line.startswith("step")]  # a busy machine warns between
    steps = [re.match(r"step +(\d+)/10  loss [\d.e-]+  video ", line) for line in lines]
    assert [int(m[1]) for m in steps] == [1, 4, 8, 10]
    assert re.search(r"clips/s \d+.*  val [\d.]+  00:00 left$", lines[-1])
    assert "v_num" not in "".join(lines)
    assert capsys.readouterr().out == ""


def test_one_bar_where_there_is_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    fit(Progress(refresh=2), Speed(), steps=10, **SHOWN)
    out = capsys.readouterr().out
    assert "10/10" in out
    assert "loss=" in out
    assert "video=" in out
    assert "clips/s=" in out
    assert "Validation" not in out
    assert "v_num" not in out


def test_speed_counts_clips_of_whole_steps(tmp_path):
    fit(Speed(), logger=[Csv(save_dir=tmp_path)], steps=8, accumulate_grad_batches=2)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r.get("train/clips_per_s")]
    assert len(rows) == 4
    assert all(float(r["train/clips_per_s"]) > 0 for r in rows)
