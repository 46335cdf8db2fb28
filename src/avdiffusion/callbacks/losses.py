"""The losses: in training as a mean over many batches, and by how much noise there was."""

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from torch.nn.functional import one_hot

from avdiffusion.callbacks.scalars import Scalars


class Losses(Scalars):
    """Logs `train/loss`, `train/loss_<modality>` and those of `bins` equal parts of time, `_t<k>`.

    Means over the samples of all processes since the last log; t0 has the least noise, and models
    without a time have no such parts. Samples whose loss is not finite are left out, and so is a
    part without samples. `val/*` is passed on as validation leaves it.
    """

    def __init__(self, *, bins: int = 4):
        if bins < 1:
            raise ValueError(f"bins={bins} is below 1")
        self.bins, self.window = bins, []

    def on_train_start(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        super().on_train_start(trainer, system)
        self.window = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, system: pl.LightningModule, outputs: Mapping, *_: object
    ) -> None:
        self.window.append((outputs.get("t"), outputs["losses"]))  # read when logged, no sooner
        if self.due(trainer):
            self.send(trainer, self._means(trainer, system))
            self.window = []

    def on_validation_end(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        """Not by Lightning, which counts a validation to the step before it."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            found = trainer.callback_metrics.items()
            self.send(trainer, {k: float(v) for k, v in found if k.startswith("val/")})

    def _means(self, trainer, system):
        names = list(self.window[0][1])
        losses = [torch.cat([each[name] for _, each in self.window]) for name in names]
        losses = torch.stack(losses).cpu().double()  # [names, N]
        timed = self.window[0][0] is not None
        bins = torch.ones(losses.shape[1], 1, dtype=torch.double)
        if timed:
            path, t = system.model.path, torch.cat([t for t, _ in self.window])
            bins = ((t - path.t_min) / (path.t_max - path.t_min) * self.bins).long()
            bins = one_hot(bins.clamp(0, self.bins - 1), self.bins).double()  # [N, bins]
        finite = losses.isfinite()
        sums = torch.stack([losses.where(finite, 0.0) @ bins, finite.double() @ bins]).float()
        sums = sums.to(trainer.strategy.root_device)  # one collective: [2, names, bins]
        sums, counts = trainer.strategy.reduce(sums, reduce_op="sum").cpu()

        values = {}
        for name, total, count in zip(names, sums, counts, strict=True):
            means = {"": total.sum() / count.sum()}
            means |= {f"_t{k}": v for k, v in enumerate(total / count) if timed}
            values |= {f"train/loss_{name}{k}": float(v) for k, v in means.items() if v.isfinite()}
        whole = {name: values.get(f"train/loss_{name}") for name in names}
        if None in whole.values():
            return values
        return {"train/loss": system.total(whole), **values}
