"""Building blocks of the networks of sound: B batch, C channels, L steps in time, D features.

Convolutions work on [B, C, L], whatever looks at one step, or from one to others, on [B, L, C].
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from avdiffusion.nn.blocks import full_precision


class Norm(nn.GroupNorm):
    """Group normalisation of [B, C, L], then SiLU, in the precision of its input.

    Statistics are in float32 whatever the input is.
    """

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x.device.type):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.silu(F.group_norm(x, self.num_groups, weight, bias, self.eps))


class Resnet(nn.Module):
    """Residual block of [B, C, L]: twice a norm, SiLU and a convolution over three steps."""

    def __init__(self, inputs: int, outputs: int, *, groups: int):
        super().__init__()
        self.norm1, self.norm2 = Norm(groups, inputs), Norm(groups, outputs)
        self.conv1 = nn.Conv1d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Attention(nn.Module):
    """Attention of [B, L, C] to itself or, with `context_width`, to [B, N, D]; added to its input.

    Both sides have a LayerNorm of their own. `mask` [B, 1, 1, N] is True where there is something
    to attend to.
    """

    def __init__(self, channels: int, context_width: int = 0, *, heads: int, features: int):
        super().__init__()
        width = context_width or channels
        self.heads, inner = heads, heads * features
        self.norm, self.norm_context = nn.LayerNorm(channels), nn.LayerNorm(width)
        self.query = nn.Linear(channels, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, channels, bias=False)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        seen = self.norm_context(x if context is None else context)
        parts = (self.query(self.norm(x)), *self.key_value(seen).chunk(2, dim=-1))
        parts = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in parts)
        found = F.scaled_dot_product_attention(*parts, attn_mask=mask)
        return x + self.out(rearrange(found, "b h n d -> b n (h d)"))


class Item(nn.Module):
    """What the levels of `UNet1d` are made of: [B, C, L] to the same.

    A residual block; a norm of every step, which `film` [B or 1, 2 C], scale then shift,
    modulates; then what the level has of injection of `concat` [B, L, `inject`], attention, and
    cross-attention to `context`.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int,
        inject: int = 0,
        attention: Attention | None = None,
        cross: Attention | None = None,
    ):
        super().__init__()
        self.film_width = 2 * channels
        self.res = Resnet(channels, channels, groups=groups)
        self.inject = nn.Linear(channels + inject, channels) if inject else None
        self.attention, self.cross = attention, cross

    def forward(
        self,
        x: Tensor,
        film: Tensor,
        concat: Tensor | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        x = modulated(self.res(x).mT, film)
        if self.inject is not None:
            x = x + self.inject(torch.cat((x, concat), dim=-1))
        if self.attention is not None:
            x = self.attention(x)
        if self.cross is not None:
            x = self.cross(x, context, mask)
        return x.mT.contiguous()


def modulated(x: Tensor, film: Tensor) -> Tensor:
    """Every step of [B, L, C] normalised over its channels, then scaled and shifted by `film`."""
    with full_precision(x.device.type):
        scale, shift = film.to(x.dtype)[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Level(nn.Module):
    """A level of `UNet1d`: what shortens, items before and after the levels below, what lengthens.

    It is `factor` times as short as the one above, of `inputs` channels.
    """

    def __init__(
        self, inputs: int, channels: int, *, factor: int, before: list[Item], after: list[Item]
    ):
        super().__init__()
        self.factor = factor
        self.down = nn.Conv1d(inputs, channels, factor, stride=factor)
        self.before, self.after = nn.ModuleList(before), nn.ModuleList(after)
        self.up = nn.Conv1d(channels, inputs, 3, padding=1)

    def raised(self, x: Tensor) -> Tensor:
        """[B, C, L] as the level above takes it: every step repeated, then a convolution."""
        return self.up(x.repeat_interleave(self.factor, dim=-1) if self.factor > 1 else x)
