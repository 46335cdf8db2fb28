"""Pictures made worse, so that a network can learn to make them better."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

KERNELS = {  # what `torch.nn.functional.interpolate` is to do
    "bicubic": {"mode": "bicubic", "antialias": True},
    "bicubic_aliased": {"mode": "bicubic"},
    "area": {"mode": "area"},
}


@dataclass(frozen=True, kw_only=True)
class Degrade:
    """Frames uint8 [3, T, H, W] made small and spoilt: float32 [3, T, h, w], 0..255 on [-1, 1].

    H / h is `scale`, unless `size` [h, w] is given. The small picture has 256 levels, like one from
    a file. Kernels: "bicubic" and "area" mean over all that a small pixel covers,
    "bicubic_aliased" looks at its nearest four by four alone (OpenCV's INTER_CUBIC, a = -0.75).
    With probability `noise_share` normal noise is added, of a deviation from U(0, `noise`) of 255;
    it leaves the range. With probability `jpeg_share` JPEG follows, of quality int(U(low, high)),
    `jpeg` being [low, high]. All frames share deviation and quality. "bicubic_aliased" with noise
    20 and jpeg [20, 80] is what MM-Diffusion's super-resolution (Ruan et al. 2023) was trained on.
    """

    scale: float = 4
    size: Sequence[int] | None = None
    kernel: str = "bicubic"
    noise: float = 0.0
    noise_share: float = 0.5
    jpeg: Sequence[int] | None = None
    jpeg_share: float = 0.5

    def __post_init__(self):
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel is one of {', '.join(KERNELS)}, not {self.kernel}")

    def __call__(self, video: Tensor, rng: np.random.Generator) -> Tensor:
        if video.dtype != torch.uint8:
            raise ValueError(f"frames are made worse as uint8, not as {video.dtype}")
        noisy, strength, packed, quality = rng.random(4)
        small = resized(video, self.target(video.shape[-2:]), self.kernel).round().clamp(0, 255)
        if self.noise > 0 and noisy < self.noise_share:
            draws = rng.standard_normal(small.shape, dtype=np.float32)
            small = small + self.noise * strength * torch.from_numpy(draws)
        if self.jpeg is not None and packed < self.jpeg_share:
            low, high = self.jpeg
            small = through_jpeg(small, int(low + quality * (high - low)))
        return small / 127.5 - 1

    def target(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of what comes of frames of a `size`."""
        if self.size is not None:
            return tuple(self.size)
        height, width = (n / self.scale for n in size)
        if height != int(height) or width != int(width):
            raise ValueError(
                f"frames of {size[0]}x{size[1]} cannot be made {self.scale:g} times smaller: "
                "data.size has to be divisible by the scale of degrade"
            )
        return int(height), int(width)


class Degraded(Dataset):
    """The items of `clips` with a worse copy of each picture, and without sound.

    Items: `video` uint8 [3, T, H, W], as it was; as `entry` what `degrade(video, rng)` makes of it,
    for `Degrade` float32 [3, T, h, w]; and what else there is but `audio`. The generator of `[i]`
    is keyed by `seed` and the item, so that it is always the same; `draw` hands on its own. Of the
    clips, `num` are used, evenly spread, or all.
    """

    def __init__(
        self,
        clips: Dataset,
        *,
        degrade: Callable[[Tensor, np.random.Generator], Tensor],
        entry: str = "low_res",
        num: int | None = None,
        seed: int = 0,
    ):
        self.clips, self.degrade, self.entry, self.seed = clips, degrade, entry, seed
        self.num = len(clips) if num is None else min(num, len(clips))

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        number = self._number(i)
        return self._with_worse(self.clips[number], np.random.default_rng((self.seed, number)))

    def draw(self, i: int, rng: np.random.Generator) -> dict:
        """A random item of clip i, if the clips have such, made worse at random."""
        number = self._number(i)
        random = hasattr(self.clips, "draw")
        item = self.clips.draw(number, rng) if random else self.clips[number]
        return self._with_worse(item, rng)

    def _number(self, i):
        """The clip in the middle of the i-th of `num` equal shares."""
        return (2 * i + 1) * len(self.clips) // (2 * self.num)

    def _with_worse(self, item, rng):
        kept = {name: value for name, value in item.items() if name != "audio"}
        return {**kept, self.entry: self.degrade(item["video"], rng)}


def resized(video: Tensor, size: Sequence[int], kernel: str) -> Tensor:
    """Frames [C, T, H, W] as float32 [C, T, *size], not rounded."""
    return F.interpolate(video.float(), tuple(size), **KERNELS[kernel])


def through_jpeg(video: Tensor, quality: int) -> Tensor:
    """Frames float [3, T, H, W] in 0..255, rounded to it, as they are in JPEG files (4:2:0)."""
    frames = []
    for frame in rearrange(video.round().clamp(0, 255).byte(), "c t h w -> t h w c").numpy():
        file = BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality)
        frames.append(np.asarray(Image.open(file)))
    return rearrange(torch.from_numpy(np.stack(frames)), "t h w c -> c t h w").float()
