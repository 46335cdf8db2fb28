"""A training step never waits for the device: nothing is read from it, nothing copied by halves.

On the meta device there is nothing to read, so that whatever would wait raises; on the CPU reading
is watched for.
"""

from collections import Counter

import pytest
import pytorch_lightning as pl
import torch
from small_system import data, fit, system
from torch.utils._python_dispatch import TorchDispatchMode

from avdiffusion import checkpoint
from avdiffusion.callbacks.gradients import Gradients
from avdiffusion.callbacks.losses import Losses
from avdiffusion.callbacks.progress import Progress
from avdiffusion.callbacks.speed import Speed
from avdiffusion.diffusion.noise import Noise
from avdiffusion.diffusion.path import sent
from avdiffusion.systems.average import EMA

READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"}
QUICKSTART = ["exp=quickstart", "paths.run=run"]


class Copies(TorchDispatchMode):
    """Counts copies from the host to the meta device, and refuses those that would wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket._qualified_op_name
        out = func(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[0] if name == "aten::_to_copy" else args[1]
            if source.is_cpu and out.is_meta:
                assert kwargs.get("non_blocking") or args[-1] is True, f"{name} waits"
                self.count += 1
        return out


@pytest.fixture
def on_meta(monkeypatch):
    """The quickstart's system without memory; noise, which is drawn on the device, likewise."""
    monkeypatch.setattr(Noise, "_draw", lambda self, x, stream: torch.empty_like(x))
    config = checkpoint.compose([*QUICKSTART, "model.shift=seeded"])
    config.model.diffusion.net.cross_attention_shift = True
    config.model.diffusion.net.cross_attention_windows = [1, 4]
    with torch.device("meta"):
        model = checkpoint.build(config.model)
    model.to("meta")
    monkeypatch.setattr(model, "log_dict", lambda *_, **__: None)
    return model


def clips(model, count=2):
    shapes = {name: [count, *shape] for name, shape in model.shapes.items()}
    batch = {
        name: torch.empty(shape, device="meta", dtype=torch.uint8) for name, shape in shapes.items()
    }
    return {**batch, "position": list(range(count))}


def test_a_step_reads_nothing_and_copies_without_waiting(on_meta):
    with Copies() as copies:
        found = on_meta.training_step(clips(on_meta), 0)
        found["loss"].backward()
        for _ in range(3):
            on_meta.ema.update()
    assert 8 < copies.count < 25
    assert found["t"].device.type == "cpu"
    assert on_meta.ema.count == 3


def test_what_would_wait_is_noticed(on_meta):
    with Copies(), pytest.raises(AssertionError, match="waits"):
        torch.zeros(3).to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        float(on_meta.training_step(clips(on_meta), 0)["loss"])
    with Copies() as copies:
        sent(torch.zeros(3), torch.device("meta"))
    assert copies.count == 1


class Reads(TorchDispatchMode):
    """Counts what reads a tensor's value."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        if name in READS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Watch(pl.Callback):
    """Reads of every step, from one's end to the next one's."""

    def __init__(self):
        self.mode, self.reads = Reads(), {}

    def on_train_start(self, *_):
        self.mode.__enter__()

    def on_train_batch_end(self, trainer, *_):
        self.reads[trainer.global_step] = dict(self.mode.counts)
        self.mode.counts.clear()

    def on_train_end(self, *_):
        self.mode.__exit__(None, None, None)


def test_callbacks_read_only_when_it_is_time_to_log(monkeypatch, tmp_path):
    monkeypatch.setattr(EMA, "get_current_decay", lambda self: 0.5)  # a number of the host
    callbacks = [Gradients(), Losses(), Progress(lines=0), Speed(), Watch()]
    model = system(optimizer=lambda p: torch.optim.AdamW(p, fused=True))
    model.model.net.forward = quiet(model.model.net)
    fit(
        model,
        12,
        data(batch_size=4, val=0),
        callbacks=callbacks,
        enable_progress_bar=True,
        log_every_n_steps=6,
        gradient_clip_val=1.0,
    )
    reads = callbacks[-1].reads
    assert list(reads) == list(range(1, 13))
    assert reads[6]
    assert reads[12]
    # The first step asks once, as a fused optimiser has no state yet.
    assert {step for step, found in reads.items() if found} <= {1, 6, 12}, reads


def quiet(net):
    """The small network's forward, without the record it keeps on the host."""

    def forward(video, audio, *, time, shifts=None):
        h = net.into["video"](video.flatten(1)) + net.into["audio"](audio.flatten(1))
        h = torch.relu(net.hidden(h + net.time(torch.stack([time, time], 1) / 1000)))
        return tuple(net.out[k](h).view_as(v) for k, v in {"video": video, "audio": audio}.items())

    return forward


def test_integers_are_moved_as_they_are():
    """A quarter of the bytes of what is computed with; frames and sound become floats there."""
    module = data(batch_size=4)
    model = system()
    run = fit(model, 1, module)
    batch = next(iter(module.train_dataloader()))
    moved = run.strategy.batch_to_device(batch, torch.device("cpu"))
    assert moved["video"].dtype == torch.uint8
    assert model.encode(moved)["video"].dtype == torch.float32
    with torch.device("meta"):
        shape = (2, *model.shapes["video"])
        frames = torch.empty(shape, dtype=torch.uint8)
        sound = torch.empty((2, *model.shapes["audio"]), dtype=torch.int16)
    assert {v.dtype for v in model.encode({"video": frames, "audio": sound}).values()} == {
        torch.float32
    }
