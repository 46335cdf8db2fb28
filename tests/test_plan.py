"""What `python -m avdiffusion.plan` says, against other countings."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from avdiffusion import checkpoint, plan
from avdiffusion.diffusion.path import DiscreteVP
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.heun import Heun

CPU = torch.device("cpu")
TINY = ["data.frames=4", "data.samples=1600", "model.diffusion.net.channels=8", "data.batch_size=4"]
TINY += ["model.diffusion.net.num_heads=1", "model.diffusion.net.head_channels=8", "paths.run=."]


def test_the_plan_of_a_small_quickstart(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan.main([*TINY, "data.micro_batch=2", "--steps", "10", "--devices", "1,2"])
    text = capsys.readouterr().out
    assert text.startswith("quickstart on the CPU, 32-true, eager, ")
    assert "20 evaluations a clip" in text
    one, two = (re.search(rf"{n} devices? +([\d.e-]+) s a step of 4 clips", text)[1] for n in "12")
    assert 0.4 < float(two) / float(one) < 1
    assert re.search(r"10 steps [\d.]+ s, 1600 steps [\d.]+ (s|min)", text)
    assert "if devices cost each other nothing" in text
    assert list(tmp_path.iterdir()) == []


def test_operations_are_those_of_the_layers():
    """Of one convolution and one product, counted by hand."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv3d(3, 5, 1), nn.Conv1d(1, 2, 1)

        def forward(self, video, audio, *, time):
            return self.a(video), self.b(audio)

    config = checkpoint.compose(TINY)
    system = checkpoint.build(config.model)
    system.model.net = Net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "build", lambda _: system)
        shapes = [system.latent(1)[k].shape for k in ("video", "audio")]
        system.model.net.a = nn.Conv3d(shapes[0][1], 5, 1)
        system.model.net.b = nn.Conv1d(shapes[1][1], 2, 1)
        forward, both = plan.flops(config)
    expected = 2 * 5 * shapes[0].numel() + 2 * 2 * shapes[1].numel()
    assert forward == expected
    assert both == 2 * expected  # no gradient for what goes in


def test_the_plan_of_super_resolution(capsys, tmp_path, monkeypatch):
    """Which has no sound, and is told of a smaller picture."""
    monkeypatch.chdir(tmp_path)
    small = ["exp=pouring_sr_cpu", "data.size=[16,16]", "data.batch_size=2"]
    small += ["model.diffusion.net.channels=8", "model.diffusion.net.attention_resolutions=[]"]
    plan.main(small)
    text = capsys.readouterr().out
    assert re.search(r"network +[\d.]+ M parameters; a clip takes [\d.]+ GFLOP forward", text)
    assert "s a step of 2 clips" in text

    config = checkpoint.compose([*small, "paths.run=.", "data.root=."])
    clips = plan.Trial(config, CPU).clips(3)
    assert clips["low_res"].shape == (3, 3, 1, 4, 4)
    assert clips["low_res"].abs().max() <= 1
    assert clips["video"].shape == (3, 3, 1, 16, 16)
    peaks = iter([0, 2**30])
    monkeypatch.setattr(plan, "free", lambda device: 1)
    monkeypatch.setattr(plan, "peak", lambda device: next(peaks))
    with pytest.raises(SystemExit, match=r"over 1\), 1 frames of 16x16, precision 32-true"):
        plan.main(small)


def test_operations_of_a_conditioned_network_are_those_of_its_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv3d(6, 6, 1)

        def forward(self, video, *, time, concat):
            return self.layer(torch.cat((video, concat), 1))

    config = checkpoint.compose(["exp=pouring_sr_cpu", "data.root=.", "paths.run=."])
    system = checkpoint.build(config.model)
    system.model.net = Net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "build", lambda _: system)
        forward, both = plan.flops(config)
    assert forward == 2 * 6 * 6 * 64 * 64
    assert both == 2 * forward


def test_a_step_trains_and_its_parts_are_its_time():
    config = checkpoint.compose(TINY)
    trial = plan.Trial(config, CPU)
    clips = trial.clips(2)
    assert clips["video"].dtype == torch.uint8
    assert clips["audio"].dtype == torch.int16
    before = [p.detach().clone() for p in trial.system.model.parameters()]
    spans = trial.step([clips, trial.clips(2)])
    assert list(spans) == list(plan.PARTS)
    assert all(value > 0 for value in spans.values())
    parameters = trial.system.model.parameters()
    moved = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
    assert any(moved)
    assert trial.system.ema.count == 1
    assert all(p.grad is None for p in trial.system.model.parameters())


def test_accumulation_is_a_mean_over_the_whole_batch():
    """Two micro-batches of the same clips move the weights as one of them does."""
    config = checkpoint.compose([*TINY, "model.optimizer.fused=false"])
    weights = []
    for repeats in (1, 2):
        torch.manual_seed(0)
        trial = plan.Trial(config, CPU)
        trial.optimizer = torch.optim.SGD(trial.system.model.parameters(), lr=0.1)
        trial.clip = None
        trial.step([trial.clips(2)] * repeats)
        weights.append(torch.cat([p.detach().flatten() for p in trial.system.model.parameters()]))
    torch.testing.assert_close(*weights)


def test_bf16_runs_the_network_in_bf16():
    trial = plan.Trial(checkpoint.compose([*TINY, "trainer.precision=bf16-mixed"]), CPU)
    seen = []
    for layer in trial.system.model.net.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda m, x, out: seen.append(out.dtype))
    trial.step([trial.clips(1)])
    assert torch.bfloat16 in seen
    assert torch.float32 in seen  # the embedding of time
    assert {p.dtype for p in trial.system.parameters()} == {torch.float32}


def test_evaluations_are_counted():
    path = DiscreteVP()
    for sampler, count in ((DDIM(steps=7), 7), (Heun(steps=7), 13), (None, 1)):
        system = SimpleNamespace(sampler=sampler, model=SimpleNamespace(path=path))
        assert plan.evaluations(system) == count


def test_what_does_not_fit_is_said_with_what_to_set(monkeypatch):
    monkeypatch.setattr(plan, "free", lambda device: 1)
    peaks = iter([0, 2**30])
    monkeypatch.setattr(plan, "peak", lambda device: next(peaks))
    with pytest.raises(SystemExit, match=r"error: out of memory with 4 clips .*micro_batch=2.*GiB"):
        plan.main(TINY)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["exp=nope"], "exp/nope"),
        (["trainer.precision=64-true"], "precision=64-true is none of 32-true"),
        (["data.micro_batch=3"], "is not whole micro-batches of 3 on 1 devices"),
        (["--devices", "3"], "is not whole micro-batches of 1 on 3 devices"),
        (["data.btch_size=3"], "btch_size"),
    ],
)
def test_errors_are_one_line(words, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        plan.main([*TINY, *words])
    text = str(stopped.value)
    assert text.startswith("error: ")
    assert reason in text
    assert "\n" not in text


def test_times_come_in_units_that_suit_them():
    assert plan.lasting(14.52) == "14.5 s"
    assert plan.lasting(600) == "10 min"
    assert plan.lasting(3 * 3600) == "3 h"
    assert plan.lasting(72 * 3600) == "3 days"
