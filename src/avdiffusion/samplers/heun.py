"""Karras et al. 2022, "Elucidating the design space of diffusion-based generative models"."""

from dataclasses import dataclass

from avdiffusion.samplers.euler import Euler


@dataclass(kw_only=True)
class Heun(Euler):
    """Algorithm 2: Euler's step, then its slope (eps) replaced by the mean of both its ends'.

    Of second order. `steps` are steps, of two evaluations each; a step from no data or to no noise
    is Euler's and takes one.
    """

    steps: int = 18

    def _correct(self, denoise, x, eps, path, t, s):
        if path.alpha(t) == 0 or path.sigma(s) == 0:
            return x
        length = path.sigma(s) - path.alpha(s) * path.sigma(t) / path.alpha(t)
        return x + length / 2 * (denoise(x, s).eps - eps)
