"""An orderly end when a signal asks for one: Ctrl-C, a scheduler's pre-emption, `kill`."""

import logging
import signal
import threading

import pytorch_lightning as pl
import torch
from torch import distributed

log = logging.getLogger("avdiffusion")
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")


class Stopped(SystemExit):
    """The end of a run that a signal asked for; the exit status is 128 + its number."""


class Stop(pl.Callback):
    """Ends training after the optimiser step in which one of `signals` arrives at any process.

    What has been trained is saved by `Checkpoint`. A second signal ends the process at once.
    """

    def __init__(self, *, signals: tuple[str, ...] = SIGNALS):
        unknown = [name for name in signals if not name.startswith("SIG")]
        if unknown:
            raise ValueError(f"callbacks.stop.signals: {unknown[0]!r} is the name of no signal")
        # Windows has fewer of them
        self.signals = [getattr(signal, name) for name in signals if hasattr(signal, name)]
        self.received, self.group, self.step = 0, None, 0

    def setup(self, trainer: pl.Trainer, system: pl.LightningModule, stage: str) -> None:
        self.step = trainer.global_step
        if trainer.world_size > 1 and self.group is None:
            # on the CPU: asking every step must not wait for the accelerator
            self.group = distributed.new_group(backend="gloo")

    def on_train_start(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        """Takes over from Lightning, whose handler waits for other processes where it stands."""
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.getsignal(number) for number in self.signals}
            for number in self.signals:
                signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: pl.Trainer, system: pl.LightningModule, *_: object
    ) -> None:
        if trainer.global_step == self.step:  # amid an accumulated step
            return
        self.step = trainer.global_step
        self._end(self._agreed())

    def on_validation_batch_end(
        self, trainer: pl.Trainer, system: pl.LightningModule, *_: object
    ) -> None:
        self.check(trainer)

    def check(self, trainer: pl.Trainer) -> None:
        """Ends a validation or a sampling, where one process does not have to wait for others."""
        if trainer.world_size == 1:
            self._end(self.received)

    def on_train_end(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        self._end(self._agreed())

    def on_exception(
        self, trainer: pl.Trainer, system: pl.LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def teardown(self, trainer: pl.Trainer, system: pl.LightningModule, stage: str) -> None:
        self._restore()

    def _note(self, number, frame):
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        name = signal.Signals(number).name
        log.info("%s: stopping after this step (again: at once, without saving)", name)

    def _agreed(self):
        """The signal that any process has received, 0 if none has; known to all of them."""
        if self.group is None:
            return self.received
        received = torch.tensor([self.received])
        distributed.all_reduce(received, op=distributed.ReduceOp.MAX, group=self.group)
        return int(received)

    def _end(self, number):
        if number:
            raise Stopped(128 + number)

    def _restore(self):
        for number, handler in self.__dict__.pop("before", {}).items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
