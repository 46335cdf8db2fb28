"""Guidance by a weaker model, on distributions whose exact models are known, and in a system."""

import pytest
import torch
from small_system import SHAPES, Net, system
from test_samplers import KINDS, PATHS, Seeded, double, normal

from avdiffusion.diffusion.diffusion import Diffusion, Prediction
from avdiffusion.diffusion.guide import AutoGuidance, Clamp, Task
from avdiffusion.diffusion.path import DiscreteVP, RectifiedFlow
from avdiffusion.media import Media
from avdiffusion.samplers.sampler import last
from avdiffusion.systems.codec import Patches

MODES = 1.0  # the two modes of the data lie at plus and minus this


def mixture(path, spread):
    """The exact prediction where the data has two equal modes of one spread."""

    def denoise(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        power = (alpha * spread) ** 2 + sigma**2
        share = torch.tanh(alpha * MODES * x / power)
        x0 = MODES * share + alpha * spread**2 / power * (x - alpha * MODES * share)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


def log_density(x, spread):
    """Of the same distribution, without its constant."""
    parts = torch.stack([-((x - m) ** 2) / (2 * spread**2) for m in (-MODES, MODES)])
    return parts.logsumexp(0)


class Weak:
    """What the guide needs of a system, around an exact model."""

    def __init__(self, denoise, path, x):
        self.task, self.model, self.x = Task(path), denoise, x

    def denoise(self, task):
        return self.model

    def latent(self, count):
        return self.x

    def to(self, device):
        pass


def guided(path, x, scale, strong=0.3, weak=0.6):
    guide = AutoGuidance(weak=Weak(mixture(path, weak), path, x), scale=scale)
    return guide(mixture(path, strong), Task(path))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("time", [0.1, 0.5, 0.95])
def test_predictions_lie_on_the_line_through_both(path, time):
    x, t = Media(a=normal(4, 3), b=normal(4, 5, seed=1)), double(time)
    strong, weak = mixture(path, 0.3)(x, t), mixture(path, 0.6)(x, t)
    for scale in (0.0, 0.3, 1.0, 2.0, 5.0, -1.0):
        found = guided(path, x, scale)(x, t)
        for name in x:
            expected = weak.x0[name] + scale * (strong.x0[name] - weak.x0[name])
            torch.testing.assert_close(found.x0[name], expected, rtol=1e-10, atol=1e-10)
            made = path.alpha(t) * found.x0[name] + path.sigma(t) * found.eps[name]
            torch.testing.assert_close(made, x[name], rtol=1e-10, atol=1e-10)
            if scale in (0.0, 1.0):
                model = strong if scale else weak
                assert torch.equal(found.x0[name], model.x0[name])
                assert torch.equal(found.eps[name], model.eps[name])


def test_the_variance_learned_by_the_model_is_kept():
    path, x = PATHS["linear"], Media(a=normal(4, 3))
    spread = Media(a=torch.ones(4, 3))

    def denoise(x, t):
        return mixture(path, 0.3)(x, t)._replace(spread=spread)

    guide = AutoGuidance(weak=Weak(mixture(path, 0.6), path, x))
    assert guide(denoise, Task(path))(x, double(0.5)).spread is spread


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_blurred_weak_model_drives_samples_to_where_the_data_is_dense(kind, path):
    """The mean log density of 2000 samples rises with the scale; both modes keep their share."""
    x = path.sigma(double(path.t_max)) * normal(2000)

    def run(scale):
        start = Media(a=x)
        found = kind(steps=40)(guided(path, start, scale), start, path, noise=Seeded())
        return last(found)["a"]

    alone, little, much = run(1.0), run(1.5), run(3.0)
    plain = last(
        kind(steps=40)(mixture(path, 0.3), Media(a=x), path, noise=Seeded())
    )["a"]  # fmt: skip
    assert torch.equal(alone, plain)
    density = [float(log_density(v, 0.3).mean()) for v in (alone, little, much)]
    assert density[0] + 0.05 < density[1] < density[2] - 0.02
    for found in (alone, little, much):
        assert 0.45 < float((found > 0).double().mean()) < 0.55
        assert float(found.abs().mean()) == pytest.approx(MODES, abs=0.25)


def test_a_clamp_after_it_holds_what_it_drove_out():
    path, x, t = PATHS["linear"], Media(a=3 * normal(100)), double(0.3)
    wild = guided(path, x, 4.0)
    assert float(wild(x, t).x0["a"].abs().max()) > 1.2
    held = Clamp()(wild, Task(path))(x, t)
    assert float(held.x0["a"].abs().max()) == 1
    made = path.alpha(t) * held.x0["a"] + path.sigma(t) * held.eps["a"]
    torch.testing.assert_close(made, x["a"])


# --------------------------------------------------------------------------------- in a system


def other(**options):
    """A system with other weights."""
    model = system(**options)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in model.ema.ema_model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def test_a_system_is_guided_by_another():
    strong, weak = system(), other()
    plain, worse = strong.sample(3), weak.sample(3)
    for scale, expected in ((1.0, plain), (0.0, worse)):
        found = strong.sample(3, guides=[AutoGuidance(weak=weak, scale=scale)])
        assert all(torch.equal(found[k], expected[k]) for k in SHAPES)
    away = strong.sample(3, guides=[AutoGuidance(weak=weak, scale=2.0)])
    assert not any(torch.equal(away[k], plain[k]) for k in SHAPES)
    same = strong.sample(3, guides=[AutoGuidance(weak=strong, scale=7.0)])
    for k in SHAPES:
        torch.testing.assert_close(same[k], plain[k], rtol=1e-4, atol=1e-4)


def test_both_see_the_same_times_and_window_shifts():
    """Also where the weak model was trained with another seed."""
    strong, weak = system(), other()
    weak.seed = 5
    strong.sample(2, seed=3, guides=[AutoGuidance(weak=weak)])
    seen = strong.ema.ema_model.net.seen
    assert len(seen) == 5
    assert len({tuple(shifts) for _, shifts in seen}) > 1
    assert weak.ema.ema_model.net.seen == seen


def test_the_weak_model_is_brought_to_where_the_samples_are():
    devices = []
    weak = system()
    weak.to = lambda device: devices.append(str(device))
    system().sample(1, guides=[AutoGuidance(weak=weak)])
    assert devices == ["cpu"]


def test_models_of_something_else_are_refused():
    def fails(words, **options):
        with pytest.raises(ValueError, match=f"^the weak model {words}"):
            system().sample(1, guides=[AutoGuidance(weak=system(**options))])

    shapes = {**SHAPES, "audio": [1, 64]}
    fails(r"makes .*'audio': \[1, 64\].*, not .*'audio': \[1, 32\]", shapes=shapes)
    fails("makes", shapes={"video": SHAPES["video"]})
    for path in (RectifiedFlow(), DiscreteVP(betas="linear")):
        fails(
            "was trained on another noise path",
            diffusion=Diffusion(net=Net(), path=path, target="v"),
        )
    codec = Patches(patch={}, scale={"audio": 2.0})
    fails("was trained with another codec", codec=codec)
