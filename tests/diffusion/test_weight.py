"""Time densities against their distribution functions, loss weights against the papers."""

import math

import pytest
import torch

from avdiffusion.diffusion.path import EDM, CosineVP, DiscreteVP, RectifiedFlow
from avdiffusion.diffusion.target import TARGETS, det
from avdiffusion.diffusion.weight import (
    Constant,
    EDMWeight,
    LogitNormal,
    LogNormal,
    MinSNR,
    Uniform,
)

PATHS = {
    "linear": DiscreteVP(),
    "cosine": DiscreteVP(betas="cosine"),
    "flow": RectifiedFlow(),
    "quarter": CosineVP(),
    "edm": EDM(),
}
EVERY = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
U = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000  # evenly through every quantile
T = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def distance(samples, cdf, low, high):
    """Largest difference between the samples' distribution and `cdf`, inside (low, high)."""
    at = torch.linspace(low, high, 31, dtype=torch.float64)[1:-1]
    share = (samples[None] <= at[:, None]).double().mean(1)
    return float((share - cdf(at)).abs().max())


@EVERY
def test_uniform(path):
    t = Uniform()(U, path)
    assert t.dtype == torch.float64
    assert path.t_min <= float(t.min()) < float(t.max()) <= path.t_max
    span = path.t_max - path.t_min
    assert distance(t, lambda c: (c - path.t_min) / span, path.t_min, 1) < 1e-3


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_uniform_over_a_table_visits_every_step_alike(steps):
    t = Uniform(steps=steps)(
        (torch.arange(steps * 3).double() + 0.5) / (steps * 3), PATHS["linear"]
    )
    places, counts = (t * steps).round().unique(return_counts=True)
    assert places.tolist() == list(range(1, steps + 1))
    assert set(counts.tolist()) == {3}
    torch.testing.assert_close(t * steps, (t * steps).round(), rtol=0, atol=1e-9)
    extremes = Uniform(steps=steps)(
        torch.tensor([1e-18, 1 - 1e-16], dtype=torch.float64), PATHS["linear"]
    )
    assert extremes.tolist() == [1 / steps, 1.0]


@EVERY
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.6, 0.8)])
def test_logit_normal(path, mean, std):
    t = LogitNormal(mean=mean, std=std)(U, path)
    assert distance(t, lambda c: normal_cdf((c.logit() - mean) / std), 0.001, 0.999) < 1e-3


@EVERY
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.4, 1.0)])
def test_log_normal_noise_level(path, mean, std):
    t = LogNormal(mean=mean, std=std)(U, path)
    assert path.t_min <= float(t.min()) < float(t.max()) <= path.t_max
    inside = t[(t > path.t_min) & (t < path.t_max)]
    assert len(inside) > 0.97 * len(t)
    level = -path.lam(inside)
    assert distance(-path.lam(t), lambda c: normal_cdf((c - mean) / std), -3.5, 1.5) < 1e-3
    assert abs(float(level.mean()) - mean) < 0.1


def terms(path, target, sigma_data=1.0):
    alpha, sigma = path.alpha(T), path.sigma(T)
    d = det(alpha, sigma, TARGETS[target](alpha, sigma, sigma_data))
    return alpha, sigma, d, alpha**2 / sigma**2


@pytest.mark.parametrize("path", [PATHS[name] for name in ("linear", "cosine", "quarter")])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_published_weight(path, gamma):
    """Hang et al. 2023: min(SNR, gamma) on x0, / SNR on eps, / (SNR + 1) on v."""
    weight = MinSNR(gamma=gamma)
    for target, published in {
        "x0": lambda snr: snr.clamp(max=gamma),
        "eps": lambda snr: (gamma / snr).clamp(max=1),
        "v": lambda snr: snr.clamp(max=gamma) / (snr + 1),
    }.items():
        alpha, sigma, d, snr = terms(path, target)
        torch.testing.assert_close(weight(alpha, sigma, d), published(snr), rtol=1e-9, atol=0)


@EVERY
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_a_weight_is_the_same_on_the_data_whatever_is_predicted(path, sigma_data):
    """weight * (error of the output)^2 does not depend on the parameterisation."""
    for weight in (MinSNR(), EDMWeight(sigma_data=sigma_data)):
        on_x0 = []
        for target in TARGETS:
            alpha, sigma, d, _ = terms(path, target, sigma_data)
            on_x0.append(weight(alpha, sigma, d) * (d / sigma) ** 2)
        for other in on_x0[1:]:
            torch.testing.assert_close(other, on_x0[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_weight_is_the_published_one(sigma_data):
    """Karras et al. 2022, table 1: lambda(sigma) on x0, so that the network's error counts 1."""
    weight = EDMWeight(sigma_data=sigma_data)
    alpha, sigma, d, _ = terms(PATHS["edm"], "x0", sigma_data)
    expected = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    torch.testing.assert_close(weight(alpha, sigma, d), expected, rtol=1e-9, atol=0)
    for path in PATHS.values():
        alpha, sigma, d, _ = terms(path, "edm", sigma_data)
        torch.testing.assert_close(weight(alpha, sigma, d), torch.ones_like(T), rtol=1e-9, atol=0)


@EVERY
def test_weights_are_finite_where_losses_are_taken(path):
    t = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    for target in ("v", "flow", "edm"):
        d = det(alpha, sigma, TARGETS[target](alpha, sigma, 1.0))
        for weight in (Constant(), MinSNR(), EDMWeight()):
            value = weight(alpha, sigma, d)
            assert bool(value.isfinite().all())
            assert bool((value >= 0).all())
