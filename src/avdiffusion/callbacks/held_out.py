"""What a model that makes clips of others makes of held-out ones, beside what it should have made.

Such a system has `remakes`; see `systems.condition.Remakes` for what that is asked.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from avdiffusion.strip import contact_sheet, strip
from avdiffusion.writer import pixels, sound

SHOWN = 4  # samples of a comparison
SIZE = 256  # pixels of width that it enlarges frames to


def remakes(system: pl.LightningModule) -> Any:
    """What says of which clips a system makes its own; None if of none."""
    return getattr(system, "remakes", None)


def conditional(system: pl.LightningModule) -> bool:
    """Whether a system has to be told of something to make a clip: of another clip, or a text."""
    conditioner = getattr(getattr(system, "model", None), "conditioner", None)
    return remakes(system) is not None or conditioner is not None


class Beside(NamedTuple):
    """Clips beside samples 0 to n - 1: what these are made of, that without the model, the truth.

    Each is name to integers or float in [-1, 1]; `name` is what the second is called.
    """

    given: Mapping[str, Tensor]
    baseline: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    name: str
    rates: Mapping[str, float]

    def comparison(self, made: Mapping[str, np.ndarray]) -> Image.Image:
        """Middle frames or spectrograms of the first samples, a row for each, and of those beside.

        Frames get the size of the targets by repeating pixels, small ones a multiple of it.
        """
        kinds = {
            "given": self.given,
            self.name: self.baseline,
            "model": made,
            "target": self.targets,
        }
        pictures, labels = [], []
        for name, clips in kinds.items():
            for k in range(min(SHOWN, len(next(iter(made.values()))))):
                clip = {kind: torch.as_tensor(values[k]) for kind, values in clips.items()}
                show = self._frame if "video" in clip else self._heard
                pictures.append(show(clip))
                labels.append(f"{k:06d} {name}")
        return contact_sheet(pictures, labels, columns=len(kinds))

    def _frame(self, clip: Mapping[str, Tensor]) -> Image.Image:
        height, width = self.targets["video"].shape[-2:]
        factor = max(1, SIZE // width)
        shown = pixels(clip["video"])
        frame = Image.fromarray(rearrange(shown[:, shown.shape[1] // 2], "c h w -> h w c"))
        return frame.resize((width * factor, height * factor), Image.Resampling.NEAREST)

    def _heard(self, clip: Mapping[str, Tensor]) -> Image.Image:
        return strip(None, sound(clip["audio"]), sample_rate=self.rates["audio"])


class HeldOut:
    """Clips of a dataset for a conditioned system, each sample made of an item.

    Neighbours in a dataset may be of one file, so samples take the items in a fixed random order.
    """

    def __init__(self, data: Dataset | Sequence, system: pl.LightningModule):
        self.data, self.system, self.kept, self.said = data, system, (0, None), {}
        self.order = np.random.default_rng(0).permutation(len(data)).tolist()

    def batch(self, index: Sequence[int]) -> dict:
        """The items of which these samples are made."""
        batch = default_collate([self.data[self.order[i % len(self.order)]] for i in index])
        self.said |= dict(zip(index, batch.get("text", ()), strict=False))
        return batch

    def texts(self, index: Sequence[int]) -> list[str] | None:
        """What these samples are of, if the items say so."""
        if index[0] not in self.said:  # another process has made them
            self.batch(index)
        return [self.said[i] for i in index] if self.said else None

    def samples(self, index: Sequence[int], *, micro_batch: int, **options: object) -> Iterator:
        """`Samples` as those of a system that is given nothing, `micro_batch` at a time."""
        for _, group in groupby(index, lambda i: i // micro_batch):
            numbers = list(group)
            yield self.system.conditioned(self.batch(numbers), numbers, **options)

    def beside(self, num: int) -> Beside | None:
        """The same object as the last time if that was of as many samples; None beside texts."""
        source = remakes(self.system)
        if source is not None and self.kept[0] != num:
            batch = self.batch(range(num))
            beside = Beside(
                given={source.modality: batch[source.takes]},
                baseline=source.baseline(batch),
                targets={name: batch[name] for name in self.system.shapes},
                name=source.baseline_name,
                rates=self.system.rates,
            )
            self.kept = num, beside
        return self.kept[1]
