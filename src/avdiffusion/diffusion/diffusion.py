"""A network on a Gaussian path: the training loss and the prediction of clean data."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from avdiffusion.diffusion.path import Path, posterior_mean, posterior_variance, rows, sent
from avdiffusion.diffusion.target import TARGETS, det, scale_in
from avdiffusion.diffusion.weight import Constant, Density, Uniform, Weight
from avdiffusion.media import Media


class Prediction(NamedTuple):
    """A network's guess at x_t: alpha x0 + sigma eps = x_t."""

    x0: Media | Tensor
    eps: Media | Tensor
    spread: Media | Tensor | None = None  # learned variance in [-1, 1]; only DDPM reads it


class Diffusion(nn.Module):
    """A network, a path and what the network predicts on it; one code path for every modality.

    `net(*tensors, time=[B], **cond)` returns a tensor per modality (a tuple when there are
    several). `conditioner(batch, encode)` makes that `cond` of a batch, if there is a condition;
    `encode` brings clips to what is diffused. With `learned_variance` the network's channels hold
    the prediction, then the place of the log variance between the small and the large one (Nichol
    and Dhariwal 2021, equation 15).
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        path: Path,
        target: str = "eps",
        density: Density | None = None,
        weight: Weight | None = None,
        sigma_data: float = 1.0,
        learned_variance: bool = False,
        conditioner: nn.Module | None = None,
    ):
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"target={target!r} is not one of {', '.join(TARGETS)}")
        if learned_variance and path.t_min <= 0:
            raise ValueError(
                f"learned_variance needs a path with a first step, {type(path).__name__} has none"
            )
        self.net, self.path, self.target = net, path, target
        self.density, self.weight = density or Uniform(), weight or Constant()
        self.sigma_data, self.learned_variance = sigma_data, learned_variance
        self.conditioner = conditioner
        for t in (path.t_min, path.t_max):
            with torch.device("cpu"):  # also where networks are built on another, such as meta
                alpha, sigma = self._levels(torch.tensor(t, dtype=torch.float64))
            if abs(float(det(alpha, sigma, self._pair(alpha, sigma)))) < 1e-9:
                raise ValueError(
                    f"target={target!r} does not determine the data at t={t} of "
                    f"{type(path).__name__}: use target=v or flow"
                )

    def condition(
        self,
        batch: Mapping[str, Any],
        encode: Callable[[Media], Media] = lambda clips: clips,
        u: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What the network is told besides x and its time; nothing without a conditioner.

        With uniform numbers `u` [B], samples whose number is below the conditioner's `drop` are
        told its `null` (Ho and Salimans 2022, section 3.2).
        """
        if self.conditioner is None:
            return {}
        cond = self.conditioner(batch, encode)
        drop = getattr(self.conditioner, "drop", 0.0)
        if u is None or not drop:
            return cond
        null = self.conditioner.null(cond)

        def mixed(value: Tensor, none: Tensor) -> Tensor:
            dropped = sent(u < drop, value.device).view(-1, *[1] * (value.dim() - 1))
            return torch.where(dropped, none, value)

        return {name: mixed(value, null[name]) for name, value in cond.items()}

    def loss(
        self,
        x0: Media,
        cond: dict,
        *,
        t: Tensor | Media,
        noise: Media,
        mask: Media | None = None,
    ) -> dict[str, Tensor]:
        """Weighted squared error per sample [B] and modality.

        `t`: float64 [B] on the CPU, or Media of them (a level per modality). `mask` (0 or 1, shaped
        like x0) restricts the mean. A learned variance adds `<modality>_vb`, its variational bound
        in bits, with the mean held fixed.
        """
        alpha, sigma = self._levels(t)
        x = x0.map(lambda v, e, a, s: rows(a, v) * v + rows(s, v) * e, noise, alpha, sigma)
        out, spread = self._run(x, t, alpha, sigma, cond, self.net)

        def error(o, v, e, m, a, s):
            pair = self._pair(a, s)
            goal = rows(pair[0], v) * v + rows(pair[1], v) * e
            square = (o.float() - goal).square()
            w = sent(self.weight(a, s, det(a, s, pair)), v.device, torch.float32)
            if m is None:
                return w * square.flatten(1).mean(1)
            m = m.expand_as(square)
            return w * (square * m).flatten(1).sum(1) / m.flatten(1).sum(1).clamp(min=1)

        losses = dict(out.map(error, x0, noise, mask, alpha, sigma))
        if spread is not None:
            found = self._decode(x, out, alpha, sigma)[0]
            bound = spread.map(self._bound, found, x0, x, t)
            losses.update({f"{name}_vb": value for name, value in bound.items()})
        return losses

    def predict(
        self, x: Media, t: Tensor, cond: dict, net: Callable[..., Any] | None = None
    ) -> Prediction:
        """The prediction at one time for the whole batch; `t` is a float64 scalar on the CPU.

        `net`: another way to call the network than by itself.
        """
        alpha, sigma = self._levels(t)
        out, spread = self._run(x, t, alpha, sigma, cond, net or self.net)
        return Prediction(*self._decode(x, out, alpha, sigma), spread)

    def _levels(self, t: Tensor | Media) -> tuple[Tensor, Tensor] | tuple[Media, Media]:
        if isinstance(t, Media):
            return t.map(self.path.alpha), t.map(self.path.sigma)
        return self.path.alpha(t), self.path.sigma(t)

    def _pair(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return TARGETS[self.target](alpha, sigma, self.sigma_data)

    def _run(self, x, t, alpha, sigma, cond, net) -> tuple[Media, Media | None]:
        x = x.map(lambda v, a, s: v * rows(scale_in(a, s, self.sigma_data), v), alpha, sigma)

        def told(value: Tensor, t: Tensor) -> Tensor:
            told = self.path.embed(t)
            if told.dim():
                return sent(told, value.device, torch.float32)
            # A number is filled in where it is needed; a copy would wait for the device.
            return torch.full((len(value),), float(told), dtype=torch.float32, device=value.device)

        first = next(iter(x.values()))
        time = tuple(x.map(told, t).values()) if isinstance(t, Media) else told(first, t)
        out = net(*x.values(), time=time, **cond)
        out = Media(zip(x, out if isinstance(out, tuple) else (out,), strict=True))
        if not self.learned_variance:
            return out, None
        halves = out.map(lambda v: v.chunk(2, dim=1))
        return halves.map(lambda h: h[0]), halves.map(lambda h: h[1].float())

    def _decode(self, x, out, alpha, sigma) -> tuple[Media, Media]:
        def x0(v, o, a, s):
            pair = self._pair(a, s)
            d = det(a, s, pair)
            return rows(pair[1] / d, v) * v - rows(s / d, v) * o.float()

        def eps(v, o, a, s):
            pair = self._pair(a, s)
            d = det(a, s, pair)
            return rows(a / d, v) * o.float() - rows(pair[0] / d, v) * v

        return x.map(x0, out, alpha, sigma), x.map(eps, out, alpha, sigma)

    def _bound(self, spread: Tensor, found: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Nichol and Dhariwal 2021, equation 4, in bits per element [B]."""
        step = self.path.t_min
        s = (t - step).clamp(min=0.0)
        small, large = posterior_variance(self.path, t, s)
        # The last step has no posterior variance; the one before it stands in.
        first = s < step / 2
        small = torch.where(first, posterior_variance(self.path, t + step, t)[0], small)
        low, high = rows(small.log(), x), rows(large.log(), x)
        log_var = low + (spread + 1) / 2 * (high - low)
        mean = posterior_mean(self.path, x, found.detach(), t, s)
        true = posterior_mean(self.path, x, x0, t, s)
        kl = 0.5 * (log_var - low + (low - log_var).exp() - 1)
        kl = kl + 0.5 * (true - mean).square() * (-log_var).exp()
        nats = torch.where(rows(first, x).bool(), -_log_likelihood(x0, mean, log_var), kl)
        return nats.flatten(1).mean(1) / math.log(2)


def _log_likelihood(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Log probability of x in bins of 2/255, open at both ends (Ho et al. 2020, equation 13)."""

    def below(value: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
        return 0.5 * (1 + torch.tanh(inner))

    inverse = (-0.5 * log_var).exp()
    upper = below(inverse * (x - mean + 1 / 255))
    lower = below(inverse * (x - mean - 1 / 255))
    share = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return share.clamp(min=1e-12).log()
