"""DPM-Solver in every form, method and order, on a Gaussian whose answer is known and recorded."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from golden_media import close
from test_samplers import ON_EVERY_PATH, PATHS, double, gaussian, normal

from avdiffusion.diffusion.diffusion import Prediction
from avdiffusion.diffusion.guide import Clamp, IntegerTimes, Task, Threshold
from avdiffusion.diffusion.path import RectifiedFlow
from avdiffusion.media import Media
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.dpm_solver import DPMSolver
from avdiffusion.samplers.sampler import last

FORMS = pytest.mark.parametrize("form", ["data", "noise"])
FIXED = ("multistep", "singlestep", "singlestep_fixed")
METHODS = pytest.mark.parametrize("method", FIXED)
ORDERS = pytest.mark.parametrize("order", [1, 2, 3])


class Counted:
    """A denoiser that remembers the times it was asked at and how many samples it was handed."""

    def __init__(self, denoise):
        self.denoise, self.times, self.rows = denoise, [], []

    def __call__(self, x, t):
        assert t.dtype == torch.float64
        assert t.dim() == 0
        self.times.append(float(t))
        self.rows.append(len(next(iter(x.values())) if isinstance(x, Media) else x))
        return self.denoise(x, t)


# ---------------------------------------------------------------------------- steps that are given


@ON_EVERY_PATH
@FORMS
@METHODS
@ORDERS
def test_order_of_convergence(order, method, form, path):
    """Halving the steps divides the error by 2^order.

    Singlestep of order 3 has that order where its last step has at least order 2. Multistep's is 2
    as published: that its third evaluation is of use shows in the size of the error.
    """
    denoise, solution = gaussian(path)
    x = normal(256)
    exact = solution(x, double(0.9), double(0.3))

    def errors(order, counts):
        for n in counts:
            sampler = DPMSolver(form=form, method=method, order=order, steps=n)
            found = last(sampler(denoise, x, path, t_start=0.9, t_end=0.3))
            yield float((found - exact).abs().max())

    counts = [98, 194, 386] if (order, method) == (3, "singlestep") else [96, 192, 384]
    found = list(errors(order, counts))
    expected = min(order, 2 if method == "multistep" else 3)
    for coarse, fine in pairwise(found):
        assert coarse / fine > 2 ** (expected - 0.4), found
    if order > 1:
        assert found[-1] < 0.6 * next(errors(order - 1, counts[-1:]))


@ON_EVERY_PATH
@pytest.mark.parametrize("grid", ["log_snr", "trailing", "time_uniform"])
@FORMS
@METHODS
@ORDERS
def test_the_whole_way_from_noise_to_data(order, method, form, grid, path):
    """Also where lambda is infinite at one end or both, in float32."""
    denoise, solution = gaussian(path)
    x = (path.sigma(double(path.t_max)) * normal(64)).float()
    counted = Counted(denoise)
    sampler = DPMSolver(form=form, method=method, order=order, grid=grid, steps=60)
    states = list(sampler(counted, x, path))
    assert all(torch.isfinite(state).all() and state.dtype == torch.float32 for state in states)
    assert len(counted.times) == 60
    assert counted.times == sorted(counted.times, reverse=True)
    if (path, form) == (PATHS["cosine"], "noise") and grid != "log_snr" and method != "multistep":
        return  # its first step is so long in lambda that eps inside it says nothing of its end
    exact = solution(x.double(), double(path.t_max), double(path.t_min))
    assert float((states[-1] - exact).abs().max()) < 0.1


@pytest.mark.parametrize("grid", ["log_snr", "trailing"])
@pytest.mark.parametrize("path", ["flow", "linear"])
@METHODS
@ORDERS
def test_evaluations_are_steps(order, method, path, grid):
    """Whatever the order divides, with infinite first and last intervals or without."""
    path = PATHS[path]
    for steps in range(1, 12):
        denoise = Counted(gaussian(path)[0])
        sampler = DPMSolver(method=method, order=order, steps=steps, grid=grid)
        states = list(sampler(denoise, normal(3), path))
        assert len(denoise.times) == steps
        assert denoise.times == sampler.times(path)[:-1].tolist()
        assert len(states) == steps if method == "multistep" else len(states) <= steps


@pytest.mark.parametrize(
    ("steps", "order", "stops"),
    [
        (7, 3, [3, 6, 7]),
        (8, 3, [3, 6, 8]),
        (9, 3, [3, 6, 8, 9]),
        (3, 3, [2, 3]),
        (7, 2, [2, 4, 6, 7]),
        (4, 1, [1, 2, 3, 4]),
    ],
)
def test_singlestep_plans_its_orders(steps, order, stops):
    """Spec 3.3: each state is at the time its step ends."""
    path = PATHS["linear"]
    sampler = DPMSolver(method="singlestep", order=order, steps=steps)
    times = sampler.times(path)
    denoise = Counted(gaussian(path)[0])
    counts = [len(denoise.times) for _ in sampler(denoise, normal(3), path)]
    assert counts == stops
    # Where all predict the same data, every step is exact, and shows where it went.
    x0, eps = normal(3), normal(3, seed=1)
    states = sampler(lambda x, t: Prediction(x0, eps), normal(3), path)
    for place, state in zip(stops, states, strict=True):
        at = path.alpha(times[place]) * x0 + path.sigma(times[place]) * eps
        torch.testing.assert_close(state, at)


@ON_EVERY_PATH
@FORMS
@METHODS
def test_the_first_order_is_ddim(method, form, path):
    x = normal(2, 50)
    for grid in ("log_snr", "trailing"):
        ours = DPMSolver(form=form, method=method, order=1, steps=9, grid=grid)
        states = list(ours(gaussian(path)[0], x, path))
        theirs = list(DDIM(steps=9, grid=grid)(gaussian(path)[0], x, path))
        for a, b in zip(states, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [2, 3])
def test_few_steps_end_in_lower_orders(order):
    path = PATHS["linear"]
    denoise, _ = gaussian(path)
    x = normal(50)

    def run(**settings):
        return list(DPMSolver(order=order, **settings)(denoise, x, path))

    lower, full = run(steps=8), run(steps=8, lower_order_final=False)
    same = [torch.equal(a, b) for a, b in zip(lower, full, strict=True)]
    assert same == [True] * (9 - order) + [False] * (order - 1)
    times = DPMSolver(steps=8).times(path)
    found = denoise(lower[-2], times[-2])
    first = path.alpha(times[-1]) * found.x0 + path.sigma(times[-1]) * found.eps
    torch.testing.assert_close(lower[-1], first)
    assert torch.equal(run(steps=15)[-1], run(steps=15, lower_order_final=False)[-1])


def test_a_last_prediction_of_the_data():
    path = PATHS["linear"]
    denoise = Counted(gaussian(path)[0])
    x = normal(50)
    plain = list(DPMSolver(steps=6)(denoise, x, path))
    more = list(DPMSolver(steps=6, denoise_last=True)(denoise, x, path))
    assert len(denoise.times) == 6 + 7
    assert denoise.times[-1] == path.t_min
    assert len(more) == 7
    assert torch.equal(more[-2], plain[-1])
    assert torch.equal(more[-1], denoise(plain[-1], double(path.t_min)).x0)
    # At t = 0 there is nothing left to take away.
    clean = list(DPMSolver(steps=6, denoise_last=True, grid="trailing")(denoise, x, path))
    assert len(clean) == 6


# ----------------------------------------------------------------------- steps of its own choosing


def adaptive(**settings):
    return DPMSolver(method="adaptive", **settings)


def clips(count):
    """Samples whose ways differ: the first have more to lose."""
    scale = torch.linspace(3, 0.2, count).view(-1, 1)
    a, b = normal(count, 40, dtype=torch.float32), normal(count, 9, seed=1, dtype=torch.float32)
    return Media(a=scale * a, b=scale * b)


def bent(path):
    """Not linear in x, so that the error depends on where a sample is; modalities depend too."""

    def denoise(x, t):
        x0 = Media(
            a=torch.tanh(2 * x["a"] + x["b"].mean(1, keepdim=True)),
            b=torch.sin(3 * x["b"]) * x["a"].mean(1, keepdim=True),
        )
        return Prediction(x0, (x - path.alpha(t) * x0) / path.sigma(t))

    return denoise


@ON_EVERY_PATH
@FORMS
@pytest.mark.parametrize("order", [2, 3])
def test_tolerance_buys_evaluations_and_error(order, form, path):
    denoise, solution = gaussian(path)
    x = path.sigma(double(path.t_max)) * normal(1, 256)
    exact = solution(x, double(path.t_max), double(path.t_min))
    counts, errors = [], []
    for scale in (5e-3, 5e-4, 5e-5):
        counted = Counted(denoise)
        found = last(adaptive(form=form, order=order, atol=scale, rtol=scale)(counted, x, path))
        counts.append(len(counted.times))
        errors.append(float((found - exact).abs().max()))
    assert counts[0] < counts[1] < counts[2] < 1100
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] < 1
    assert errors[2] < 1e-3


@pytest.mark.parametrize("path", ["linear", "flow", "edm"])
@pytest.mark.parametrize("denoise_last", [False, True])
def test_a_sample_depends_on_no_other(denoise_last, path):
    path, x = PATHS[path], clips(4)
    sampler = adaptive(denoise_last=denoise_last)
    assert not sampler.together
    denoise = Counted(bent(path))
    states = list(sampler(denoise, x, path))
    assert set(denoise.rows) == {1}
    lengths = []
    for i in range(4):
        alone = list(sampler(bent(path), x.map(lambda v, i=i: v[i : i + 1]), path))
        lengths.append(len(alone))
        for name in x:
            for place, state in enumerate(states):
                assert torch.equal(state[name][i : i + 1], alone[min(place, len(alone) - 1)][name])
    assert len(states) == max(lengths)
    assert len(set(lengths)) > 1
    tensor = list(sampler(gaussian(path)[0], x["a"], path))
    part = list(sampler(gaussian(path)[0], x["a"][1:2], path))
    assert torch.equal(tensor[-1][1:2], part[-1])


def test_the_batch_may_be_judged_as_one():
    path, x = PATHS["linear"], clips(4)
    sampler = adaptive(error="batch")
    assert sampler.together
    assert DPMSolver().together
    denoise = Counted(bent(path))
    together = last(sampler(denoise, x, path))
    assert set(denoise.rows) == {4}
    apart = last(adaptive()(bent(path), x, path))
    assert not torch.equal(together["a"], apart["a"])
    first = x.map(lambda v: v[:1])
    alone = [list(adaptive(error=error)(bent(path), first, path)) for error in ("sample", "batch")]
    assert torch.equal(alone[0][-1]["a"], alone[1][-1]["a"])
    assert len(alone[0]) == len(alone[1])


def test_the_worst_modality_decides():
    """One that is hard slows one that is easy."""
    path = PATHS["linear"]

    def evaluations(x):
        denoise = Counted(gaussian(path)[0])
        last(adaptive(atol=1e-3, rtol=1e-3)(denoise, x, path))
        return len(denoise.times)

    easy, hard = 0.3 + torch.zeros(1, 500), 3 * normal(1, 4).float()
    alone = evaluations(Media(a=easy)), evaluations(Media(b=hard))
    assert alone[0] < alone[1] == evaluations(Media(a=easy, b=hard))


def test_ends_where_it_is_asked_to():
    denoise, solution = gaussian(PATHS["flow"])
    x = normal(1, 50)
    sampler = adaptive(atol=1e-5, rtol=1e-5)
    seen = Counted(denoise)
    found = last(sampler(seen, x, PATHS["flow"], t_start=0.8, t_end=0.4))
    assert max(seen.times) == 0.8
    assert min(seen.times) > 0.4
    assert float((found - solution(x, double(0.8), double(0.4))).abs().max()) < 1e-3
    assert adaptive().times(PATHS["flow"]).tolist() == [1.0, 1e-3]
    # From pure noise the first step goes to where lambda is finite; beyond the end it does not go.
    seen = Counted(denoise)
    states = list(sampler(seen, x, PATHS["flow"], t_end=0.9995))
    assert seen.times == [1.0]
    assert len(states) == 1


def test_a_step_tried_again_keeps_its_prediction():
    """The first of a step's evaluations is never made twice."""
    path = PATHS["linear"]
    denoise = Counted(gaussian(path)[0])
    states = list(adaptive(h_init=9.0)(denoise, normal(1, 50), path))
    assert len(set(denoise.times)) == len(denoise.times)
    assert len(denoise.times) > 2 * len(states) - 1


