"""Guides wrap `denoise(x, t) -> Prediction`, so that every sampler has them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from avdiffusion.diffusion.diffusion import Prediction
from avdiffusion.diffusion.path import Path
from avdiffusion.media import Media

Denoise = Callable[[Media | Tensor, Tensor], Prediction]


class Task(NamedTuple):
    """What a guide may know of the sampling it takes part in.

    `seeds`: of the system and of the samples. `decode`: from what is diffused to clips.
    """

    path: Path
    seeds: tuple[int, int] = (0, 0)
    decode: Callable[[Media], Media] = lambda x: x


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


class System(Protocol):
    """What guidance by another model needs of it; a `DiffusionSystem` has it."""

    task: Task

    def denoise(self, task: Task) -> Denoise: ...
    def latent(self, count: int) -> Media: ...
    def to(self, device: torch.device) -> Any: ...


@dataclass(kw_only=True)
class AutoGuidance:
    """Away from a weaker model of the same clips: weak + scale (model - weak).

    Scale 1 is the model alone, 0 the weak one. Both see the same x, time and window shifts
    (Karras et al. 2024b).
    """

    weak: System = field(repr=False)
    scale: float = 2.0

    def __call__(self, denoise: Denoise, task: Task) -> Denoise:
        worse, checked = self.weak.denoise(task), False

        def guided(x: Media, t: Tensor) -> Prediction:
            nonlocal checked
            if not checked:
                self._check(x, task)
                checked = True
            found, other = denoise(x, t), worse(x, t)
            # Both make x_t, and factors whose sum is 1 keep it so.
            return found._replace(
                x0=torch.lerp(other.x0, found.x0, self.scale),
                eps=torch.lerp(other.eps, found.eps, self.scale),
            )

        return guided

    def _check(self, x: Media, task: Task) -> None:
        """Brings the weak model to where x is; refuses one for which x means something else."""
        self.weak.to(next(iter(x.values())).device)
        weak, ours, theirs = self.weak.task, shapes(x), shapes(self.weak.latent(1))
        if ours != theirs:
            raise ValueError(f"the weak model makes {theirs}, not {ours}")
        t = torch.linspace(task.path.t_min, task.path.t_max, 5, dtype=torch.float64)
        if not torch.allclose(weak.path.lam(t), task.path.lam(t)):
            raise ValueError("the weak model was trained on another noise path")
        clips = zip(weak.decode(x).values(), task.decode(x).values(), strict=True)
        if not all(a.shape == b.shape and torch.allclose(a, b) for a, b in clips):
            raise ValueError("the weak model was trained with another codec")


def shapes(x: Media) -> dict[str, list[int]]:
    """The shape of each modality's sample."""
    return {name: list(v.shape[1:]) for name, v in x.items()}
