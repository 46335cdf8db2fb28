"""Averages of weights whose width is chosen after training (Karras et al. 2024a, section 3)."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

WIDEST = 12**-0.5  # standard deviation of the plain mean of all steps, gamma = 0


class PowerEMA(nn.Module):
    """Averages of a model with power-function profiles, one for each relative width `sigma_rels`.

    After t updates the weights of update tau <= t count as tau^gamma, whatever t: a profile keeps
    its shape while it stretches over the run. That is a moving average with decay
    (1 - 1/t)^(gamma + 1). The first one, `ema_model`, is what validation and sampling use; together
    they span the others (`coefficients`). An update waits for no device.
    """

    def __init__(self, model: nn.Module, *, sigma_rels: Sequence[float] = (0.05, 0.10)):
        super().__init__()
        if not sigma_rels or len(set(sigma_rels)) < len(sigma_rels):
            raise ValueError(f"sigma_rels={list(sigma_rels)} has to name widths, each once")
        self.gammas = [gamma(width) for width in sigma_rels]
        self.online = [model]  # in a list, so that it is no part of this module
        copies = [deepcopy(model).requires_grad_(False) for _ in sigma_rels]
        self.ema_model, self.others = copies[0], nn.ModuleList(copies[1:])
        self.register_buffer("step", torch.tensor(0))
        self.count = 0  # the same number, where reading it costs nothing
        self.register_load_state_dict_post_hook(_recount)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's present weights into every average."""
        self.count += 1
        self.step += 1
        online = _tensors(self.online[0])
        floats = [k for k, value in enumerate(online) if value.is_floating_point()]
        for exponent, average in zip(self.gammas, (self.ema_model, *self.others), strict=True):
            kept = _tensors(average)
            weight = 1 - decay(exponent, self.count)
            torch._foreach_lerp_([kept[k] for k in floats], [online[k] for k in floats], weight)
            for k in set(range(len(kept))).difference(floats):
                kept[k].copy_(online[k])

    def get_current_decay(self) -> float:
        """The decay of `ema_model` in the last update."""
        return decay(self.gammas[0], max(1, self.count))


def _tensors(model: nn.Module) -> list[Tensor]:
    return list(chain(model.parameters(), model.buffers()))


def _recount(module: PowerEMA, _: object) -> None:
    module.count = int(module.step)


def places(count: int) -> list[str]:
    """Where a `PowerEMA` of `count` widths keeps its averages."""
    return ["ema_model", *(f"others.{k}" for k in range(count - 1))]


def gamma(sigma_rel: float) -> float:
    """The exponent of the profile whose standard deviation is this share of the run's length.

    The positive root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel={sigma_rel} is not within 0 and {WIDEST:.3f}, the plain mean")
    per = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - per, 12 - per]).real.max()))


def decay(gamma: float, t: int) -> float:
    """What update t leaves of the average before it."""
    return (1 - 1 / t) ** (gamma + 1)


def inner(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """The integral of the product of two profiles p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1).

    Each is zero after its own t.
    """
    ratio, last = t_a / t_b, np.maximum(t_a, t_b)
    ratio = ratio ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * last)


def coefficients(
    t: Sequence[int], gammas: Sequence[float], goal_t: int, goal_gamma: float
) -> tuple[np.ndarray, float]:
    """The combination of profiles closest to another one, and how far off that is.

    Least squares, with the sum held at 1: a weight that never moved comes out as it is, however
    few profiles there are. The distance is relative to the goal's norm.
    """
    t, gammas = np.asarray(t, float), np.asarray(gammas, float)
    goal = np.array(goal_t, float), np.array(goal_gamma, float)
    gram = inner(t[:, None], gammas[:, None], t[None], gammas[None])
    reach, norm = inner(t, gammas, *goal), inner(*goal, *goal)
    # With x = e_k + sum over the others of y_i (e_i - e_k), no condition is left; k is the nearest.
    k = int(np.argmax(reach / np.sqrt(np.diag(gram))))
    rest = np.delete(np.arange(len(t)), k)
    cross = gram[rest, k]
    differences = gram[np.ix_(rest, rest)] - cross[:, None] - cross[None] + gram[k, k]
    y = np.linalg.lstsq(differences, reach[rest] - cross - reach[k] + gram[k, k], rcond=None)[0]
    x = np.empty(len(t))
    x[rest], x[k] = y, 1 - y.sum()
    distance = norm - 2 * x @ reach + x @ gram @ x
    return x, float(np.sqrt(max(0.0, distance) / norm))
