"""The variational autoencoder (Kingma and Welling 2014, https://arxiv.org/abs/1312.6114) of video.

B clips side by side, T frames, H, W height and width, C channels, z channels of the latent, f its
factor of compression: outside, clips are [B, C, T, H, W], inside [B, T, H, W, C].
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from avdiffusion.nn.blocks import checkpointed, through, whole
from avdiffusion.nn.norm import GroupNorm
from avdiffusion.nn.space_time import CONVOLUTIONS, SpaceConv, SpaceUp, silenced


class Gaussian(NamedTuple):
    """Independent normal distributions [B, z, T, h, w]: what the latents of clips may be."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """The draw that standard normal noise of this shape becomes."""
        return self.mean + (self.log_variance / 2).exp() * noise

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the standard normal distribution in nats, a sum over each clip: [B]."""
        mean, log_variance = self.mean.float(), self.log_variance.float()
        terms = mean.square() + log_variance.exp() - 1 - log_variance
        return terms.flatten(1).sum(1) / 2


def framewise(norm: GroupNorm, x: Tensor) -> Tensor:
    """The norm of [B, T, H, W, C] with statistics over each frame, whatever the clip's length."""
    return whole(norm, x.flatten(0, 1)).view(x.shape)


class Block(nn.Module):
    """Residual block of clips, at first the identity."""

    def __init__(self, channels: int, *, conv: str):
        super().__init__()
        self.norm = GroupNorm(channels, silu=True)
        self.conv = CONVOLUTIONS[conv](channels, channels)
        self.out_norm = GroupNorm(channels, silu=True)
        self.out = silenced(CONVOLUTIONS[conv](channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = through(partial(framewise, self.norm), self.conv, x)
        return through(partial(framewise, self.out_norm), partial(self.out, residual=x), h)


class Last(nn.Module):
    """What a network ends in: norm, SiLU and a convolution of frames."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm = GroupNorm(inputs, silu=True)
        self.conv = SpaceConv(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return through(partial(framewise, self.norm), self.conv, x)


class Layers(nn.ModuleList):
    """Modules one after another; with `again`, blocks are computed again in the backward pass."""

    def __init__(self, layers: Sequence[nn.Module], *, again: bool):
        super().__init__(layers)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        again = self.again and torch.is_grad_enabled()
        for layer in self:
            x = checkpointed(layer, x) if again and isinstance(layer, Block) else layer(x)
        return x


class VideoVAE(nn.Module):
    """An autoencoder of clips [B, C, T, H, W] in [-1, 1], of any length and size.

    Latents have `latent_channels` and all frames, each smaller by `factor`: by 2 from every level
    to the next, and by `patch`, whose pixels become channels before the first convolution and
    pixels again after the last, so that no level has the full size. A level has `num_res_blocks`
    blocks of `channels` times its `channel_mult`; two more lie on either side of the latents.
    `conv` is what blocks are made of: 2d sees one frame, 2plus1d then three of every place, at
    first as if there were one, 3d sees both at once. `checkpoint`: whether all blocks are computed
    again in the backward pass instead of kept in memory.
    """

    def __init__(
        self,
        *,
        video_channels: int = 3,
        latent_channels: int = 4,
        channels: int = 64,
        channel_mult: tuple[int, ...] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        conv: str = "2plus1d",
        patch: int = 1,
        checkpoint: bool = False,
    ):
        super().__init__()
        if conv not in CONVOLUTIONS:
            raise ValueError(f"conv={conv!r} is not one of {', '.join(CONVOLUTIONS)}")
        self.latent_channels, self.patch = latent_channels, patch
        self.factor = patch * 2 ** (len(channel_mult) - 1)
        widths, pixels = [channels * mult for mult in channel_mult], video_channels * patch**2

        def blocks(width, count=num_res_blocks):
            return [Block(width, conv=conv) for _ in range(count)]

        encoder = [SpaceConv(pixels, widths[0]), *blocks(widths[0])]
        for width, after in itertools.pairwise(widths):
            encoder += [SpaceConv(width, after, stride=2), *blocks(after)]
        encoder += [*blocks(widths[-1], 2), Last(widths[-1], 2 * latent_channels)]
        self.encoder = Layers(encoder, again=checkpoint)
        decoder = [SpaceConv(latent_channels, widths[-1]), *blocks(widths[-1], 2)]
        for width, after in itertools.pairwise(reversed(widths)):
            decoder += [*blocks(width), SpaceUp(width, after)]
        decoder += [*blocks(widths[0]), Last(widths[0], pixels)]
        self.decoder = Layers(decoder, again=checkpoint)

    def encode(self, x: Tensor, encoder: Callable[[Tensor], Tensor] | None = None) -> Gaussian:
        """What the latents [B, z, T, ceil(H / f), ceil(W / f)] of clips [B, C, T, H, W] may be.

        A size that the factor does not divide is filled up by repeating the edges. `encoder`:
        another way to call that.
        """
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        height, width = frames.shape[2:]
        frames = F.pad(frames, (0, -width % self.factor, 0, -height % self.factor), "replicate")
        frames = F.pixel_unshuffle(frames, self.patch)
        clips = rearrange(frames, "(b t) c h w -> b t h w c", b=len(x)).contiguous()
        made = (encoder or self.encoder)(clips).to(x.dtype).movedim(-1, 1)
        mean, log_variance = made.chunk(2, dim=1)
        return Gaussian(mean.contiguous(), log_variance.clamp(-30, 20))

    def decode(self, z: Tensor, decoder: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Clips [B, C, T, f h, f w] of latents [B, z, T, h, w]."""
        clips = (decoder or self.decoder)(z.movedim(1, -1).contiguous())
        frames = rearrange(clips, "b t h w c -> (b t) c h w")
        frames = F.pixel_shuffle(frames, self.patch).to(z.dtype)
        return rearrange(frames, "(b t) c h w -> b c t h w", b=len(z)).contiguous()

    def shape(self, clip: Sequence[int]) -> list[int]:
        """The shape [z, T, ceil(H / f), ceil(W / f)] of the latent of a clip [C, T, H, W]."""
        _, frames, *size = clip
        return [self.latent_channels, frames, *(-(-length // self.factor) for length in size)]
