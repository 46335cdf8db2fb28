"""Running means and deviations of channels, against numpy and closed forms."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.systems.moments import RECENT, Moments


def batches(count, shape, seed=0, scale=3.0, shift=-2.0):
    rng = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.5, scale, shape[1]).view(-1, *[1] * (len(shape) - 2))
    return [shift + scales * torch.randn(shape, generator=rng) for _ in range(count)]


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 12),
    size=st.integers(1, 4),
    channels=st.integers(1, 3),
    rest=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_few_batches_are_all_one(count, size, channels, rest):
    """Up to 1 / RECENT of them the averages are those of all values together."""
    moments, given = Moments(channels), batches(count, (size, channels, *rest))
    for z in given:
        moments.update(z)
    values = torch.cat(given).double().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(moments.mean, values.mean(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.square, (values**2).mean(1), rtol=1e-4, atol=1e-4)
    if values.shape[1] > 2:
        np.testing.assert_allclose(moments.deviation, values.std(1), rtol=2e-2, atol=2e-3)
    assert int(moments.batches) == count


def test_many_batches_are_forgotten_at_a_fixed_pace():
    """A value that jumps: after n more batches it is all but (1 - RECENT)^n of the average."""
    moments = Moments(1)
    for _ in range(300):
        moments.update(torch.zeros(1, 1, 4))
    for n in range(1, 200):
        moments.update(torch.ones(1, 1, 4))
        if n in (1, 10, 199):
            assert float(moments.mean) == pytest.approx(1 - (1 - RECENT) ** n, rel=1e-3)
    assert float(moments.deviation) == pytest.approx(
        np.sqrt(float(moments.mean) * (1 - float(moments.mean))), rel=1e-3
    )


def test_values_get_mean_0_and_deviation_1_and_come_back():
    moments, (z,) = Moments(3), batches(1, (16, 3, 2, 5, 7))
    moments.update(z)
    normal = moments.normalise(z)
    values = normal.transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(values.std(1, correction=0), torch.ones(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(moments.restore(normal), z, rtol=1e-5, atol=1e-5)


def half_of_each(rank, folder, given):
    """What a process of two measures of its part of every batch."""
    store = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    moments = Moments(3)
    for z in given:
        moments.update(z.chunk(2)[rank])
    torch.save(moments.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_two_processes_measure_as_one(tmp_path):
    """Each keeps what all have seen: buffers are not sent around, and one alone is saved."""
    given = batches(3, (4, 3, 5))
    torch.multiprocessing.start_processes(
        half_of_each, args=(str(tmp_path), given), nprocs=2, start_method="fork"
    )
    moments = Moments(3)
    for z in given:
        moments.update(z)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), dict(moments.state_dict()))


def test_before_any_batch_values_stay():
    moments, z = Moments(2), torch.randn(3, 2, 4)
    assert torch.equal(moments.normalise(z), z)
    assert torch.equal(moments.restore(z), z)


def test_a_channel_that_never_changes_keeps_its_scale():
    moments = Moments(2)
    moments.update(torch.stack([torch.full((8, 5), 7.0), torch.randn(8, 5)], 1))
    z = moments.normalise(torch.full((1, 2, 5), 7.5))
    torch.testing.assert_close(z[0, 0], torch.full((5,), 0.5))
    assert bool(z.isfinite().all())


def test_no_gradient_and_no_half_precision_gets_into_the_averages():
    moments = Moments(1)
    z = (100 + torch.rand(1, 1, 4096)).to(torch.bfloat16).requires_grad_()
    moments.update(z)
    assert moments.mean.dtype == moments.square.dtype == torch.float32
    assert not moments.mean.requires_grad
    assert float(moments.mean) == pytest.approx(float(z.detach().float().mean()), rel=1e-5)


def test_what_was_measured_is_part_of_the_state():
    moments, other, (z,) = Moments(3), Moments(3), batches(1, (4, 3, 9))
    moments.update(z)
    other.load_state_dict(moments.state_dict())
    assert torch.equal(other.normalise(z), moments.normalise(z))
    assert int(other.batches) == 1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_left_out(wrong):
    """Training goes on after one, and so do these."""
    moments, z = Moments(2), torch.randn(8, 2, 5, generator=torch.Generator().manual_seed(0))
    moments.update(z)
    before = moments.mean.clone(), moments.square.clone()
    broken = z.clone()
    broken[0, 0, 0] = wrong
    moments.update(broken)
    assert torch.equal(moments.mean, before[0])
    assert torch.equal(moments.square, before[1])
