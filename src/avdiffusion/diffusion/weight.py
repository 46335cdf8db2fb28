"""Which times a loss is taken at, p(t), and how much each counts, w(t)."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from avdiffusion.diffusion.path import Path


class Density(Protocol):
    """Inverse distribution function: uniform numbers in (0, 1) to times, float64 [B]."""

    def __call__(self, u: Tensor, path: Path) -> Tensor: ...


@dataclass(kw_only=True)
class Uniform:
    """Every time alike; with `steps` only the times (i + 1) / steps of a DDPM table."""

    steps: int | None = None

    def __call__(self, u: Tensor, path: Path) -> Tensor:
        if self.steps is not None:
            return (torch.floor(u * self.steps) + 1) / self.steps
        return path.t_min + u * (path.t_max - path.t_min)


def _normal(u: Tensor) -> Tensor:
    return math.sqrt(2) * torch.erfinv(2 * u - 1)


@dataclass(kw_only=True)
class LogitNormal:
    """logit(t) is normal: the middle times more often (Esser et al. 2024, section 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, u: Tensor, path: Path) -> Tensor:
        return torch.sigmoid(self.mean + self.std * _normal(u)).clamp(path.t_min, path.t_max)


@dataclass(kw_only=True)
class LogNormal:
    """log(sigma / alpha) is normal (Karras et al. 2022, table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, u: Tensor, path: Path) -> Tensor:
        return path.time(-(self.mean + self.std * _normal(u))).clamp(path.t_min, path.t_max)


class Weight(Protocol):
    """Factor on the squared error of the network's output; `det` as in `target.det`."""

    def __call__(self, alpha: Tensor, sigma: Tensor, det: Tensor) -> Tensor: ...


@dataclass(kw_only=True)
class Constant:
    """The plain squared error of whatever the network predicts."""

    def __call__(self, alpha: Tensor, sigma: Tensor, det: Tensor) -> Tensor:
        return torch.ones_like(sigma)


@dataclass(kw_only=True)
class MinSNR:
    """The x0 error counts min(SNR, gamma) (Hang et al. 2023, section 3.4)."""

    gamma: float = 5.0

    def __call__(self, alpha: Tensor, sigma: Tensor, det: Tensor) -> Tensor:
        # min(SNR, gamma) sigma^2, written so that sigma = 0 is no division by zero.
        return torch.minimum(alpha**2, self.gamma * sigma**2) / det**2


@dataclass(kw_only=True)
class EDMWeight:
    """The x0 error counts (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022)."""

    sigma_data: float = 0.5

    def __call__(self, alpha: Tensor, sigma: Tensor, det: Tensor) -> Tensor:
        return (alpha**2 * self.sigma_data**2 + sigma**2) / (self.sigma_data * det) ** 2
