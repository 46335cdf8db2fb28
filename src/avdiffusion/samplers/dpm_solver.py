"""Lu et al. 2022a, "DPM-Solver", and 2022b, "DPM-Solver++"."""

import math
from dataclasses import dataclass
from itertools import zip_longest

import torch

from avdiffusion.media import Media
from avdiffusion.samplers.sampler import Sampler

FORMS = ("data", "noise")
METHODS = ("multistep", "singlestep", "singlestep_fixed", "adaptive")
ERRORS = ("sample", "batch")
FEW = 15  # steps below which the last ones are of lower order
PATIENCE = 10_000  # evaluations after which an adaptive walk is given up
# Inner points of a step of its own, as shares of h.
SHARES = {2: (0.0, 1 / 2, 1.0), 3: (0.0, 1 / 3, 2 / 3, 1.0)}


@dataclass(kw_only=True)
class DPMSolver(Sampler):
    """Steps of h in lambda = log(alpha / sigma); `steps` evaluations, whatever the order.

    `form`: what a step takes to vary slowly, x0 ("data", DPM-Solver++) or eps ("noise",
    DPM-Solver). `method`: "multistep" reuses earlier evaluations; "singlestep" makes several in
    each step, the last steps being of lower order so that `steps` comes out; "singlestep_fixed"
    has a lower order only where `order` does not divide `steps`. A step from or to infinite lambda
    is of first order.

    `lower_order_final`: multistep with fewer than 15 steps ends in steps of lower order, without
    which few steps are unstable. `denoise_last`: one evaluation more, at the end time, whose x0 is
    the sample (none where nothing is left of the noise).

    "adaptive" (2022a, appendix C) finds its own steps and uses neither `steps`, `grid` nor `shift`:
    orders `order` and one less agree to max(atol, rtol |x|) in each, the first step is `h_init`, a
    new one at most the share `theta` of what the error allows, and the end is met to `t_err`. Its
    `error` is judged per "sample", each with steps of its own, or as the worst of the "batch".
    """

    steps: int = 20
    grid: str = "log_snr"
    form: str = "data"
    method: str = "multistep"
    order: int = 2
    lower_order_final: bool = True
    denoise_last: bool = False
    atol: float = 0.0078
    rtol: float = 0.05
    h_init: float = 0.05
    theta: float = 0.9
    t_err: float = 1e-5
    error: str = "sample"

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("form", FORMS), ("method", METHODS), ("error", ERRORS)):
            if vars(self)[name] not in known:
                raise ValueError(f"{name}={vars(self)[name]!r} is not one of {', '.join(known)}")
        if self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order} is not one of 1, 2, 3")
        if self.method == "adaptive" and self.order == 1:
            raise ValueError("method=adaptive compares order with one less: order=1 has none")
        for name in ("atol", "h_init", "t_err"):
            if not vars(self)[name] > 0:
                raise ValueError(f"{name}={vars(self)[name]} is not above 0")
        if not self.rtol >= 0:
            raise ValueError(f"rtol={self.rtol} is below 0")
        if not 0 < self.theta < 1:
            raise ValueError(f"theta={self.theta} is not between 0 and 1")

    @property
    def together(self):
        return self.method != "adaptive" or self.error == "batch"

    def times(self, path, t_start=None, t_end=None):
        """The two ends alone where the solver finds its own times."""
        if self.method != "adaptive":
            return super().times(path, t_start, t_end)
        start = path.t_max if t_start is None else t_start
        return torch.tensor([start, max(t_end or 0.0, path.t_min)], dtype=torch.float64)

    def solve(self, denoise, x, path, times, noise):
        count = len(next(iter(x.values())) if isinstance(x, Media) else x)
        if self.together or count == 1:
            yield from self._walk(denoise, x, path, times)
            return
        now = [_part(x, i) for i in range(count)]
        for states in zip_longest(*(self._walk(denoise, part, path, times) for part in now)):
            # One that has arrived waits for the others.
            now = [old if new is None else new for old, new in zip(now, states, strict=True)]
            yield _joined(now)

    def _walk(self, denoise, x, path, times):
        ways = {"multistep": self._multistep, "adaptive": self._adaptive}
        for state in ways.get(self.method, self._singlestep)(denoise, x, path, times):
            x = state
            yield x
        if self.denoise_last and path.sigma(times[-1]) > 0:
            yield denoise(x, times[-1]).x0

    def _multistep(self, denoise, x, path, times):
        lam, count, past = path.lam(times), len(times) - 1, []
        for i in range(count):
            found, t, h = denoise(x, times[i]), times[i + 1], lam[i + 1] - lam[i]
            x = _first(path, found, t)
            if h.isfinite():  # else no later step could tell how far away its evaluation was
                past = [(lam[i], self._slow(found)), *past][: self.order]
                last = self.lower_order_final and count < FEW
                order = min(len(past), count - i) if last else len(past)
                x = self._extrapolated(x, path, t, h, past[:order])
            yield x

    def _extrapolated(self, x, path, t, h, past):
        """A first-order x and what the change over `past`, newest first, adds to it."""
        if len(past) < 2:
            return x
        one, two, three = self._weights(path, t, h)
        (lam, m), (lam_1, m_1) = past[:2]
        r0 = (lam - lam_1) / h
        change = (m - m_1) / r0
        if len(past) == 2:
            return x + one / 2 * change
        lam_2, m_2 = past[2]
        r1 = (lam_1 - lam_2) / h
        # `three` counts half of what a parabola through the three points bends by, as the authors
        # have it: of order 2 in the limit, but with x0 and 15 to 30 steps nearer than the whole.
        bend = (change - (m_1 - m_2) / r1) / (r0 + r1)
        return x + two * (change + r0 * bend) + three * bend

    def _singlestep(self, denoise, x, path, times):
        place = 0
        for order in self._orders(path.lam(times).diff().isinf().tolist()):
            here = times[place : place + order + 1]
            x = self._step(denoise, denoise(x, here[0]), path, here)[-1]
            place += order
            yield x

    def _orders(self, infinite: list[bool]) -> list[int]:
        """Of the steps, each of which spans as many of the grid's intervals."""
        finite = infinite.count(False)
        orders = [self.order] * (finite // self.order)
        if finite % self.order:
            orders.append(finite % self.order)
        elif self.method == "singlestep" and self.order == 3 and finite:
            orders[-1:] = [2, 1]  # as DPM-Solver-fast of 2022a does
        return [1] * infinite[0] + orders + [1] * (sum(infinite) - infinite[0])

    def _step(self, denoise, found, path, times):
        """At the last of `times`: solutions of order 1 and up, by evaluating those in between.

        `found` is the prediction at the first (2022a, algorithms 1 and 2; 2022b, algorithm 1).
        """
        _, *inner, t = times
        states = [_first(path, found, t)]
        if not inner:
            return states
        lam, m = path.lam(times), self._slow(found)
        h, r1 = lam[-1] - lam[0], (lam[1] - lam[0]) / (lam[-1] - lam[0])
        one, two, _ = self._weights(path, t, h)
        change = self._slow(denoise(_first(path, found, inner[0]), inner[0])) - m
        states.append(states[0] + one / (2 * r1) * change)
        if len(inner) == 2:
            r2 = (lam[2] - lam[0]) / h
            _, bend, _ = self._weights(path, inner[1], r2 * h)
            x = _first(path, found, inner[1]) + r2 / r1 * bend * change
            states.append(states[0] + two / r2 * (self._slow(denoise(x, inner[1])) - m))
        return states

    def _adaptive(self, denoise, x, path, times):
        t, end = times[0], times[-1]
        target, evaluations, found = path.lam(end), 0, None
        if path.lam(t).isinf():
            s = path.time(target.clamp(max=-7.0))
            x = _first(path, denoise(x, t), s)
            t, evaluations = s, 1
            yield x
        share = torch.tensor(SHARES[self.order], dtype=torch.float64)
        before, h = x, self.h_init
        while t - end > self.t_err:
            left = float(target - path.lam(t))
            h = min(h, left)
            points = path.time(path.lam(t) + h * share)
            points[0], points[-1] = t, end if h == left else points[-1]
            if found is None:  # else a smaller step is tried from the same prediction
                found, evaluations = denoise(x, t), evaluations + 1
            evaluations += self.order - 1
            *_, low, high = self._step(denoise, found, path, points)
            error = self._distance(low, high, before)
            if not math.isfinite(error):
                raise ValueError(
                    f"the adaptive solver met values that are not finite at t={float(t):.4g}: "
                    "use guide=[clamp] or method=multistep"
                )
            if error <= 1:
                x, before, t, found = high, low, points[-1], None
                yield x
            h *= self.theta * max(error, 1e-12) ** (-1 / self.order)
            if evaluations > PATIENCE:
                raise ValueError(
                    f"the adaptive solver is at t={float(t):.4g} after {evaluations} evaluations: "
                    "raise atol or rtol, or use method=multistep"
                )

    def _distance(self, low, high, before) -> float:
        """Root mean square of the difference in tolerances: the worst sample's and modality's."""

        def worst(low, high, before):
            allowed = (self.rtol * torch.maximum(low.abs(), before.abs())).clamp(min=self.atol)
            square = ((high - low) / allowed).square()
            return square.reshape(len(square), -1).mean(1).sqrt().max()

        if isinstance(low, Media):
            return float(torch.stack(list(low.map(worst, high, before).values())).max())
        return float(worst(low, high, before))

    def _slow(self, found):
        return found.x0 if self.form == "data" else found.eps

    def _weights(self, path, t, h):
        """What the prediction's value, slope and bend over a step of h to t count for in x_t."""
        z, scale = (-h, -path.alpha(t)) if self.form == "data" else (h, -path.sigma(t))
        one = torch.expm1(z)
        two = one / z - 1
        return scale * one, scale * two, scale * (two / z - 0.5)


def _first(path, found, t):
    """The step of first order, alike in both forms, and finite wherever it leads."""
    return path.alpha(t) * found.x0 + path.sigma(t) * found.eps


def _part(x, i):
    return x.map(lambda v: v[i : i + 1]) if isinstance(x, Media) else x[i : i + 1]


def _joined(parts):
    if isinstance(parts[0], Media):
        return Media({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return torch.cat(parts)
