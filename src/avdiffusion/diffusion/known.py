"""Guides that hold what is known of a clip, so that the rest is made to go with it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from avdiffusion.diffusion.diffusion import Prediction
from avdiffusion.diffusion.guide import Denoise, Task, moved
from avdiffusion.diffusion.path import rows
from avdiffusion.media import Media


@dataclass(kw_only=True)
class Replace:
    """The network sees the known part on its own noised path, with noise that stays the same.

    It is told of the known part by what this looks like at t alone, so the rest goes with it less
    than it could (Song et al. 2021b, appendix I.2; Ruan et al. 2023 with a zero gradient).
    """

    holds = True

    def __call__(self, denoise: Denoise, task: Task) -> Denoise:
        if not anything(task, self):
            return denoise

        def guided(x: Media | Tensor, t: Tensor) -> Prediction:
            return kept(denoise(noised(x, t, task), t), task)

        return guided


@dataclass(kw_only=True)
class Reconstruct:
    """Besides that, the rest moves to where the network would find the known part by itself.

    The error of the prediction, half its squared sum over each sample's known values, is
    differentiated by the unknown ones of x_t (Ho et al. 2022b, equation 7). Strength 1 is the step
    of a Bayesian whose data are normal with unit variance (Song et al. 2023b, equations 7 and 8),
    a = alpha / sqrt(alpha^2 + sigma^2):

        x0 <- x0 - strength sqrt(alpha^2 + sigma^2) min(1 / a, cap) d(error) / dx

    A sum over the known values and no mean, so that neither the batch nor the clip's length
    changes a value's share. `cap` bounds the step where x_t is next to nothing but noise.
    """

    strength: float = 1.0
    cap: float = 10.0

    holds = True
    gradient = True

    def __post_init__(self):
        if self.strength < 0 or self.cap <= 0:
            raise ValueError(
                f"strength={self.strength} is not 0 or more, or cap={self.cap} not above 0"
            )

    def __call__(self, denoise: Denoise, task: Task) -> Denoise:
        if not anything(task, self):
            return denoise

        there = torch.stack([mask.flatten(1).any(1) for mask in task.mask.values()]).any(0)
        told = task.mask.map(lambda m: rows(there, m))

        def guided(x: Media, t: Tensor) -> Prediction:
            with torch.enable_grad():
                x = noised(x, t, task).map(lambda v: v.detach().requires_grad_())
                found = denoise(x, t)
                error = found.x0.map(
                    lambda v, k, m: ((k - v) * m).float().square().sum() / 2, task.known, task.mask
                )
                slope = torch.autograd.grad(sum(error.values()), tuple(x.values()))
            alpha, sigma = task.path.alpha(t), task.path.sigma(t)
            size = (alpha**2 + sigma**2).sqrt()
            step = self.strength * size * torch.clamp(size / alpha, max=self.cap)
            x, found = (
                x.map(torch.detach),
                Prediction(*(part and part.map(torch.detach) for part in found)),
            )
            slope = Media(zip(x, slope, strict=True))
            led = moved(found, x, found.x0 - step * slope, task, t)
            # A sample of which nothing is known has to be, to the bit, what it is among such alone.
            led = led._replace(eps=torch.where(told, led.eps, found.eps))
            return kept(led, task)

        return guided


def anything(task: Task, guide: object) -> bool:
    """Whether any value is known; an error where the task knows of no known part at all."""
    if task.known is None:
        raise ValueError(
            f"{type(guide).__name__} holds what is known of a clip, and nothing is given: "
            "say what with given= and known=, or make a longer clip with seconds="
        )
    return any(bool(mask.any()) for mask in task.mask.values())


def noised(x: Media, t: Tensor, task: Task) -> Media:
    """x with its known part on the path from the known values to their fixed noise."""
    there = task.path.alpha(t) * task.known + task.path.sigma(t) * task.noise
    return torch.where(task.mask, there, x)


def kept(found: Prediction, task: Task) -> Prediction:
    """The prediction with the known part as it is."""
    return found._replace(
        x0=torch.where(task.mask, task.known, found.x0),
        eps=torch.where(task.mask, task.noise, found.eps),
    )