def test_a_walk_that_cannot_end_says_so():
    path, x = PATHS["linear"], normal(1, 50)
    exact = gaussian(path)[0]

    def rough(x, t):
        x0 = torch.sin(1e12 * t) * torch.ones_like(x)
        return Prediction(x0, (x - path.alpha(t) * x0) / path.sigma(t))

    with pytest.raises(ValueError, match=r"evaluations: raise atol or rtol"):
        last(adaptive(atol=1e-9, rtol=0.0)(rough, x, path))

    def broken(x, t):
        found = exact(x, t)
        return found if t > 0.5 else found._replace(x0=found.x0 * torch.nan)

    with pytest.raises(ValueError, match=r"not finite at t=0\.\d+: use guide"):
        last(adaptive()(broken, x, path))


def test_a_solution_without_error_takes_the_longest_step():
    path, x0, eps = PATHS["linear"], normal(1, 5), normal(1, 5, seed=1)
    states = list(adaptive()(lambda x, t: Prediction(x0, eps), x0, path))
    assert len(states) == 2


# ------------------------------------------------------------------------------------- elsewhere

# Spec 3.6: L2 norm and first three values of each modality after the published solver (noise form:
# with its first-order step for the second modality put right, which the first then feels).
SPEC = [
    (
        DPMSolver(form="noise", method="singlestep", order=3),
        (344.748049, [4.57162, 6.656738, 7.506631]),
        (139.780879, [9.378414, 18.149422, 13.993886]),
    ),
    (
        DPMSolver(method="singlestep", order=3),
        (335.255620, [4.469149, 6.49766, 7.324481]),
        (139.996009, [9.388039, 18.172935, 14.010813]),
    ),
    (
        adaptive(error="batch"),
        (22.077440, [0.34114, 0.475969, 0.530926]),
        (7.868903, [0.501883, 0.997663, 0.762772]),
    ),
    (
        DPMSolver(grid="time_uniform"),
        (343.570404, [4.571699, 6.650235, 7.497448]),
        (141.882178, [9.519261, 18.422127, 14.204127]),
    ),
    (
        DPMSolver(form="noise", grid="time_uniform"),
        None,
        (146.270656, [9.822518, 19.000032, 14.651904]),
    ),
    (
        adaptive(form="noise", order=3, error="batch"),
        (341.297548, [4.535108, 6.599676, 7.441192]),
        (140.070725, [9.396339, 18.185659, 14.021453]),
    ),
    (
        DPMSolver(method="singlestep", grid="quadratic"),
        (407.735414, [5.321361, 7.784449, 8.788407]),
        (167.844213, [11.314062, 21.841589, 16.853846]),
    ),
]


