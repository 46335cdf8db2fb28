"""What every sampler is: a walk down a grid of times, yielding its states."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from avdiffusion.diffusion.grid import GRIDS
from avdiffusion.diffusion.noise import Noise
from avdiffusion.diffusion.path import Path
from avdiffusion.media import Media


@dataclass(kw_only=True)
class Sampler:
    """From noise to data in `steps` evaluations of `denoise(x, t) -> Prediction`.

    Calling it gives an iterator over the states after each step; the last one is the sample.
    x is Media or a plain tensor; t a float64 scalar on the CPU, which costs no device sync.

    `shift` above 1 moves the grid's inner times towards the noise, as t -> shift t / (1 + (shift -
    1) t) does on a rectified flow whose clips are larger (Esser et al. 2024, equation 23).
    """

    steps: int = 50
    grid: str = "trailing"
    shift: float = 1.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: a sampler takes at least one step")
        if self.steps != int(self.steps):
            raise ValueError(f"steps={self.steps}: a sampler takes whole steps")
        if self.grid not in GRIDS:
            raise ValueError(f"grid={self.grid!r} is not one of {', '.join(GRIDS)}")
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift} is not above 0")

    @property
    def together(self) -> bool:
        """Whether samples may be computed side by side without one depending on another."""
        return True

    def __call__(
        self,
        denoise,
        x: Media | Tensor,
        path: Path,
        *,
        noise: Noise | None = None,
        t_start: float | None = None,
        t_end: float | None = None,
    ) -> Iterator[Media | Tensor]:
        """States between `t_start` (the path's end) and `t_end` (the data)."""
        return self.solve(denoise, x, path, self.times(path, t_start, t_end), noise)

    def times(self, path: Path, t_start: float | None = None, t_end: float | None = None) -> Tensor:
        """Where the sampler stops: float64, falling from t_start to t_end."""
        start = path.t_max if t_start is None else t_start
        times = GRIDS[self.grid](path, self.steps, start, 0.0 if t_end is None else t_end)
        if self.shift == 1:
            return times
        first, last = times[0], times[-1]
        share = (times - last) / (first - last)
        times = last + (first - last) * (self.shift * share / (1 + (self.shift - 1) * share))
        times[0], times[-1] = first, last
        return times

    def solve(self, denoise, x, path: Path, times: Tensor, noise: Noise | None):
        raise TypeError(f"{type(self).__name__} has no `solve`")


def last(states: Iterator[Media | Tensor]) -> Media | Tensor:
    """The final state."""
    *_, x = states
    return x
