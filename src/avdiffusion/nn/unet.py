"""The U-Net of guided-diffusion (Dhariwal and Nichol 2021, https://arxiv.org/abs/2105.05233).

B clips side by side, T frames, H, W height and width, C channels: inside, everything is
[B, T, H, W, C]. Frames that the network sees one by one are clips of one frame.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from avdiffusion.nn.attention import SelfAttention
from avdiffusion.nn.batch_norm import ConditionalBatchNorm
from avdiffusion.nn.blocks import (
    Pointwise,
    UpConv,
    channels_last,
    checkpointed,
    full_precision,
    mean_pool,
    repeat,
    through,
    time_embedding,
    whole,
    zeroed,
)
from avdiffusion.nn.norm import GroupNorm
from avdiffusion.nn.recompute import Plan, most_held
from avdiffusion.nn.space_time import (
    CONVOLUTIONS,
    SpaceConv,
    SpaceUp,
    TimeAttention,
    attentions,
    silenced,
)

NORMS = ("group", "batch")


class ResBlock(nn.Module):
    """Residual block of clips under a time modulation, optionally resampling their frames by 2.

    `resample` is None, "down" or "up": between the first SiLU and its convolution, unlike
    `blocks.Branch`. `film` is [B or 1, 2 C], scale then shift of the second norm, or [B or 1, C],
    added before it. Norms take their statistics over a whole clip, but batch norms, which alone are
    told `share` [B or 1] (see `batch_norm`).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dropout: float,
        scale_shift: bool,
        conv: Callable[[int, int], nn.Module] = SpaceConv,
        norm: Callable[..., nn.Module] = GroupNorm,
        resample: str | None = None,
    ):
        super().__init__()
        self.resample, self.scale_shift = resample, scale_shift
        self.film_width = outputs * (2 if scale_shift else 1)
        self.norm = norm(inputs, silu=True)
        self.conv = (SpaceUp if resample == "up" else conv)(inputs, outputs)
        self.film_norm = norm(outputs, silu=True)
        self.dropout = nn.Dropout(dropout)
        self.out = silenced(conv(outputs, outputs))
        self.skip = nn.Identity() if inputs == outputs else Pointwise(inputs, outputs)

    def forward(self, x: Tensor, film: Tensor, share: Tensor | None = None) -> Tensor:
        norm, film_norm = (normed(each, share) for each in (self.norm, self.film_norm))
        if self.resample == "down":
            h = through(lambda y: mean_pool(norm(y), (2, 2)), self.conv, x)
            x = mean_pool(x, (2, 2))
        else:
            h = through(norm, self.conv, x)
            x = repeat(x, (2, 2)) if self.resample == "up" else x
        if not self.scale_shift:
            h, film = h + film.to(h.dtype).view(len(film), 1, 1, 1, -1), None
        return through(
            film_norm, lambda y: self.out(self.dropout(y), residual=self.skip(x)), h, film
        )


def normed(norm: nn.Module, share: Tensor | None) -> Callable[..., Tensor]:
    """The norm as a function of whole clips, and of a film."""
    return partial(whole, norm if share is None else partial(norm, share=share))


class Resample(nn.Module):
    """A convolution that halves frames or doubles them, the same at every time."""

    film_width = 0

    def __init__(self, channels: int, resample: str):
        super().__init__()
        self.up = resample == "up"
        self.conv = (SpaceUp if self.up else partial(SpaceConv, stride=2))(channels, channels)

    def forward(self, x: Tensor, film: Tensor, share: Tensor | None = None) -> Tensor:
        return self.conv(x)


class Stage(nn.Module):
    """A residual block or down-sampling, attention in frames, then over time, up-sampling."""

    def __init__(
        self,
        res: ResBlock | Resample,
        *,
        attention: SelfAttention | None = None,
        time: TimeAttention | None = None,
        up: ResBlock | Resample | None = None,
    ):
        super().__init__()
        self.res, self.attention, self.time, self.up = res, attention, time, up

    def forward(self, x: Tensor, films: list[Tensor], share: Tensor | None = None) -> Tensor:
        x = self.res(x, films[0], share)
        if self.attention is not None:
            b, t, h, w, c = x.shape
            x = self.attention(x.view(b * t, h * w, 1, c)).view(x.shape)
        if self.time is not None:
            x = self.time(x)
        return x if self.up is None else self.up(x, films[1], share)


