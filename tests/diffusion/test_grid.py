"""Where samplers stop: the published tables, and ends that are met exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.diffusion.grid import (
    GRIDS,
    karras,
    leading,
    log_snr,
    quadratic,
    sections,
    time_uniform,
    trailing,
)
from avdiffusion.diffusion.path import EDM, CosineVP, DiscreteVP, RectifiedFlow

VP = DiscreteVP()
PATHS = {
    "linear": VP,
    "cosine": DiscreteVP(betas="cosine"),
    "flow": RectifiedFlow(),
    "quarter": CosineVP(),
    "edm": EDM(),
}
ON_EVERY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
TABLES = (leading, sections)
TO_T_MIN = (time_uniform, quadratic, log_snr)


def places(times, total=1000):
    """The table's steps, ascending; the last time is the data."""
    assert float(times[-1]) == 0
    steps = times[:-1] * total - 1
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)
    return steps.round().int().flip(0).tolist()


def test_sections_are_the_published_respacing():
    table = places(sections(VP, 50, 1.0, 0.0))
    assert len(table) == 50
    assert table[:5] == [0, 20, 41, 61, 82]
    assert table[-3:] == [958, 979, 999]
    assert places(sections(VP, 1000, 1.0, 0.0)) == list(range(1000))
    assert places(sections(VP, 2, 1.0, 0.0)) == [0, 999]
    assert places(sections(VP, 1, 1.0, 0.0)) == [0]
    # One of the two halves of the published "10,10": a table of 500.
    half = places(sections(DiscreteVP(steps=500), 10, 1.0, 0.0), 500)
    assert half[:6] == [0, 55, 111, 166, 222, 277]
    assert half[-2:] == [444, 499]


def test_leading_is_the_published_ddim_table():
    assert places(leading(VP, 25, 1.0, 0.0)) == list(range(0, 1000, 40))
    assert places(leading(VP, 50, 1.0, 0.0)) == list(range(0, 1000, 20))
    assert places(leading(VP, 1000, 1.0, 0.0)) == list(range(1000))
    assert places(leading(VP, 334, 1.0, 0.0)) == list(range(0, 1000, 3))


def test_counts_without_a_table_are_refused():
    with pytest.raises(ValueError, match="no integer stride takes 600 of 1000 steps"):
        leading(VP, 600, 1.0, 0.0)
    with pytest.raises(ValueError, match="steps=1001"):
        sections(VP, 1001, 1.0, 0.0)
    for grid in (leading, sections):
        with pytest.raises(ValueError, match="EDM is no table of steps"):
            grid(EDM(), 10, 1.0, 0.0)


def test_a_table_below_the_end_is_refused():
    """The step of a table of one is the last before the data."""
    assert sections(VP, 1, 1.0, 0.0).tolist() == [1 / 1000, 0.0]
    with pytest.raises(ValueError, match=r"none of the table's 1 steps lies above t_end=0.25"):
        sections(VP, 1, 1.0, 0.25)


def test_trailing_is_uniform_in_time_and_hits_the_table():
    times = trailing(VP, 50, 1.0, 0.0)
    assert places(times) == list(range(19, 1000, 20))
    assert torch.equal(VP.log_alpha(times), VP.log_alphas[list(range(1000, -1, -20))])


@ON_EVERY_PATH
def test_log_snr_is_uniform_in_log_snr(path):
    times = log_snr(path, 20, path.t_max, 0.0)
    lam = path.lam(times[1:])
    torch.testing.assert_close(lam.diff(), lam.diff()[:1].expand(19), rtol=1e-6, atol=0)
    assert float(times[0]) == path.t_max
    assert float(times[-1]) == path.t_min


@ON_EVERY_PATH
@pytest.mark.parametrize("grid", [log_snr, karras])
def test_times_fall_from_just_below_the_end(grid, path):
    times = grid(path, 100, 1 - 1e-15, 0.0)
    assert bool((times.diff() < 0).all())


@ON_EVERY_PATH
@pytest.mark.parametrize(("grid", "power"), [(time_uniform, 1.0), (quadratic, 0.5)])
def test_grids_in_time_are_uniform_in_a_power_of_it(grid, power, path):
    for start, end in ((path.t_max, 0.0), (0.8, 0.2)):
        times = grid(path, 20, start, end)
        found = times**power
        torch.testing.assert_close(found.diff(), found.diff()[:1].expand(20), rtol=1e-9, atol=0)
        assert float(times[0]) == start
        assert float(times[-1]) == max(end, path.t_min)


def test_karras_has_the_published_noise_levels():
    """Table 1 and equation 5: 18 levels from 80 to 0.002."""
    path = EDM()
    found = path.sigma(karras(path, 17, 1.0, 0.0))
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    expected = [(high + i / 17 * (low - high)) ** 7 for i in range(18)]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0
    )


@ON_EVERY_PATH
def test_karras_reaches_the_data_from_the_path_s_lowest_time(path):
    """Uniform in the 7th root of sigma / alpha, without the first time of an infinite one."""
    steps = 20 if path.t_min else 19
    times = karras(path, steps, path.t_max, 0.0)
    assert len(times) == steps + 1
    assert float(times[0]) == path.t_max
    assert float(times[-1]) == 0
    if path.t_min:
        assert float(times[-2]) == path.t_min
        times = times[:-1]
    root = (-path.lam(times) / 7).exp()
    if not root[0].isfinite():
        root[0] = math.e  # of lambda -7
    torch.testing.assert_close(root.diff(), root.diff()[:1].expand(19), rtol=1e-6, atol=0)
    # One step has no time to spend, and a stretch above t_min is one line.
    assert karras(path, 1, path.t_max, 0.0).tolist() == [path.t_max, 0.0]
    root = (-path.lam(karras(path, 10, 0.8, 0.3)) / 7).exp()
    torch.testing.assert_close(root.diff(), root.diff()[:1].expand(10), rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", [time_uniform, quadratic, log_snr, karras])
def test_a_start_below_the_end_is_refused(grid):
    for start, end in ((0.5 * VP.t_min, 0.0), (VP.t_min, 0.0), (0.2, 0.3)):
        with pytest.raises(ValueError, match=f"no times fall from t_start={start}"):
            grid(VP, 5, start, end)


@ON_EVERY_PATH
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@settings(deadline=None, max_examples=25)
@given(steps=st.sampled_from([1, 2, 5, 10, 25, 100]), data=st.data())
def test_grids_fall_strictly_from_start_to_end(path, grid, steps, data):
    if grid in TABLES and (isinstance(path, EDM) or steps == 1):
        return
    start = data.draw(st.sampled_from([path.t_max, 0.7, 0.5]) | st.floats(0.3, 1))
    end = data.draw(st.sampled_from([0.0, 0.1]) | st.floats(0, 0.25))
    times = grid(path, steps, start, end)
    assert times.dtype == torch.float64
    assert times.device.type == "cpu"
    assert len(times) > 1
    assert bool((times.diff() < 0).all())
    if grid not in TABLES:
        assert len(times) == steps + 1
    assert float(times[-1]) == (max(end, path.t_min) if grid in TO_T_MIN else end)
    if start < 1 or grid not in TABLES:
        assert float(times[0]) == start
