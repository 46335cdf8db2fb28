"""Where samplers stop: the published tables, and ends that are met exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.diffusion.grid import GRIDS, leading, log_snr, sections, trailing
from avdiffusion.diffusion.path import EDM, DiscreteVP, RectifiedFlow

VP = DiscreteVP()
PATHS = {"linear": VP, "cosine": DiscreteVP(betas="cosine"), "flow": RectifiedFlow(), "edm": EDM()}


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


def test_trailing_is_uniform_in_time_and_hits_the_table():
    times = trailing(VP, 50, 1.0, 0.0)
    assert places(times) == list(range(19, 1000, 20))
    assert torch.equal(VP.log_alpha(times), VP.log_alphas[list(range(1000, -1, -20))])


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_log_snr_is_uniform_in_log_snr(path):
    times = log_snr(path, 20, path.t_max, 0.0)
    lam = path.lam(times[1:])
    torch.testing.assert_close(lam.diff(), lam.diff()[:1].expand(19), rtol=1e-6, atol=0)
    assert float(times[0]) == path.t_max
    assert float(times[-1]) == path.t_min


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_log_snr_falls_from_just_below_the_end(path):
    times = log_snr(path, 100, 1 - 1e-15, 0.0)
    assert bool((times.diff() < 0).all())


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@settings(deadline=None, max_examples=25)
@given(steps=st.sampled_from([1, 2, 5, 10, 25, 100]), data=st.data())
def test_grids_fall_strictly_from_start_to_end(path, grid, steps, data):
    if (isinstance(path, EDM) and grid in (leading, sections)) or (grid is leading and steps == 1):
        return
    start = data.draw(st.sampled_from([path.t_max, 0.7, 0.5]) | st.floats(0.3, 1))
    end = data.draw(st.sampled_from([0.0, 0.1]) | st.floats(0, 0.25))
    times = grid(path, steps, start, end)
    assert times.dtype == torch.float64
    assert times.device.type == "cpu"
    assert bool((times.diff() < 0).all())
    if grid in (trailing, log_snr):
        assert len(times) == steps + 1
    assert float(times[-1]) == (max(end, path.t_min) if grid is log_snr else end)
    if start < 1 or grid in (trailing, log_snr):
        assert float(times[0]) == start
