"""A system that trains one number and whose samples are toy clips: quick, and in sync."""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from avdiffusion.data.toy import Toy
from avdiffusion.media import Media
from avdiffusion.systems.diffusion import Samples

TOY = {"size": (24, 24), "sample_rate": 8000, "samples": 12800}


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield {"video": torch.zeros(3, 2, 4, 4), "index": 0}


class TinyData(pl.LightningDataModule):
    def __init__(self, val=12):
        super().__init__()
        self.val = Toy(num=val, seed=1, **TOY)

    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=4)

    def val_dataloader(self):
        return DataLoader([0.0], batch_size=1)


class TinySystem(pl.LightningModule):
    """`val/loss` at the n-th validation is `losses[n]`, then 9."""

    def __init__(self, losses=(3.0, 1.0, 2.0, 0.5, 4.0)):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.losses, self.asked = list(losses), []
        self.rates, self.sampler, self.guides = {"video": 10, "audio": 8000}, "DDIM(steps=2)", []

    def training_step(self, batch, _):
        loss = (self.weight**2).sum()
        self.log_dict({"train/loss": loss, "train/loss_video": loss / 2}, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        if not self.trainer.sanity_checking:
            self.log("val/loss", self.losses.pop(0) if self.losses else 9.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def samples(self, index, *, seed=0, micro_batch=8, progress=None):
        self.asked.append((self.global_step, list(index), seed))
        toy = Toy(num=100, seed=seed, **TOY)
        for at in range(0, len(index), micro_batch):
            group = list(index)[at : at + micro_batch]
            items = [toy[i] for i in group]
            for _ in range(3):
                progress()
            video = torch.stack([item["video"] for item in items]) / 127.5 - 1
            sound = torch.stack([item["audio"] for item in items])
            yield Samples(group, Media(video=video, audio=sound), 2)


def fit(*callbacks, logger=(), steps=4, system=None, ckpt=None, **options):
    """Trains for some steps without a bar; returns trainer and system."""
    system = system or TinySystem()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=list(logger),
        callbacks=list(callbacks),
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        **{
            "log_every_n_steps": 2,
            "val_check_interval": 2,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
            **options,
        },
    )
    trainer.fit(system, TinyData(), ckpt_path=ckpt, weights_only=True)
    return trainer, system
