"""Guides wrap `denoise(x, t) -> Prediction`, so that every sampler has them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from avdiffusion.diffusion.diffusion import Prediction
from avdiffusion.diffusion.path import Path
from avdiffusion.media import Media

Denoise = Callable[[Media | Tensor, Tensor], Prediction]


class Task(NamedTuple):
    """What a guide may know of the sampling it takes part in."""

    path: Path


Guide = Callable[[Denoise, Task], Denoise]


@dataclass(kw_only=True)
class Clamp:
    """x0 is held within [low, high], and eps moved with it, so that the two still make x_t."""

    low: float = -1.0
    high: float = 1.0

    def __call__(self, denoise: Denoise, task: Task) -> Denoise:
        path = task.path

        def clamped(x: Media | Tensor, t: Tensor) -> Prediction:
            found = denoise(x, t)
            x0 = (
                found.x0.map(lambda v: v.clamp(self.low, self.high))
                if isinstance(found.x0, Media)
                else found.x0.clamp(self.low, self.high)
            )
            return found._replace(x0=x0, eps=(x - path.alpha(t) * x0) / path.sigma(t))

        return clamped
