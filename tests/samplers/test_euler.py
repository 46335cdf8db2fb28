"""Euler's and Heun's methods, as published, for D(x; sigma): in x / alpha over sigma / alpha."""

import math
from itertools import pairwise

import pytest
import torch
from test_samplers import MEAN, ON_EVERY_PATH, PATHS, SPREAD, Seeded, double, gaussian, normal

from avdiffusion.diffusion.path import EDM
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.euler import Euler, EulerAncestral
from avdiffusion.samplers.heun import Heun
from avdiffusion.samplers.sampler import last


def slope(x, sigma):
    """(x - D(x; sigma)) / sigma, where the data is normal."""
    return (x - MEAN) * sigma / (SPREAD**2 + sigma**2)


def published(x, sigmas, noise, *, heun, churn=0.0, low=0.0, high=math.inf, scale=1.0):
    """Karras et al. 2022, algorithm 2, line by line."""
    count = len(sigmas) - 1
    for t, s in pairwise(sigmas.tolist()):
        gamma = min(churn / count, math.sqrt(2) - 1) if low <= t <= high else 0.0
        raised = t * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(raised**2 - t**2) * scale * noise.like(x)
        d = slope(x, raised)
        found = x + (s - raised) * d
        if heun and s > 0:
            found = x + (s - raised) * (d + slope(found, s)) / 2
        x = found
    return x


@ON_EVERY_PATH
@pytest.mark.parametrize("grid", ["karras", "trailing"])
@pytest.mark.parametrize("kind", [Euler, Heun])
@pytest.mark.parametrize(
    "churn",
    [
        {"churn": 0.0},
        {"churn": 2.0},
        {"churn": 100.0},
        {"churn": 2.0, "churn_min": 0.2, "churn_max": 1.5, "churn_noise": 1.1},
    ],
    ids=["none", "some", "most", "between"],
)
def test_the_published_algorithm(churn, kind, grid, path):
    sampler, x = kind(steps=12, grid=grid, **churn), normal(50)
    times = sampler.times(path, 0.7)
    noise = Seeded()
    found = last(sampler(gaussian(path)[0], x, path, noise=noise, t_start=0.7))
    names = {"churn_min": "low", "churn_max": "high", "churn_noise": "scale", "churn": "churn"}
    expected = published(
        x / path.alpha(times[0]),
        path.sigma(times) / path.alpha(times),
        theirs := Seeded(),
        heun=kind is Heun,
        **{names[name]: value for name, value in churn.items()},
    )
    torch.testing.assert_close(found, path.alpha(times[-1]) * expected, rtol=1e-8, atol=1e-8)
    assert noise.calls == theirs.calls
    assert (noise.calls > 0) == (churn["churn"] > 0)


def test_the_limits_of_churn_are_met():
    """Of 12 steps some are below, within and above."""
    path, calls = EDM(), []
    for low, high in ((0.0, None), (1.0, None), (0.0, 1.0), (0.1, 10.0)):
        sampler, noise = Heun(steps=12, churn=1.0, churn_min=low, churn_max=high), Seeded()
        last(sampler(gaussian(path)[0], normal(5), path, noise=noise, t_start=0.99))
        sigmas = path.sigma(sampler.times(path, 0.99)[:-1])
        assert noise.calls == int(((sigmas >= low) & (sigmas <= (high or math.inf))).sum())
        calls.append(noise.calls)
    assert calls[0] == 12 == calls[1] + calls[2]
    assert 0 < calls[3] < 12


@ON_EVERY_PATH
@pytest.mark.parametrize("grid", ["karras", "trailing"])
def test_churn_stays_on_the_path(grid, path):
    """No time is beyond the path's end, from which it is not raised at all."""
    seen, noise = [], Seeded()

    def denoise(x, t):
        assert bool(x.isfinite().all())
        seen.append(float(t))
        return gaussian(path)[0](x, t)

    sampler = Euler(steps=10, grid=grid, churn=100.0)
    found = last(sampler(denoise, normal(50), path, noise=noise))
    assert bool(found.isfinite().all())
    times = sampler.times(path)[:-1].tolist()
    assert seen[0] == path.t_max
    assert max(seen) <= path.t_max
    assert all(a > b for a, b in zip(seen[1:], times[1:], strict=True))
    assert noise.calls == 9


@ON_EVERY_PATH
@pytest.mark.parametrize("grid", ["karras", "trailing"])
def test_heun_evaluates_twice_but_where_a_slope_is_missing(grid, path):
    count = 0

    def denoise(x, t):
        nonlocal count
        count += 1
        return gaussian(path)[0](x, t)

    last(Heun(steps=10, grid=grid)(denoise, normal(5), path))
    missing = int(path.alpha(double(path.t_max)) == 0) + int(path.sigma(double(0.0)) == 0)
    assert count == 20 - missing
    count = 0
    last(Euler(steps=10, grid=grid)(denoise, normal(5), path))
    assert count == 10


@ON_EVERY_PATH
def test_euler_without_churn_is_ddim(path):
    x, denoise = normal(2, 50), gaussian(path)[0]
    ours, theirs = (list(k(steps=9, grid="karras")(denoise, x, path)) for k in (Euler, DDIM))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@ON_EVERY_PATH
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral_euler_is_ddim_with_noise(eta, path):
    """As it is written in k-diffusion: the noise split in what is kept and what is drawn anew."""
    sampler = EulerAncestral(steps=10, eta=eta)
    times = sampler.times(path, 0.9)
    start, denoise = normal(2, 50), gaussian(path)[0]
    x, noise = start / path.alpha(times[0]), Seeded()
    for t, s in pairwise((path.sigma(times) / path.alpha(times)).tolist()):
        up = min(s, eta * math.sqrt(s**2 * (t**2 - s**2) / t**2))
        x = x + slope(x, t) * (math.sqrt(s**2 - up**2) - t)
        if up > 0:
            x = x + up * noise.like(x)
    for kind in (EulerAncestral, DDIM):
        same = kind(steps=10, grid="karras", eta=eta)
        found = last(same(denoise, start, path, noise=Seeded(), t_start=0.9))
        torch.testing.assert_close(found, path.alpha(times[-1]) * x, rtol=1e-9, atol=1e-9)


def test_ancestral_euler_is_random_by_default():
    x, denoise = normal(50), gaussian(PATHS["edm"])[0]
    runs = [last(EulerAncestral()(denoise, x, PATHS["edm"], noise=Seeded(k))) for k in (0, 1)]
    assert not torch.equal(*runs)


def test_wrong_settings_are_named():
    for name in ("churn", "churn_min", "churn_noise"):
        with pytest.raises(ValueError, match=f"{name}=-1.0 is below 0"):
            Heun(**{name: -1.0})
    with pytest.raises(ValueError, match=r"churn_max=1.0 is below churn_min=2.0"):
        Euler(churn_min=2.0, churn_max=1.0)
