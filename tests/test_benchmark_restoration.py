"""The benchmark of super-resolution on a small model, against metrics of its own pictures."""

import importlib.util
import json

import pytest
from entry import ROOT
from media_files import make_media
from test_cascade import SR
from test_sample_command import write


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    file = ROOT / "benchmarks" / "restoration.py"
    spec = importlib.util.spec_from_file_location("benchmark_restoration", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_table_and_picture(bench, tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    for name in "ab":
        make_media(tmp_path / "clips" / f"{name}.mp4", seconds=0.6, sample_rate=16000)
    write(tmp_path / "checkpoints" / "sr.ckpt", SR)
    words = [f"ckpt={tmp_path}/checkpoints/sr.ckpt", f"data={tmp_path}/clips", "lpips=[]"]
    bench.main([*words, "num=2", "frames=3", "samplers=[ddim]", "evaluations=[1,2]"])
    rows = json.loads((tmp_path / "restoration" / "restoration.json").read_text())["rows"]
    told = [(row["clips"], row["evaluations"], row["noise"]) for row in rows]
    made = [("ddim", steps, noise) for noise in ("shared", "independent") for steps in (1, 2)]
    assert told == [("real", 0, ""), ("bicubic", 0, ""), *made]
    assert rows[0]["psnr"] == 100
    assert rows[0]["flicker_error"] == 0
    assert 5 < rows[1]["psnr"] < 60
    assert rows[2]["psnr"] != rows[4]["psnr"]
    lines = (tmp_path / "restoration" / "restoration.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[0] in capsys.readouterr().out
    assert (tmp_path / "restoration" / "restoration.png").is_file()


def test_a_model_of_its_own_clips_is_refused(bench, tmp_path):
    write(tmp_path / "base.ckpt", ["paths.run=run"])
    with pytest.raises(SystemExit, match="makes clips of its own"):
        bench.main([f"ckpt={tmp_path}/base.ckpt", f"data={tmp_path}"])
