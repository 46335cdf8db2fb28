"""Back to the noise and between two of it, where the perfect network and the answer are known."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.diffusion.diffusion import Prediction
from avdiffusion.diffusion.path import EDM, CosineVP, DiscreteVP, RectifiedFlow
from avdiffusion.interpolate import invert, morph, shares, slerp, transition
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.sampler import last

PATHS = {
    "linear": DiscreteVP(),
    "cosine": DiscreteVP(betas="cosine"),
    "flow": RectifiedFlow(),
    "quarter": CosineVP(),
    "edm": EDM(),
}
MEAN, SPREAD = 0.3, 0.5


class Gaussian:
    """The exact prediction of data from N(MEAN, spread^2) [spec, 1.5]; counts its evaluations."""

    def __init__(self, path, spread=SPREAD):
        self.path, self.spread, self.times = path, spread, []

    def line(self, t):
        """x0 and eps as (slope, offset) of x."""
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        power = (alpha * self.spread) ** 2 + sigma**2
        slope = alpha * self.spread**2 / power
        return (slope, MEAN * sigma**2 / power), (sigma / power, -MEAN * alpha * sigma / power)

    def __call__(self, x, t):
        self.times.append(float(t))
        return Prediction(*(slope * x + offset for slope, offset in self.line(t)))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(x):
    return float(x.square().mean().sqrt())


# ----------------------------------------------------------------------------------- inversion


def returned(name, steps, refine):
    """How far from x sampling ends that begins where x is said to come from."""
    path, x = PATHS[name], MEAN + SPREAD * normal(4000)
    denoise, ddim = Gaussian(path), DDIM(steps=steps)
    start = invert(denoise, x, path, ddim.times(path), refine=refine)
    return rms(last(ddim(denoise, start, path)) - x)


@pytest.mark.parametrize(
    ("name", "steps", "spec"),
    [  # what is left after three to five corrections [spec, 1.7]
        ("linear", 20, 1.6e-4),
        ("cosine", 20, 1.1e-2),
        ("linear", 50, 3e-6),
        ("cosine", 50, 4.7e-3),
    ],
)
def test_clips_come_back(name, steps, spec):
    explicit = returned(name, steps, 0)
    assert 0.02 < explicit < 0.2  # there it makes a difference
    assert returned(name, steps, 3) < spec
    assert returned(name, steps, 1) < explicit / 5


@pytest.mark.parametrize("name", PATHS)
def test_inversion_undoes_ddim_exactly(name):
    """Each step of DDIM is a line in x here; the inverse of them all is had by hand."""
    path, x = PATHS[name], MEAN + SPREAD * normal(50)
    denoise, times = Gaussian(path), DDIM(steps=7).times(path)
    expected = x
    for t, s in pairwise(times.flip(0)):
        alpha, sigma = path.alpha(t), path.sigma(t)
        (a, b), (c, d) = denoise.line(s)
        expected = (expected - alpha * b - sigma * d) / (alpha * a + sigma * c)
    found = invert(denoise, x, path, times, refine=60)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_one_correction_is_exact_where_data_are_as_wide_as_noise():
    path = PATHS["cosine"]
    x, denoise, ddim = MEAN + normal(50), Gaussian(path, spread=1.0), DDIM(steps=10)
    start = invert(denoise, x, path, ddim.times(path), refine=1)
    assert torch.allclose(last(ddim(denoise, start, path)), x, atol=1e-9)


def test_inversion_asks_for_times_that_networks_know():
    path = PATHS["linear"]
    denoise, times = Gaussian(path), DDIM(steps=5).times(path, t_start=0.6)
    invert(denoise, normal(3), path, times, refine=2)
    assert len(denoise.times) == 5 * (1 + 2)
    assert min(denoise.times) == path.t_min
    assert max(denoise.times) == 0.6


# ----------------------------------------------------------------------------------- on circles


def test_what_lies_between_noises_is_as_large_as_noise():
    u, v = normal(1, 40_000, seed=1), normal(1, 40_000, seed=2)
    assert rms(slerp(u, v, 0.5)) == pytest.approx(0.999, abs=0.01)
    assert rms(torch.lerp(u, v, 0.5)) == pytest.approx(0.709, abs=0.01)


@given(
    angle=st.floats(0.01, math.pi - 0.01), weight=st.floats(0.01, 0.99), length=st.floats(0.1, 9)
)
@settings(max_examples=60, deadline=None)
def test_the_angle_goes_in_proportion_and_so_does_the_norm(angle, weight, length):
    u = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    v = length * torch.tensor([[math.cos(angle), 0.0, math.sin(angle)]], dtype=torch.float64)
    size, at = 1 + weight * (length - 1), weight * angle
    expected = size * torch.tensor([[math.cos(at), 0.0, math.sin(at)]], dtype=torch.float64)
    assert torch.allclose(slerp(u, v, weight), expected, atol=1e-9)


def test_ends_are_exact_and_samples_do_not_depend_on_one_another():
    u, v = normal(3, 2, 4, seed=1).float(), normal(3, 2, 4, seed=2).float()
    assert torch.equal(slerp(u, v, 0), u)
    assert torch.equal(slerp(u, v, 1.0), v)
    half = slerp(u, v, 0.3)
    assert half.dtype == torch.float32
    assert half.shape == u.shape
    for k in range(3):
        assert torch.equal(slerp(u[k : k + 1], v[k : k + 1], 0.3), half[k : k + 1])


def test_vectors_without_a_circle_are_joined_by_a_line():
    u = normal(1, 5)
    for v in (u, 3 * u, -u, u + 1e-9):
        assert torch.allclose(slerp(u, v, 0.25), torch.lerp(u, v, 0.25), atol=1e-6)
    assert slerp(u, torch.zeros_like(u), 0.25).isfinite().all()


# ------------------------------------------------------------------------- clips and their frames


@pytest.mark.parametrize("blend", [slerp, torch.lerp])
def test_rows_of_clips_and_of_frames(blend):
    u, v = normal(2, 3, 5, 4, 4, seed=1), normal(2, 3, 5, 4, 4, seed=2)
    clips, clip = morph(u, v, 4, blend), transition(u, v, blend)
    assert clips.shape == (2, 4, 3, 5, 4, 4)
    assert torch.equal(clips[:, 0], u)
    assert torch.equal(clips[:, -1], v)
    assert torch.equal(clips[:, 1], blend(u, v, 1 / 3))
    assert clip.shape == u.shape
    assert torch.equal(clip[:, :, 0], u[:, :, 0])
    assert torch.equal(clip[:, :, -1], v[:, :, -1])
    assert torch.equal(clip[:, :, 2], blend(u[:, :, 2], v[:, :, 2], 0.5))


def test_shares():
    assert shares(1) == [0.5]
    assert shares(2) == [0, 1]
    assert shares(5) == [0, 0.25, 0.5, 0.75, 1]
