"""Batch normalisation that knows the time, against PyTorch's and closed forms."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from golden_network import relative
from torch import nn

from avdiffusion.diffusion.diffusion import Diffusion
from avdiffusion.diffusion.path import DiscreteVP
from avdiffusion.media import Media
from avdiffusion.nn.batch_norm import ConditionalBatchNorm
from avdiffusion.nn.unet import UNet
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.sampler import last
from avdiffusion.systems.average import EMA

SMALL = {
    "dims": 3,
    "concat_channels": 0,
    "channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "num_heads": 2,
    "conv": "2plus1d",
    "attention": "factorised",
    "attention_resolutions": (2,),
    "resblock_updown": False,
    "out_factor": 1,
    "norm": "batch",
}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(**changes):
    torch.manual_seed(0)
    return UNet(**{**SMALL, **changes})


def awake(**changes):
    net = fresh(**changes)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def clips(batch=4, frames=3, height=8, width=8, seed=0):
    x = drawn(batch, 3, frames, height, width, seed=seed).float()
    return x, torch.linspace(0, 999, batch)


def norms(net):
    return [module for module in net.modules() if isinstance(module, ConditionalBatchNorm)]


def moved(norm):
    """The sets of statistics that have had samples."""
    return tuple((norm.variance != 1).any(1).nonzero().flatten().tolist())


# the layer


def test_it_starts_as_plain_batch_normalisation():
    """In training, with its gradient, and with a film of zeros or none."""
    norm, plain = ConditionalBatchNorm(6).double(), nn.BatchNorm1d(6, affine=False).double()
    x = (3 + 2 * drawn(5, 7, 1, 6)).requires_grad_(True)
    share, weight = torch.rand(5), drawn(5, 7, 1, 6, seed=1)
    expected = plain(x.flatten(0, 2)).view_as(x)
    slope = torch.autograd.grad((expected * weight).sum(), x)[0]
    for film in (None, torch.zeros(5, 12).double(), torch.zeros(1, 12).double()):
        found = norm(x, film, share=share)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad((found * weight).sum(), x)[0], slope)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_a_film_scales_and_shifts(training, silu):
    norm = ConditionalBatchNorm(3, silu=silu).double().train(training)
    plain = ConditionalBatchNorm(3).double().train(training)
    x, film, share = drawn(2, 5, 1, 3), drawn(2, 6, seed=1), torch.tensor([0.1, 0.9])
    scale, shift = film[:, None, None].chunk(2, dim=-1)
    expected = (1 + scale) * plain(x, share=share) + shift
    found = norm(x, film, share=share)
    torch.testing.assert_close(found, F.silu(expected) if silu else expected)


def test_every_part_of_the_schedule_has_its_own_statistics():
    """Those of all its samples together; one that has none keeps what it has."""
    norm, x = ConditionalBatchNorm(2, buckets=4, momentum=1.0).double(), drawn(5, 9, 1, 2)
    x = x * torch.tensor([1.0, 2, 3, 4, 5]).view(5, 1, 1, 1) + torch.arange(5).view(5, 1, 1, 1)
    norm(x, share=torch.tensor([0.0, 0.249, 0.75, 1.0, 0.3]))  # sets 0, 0, 3, 3, 1
    for bucket, samples in {0: x[:2], 3: x[2:4], 1: x[4:]}.items():
        variance, mean = torch.var_mean(samples.flatten(0, 2), 0, correction=0)
        torch.testing.assert_close(norm.mean[bucket], mean)
        torch.testing.assert_close(norm.variance[bucket], variance)
    assert norm.mean[2].tolist() == [0, 0]
    assert norm.variance[2].tolist() == [1, 1]
    out = norm.eval()(x, share=torch.tensor([0.1, 0.1, 0.9, 0.9, 0.3]))
    for samples in (out[:2], out[2:4], out[4:]):
        variance, mean = torch.var_mean(samples.flatten(0, 2), 0, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean))
        torch.testing.assert_close(variance, torch.ones_like(mean), rtol=1e-3, atol=0)


def test_averages_of_one_set_are_those_of_plain_batch_normalisation():
    """But for a correction of the variance, by n / (n - 1), that PyTorch keeps and does not use."""
    norm = ConditionalBatchNorm(2, buckets=1, momentum=0.25).double()
    plain = nn.BatchNorm1d(2, affine=False, momentum=0.25).double()
    for seed in range(6):
        x = seed + (1 + seed) * drawn(3, 50, 1, 2, seed=seed)
        norm(x, share=torch.rand(3))
        plain(x.flatten(0, 2))
    torch.testing.assert_close(norm.mean[0], plain.running_mean)
    first = 0.75**6  # what is left of the ones it began with
    corrected = (norm.variance[0] - first) * 150 / 149 + first
    torch.testing.assert_close(corrected, plain.running_var)


def test_in_use_a_sample_depends_on_no_other():
    norm, x, share = ConditionalBatchNorm(4).double(), drawn(3, 5, 1, 4), torch.rand(3)
    norm(x, share=share)
    assert relative(norm(x, share=share)[:1], norm(x[:1], share=share[:1])) > 0.01
    kept = norm.mean.clone()
    norm.eval()
    together = norm(x, share=share)
    alone = [norm(x[k : k + 1], share=share[k : k + 1]) for k in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(norm.mean, kept)


def test_statistics_are_in_float32_under_mixed_precision():
    norm, x = ConditionalBatchNorm(4, buckets=1, momentum=1.0), 100 + drawn(4, 64, 1, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.bfloat16(), share=torch.rand(4)).dtype == torch.bfloat16
    variance, mean = torch.var_mean(x.bfloat16().float().flatten(0, 2), 0, correction=0)
    torch.testing.assert_close(norm.mean[0], mean)
    torch.testing.assert_close(norm.variance[0], variance)


def half_a_batch(rank, folder, size):
    """What a process of two makes of its part of a batch; all of it is written to a file."""
    store = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    norm, x, share = ConditionalBatchNorm(3).double(), drawn(size, 5, 1, 3), shares(size)
    part = slice(0, size // 2) if rank == 0 else slice(size // 2, size)
    mine = x[part].requires_grad_(True)
    out = norm(mine, share=share[part])
    out.square().mul(drawn(size, 5, 1, 3, seed=1)[part]).sum().backward()
    torch.save((out.detach(), mine.grad, norm.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def shares(size):
    return torch.linspace(0, 1, size)


@pytest.mark.slow
def test_two_processes_normalise_as_one(tmp_path):
    """Also where their parts of the batch differ in size."""
    size = 5
    torch.multiprocessing.spawn(half_a_batch, args=(str(tmp_path), size), nprocs=2)
    norm, x = ConditionalBatchNorm(3).double(), drawn(size, 5, 1, 3).requires_grad_(True)
    out = norm(x, share=shares(size))
    out.square().mul(drawn(size, 5, 1, 3, seed=1)).sum().backward()
    made, slopes, states = zip(*(torch.load(tmp_path / f"{k}.pt") for k in range(2)), strict=True)
    torch.testing.assert_close(torch.cat(made), out.detach())
    torch.testing.assert_close(torch.cat(slopes), x.grad)
    for state in states:
        torch.testing.assert_close(state, norm.state_dict())


# the network


def test_the_default_has_none():
    assert norms(fresh(norm="group")) == []
    assert len(norms(fresh())) == 2 * 8 + 1
    with pytest.raises(ValueError, match="norm='layer' is not one of group, batch"):
        fresh(norm="layer")


@pytest.mark.parametrize(
    "changes",
    [{}, {"scale_shift_norm": False}, {"resblock_updown": True}, {"dims": 2, "conv": "2d"}],
    ids=("clips", "added", "resampling", "frames"),
)
def test_it_trains_and_gradients_reach_every_parameter(changes):
    net = fresh(**{"attention": "spatial", **changes} if "dims" in changes else changes)
    x, time = clips()
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=1e-2), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (net(x, time=time) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert [name for name, p in net.named_parameters() if not p.grad.any()] == []
    assert {moved(norm) for norm in norms(net)} == {(0, 2, 5, 7)}


@pytest.mark.parametrize("time_range", [(0, 1000), (-1553, 1095)])
def test_the_range_of_times_is_divided_among_the_sets(time_range):
    net = fresh(time_range=time_range, norm_buckets=4)
    first, end = time_range
    times = torch.tensor([first + share * (end - first) for share in (0.1, 0.3, 0.9, 1.0)])
    net(clips()[0], time=times)
    assert {moved(norm) for norm in norms(net)} == {(0, 1, 3)}


def test_samples_depend_on_no_other_of_their_batch():
    net = awake()
    for seed in range(3):
        net(clips(seed=seed)[0], time=clips()[1])
    net.eval()
    path, noise = DiscreteVP(), clips()[0]
    denoise = partial(Diffusion(net=net, path=path).predict, cond={})
    with torch.no_grad():
        together, *alone = (
            last(DDIM(steps=4)(denoise, Media(video=part), path))["video"]
            for part in (noise, *noise.split(1))
        )
    assert relative(together, torch.cat(alone)) < 1e-4
    assert together.std() > 0


def test_what_is_computed_again_enters_the_averages_once():
    """The activations that no memory holds, of which a plan tries some without values."""
    x, time = clips()
    found = []
    for checkpoint in (False, True, 1e-3):
        net = awake(checkpoint=checkpoint)
        net(x, time=time).square().sum().backward()
        found.append(([p.grad for p in net.parameters()], [*net.buffers()]))
    assert 0 < sum(len(stages) for stages in net.plan.known.values()) < len([*net.stages()])
    for gradients, buffers in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0][0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(buffers, found[0][1], strict=True))


def test_what_is_made_again_without_a_checkpoint_enters_once_too(monkeypatch):
    monkeypatch.setattr("avdiffusion.nn.blocks.SMALL", 0)
    net, (x, time) = awake(), clips()
    out = net(x, time=time)
    kept = [buffer.clone() for buffer in net.buffers()]
    out.square().sum().backward()
    assert all(torch.equal(*both) for both in zip(net.buffers(), kept, strict=True))


def test_the_average_of_weights_follows_the_statistics():
    net = awake()
    ema = EMA(net, beta=0.5, min_value=0.5)
    for seed in range(3):
        net(clips(seed=seed)[0], time=clips()[1])
        before = [norm.mean.clone() for norm in norms(ema.ema_model)]
        ema.update()
        for mine, old, theirs in zip(norms(ema.ema_model), before, norms(net), strict=True):
            expected = (old + theirs.mean) / 2 if seed > 0 else theirs.mean
            torch.testing.assert_close(mine.mean, expected)
