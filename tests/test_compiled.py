"""Training with a network that torch.compile has made faster in place."""

from functools import partial

import pytest
import torch
from small_system import Net, data, fit, system
from torch import nn

from avdiffusion.compiled import compile_in_place, missing

compiles = pytest.mark.skipif(
    missing("cpu") is not None, reason=f"torch.compile needs {missing('cpu')}"
)


class Plain(Net):
    """The small network without its record of calls, which no compiler could follow."""

    def forward(self, video, audio, *, time, shifts):
        h = self.into["video"](video.flatten(1)) + self.into["audio"](audio.flatten(1))
        h = h + self.time(torch.stack([time / 1000, (time / 1000).square()], 1))
        h = torch.relu(self.hidden(torch.relu(h + 0.01 * shifts.sum())))
        return tuple(
            self.skip[k] * v + self.out[k](h).view_as(v)
            for k, v in (("video", video), ("audio", audio))
        )


def small():
    torch.manual_seed(0)
    return system(net=Plain(), optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True))


class Record:
    """The losses of a fit, by wrapping what a step returns."""

    def __init__(self, model):
        self.losses, step = [], model.training_loss

        def recorded(batch):
            found = step(batch)
            self.losses.append({k: v.clone() for k, v in found["losses"].items()})
            return found

        model.training_loss = recorded


def test_unknown_modes_are_named():
    with pytest.raises(ValueError, match="compile=quickly is not true, false or default, "):
        compile_in_place(nn.Linear(1, 1), "quickly", "cpu")


def test_a_machine_without_a_compiler_is_told_what_it_lacks(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(ValueError, match=r"compile=true needs a C\+\+ compiler, .* no-such-comp"):
        compile_in_place(nn.Linear(1, 1), True, "cpu")
    net = nn.Linear(1, 1)
    compile_in_place(net, False, "cpu")
    assert net._compiled_call_impl is None


def test_keys_are_unchanged_and_the_average_is_a_plain_copy(monkeypatch):
    monkeypatch.setattr("avdiffusion.compiled.missing", lambda device: None)
    model = small()
    keys = list(model.state_dict())
    compile_in_place(model.model.net, True, "cpu")
    assert model.model.net._compiled_call_impl is not None
    assert list(model.state_dict()) == keys
    assert model.ema.ema_model.net._compiled_call_impl is None


@compiles
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_losses_are_those_of_eager_also_when_going_on(tmp_path):
    plain, fast, rest = small(), small(), small()
    records = [Record(each) for each in (plain, fast, rest)]
    module = partial(data, batch_size=4, val=6)  # whose last batch is not whole
    fit(plain, 4, module(), val_check_interval=2)
    compile_in_place(fast.model.net, True, "cpu")
    fit(fast, 2, module(), val_check_interval=2).save_checkpoint(tmp_path / "half.ckpt")
    compile_in_place(rest.model.net, True, "cpu")
    fit(rest, 4, module(), ckpt=tmp_path / "half.ckpt", val_check_interval=2)
    found = records[1].losses + records[2].losses
    assert len(found) == len(records[0].losses) == 4
    for ours, expected in zip(found, records[0].losses, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
