"""Guides that hold what is known of a clip, where the right answer is known too."""

import pytest
import torch
from test_samplers import KINDS, PATHS, Seeded, double, normal

from avdiffusion.diffusion.diffusion import Prediction
from avdiffusion.diffusion.guide import Task
from avdiffusion.diffusion.known import Reconstruct, Replace
from avdiffusion.media import Media
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.samplers.dpm_solver import DPMSolver
from avdiffusion.samplers.resample import Resample
from avdiffusion.samplers.sampler import last

TRUE = 0.9  # correlation of each value of `made` with its partner in `given`
MANY = 3000
ON_EVERY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def correlated(path):
    """The exact prediction for pairs of unit variance and correlation TRUE."""
    cov = double([[1.0, TRUE], [TRUE, 1.0]])

    def denoise(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(2).double())
        both = torch.stack([x["made"].double(), x["given"].double()], -1) @ gain.T
        x0 = Media(made=both[..., 0], given=both[..., 1])
        x0 = x0.map(lambda v: v.to(x["made"].dtype))
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


def clip(path, shape=(MANY, 1), dtype=torch.float64, part=None):
    """(start, task): all of `given` known, or its first `part` values."""
    known = normal(*shape, seed=1, dtype=dtype)
    noise = Media(
        made=normal(*shape, seed=2, dtype=dtype), given=normal(*shape, seed=3, dtype=dtype)
    )
    there = torch.zeros(shape, dtype=torch.bool)
    there[:, :part] = True
    nothing = torch.zeros_like(there)
    task = Task(
        path,
        known=Media(made=torch.zeros_like(known), given=known),
        mask=Media(made=nothing, given=there),
        noise=noise,
    )
    return path.sigma(double(path.t_max)) * noise, task


def correlation(path, guide, sampler):
    x, task = clip(path)
    found = last(sampler(guide(correlated(path), task), x, path, noise=Seeded()))
    pair = torch.cat([found["made"], task.known["given"]], 1)
    return float(torch.corrcoef(pair.T)[0, 1]), float(found["made"].std())


SAMPLERS = {
    "ddim": DDIM(steps=50),
    "ddpm": DDPM(steps=200),
    "dpm_solver_2m": DPMSolver(steps=20),
}


@ON_EVERY_PATH
@pytest.mark.parametrize("name", SAMPLERS)
def test_reconstruction_finds_the_correlation(path, name):
    """True 0.90; unguided 0.00, replacement alone 0.5 to 0.7. The spread stays one."""
    unguided, _ = correlation(path, lambda denoise, task: denoise, SAMPLERS[name])
    replaced, _ = correlation(path, Replace(), SAMPLERS[name])
    found, spread = correlation(path, Reconstruct(), SAMPLERS[name])
    assert abs(unguided) < 0.06
    assert 0.4 < replaced < 0.75
    assert 0.80 <= found <= 0.93
    assert spread == pytest.approx(1, abs=0.07)


@pytest.mark.parametrize("guide", [Replace(), Reconstruct()], ids=["replace", "reconstruct"])
@ON_EVERY_PATH
@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler_takes_them(kind, path, guide):
    """The known part is held exactly in every prediction, and the rest goes with it."""
    x, task = clip(path, (200, 2))
    inner, seen = guide(correlated(path), task), []

    def denoise(x, t):
        found = inner(x, t)
        seen.append(found)
        free = path.alpha(t) * found.x0["made"] + path.sigma(t) * found.eps["made"]
        torch.testing.assert_close(free, x["made"], rtol=1e-6, atol=1e-6)
        return found

    found = last(kind(steps=30)(denoise, x, path, noise=Seeded()))
    assert all(torch.equal(each.x0["given"], task.known["given"]) for each in seen)
    pair = torch.stack([found["made"].flatten(), task.known["given"].flatten()])
    assert float(torch.corrcoef(pair)[0, 1]) > (0.7 if isinstance(guide, Reconstruct) else 0.35)