class UNet(nn.Module):
    """A U-Net of video [B, C, T, H, W] of any length, or of frames [B, C, H, W].

    `dims=2`: each frame by itself; `dims=3`: all of a clip together, at full rate on every level.
    `conv` is what blocks are made of: 2d sees one frame, 2plus1d then three of every place, at
    first as if there were one, 3d sees both at once. `attention`, at `attention_resolutions`
    (factors of down-sampling) and in the middle, is spatial, temporal, factorised or full3d (see
    `space_time`).

    `time` [B], or [1] for all, is what the sinusoid embeds. `concat`, frames of `concat_channels`,
    is what the network is told about each. A size that the levels do not divide is filled up by
    repeating the edges, and the result cut. `resblock_updown`: frames are resampled by residual
    blocks, not by convolutions alone. `out_factor=2` doubles the output channels, prediction
    first, then variance. `checkpoint`: whether all stages are computed again in the backward pass
    instead of kept in memory, or how many GiB may be kept, beyond which stages are.

    `norm`, of all but attention, is group, of every clip by itself, or batch (see `batch_norm`),
    with averages in `norm_buckets` sets, one for each part of the `time_range`.
    """

    def __init__(
        self,
        *,
        dims: int = 2,
        video_channels: int = 3,
        concat_channels: int = 3,
        channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4, 4),
        num_res_blocks: int = 2,
        num_heads: int = 4,
        conv: str = "2d",
        attention: str = "spatial",
        attention_resolutions: tuple[int, ...] = (8, 16, 32),
        max_tokens: int = 8192,
        dropout: float = 0.0,
        scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        out_factor: int = 2,
        norm: str = "group",
        norm_buckets: int = 8,
        time_range: tuple[float, float] = (0, 1000),
        checkpoint: bool | float = False,
    ):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r} is not one of {', '.join(NORMS)}")
        if dims not in (2, 3) or conv not in CONVOLUTIONS:
            raise ValueError(
                f"dims={dims}, conv={conv!r}: dims is 2 or 3, conv one of {', '.join(CONVOLUTIONS)}"
            )
        self.framewise = dims == 2
        self.channels, self.levels = channels, len(channel_mult)
        self.takes, self.concat_channels = [video_channels], concat_channels
        self.plan = Plan(checkpoint)
        self.time_range = time_range if norm == "batch" else None  # others are not told it
        batch_norm = partial(ConditionalBatchNorm, buckets=norm_buckets)
        norm_of = batch_norm if norm == "batch" else GroupNorm
        res = partial(
            ResBlock,
            dropout=dropout,
            scale_shift=scale_shift_norm,
            conv=CONVOLUTIONS[conv],
            norm=norm_of,
        )

        def resampled(width, how):
            return res(width, width, resample=how) if resblock_updown else Resample(width, how)

        def attending(width, scale=None):
            """At this scale, or in the middle."""
            if scale is not None and scale not in attention_resolutions:
                return {}
            return attentions(attention, width, num_heads, max_tokens)

        width = channels * channel_mult[0]
        self.time = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels)
        )
        self.start = SpaceConv(video_channels + concat_channels, width)

        self.encoder, skips, scale = nn.ModuleList(), [width], 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                block, width = res(width, channels * mult), channels * mult
                self.encoder.append(Stage(block, **attending(width, scale)))
                skips.append(width)
            if level < self.levels - 1:
                self.encoder.append(Stage(resampled(width, "down")))
                scale *= 2
                skips.append(width)

        self.middle_in = Stage(res(width, width), **attending(width))
        self.middle_out = Stage(res(width, width))

        self.decoder = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for number in range(num_res_blocks + 1):
                block, width = res(width + skips.pop(), channels * mult), channels * mult
                last = level > 0 and number == num_res_blocks
                up = resampled(width, "up") if last else None
                self.decoder.append(Stage(block, **attending(width, scale), up=up))
                scale //= 2 if last else 1

        widths = (block.film_width for block in self.blocks())
        self.film = nn.Linear(4 * channels, sum(widths))
        self.norm = norm_of(width, silu=True)
        self.out = zeroed(SpaceConv(width, out_factor * video_channels))

    def stages(self) -> Iterator[Stage]:
        """All stages in order of the forward pass."""
        yield from (*self.encoder, self.middle_in, self.middle_out, *self.decoder)

    def blocks(self) -> Iterator[ResBlock | Resample]:
        """All that has rows of `film`, in the order of these, which is that of the forward pass."""
        for stage in self.stages():
            yield stage.res
            if stage.up is not None:
                yield stage.up

    def rounded(self) -> Iterator[str]:
        """Names of the parameters that automatic mixed precision rounds at every call, as they are.

        Not of `time` and `film`, which compute in full precision, nor of weights that are added
        up first.
        """
        exact = {*self.time, self.film}
        exact |= {module for module in self.modules() if isinstance(module, UpConv)}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and module not in exact:
                yield from (f"{name}.{each}" for each in ("weight", "bias"))

    def forward(self, x: Tensor, *, time: Tensor, concat: Tensor | None = None) -> Tensor:
        """The prediction, of the shape of x but for the channels."""
        clips = self.joined(x, concat)
        with full_precision(x.device.type):
            film = self.film(F.silu(self.time(time_embedding(time, self.channels))))
        length = 1 if self.framewise else clips.shape[2]  # of what it sees at once
        frames = rearrange(clips, "b c t h w -> (b t) c h w")
        share = self.share(time) if self.time_range else None
        if len(film) > 1:  # one row is for all
            each = len(frames) // length // len(film)
            film = film.repeat_interleave(each, 0)
            share = share if share is None else share.repeat_interleave(each, 0)

        height, width = frames.shape[2:]
        unit = 2 ** (self.levels - 1)
        frames = F.pad(frames, (0, -width % unit, 0, -height % unit), mode="replicate")
        clips = channels_last(frames).unflatten(0, (-1, length))
        run = partial(self.through_stages, share=share)
        h = run(clips, film, self.plan(self.stages(), run, clips, film))
        out = through(normed(self.norm, share), self.out, h)[..., :height, :width, :]
        out = rearrange(out, "b t h w c -> (b t) c h w")
        out = out if x.dim() == 4 else rearrange(out, "(b t) c h w -> b c t h w", b=len(x))
        return out.to(x.dtype).contiguous()

    @torch.no_grad()
    def frame_bytes(self, height: int, width: int) -> int:
        """Memory that a frame of this size takes in a forward pass for no gradient, in float32."""
        device = self.out.weight.device

        def run() -> None:
            x, concat = (
                torch.empty(1, channels, height, width, device=device)
                for channels in (*self.takes, self.concat_channels)
            )
            concat = concat if self.concat_channels else None
            self(x, time=torch.empty(1, device=device), concat=concat)

        return most_held(run)

    def share(self, time: Tensor) -> Tensor:
        """Where in `time_range` times [B] are, from 0 to 1."""
        first, last = self.time_range
        return (time.float() - first) / (last - first)

    def through_stages(
        self,
        clips: Tensor,
        film: Tensor,
        recomputed: Collection[Stage] = (),
        *,
        share: Tensor | None = None,
    ) -> Tensor:
        """What the last stage makes of clips [B, T, H, W, C] with rows `film` [B or 1, F]."""
        films = iter(film.split([block.film_width for block in self.blocks()], dim=-1))

        def run(stage, x):
            given = [next(films)] if stage.up is None else [next(films), next(films)]
            again = partial(checkpointed, stage) if stage in recomputed else stage
            return again(x, given, share)

        x = self.start(clips)
        skips = [x]
        for stage in self.encoder:
            x = run(stage, x)
            skips.append(x)
        for stage in (self.middle_in, self.middle_out):
            x = run(stage, x)
        for stage in self.decoder:
            x = run(stage, torch.cat((x, skips.pop()), dim=-1))
        return x

    def joined(self, x: Tensor, concat: Tensor | None) -> Tensor:
        """Clips with what the network is told about them, [B, C, T, H, W]; raises where it is not.

        Frames [B, C, H, W] are clips of one.
        """
        expected = (len(x), self.concat_channels, *x.shape[2:])
        found = None if concat is None else tuple(concat.shape)
        if found != (expected if self.concat_channels else None):
            raise ValueError(
                f"concat is {found}, but of frames {tuple(x.shape)} this network is told "
                f"{expected if self.concat_channels else 'nothing'}"
            )
        clips = x if concat is None else torch.cat((x, concat), dim=1)
        return clips.unsqueeze(2) if x.dim() == 4 else clips
