"""What a model that makes clips of others makes of held-out ones, beside what it should have made.

Such a system has a `model.conditioner`; see `systems.condition.LowRes` for what that is asked.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from avdiffusion.strip import contact_sheet
from avdiffusion.writer import pixels

SHOWN = 4  # samples of a comparison
SIZE = 256  # pixels of width that it enlarges frames to


def conditioner(system: pl.LightningModule) -> object | None:
    """What tells a system's network of the clips it is given; None if it makes its own."""
    return getattr(getattr(system, "model", None), "conditioner", None)


class Beside(NamedTuple):
    """Clips beside samples 0 to n - 1: what these are made of, that without the model, the truth.

    Each is name to uint8 or float in [-1, 1]; `name` is what the second is called.
    """

    given: Mapping[str, Tensor]
    baseline: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    name: str

    def comparison(self, made: Mapping[str, np.ndarray]) -> Image.Image:
        """The middle frames of the first samples, a row for each, with those beside them.

        All are brought to the size of the targets by repeating pixels, small ones to a multiple.
        """
        kinds = {
            "given": self.given,
            self.name: self.baseline,
            "model": made,
            "target": self.targets,
        }
        height, width = self.targets["video"].shape[-2:]
        factor = max(1, SIZE // width)
        pictures, labels = [], []
        for name, clips in kinds.items():
            for k, clip in enumerate(clips["video"][:SHOWN]):
                clip = pixels(torch.as_tensor(clip))
                frame = Image.fromarray(rearrange(clip[:, clip.shape[1] // 2], "c h w -> h w c"))
                size = width * factor, height * factor
                pictures.append(frame.resize(size, Image.Resampling.NEAREST))
                labels.append(f"{k:06d} {name}")
        return contact_sheet(pictures, labels, columns=len(kinds))


class HeldOut:
    """Clips of a dataset for a conditioned system, each sample made of an item.

    Neighbours in a dataset may be of one file, so samples take the items in a fixed random order.
    """

    def __init__(self, data: Dataset | Sequence, system: pl.LightningModule):
        self.data, self.system, self.kept = data, system, (0, None)
        self.order = np.random.default_rng(0).permutation(len(data)).tolist()

    def batch(self, index: Sequence[int]) -> dict:
        """The items of which these samples are made."""
        return default_collate([self.data[self.order[i % len(self.order)]] for i in index])

    def samples(self, index: Sequence[int], *, micro_batch: int, **options: object) -> Iterator:
        """`Samples` as those of a system that is given nothing, `micro_batch` at a time."""
        for _, group in groupby(index, lambda i: i // micro_batch):
            numbers = list(group)
            yield self.system.conditioned(self.batch(numbers), numbers, **options)

    def beside(self, num: int) -> Beside:
        """The same object as the last time if that was of as many samples."""
        if self.kept[0] != num:
            batch, told = self.batch(range(num)), conditioner(self.system)
            beside = Beside(
                given={told.modality: batch[told.takes]},
                baseline=told.baseline(batch),
                targets={name: batch[name] for name in self.system.shapes},
                name=told.baseline_name,
            )
            self.kept = num, beside
        return self.kept[1]
