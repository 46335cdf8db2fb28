"""When scalars are logged, and where they go."""

from collections.abc import Mapping

import pytorch_lightning as pl

UNLOGGED = 100  # steps of a window where nothing is logged: it has to end somewhere


class Scalars(pl.Callback):
    """A callback that gathers over windows of `log_every_n_steps` optimiser steps."""

    def on_train_start(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        self.ended = trainer.global_step

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether a window ends here, once per optimiser step; the last step ends one as well."""
        step, every = trainer.global_step, trainer.log_every_n_steps or UNLOGGED
        if step == self.ended or (step % every and step != trainer.max_steps):
            return False
        self.ended = step
        return True

    def send(self, trainer: pl.Trainer, values: Mapping[str, float]) -> None:
        """To all loggers. Not by `system.log`, which would repeat a value that has none now."""
        if values and trainer.log_every_n_steps:
            for logger in trainer.loggers:
                logger.log_metrics(dict(values), trainer.global_step)
