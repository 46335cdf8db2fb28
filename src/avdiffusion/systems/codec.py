"""Between what the data holds and what is diffused."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from avdiffusion.diffusion.noise import Noise, SharedNoise
from avdiffusion.media import Media
from avdiffusion.systems.system import empty

Caller = Callable[[nn.Module], Callable[..., Any]]


def as_it_is(net: nn.Module) -> nn.Module:
    return net


class Identity(nn.Module):
    """Diffuses the data itself."""

    holds = True  # whether what is known of a clip can be told in what is diffused

    def shapes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Of what is diffused, one sample each, if clips have `shapes`."""
        return {name: list(shape) for name, shape in shapes.items()}

    def encode(self, x: Media) -> Media:
        return x

    def checked(self, z: Media) -> Media:
        """What is diffused of a training batch, after a look at it."""
        return z

    def mask(self, known: Media) -> Media:
        """Where what is diffused is known, if the data is there."""
        return known

    def decode(self, z: Media, noise: Noise, call: Caller = as_it_is) -> Media:
        """Clips of what is diffused; they may be longer or larger than those encoded.

        `noise` is of the samples, for codecs that draw; `call` says how a network is to be called.
        """
        return z

    def noise(self, noise: Noise) -> Noise:
        """The noise that sampling begins with and adds, given one that is independent."""
        return noise


class Frames(Identity):
    """Diffuses frames that the network sees one by one; they share their noise in sampling.

    What a frame's detail looks like is then decided once for all of a clip, and it does not
    flicker. Parts of a sample that are made one after another share it as well.
    """

    def noise(self, noise: Noise) -> Noise:
        index = [i[0] if isinstance(i, tuple) else i for i in noise.index]
        return SharedNoise(noise.seed, index, noise.purpose, device=noise.device)


class Patches(Identity):
    """Folds blocks of neighbouring values into channels: a smaller grid, nothing lost.

    `patch`: block size along each axis after the channels, by modality; {"video": [1, 4, 4]} turns
    [B, 3, T, H, W] into [B, 48, T, H/4, W/4]. `scale`: factor on a modality's values, which sets
    how soon noise drowns it.
    """

    def __init__(
        self,
        *,
        patch: Mapping[str, Sequence[int]],
        scale: Mapping[str, float] | None = None,
    ):
        super().__init__()
        self.patch, self.scale = dict(patch), dict(scale or {})

    def shapes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        found = self.mask(empty(1, shapes, "meta"))
        return {name: list(value.shape[1:]) for name, value in found.items()}

    def decode(self, z: Media, noise: Noise, call: Caller = as_it_is) -> Media:
        return Media({name: self._unfold(name, v) for name, v in z.items()})

    def mask(self, known: Media) -> Media:
        return Media({name: self._fold(name, v) for name, v in known.items()})

    def encode(self, x: Media) -> Media:
        return Media(
            {name: self._fold(name, v) * self.scale.get(name, 1.0) for name, v in x.items()}
        )

    def _fold(self, name: str, x: Tensor) -> Tensor:
        split, joined, sizes = self._pattern(name, x)
        if any(n % p for n, p in zip(x.shape[2:], sizes.values(), strict=True)):
            raise ValueError(
                f"{name} {list(x.shape[1:])} does not divide into blocks of {list(sizes.values())}"
            )
        return rearrange(x, f"{split} -> {joined}", **sizes)

    def _unfold(self, name: str, z: Tensor) -> Tensor:
        split, joined, sizes = self._pattern(name, z)
        return rearrange(z, f"{joined} -> {split}", **sizes) / self.scale.get(name, 1.0)

    def _pattern(self, name: str, x: Tensor) -> tuple[str, str, dict[str, int]]:
        """einops' two sides and the block sizes, for as many axes as x has."""
        axes = range(x.dim() - 2)
        patch = self.patch.get(name, [1] * len(axes))
        if len(patch) != len(axes):
            raise ValueError(f"patch.{name}={list(patch)} has to name {len(axes)} block sizes")
        sizes = dict(zip((f"p{k}" for k in axes), patch, strict=True))
        split = "b c " + " ".join(f"(d{k} p{k})" for k in axes)
        joined = f"b (c {' '.join(sizes)}) " + " ".join(f"d{k}" for k in axes)
        return split, joined, sizes
