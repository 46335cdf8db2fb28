"""Lu et al. 2022b, "DPM-Solver++: Fast solver for guided sampling of diffusion models"."""

from dataclasses import dataclass
from itertools import pairwise

from avdiffusion.diffusion.path import posterior_mean, posterior_variance
from avdiffusion.samplers.sampler import Sampler


@dataclass(kw_only=True)
class SDEDPMSolver(Sampler):
    """SDE-DPM-Solver++: DDPM's step with the x0 that the last two lead to in the middle of it.

    That is its 2M; with `order` 1 x0 stays as it was, and the step is DDPM's of small variance.
    """

    steps: int = 25
    grid: str = "log_snr"
    order: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.order not in (1, 2):
            raise ValueError(f"order={self.order} is not 1 or 2")

    def solve(self, denoise, x, path, times, noise):
        before = None  # x0 at the start of the last step, and the length of that in lambda
        for t, s in pairwise(times):
            h, x0 = path.lam(s) - path.lam(t), denoise(x, t).x0
            middle = x0
            if before is not None and h.isfinite():
                middle = x0 + h / (2 * before[1]) * (x0 - before[0])
            if self.order == 2 and h.isfinite():
                before = x0, h
            x = posterior_mean(path, x, middle, t, s)
            up = posterior_variance(path, t, s)[0].sqrt()
            if up > 0:
                x = x + up * noise.like(x)
            yield x
