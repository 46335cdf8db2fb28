"""Where the time and the memory of training steps go."""

import logging
import os
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger("avdiffusion")


class Profile(pl.Callback):
    """Records `steps` optimiser steps after `warmup` others, loading of data included, and ends.

    Writes `trace.json.gz` (for chrome://tracing or Perfetto) and `operations.txt` to `out` and
    prints the `top` operations that take most time themselves.
    """

    def __init__(self, *, out: str | Path, warmup: int = 5, steps: int = 3, top: int = 10):
        if warmup < 1 or steps < 1 or top < 1:
            raise ValueError(f"warmup={warmup}, steps={steps}, top={top} have to be 1 or more")
        self.out, self.warmup, self.steps, self.top = Path(out), warmup, steps, top
        self.profiler, self.first = None, 0

    def on_train_start(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        self.first = trainer.global_step
        if 0 <= trainer.max_steps - self.first < self.warmup + self.steps:
            raise ValueError(
                f"{self.warmup} + {self.steps} steps are profiled, but trainer.max_steps="
                f"{trainer.max_steps}"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        done = trainer.global_step - self.first
        if done == self.warmup and self.profiler is None:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes on finding no GPU
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
            self.profiler = profile(activities=activities, profile_memory=True, record_shapes=True)
            self.profiler.start()
        elif done == self.warmup + self.steps and self.profiler is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # what has been started belongs to these steps
            self.profiler.stop()
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        if self.profiler is None or not trainer.is_global_zero:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.out / "trace.json.gz"))
        device = "device" if torch.cuda.is_available() else "cpu"
        table = self.profiler.key_averages(group_by_input_shape=True).table(
            sort_by=f"self_{device}_time_total", row_limit=200, max_name_column_width=80
        )
        (self.out / "operations.txt").write_text(table)
        log.info("%s", self.summary(device))
        log.info("all of them: %s; trace: %s", self.out / "operations.txt", self.out)

    def summary(self, device: str) -> str:
        """The dearest operations: their own time per step, share, calls, memory kept or freed."""
        rows = [
            (getattr(each, f"self_{device}_time_total"), each)
            for each in self.profiler.key_averages()
        ]
        whole = sum(time for time, _ in rows) or 1
        lines = [f"{'operation':60s}{'ms a step':>10s}{'share':>7s}{'calls':>7s}{'MiB kept':>10s}"]
        for time, each in sorted(rows, key=lambda row: -row[0])[: self.top]:
            memory = getattr(each, f"self_{device}_memory_usage") / 2**20 / self.steps
            name = each.key if len(each.key) < 60 else f"{each.key[:56]}..."
            lines.append(
                f"{name:60s}{time / 1000 / self.steps:10.2f}{time / whole:7.1%}"
                f"{each.count // self.steps:7d}{memory:10.1f}"
            )
        if torch.cuda.is_available():
            lines.append(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
        return "\n".join(lines)
