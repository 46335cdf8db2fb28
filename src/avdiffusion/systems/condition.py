"""What a network is told besides what it denoises, made of a batch."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from avdiffusion.media import Media


class LowRes(nn.Module):
    """A clip's frames at a lower resolution, brought to the one that is made.

    Of the batch's `takes` [B, C, T, h, w] in about [-1, 1] it makes `concat` [B, C, T, H, W], which
    the network joins with its channels: bilinear, H = `scale` h, as published for super-resolution
    (Dhariwal and Nichol 2021; Ruan et al. 2023, section 4.1). `modality` is what is made of it.
    """

    baseline_name = "bicubic"

    def __init__(self, *, modality: str = "video", takes: str = "low_res", scale: float = 4):
        super().__init__()
        if scale < 1:
            raise ValueError(f"scale={scale} is below 1: the low resolution is the smaller one")
        self.modality, self.takes, self.scale = modality, takes, scale

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if self.takes not in batch:
            raise ValueError(
                f"the data has no {self.takes!r}, which this model is conditioned on: a batch "
                f"holds {sorted(batch)}"
            )
        return {"concat": self._enlarged(batch[self.takes], "bilinear")}

    def baseline(self, batch: Mapping[str, Any]) -> Media:
        """What is had of a batch without a model: bicubic enlargement, held within [-1, 1]."""
        return Media({self.modality: self._enlarged(batch[self.takes], "bicubic").clamp(-1, 1)})

    def _enlarged(self, low: Tensor, mode: str) -> Tensor:
        frames = low.transpose(1, 2).flatten(0, 1)
        size = [round(self.scale * n) for n in low.shape[-2:]]
        high = F.interpolate(frames, size, mode=mode, align_corners=False)
        return high.unflatten(0, (len(low), -1)).transpose(1, 2)

    def batch(self, clips: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it takes of clips in [-1, 1], such as another model has made."""
        return {self.takes: clips[self.modality]}

    def shapes(
        self, given: Mapping[str, Tensor], shapes: Mapping[str, list[int]]
    ) -> dict[str, list[int]]:
        """The shape [C, T, H, W] of what is made of `takes` [B, C, T, h, w]."""
        _, _, frames, *size = given[self.takes].shape
        channels = shapes[self.modality][0]
        return {**shapes, self.modality: [channels, frames, *(round(self.scale * n) for n in size)]}

    def taken(self, shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """The shape of `takes` of which clips of `shapes` are made."""
        channels, frames, *size = shapes[self.modality]
        return {self.takes: [channels, frames, *(round(n / self.scale) for n in size)]}
