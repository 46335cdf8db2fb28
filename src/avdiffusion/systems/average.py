"""Averages of weights: of a fixed decay, and of a width that is chosen after training.

None of their updates waits for a device: what they count is kept on the host as well.
"""

from collections.abc import Sequence
from copy import deepcopy
from itertools import chain

import ema_pytorch
import numpy as np
import torch
from torch import Tensor, nn

WIDEST = 12**-0.5  # standard deviation of the plain mean of all steps, gamma = 0


class EMA(ema_pytorch.EMA):
    """ema-pytorch's average, to the bit, with its state: decay min(beta, 1 - (1 + n/gamma)^-power).

    The defaults give the warm-up (1 + n) / (10 + n) after n updates. The library reads its counters
    from the device at every update.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float = 0.9999,
        inv_gamma: float = 9.0,
        power: float = 1.0,
        min_value: float = 0.0,
        update_every: int = 1,
        update_after_step: int = 0,
    ):
        super().__init__(
            model,
            beta=beta,
            inv_gamma=inv_gamma,
            power=power,
            min_value=min_value,
            update_every=update_every,
            update_after_step=update_after_step,
            include_online_model=False,
            use_foreach=True,
        )
        self.pair = Tensors(self.ema_model), Tensors(model)
        self.count, self.begun = 0, False  # `step` and `initted`, where reading costs nothing
        self.register_load_state_dict_post_hook(_recount)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's present weights into the average."""
        step = self.count
        self.count += 1
        self.step += 1
        if self.begun and step % self.update_every:
            return
        if self.begun and step > self.update_after_step:
            if not self.is_frozen:
                weight = 1 - self.get_current_decay()
                torch._foreach_lerp_(*(floats(each()) for each in self.pair), weight)
            return
        self.copy_params_from_model_to_ema()
        self.initted.fill_(True)
        self.begun = True

    def get_current_decay(self) -> float:
        """The decay of the last update, in float32 as the library has it."""
        n = max(0, self.count - self.update_after_step - 1)
        if n == 0:
            return 0.0
        n = torch.tensor(n, dtype=torch.float32, device="cpu")
        value = 1 - (1 + n / self.inv_gamma) ** -self.power
        return float(value.clamp(self.min_value, self.beta))


class PowerEMA(nn.Module):
    """Averages of a model with power-function profiles, one for each relative width `sigma_rels`.

    After t updates the weights of update tau <= t count as tau^gamma, whatever t: a profile keeps
    its shape while it stretches over the run. That is a moving average with decay
    (1 - 1/t)^(gamma + 1). The first one, `ema_model`, is what validation and sampling use; together
    they span the others (`coefficients`).
    """

    def __init__(self, model: nn.Module, *, sigma_rels: Sequence[float] = (0.05, 0.10)):
        super().__init__()
        if not sigma_rels or len(set(sigma_rels)) < len(sigma_rels):
            raise ValueError(f"sigma_rels={list(sigma_rels)} has to name widths, each once")
        self.gammas = [gamma(width) for width in sigma_rels]
        self.online = [model]  # in a list, so that it is no part of this module
        self.source = Tensors(model)
        copies = [deepcopy(model).requires_grad_(False) for _ in sigma_rels]
        self.ema_model, self.others = copies[0], nn.ModuleList(copies[1:])
        self.tracks = [Tensors(copy) for copy in copies]
        self.register_buffer("step", torch.tensor(0))
        self.count = 0  # the same number, where reading it costs nothing
        self.register_load_state_dict_post_hook(_recount)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's present weights into every average."""
        self.count += 1
        self.step += 1
        online = self.source()
        for exponent, track in zip(self.gammas, self.tracks, strict=True):
            kept, weight = track(), 1 - decay(exponent, self.count)
            torch._foreach_lerp_(floats(kept), floats(online), weight)
            for mine, value in zip(kept, online, strict=True):
                if not value.is_floating_point():
                    mine.copy_(value)

    def get_current_decay(self) -> float:
        """The decay of `ema_model` in the last update."""
        return decay(self.gammas[0], max(1, self.count))


class Tensors:
    """A model's parameters and buffers as a list, without a walk through all modules each time."""

    def __init__(self, model: nn.Module):
        self.owners = [m for m in model.modules() if m._parameters or m._buffers]

    def __call__(self) -> list[Tensor]:
        kept = (chain(m._parameters.values(), m._buffers.values()) for m in self.owners)
        found = [value for values in kept for value in values if value is not None]
        return list(dict.fromkeys(found))  # those that modules share once


def floats(tensors: list[Tensor]) -> list[Tensor]:
    return [value for value in tensors if value.is_floating_point()]


def _recount(module: EMA | PowerEMA, _: object) -> None:
    module.count = int(module.step)
    if isinstance(module, EMA):
        module.begun = bool(module.initted)


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
