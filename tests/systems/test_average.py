"""Averages against ema-pytorch and against their definition, computed by other means."""

from functools import partial
from itertools import pairwise
from pathlib import Path

import ema_pytorch
import numpy as np
import pytest
import torch
from small_system import data, fit, system
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from avdiffusion.systems.average import (
    EMA,
    WIDEST,
    PowerEMA,
    coefficients,
    decay,
    gamma,
    inner,
    places,
)


class Point(nn.Module):
    """Two numbers that move, and buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("level", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def trajectory(steps, seed=0):
    """A decaying motion with noise on it [steps, 2], as training is."""
    t = np.arange(1, steps + 1)[:, None]
    rough = np.random.default_rng(seed).normal(size=(steps, 2)).cumsum(0) / steps**0.5
    return np.exp(-3 * t / steps) * [1.0, -2.0] + [0.5, 5.0] + 0.1 * rough


def follow(averages, model, path):
    for k, place in enumerate(path):
        with torch.no_grad():
            model.place.copy_(torch.from_numpy(place))
            model.level.fill_(place[0])
            model.count.fill_(k)
        for average in averages:
            average.update()


def integral(function, low, high, parts=4000):
    """By Simpson's rule."""
    x = np.linspace(low, high, 2 * parts + 1)
    y = function(x)
    return (high - low) / (6 * parts) * (y[0] + y[-1] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum())


# ---------------------------------------------------------------------------- fixed decay

PLAIN = {"inv_gamma": 9.0, "power": 1.0, "update_every": 1, "update_after_step": 0}


@pytest.mark.parametrize(
    "options",
    [
        {**PLAIN, "beta": 0.97},
        {**PLAIN, "beta": 0.9, "min_value": 0.9},
        {**PLAIN, "beta": 1.0},
        {"beta": 0.999, "inv_gamma": 1.0, "power": 2 / 3, "update_every": 3}
        | {"update_after_step": 10},
    ],
    ids=["warmup", "constant", "frozen", "sparse"],
)
def test_the_average_is_that_of_ema_pytorch_to_the_bit(options):
    """Weights, counters and decays over a motion with all kinds of buffers, and after loading."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    ours = EMA(model, **options)
    theirs = ema_pytorch.EMA(model, include_online_model=False, use_foreach=True, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for step in range(300):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
            model(torch.randn(4, 9))
        if step == 150:  # as when a run goes on
            state = ours.state_dict()
            ours = EMA(model, **options)
            ours.load_state_dict(state)
        ours.update()
        theirs.update()
        assert ours.get_current_decay() == theirs.get_current_decay()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    moved = not torch.equal(ours.ema_model[0].weight, model[0].weight)
    assert moved
    assert ours.model is theirs.model is model


def test_weights_that_modules_share_move_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    average = EMA(model, beta=0.5, min_value=0.5)
    average.update()
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    average.update()
    torch.testing.assert_close(average.ema_model[1].weight, start + 0.5)


# --------------------------------------------------------------------------------- widths


def test_exponents_of_the_paper():
    assert gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma(WIDEST) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.15, 0.25, 0.28])
def test_a_profile_has_the_standard_deviation_it_is_named_for(sigma_rel):
    g = gamma(sigma_rel)
    total, first, second = (integral(lambda u, k=k: u ** (g + k), 0, 1) for k in range(3))
    assert (second / total - (first / total) ** 2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.29, 5, float("nan")])
def test_widths_that_no_profile_has_are_named(sigma_rel):
    with pytest.raises(ValueError, match=rf"sigma_rel={sigma_rel} is not within 0 and 0\.289"):
        gamma(sigma_rel)


@pytest.mark.parametrize("sigma_rels", [[], [0.1, 0.1]])
def test_widths_are_named_once(sigma_rels):
    with pytest.raises(ValueError, match="each once"):
        PowerEMA(Point(), sigma_rels=sigma_rels)


# --------------------------------------------------------------------------------- tracks


def test_tracks_are_integrals_over_the_profile():
    """Of the weights after every update, which stand until the next one."""
    model, path = Point(), trajectory(60)
    average = PowerEMA(model, sigma_rels=(0.05, 0.1, 0.25))
    follow([average], model, path)
    for g, track in zip(average.gammas, (average.ema_model, *average.others), strict=True):
        shares = [integral(lambda u, g=g: (g + 1) * u**g, k / 60, (k + 1) / 60) for k in range(60)]
        assert sum(shares) == pytest.approx(1)
        torch.testing.assert_close(track.place.numpy(), np.array(shares) @ path, rtol=1e-9, atol=0)
        assert float(track.level) == pytest.approx(shares @ path[:, 0])
        assert int(track.count) == 59


def test_the_first_update_takes_the_weights_as_they_are():
    model = Point()
    average = PowerEMA(model)
    follow([average], model, trajectory(1))
    assert torch.equal(average.ema_model.place, model.place)
    assert average.get_current_decay() == 0
    follow([average], model, trajectory(9))
    assert average.get_current_decay() == decay(gamma(0.05), 10) == pytest.approx(0.9**17.972, 1e-4)


def test_averages_are_no_part_of_training_nor_the_model_of_them():
    model = Point()
    average = PowerEMA(model)
    assert not any(p.requires_grad for p in average.parameters())
    assert model.place.requires_grad
    keys = {f"{p}.{k}" for p in places(2) for k in model.state_dict()} | {"step"}
    assert average.state_dict().keys() == keys
    model.place.data += 1
    assert float(average.ema_model.place.abs().max()) == 0


class NoReading(TorchDispatchMode):
    """Refuses what waits for a device: reading a tensor's value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        assert name not in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero"), name
        return func(*args, **(kwargs or {}))


