"""Random numbers that depend on their key alone, never on a global generator or a batch."""

import hashlib
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from avdiffusion.diffusion.path import sent
from avdiffusion.media import Media


def key(*parts: object) -> int:
    """A 63-bit number from any parts; equal parts give equal numbers on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Noise:
    """A source of noise with one stream per sample, keyed by (seed, index, purpose).

    An index is a number, or numbers for one of several parts of a sample.

    The n-th call of `like` gives sample i the same numbers whatever batch it is in, on any number
    of devices. They are drawn on `device` ("cpu" for the same numbers everywhere) and handed over
    on the device and in the type of the tensor they resemble. Nothing waits for that device, so
    the CPU draws the next ones while it works.
    """

    def __init__(
        self,
        seed: int,
        index: Sequence[int | tuple],
        purpose: str = "noise",
        *,
        device: str = "cpu",
    ):
        self.seed, self.index, self.purpose, self.device = seed, list(index), purpose, device
        self.calls = 0

    def fork(self, purpose: str) -> "Noise":
        """An independent source for the same samples."""
        name = f"{self.purpose}/{purpose}"
        return type(self)(self.seed, self.index, name, device=self.device)

    def uniform(self) -> Tensor:
        """One number in (0, 1) per sample, float64 [B], on the CPU."""
        # 52 bits, as with more the largest would round to 1.
        keys = [key(self.seed, i, self.purpose, "u") >> 11 for i in self.index]
        scaled = [(k + 0.5) / 2**52 for k in keys]
        return torch.tensor(scaled, dtype=torch.float64)

    def like(self, x: Media | Tensor) -> Media | Tensor:
        """Standard normal noise shaped like x [B, ...]."""
        self.calls += 1
        if isinstance(x, Media):
            return Media({name: self._draw(v, zlib.crc32(name.encode())) for name, v in x.items()})
        return self._draw(x, 0)

    def _draw(self, x: Tensor, stream: int) -> Tensor:
        if len(self.index) != len(x):
            raise ValueError(f"noise for {len(self.index)} samples, asked for {len(x)}")
        out = torch.empty(x.shape, device=self.device)
        generator = torch.Generator(self.device)
        for row, index in zip(out, self.index, strict=True):
            generator.manual_seed(key(self.seed, index, self.purpose, self.calls, stream))
            row.normal_(generator=generator)
        return sent(out, x.device, x.dtype)


class SharedNoise(Noise):
    """Noise that is the same at every step of the first axis after the channels."""

    def _draw(self, x: Tensor, stream: int) -> Tensor:
        return super()._draw(x[:, :, :1], stream).expand_as(x)
