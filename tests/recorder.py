"""Callbacks that write down what training does, or do something to it."""

import json
import os
import resource
import signal
from pathlib import Path

import pytorch_lightning as pl
import torch


class Recorder(pl.Callback):
    """One line of JSON a micro-batch, in a file for each process; it survives a kill."""

    def __init__(self, *, path):
        self.path = Path(path)

    def on_train_batch_end(self, trainer, system, outputs, batch, _):
        line = {
            "start": os.getpid(),
            "step": trainer.global_step,
            "ids": batch["index"].tolist(),
            "positions": batch["position"],
            "losses": {name: value.tolist() for name, value in outputs["losses"].items()},
        }
        with open(f"{self.path}.{trainer.global_rank}", "a") as file:
            file.write(json.dumps(line) + "\n")


class FullDisk(pl.Callback):
    """No file may grow beyond 100 kB until step 10, as if the disk were full."""

    def on_train_batch_end(self, trainer, *_):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        full = trainer.global_step < 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else -1, -1))


class Kill(pl.Callback):
    """Kills the process after step `step`, once in the life of `path`."""

    def __init__(self, *, path, step):
        self.path, self.step = Path(path), step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and not self.path.exists():
            self.path.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Hungry(pl.Callback):
    """Wants a petabyte in the third step."""

    def on_before_backward(self, trainer, *_):
        if trainer.global_step == 2:
            torch.empty(2**50)


class Poison(pl.Callback):
    """Makes the gradients of steps 4 and 5 not a number."""

    def on_after_backward(self, trainer, system):
        if trainer.global_step in (3, 4):
            next(p for p in system.parameters() if p.grad is not None).grad.fill_(torch.nan)
