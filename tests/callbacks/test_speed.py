"""Speed, by a clock that only data and training move."""

import logging
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from kept import Kept
from small_system import CLIP, Clips, fit, system

from avdiffusion.callbacks import speed
from avdiffusion.callbacks.speed import Speed
from avdiffusion.data.module import DataModule
from avdiffusion.systems.diffusion import DiffusionSystem


class Clock:
    """Seconds that pass when someone says so; an event of it is the time of its recording."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def event(self, **_):
        clock = self

        class Event:
            def record(self):
                self.at = clock.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        return Event()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed, "perf_counter", clock)
    return clock


class Slow(pl.Callback):
    """The first batch takes long, as compilation does; so do validation, saving and sampling."""

    def __init__(self, clock, every=5, busy=0.0):
        self.clock, self.every, self.busy = clock, every, busy

    def on_train_batch_start(self, trainer, *_):
        self.clock.now += 500 if trainer.global_step == 0 else 0

    def on_validation_start(self, *_):
        self.clock.now += 1000

    def on_save_checkpoint(self, *_):
        self.clock.now += 2000

    def on_train_batch_end(self, trainer, *_):
        self.clock.now += self.busy
        if trainer.global_step % self.every == 0:
            self.clock.now += 3000
            next(c for c in trainer.callbacks if isinstance(c, Speed)).restart()


def train(
    clock,
    steps=20,
    *,
    data=0.05,
    later=None,
    save=None,
    folder=None,
    stall=0.3,
    busy=0.0,
    micro_batch=None,
    **options,
):
    """4 clips a step; a batch of data takes `data` seconds, training 0.2 + 0.5 + 0.05.

    Another callback is `busy` for so many seconds after it.
    """

    class Timed(Clips):
        def item(self, index, rng=None):
            slow = later is not None and model.global_step >= 10
            clock.now += (later if slow else data) / (micro_batch or 4)
            return super().item(index, rng)

    model, rows = system(), Kept()

    def advance(seconds):
        clock.now += seconds

    def step(batch, batch_idx):
        advance(0.2)
        return DiffusionSystem.training_step(model, batch, batch_idx)

    model.training_step = step
    model.on_before_backward = lambda _: advance(0.5)
    model.on_before_optimizer_step = lambda _: advance(0.05)
    module = DataModule(train=Timed(), val=Clips(4), batch_size=4, micro_batch=micro_batch, **CLIP)
    callbacks = [Speed(stall=stall), Slow(clock, options.pop("sampled", 10**6), busy)]
    if save:

        class Save(pl.Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step % save == 0:
                    trainer.save_checkpoint(folder / "x.ckpt", weights_only=False)

        callbacks.append(Save())
    trainer = fit(model, steps, module, logger=rows, callbacks=callbacks, **options)
    return rows.steps, trainer


def expected(values, data=0.05, accumulated=1):
    spent = {"forward": 0.2, "backward": 0.5, "data": data}
    for name, seconds in spent.items():
        assert values[f"train/ms_{name}"] == pytest.approx(1e3 * seconds * accumulated), name
    assert values["train/ms_optimizer"] == pytest.approx(50.0)
    whole = accumulated * sum(spent.values()) + 0.05
    assert values["train/data_wait"] == pytest.approx(accumulated * data / whole)
    return whole


def test_the_time_of_a_step_is_split(clock):
    logged, _ = train(clock, log_every_n_steps=10)
    assert list(logged) == [10, 20]
    whole = expected(logged[10])
    expected(logged[20])
    assert logged[20]["train/clips_per_s"] == pytest.approx(4 / whole)
    # the window starts with the second batch, after waiting for it
    assert logged[10]["train/clips_per_s"] == pytest.approx(9 * 4 / (9 * whole - 0.05))


def test_windows_know_nothing_of_each_other(clock):
    logged, _ = train(clock, steps=30, later=0.25, log_every_n_steps=10)
    expected(logged[10])
    expected(logged[30], data=0.25)


def test_accumulated_batches_add_up(clock):
    logged, _ = train(clock, log_every_n_steps=10, micro_batch=2, accumulate_grad_batches=2)
    assert list(logged) == [10, 20]
    assert logged[10]["train/clips_per_s"] > 2  # the first step has two batches, both left out
    whole = expected(logged[20], accumulated=2)
    assert logged[20]["train/clips_per_s"] == pytest.approx(4 / whole)


@pytest.mark.parametrize(
    "options",
    [{"val_check_interval": 6}, {"save": 6}, {"sampled": 6}],
    ids=["validation", "saving", "sampling"],
)
def test_pauses_do_not_count(clock, options, tmp_path):
    logged, _ = train(clock, steps=23, log_every_n_steps=4, folder=tmp_path, **options)
    assert clock.now > 1000
    for step, values in logged.items():
        if step > 4 and "train/clips_per_s" in values:
            whole = expected(values)
            assert (
                4 / whole <= values["train/clips_per_s"] * (1 + 1e-9) <= 4 / (whole - 0.05) + 1e-9
            )


def test_other_callbacks_are_no_wait_for_data(clock, caplog):
    logged, trainer = train(clock, busy=5.0, log_every_n_steps=10)
    for step in (10, 20):
        whole = expected(logged[step])
    assert logged[20]["train/clips_per_s"] == pytest.approx(4 / (whole + 5))
    assert "waiting for data" not in caplog.text
    count = len(trainer.callbacks)
    trainer.fit_loop.epoch_loop.max_steps = 22
    trainer.fit(trainer.lightning_module, trainer.datamodule)
    assert len(trainer.callbacks) == count


@pytest.mark.parametrize("busy", [0.0, 5.0])
def test_on_cuda_time_is_that_of_events(clock, monkeypatch, busy):
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)

    class OnCuda(Speed):
        def on_train_start(self, trainer, system):
            super().on_train_start(trainer, system)
            self.cuda = True

    monkeypatch.setattr(f"{__name__}.Speed", OnCuda)
    logged, _ = train(clock, busy=busy, log_every_n_steps=10)
    expected(logged[20])
    assert logged[20]["train/gpu_gib"] == 3


def test_speed_is_shown_early():
    shown = {}

    class See(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if "train/clips_per_s" in trainer.callback_metrics:
                shown.setdefault(trainer.global_step, trainer.callback_metrics["train/clips_per_s"])

    fit(system(), 12, callbacks=[Speed(), See()], log_every_n_steps=50)
    assert min(shown) == 10


@pytest.mark.parametrize(("data", "warnings"), [(0.05, 0), (0.7, 1)])
def test_a_stall_is_warned_of_once(clock, caplog, data, warnings):
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        logged, _ = train(clock, data=data, log_every_n_steps=5)
    said = [r.getMessage() for r in caplog.records if "data.num_workers" in r.getMessage()]
    assert len(said) == warnings
    assert (logged[20]["train/data_wait"] > 0.3) == bool(warnings)
    assert all(message.startswith("48 % of training") for message in said)


def test_the_limit_is_an_option(clock, caplog):
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        train(clock, data=0.7, stall=0.5, log_every_n_steps=5)
    assert "data.num_workers" not in caplog.text


@pytest.mark.parametrize(
    ("device", "gpu", "said"), [("cpu", True, 1), ("cpu", False, 0), ("cuda", True, 0)]
)
def test_a_gpu_left_idle_is_mentioned(caplog, monkeypatch, device, gpu, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    trainer = SimpleNamespace(
        global_step=0,
        callbacks=[],
        is_global_zero=True,
        strategy=SimpleNamespace(root_device=torch.device(device)),
    )
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        Speed().on_train_start(trainer, None)
    assert caplog.text.count("trainer=gpu") == said


def test_memory_is_the_peak_of_the_process(clock):
    logged, _ = train(clock, log_every_n_steps=10)
    before = logged[10]["train/ram_gib"]
    assert before > 0.05
    block = torch.ones(int(before * 2**30) // 4 + 2**26)
    assert block.sum() > 0
    del block
    logged, _ = train(clock, log_every_n_steps=10)
    assert before + 0.2 < logged[10]["train/ram_gib"] < 3 * before + 1
    assert "train/gpu_gib" not in logged[10]
