"""Zhao et al. 2023, "UniPC: A unified predictor-corrector framework for fast sampling"."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from avdiffusion.samplers.sampler import Sampler

VARIANTS = ("bh1", "bh2")


@dataclass(kw_only=True)
class UniPC(Sampler):
    """Multistep UniPC-`order` on x0 (section 3), in which an evaluation serves two ends.

    It corrects the state it was made at and predicts the next; the last is only predicted. Order of
    convergence: up to `order` + 1, but 2 where `lower_order_final` lets the last steps' order fall
    to 1, which is steadier with few steps.
    `variant`: B(h) is h ("bh1") or 1 - e^-h ("bh2"). A step of infinite h is of first order.
    """

    steps: int = 20
    grid: str = "log_snr"
    order: int = 2
    variant: str = "bh2"
    lower_order_final: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order} is not 1, 2 or 3")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r} is not one of {', '.join(VARIANTS)}")

    def solve(self, denoise, x, path, times, noise):
        left, points, step = len(times) - 1, [], None
        for t, s in pairwise(times):
            x0 = denoise(x, t).x0
            points = [(path.lam(t), x0), *points[: self.order - 1]]
            if step is not None:
                base, scale, h, used = step
                x = self._follow(base, scale, h, [*used, points[0]])
            ratio, h = path.sigma(s) / path.sigma(t), path.lam(s) - path.lam(t)
            x = ratio * x + (path.alpha(s) - ratio * path.alpha(t)) * x0
            if h.isfinite():
                used = points[: left if self.lower_order_final else None]
                step = x, path.alpha(s), h, used
                x = self._follow(*step)
            else:  # of first order, and too far away to tell a slope
                points, step = [], None
            left -= 1
            yield x

    def _follow(self, base, scale, h, points):
        """The first-order step to `base`, and what x0 changes by from the first point to others."""
        (start, x0), *others = points
        places = [(lam - start) / h for lam, _ in others]
        for weight, place, (_, other) in zip(self._weights(places, h), places, others, strict=True):
            base = base + scale * weight / place * (other - x0)
        return base

    def _weights(self, places, h):
        """Of each change per place: those that integrate polynomials exactly.

        `places` are in steps of h. One alone counts B(h) / 2; of several B(h) cancels out.
        """
        rest = -torch.expm1(-h)
        if len(places) < 2:
            return [(h if self.variant == "bh1" else rest) / 2] * len(places)
        integrals = []  # of e^(h place - h) place^power over the step
        for power in range(1, len(places) + 1):
            rest = 1 - power / h * rest
            integrals.append(rest)
        powers = torch.stack(places) ** torch.arange(len(places))[:, None]
        return torch.linalg.solve(powers, torch.stack(integrals))
