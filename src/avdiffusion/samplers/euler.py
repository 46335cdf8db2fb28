"""Euler's method in x / alpha over sigma / alpha, where every path is the one of Karras et al."""

import math
from dataclasses import dataclass
from itertools import pairwise

from avdiffusion.diffusion.path import posterior_variance
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.sampler import Sampler


@dataclass(kw_only=True)
class Euler(Sampler):
    """Karras et al. 2022, algorithm 2 without its correction; without churn DDIM with eta = 0.

    Before a step whose sigma / alpha lies within `churn_min` and `churn_max` (null: any), noise of
    deviation `churn_noise` raises it by churn / steps of itself, at most by sqrt(2) - 1.
    """

    grid: str = "karras"
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float | None = None
    churn_noise: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("churn", "churn_min", "churn_noise"):
            if vars(self)[name] < 0:
                raise ValueError(f"{name}={vars(self)[name]} is below 0")
        if self.churn_max is not None and self.churn_max < self.churn_min:
            raise ValueError(f"churn_max={self.churn_max} is below churn_min={self.churn_min}")

    def solve(self, denoise, x, path, times, noise):
        share = min(self.churn / self.steps, math.sqrt(2) - 1)
        for t, s in pairwise(times):
            if share > 0 and self._churned(path, t):
                x, t = self._raise(x, path, t, share, noise)
            found = denoise(x, t)
            x = path.alpha(s) * found.x0 + path.sigma(s) * found.eps
            x = self._correct(denoise, x, found.eps, path, t, s)
            yield x

    def _churned(self, path, t):
        level = path.sigma(t) / path.alpha(t)
        return self.churn_min <= level and (self.churn_max is None or level <= self.churn_max)

    def _raise(self, x, path, t, share, noise):
        """The state and its time with more noise; as they are where the path has no more."""
        high = path.time(path.lam(t) - math.log1p(share)).clamp(max=path.t_max)
        if high <= t:
            return x, t
        up = self.churn_noise * posterior_variance(path, high, t)[1].sqrt()
        return path.alpha(high) / path.alpha(t) * x + up * noise.like(x), high

    def _correct(self, denoise, x, eps, path, t, s):
        """x at s, to which a step from t led along eps; Euler's method leaves it."""
        return x


@dataclass(kw_only=True)
class EulerAncestral(DDIM):
    """Euler's step to less noise than at s, and the rest drawn anew: DDIM in these coordinates."""

    grid: str = "karras"
    eta: float = 1.0
