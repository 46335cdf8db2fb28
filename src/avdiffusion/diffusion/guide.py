"""Guides wrap `denoise(x, t) -> Prediction`, so that every sampler has them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from avdiffusion.diffusion.diffusion import Prediction
from avdiffusion.diffusion.path import Path, rows
from avdiffusion.media import Media

Denoise = Callable[[Media | Tensor, Tensor], Prediction]


class Task(NamedTuple):
    """What a guide may know of the sampling it takes part in.

    `seeds`: of the system and of the samples. `decode`: from what is diffused to clips. `cond`:
    the condition, as the network takes it. `free`: the prediction under none, None where the model
    knows no such case. `known`: given values of what is diffused, `mask`: True where they are,
    `noise`: what they are noised with. `call`: of a network, how it is to be called.
    """

    path: Path
    seeds: tuple[int, int] = (0, 0)
    decode: Callable[[Media], Media] = lambda x: x
    cond: Mapping[str, Tensor] | None = None
    free: Denoise | None = None
    known: Media | None = None
    mask: Media | None = None
    noise: Media | None = None
    call: Callable[[Any], Callable[..., Any]] = lambda net: net


Guide = Callable[[Denoise, Task], Denoise]


def moved(found: Prediction, x, x0, task: Task, t: Tensor) -> Prediction:
    """The prediction with another x0, and the eps that makes x_t with it."""
    return found._replace(x0=x0, eps=(x - task.path.alpha(t) * x0) / task.path.sigma(t))


@dataclass(kw_only=True)
class Clamp:
    """x0 is held within [low, high], and eps moved with it, so that the two still make x_t."""

    low: float = -1.0
    high: float = 1.0

    def __call__(self, denoise: Denoise, task: Task) -> Denoise:
        def clamped(x: Media | Tensor, t: Tensor) -> Prediction:
            found = denoise(x, t)
            return moved(found, x, torch.clamp(found.x0, self.low, self.high), task, t)

        return clamped


@dataclass(kw_only=True)
class Threshold:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3), of each sample and modality.

    x0 is held within the `quantile` of its own size, where that is above `floor`, and scaled back
    to `floor`; eps moves with it.
    """

    quantile: float = 0.995
    floor: float = 1.0

    def __post_init__(self):
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile={self.quantile} is not above 0 and at most 1")
        if not self.floor > 0:
            raise ValueError(f"floor={self.floor} is not above 0")

    def __call__(self, denoise: Denoise, task: Task) -> Denoise:
        def thresholded(x: Media | Tensor, t: Tensor) -> Prediction:
            found = denoise(x, t)
            return moved(found, x, leafwise(self._held, found.x0), task, t)

        return thresholded

    def _held(self, v: Tensor) -> Tensor:
        size = v.abs().reshape(len(v), -1).quantile(self.quantile, dim=1)
        size = rows(size.clamp(min=self.floor), v)
        return torch.clamp(v, -size, size) * (self.floor / size)


@dataclass(kw_only=True)
class IntegerTimes:
    """The network is told t truncated to a step, as MM-Diffusion's DPM-Solver did.

    Its eps is kept and x0 recomputed at t itself. For the published figures; the exact time, which
    networks here are told otherwise, is the better one. Stands before every other guide.
    """

    def __call__(self, denoise: Denoise, task: Task) -> Denoise:
        path = task.path
        total = getattr(path, "steps", None)
        if total is None or path.t_min <= 0:
            raise ValueError(f"{type(path).__name__} is no table of steps: no guide=integer_times")

        def truncated(x: Media | Tensor, t: Tensor) -> Prediction:
            # In float32 as there, whose rounding decides where t lies on a step.
            step = ((t.float() - 1 / total) * total).trunc().clamp(min=0).double()
            found = denoise(x, (step + 1) / total)
            return found._replace(x0=(x - path.sigma(t) * found.eps) / path.alpha(t))

        return truncated


@dataclass(kw_only=True)
class ClassifierFree:
    """Away from what the model makes of no condition: free + scale (model - free).

    Scale 1 is the model alone, 0 the free one (Ho and Salimans 2022, there 1 + w). It acts at times
    between `low` and `high` (Kynkaanniemi et al. 2024), where alone the free one is computed.
    `rescale` is the share of x0 whose deviation is brought back to what it was without guidance
    (Lin et al. 2024, equations 15 and 16).
    """

    scale: float = 3.0
    low: float = 0.0
    high: float = 1.0
    rescale: float = 0.0

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low={self.low} and high={self.high} are not 0 <= low < high <= 1")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale={self.rescale} is not within 0 and 1")

    def __call__(self, denoise: Denoise, task: Task) -> Denoise:
        if task.free is None:
            raise ValueError(
                "classifier-free guidance leaves out a condition, and this model has none"
            )

        def guided(x: Media | Tensor, t: Tensor) -> Prediction:
            found = denoise(x, t)
            if self.scale == 1 or not self.low <= float(t) <= self.high:
                return found
            x0 = torch.lerp(task.free(x, t).x0, found.x0, self.scale)
            if self.rescale:
                back = leafwise(deviation, found.x0) / leafwise(deviation, x0)
                x0 = (self.rescale * back + (1 - self.rescale)) * x0
            return moved(found, x, x0, task, t)

        return guided


def leafwise(function: Callable[[Tensor], Tensor], x: Media | Tensor) -> Media | Tensor:
    """The function of a tensor, or of every entry."""
    return x.map(function) if isinstance(x, Media) else function(x)


def deviation(x: Tensor) -> Tensor:
    """Of each sample's values: [B, 1, ...]."""
    return x.std(dim=tuple(range(1, x.dim())), keepdim=True)


class System(Protocol):
    """What guidance by another model needs of it; a `DiffusionSystem` has it."""

    task: Task
    model: Any

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
        worse = None

        def guided(x: Media, t: Tensor) -> Prediction:
            nonlocal worse
            if worse is None:
                self._check(x, task)
                worse = self.weak.denoise(task)
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
        reads = self.weak.model.conditioner if task.cond else nn.Identity()
        if reads is None or list(reads.parameters()):
            raise ValueError(
                "the weak model is told nothing, or learned by itself to read what it is told: "
                "leave out guide=[auto]"
            )
        t = torch.linspace(task.path.t_min, task.path.t_max, 5, dtype=torch.float64)
        if not torch.allclose(weak.path.lam(t), task.path.lam(t)):
            raise ValueError("the weak model was trained on another noise path")
        clips = zip(weak.decode(x).values(), task.decode(x).values(), strict=True)
        if not all(a.shape == b.shape and torch.allclose(a, b) for a, b in clips):
            raise ValueError("the weak model was trained with another codec")


def shapes(x: Media) -> dict[str, list[int]]:
    """The shape of each modality's sample."""
    return {name: list(v.shape[1:]) for name, v in x.items()}
