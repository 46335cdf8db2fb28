"""Every sampler in the folder, on every path, against a Gaussian whose answer is known.

A new file in `samplers/` is tested as soon as it exists.
"""

import dataclasses
import importlib
import pkgutil
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import avdiffusion.samplers
from avdiffusion.diffusion.diffusion import Prediction
from avdiffusion.diffusion.grid import GRIDS
from avdiffusion.diffusion.path import EDM, CosineVP, DiscreteVP, RectifiedFlow
from avdiffusion.media import Media
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.samplers.euler import Euler, EulerAncestral
from avdiffusion.samplers.heun import Heun
from avdiffusion.samplers.sampler import Sampler, last
from avdiffusion.samplers.sde_dpm_solver import SDEDPMSolver
from avdiffusion.samplers.unipc import UniPC

PATHS = {
    "linear": DiscreteVP(),
    "cosine": DiscreteVP(betas="cosine"),
    "flow": RectifiedFlow(),
    "quarter": CosineVP(),
    "edm": EDM(),
}
MEAN, SPREAD = 0.3, 0.5


def samplers():
    """Every concrete Sampler that the modules of the folder define."""
    for module in pkgutil.iter_modules(avdiffusion.samplers.__path__):
        module = importlib.import_module(f"avdiffusion.samplers.{module.name}")
        for kind in vars(module).values():
            defined = isinstance(kind, type) and kind.__module__ == module.__name__
            if defined and issubclass(kind, Sampler) and kind is not Sampler:
                yield kind


class Seeded:
    """Step noise that depends on the number of the call and the shape, so that parts agree."""

    def __init__(self, seed=0):
        self.seed, self.calls = seed, 0

    def like(self, x):
        self.calls += 1
        if isinstance(x, Media):
            return x.map(self.draw)
        return self.draw(x)

    def draw(self, v):
        rng = torch.Generator().manual_seed(1_000_003 * self.seed + 1009 * self.calls + v.dim())
        return torch.randn(v.shape, generator=rng, dtype=v.dtype)


