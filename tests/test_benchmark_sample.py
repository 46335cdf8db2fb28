"""The benchmark of sampling on a small checkpoint: its rows, its counts of work, its comparison."""

import importlib.util
import json
import re

import pytest
import torch
from entry import ROOT
from test_posthoc import SMALLEST

from avdiffusion import checkpoint


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        file = ROOT / "benchmarks" / "sample.py"
        spec = importlib.util.spec_from_file_location("benchmark_sample", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        patch.setattr(module, "conv_rate", lambda device, dtype: 100.0)  # takes seconds
        yield module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that was never trained."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    torch.manual_seed(0)
    config = checkpoint.plain(checkpoint.compose(SMALLEST))
    system = checkpoint.build(config["model"])
    with torch.no_grad():
        for p in system.parameters():
            p.add_(0.05 * torch.randn_like(p))
    content = {"state_dict": system.state_dict(), "hyper_parameters": config}
    system.on_save_checkpoint(content)
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    return folder


def test_a_row_for_every_way(bench, run, tmp_path, capsys):
    words = ["--ckpt", str(run), "--device", "cpu", "--evaluations", "4", "--json"]
    bench.main([*words, str(tmp_path / "old.json")])
    ways = ["--dtypes", "fp32,bf16", "--reuse", "1,2:0", "--batches", "1,2", "--num", "2"]
    more = ["--metrics", "toy_f1", "--against", str(tmp_path / "old.json")]
    bench.main([*words, str(tmp_path / "new.json"), *ways, *more])
    found = json.loads((tmp_path / "new.json").read_text())
    assert found["limits"] == {"conv_fp32_gflop_per_s": 100, "conv_bf16_gflop_per_s": 100}
    rows = {(r["dtype"], r["reuse"], r["batch"]): r for r in found["rows"]}
    assert len(rows) == 8
    for (dtype, reuse, batch), row in rows.items():
        assert row["evaluations"] == 4
        assert row["clips_per_s"] * row["seconds"] == pytest.approx(batch)
        assert row["gflop_per_s"] == pytest.approx(100 * row["of_conv_rate"])
        differs = (dtype, reuse) != ("fp32", "1")
        assert (row["error_video"] > 0) == (row["error_audio"] > 0) == differs
        assert 0 <= row["toy_f1"] <= 1
    whole, kept = (rows["fp32", reuse, 1] for reuse in ("1", "2:0"))
    assert kept["gflop_per_s"] * kept["seconds"] < 0.9 * whole["gflop_per_s"] * whole["seconds"]
    assert re.search(r"clips_per_s( +[\d.,]+){3}\n", capsys.readouterr().out)  # old, new, ratio


def test_work_is_counted(bench, run, capsys):
    bench.main(["--ckpt", str(run), "--device", "cpu", "--shares"])
    system = checkpoint.load(run)
    whole, none = bench.work(system)
    assert none is None
    shares = [bench.work(system, depth) for depth in range(system.model.net.deepest + 1)]
    assert all(w == whole and s < whole for w, s in shares)
    assert sorted(s for _, s in shares) == [s for _, s in shares]
    # of a network by hand: the two outer convolutions of a clip
    first = system.model.net.video_in.space
    video = next(iter(system.latent(1).values()))
    outer = 2 * first.weight.numel() * video[0, 0].numel() / 1e9
    assert outer < shares[0][1]