@ON_EVERY_PATH
def test_strength_does_not_depend_on_batch_length_or_precision(path):
    """The guided prediction of a value is the same alone, among many and beside a longer clip."""
    t = double(0.6)

    def predicted(rows, length, dtype=torch.float64):
        x, task = clip(path, (8, 12))
        cut = [
            part.map(lambda v: v[:rows, :length].to(dtype)) for part in (x, task.known, task.noise)
        ]
        mask = task.mask.map(lambda v: v[:rows, :length])
        task = task._replace(known=cut[1], noise=cut[2], mask=mask)
        x0 = Reconstruct()(correlated(path), task)(cut[0], t).x0["made"]
        assert x0.dtype == dtype
        return x0[:1, :3].double()

    alone = predicted(1, 3)
    for other in (predicted(8, 3), predicted(1, 12), predicted(8, 12)):
        torch.testing.assert_close(other, alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(predicted(8, 12, torch.float32), alone, rtol=1e-4, atol=1e-4)


def test_strength_zero_is_replacement_and_more_moves_further():
    path = PATHS["linear"]
    x, task = clip(path, (50, 4))
    t = double(0.5)
    plain = Replace()(correlated(path), task)(x, t).x0["made"]
    moves = []
    for strength in (0.0, 0.5, 1.0):
        x0 = Reconstruct(strength=strength)(correlated(path), task)(x, t).x0["made"]
        moves.append(float((x0 - plain).abs().mean()))
    assert moves[0] == 0
    assert moves[2] == pytest.approx(2 * moves[1], rel=1e-6)


def test_a_step_is_that_of_a_bayesian():
    """Where next to nothing but noise is left, x0 is what the known part says of it: 0.9 of it."""
    path = PATHS["edm"]
    x, task = clip(path, (50, 1))
    t = double(0.9)  # sigma 27
    x0 = Reconstruct(cap=1e9)(correlated(path), task)(x, t).x0["made"]
    torch.testing.assert_close(x0, TRUE * task.known["given"], rtol=0.05, atol=0.1)


def test_a_part_of_the_time_is_held():
    path = PATHS["linear"]
    x, task = clip(path, (400, 6), part=2)
    found = last(DDIM(steps=30)(Reconstruct()(correlated(path), task), x, path))
    torch.testing.assert_close(found["given"][:, :2], task.known["given"][:, :2])
    for place in range(6):
        pair = torch.stack([found["made"][:, place], task.known["given"][:, place]])
        c = float(torch.corrcoef(pair)[0, 1])
        assert c > 0.8 if place < 2 else abs(c) < 0.2


def test_nothing_known_changes_nothing_and_nothing_given_is_an_error():
    path = PATHS["linear"]
    _, task = clip(path, (3, 2), part=0)
    model = correlated(path)
    for guide in (Replace(), Reconstruct()):
        assert guide(model, task) is model
        with pytest.raises(ValueError, match=f"{type(guide).__name__} holds .* nothing is given"):
            guide(model, Task(path))
    with pytest.raises(ValueError, match="strength=-1"):
        Reconstruct(strength=-1)


@ON_EVERY_PATH
def test_going_back_and_forth_brings_replacement_nearer_to_the_truth(path):
    """RePaint's point: 0.55 with DDIM becomes better with every time."""
    found = [
        correlation(path, Replace(), Resample(sampler=DDIM(steps=40, eta=1.0), jump=5, times=n))[0]
        for n in (1, 3, 8)
    ]
    assert found[0] < 0.75
    assert found[0] + 0.05 < found[1] < found[2]
    assert found[2] > 0.82


@ON_EVERY_PATH
def test_resampling_keeps_the_distribution_and_counts(path):
    mean, spread, calls = 0.3, 0.5, []

    def denoise(x, t):
        calls.append(float(t))
        alpha, sigma = path.alpha(t), path.sigma(t)
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        x0 = mean + gain * (x - alpha * mean)
        return Prediction(x0, (x - alpha * x0) / sigma)

    x = path.sigma(double(path.t_max)) * normal(8000)
    sampler = Resample(sampler=DDIM(steps=100), jump=10, times=2)
    states = list(sampler(denoise, x, path, noise=Seeded()))
    assert len(states) == len(calls) == sampler.steps == 200
    assert calls[10] == calls[0] == path.t_max  # back to where the stretch began
    assert abs(float(states[-1].mean()) - mean) < 0.03
    assert abs(float(states[-1].std()) / spread - 1) < 0.06


def test_wrong_stretches_are_named():
    with pytest.raises(ValueError, match="jump=0"):
        Resample(jump=0)
    assert not Resample(sampler=DPMSolver(method="adaptive")).together
