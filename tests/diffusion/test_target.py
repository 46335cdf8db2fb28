"""What a network predicts: there and back, and against the papers' formulas."""

import pytest
import torch

from avdiffusion.diffusion.diffusion import Diffusion
from avdiffusion.diffusion.path import EDM, CosineVP, DiscreteVP, RectifiedFlow
from avdiffusion.diffusion.target import TARGETS, det, edm_pair, scale_in
from avdiffusion.media import Media

PATHS = {
    "linear": DiscreteVP(),
    "cosine": DiscreteVP(betas="cosine"),
    "flow": RectifiedFlow(),
    "quarter": CosineVP(),
    "edm": EDM(),
}


def normal(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


class Oracle(torch.nn.Module):
    """Returns what it holds, whatever it is asked."""

    def __init__(self):
        super().__init__()
        self.out = None

    def forward(self, *tensors, time):
        self.seen = tensors, time
        return self.out


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_round_trip(target, path, sigma_data):
    """From x_t and the exact output come the x0 and eps that made them."""
    times = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    x0, eps = normal(9, 4), normal(9, 4, seed=1)
    alpha, sigma = path.alpha(times)[:, None], path.sigma(times)[:, None]
    x = alpha * x0 + sigma * eps
    a, b = TARGETS[target](alpha, sigma, sigma_data)
    d, out = det(alpha, sigma, (a, b)), a * x0 + b * eps
    scale = float((1 / d).abs().max() + 1)
    torch.testing.assert_close((b * x - sigma * out) / d, x0, rtol=0, atol=1e-13 * scale)
    torch.testing.assert_close((alpha * out - a * x) / d, eps, rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("target", TARGETS)
def test_predict_undoes_what_loss_asks_for(target, path):
    """A network without loss predicts the data; x_t = alpha x0 + sigma eps always holds."""
    x0 = Media(a=normal(3, 2, 5).float(), b=normal(3, 7, seed=1).float())
    eps = Media(a=normal(3, 2, 5, seed=2).float(), b=normal(3, 7, seed=3).float())
    t = torch.tensor(0.4, dtype=torch.float64)
    net = Oracle()
    diffusion = Diffusion(net=net, path=path, target="v", sigma_data=0.7)
    diffusion.target = target  # past the constructor, which refuses some at t = 1
    alpha, sigma = path.alpha(t), path.sigma(t)
    a, b = TARGETS[target](alpha, sigma, 0.7)
    net.out = tuple((a * x0 + b * eps).values())
    losses = diffusion.loss(x0, {}, t=t.expand(3), noise=eps)
    assert max(float(v.max()) for v in losses.values()) < 1e-9
    x = alpha * x0 + sigma * eps
    found = diffusion.predict(x, t, {})
    scale = float(sigma / det(alpha, sigma, (a, b)).abs())
    for k in x0:
        torch.testing.assert_close(found.x0[k], x0[k], rtol=0, atol=1e-5 * max(1, scale))
        back = alpha * found.x0[k] + sigma * found.eps[k]
        torch.testing.assert_close(back, x[k], rtol=1e-5, atol=1e-5)
    assert found.spread is None


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_edm_is_the_published_preconditioning(sigma_data):
    """Karras et al. 2022, table 1: x0 = c_skip x + c_out F(c_in x)."""
    sigma = torch.logspace(-2.5, 2, 50, dtype=torch.float64)
    alpha = torch.ones_like(sigma)
    a, b = pair = edm_pair(alpha, sigma, sigma_data)
    d = det(alpha, sigma, pair)
    total = sigma**2 + sigma_data**2
    torch.testing.assert_close(b / d, sigma_data**2 / total, rtol=1e-12, atol=0)
    torch.testing.assert_close(-sigma / d, sigma * sigma_data / total.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        scale_in(alpha, sigma, sigma_data), total.rsqrt(), rtol=1e-12, atol=0
    )
    # The goal F = (x0 - c_skip x) / c_out.
    x0, eps = normal(50), normal(50, seed=1)
    goal = (x0 - (b / d) * (x0 + sigma * eps)) / (-sigma / d)
    torch.testing.assert_close(a * x0 + b * eps, goal, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [PATHS[name] for name in ("linear", "cosine", "quarter")])
def test_edm_of_unit_data_is_minus_v_where_variance_is_preserved(path):
    t = torch.linspace(0.001, 1, 100, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    for ours, v in zip(edm_pair(alpha, sigma, 1.0), TARGETS["v"](alpha, sigma, 1.0), strict=True):
        torch.testing.assert_close(ours, -v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scale_in(alpha, sigma, 1.0), torch.ones_like(t))


def test_the_network_sees_unit_variance():
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    for path in PATHS.values():
        net = Oracle()
        net.out = torch.zeros(5, 20000)
        diffusion = Diffusion(net=net, path=path, target="edm", sigma_data=0.5)
        x0, eps = Media(x=0.5 * normal(5, 20000)), Media(x=normal(5, 20000, seed=1))
        diffusion.loss(x0, {}, t=t, noise=eps)
        (seen,), time = net.seen
        torch.testing.assert_close(seen.std(1), torch.ones(5).double(), rtol=0, atol=0.03)
        torch.testing.assert_close(time.double(), path.embed(t), rtol=1e-6, atol=1e-5)


def test_targets_that_lose_the_data_are_refused():
    for path in (RectifiedFlow(), CosineVP()):
        with pytest.raises(ValueError, match="target='eps' does not determine the data at t=1"):
            Diffusion(net=Oracle(), path=path, target="eps")
    with pytest.raises(ValueError, match="target='noise' is not one of eps, x0, v, flow, edm"):
        Diffusion(net=Oracle(), path=DiscreteVP(), target="noise")
    for target in ("x0", "v", "flow", "edm"):
        Diffusion(net=Oracle(), path=RectifiedFlow(), target=target)
        Diffusion(net=Oracle(), path=CosineVP(), target=target)
