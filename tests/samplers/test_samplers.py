"""Every sampler in the folder, on every path, against a Gaussian whose answer is known.

A new file in `samplers/` is tested as soon as it exists.
"""

import dataclasses
import importlib
import pkgutil
from itertools import pairwise

import pytest
import torch

import avdiffusion.samplers
from avdiffusion.diffusion.diffusion import Prediction
from avdiffusion.diffusion.path import EDM, DiscreteVP, RectifiedFlow
from avdiffusion.media import Media
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.samplers.sampler import Sampler, last

PATHS = {
    "linear": DiscreteVP(),
    "cosine": DiscreteVP(betas="cosine"),
    "flow": RectifiedFlow(),
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


def stochastic(kind):
    x, path = normal(64), PATHS["linear"]
    runs = [last(kind(steps=5)(gaussian(path)[0], x, path, noise=Seeded(k))) for k in (0, 1)]
    return not torch.equal(*runs)


KINDS = sorted(samplers(), key=lambda kind: kind.__name__)
STOCHASTIC = [kind for kind in KINDS if stochastic(kind)]
DETERMINISTIC = [kind for kind in KINDS if kind not in STOCHASTIC]
ON_EVERY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def test_the_folder_is_searched():
    assert {DDIM, DDPM} <= set(KINDS)
    assert DDPM in STOCHASTIC
    assert DDIM in DETERMINISTIC


@ON_EVERY_PATH
@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_order_of_convergence(kind, path):
    """Halving the steps divides the error by at least 2^order (order 1 unless the class says)."""
    denoise, solution = gaussian(path)
    order = min(getattr(kind(), "order", 1), 3)
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
        for n in (20, 40, 80)
    ]
    for coarse, fine in pairwise(errors):
        assert coarse / fine > 2 ** (order - 0.25), errors


@ON_EVERY_PATH
@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_deterministic_samplers_end_at_the_data(kind, path):
    denoise, solution = gaussian(path)
    x = path.sigma(double(path.t_max)) * normal(512)
    found = last(kind(steps=200)(denoise, x, path, noise=Seeded()))
    exact = solution(x, double(path.t_max), double(path.t_min))
    assert float((found - exact).abs().max()) < 0.06


@ON_EVERY_PATH
@pytest.mark.parametrize("kind", STOCHASTIC)
def test_stochastic_samplers_have_the_right_mean_and_variance(kind, path):
    denoise, _ = gaussian(path)
    x = path.sigma(double(path.t_max)) * normal(8000)
    found = last(kind(steps=250)(denoise, x, path, noise=Seeded()))
    assert abs(float(found.mean()) - MEAN) < 0.02
    assert abs(float(found.std()) / SPREAD - 1) < 0.04


@ON_EVERY_PATH
@pytest.mark.parametrize("kind", KINDS)
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


@ON_EVERY_PATH
@pytest.mark.parametrize("kind", KINDS)
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
    if kind in DETERMINISTIC:
        assert float((again - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


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


@pytest.mark.parametrize("kind", KINDS)
def test_samplers_are_dataclasses_of_plain_settings(kind):
    fields = {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
    assert {"steps", "grid"} <= fields.keys()
    assert all(isinstance(v, int | float | str | bool | None | list) for v in fields.values())
    assert kind(**fields) == kind()
