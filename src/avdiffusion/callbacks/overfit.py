"""Whether a model learns one batch by heart."""

import logging

import pytorch_lightning as pl
import torch

log = logging.getLogger("avdiffusion")


class Overfit(pl.Callback):
    """Says at the end how far the training loss has fallen, for `debug=overfit`.

    The first and the last tenth of the steps are compared, because times and noises differ from
    step to step. The verdict is that it learns if less than `share` of the loss is left.
    """

    def __init__(self, *, share: float = 0.5):
        if not 0 < share < 1:
            raise ValueError(f"share={share} has to be between 0 and 1")
        self.share, self.losses = share, []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.losses.append(trainer.callback_metrics["train/loss"].detach().clone())

    def on_train_end(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        count = max(len(self.losses) // 10, 1)
        losses = torch.stack(self.losses).float()
        first, last = float(losses[:count].mean()), float(losses[-count:].mean())
        learns = last < self.share * first
        verdict = "it learns" if learns else "it does NOT learn even one batch"
        log.log(
            logging.INFO if learns else logging.WARNING,
            "overfit: loss %.4g -> %.4g in %d steps (%.0f %% are left): %s",
            first,
            last,
            trainer.global_step,
            100 * last / first,
            verdict,
        )