@pytest.mark.parametrize(("sampler", "video", "audio"), SPEC)
def test_figures_of_the_published_solver(sampler, video, audio):
    """On the closed form of spec 2.9, with truncated times."""
    path = PATHS["linear"]

    def network(x, t):
        s = path.embed(t) / 1000
        mean = x.map(lambda v: torch.tanh(v).flatten(1).mean(1))
        eps = Media(
            video=0.5 * x["video"] + 0.1 * s + 0.05 * mean["audio"].view(-1, 1, 1, 1, 1),
            audio=0.4 * x["audio"] - 0.05 * s + 0.02 * mean["video"].view(-1, 1, 1),
        )
        return Prediction((x - path.sigma(t) * eps) / path.alpha(t), eps)

    n, m = (torch.arange(count, dtype=torch.float64) for count in (1536, 128))
    x = Media(
        video=(1.3 * torch.sin(0.7 * n + 0.2) + 0.4 * torch.cos(1.9 * n)).view(2, 4, 3, 8, 8),
        audio=(1.1 * torch.sin(0.9 * m + 0.5)).view(2, 1, 64),
    ).to(torch.float32)
    denoise = IntegerTimes()(network, Task(path))
    if sampler.method == "adaptive" and sampler.form == "data":
        denoise = Threshold()(denoise, Task(path))
    found = last(sampler(denoise, x, path))
    for name, expected in (("video", video), ("audio", audio)):
        if expected is not None:
            norm, first = expected
            assert float(found[name].double().norm()) == pytest.approx(norm, rel=1e-4)
            close(found[name].flatten()[:3], first)


