"""Learning rates over a run."""

import math
from itertools import pairwise

import pytest
import torch

from avdiffusion.systems.schedule import warmup


def rates(steps, **options):
    """The rate that each of the first optimiser steps uses."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule, used = warmup(optimizer, **options), []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        schedule.step()
    return used


def test_constant_by_default():
    assert rates(5) == [1.0] * 5


def test_warmup_rises_linearly_and_never_starts_at_zero():
    assert rates(8, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


def test_cosine_goes_from_one_to_the_final_share():
    used = rates(14, warmup_steps=2, decay="cosine", total_steps=12, final=0.1)
    assert used[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert used[7] == pytest.approx(0.55)
    assert used[4] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(0.2 * math.pi)))
    assert used[12:] == pytest.approx([0.1, 0.1])
    assert all(a >= b for a, b in pairwise(used[2:]))


def test_a_warmup_longer_than_the_run_is_harmless():
    assert rates(4, warmup_steps=9, decay="cosine", total_steps=4) == pytest.approx(
        [0.1, 0.2, 0.3, 0.4]
    )


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="decay='linear' is not one of constant, cosine"):
        rates(1, decay="linear")
    for total in (None, -1, 0):
        with pytest.raises(ValueError, match=r"cosine needs an end.*trainer\.max_steps"):
            rates(1, decay="cosine", total_steps=total)
