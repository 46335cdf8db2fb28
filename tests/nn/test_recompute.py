"""What is computed again, on stages whose memory and work are known by hand."""

import pytest
import torch
from torch import nn

from avdiffusion.nn.recompute import chosen, survey

N, C = 64, 32
KIB = N * C * 4 / 1024  # of one activation


class Wave(nn.Module):
    """Keeps its input and `times - 1` more of its size, with no matrix product."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, x):
        for _ in range(self.times):
            x = x.sin()
        return x


def network():
    """Stages that keep, of their own, 2 activations, none, and 5."""
    return nn.ModuleList([Wave(3), nn.Linear(C, C), Wave(6)])


def run(stages):
    x = torch.empty(N, C, requires_grad=True)
    for stage in stages:
        x = stage(x)
    return x


def test_memory_and_work_of_stages_are_those_counted_by_hand():
    stages = network()
    total, freed = survey(stages, lambda: run(stages))
    # three inputs of the first, the linear one's input, six of the last
    assert total / 1024 == 10 * KIB
    memory, work = zip(*(freed[stage] for stage in stages), strict=True)
    assert [each / 1024 for each in memory] == [2 * KIB, 0, 5 * KIB]
    assert work == (0, 2 * N * C * C, 0)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [(10, []), (9.9, [2]), (5, [2]), (4.9, [0, 2]), (3, [0, 2]), (1, [0, 1, 2])],
)
def test_as_few_stages_as_the_budget_allows(kept, expected):
    stages = network()
    picked = chosen(stages, lambda: run(stages), kept * KIB * 1024)
    assert [place for place, stage in enumerate(stages) if stage in picked] == expected


def test_nothing_is_left_behind():
    stages = network()
    chosen(stages, lambda: run(stages), 0)
    assert not any(stage._forward_hooks or stage._forward_pre_hooks for stage in stages)
    assert run(stages).grad_fn is not None
