"""Ho et al. 2020, "Denoising diffusion probabilistic models"."""

from dataclasses import dataclass
from itertools import pairwise

from avdiffusion.diffusion.path import posterior_mean, posterior_variance
from avdiffusion.media import Media
from avdiffusion.samplers.sampler import Sampler

VARIANCES = ("small", "large", "learned")


@dataclass(kw_only=True)
class DDPM(Sampler):
    """Ancestral sampling, algorithm 2, on any grid (a coarser one is the respaced process).

    `variance`: of the posterior given x0 ("small"), without ("large"), or where between the two
    the network says ("learned": Nichol and Dhariwal 2021, equation 15).
    """

    steps: int = 1000
    variance: str = "small"

    def __post_init__(self):
        super().__post_init__()
        if self.variance not in VARIANCES:
            raise ValueError(f"variance={self.variance!r} is not one of {', '.join(VARIANCES)}")

    def solve(self, denoise, x, path, times, noise):
        for t, s in pairwise(times):
            found = denoise(x, t)
            x = posterior_mean(path, x, found.x0, t, s)
            small, large = posterior_variance(path, t, s)
            if small > 0:
                x = x + self._deviation(found.spread, small, large) * noise.like(x)
            yield x

    def _deviation(self, spread, small, large):
        if self.variance == "small":
            return small.sqrt()
        if self.variance == "large":
            return large.sqrt()
        if spread is None:
            raise ValueError("variance=learned, but this network learned none: use small or large")

        def between(v):
            return ((small.log() + (v + 1) / 2 * (large.log() - small.log())) / 2).exp()

        return spread.map(between) if isinstance(spread, Media) else between(spread)
