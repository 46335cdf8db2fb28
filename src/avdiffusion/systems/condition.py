"""What a network is told besides what it denoises, made of a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avdiffusion.media import Media
from avdiffusion.systems.moments import Moments

Encode = Callable[[Media], Media]  # from clips to what is diffused
Shapes = Mapping[str, Sequence[int]]


class Remakes(Protocol):
    """What is known of a model that makes its clips of others, one of each.

    It makes the modality `modality` of the batch's entry `takes`. `baseline(batch)` is what is had
    without the model, and `baseline_name` says how.
    """

    modality: str
    takes: str
    baseline_name: str

    def baseline(self, batch: Mapping[str, Any]) -> Media: ...
    def batch(self, clips: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it takes of clips in [-1, 1], such as another model has made."""

    def shapes(self, batch: Mapping[str, Tensor], shapes: Shapes) -> dict[str, list[int]]:
        """The shapes of what is made of `takes`, those of a model being `shapes`."""

    def blank(self, count: int, shapes: Shapes) -> dict[str, Tensor]:
        """A batch of which clips of `shapes` are made, with no values in particular."""


class Same:
    """A model that makes a clip of each clip, of the same size and length.

    Without the model there is the clip itself, "unchanged".
    """

    baseline_name = "unchanged"

    def __init__(self, *, modality: str, takes: str):
        super().__init__()
        self.modality, self.takes = modality, takes

    def baseline(self, batch: Mapping[str, Any]) -> Media:
        return Media({self.modality: batch[self.takes]})

    def batch(self, clips: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.takes: clips[self.modality]}

    def shapes(self, batch: Mapping[str, Tensor], shapes: Shapes) -> dict[str, list[int]]:
        return {**shapes, self.modality: list(batch[self.takes].shape[1:])}

    def blank(self, count: int, shapes: Shapes) -> dict[str, Tensor]:
        return {self.takes: torch.zeros(count, *shapes[self.modality])}


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

    def forward(self, batch: Mapping[str, Any], encode: Encode) -> dict[str, Tensor]:
        return {"concat": self._enlarged(entry(batch, self.takes), "bilinear")}

    def baseline(self, batch: Mapping[str, Any]) -> Media:
        """Bicubic enlargement, held within [-1, 1]."""
        return Media({self.modality: self._enlarged(batch[self.takes], "bicubic").clamp(-1, 1)})

    def _enlarged(self, low: Tensor, mode: str) -> Tensor:
        frames = low.transpose(1, 2).flatten(0, 1)
        size = [round(self.scale * n) for n in low.shape[-2:]]
        high = F.interpolate(frames, size, mode=mode, align_corners=False)
        return high.unflatten(0, (len(low), -1)).transpose(1, 2)

    def batch(self, clips: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.takes: clips[self.modality]}

    def shapes(self, batch: Mapping[str, Tensor], shapes: Shapes) -> dict[str, list[int]]:
        _, _, frames, *size = batch[self.takes].shape
        channels = shapes[self.modality][0]
        return {**shapes, self.modality: [channels, frames, *(round(self.scale * n) for n in size)]}

    def blank(self, count: int, shapes: Shapes) -> dict[str, Tensor]:
        channels, frames, *size = shapes[self.modality]
        small = [round(n / self.scale) for n in size]
        return {self.takes: torch.zeros(count, channels, frames, *small)}


class Source(Same, nn.Module):
    """Another clip, such as a worse copy of what is made, in the space that is diffused: `concat`.

    Of the batch's `takes`, of the same size and length as the `modality` that is made. If it is
    dropped, for a share `drop` of the samples in training, one more channel says whether it is
    there: 1, or 0 in all channels.
    """

    def __init__(self, *, modality: str = "video", takes: str = "source", drop: float = 0.0):
        super().__init__(modality=modality, takes=takes)
        self.drop = share(drop)

    def forward(self, batch: Mapping[str, Any], encode: Encode) -> dict[str, Tensor]:
        clip = Media({self.modality: entry(batch, self.takes)})
        told = encode(clip)[self.modality]
        if self.drop:
            told = torch.cat((told, torch.ones_like(told[:, :1])), dim=1)
        return {"concat": told}

    def null(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in cond.items()}


class Encoded(Same, nn.Module):
    """The clip that is made itself, through an encoder that learns with the network: `concat`.

    With it the network is the decoder of a diffusion autoencoder (Preechakul et al. 2022; Schneider
    et al. 2023, section 3.2). `encoder` makes [B, c, l] within [-1, 1] of a clip. A batch may have
    that instead, as `latent`.
    """

    baseline_name = "silence"

    def __init__(self, *, encoder: nn.Module, modality: str = "audio"):
        super().__init__(modality=modality, takes=modality)
        self.encoder = encoder
        self.moments = Moments(encoder.out_channels)

    def forward(self, batch: Mapping[str, Any], encode: Encode) -> dict[str, Tensor]:
        if "latent" in batch:
            return {"concat": batch["latent"]}
        latent = self.encoder(entry(batch, self.takes))
        if self.training:
            self.moments.update(latent.detach())
        return {"concat": latent}

    def baseline(self, batch: Mapping[str, Any]) -> Media:
        return Media({self.modality: torch.zeros_like(batch[self.takes])})


class Text(nn.Module):
    """A text in the words of an encoder: `context` [B, n, e], and a mask of where there are any.

    `encoder(texts, device)` gives both, or None for the mask. Where the text is dropped, for a
    share `drop` of the samples in training, the network is told a learned `empty` instead. A batch
    may have the context itself, as `embedding`.
    """

    def __init__(self, *, encoder: nn.Module, drop: float = 0.1):
        super().__init__()
        self.encoder, self.drop = encoder, share(drop)
        empty = nn.init.normal_(torch.empty(encoder.max_length, encoder.width))
        self.empty = nn.Parameter(empty, requires_grad=drop > 0)  # else it has no gradient

    def forward(self, batch: Mapping[str, Any], encode: Encode) -> dict[str, Tensor]:
        if "embedding" in batch:
            context, mask = batch["embedding"], None
        else:
            context, mask = self.encoder(entry(batch, "text"), self.empty.device)
        return {"context": context} | ({} if mask is None else {"context_mask": mask})

    def null(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the network is told of no text, as long as what it is told of one."""
        found = {"context": self.empty[: cond["context"].shape[1]].expand_as(cond["context"])}
        if "context_mask" in cond:
            found["context_mask"] = torch.ones_like(cond["context_mask"])
        return found

    def shapes(self, batch: Mapping[str, Any], shapes: Shapes) -> dict[str, list[int]]:
        return dict(shapes)

    def blank(self, count: int, shapes: Shapes) -> dict[str, Tensor]:
        return {"embedding": torch.zeros(count, *self.empty.shape)}


def entry(batch: Mapping[str, Any], name: str) -> Any:
    """An entry of a batch; an error where the data has none."""
    if name not in batch:
        raise ValueError(
            f"the data has no {name!r}, which this model is conditioned on: a batch holds "
            f"{sorted(batch)}"
        )
    return batch[name]


def share(drop: float) -> float:
    if not 0 <= drop < 1:
        raise ValueError(f"drop={drop} is not a share of samples, 0 or more and below 1")
    return drop
