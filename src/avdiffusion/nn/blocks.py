"""Building blocks of the coupled network. Everything inside is channels-last.

B batch, T frames, H, W height and width, L audio samples, C channels.
Video is [B, T, H, W, C] and audio [B, 1, 1, L, C], one frame of one row: in this layout a spatial,
a temporal, a dilated audio and a pointwise convolution are all two-dimensional convolutions, and
none needs a transpose.
"""

import itertools
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available
from torch.utils.checkpoint import checkpoint

from avdiffusion.nn.norm import GroupNorm

SMALL = 2**20  # values that cost less to keep than to make again


def time_embedding(time: Tensor, width: int) -> Tensor:
    """Sinusoid of a time [B] at frequencies 10000^(-2k / width), cosines first: [B, width]."""
    half = width // 2
    steps = torch.arange(half, device=time.device, dtype=torch.float32)
    angles = time.float()[:, None] * torch.exp(steps * (-math.log(10000) / half))
    return F.pad(torch.cat((angles.cos(), angles.sin()), dim=-1), (0, width % 2))


def full_precision(device: str) -> AbstractContextManager:
    """Context in which automatic mixed precision is off."""
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all its parameters set to zero: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous()


class Conv(nn.Conv2d):
    """Two-dimensional convolution of channels-last [N, H, W, C] with zero "same" padding.

    The result is added to a `residual`, if there is one.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        dilation: int = 1,
        *,
        stride: int = 1,
    ):
        padding = tuple(dilation * (size // 2) for size in kernel)
        super().__init__(inputs, outputs, kernel, stride, padding, dilation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = channels_last(super().forward(channels_first(x)))
        return out if residual is None else out.add_(residual)


class Pointwise(nn.Linear):
    """Linear map of the last axis of [..., C], plus an optional residual."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not x.is_cpu:
            out = super().forward(x)
            return out if residual is None else residual + out
        # oneDNN's 1x1 convolution is up to twice as fast as the BLAS product behind linear, and
        # PyTorch uses it on a single thread only for 16 images or more
        images = math.gcd(x.numel() // x.shape[-1], 16)
        # of another order in memory it would make a slow copy
        flat = channels_first(x.contiguous().view(images, -1, 1, x.shape[-1]))
        out = F.conv2d(flat, self.weight.view(*self.weight.shape, 1, 1), self.bias)
        if residual is not None:
            out += channels_first(residual.reshape(images, -1, 1, residual.shape[-1]))
        return channels_last(out).view(*x.shape[:-1], -1)


class UpConv(Conv):
    """A 3x3 convolution of [N, H, W, C] with every pixel repeated as a block of 2x2.

    It is not made of the larger picture: a pixel of such a block sees 2x2 of the original ones, by
    weights that are added up, which is 4/9 of the work.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, (3, 3))

    def forward(self, x: Tensor) -> Tensor:
        def pair(weight: Tensor) -> Tensor:
            """Weights of three on the two that the first of a block sees, and the second."""
            a, b, c = weight.unbind(-1)
            return torch.stack((torch.stack((a, b + c), -1), torch.stack((a + b, c), -1)))

        n, h, w = x.shape[:3]
        weight, bias = pair(pair(self.weight).mT).mT.flatten(0, 2), self.bias.repeat(4)
        found = channels_last(F.conv2d(channels_first(x), weight, bias, padding=1))
        found = found.unflatten(-1, (2, 2, -1))
        out = found.new_empty(n, h, 2, w, 2, found.shape[-1])
        for i, k in itertools.product(range(2), range(2)):
            out[:, :, i, :, k] = found[:, i : i + h, k : k + w, i, k]
        return out.view(n, 2 * h, 2 * w, -1)


class VideoConv(nn.Module):
    """A 3x3 convolution of every frame, then one over three frames of every pixel.

    `halve` takes means over 2x2 pixels of the result.
    """

    def __init__(self, inputs: int, outputs: int, *, halve: bool = False):
        super().__init__()
        self.space = Conv(inputs, outputs, (3, 3))
        self.time = Conv(outputs, outputs, (3, 1))
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        frames = x.flatten(0, 1)
        # means over space commute with the convolution over time
        frames = self.halved(frames) if self.halve else self.space(frames)
        h, w = frames.shape[1:3]
        return self.time(frames.view(*x.shape[:2], h * w, -1)).unflatten(2, (h, w))

    def halved(self, x: Tensor) -> Tensor:
        # means of a 3x3 convolution are a 4x4 convolution of stride 2, less than half the work
        corners = ((0, 1, 0, 1), (1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 1, 0))
        weight = sum(F.pad(self.space.weight, corner) for corner in corners) / 4
        return channels_last(F.conv2d(channels_first(x), weight, self.space.bias, 2, 1))


class ClipConv(nn.Conv3d):
    """3x3x3 convolution from [B, T, H, W, C] to few channels [B, C, T, H, W]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # few outputs: the taps in time are cheapest as channels of one spatial convolution
        weight = self.weight.permute(2, 0, 1, 3, 4).flatten(0, 1)
        taps = F.conv2d(channels_first(x.flatten(0, 1)), weight, padding=1)
        taps = taps.unflatten(0, x.shape[:2]).transpose(1, 2)
        before, now, after = taps.chunk(3, dim=1)
        before = F.pad(before[:, :, :-1], (0, 0, 0, 0, 1, 0))
        after = F.pad(after[:, :, 1:], (0, 0, 0, 0, 0, 1))
        return before + now + after + self.bias[:, None, None, None]


class AudioConv(Conv):
    """Dilated convolution over three samples of [B, 1, 1, L, C].

    `shorten` takes means over so many samples of the result.
    """

    def __init__(self, inputs: int, outputs: int, dilation: int = 1, *, shorten: int = 1):
        super().__init__(inputs, outputs, (1, 3), dilation)
        self.shorten = shorten

    def forward(self, x: Tensor) -> Tensor:
        x, dilation = x.squeeze(1), self.dilation[1]
        # means commute with taps that are a whole number of means apart
        first = dilation % self.shorten == 0
        if first:
            x, dilation = mean_pool(x, (1, self.shorten)), dilation // self.shorten
        if dilation < x.shape[2]:
            weight, padding = self.weight, (0, dilation)
        else:  # both outer taps see nothing but padding
            weight, padding = self.weight[..., 1:2], 0
        x = F.conv2d(channels_first(x), weight, self.bias, 1, padding, (1, dilation))
        x = channels_last(x)
        return (x if first else mean_pool(x, (1, self.shorten)))[:, None]


def mean_pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Means over blocks of this size of [..., H, W, C]."""
    if size == (1, 1):
        return x
    frames = F.avg_pool2d(channels_first(x.flatten(0, -4)), size)
    return channels_last(frames).unflatten(0, x.shape[:-3])


def repeat(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Every element of [..., H, W, C] as a block of this size."""
    frames = channels_first(x.flatten(0, -4))
    frames = F.interpolate(frames, (x.shape[-3] * size[0], x.shape[-2] * size[1]))
    return channels_last(frames).unflatten(0, x.shape[:-3])


class Branch(nn.Module):
    """A residual block's half for one modality: norm, convolution, modulated norm, projection.

    `resample` is None, "down" or "up", by blocks of `size`. The published block resamples right
    after the convolution. Here `conv` takes the means itself, and repeating, which changes no
    statistics and commutes with all that follows but dropout, comes last.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        conv: nn.Module,
        dropout: float,
        resample: str | None,
        size: tuple[int, int],
    ):
        super().__init__()
        self.resample, self.size = resample, size
        self.norm = GroupNorm(inputs, silu=True)
        self.conv = conv
        self.film_norm = GroupNorm(outputs, silu=True)
        self.dropout = nn.Dropout(dropout)
        self.out = zeroed(Pointwise(outputs, outputs))
        self.skip = nn.Identity() if inputs == outputs else Pointwise(inputs, outputs)

    def forward(self, x: Tensor, film: Tensor, *, scale_shift: bool) -> Tensor:
        h = through(partial(whole, self.norm), self.conv, x)
        if self.resample == "down":
            x = mean_pool(x, self.size)
        early = self.training and self.dropout.p > 0
        if self.resample == "up" and early:
            x, h = repeat(x, self.size), repeat(h, self.size)
        if not scale_shift:
            h, film = h + film.to(h.dtype).view(len(film), 1, 1, 1, -1), None
        x = through(
            partial(whole, self.film_norm),
            lambda y: self.out(self.dropout(y), residual=self.skip(x)),
            *(h, film),
        )
        return repeat(x, self.size) if self.resample == "up" and not early else x


def whole(norm: GroupNorm, x: Tensor, film: Tensor | None = None) -> Tensor:
    """The norm of [B, ..., C] with statistics over all axes but the batch."""
    return norm(x.reshape(x.shape[0], -1, 1, x.shape[-1]), film).view(x.shape)


def through(
    make: Callable[..., Tensor], use: Callable[[Tensor], Tensor], *given: Tensor | None
) -> Tensor:
    """use(make(*given)); in the backward pass the tensor between is made again, not kept.

    For what is large and soon made from what is kept anyway, such as the results of norms.
    """
    x = make(*given)
    # Compilers and checkpoints see to it themselves, and little is gained by what is small.
    plain = torch.compiler.is_compiling() or within.checkpoint or x.numel() < SMALL
    if plain or not torch.is_grad_enabled():
        return use(x)
    storage, size = x.untyped_storage()._cdata, x.numel()

    def pack(kept: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        same = kept.untyped_storage()._cdata == storage and kept.numel() == size
        return (kept.shape, kept.stride()) if same else kept

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return make(*(v if v is None else v.detach() for v in given)).as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return use(x)


class _Within(threading.local):
    """Of a thread, as the device's own one goes through the backward pass."""

    checkpoint = False


within = _Within()


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), all of it computed again in the backward pass; only `args` are kept.

    `through` steps aside in it: of nested hooks torch asks the inner ones alone, so that what they
    hold would stay in memory.
    """

    def inside(*args: Any) -> Any:
        before, within.checkpoint = within.checkpoint, True
        try:
            return function(*args)
        finally:
            within.checkpoint = before

    traced = torch.compiler.is_compiling()
    return checkpoint(function if traced else inside, *args, use_reentrant=False)


class ResBlock(nn.Module):
    """Residual block of both modalities under one time modulation, optionally resampling both.

    `film` is [B, 2 C], scale then shift of the second norm, or [B, C], added before it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dilation: int,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resample: str | None = None,
        audio_rate: int = 4,
    ):
        super().__init__()
        down = resample == "down"
        self.scale_shift = scale_shift
        self.film_width = outputs * (2 if scale_shift else 1)
        self.video = Branch(
            inputs,
            outputs,
            conv=VideoConv(inputs, outputs, halve=down),
            dropout=dropout,
            resample=resample,
            size=(2, 2),
        )
        self.audio = Branch(
            inputs,
            outputs,
            conv=AudioConv(inputs, outputs, dilation, shorten=audio_rate if down else 1),
            dropout=dropout,
            resample=resample,
            size=(1, audio_rate),
        )

    def forward(self, video: Tensor, audio: Tensor, film: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self.video(video, film, scale_shift=self.scale_shift),
            self.audio(audio, film, scale_shift=self.scale_shift),
        )