def test_wrong_settings_are_named():
    for settings, message in (
        ({"form": "eps"}, "form='eps' is not one of data, noise"),
        ({"method": "fast"}, "method='fast' is not one of multistep, singlestep, singlestep_fixed"),
        ({"error": "mean"}, "error='mean' is not one of sample, batch"),
        ({"order": 4}, "order=4 is not one of 1, 2, 3"),
        ({"method": "adaptive", "order": 1}, "method=adaptive compares .* order=1 has none"),
        ({"atol": 0.0}, "atol=0.0 is not above 0"),
        ({"rtol": -1.0}, "rtol=-1.0 is below 0"),
        ({"h_init": 0.0}, "h_init=0.0 is not above 0"),
        ({"t_err": -1.0}, "t_err=-1.0 is not above 0"),
        ({"theta": 1.0}, "theta=1.0 is not between 0 and 1"),
        ({"steps": 0}, "steps=0"),
    ):
        with pytest.raises(ValueError, match=message):
            DPMSolver(**settings)


# ------------------------------------------------------------------------------------ its guides


def wide(path, size):
    """Predictions of a given x0."""
    return lambda x, t: Prediction(size, (x - path.alpha(t) * size) / path.sigma(t))


@ON_EVERY_PATH
def test_threshold(path):
    """Each sample and modality by its own quantile; what is within the floor stays."""
    x0 = Media(
        a=torch.cat([5 * normal(1, 2, 300), 0.1 * normal(1, 2, 300, seed=1)]),
        b=2 * normal(2, 50, seed=2),
    )
    x, t = x0 + 0.1, double(0.4)
    found = Threshold(quantile=0.9)(wide(path, x0), Task(path))(x, t)
    for name in x0:
        for i in range(2):
            row = x0[name][i].flatten()
            # The order statistic at 0.9 of the way from the least to the greatest.
            size = row.abs().sort().values
            place = 0.9 * (len(size) - 1)
            low = int(place)
            edge = float(size[low] + (place - low) * (size[low + 1] - size[low]))
            edge = max(edge, 1.0)
            expected = row.clamp(-edge, edge) / edge
            torch.testing.assert_close(found.x0[name][i].flatten(), expected)
    assert torch.equal(found.x0["a"][1], x0["a"][1])
    assert float(found.x0["a"][0].abs().max()) == pytest.approx(1)
    made = path.alpha(t) * found.x0 + path.sigma(t) * found.eps
    for name in x0:
        torch.testing.assert_close(made[name], x[name])
    tensor = Threshold(quantile=0.9)(wide(path, x0["b"]), Task(path))(x["b"], t)
    assert torch.equal(tensor.x0, found.x0["b"])


