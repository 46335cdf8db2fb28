"""Benchmarks of samplers and networks on small ones, and measures against what is known of them."""

import importlib.util
import json
import math
from argparse import Namespace

import pytest
import torch
from entry import ROOT
from PIL import Image
from test_posthoc import SMALLEST

from avdiffusion import checkpoint
from avdiffusion.diffusion.path import EDM, DiscreteVP
from avdiffusion.media import Media
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.samplers.dpm_solver import DPMSolver
from avdiffusion.samplers.heun import Heun


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        file = ROOT / "benchmarks" / "samplers.py"
        spec = importlib.util.spec_from_file_location("benchmark_samplers", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that was never trained; one network at all times, so that steps count."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    torch.manual_seed(0)
    config = checkpoint.plain(checkpoint.compose([*SMALLEST, "model.shift=none"]))
    system = checkpoint.build(config["model"])
    with torch.no_grad():
        for p in system.parameters():
            p.add_(0.05 * torch.randn_like(p))
    content = {"state_dict": system.state_dict(), "hyper_parameters": config}
    system.on_save_checkpoint(content)
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    return folder


def test_tables_picture_and_figures(bench, run, capsys):
    words = [f"ckpt={run}", "num=3", "micro_batch=2", "reference=20", "budgets=[4,20]"]
    chosen = "ddim,dpm_solver_2m grid=log_snr denoise_last=true,heun,sde_dpm_solver,dpm_solver_pp"
    bench.main([*words, f"samplers=[{chosen}]", "tolerances=[1]", "metrics=[sync]"])
    found = json.loads((run / "samplers" / "samplers.json").read_text())
    rows = {(row["sampler"], row["budget"]): row for row in found["rows"]}
    assert len(rows) == 4 * 2 + 1
    assert [rows["heun", b]["evaluations"] for b in (4, 20)] == [3, 19]
    # what the reference itself was made with
    same = rows["dpm_solver_2m grid=log_snr denoise_last=true", 20]
    assert same["error"] == {"video": 0, "audio": 0}
    assert same["distance"] == pytest.approx({"video": 0, "audio": 0}, abs=1e-9)
    for name in ("ddim", "dpm_solver_2m grid=log_snr denoise_last=true", "heun"):
        for modality in ("video", "audio"):
            few, many = (rows[name, budget]["error"][modality] for budget in (4, 20))
            assert few > 1.2 * many
    assert rows["sde_dpm_solver", 20]["error"] is None
    assert all(math.isfinite(v) for row in rows.values() for v in row["distance"].values())
    assert set(rows["ddim", 4]["scores"]) == set(found["scores"]) != set()

    text = (run / "samplers" / "samplers.md").read_text()
    assert text in capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("| `ddim` |"))
    first = bench.short(100 * rows["ddim", 4]["error"]["video"])
    assert line.startswith(f"| `ddim` | {first} / ")
    with Image.open(run / "samplers" / "samplers.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert len(colours) > 30


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["num=3"], "ckpt is needed"),
        (["ckpt="], "ckpt is needed"),
        (["ckpt=nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
        (["ckpt=x", "number=3"], "number"),
        (["ckpt={run}", "num=1", "reference=2", "samplers=[euler2]"], "sampler/euler2"),
        (["ckpt={run}", "num=1", "reference=2", "samplers=[ddim order=2]"], "order"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(bench, run, words, reason):
    with pytest.raises(SystemExit, match=reason) as stopped:
        bench.main([word.replace("{run}", str(run)) for word in words])
    assert str(stopped.value).startswith("error: ")
    assert "\n" not in str(stopped.value)


def test_every_sampler_of_the_configs_is_measured(bench):
    configs = {file.stem for file in (ROOT / "configs" / "sampler").glob("*.yaml")}
    measured = {words.split()[0] for words in bench.SAMPLERS}
    # of a checkpoint, around another sampler, for another path
    assert configs - measured == {"stored", "resample", "flow_euler"}


def test_evaluations_are_counted_not_steps(bench):
    path = DiscreteVP()
    assert bench.dry(DDIM(steps=7), path) == (7, 0, "data")
    assert bench.dry(DDPM(steps=7), path) == (7, 6, "data")
    assert bench.dry(Heun(steps=7), path) == (13, 0, "data")
    assert bench.dry(DPMSolver(steps=7), path) == (7, 0, "t_min")
    assert bench.dry(DPMSolver(steps=7, denoise_last=True), path) == (8, 0, "data")
    assert bench.dry(DDIM(steps=7), EDM()) == (7, 0, "t_min")
    assert bench.within(Heun(), 10, path).steps == 5
    assert bench.within(DPMSolver(denoise_last=True), 1, path) is None


def test_error_is_in_deviations_of_the_reference(bench):
    truth = Media(video=torch.randn(2, 3, 4), audio=torch.zeros(2, 5))
    off = truth + Media(video=torch.full((2, 3, 4), 0.3), audio=torch.tensor([[0.6], [-0.8]]))
    found = bench.error(off, truth, {"video": 0.1, "audio": 0.5})
    assert found == pytest.approx({"video": 3.0, "audio": 2 * 0.5**0.5})


def test_energy_distance(bench):
    torch.manual_seed(0)
    # of one number line: E|a - b| = 3, within 1 and 2, by hand
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0]])
    assert bench.energy_distance(a, b) == pytest.approx((2 * (5 + 2) / 2 - 1 - 2) / 2)
    other = torch.randn(500, 1)
    assert bench.energy_distance(other, other) == pytest.approx(0, abs=1e-6)
    # N(0, 1) and N(m, 1): E|N(m, 2)| in closed form
    m, within = 1.0, 2 / math.sqrt(math.pi)
    between = within * math.exp(-(m**2) / 4) + m * math.erf(m / 2)
    expected = (2 * between - 2 * within) / within
    one = torch.special.ndtri((torch.arange(1000.0) + 0.5) / 1000)[:, None]
    assert bench.energy_distance(one + m, one) == pytest.approx(expected, rel=0.01)


