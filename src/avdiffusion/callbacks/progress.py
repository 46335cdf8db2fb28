"""What training says while it runs."""

import logging
import math
import sys
from time import perf_counter

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm

log = logging.getLogger("avdiffusion")


class Progress(TQDMProgressBar):
    """One bar over all optimiser steps with the losses and the speed; no bars for validation.

    Where the output is no terminal, a line every `lines` steps instead. The bar is redrawn every
    `refresh` steps.
    """

    BAR_FORMAT = (
        "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    )

    def __init__(self, *, refresh: int = 10, lines: int = 100):
        super().__init__(refresh_rate=refresh)
        self.lines, self.last = lines, -1

    def init_train_tqdm(self) -> Tqdm:
        return Tqdm(
            desc="training",
            total=self.total,
            initial=self.trainer.global_step,
            disable=self.is_disabled or not sys.stdout.isatty(),
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0.1,
            bar_format=self.BAR_FORMAT,
        )

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    init_sanity_tqdm = init_validation_tqdm

    @property
    def total(self) -> int | None:
        """Optimiser steps of the whole run, as far as they are known."""
        steps = self.trainer.max_steps
        steps = self.trainer.estimated_stepping_batches if steps < 0 else steps
        return None if math.isinf(steps) else int(steps)

    def on_train_start(self, trainer: pl.Trainer, *_: object) -> None:
        super().on_train_start()
        self.first = self.last = trainer.global_step
        self.since = perf_counter()

    def on_train_epoch_start(self, *_: object) -> None:
        """Nothing: an endless loader has one epoch, and the bar runs over all of them."""

    def on_train_epoch_end(self, *_: object) -> None:
        """Nothing, as above."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, system: pl.LightningModule, *_: object
    ) -> None:
        step = trainer.global_step
        if step == self.last or self.is_disabled:
            return
        self.last, ends = step, step == self.total
        bar = self.train_progress_bar
        if not bar.disable:
            if step % self.refresh_rate == 0 or ends:
                bar.n = step
                bar.set_postfix(self.get_metrics(trainer, system))
        elif self.lines and (step % self.lines == 0 or ends or step == self.first + 1):
            log.info("%s", self.line(trainer, system))

    def line(self, trainer: pl.Trainer, system: pl.LightningModule) -> str:
        """The state of the run in one line."""
        step, spent = trainer.global_step, perf_counter() - self.since
        text = f"step {step:>6d}" + (f"/{self.total}" if self.total else "")
        for name, value in self.get_metrics(trainer, system).items():
            text += f"  {name} {value}"
        if self.total and step > self.first + 1:  # the first step is no measure of the others
            left = spent / (step - self.first) * (self.total - step)
            text += f"  {Tqdm.format_interval(left)} left"
        return text

    def get_metrics(self, trainer: pl.Trainer, system: pl.LightningModule) -> dict[str, str]:
        """Total loss, loss per modality, speed, and the last validation loss."""
        # Not the metrics of Lightning's bar: it reads those from the device at every step.
        metrics = trainer.callback_metrics
        names = {k: k.removeprefix("train/") for k in metrics if k.startswith("train/loss")}
        names = {k: name.removeprefix("loss_") for k, name in names.items()}
        names |= {"train/clips_per_s": "clips/s", "val/loss": "val"}
        return {name: f"{float(metrics[k]):.4g}" for k, name in names.items() if k in metrics}