def test_threshold_with_another_floor():
    path, x0 = PATHS["linear"], 9 * normal(2, 500)
    found = Threshold(floor=2.0)(wide(path, x0), Task(path))(x0, double(0.4)).x0
    assert float(found.abs().max()) == pytest.approx(2)
    assert torch.equal(
        Threshold(quantile=1.0, floor=99.0)(wide(path, x0), Task(path))(x0, double(0.4)).x0, x0
    )
    for settings, message in (
        ({"quantile": 0.0}, "quantile=0.0"),
        ({"quantile": 1.1}, "quantile=1.1"),
        ({"floor": 0.0}, "floor=0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Threshold(**settings)


def test_integer_times():
    """The table's step below t; exactly on a step, float32 says whether that or the one below."""
    path, told = PATHS["linear"], []
    exact = gaussian(path)[0]

    def denoise(x, t):
        told.append(float(path.embed(t)))
        return exact(x, t)

    truncated = IntegerTimes()(denoise, Task(path))
    x = normal(5)
    for t, step in ((1.0, 999), (0.9999, 998), (0.6675, 666), (0.001, 0), (0.0015, 0), (0.0, 0)):
        found = truncated(x, double(t))
        assert told[-1] == pytest.approx(step, abs=1e-9)
        made = path.alpha(double(t)) * found.x0 + path.sigma(double(t)) * found.eps
        torch.testing.assert_close(made, x)
        assert torch.equal(found.eps, exact(x, double((step + 1) / 1000)).eps)
    for step in range(999):
        truncated(x, double((step + 1.5) / 1000))
        assert told[-1] == pytest.approx(step, abs=1e-9)
        truncated(x, double((step + 1) / 1000))
        t = np.float32((step + 1) / 1000)
        assert told[-1] == pytest.approx(np.trunc((t - np.float32(0.001)) * np.float32(1000)))
    for path in (RectifiedFlow(), PATHS["edm"]):
        with pytest.raises(ValueError, match=f"{type(path).__name__} is no table of steps"):
            IntegerTimes()(denoise, Task(path))


@FORMS
@pytest.mark.parametrize("method", [*FIXED, "adaptive"])
def test_a_clamp_holds_in_every_method(method, form):
    path = PATHS["flow"]
    held = Clamp(low=-0.5, high=0.5)(gaussian(path, spread=3.0)[0], Task(path))
    found = last(DPMSolver(method=method, form=form, steps=40)(held, 2 * normal(4, 50), path))
    assert float(found.abs().max()) < 0.6
