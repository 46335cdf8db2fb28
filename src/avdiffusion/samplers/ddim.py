"""Song et al. 2021, "Denoising diffusion implicit models"."""

from dataclasses import dataclass
from itertools import pairwise

from avdiffusion.diffusion.path import posterior_variance
from avdiffusion.samplers.sampler import Sampler


@dataclass(kw_only=True)
class DDIM(Sampler):
    """Equation 12; eta = 0 is deterministic (Euler's step on a rectified flow), eta = 1 is DDPM."""

    eta: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} is not within 0 (deterministic) and 1 (DDPM)")

    def solve(self, denoise, x, path, times, noise):
        for t, s in pairwise(times):
            found = denoise(x, t)
            up = self.eta * posterior_variance(path, t, s)[0].sqrt()
            x = path.alpha(s) * found.x0 + (path.sigma(s) ** 2 - up**2).sqrt() * found.eps
            if up > 0:
                x = x + up * noise.like(x)
            yield x
