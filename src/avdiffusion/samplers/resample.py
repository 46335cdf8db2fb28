"""Lugmayr et al. 2022, "RePaint": going back some way and down again."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from avdiffusion.diffusion.noise import Noise
from avdiffusion.diffusion.path import Path, posterior_variance
from avdiffusion.media import Media
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.sampler import Sampler


@dataclass(kw_only=True)
class Resample:
    """A sampler that takes every stretch of `jump` steps `times` times, noising x in between.

    What a guide holds of a clip and what is made beside it so have the time to agree (algorithm 1).
    It takes the place of a sampler and costs `times` times its evaluations.
    """

    sampler: Sampler = field(default_factory=DDIM)
    jump: int = 10
    times: int = 3

    def __post_init__(self):
        if self.jump < 1 or self.times < 1:
            raise ValueError(f"jump={self.jump} and times={self.times} have to be at least 1")
        if not isinstance(self.sampler, Sampler):
            raise ValueError(
                f"resample goes on top of a sampler, not of {type(self.sampler).__name__}"
            )
        if getattr(self.sampler, "denoise_last", False):
            raise ValueError(
                "denoise_last=true would end every stretch: not under sampler=resample"
            )

    @property
    def steps(self) -> int:
        return self.sampler.steps * self.times

    @property
    def together(self) -> bool:
        return self.sampler.together

    def __call__(
        self,
        denoise,
        x: Media | Tensor,
        path: Path,
        *,
        noise: Noise,
        t_start: float | None = None,
        t_end: float | None = None,
    ) -> Iterator[Media | Tensor]:
        """States of every stretch in turn."""
        grid = self.sampler.times(path, t_start, t_end)
        for place in range(0, len(grid) - 1, self.jump):
            here = grid[place : place + self.jump + 1]
            for again in range(self.times):
                if again:
                    x = noised(x, path, here[-1], here[0], noise)
                for state in self.sampler.solve(denoise, x, path, here, noise):
                    x = state
                    yield x


def noised(x, path: Path, s: Tensor, t: Tensor, noise: Noise):
    """x_t from x_s, s being nearer to the data."""
    ratio, variance = path.alpha(t) / path.alpha(s), posterior_variance(path, t, s)[1]
    return ratio * x + variance.sqrt() * noise.like(x)
