"""What all systems have in common: a model with its average, and how a step of training ends."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import Precision
from torch import Tensor, nn

from avdiffusion.diffusion.guide import Guide
from avdiffusion.diffusion.noise import key
from avdiffusion.media import Media
from avdiffusion.samplers.sampler import Sampler
from avdiffusion.systems.average import EMA, PowerEMA
from avdiffusion.systems.resume import rewind, settle

FORMAT = 1  # of a checkpoint; raised when an older one can no longer be read as it is


class Samples(NamedTuple):
    """Samples by their numbers, and how often the network was asked for them."""

    index: list[int]
    clips: Media
    evaluations: int


class System(pl.LightningModule):
    """A model, its moving average, and how the two are trained.

    A subclass has `training_loss(batch)`: `loss`, `losses` by name and sample [B], and `t` [B] if
    there is a time; and `once(batch)`, one evaluation of the model for clips like the batch's.

    `shapes`: of a clip, name to shape without batch. `rates`: steps a second of each modality
    (frames, samples), for who writes files. `optimizer`, `ema`, `lr_schedule`: called with
    parameters, model, optimiser. `weights`: factor of each loss; 1 where none is given.
    """

    sampler: Sampler | None = None  # what sampling uses unless told otherwise, of those that do
    guides: Sequence[Guide] = ()

    def __init__(
        self,
        model: nn.Module,
        *,
        shapes: dict[str, list[int]],
        rates: dict[str, float],
        optimizer: Callable,
        ema: Callable[..., EMA | PowerEMA],
        lr_schedule: Callable | None = None,
        weights: dict[str, float] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        self.ema = ema(model)
        self.shapes, self.rates, self.weights = shapes, rates, weights or {}
        self.optimizer, self.lr_schedule, self.seed = optimizer, lr_schedule, seed
        self.validated = 0  # the optimiser step of the last validation that was completed

    @property
    def networks(self) -> list[nn.Module]:
        """What takes nearly all the time of the model that is trained: to be compiled."""
        return [self.model.net]

    @property
    def remakes(self) -> Any:
        """What says of which clips it makes its own (`condition.Remakes`); None if of none."""
        return None

    def training_step(self, batch: dict, _: int) -> dict:
        """What `training_loss` returns, and the trainer is told of it."""
        # Dropout is the one thing that draws from torch's own generator; with this it, too, is a
        # function of the position in training.
        torch.manual_seed(key(self.seed, "layers", batch["position"][0]))
        found = self.training_loss(batch)
        self.log_losses("train", found["losses"], len(batch["position"]))
        return found

    def log_losses(self, stage: str, losses: dict, count: int, **options) -> Tensor:
        """Logs each mean; returns (and logs) their weighted sum.

        Loggers get means over all processes from the callback `Losses`, the bar reads these.
        """
        means = {name: value.mean() for name, value in losses.items()}
        total = self.total(means)
        logged = {f"{stage}/loss_{name}": value.detach() for name, value in means.items()}
        logged[f"{stage}/loss"] = total.detach()
        self.log_dict(logged, batch_size=count, logger=False, **options)
        return total

    def total(self, losses: dict) -> Tensor:
        """The weighted sum of mean losses."""
        return sum(self.weights.get(n.removesuffix("_vb"), 1.0) * v for n, v in losses.items())

    def clips(self, batch: Mapping[str, Any]) -> Media:
        """The clips of a batch, of the shapes that the model is for, in [-1, 1]."""
        missing = [name for name in self.shapes if name not in batch]
        if missing:
            raise ValueError(f"the data has no {missing}: a batch holds {sorted(batch)}")
        for name, shape in self.shapes.items():
            if list(batch[name].shape[1:]) != list(shape):
                raise ValueError(
                    f"{name} comes as {list(batch[name].shape[1:])}, the model expects "
                    f"{list(shape)}: give data and model the same frames, size and samples"
                )
        return Media({name: unit(batch[name]) for name in self.shapes})

    def configure_optimizers(self):
        optimizer = self.optimizer(self.model.parameters())
        if self.lr_schedule is None:
            return optimizer
        schedule = {"scheduler": self.lr_schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        self.ema.update()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning, which refuses it for fused optimisers even where no gradient is scaled."""
        plugin = self.trainer.precision_plugin
        if plugin.precision == "bf16-mixed":
            how = gradient_clip_algorithm or "norm"
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, how)
        else:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def on_train_start(self) -> None:
        schedules = [each.scheduler for each in self.trainer.lr_scheduler_configs] or [None]
        settle(self.trainer.optimizers[0], schedules[0])

    def on_validation_end(self) -> None:
        self.validated = self.global_step

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["avdiffusion"] = {
            "format": FORMAT,
            "version": version("avdiffusion"),
            "validated": self.validated,
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.validated = checkpoint["avdiffusion"].get("validated", 0)
        if self.trainer.state.fn == "fit":
            step = checkpoint["global_step"]
            rewind(checkpoint["loops"], self.trainer, step=step, validated=self.validated)


def unit(value: Any) -> Any:
    """Pixels and PCM samples as float in [-1, 1]; what else there is as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.uint8:
        return value.float() / 127.5 - 1
    if value.dtype == torch.int16:
        return value.float() / 32768
    return value.float() if value.is_floating_point() else value


def finite(loss: Tensor) -> Tensor:
    """The loss, with a gradient that is not finite on any device if it is not."""
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)


def empty(count: int, shapes: Mapping[str, Sequence[int]], device: torch.device | str) -> Media:
    """Clips of these shapes with no values in particular."""
    return Media({k: torch.empty(count, *n, device=device) for k, n in shapes.items()})
