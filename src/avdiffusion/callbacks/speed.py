"""How fast training is, what its time goes into, and how much memory it takes."""

import logging
import sys
from collections import deque
from importlib.util import find_spec
from itertools import pairwise
from time import perf_counter

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback

from avdiffusion.callbacks.scalars import Scalars

log = logging.getLogger("avdiffusion")
PARTS = ("data", "forward", "backward", "optimizer")
EARLY = 10  # steps after which the speed is shown for the first time
TIMED = 64  # micro-batches, the last of a window


class Speed(Scalars):
    """Logs `train/clips_per_s` over all devices and, of the first one, what its time goes into.

    `train/ms_data`, `_forward`, `_backward`, `_optimizer` are those of one optimiser step,
    `train/data_wait` is the share of data, `train/ram_gib` and on CUDA `train/gpu_gib` are peaks.
    On CUDA time is the device's, so that data fetched while it works costs nothing. The first
    step, validation, sampling and saving don't count; what other callbacks do after a step is in no
    part of it, but slows the clips. A share above `stall` is warned of once.
    """

    def __init__(self, *, stall: float = 0.3):
        self.stall, self.warned = stall, False
        self.end = LambdaCallback(on_train_batch_end=self._wait)
        self.restart()

    def restart(self) -> None:
        """Starts a new window with the next batch."""
        self.clips, self.since, self.last = 0, None, None
        self.times = deque(maxlen=TIMED)

    def on_train_start(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        super().on_train_start(trainer, system)
        self.start, self.cold = trainer.global_step, True
        self.cuda = trainer.strategy.root_device.type == "cuda"
        if self.end not in trainer.callbacks:
            trainer.callbacks.append(self.end)  # data is waited for when all others are done
        idle = torch.cuda.is_available() or torch.backends.mps.is_available()
        if trainer.strategy.root_device.type == "cpu" and idle and trainer.is_global_zero:
            log.warning("training on the CPU of a machine with a GPU; to use that: trainer=gpu")

    def on_validation_end(self, *_: object) -> None:
        self.restart()

    def on_save_checkpoint(self, *_: object) -> None:
        self.restart()

    def on_train_batch_start(self, *_: object) -> None:
        if self.since is None:
            self.since = perf_counter()
        self.marks = [self.last, self._mark()]

    def on_before_backward(self, *_: object) -> None:
        self.marks.append(self._mark())

    def on_after_backward(self, *_: object) -> None:
        self.marks.append(self._mark())

    def on_train_batch_end(
        self, trainer: pl.Trainer, system: pl.LightningModule, _: object, batch: dict, _at: int
    ) -> None:
        step = trainer.global_step
        if self.cold:  # compilation, the choice of kernels, the start of workers
            self.cold = step == self.start
            self.restart()
            return
        self.times.append([*self.marks, self._mark()])
        self.clips += len(next(v for v in batch.values() if torch.is_tensor(v)))
        due = self.due(trainer)
        if not due and step != self.start + EARLY:
            return
        rate = self.clips * trainer.world_size / (perf_counter() - self.since)
        system.log("train/clips_per_s", rate, logger=False, batch_size=1)  # for the bar
        if due:
            times = self._split(trainer.accumulate_grad_batches)
            self.send(trainer, {"train/clips_per_s": rate, **times, **self._memory()})
            self._warn(trainer, times.get("train/data_wait", 0.0))
            self.clips, self.since = 0, perf_counter()
            self.times.clear()

    def _wait(self, *_):
        if self.since is not None:
            self.last = self._mark()

    def _mark(self):
        if not self.cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _split(self, accumulated):
        """Milliseconds of an optimiser step by part, and the share of data."""
        if self.cuda:
            self.times[-1][-1].synchronize()
        # A batch after a pause has nothing that its wait could be measured from.
        spans = [[_ms(*pair) for pair in pairwise(marks)] for marks in self.times]
        values = {}
        for name, column in zip(PARTS, zip(*spans, strict=True), strict=True):
            known = [ms for ms in column if ms is not None]
            if known:
                values[f"train/ms_{name}"] = sum(known) / len(known) * accumulated
        if "train/ms_data" in values:
            values["train/data_wait"] = values["train/ms_data"] / sum(values.values())
        return values

    def _memory(self):
        values = {}
        if self.cuda:
            values["train/gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if find_spec("resource") is not None:  # Windows has none
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            values["train/ram_gib"] = peak / 2 ** (30 if sys.platform == "darwin" else 20)
        return values

    def _warn(self, trainer, share):
        if share <= self.stall or self.warned or not trainer.is_global_zero:
            return
        self.warned = True
        log.warning(
            "%.0f %% of training is waiting for data: raise data.num_workers, use a faster disk "
            "or smaller clips",
            100 * share,
        )


def _ms(start, end):
    if start is None:
        return None
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)
