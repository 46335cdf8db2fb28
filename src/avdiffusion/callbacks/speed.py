"""How fast training is, and how much memory it takes."""

from time import perf_counter

import pytorch_lightning as pl
import torch


class Speed(pl.Callback):
    """Logs `train/clips_per_s` over all devices and, on CUDA, the peak `train/gpu_gib`.

    The rate is that of the steps since it was last logged; validation and sampling don't count.
    """

    def __init__(self):
        self.logged = 0
        self.restart()

    def restart(self) -> None:
        """Starts a new window now."""
        self.clips, self.since = 0, perf_counter()

    def on_train_start(self, *_: object) -> None:
        self.restart()

    def on_validation_end(self, *_: object) -> None:
        self.restart()

    def on_train_batch_end(
        self, trainer: pl.Trainer, system: pl.LightningModule, _: object, batch: dict, _at: int
    ) -> None:
        self.clips += (
            len(next(v for v in batch.values() if torch.is_tensor(v))) * trainer.world_size
        )
        step = trainer.global_step
        if step == self.logged or step % trainer.log_every_n_steps:
            return
        self.logged = step
        rate = self.clips / (perf_counter() - self.since)
        system.log("train/clips_per_s", rate, prog_bar=True, batch_size=1)
        if torch.cuda.is_available():
            system.log("train/gpu_gib", torch.cuda.max_memory_allocated() / 2**30, batch_size=1)
        self.restart()
