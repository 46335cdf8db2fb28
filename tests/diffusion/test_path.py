"""Noise schedules against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.diffusion.path import BETAS, EDM, CosineVP, DiscreteVP, RectifiedFlow

PATHS = {
    "linear": DiscreteVP(),
    "cosine": DiscreteVP(betas="cosine"),
    "sigmoid": DiscreteVP(betas="sigmoid"),
    "linear50": DiscreteVP(steps=50),
    "flow": RectifiedFlow(),
    "quarter": CosineVP(),
    "edm": EDM(),
}
EVERY = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
TABLES = pytest.mark.parametrize("betas", BETAS)


def double(value):
    return torch.as_tensor(value, dtype=torch.float64)


@EVERY
@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 1))
def test_time_is_the_inverse_of_lam(path, share):
    low, high = max(path.t_min, 1e-3), min(path.t_max, 0.9999)
    t = double(low + share * (high - low))
    assert abs(float(path.time(path.lam(t)) - t)) < 1e-9


@EVERY
def test_time_takes_any_shape_and_lam_is_half_the_log_snr(path):
    t = torch.linspace(0.02, 0.98, 30, dtype=torch.float64).view(5, 6)
    torch.testing.assert_close(path.time(path.lam(t)), t, rtol=0, atol=1e-9)
    torch.testing.assert_close(path.lam(t), (path.alpha(t) / path.sigma(t)).log())


@EVERY
def test_snr_falls_everywhere(path):
    t = torch.linspace(path.t_min, path.t_max, 5001, dtype=torch.float64)
    ratio = path.alpha(t) / path.sigma(t)
    assert bool((ratio.diff() < 0).all())
    assert bool((path.sigma(t) >= 0).all())


@EVERY
def test_everything_is_double_on_the_cpu(path):
    with torch.device("meta"):
        again = DiscreteVP(betas="cosine") if isinstance(path, DiscreteVP) else path
    for value in (path.alpha(double(0.3)), path.sigma(double(0.3)), again.lam(double(0.3))):
        assert value.dtype == torch.float64
        assert value.device.type == "cpu"
        assert value.dim() == 0


@pytest.mark.parametrize("name", [*BETAS, "quarter"])
@settings(deadline=None, max_examples=40)
@given(t=st.floats(0, 1))
def test_variance_is_preserved(name, t):
    path = PATHS[name]
    assert abs(float(path.alpha(double(t)) ** 2 + path.sigma(double(t)) ** 2) - 1) < 1e-12


@TABLES
@pytest.mark.parametrize("steps", [1000, 300, 50])
def test_table_is_hit_exactly(betas, steps):
    path = DiscreteVP(betas=betas, steps=steps)
    bar = torch.cumprod(1 - BETAS[betas](steps), 0)
    t = (torch.arange(steps, dtype=torch.float64) + 1) / steps
    torch.testing.assert_close(path.alpha(t) ** 2, bar, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.sigma(t) ** 2, 1 - bar, rtol=1e-9, atol=0)
    # The same step by other roundings of its time.
    assert torch.equal(path.log_alpha(t * 3 / 3), path.log_alphas[1:])
    assert torch.equal(path.log_alpha(1 - (1 - t)), path.log_alphas[1:])
    torch.testing.assert_close(path.embed(t), torch.arange(steps).double(), rtol=0, atol=1e-9)


def test_linear_table_has_the_published_values():
    alphas = PATHS["linear"].alpha(double([1, 500, 1000]) / 1000) ** 2
    expected = double([0.9999, 0.07858724288, 4.035829765e-05])  # spec 2.1
    torch.testing.assert_close(alphas, expected, rtol=1e-9, atol=0)
    # The number of steps is a resolution: the noise at the end stays what it is.
    assert float(DiscreteVP(steps=250).sigma(double(1.0))) > 0.9999


def test_cosine_table_follows_its_formula():
    t = (torch.arange(0, 990, 7, dtype=torch.float64) + 1) / 1000
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    bar = f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(PATHS["cosine"].alpha(t) ** 2, bar, rtol=1e-8, atol=0)


@pytest.mark.parametrize("steps", [5, 10, 20])
@TABLES
def test_tiny_tables_are_finite(betas, steps):
    path = DiscreteVP(betas=betas, steps=steps)
    assert bool(path.log_alphas.isfinite().all())
    assert bool((path.log_alphas.diff() < 0).all())


def test_t_zero_is_data():
    zero = double(0.0)
    for name in ("linear", "cosine", "sigmoid", "flow", "quarter"):
        assert float(PATHS[name].alpha(zero)) == 1
        assert float(PATHS[name].sigma(zero)) == 0
    assert float(PATHS["edm"].alpha(zero)) == 1
    assert float(PATHS["edm"].sigma(zero)) == pytest.approx(0.002)
    assert float(PATHS["linear"].time(double(math.inf))) == 0


def test_flow_and_edm_are_what_they_say():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(PATHS["flow"].alpha(t), 1 - t)
    torch.testing.assert_close(PATHS["flow"].sigma(t), t)
    torch.testing.assert_close(PATHS["flow"].embed(t), 1000 * t)
    sigma = 0.002 * (80 / 0.002) ** t
    torch.testing.assert_close(PATHS["edm"].sigma(t), sigma)
    torch.testing.assert_close(PATHS["edm"].embed(t), 1000 * sigma.log() / 4)
    torch.testing.assert_close(EDM(sigma_max=1.0).sigma(double(1.0)), double(1.0))


def test_the_quarter_circle_ends_where_no_signal_is_left():
    """Exactly: what remains, cos(pi / 2) in floating point, would count as signal in log space."""
    path, t = PATHS["quarter"], torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t), torch.cos(math.pi * t / 2), rtol=0, atol=1e-15)
    torch.testing.assert_close(path.sigma(t), torch.sin(math.pi * t / 2), rtol=0, atol=1e-15)
    assert float(path.alpha(double(1.0))) == 0
    assert float(path.sigma(double(1.0))) == 1
    assert float(path.lam(double(1.0))) == -math.inf
    assert float(path.time(double(-math.inf))) == 1
    assert float(path.time(double(math.inf))) == 0
    # 1000 t, as other paths have it, or t for a network that learns its frequencies
    torch.testing.assert_close(path.embed(t), 1000 * t)
    torch.testing.assert_close(CosineVP(scale=1.0).embed(t), t)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="betas='quadratic' is not one of linear, cosine, sigmoid"):
        DiscreteVP(betas="quadratic")
    with pytest.raises(ValueError, match="sigma_min"):
        EDM(sigma_min=2.0, sigma_max=1.0)
