"""The U-Net of sound and of its latents (Moûsai, Schneider et al. 2023, 2301.11757)."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avdiffusion.nn.blocks import checkpointed, full_precision
from avdiffusion.nn.blocks1d import Attention, Item, Level


class TimeFeatures(nn.Module):
    """Features [B, `width`] of a time [B]: its sinusoids at learned frequencies, then layers."""

    def __init__(self, width: int, frequencies: int = 128):
        super().__init__()
        self.frequencies = nn.Parameter(torch.empty(frequencies))
        nn.init.normal_(self.frequencies)
        self.start = nn.Linear(1 + 2 * frequencies, width)
        self.layer = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        time = time.to(self.frequencies.dtype)[:, None]
        angles = 2 * math.pi * time * self.frequencies
        found = F.gelu(self.start(torch.cat((time, angles.sin(), angles.cos()), dim=-1)))
        for _ in range(2):  # as published, where both layers are one
            found = F.gelu(self.layer(found))
        return found


class UNet1d(nn.Module):
    """A U-Net of sound [B, C, L], or of latents of it, of any length.

    Each level has its `channels`, is so many `factors` shorter than the one above, and has `items`
    before and as many after the levels below, with attention and with cross-attention where
    `attentions` and `cross_attentions` have a 1. Levels are added to what they are made from, by a
    scale that `time` modulates.

    `time` [B], or [1] for all, is t in [0, 1]. `context` [B, N, `context_width`], such as a text,
    is attended to, where `context_mask` [B, N] is True if it is given. `concat`
    [B, `inject_channels`, l], such as a latent, is told to the items of level `inject_depth`: a
    step for every `inject_factor` samples of x.

    `filters`, so many for each channel, of `window_length` samples every `stride`, are a learned
    transform before the levels, with another one back. A length that `multiple` does not divide is
    filled up with zeros at the end, and the result cut. `checkpoint`: items are computed again in
    the backward pass instead of kept in memory.
    """

    def __init__(
        self,
        *,
        audio_channels: int = 2,
        channels: Sequence[int] = (256, 512, 512, 512, 1024, 1024, 1024),
        factors: Sequence[int] = (1, 2, 2, 2, 2, 2, 2),
        items: Sequence[int] = (1, 2, 2, 2, 2, 2, 2),
        attentions: Sequence[int] | None = None,
        cross_attentions: Sequence[int] | None = None,
        inject_depth: int | None = None,
        inject_channels: int = 32,
        attention_heads: int = 12,
        attention_features: int = 64,
        context_width: int = 768,
        modulation: int = 1024,
        groups: int = 8,
        filters: int | None = None,
        window_length: int = 64,
        stride: int = 64,
        checkpoint: bool = False,
    ):
        super().__init__()
        none = [0] * len(channels)
        attends, crosses = attentions or none, cross_attentions or none
        lengths = [len(each) for each in (channels, factors, items, attends, crosses)]
        if len(set(lengths)) > 1:
            raise ValueError(
                "channels, factors, items, attentions and cross_attentions have an entry for each "
                f"level, but here {', '.join(map(str, lengths))} of them"
            )
        if inject_depth is not None and not 0 <= inject_depth < len(channels):
            raise ValueError(f"inject_depth={inject_depth} is none of {len(channels)} levels")
        self.takes, self.checkpoint = [audio_channels], checkpoint
        self.context_width = context_width if any(crosses) else 0
        self.inject_channels = 0 if inject_depth is None else inject_channels
        hop = stride if filters else 1
        self.multiple = hop * math.prod(factors)
        self.inject_factor = hop * math.prod(factors[: 1 + (inject_depth or 0)])

        attend = partial(Attention, heads=attention_heads, features=attention_features)

        def made(level: int) -> list[Item]:
            width = channels[level]
            return [
                Item(
                    width,
                    groups=groups,
                    inject=inject_channels if level == inject_depth else 0,
                    attention=attend(width) if attends[level] else None,
                    cross=attend(width, context_width) if crosses[level] else None,
                )
                for _ in range(items[level])
            ]

        width = audio_channels * (filters or 1)
        self.encode = self.decode = None
        if filters:
            shape = {"kernel_size": window_length, "stride": stride, "bias": False}
            shape["padding"] = (window_length - stride) // 2
            self.encode = nn.Conv1d(audio_channels, width, padding_mode="reflect", **shape)
            self.decode = nn.ConvTranspose1d(width, audio_channels, **shape)
        inputs = [width, *channels[:-1]]
        self.levels = nn.ModuleList(
            Level(inputs[k], channels[k], factor=factors[k], before=made(k), after=made(k))
            for k in range(len(channels))
        )
        self.time = TimeFeatures(modulation)
        self.film = nn.Linear(modulation, sum(self.film_widths()))

    def film_widths(self) -> Iterator[int]:
        """How many rows of `film` belong to each item and each level, in order of the forward pass.

        Those of a level scale what it adds, after its items.
        """
        for level in self.levels:
            yield from (item.film_width for item in level.before)
        for level in reversed(self.levels):
            yield from (item.film_width for item in level.after)
            yield level.up.out_channels

    def rounded(self) -> Iterator[str]:
        """Names of the parameters that automatic mixed precision rounds at every call, as they are.

        Not of `time` and `film`, which compute in full precision.
        """
        exact = {*self.time.modules(), self.film}
        for name, module in self.named_modules():
            rounds = isinstance(module, nn.Linear | nn.Conv1d | nn.ConvTranspose1d)
            if rounds and module not in exact:
                yield from (f"{name}.{key}" for key, _ in module.named_parameters())

    def forward(
        self,
        x: Tensor,
        *,
        time: Tensor,
        concat: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """The prediction, of the shape of x."""
        concat = self.fitted(concat, x)
        self.check(context, context_mask, x)
        with full_precision(x.device.type):
            films = self.film(F.silu(self.time(time)))
        films = iter(films.split([*self.film_widths()], dim=-1))
        told = concat, context, None if context_mask is None else context_mask[:, None, None]

        def run(item: Item, h: Tensor) -> Tensor:
            given = h, next(films), *told
            again = self.checkpoint and torch.is_grad_enabled()
            return checkpointed(item, *given) if again else item(*given)

        h = F.pad(x, (0, -x.shape[-1] % self.multiple))
        h = h if self.encode is None else self.encode(h)
        above = []
        for level in self.levels:
            above.append(h)
            h = level.down(h)
            for item in level.before:
                h = run(item, h)
        for level in reversed(self.levels):
            for item in level.after:
                h = run(item, h)
            h = level.raised(h)
            h = torch.addcmul(above.pop(), h, next(films)[..., None].to(h.dtype))
        h = h if self.decode is None else self.decode(h)
        return h[..., : x.shape[-1]].to(x.dtype)

    def fitted(self, concat: Tensor | None, x: Tensor) -> Tensor | None:
        """What is told of x, [B, l, C], zeros after its end; raises if it is not of x."""
        length = x.shape[-1]
        least = -(-length // self.inject_factor)
        most = (length + -length % self.multiple) // self.inject_factor
        told = [(len(x), self.inject_channels, steps) for steps in range(least, most + 1)]
        expected = told if self.inject_channels else [None]
        found = None if concat is None else tuple(concat.shape)
        if found not in expected:
            step = f", a step for every {self.inject_factor} samples" if expected[0] else ""
            raise ValueError(
                f"concat is {found}, but of {tuple(x.shape)} this network is told "
                f"{expected[0] or 'nothing'}{step}"
            )
        return None if concat is None else F.pad(concat, (0, most - concat.shape[-1])).mT

    def check(self, context: Tensor | None, mask: Tensor | None, x: Tensor) -> None:
        """Raises if the context is not one of x, or its mask not one of it."""
        found = None if context is None else tuple(context.shape)
        tokens = found[1] if found and len(found) == 3 else "N"
        expected = (len(x), tokens, self.context_width) if self.context_width else None
        if found != expected:
            raise ValueError(
                f"context is {found}, but of {tuple(x.shape)} this network is told "
                f"{expected or 'nothing'}"
            )
        if mask is not None and (found is None or tuple(mask.shape) != found[:2]):
            raise ValueError(f"context_mask {tuple(mask.shape)} is not one of context {found}")
