"""The encoder of the diffusion autoencoder of sound (Moûsai, Schneider et al. 2023, 2301.11757)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avdiffusion.nn.blocks import full_precision
from avdiffusion.nn.blocks1d import Resnet


class MagnitudeEncoder(nn.Module):
    """Sound [B, C, L] to a latent in (-1, 1), [B, `out_channels`, L / `factor`], rounded up.

    It sees the magnitudes of a short-time Fourier transform alone, whose `stft_num_fft` // 2 + 1
    frequencies are channels. Each stage is so many `factors` shorter than the one before it and
    has `num_blocks` residual blocks; `multipliers` of `channels` are the widths before and after
    each. A length that `factor` does not divide is filled up with zeros at the end.
    """

    def __init__(
        self,
        *,
        in_channels: int = 2,
        channels: int = 512,
        multipliers: Sequence[int] = (1, 1, 1),
        factors: Sequence[int] = (2, 2),
        num_blocks: Sequence[int] = (4, 8),
        stft_num_fft: int = 1023,
        stft_hop_length: int = 256,
        out_channels: int = 32,
        groups: int = 8,
    ):
        super().__init__()
        stages = len(factors)
        if (len(num_blocks), len(multipliers)) != (stages, stages + 1):
            raise ValueError(
                f"{stages} factors are of as many num_blocks and {stages + 1} multipliers, not "
                f"{len(num_blocks)} and {len(multipliers)}"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.hop, self.factor = stft_hop_length, stft_hop_length * math.prod(factors)
        self.register_buffer("window", torch.hann_window(stft_num_fft), persistent=False)
        widths = [channels * multiplier for multiplier in multipliers]
        frequencies = in_channels * (stft_num_fft // 2 + 1)
        self.start = Resnet(frequencies, widths[0], groups=1)
        self.stages = nn.ModuleList()
        for factor, blocks, inputs, width in zip(
            factors, num_blocks, widths[:-1], widths[1:], strict=True
        ):
            down = nn.Conv1d(inputs, width, 2 * factor + 1, stride=factor, padding=factor)
            blocks = (Resnet(width, width, groups=groups) for _ in range(blocks))
            self.stages.append(nn.Sequential(down, *blocks))
        self.out = nn.Conv1d(widths[-1], out_channels, 1)

    def forward(self, audio: Tensor) -> Tensor:
        x = self.start(self.magnitudes(audio))
        for stage in self.stages:
            x = stage(x)
        return torch.tanh(self.out(x))

    def magnitudes(self, audio: Tensor) -> Tensor:
        """Of the Fourier transform, over the root of its length: [B, C F, frames], no halves."""
        audio = F.pad(audio, (0, -audio.shape[-1] % self.factor))
        batch, channels, length = audio.shape
        size = len(self.window)
        if channels != self.in_channels or length <= size // 2:
            raise ValueError(
                f"the encoder takes sound of {self.in_channels} channels and more than "
                f"{size // 2} samples, this is {channels} of {length}"
            )
        audio = audio.to(
            torch.promote_types(audio.dtype, torch.float32)
        )  # halves have no transform
        with full_precision(audio.device.type):
            found = torch.stft(
                audio.flatten(0, 1),
                size,
                self.hop,
                window=self.window.to(audio.dtype),
                normalized=True,
                return_complex=True,
            )
        return found.abs().unflatten(0, (batch, channels)).flatten(1, 2)
