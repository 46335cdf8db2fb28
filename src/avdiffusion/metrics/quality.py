"""How near pictures are to those they should be, and how much they flicker.

Video is uint8 or float in [-1, 1]; everything is computed of pixels in [0, 1], so that a data range
of 1 is right, in float64 and frame by frame: [B, 3, T, H, W] gives one number for each clip.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from avdiffusion.metrics.impacts import as_numpy
from avdiffusion.metrics.metric import Array, Clips, Found, Rates

CAP = 100.0  # dB of identical frames
WINDOW = 11  # pixels of a side that SSIM looks at


def frames(video: Array) -> np.ndarray:
    """Pictures in [0, 1]: float64 [B, 3, T, H, W], NaN where they are."""
    video = as_numpy(video)
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video {video.shape} must be [B, 3, T, H, W]")
    if video.dtype == np.uint8:
        return video / 255
    return np.clip((video.astype(np.float64) + 1) / 2, 0, 1)


def psnr(error: np.ndarray) -> np.ndarray:
    """10 log10(1 / mean squared error) in dB, at most CAP."""
    return np.minimum(-10 * np.log10(np.maximum(error, 1e-30)), CAP)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of pictures [N, H, W] in [0, 1]: [N] (Wang et al. 2004, eq. 13).

    Gaussian windows of 11 pixels, sigma 1.5, that lie inside the picture; K = (0.01, 0.03).
    """
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs at least {WINDOW} pixels a side, not {tuple(a.shape[-2:])}")
    place = torch.arange(WINDOW, dtype=a.dtype) - WINDOW // 2
    taps = torch.exp(-0.5 * (place / 1.5) ** 2)
    taps = taps / taps.sum()

    def soft(x):
        return conv2d(conv2d(x[:, None], taps[None, None, None]), taps[None, None, :, None])[:, 0]

    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = soft(a), soft(b)
    var_a, var_b = soft(a * a) - mean_a**2, soft(b * b) - mean_b**2
    both = soft(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (light * (2 * both + c2) / (var_a + var_b + c2)).mean((-2, -1))


def _each(video: Array) -> Iterator[np.ndarray]:
    """Pictures [3, T, H, W] in [0, 1] of clip after clip: float64 takes eight times the memory."""
    for k in range(len(video)):
        yield frames(video[k : k + 1])[0]


def _pairs(clips: Clips, targets: Clips) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    ours, theirs = tuple(clips["video"].shape), tuple(targets["video"].shape)
    if ours != theirs:
        raise ValueError(f"video {ours} has targets {theirs}: both must be of the same shape")
    return zip(_each(clips["video"]), _each(targets["video"]), strict=True)


@dataclass(kw_only=True)
class Restoration:
    """Pictures against those that they should be, each number the mean over a clip's frames.

    `psnr` is of each frame, `psnr_pooled` of the clip's mean squared error (always the lower);
    `psnr_identical` is the share of frames without any error, which count as 100 dB. `ssim` is the
    mean of R, G and B. `flicker_error` is the mean |(x[k+1] - x[k]) - (y[k+1] - y[k])|, in grey
    levels of 255, that no frame by itself shows.
    """

    name: ClassVar[str] = (
        "of each frame, pixels in [0, 1]: PSNR, 100 dB if identical; SSIM, Gaussian 11, sigma 1.5, "
        "inside the picture, mean of R, G and B"
    )
    needs: ClassVar[tuple[str, ...]] = ("video",)
    paired: ClassVar[bool] = True
    about: ClassVar[dict] = {
        "psnr": ("PSNR, mean of frames", "dB", "higher"),
        "psnr_pooled": ("PSNR, pooled over each clip", "dB", "higher"),
        "psnr_identical": ("identical frames, which count as 100 dB", "share", ""),
        "ssim": ("SSIM", "", "higher"),
        "flicker_error": ("error of the change from frame to frame", "/255", "lower"),
    }
    fields: ClassVar[tuple[str, ...]] = tuple(about)

    def __call__(self, clips: Clips, rates: Rates, targets: Clips) -> Found:
        found = []
        for a, b in _pairs(clips, targets):
            error = ((a - b) ** 2).mean(axis=(0, 2, 3))
            planes = (torch.from_numpy(x.reshape(-1, *x.shape[-2:])) for x in (a, b))
            row = (
                psnr(error).mean(),
                psnr(error.mean()),
                (error == 0).mean(),
                ssim(*planes).mean().item(),
                255 * _change(a - b),
            )
            found.append(row)
        columns = np.array(found, dtype=np.float64).reshape(-1, len(self.fields)).T
        return dict(zip(self.fields, columns, strict=True))


def _change(clip: np.ndarray) -> float:
    """Mean |x[k+1] - x[k]| of [3, T, H, W]; NaN for a single frame."""
    return float(np.abs(np.diff(clip, axis=1)).mean()) if clip.shape[1] > 1 else float("nan")


@dataclass(kw_only=True)
class Flicker:
    """`flicker`: mean |x[k+1] - x[k]| of a clip in grey levels of 255, what VBench calls temporal
    flickering (2311.17982, there 255 minus it over 255). Motion counts too: compare it with that
    of real clips.
    """

    name: ClassVar[str] = "mean absolute change from frame to frame, grey levels of 255"
    needs: ClassVar[tuple[str, ...]] = ("video",)
    paired: ClassVar[bool] = False
    about: ClassVar[dict] = {"flicker": ("change from frame to frame", "/255", "")}
    fields: ClassVar[tuple[str, ...]] = tuple(about)

    def __call__(self, clips: Clips, rates: Rates) -> Found:
        return {"flicker": np.array([255 * _change(clip) for clip in _each(clips["video"])])}


@dataclass(kw_only=True)
class Perceptual:
    """`lpips` of pictures and those that they should be, the mean over a clip's frames.

    LPIPS v0.1 (1801.03924) with the network `net`, alex or vgg, of frames at their own size.
    """

    net: str = "alex"
    device: str | None = None

    needs: ClassVar[tuple[str, ...]] = ("video",)
    paired: ClassVar[bool] = True
    about: ClassVar[dict] = {"lpips": ("LPIPS, mean of frames", "", "lower")}
    fields: ClassVar[tuple[str, ...]] = tuple(about)

    @property
    def name(self) -> str:
        return self._distance.name

    @cached_property
    def _distance(self):
        from avdiffusion.metrics.lpips import LPIPS

        return LPIPS(self.net, device=self.device)

    def __call__(self, clips: Clips, rates: Rates, targets: Clips) -> Found:
        found = []
        for pair in _pairs(clips, targets):
            whole = all(np.isfinite(x).all() for x in pair)
            found.append(self._of_clip(*pair) if whole else float("nan"))
        return {"lpips": np.array(found, dtype=np.float64)}

    def _of_clip(self, *pair):
        bytes_ = (np.rint(255 * x).astype(np.uint8) for x in pair)
        return float(self._distance(*(torch.from_numpy(x).transpose(0, 1) for x in bytes_)).mean())
