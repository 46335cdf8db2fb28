"""Gaussian paths x_t = alpha(t) x0 + sigma(t) eps, with t = 0 at the data.

All methods take and return float64 tensors: a handful of scalars, on the CPU, computed once a step.
"""

import math
from typing import Protocol

import torch
from torch import Tensor


class Path(Protocol):
    """What a sampler or a loss may know of a noise schedule; t in [0, 1]."""

    t_min: float
    t_max: float

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def lam(self, t: Tensor) -> Tensor:
        """Half the log signal-to-noise ratio, log(alpha / sigma)."""

    def time(self, lam: Tensor) -> Tensor:
        """The inverse of `lam`."""

    def embed(self, t: Tensor) -> Tensor:
        """What the network is told about t."""


def linear_betas(steps: int) -> Tensor:
    """Ho et al. 2020: 1e-4 to 0.02 at 1000 steps, scaled to the same total for any other number."""
    scale = 1000 / steps
    betas = torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64, device="cpu")
    return betas.clamp(max=0.999)


def cosine_betas(steps: int) -> Tensor:
    """Nichol and Dhariwal 2021, equation 17."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu")
    bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)


def sigmoid_betas(steps: int) -> Tensor:
    """Jabri et al. 2022, appendix: alpha_bar follows a sigmoid from -3 to 3."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu")
    low, high = torch.tensor([-3.0, 3.0], dtype=torch.float64, device="cpu").sigmoid()
    bar = (high - torch.sigmoid(6 * u - 3)) / (high - low)
    return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas, "sigmoid": sigmoid_betas}


class DiscreteVP:
    """The variance-preserving table of DDPM, made continuous.

    Step i of N sits at t = (i + 1) / N, where log alpha is the table's; between the steps log alpha
    is linear in t (Lu et al. 2022, appendix D.4), and t = 0 is clean data. A coarser grid of times
    is therefore a respaced process, exactly.
    """

    def __init__(self, *, betas: str = "linear", steps: int = 1000):
        if betas not in BETAS:
            raise ValueError(f"betas={betas!r} is not one of {', '.join(BETAS)}")
        self.steps = steps
        self.t_min, self.t_max = 1 / steps, 1.0
        log_alpha = 0.5 * torch.log1p(-BETAS[betas](steps)).cumsum(0)
        self.log_alphas = torch.nn.functional.pad(log_alpha, (1, 0))

    def log_alpha(self, t: Tensor) -> Tensor:
        place = torch.as_tensor(t, dtype=torch.float64) * self.steps
        # A time such as 0.041 * 1000 lands a rounding error beside its step.
        nearest = place.round()
        place = torch.where((place - nearest).abs() < 1e-9, nearest, place)
        low = place.floor().long().clamp(0, self.steps - 1)
        return torch.lerp(self.log_alphas[low], self.log_alphas[low + 1], place - low)

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def lam(self, t: Tensor) -> Tensor:
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))

    def time(self, lam: Tensor) -> Tensor:
        log_alpha = -0.5 * torch.nn.functional.softplus(-2 * torch.as_tensor(lam))
        rising = self.log_alphas.flip(0)
        high = torch.searchsorted(rising, log_alpha.contiguous()).clamp(1, self.steps)
        share = (log_alpha - rising[high - 1]) / (rising[high] - rising[high - 1])
        return (self.steps - (high - 1) - share) / self.steps

    def embed(self, t: Tensor) -> Tensor:
        """The step's index, the integer (or what lies between two) that DDPM networks know."""
        return self.steps * t - 1


class CosineVP:
    """The quarter circle alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Salimans and Ho 2022).

    At t = 1 there is no signal: a network predicts v. It is told `scale` t, 1000 t for sinusoids
    of fixed frequencies; networks that learn these want t itself.
    """

    def __init__(self, *, scale: float = 1000.0, t_min: float = 1e-3):
        self.scale, self.t_min, self.t_max = scale, t_min, 1.0

    def alpha(self, t: Tensor) -> Tensor:
        # as a sine, it is exactly 0 at t = 1
        return torch.sin((1 - torch.as_tensor(t, dtype=torch.float64)) * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(torch.as_tensor(t, dtype=torch.float64) * (math.pi / 2))

    def lam(self, t: Tensor) -> Tensor:
        return self.alpha(t).log() - self.sigma(t).log()

    def time(self, lam: Tensor) -> Tensor:
        return torch.atan(torch.exp(-torch.as_tensor(lam, dtype=torch.float64))) * (2 / math.pi)

    def embed(self, t: Tensor) -> Tensor:
        return self.scale * t


class RectifiedFlow:
    """The straight path x_t = (1 - t) x0 + t eps (Liu et al. 2022)."""

    def __init__(self, *, t_min: float = 1e-3):
        self.t_min, self.t_max = t_min, 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - torch.as_tensor(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.as_tensor(t, dtype=torch.float64)

    def lam(self, t: Tensor) -> Tensor:
        return torch.log1p(-torch.as_tensor(t, dtype=torch.float64)) - torch.log(t)

    def time(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-torch.as_tensor(lam, dtype=torch.float64))

    def embed(self, t: Tensor) -> Tensor:
        """1000 t: a sinusoid of period 10 000 hardly sees [0, 1]."""
        return 1000 * t


class EDM:
    """x_t = x0 + sigma eps with sigma log-linear in t (Karras et al. 2022)."""

    def __init__(self, *, sigma_min: float = 0.002, sigma_max: float = 80.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.t_min, self.t_max = 0.0, 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(torch.as_tensor(t, dtype=torch.float64))

    def sigma(self, t: Tensor) -> Tensor:
        return (-self.lam(t)).exp()

    def lam(self, t: Tensor) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return -math.log(self.sigma_min) - t * math.log(self.sigma_max / self.sigma_min)

    def time(self, lam: Tensor) -> Tensor:
        lam = torch.as_tensor(lam, dtype=torch.float64)
        return (-lam - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)

    def embed(self, t: Tensor) -> Tensor:
        """1000 times c_noise = log(sigma) / 4, so that the sinusoids resolve it."""
        return -250 * self.lam(t)


def posterior_variance(path: Path, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of x_s given x_t: known x0 (small) and unknown, unit-free x0 (large)."""
    ratio = path.alpha(t) / path.alpha(s)
    large = path.sigma(t) ** 2 - (ratio * path.sigma(s)) ** 2
    return large * (path.sigma(s) / path.sigma(t)) ** 2, large


def posterior_mean(path: Path, x, x0, t: Tensor, s: Tensor):
    """Mean of x_s given x_t and x0 (Ho et al. 2020, equation 7)."""
    ratio, variance = path.alpha(t) / path.alpha(s), posterior_variance(path, t, s)[1]
    from_x = ratio * (path.sigma(s) / path.sigma(t)) ** 2
    from_x0 = path.alpha(s) * variance / path.sigma(t) ** 2
    if from_x.dim():
        return rows(from_x, x) * x + rows(from_x0, x) * x0
    return from_x * x + from_x0 * x0


def rows(value: Tensor, like: Tensor) -> Tensor:
    """A scalar as it is; [B] on `like`'s device, type and rank."""
    if value.dim() == 0:
        return value
    return sent(value, like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))


def sent(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The CPU's tensor on a device, for whose work nobody waits.

    Only from page-locked memory does CUDA copy beside its other work.
    """
    value = value.to(dtype=dtype or value.dtype)  # there would be no lock on what a copy converts
    if value.is_cpu and device.type == "cuda":
        value = value.pin_memory()
    # MPS would read the memory later, when it may be another's.
    return value.to(device, non_blocking=value.is_cpu and device.type != "mps")