def test_an_update_on_the_meta_device_runs():
    """Where nothing can be read."""
    for kind in (EMA, PowerEMA):
        model = Point().to("meta")
        average = kind(model).to("meta")
        with pytest.raises(RuntimeError, match="meta"):
            int(average.step)
        for _ in range(3):
            average.update()
        assert average.count == 3
        assert average.get_current_decay() > 0


def test_an_update_reads_no_tensor():
    average = PowerEMA(Point())
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        int(average.step)
    with NoReading():
        average.update()
        average.update()
        assert average.get_current_decay() > 0
    assert int(average.step) == average.count == 2


# -------------------------------------------------------------------------- reconstruction


def test_inner_products_are_integrals():
    for t_a, g_a, t_b, g_b in [(5.0, 17.0, 9.0, 7.0), (9.0, 2.0, 5.0, 7.0), (4.0, 3.0, 4.0, 3.0)]:
        end = min(t_a, t_b)
        found = inner(*map(np.array, (t_a, g_a, t_b, g_b)))
        expected = integral(
            lambda u, a=(t_a, g_a), b=(t_b, g_b): (
                (a[1] + 1) * u ** a[1] / a[0] ** (a[1] + 1)
                * (b[1] + 1) * u ** b[1] / b[0] ** (b[1] + 1)
            ),
            0,
            end,
        )  # fmt: skip
        assert float(found) == pytest.approx(expected, rel=1e-7)


def every(number, total=1024):
    """(times, exponents) of two tracks in `number` snapshots."""
    t = np.repeat(np.linspace(total / number, total, number), 2)
    return t, np.tile([gamma(0.05), gamma(0.1)], number)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.075, 0.15, 0.25])
def test_coefficients_are_the_best_there_are(sigma_rel):
    """Of those whose sum is 1; on a grid, by brute force."""
    t, g = every(8)
    x, error = coefficients(t, g, 1024, gamma(sigma_rel))
    grid = (np.arange(200_000) + 0.5) * 1024 / 200_000

    def profile(t, g):
        return np.where(grid < t, (g + 1) * (grid / t) ** g / t, 0)

    goal, parts = profile(1024, gamma(sigma_rel)), np.stack([*map(profile, t, g)])

    def distance(x):
        return np.linalg.norm(x @ parts - goal) / np.linalg.norm(goal)

    assert x.sum() == pytest.approx(1, abs=1e-12)
    assert distance(x) == pytest.approx(error, rel=1e-3)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            step = rng.normal(size=len(x)) * size
            assert distance(x + step - step.mean()) > error


def test_the_error_shrinks_with_more_snapshots():
    errors = [coefficients(*every(n), 1024, gamma(0.15))[1] for n in (2, 4, 8, 16, 32, 64)]
    assert all(fine < 0.6 * coarse for coarse, fine in pairwise(errors))
    assert errors[0] > 0.1
    assert errors[-1] < 1e-3


def test_a_track_is_its_own_best_reconstruction():
    x, error = coefficients(*every(6), 1024, gamma(0.1))
    assert error < 1e-6
    assert x[-1] == pytest.approx(1)
    assert np.abs(x[:-1]).max() < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.075, 0.15, 0.2])
def test_a_third_width_from_snapshots_of_two(sigma_rel):
    """As the average that was kept all along; nearer with more snapshots."""
    model, path = Point(), trajectory(512)
    two, third = PowerEMA(model), PowerEMA(model, sigma_rels=[sigma_rel])
    seen = []
    for place in path:
        follow([two, third], model, [place])
        seen.append(torch.stack([two.ema_model.place, two.others[0].place]).detach().clone())
    moved = np.abs(path[-1] - path[0]).max()
    errors = []
    for number in (4, 16, 64):
        t, g = every(number, 512)
        x, _ = coefficients(t, g, 512, third.gammas[0])
        kept = torch.cat([seen[int(k) - 1] for k in t[::2]])
        found = torch.from_numpy(x) @ kept
        errors.append(float((found - third.ema_model.place).abs().max()) / moved)
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 1e-4


def test_the_figures_of_the_page():
    """Those of docs/averages.md."""
    page = (Path(__file__).parents[2] / "docs" / "averages.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    rows = {name: values for name, *values in rows}
    for width, exponent in zip(rows["`sigma_rel`"], rows["gamma"], strict=True):
        assert gamma(float(width)) == pytest.approx(float(exponent), abs=0.005)
    for width in ("0.02", "0.075", "0.15", "0.20", "0.25"):
        for number, stated in zip(rows["step files"], rows[width], strict=True):
            error = 100 * coefficients(*every(int(number)), 1024, gamma(float(width)))[1]
            assert error == pytest.approx(float(stated.removesuffix(" %")), rel=0.05)


# ----------------------------------------------------------------------------------- resume


def test_resume_is_equal_to_the_bit(tmp_path):
    def build():
        return system(ema=partial(PowerEMA, sigma_rels=(0.05, 0.1)))

    whole, half, rest = build(), build(), build()
    fit(whole, 7, data(batch_size=4, val=0))
    fit(half, 3, data(batch_size=4, val=0)).save_checkpoint(tmp_path / "half.ckpt")
    fit(rest, 7, data(batch_size=4, val=0), ckpt=tmp_path / "half.ckpt")
    assert rest.ema.count == int(rest.ema.step) == 7
    for name, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value), name
    tracks = [dict(t.named_parameters()) for t in (rest.ema.ema_model, rest.ema.others[0])]
    assert not torch.equal(*(t["net.hidden.weight"] for t in tracks))
