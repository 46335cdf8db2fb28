"""From clips back to the noise they come from, and what lies between two of either."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from avdiffusion.diffusion.guide import Denoise
from avdiffusion.diffusion.path import Path
from avdiffusion.media import Media

Blend = Callable[[Tensor, Tensor, float], Tensor]  # of two, by the share of the second


def invert(
    denoise: Denoise, x: Media | Tensor, path: Path, times: Tensor, *, refine: int = 3
) -> Media | Tensor:
    """The state at the first of falling `times` that deterministic DDIM brings to x at the last.

    Its steps are taken in reverse. What is predicted before a step stands for what will be
    predicted after it, so each is then corrected `refine` times by what the step back misses (a
    fixed point, as of Pan et al. 2023); on data like N(0, 1) once is exact. A step costs 1 +
    `refine` evaluations.
    """
    for t, s in pairwise(times.flip(0)):
        start, x = x, _step(denoise(x, t.clamp(min=path.t_min)), path, s)
        alpha, sigma = path.alpha(s), path.sigma(s)
        gain = (alpha**2 + sigma**2) / (path.alpha(t) * alpha + path.sigma(t) * sigma)
        for _ in range(refine):
            x = x + gain * (start - _step(denoise(x, s), path, t))
    return x


def _step(found, path, t):
    return path.alpha(t) * found.x0 + path.sigma(t) * found.eps


def slerp(u: Tensor, v: Tensor, weight: float) -> Tensor:
    """Between u and v [B, ...] on a great circle of each sample, at `weight` of the angle.

    Shoemake 1985, of directions; norms go in proportion. What lies between two noises is so as
    large as they are, where a line would pass nearer to zero. At 0 and 1 it is u and v, bit for
    bit. Vectors that point the same way, or to opposite ones, have no such circle, but a line.
    """
    if weight in (0, 1):
        return v if weight else u
    a, b = u.double().flatten(1), v.double().flatten(1)
    angle = F.cosine_similarity(a, b).clamp(-1, 1).acos()[:, None]
    turned = (1 - weight) * angle, weight * angle
    way = turned[0].sin() * F.normalize(a) + turned[1].sin() * F.normalize(b)
    norm = torch.lerp(a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True), weight)
    curve, line = way / angle.sin() * norm, torch.lerp(a, b, weight)
    return torch.where(angle.sin() < 1e-4, line, curve).view_as(u).to(u.dtype)


def morph(u: Tensor, v: Tensor, count: int, blend: Blend = slerp) -> Tensor:
    """`count` clips [B, count, C, T, ...] that lie evenly between two, both ends included."""
    return torch.stack([blend(u, v, weight) for weight in shares(count)], 1)


def transition(u: Tensor, v: Tensor, blend: Blend = slerp) -> Tensor:
    """One clip [B, C, T, ...] that begins as u and ends as v."""
    frames = zip(u.unbind(2), v.unbind(2), shares(u.shape[2]), strict=True)
    return torch.stack([blend(*frame) for frame in frames], 2)


def shares(count: int) -> list[float]:
    """Evenly from 0 to 1; of one, the middle."""
    return [0.5] if count == 1 else [k / (count - 1) for k in range(count)]
