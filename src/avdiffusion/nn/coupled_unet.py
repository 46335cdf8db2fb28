"""The coupled audio-video U-Net of MM-Diffusion (Ruan et al. 2023, https://arxiv.org/abs/2212.09478)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from avdiffusion.nn.attention import CrossAttention, SelfAttention
from avdiffusion.nn.blocks import (
    AudioConv,
    ClipConv,
    ResBlock,
    VideoConv,
    checkpointed,
    full_precision,
    time_embedding,
    whole,
    zeroed,
)
from avdiffusion.nn.norm import GroupNorm
from avdiffusion.nn.recompute import Plan


class Stage(nn.Module):
    """A residual block, attention inside each stream, attention between them, up-sampling."""

    def __init__(
        self,
        res: ResBlock,
        *,
        spatial: SelfAttention | None = None,
        temporal: SelfAttention | None = None,
        audio: SelfAttention | None = None,
        cross: CrossAttention | None = None,
        up: ResBlock | None = None,
    ):
        super().__init__()
        self.res, self.spatial, self.temporal, self.audio = res, spatial, temporal, audio
        self.cross, self.up = cross, up

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        films: list[Tensor],
        shift: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        video, audio = self.res(video, audio, films[0])
        b, t, h, w, c = video.shape
        if self.spatial is not None:
            video = self.spatial(video.view(b * t, h * w, 1, c)).view(video.shape)
        if self.temporal is not None:
            video = self.temporal(video.view(b, t, h * w, c)).view(video.shape)
        if self.audio is not None:
            audio = self.audio(audio.view(b, -1, 1, c)).view(audio.shape)
        if self.cross is not None:
            video, audio = self.cross(video, audio, shift)
        if self.up is not None:
            video, audio = self.up(video, audio, films[1])
        return video, audio


class CoupledUNet(nn.Module):
    """A U-Net of video [B, C, T, H, W] and one of audio [B, C, L] that attend to each other.

    `time` [B] is what the sinusoid embeds. `shifts` holds one integer for every shifting
    cross-attention in order of the forward pass, from 0 to the maximum that `shift_ranges` gives;
    None means no shift. Random ones are the caller's to draw: dropout aside, the network is a
    function of its arguments. `out_factor=2` doubles the output channels, prediction first, then
    variance. `checkpoint`: whether all stages are computed again in the backward pass instead of
    kept in memory, or how many GiB may be kept, beyond which stages are.
    """

    def __init__(
        self,
        *,
        video_channels: int = 3,
        audio_channels: int = 1,
        channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        num_res_blocks: int = 2,
        num_heads: int = 4,
        head_channels: int = 64,
        cross_attention_resolutions: tuple[int, ...] = (2, 4, 8),
        cross_attention_windows: tuple[int, ...] = (1, 4, 8),
        cross_attention_shift: bool = True,
        video_attention_resolutions: tuple[int, ...] = (2, 4, 8),
        audio_attention_resolutions: tuple[int, ...] = (),
        middle_cross_attention: bool = True,
        dropout: float = 0.0,
        scale_shift_norm: bool = True,
        audio_rate: int = 4,
        out_factor: int = 1,
        checkpoint: bool | float = False,
    ):
        super().__init__()
        if len(cross_attention_windows) != len(cross_attention_resolutions):
            raise ValueError(
                f"{len(cross_attention_windows)} cross_attention_windows for "
                f"{len(cross_attention_resolutions)} cross_attention_resolutions: give one for each"
            )
        self.takes = [video_channels, audio_channels]
        self.channels, self.audio_rate = channels, audio_rate
        self.levels = len(channel_mult)
        self.plan, self.shifting = Plan(checkpoint), cross_attention_shift
        windows = dict(zip(cross_attention_resolutions, cross_attention_windows, strict=True))

        def res(inputs, outputs, dilation, resample=None):
            return ResBlock(
                inputs,
                outputs,
                dilation=2 ** (dilation % 10),
                dropout=dropout,
                scale_shift=scale_shift_norm,
                resample=resample,
                audio_rate=audio_rate,
            )

        def attentions(width, scale):
            video, audio = (
                scale in scales
                for scales in (video_attention_resolutions, audio_attention_resolutions)
            )
            return {
                "spatial": SelfAttention(width, num_heads) if video else None,
                "temporal": SelfAttention(width, num_heads) if video else None,
                "audio": SelfAttention(width, num_heads) if audio else None,
            }

        def cross(width, window):
            return CrossAttention(width, head_channels=head_channels, window=window)

        width = channels * channel_mult[0]
        self.time = nn.Sequential(
            nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels)
        )
        self.video_in = VideoConv(video_channels, width)
        self.audio_in = AudioConv(audio_channels, width)

        self.encoder, skips, dilation, scale = nn.ModuleList(), [width], 1, 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                block = res(width, channels * mult, dilation)
                width, dilation = channels * mult, dilation + 1
                link = cross(width, windows[scale]) if scale in windows else None
                self.encoder.append(Stage(block, **attentions(width, scale), cross=link))
                skips.append(width)
            if level < self.levels - 1:
                self.encoder.append(Stage(res(width, width, dilation, "down")))
                dilation, scale = dilation + 1, scale * 2
                skips.append(width)

        everything = {k: SelfAttention(width, num_heads) for k in ("spatial", "temporal", "audio")}
        link = cross(width, None) if middle_cross_attention else None
        self.middle_in = Stage(res(width, width, dilation), **everything, cross=link)
        everything = {k: SelfAttention(width, num_heads) for k in ("spatial", "temporal", "audio")}
        self.middle_out = Stage(res(width, width, dilation), **everything)
        dilation -= 1

        self.decoder = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for repeat in range(num_res_blocks + 1):
                block = res(width + skips.pop(), channels * mult, dilation)
                width, dilation = channels * mult, dilation - 1
                link = cross(width, windows[scale]) if scale in windows else None
                last = level > 0 and repeat == num_res_blocks
                up = res(width, width, dilation, "up") if last else None
                self.decoder.append(Stage(block, **attentions(width, scale), cross=link, up=up))
                scale //= 2 if last else 1

        self.film = nn.Linear(channels, sum(block.film_width for block in self.res_blocks()))
        self.video_norm, self.audio_norm = (GroupNorm(width, silu=True) for _ in "va")
        self.video_out = zeroed(ClipConv(width, out_factor * video_channels))
        self.audio_out = zeroed(AudioConv(width, out_factor * audio_channels))

    def stages(self) -> Iterator[Stage]:
        """All stages in order of the forward pass."""
        yield from (*self.encoder, self.middle_in, self.middle_out, *self.decoder)

    def res_blocks(self) -> Iterator[ResBlock]:
        """All residual blocks in order of the forward pass, which is that of the rows of `film`."""
        for stage in self.stages():
            yield stage.res
            if stage.up is not None:
                yield stage.up

    def shift_ranges(self, frames: int) -> list[int]:
        """The largest shift of every shifting cross-attention, for a clip of `frames` frames."""
        windows = [stage.cross.window for stage in self.stages() if self.shifts(stage)]
        return [frames - min(window, frames) for window in windows]

    def shifts(self, stage: Stage) -> bool:
        return self.shifting and stage.cross is not None and stage.cross.window is not None

    def rounded(self) -> Iterator[str]:
        """Names of the parameters that automatic mixed precision rounds at every call, as they are.

        Not of `time` and `film`, which compute in full precision, nor of weights that are added
        up first, nor of `video_out`, which adds its bias in full precision.
        """
        exact = {*self.time, self.film}
        exact |= {m.space for m in self.modules() if isinstance(m, VideoConv) and m.halve}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module not in exact:
                yield from (f"{name}.{each}" for each in ("weight", "bias"))

    @property
    def deepest(self) -> int:
        """The largest `depth`: all stages but those in the middle."""
        return len(self.encoder)

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        *,
        time: Tensor,
        shifts: Tensor | None = None,
        depth: int | None = None,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """The prediction for video and audio.

        With `depth`, also what reaches the decoder's last `depth` + 1 stages from below. Given back
        as `kept` on a later call, it stands for all that lies deeper, and the encoder's first
        `depth` stages and those last ones alone are computed (DeepCache, Ma et al. 2023).
        """
        self.check(video, audio, shifts)
        with full_precision(video.device.type):
            films = self.film(F.silu(self.time(time_embedding(time, self.channels))))
        films = iter(films.split([block.film_width for block in self.res_blocks()], dim=-1))
        shifts = iter(() if shifts is None else shifts.unbind())

        plan = []
        for stage in self.stages():
            film = [next(films)] if stage.up is None else [next(films), next(films)]
            plan.append((stage, film, next(shifts, None) if self.shifts(stage) else None))
        stages, shallow = len(self.encoder), kept is not None
        down, middle, up = plan[:stages], plan[stages : stages + 2], plan[stages + 2 :]
        if shallow:
            down, middle, up = down[:depth], [], up[stages - depth :]

        def again(video, audio, time):
            return self(video, audio, time=time)

        recomputed = self.plan(self.stages(), again, video, audio, time)

        def run(stage, film, shift, video, audio):
            if stage in recomputed:
                return checkpointed(stage, video, audio, film, shift)
            return stage(video, audio, film, shift)

        v = self.video_in(rearrange(video, "b c t h w -> b t h w c"))
        a = self.audio_in(rearrange(audio, "b c l -> b 1 1 l c"))
        skips = [(v, a)]
        for stage in down:
            v, a = run(*stage, v, a)
            skips.append((v, a))
        for stage in middle:
            v, a = run(*stage, v, a)
        v, a = kept if shallow else (v, a)
        for stage in up:
            if len(skips) - 1 == depth:
                kept = v, a
            v, a = (torch.cat(pair, dim=-1) for pair in zip((v, a), skips.pop(), strict=True))
            v, a = run(*stage, v, a)

        v = self.video_out(whole(self.video_norm, v))
        a = rearrange(self.audio_out(whole(self.audio_norm, a)), "b 1 1 l c -> b c l")
        out = v.to(video.dtype), a.to(audio.dtype).contiguous()
        return out if depth is None or shallow else (*out, *kept)

    def check(self, video: Tensor, audio: Tensor, shifts: Tensor | None) -> None:
        """Refuses sizes that the levels do not divide."""
        frames, height, width, samples = *video.shape[2:], audio.shape[2]
        pixels, rate = 2 ** (self.levels - 1), self.audio_rate ** (self.levels - 1)
        if height % pixels or width % pixels:
            raise ValueError(
                f"{self.levels} levels halve a frame {self.levels - 1} times, {height}x{width} "
                f"pixels do not divide by {pixels}: use {ceil(height, pixels)}x"
                f"{ceil(width, pixels)}"
            )
        if samples % rate:
            raise ValueError(
                f"{self.levels} levels shorten the sound {rate} times, {samples} samples do not "
                f"divide by it: use {samples // rate * rate} or {ceil(samples, rate)}, or another "
                f"audio_rate"
            )
        if samples // rate < frames:
            raise ValueError(
                f"{samples} samples leave {samples // rate} audio tokens for {frames} frames at "
                f"the lowest level: use at least {frames * rate} samples, or fewer frames"
            )
        blocks = len(self.shift_ranges(frames))
        if shifts is not None and len(shifts) != blocks:
            raise ValueError(f"{len(shifts)} shifts for {blocks} shifting blocks: see shift_ranges")


def ceil(value: int, unit: int) -> int:
    return -(-value // unit) * unit
