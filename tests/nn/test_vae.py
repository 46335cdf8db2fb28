"""The autoencoder of video: what its latents are, and what its frames know of one another."""

import pytest
import torch
import torch.nn.functional as F
from golden_network import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode

from avdiffusion.nn.space_time import SpaceTimeConv
from avdiffusion.nn.vae import Gaussian, VideoVAE

SMALL = {"channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}
KINDS = pytest.mark.parametrize("conv", ["2d", "2plus1d", "3d"])


def fresh(**changes):
    torch.manual_seed(0)
    return VideoVAE(**{**SMALL, **changes})


def awake(**changes):
    """Its zero-initialised branches drawn as well, and its convolutions over time no identity."""
    net = fresh(**changes)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    for module in net.modules():
        if isinstance(module, SpaceTimeConv):
            torch.nn.init.normal_(module.time.weight, std=0.3)
    return net


def clips(batch=2, frames=3, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def gaussian(shape=(3, 4, 2, 2, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(*(2 * torch.randn(2, *shape, generator=generator)).unbind())


# the distribution


def test_divergence_is_torchs():
    latent = gaussian()
    theirs = Normal(latent.mean, (latent.log_variance / 2).exp())
    expected = kl_divergence(theirs, Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(latent.kl(), expected)
    assert not Gaussian(torch.zeros(2, 1), torch.zeros(2, 1)).kl().any()
    rough = Gaussian(latent.mean.bfloat16(), latent.log_variance.bfloat16()).kl()
    assert rough.dtype == torch.float32


def test_samples_have_its_mean_and_variance():
    one = gaussian((1, 4, 1, 1, 1))
    noise = torch.randn(200_000, 4, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    variance, mean = torch.var_mean(one.sample(noise), 0)
    torch.testing.assert_close(mean, one.mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(variance.log(), one.log_variance[0], atol=0.02, rtol=0)
    assert torch.equal(one.sample(torch.zeros_like(one.mean)), one.mode())


@pytest.mark.parametrize(("bias", "limit"), [(1e4, 20), (-1e4, -30)])
def test_no_variance_is_beyond_reason(bias, limit):
    net = fresh()
    torch.nn.init.constant_(net.encoder[-1].conv.bias, bias)
    latent = net.encode(clips())
    assert (latent.log_variance == limit).all()
    assert latent.kl().isfinite().all()


# the network


@settings(max_examples=12, deadline=None)
@given(
    frames=st.integers(1, 5),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    changes=st.sampled_from(
        ({}, {"patch": 2}, {"channel_mult": (1,), "patch": 3}, {"conv": "3d", "latent_channels": 2})
    ),
)
def test_any_length_and_size_work_and_clips_stay_apart(frames, height, width, changes):
    net, x = awake(**changes).eval(), clips(2, frames, height, width)
    f = net.factor
    assert f == changes.get("patch", 1) * 2 ** (len(changes.get("channel_mult", (1, 2))) - 1)
    with torch.no_grad():
        latent = net.encode(x)
        shape = (changes.get("latent_channels", 4), frames, -(-height // f), -(-width // f))
        assert net.shape(x.shape[1:]) == list(shape)
        assert latent.mean.shape == latent.log_variance.shape == (2, *shape)
        assert latent.kl().shape == (2,)
        made = net.decode(latent.mode())
        assert made.shape == (2, 3, frames, f * shape[2], f * shape[3])
        filled = F.pad(x.flatten(0, 1), (0, -width % f, 0, -height % f), mode="replicate")
        assert torch.equal(net.encode(filled.unflatten(0, (2, 3))).mean, latent.mean)
        for i in range(2):
            # a norm over a handful of nearly equal values magnifies rounding
            assert relative(latent.mean[i : i + 1], net.encode(x[i : i + 1]).mean) <= 2e-3
            assert relative(made[i : i + 1], net.decode(latent.mean[i : i + 1])) <= 2e-3


def test_patches_are_pixels_side_by_side():
    """What the first convolution sees, and what is made of the last one's channels."""
    net, seen = fresh(patch=2), []
    net.encoder[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = clips(1, 2, 8, 12)
    net.encode(x)
    for i, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
        channels = seen[0][..., 2 * i + k :: 4].movedim(-1, 1)
        assert torch.equal(channels, x[..., i::2, k::2])
    net.decoder[-1].register_forward_hook(lambda *_: seen[0])
    assert torch.equal(net.decode(net.encode(x).mean), x)


def reach(run, x):
    """How far frames of the input are from the middle one of the output that depends on them."""
    x = x.clone().requires_grad_(True)
    out = run(x)
    out[:, :, out.shape[2] // 2].square().sum().backward()
    seen = x.grad.abs().sum((0, 1, 3, 4)).nonzero().flatten()
    return int((seen - x.shape[2] // 2).abs().max())


@pytest.mark.parametrize(("conv", "each"), [("2d", 0), ("2plus1d", 1), ("3d", 1)])
def test_a_frame_knows_so_many_others(conv, each):
    """Norms do not spread them: two convolutions in each of four blocks do."""
    net = awake(conv=conv)
    x, z = clips(1, 19), torch.randn(1, 4, 19, 4, 4, generator=torch.Generator().manual_seed(1))
    assert reach(lambda x: net.encode(x).mean, x) == each * 8
    assert reach(net.decode, z) == each * 8


@pytest.mark.parametrize("make", [lambda: awake(conv="2d"), lambda: fresh(conv="2plus1d")])
def test_without_time_it_treats_every_frame_by_itself(make):
    net, x = make(), clips(2, 4)
    with torch.no_grad():
        latent = net.encode(x).mean
        made = net.decode(latent)
        for k in range(4):
            assert relative(latent[:, :, k : k + 1], net.encode(x[:, :, k : k + 1]).mean) < 1e-5
            assert relative(made[:, :, k : k + 1], net.decode(latent[:, :, k : k + 1])) < 1e-5


@KINDS
def test_gradients_reach_every_parameter(conv):
    net, x = fresh(conv=conv, patch=2), clips()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        latent = net.encode(x)
        noise = torch.randn(latent.mean.shape, generator=torch.Generator().manual_seed(1))
        (net.decode(latent.sample(noise)) - x).abs().mean().add(latent.kl().mean()).backward()
        optimizer.step()
    assert [name for name, p in net.named_parameters() if not p.grad.any()] == []


def test_recomputing_activations_leaves_gradients_alone():
    gradients = []
    for checkpoint in (False, True):
        net = awake(checkpoint=checkpoint)
        net.decode(net.encode(clips()).mean).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


def test_recomputing_keeps_less():
    kept = []
    for checkpoint in (False, True):
        net, bytes_ = awake(checkpoint=checkpoint), {}

        def keep(x, bytes_=bytes_):
            bytes_[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            held = net.encode(clips(1, 4, 64, 64))
        kept.append(sum(bytes_.values()))
        assert held.mean.requires_grad
    assert kept[1] < kept[0]


def test_bf16_stays_near_float32():
    net, x = awake(), clips()
    with torch.no_grad():
        exact = net.decode(net.encode(x).mean)
        with torch.autocast("cpu", torch.bfloat16):
            latent = net.encode(x)
            rough = net.decode(latent.mean)
    assert latent.mean.dtype == rough.dtype == torch.float32
    assert 0 < relative(rough, exact) <= 0.05


def test_a_tiny_one_learns_a_clip_by_heart():
    net = fresh()
    row = torch.linspace(-1, 1, 16)
    x = torch.stack([(row + k / 4)[None] * torch.ones(16, 1) for k in range(4)])
    x = torch.stack((x, x.mT, (x * x.mT)))[None].clamp(-1, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        latent = net.encode(x)
        noise = torch.randn(latent.mean.shape, generator=generator)
        loss = (net.decode(latent.sample(noise)) - x).abs().mean() + 1e-6 * latent.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = (net.decode(net.encode(x).mode()) - x).square().mean() / 4
    assert -10 * error.log10() > 25  # PSNR in dB


@pytest.mark.parametrize(
    ("changes", "millions", "gflop"),
    [
        # ../shared/spec/video.md 2.2 and 5.1: 21.5 and 7.2 million; 3085, 1436, 885 and 408 GFLOP
        ({"conv": "3d"}, 24.4, 3348),
        ({}, 11.4, 1544),
        ({"conv": "3d", "patch": 2, "channel_mult": (1, 2, 4)}, 16.8, 951),
        ({"patch": 2, "channel_mult": (1, 2, 4)}, 7.7, 436),
    ],
)
def test_its_size_and_work_are_near_those_of_the_plan(changes, millions, gflop):
    with torch.device("meta"):
        net, x = VideoVAE(**changes), torch.empty(1, 3, 16, 256, 256)
    assert net.factor == 8
    for half in (net.encoder, net.decoder):
        assert sum(p.numel() for p in half.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        latent = net.encode(x)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, abs=0.5)
    assert latent.mean.shape == (1, 4, 16, 32, 32)
    assert net.decode(latent.mean).shape == x.shape


def test_another_convolution_is_refused():
    with pytest.raises(ValueError, match="conv='4d' is not one of 2d, 2plus1d, 3d"):
        VideoVAE(conv="4d")