def gaussian(path, mean=MEAN, spread=SPREAD):
    """The exact prediction where the data is normal, and the exact solution of its ODE."""

    def power(t):
        return path.alpha(t) ** 2 * spread**2 + path.sigma(t) ** 2

    def denoise(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        x0 = mean + alpha * spread**2 / power(t) * (x - alpha * mean)
        return Prediction(x0, (x - alpha * x0) / sigma)

    def solution(x, t, s):
        return path.alpha(s) * mean + (power(s) / power(t)).sqrt() * (x - path.alpha(t) * mean)

    return denoise, solution


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def double(value):
    return torch.tensor(value, dtype=torch.float64)


@dataclasses.dataclass
class Variant:
    """A sampler with settings, called like its class for the others, and what is asked of it."""

    kind: type
    settings: dict = dataclasses.field(default_factory=dict)
    order: int = 1  # of convergence,
    fine: tuple = (20, 40, 80)  # seen at these steps
    enough: int = 250  # steps that get mean and variance right

    def __call__(self, **others):
        return self.kind(**self.settings, **others)


def stochastic(variant):
    x, path = normal(64), PATHS["linear"]
    runs = [last(variant(steps=5)(gaussian(path)[0], x, path, noise=Seeded(k))) for k in (0, 1)]
    return not torch.equal(*runs)


KINDS = sorted(samplers(), key=lambda kind: kind.__name__)
CHURN = {"churn": 40.0, "churn_min": 0.05, "churn_max": 50.0}
DEFAULTS = {
    **{kind.__name__: Variant(kind, order=getattr(kind(), "order", 1)) for kind in KINDS},
    "Heun": Variant(Heun, order=2),
    "EulerAncestral": Variant(EulerAncestral, enough=500),
}
VARIANTS = {
    **DEFAULTS,
    "Heun churn": Variant(Heun, CHURN),
    "Euler churn": Variant(Euler, CHURN, enough=500),
    "DDIM eta": Variant(DDIM, {"eta": 0.5}),
    "SDEDPMSolver 1": Variant(SDEDPMSolver, {"order": 1}),
    # The corrector has an order more (the first step's is 3), of which a last step of 1 leaves 2.
    **{
        f"UniPC {order} {b}": Variant(
            UniPC, {"order": order, "variant": b, "lower_order_final": False}, *seen
        )
        for order, *seen in [(1, 2), (2, 3, (160, 320)), (3, 3, (160, 320))]
        for b in ("bh1", "bh2")
    },
    "UniPC 3 lower": Variant(UniPC, {"order": 3}, 2, (80, 160)),
}
STOCHASTIC = {name: variant for name, variant in VARIANTS.items() if stochastic(variant)}
DETERMINISTIC = {name: VARIANTS[name] for name in VARIANTS if name not in STOCHASTIC}
ON_EVERY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def accepted(sampler, path, t_start=None, t_end=None):
    """The sampler's times; None where its grid has none for these settings."""
    try:
        return sampler.times(path, t_start, t_end)
    except ValueError:
        return None


def each(variants):
    return pytest.mark.parametrize("kind", variants.values(), ids=variants)


def test_the_folder_is_searched():
    assert {DDIM, DDPM} <= set(KINDS)
    assert {"DDPM", "SDEDPMSolver", "EulerAncestral", "Heun churn"} <= STOCHASTIC.keys()
    assert {"DDIM", "DPMSolver", "UniPC", "Euler", "Heun"} <= DETERMINISTIC.keys()


@ON_EVERY_PATH
@each(DETERMINISTIC)
def test_order_of_convergence(kind, path):
    """Twice the steps divide the error by at least 2^order."""
    denoise, solution = gaussian(path)
    start, end = 0.9, 0.3
    x = normal(256)
    exact = solution(x, double(start), double(end))
    errors = [
        float(
            (
                last(kind(steps=n)(denoise, x, path, noise=Seeded(), t_start=start, t_end=end))
                - exact
            )
            .abs()
            .max()
        )
        for n in kind.fine
    ]
    for coarse, fine in pairwise(errors):
        assert coarse / fine > 2 ** (kind.order - 0.25), errors


@ON_EVERY_PATH
@each(DETERMINISTIC)
def test_deterministic_samplers_end_at_the_data(kind, path):
    denoise, solution = gaussian(path)
    x = path.sigma(double(path.t_max)) * normal(512)
    found = last(kind(steps=200)(denoise, x, path, noise=Seeded()))
    exact = solution(x, double(path.t_max), double(path.t_min))
    assert float((found - exact).abs().max()) < 0.06


@ON_EVERY_PATH
@each(STOCHASTIC)
def test_stochastic_samplers_have_the_right_mean_and_variance(kind, path):
    denoise, _ = gaussian(path)
    x = path.sigma(double(path.t_max)) * normal(8000)
    found = last(kind(steps=kind.enough)(denoise, x, path, noise=Seeded()))
    assert abs(float(found.mean()) - MEAN) < 0.02
    assert abs(float(found.std()) / SPREAD - 1) < 0.04


@ON_EVERY_PATH
@each(VARIANTS)
def test_media_equals_its_parts_bit_for_bit(kind, path):
    denoise, _ = gaussian(path)
    x = Media(
        video=normal(2, 3, 4, dtype=torch.float32), audio=normal(2, 9, seed=1, dtype=torch.float32)
    )
    together = list(kind(steps=7)(denoise, x, path, noise=Seeded()))
    assert len(together) >= 7
    for name in x:
        alone = list(kind(steps=7)(denoise, x[name], path, noise=Seeded()))
        assert len(alone) == len(together)
        for state, part in zip(together, alone, strict=True):
            assert type(state) is Media
            assert state[name].dtype == torch.float32
            assert torch.equal(state[name], part)


@each(VARIANTS)
def test_no_value_of_a_sample_decides_anything(kind):
    """There are none on the meta device. On an accelerator each would cost a wait for it."""

    class Nothing:
        like = staticmethod(torch.empty_like)

    x, path = torch.empty(2, 3, device="meta"), PATHS["flow"]
    found = last(kind(steps=6)(gaussian(path)[0], x, path, noise=Nothing()))
    assert found.device.type == "meta"


@ON_EVERY_PATH
@each(DEFAULTS)
def test_parts_of_the_way_make_the_whole(kind, path):
    """From t_start to t_end, starting where asked: t = 0.6 in two stretches."""
    seen = []
    exact, solution = gaussian(path)

    def denoise(x, t):
        assert t.dtype == torch.float64
        assert t.dim() == 0
        seen.append(float(t))
        return exact(x, t)

    x = normal(512)
    half = last(kind(steps=60)(denoise, x, path, noise=Seeded(), t_start=0.9, t_end=0.6))
    assert max(seen) == 0.9
    assert min(seen) >= 0.6
    again = last(kind(steps=60)(denoise, half, path, noise=Seeded(1), t_start=0.6, t_end=0.3))
    wanted = solution(x, double(0.9), double(0.3))
    if kind in DETERMINISTIC.values():
        assert float((again - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


@ON_EVERY_PATH
@pytest.mark.parametrize("grid", GRIDS)
def test_shift_moves_the_times_between_the_ends(grid, path):
    for ends in ((None, None), (0.9, 0.2)):
        plain, moved, back = (
            accepted(DDIM(steps=8, grid=grid, shift=shift), path, *ends)
            for shift in (1, 3.0, 1 / 3)
        )
        if plain is None:
            return
        assert float(moved[0]) == float(plain[0]) == (ends[0] or plain[0])
        assert float(moved[-1]) == float(plain[-1])
        for times in (moved, back):
            assert times.dtype == torch.float64
            assert bool((times.diff() < 0).all())
        assert bool((moved[1:-1] > plain[1:-1]).all())
        assert bool((back[1:-1] < plain[1:-1]).all())


def test_shift_on_the_whole_way_is_the_published_one():
    t = torch.linspace(1, 0, 11, dtype=torch.float64)
    for shift in (0.5, 2.0, 3.0):
        found = DDIM(steps=10, shift=shift).times(PATHS["flow"])
        torch.testing.assert_close(found, shift * t / (1 + (shift - 1) * t), rtol=0, atol=1e-15)


@each(VARIANTS)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_any_settings_keep_samples_finite_and_their_shape(kind, data):
    path = PATHS[data.draw(st.sampled_from(sorted(PATHS)))]
    sampler = kind(
        steps=data.draw(st.integers(1, 12)),
        grid=data.draw(st.sampled_from(sorted(GRIDS))),
        shift=data.draw(st.sampled_from([1.0, 3.0]) | st.floats(0.2, 5.0)),
    )
    # nearer to the data than 1e-6 there is no noise left in float32
    last_times = st.none() | st.just(0.0) | st.floats(1e-6, 0.4)
    ends = data.draw(st.none() | st.floats(0.5, 1)), data.draw(last_times)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    assume(accepted(sampler, path, *ends) is not None)
    x = Media(a=normal(3, 4, dtype=dtype), b=normal(3, 2, 2, dtype=dtype))
    x = x if data.draw(st.booleans()) else x["a"]
    t_start, t_end = ends
    states = list(sampler(gaussian(path)[0], x, path, noise=Seeded(), t_start=t_start, t_end=t_end))
    assert states
    for state in states:
        assert type(state) is type(x)
        pairs = zip(state.values(), x.values(), strict=True) if type(x) is Media else [(state, x)]
        for found, start in pairs:
            assert found.shape == start.shape
            assert found.dtype == dtype
            assert bool(found.isfinite().all())


def test_the_middle_of_the_step_brings_the_variance_closer():
    """At the default number of steps, where DDPM's loses much."""
    path = PATHS["linear"]
    x = normal(8000)
    off = [
        abs(float(last(s(gaussian(path)[0], x, path, noise=Seeded())).std()) / SPREAD - 1)
        for s in (SDEDPMSolver(order=1), SDEDPMSolver(order=2))
    ]
    assert off[1] < off[0] / 4


def test_unipc_takes_steps_without_an_end_in_lambda_as_ddim_does():
    """From no data and to no noise; what it saw at the first is no point of the next ones."""
    path, x = PATHS["flow"], normal(50)
    denoise = gaussian(path)[0]
    for order in (1, 2, 3):
        sampler = UniPC(order=order, lower_order_final=False)
        first, last_ = list(sampler.solve(denoise, x, path, double([1.0, 0.5, 0.0]), None))
        assert torch.equal(first, next(DDIM().solve(denoise, x, path, double([1.0, 0.5]), None)))
        assert torch.equal(last_, denoise(first, double(0.5)).x0)
        ours = list(sampler.solve(denoise, x, path, double([1.0, 0.5, 0.4, 0.3]), None))
        rest = list(sampler.solve(denoise, ours[0], path, double([0.5, 0.4, 0.3]), None))
        for a, b in zip(ours[1:], rest, strict=True):
            assert torch.equal(a, b)


@each({name: VARIANTS[name] for name in VARIANTS if "UniPC" in name or "SDE" in name})
def test_multistep_solvers_evaluate_once_a_step(kind):
    path, count = PATHS["cosine"], 0

    def denoise(x, t):
        nonlocal count
        count += 1
        return gaussian(path)[0](x, t)

    assert len(list(kind(steps=9)(denoise, normal(5), path, noise=Seeded()))) == 9
    assert count == 9


@ON_EVERY_PATH
def test_ddim_with_full_noise_is_ddpm_with_the_small_variance(path):
    denoise, _ = gaussian(path)
    x = normal(2, 50)
    ddim = list(DDIM(steps=20, eta=1.0)(denoise, x, path, noise=Seeded()))
    ddpm = list(DDPM(steps=20, variance="small")(denoise, x, path, noise=Seeded()))
    for a, b in zip(ddim, ddpm, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_ddim_on_a_straight_path_is_eulers_method():
    path = PATHS["flow"]
    denoise, _ = gaussian(path)
    x = state = normal(50)
    times = torch.linspace(1, 0, 11, dtype=torch.float64)
    for (t, s), found in zip(pairwise(times), DDIM(steps=10)(denoise, x, path), strict=True):
        predicted = denoise(state, t)
        state = state + (s - t) * (predicted.eps - predicted.x0)
        torch.testing.assert_close(found, state, rtol=1e-10, atol=1e-10)


def test_one_exact_step_of_ddpm():
    """With the data known, x_s is normal with the posterior's mean and variance."""
    path, t, s = PATHS["linear"], double(0.5), double(0.3)
    x0 = torch.full((100000,), 0.7, dtype=torch.float64)
    eps = normal(100000)
    x = path.alpha(t) * x0 + path.sigma(t) * eps
    for variance, wide in (("small", False), ("large", True)):
        found = last(
            DDPM(variance=variance).solve(
                lambda x, t: Prediction(x0, eps), x, path, torch.stack([t, s]), Seeded(5)
            )
        )
        assert abs(float(found.mean() - path.alpha(s) * 0.7)) < 0.01
        # The marginal of x_s given x0, unless the variance is the larger one.
        ratio = float(found.var() / path.sigma(s) ** 2)
        assert (ratio > 1.1) if wide else abs(ratio - 1) < 0.02


@pytest.mark.parametrize("as_media", [False, True])
def test_learned_variance_lies_between_small_and_large(as_media):
    path = PATHS["cosine"]
    exact, _ = gaussian(path)

    def run(variance, spread=None):
        def denoise(x, t):
            found = exact(x, t)
            wide = None if spread is None else torch.zeros_like(x) + spread
            return found._replace(spread=wide)

        x = normal(2, 50)
        x = Media(a=x) if as_media else x
        found = last(DDPM(steps=6, variance=variance)(denoise, x, path, noise=Seeded()))
        return found["a"] if as_media else found

    torch.testing.assert_close(run("learned", -1.0), run("small"))
    torch.testing.assert_close(run("learned", 1.0), run("large"))
    assert not torch.allclose(run("learned", 0.0), run("small"))
    with pytest.raises(ValueError, match="learned none"):
        run("learned")


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="steps=0"):
        DDIM(steps=0)
    with pytest.raises(ValueError, match="grid='nope' is not one of trailing"):
        DDIM(grid="nope")
    with pytest.raises(ValueError, match="variance='mid' is not one of small, large, learned"):
        DDPM(variance="mid")
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match="eta="):
            DDIM(eta=eta)
    for shift in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"shift={shift} is not above 0"):
            DDIM(shift=shift)
    for kind, order in ((UniPC, 4), (UniPC, 0), (SDEDPMSolver, 3)):
        with pytest.raises(ValueError, match=f"order={order} is not"):
            kind(order=order)
    with pytest.raises(ValueError, match="variant='bh3' is not one of bh1, bh2"):
        UniPC(variant="bh3")


@pytest.mark.parametrize("kind", KINDS)
def test_samplers_are_dataclasses_of_plain_settings(kind):
    fields = {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
    assert {"steps", "grid"} <= fields.keys()
    assert all(isinstance(v, int | float | str | bool | None | list) for v in fields.values())
    assert kind(**fields) == kind()
