"""Pictures spoilt without a change of size, so that a network can learn to restore them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from avdiffusion.data.degrade import resized, through_jpeg


@dataclass(frozen=True, kw_only=True)
class Spoil:
    """Frames uint8 [3, T, H, W] as a worse camera would have stored them: the same shape and type.

    Each setting is [low, high], of which a value is drawn evenly for the whole clip; None, or a
    value of 0, leaves its step out. In this order, on levels of 0 to 255 as they are stored:
    `blur`, a Gaussian of this deviation in pixels (mirrored at the edges); `scale`, a sensor of so
    many times fewer rows and columns; `dark`, all levels times this; `poisson`, shot noise of so
    many photons at 255, a variance of 255 / photons times the level; `noise`, normal noise of this
    deviation; whole levels from 0 to 255; `jpeg` of a quality int(value), 4:2:0; and at last the
    size that the clip had. Both noises are each frame's own.
    """

    blur: Sequence[float] | None = None
    scale: Sequence[float] | None = None
    dark: Sequence[float] | None = None
    poisson: Sequence[float] | None = None
    noise: Sequence[float] | None = None
    jpeg: Sequence[float] | None = None

    def __post_init__(self):
        for name, limits in self._ranges().items():
            least = 1 if name == "scale" else 0
            if limits is not None and not (len(limits) == 2 and least <= limits[0] <= limits[1]):
                raise ValueError(f"{name} {list(limits)} must be [low, high], {least} or more")

    def __call__(self, video: Tensor, rng: np.random.Generator) -> Tensor:
        if video.dtype != torch.uint8:
            raise ValueError(f"frames are spoilt as uint8, not as {video.dtype}")
        draw = self._drawn(rng)
        size, frames = video.shape[-2:], video.float()
        if draw["blur"]:
            frames = blurred(frames, draw["blur"])
        if draw["scale"]:
            small = [max(1, round(n / draw["scale"])) for n in size]
            frames = resized(frames, small, "bicubic").clamp(0, 255)
        if draw["dark"]:
            frames = frames * draw["dark"]
        if draw["poisson"]:
            photons = rng.poisson(frames.numpy() * (draw["poisson"] / 255))
            frames = torch.from_numpy(photons.astype(np.float32)) * (255 / draw["poisson"])
        if draw["noise"]:
            normal = rng.standard_normal(frames.shape, dtype=np.float32)
            frames = frames + draw["noise"] * torch.from_numpy(normal)
        frames = frames.round().clamp(0, 255)
        if draw["jpeg"]:
            frames = through_jpeg(frames, int(draw["jpeg"]))
        if frames.shape[-2:] != size:
            frames = resized(frames, size, "bicubic").round().clamp(0, 255)
        return frames.byte()

    def _ranges(self):
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _drawn(self, rng):
        """A value of each setting; what one of them is does not depend on the others."""
        ranges = self._ranges()
        shares = rng.random(len(ranges))
        return {
            name: 0 if limits is None else float(limits[0] + share * (limits[1] - limits[0]))
            for (name, limits), share in zip(ranges.items(), shares, strict=True)
        }


def blurred(frames: Tensor, deviation: float) -> Tensor:
    """Frames float [C, T, H, W] under a Gaussian; their means stay."""
    height, width = frames.shape[-2:]
    return gaussian(height, deviation) @ frames @ gaussian(width, deviation).T


def gaussian(n: int, deviation: float) -> Tensor:
    """The matrix [n, n] that blurs n pixels mirrored at both ends; cut off at four deviations."""
    radius = int(4 * deviation + 0.5)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / deviation) ** 2)
    beyond = torch.from_numpy(np.pad(np.arange(n), radius, "symmetric"))
    return torch.eye(n)[beyond].unfold(0, len(taps), 1) @ (taps / taps.sum())