def test_spectra_tell_a_hiss_from_silence(bench):
    wave = torch.zeros(4, 1, 400)
    wave[:, :, 200] = 0.5
    hiss = 0.01 * torch.randn(4, 1, 400, generator=torch.Generator().manual_seed(0))
    quiet, loud = bench.spectrum(torch.zeros_like(wave)), bench.spectrum(hiss)
    assert torch.allclose(quiet, torch.full_like(quiet, -8))
    assert loud.shape[1] <= 13
    assert abs(loud[:, -1].mean() + 4) < 0.1  # power 1e-4, white
    assert torch.allclose(bench.spectrum(wave), torch.tensor(0.25 / 400).double().log10())


@pytest.fixture(scope="module")
def networks():
    """The benchmarks of networks, which do not measure the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        both = [importlib.import_module(name) for name in ("superres", "unet")]
        patch.setattr(both[1], "conv_rate", lambda device, dtype: 100.0)
        yield both


ARGUMENTS = {"device": "cpu", "compile": False, "checkpoint": False, "repeats": 1}


def test_super_resolution_is_measured_frame_by_frame(networks):
    superres, _ = networks
    args = Namespace(**ARGUMENTS, pixels=16, dtype="bf16", forward_only=True)
    one, two = (superres.measure(("sr_tiny", frames), args) for frames in (1, 2))
    assert (one["frames"], two["frames"], one["dtype"]) == (1, 2, "bf16")
    assert two["gflop"] == pytest.approx(2 * one["gflop"], rel=1e-2)  # but for the time
    assert two["frame_s"] == two["forward_s"] / 2
    assert two["fraction_of_conv_rate"] == pytest.approx(two["gflop"] / two["forward_s"] / 100)
    assert one["forward_backward_s"] is None


def test_the_coupled_network_is_measured_forward_and_backward(networks):
    _, unet = networks
    sizes = {"batch": 1, "frames": 2, "pixels": 16, "samples": 256}
    row = unet.measure("tiny", Namespace(**ARGUMENTS, **sizes, dtype="fp32", forward_only=False))
    assert row["forward_backward_s"] > row["forward_s"] > 0
    assert row["parameters"] > 1_000_000
    assert row["operations"] > 500


def test_a_clip_takes_its_evaluations_of_all_frames(networks):
    kept = {"size": "a", "dtype": "fp32", "mode": "eager", "pixels": 64}
    rows = [
        {**kept, "frames": 1, "forward_s": 2.0},
        {**kept, "frames": 6, "forward_s": 9.0},
        {**kept, "size": "b", "frames": 16, "forward_s": 5.0},
    ]
    # 16 frames are 16 calls of 2 s, or 3 of 9 s
    found = [
        (r["size"], r["frames"], r["evaluations"], r["clip_s"])
        for r in networks[0].clips(rows, [5, 10], 16)
    ]
    assert found == [
        ("a", 6, 5, 135.0),
        ("a", 6, 10, 270.0),
        ("b", 16, 5, 25.0),
        ("b", 16, 10, 50.0),
    ]
