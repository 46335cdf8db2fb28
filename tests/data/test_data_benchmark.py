"""The data benchmark on clips that it makes itself."""

import importlib.util
import json

import numpy as np
import pytest
from entry import ROOT

from avdiffusion.io import exact_bicubic, read_window


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        spec = importlib.util.spec_from_file_location(
            "benchmark_data", ROOT / "benchmarks" / "data.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


SMALL = ["--files=2", "--windows=4", "--repeats=1", "--seconds=0.1", "--batch=4", "--workers"]
SMALL += ["0", "1"]


def test_rows_limits_and_comparison(bench, tmp_path, capsys):
    bench.main([*SMALL, "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())
    rows = {(row["what"], row["workers"]): row for row in found["rows"]}
    assert rows["plain loop", "-"]["ratio"] == 1
    assert all(row["windows_per_s"] > 0 for row in rows.values())
    for workers in "01":
        kept, decoded = rows["loader, kept windows", workers], rows["loader, decoding", workers]
        assert kept["ratio"] == pytest.approx(kept["windows_per_s"] / decoded["windows_per_s"])
    assert rows["keeping windows", "-"]["mb"] > 1
    assert found["limits"]["mb_per_window"] == pytest.approx(0.248, abs=0.002)
    assert found["limits"].keys() == {"copy_gb_per_s", "file_read_gb_per_s", "mb_per_window"}
    capsys.readouterr()
    bench.main([*SMALL, "--against", str(tmp_path / "a.json")])
    assert "what=read_window" in capsys.readouterr().out


def test_the_plain_loop_gives_the_same_window(bench, tmp_path):
    """On an easy file: so that what is compared is the same work."""
    folder = bench.some(None, tmp_path / "clips", 1)
    (path,) = folder.iterdir()
    pictures, sound = bench.plain(path, 1.0, 64, exact_bicubic())
    window = read_window(path, 1.0, size=(64, 64), **bench.WINDOW)
    assert pictures.shape == (16, 64, 114, 3)
    middle = pictures[:, :, 25:89].transpose(3, 0, 1, 2)
    assert (middle == window["video"]).all()
    ours = window["audio"][0]
    lag = max(
        range(-1000, 1000), key=lambda k: np.dot(sound[0, 2000:9000], ours[2000 + k : 9000 + k])
    )
    assert abs(lag) <= 1024  # it begins with the block that holds the start
