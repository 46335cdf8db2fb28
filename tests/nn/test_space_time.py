"""The network of clips: what its layers over time compute, and what they promise."""

import math

import pytest
import torch
import torch.nn.functional as F
from golden_network import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avdiffusion.nn.norm import GroupNorm
from avdiffusion.nn.space_time import CubeConv, SpaceTimeConv, TimeAttention, attentions
from avdiffusion.nn.unet import UNet
from avdiffusion.systems.step import Step

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
}
KINDS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"conv": "2d"},
        {"conv": "3d", "attention": "full3d"},
        {"attention": "temporal", "resblock_updown": True, "scale_shift_norm": False},
    ],
    ids=("2plus1d factorised", "2d", "3d full3d", "temporal"),
)


def fresh(**changes):
    torch.manual_seed(0)
    return UNet(**{**SMALL, **changes})


def awake(**changes):
    """Its zero-initialised branches drawn as well, and its convolutions over time no identity."""
    net = fresh(**changes)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    for module in net.modules():
        if isinstance(module, SpaceTimeConv):
            nn.init.normal_(module.time.weight, std=0.3)
    return net


def clips(batch=2, frames=5, height=8, width=8, seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, frames, height, width, generator=generator)
    return x, 1000 * torch.rand(batch, generator=generator)


def attention(everywhere=False, channels=8, heads=2, max_tokens=8192):
    torch.manual_seed(1)
    layer = TimeAttention(channels, heads, everywhere=everywhere, max_tokens=max_tokens)
    nn.init.normal_(layer.out.weight, std=0.5)
    return layer.double()


def places(frames=5, batch=2, height=2, width=3, channels=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, frames, height, width, channels
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# attention over time


@pytest.mark.parametrize("everywhere", [False, True])
def test_attention_is_that_of_a_loop_in_complex_numbers(everywhere):
    """Softmax by hand, positions as rotations of the complex plane, one query after another."""
    layer, x = attention(everywhere), places()
    b, t, h, w, c = x.shape
    flat = x.view(b, -1, c)
    normed = F.group_norm(flat.mT, layer.norm.num_groups, layer.norm.weight, layer.norm.bias, 1e-5)
    qkv = normed.mT @ layer.qkv.weight.T + layer.qkv.bias
    q, k, v = qkv.view(b, t, h * w, 3, layer.heads, c // layer.heads).unbind(3)
    half = c // layer.heads // 2
    frequency = torch.tensor([10000 ** (-i / half) for i in range(half)], dtype=torch.float64)

    def placed(vector, frame):
        turned = torch.complex(vector[..., :half], vector[..., half:])
        return turned * torch.exp(1j * frame * frequency)

    expected = torch.empty(b, t, h * w, layer.heads, c // layer.heads, dtype=torch.float64)
    for n, i, p, head in torch.cartesian_prod(*map(torch.arange, expected.shape[:4])).tolist():
        asked = placed(q[n, i, p, head], i)
        seen = [(m, r) for m in range(t) for r in (range(h * w) if everywhere else [p])]
        logits = [(asked.conj() * placed(k[n, m, r, head], m)).real.sum() for m, r in seen]
        weights = (torch.stack(logits) / math.sqrt(c // layer.heads)).softmax(0)
        expected[n, i, p, head] = sum(
            a * v[n, m, r, head] for a, (m, r) in zip(weights, seen, strict=True)
        )
    made = expected.reshape(x.shape) @ layer.out.weight.T + layer.out.bias + x
    with torch.no_grad():
        torch.testing.assert_close(layer(x), made, rtol=1e-6, atol=1e-6)  # angles are float32


def test_attention_reacts_to_a_far_frame():
    layer, x = attention(), places(9)
    other = x.clone()
    other[:, 8] += torch.randn(8, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    with torch.no_grad():
        change = (layer(other) - layer(x))[:, 0].abs().amax((0, 3))
    assert (change > 1e-4).all()


def test_only_positions_tell_frames_apart(monkeypatch):
    layer, x = attention(), places()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        assert relative(layer(x[:, order]), layer(x)[:, order]) > 1e-3
        monkeypatch.setattr(TimeAttention, "turned", lambda self, x, frames: x)
        torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_what_frames_are_to_one_another_depends_on_their_distance():
    layer = attention()
    same = places(1).expand(-1, 12, -1, -1, -1).flatten(2, 3)
    turned = layer.turned(same, 12)
    products = torch.einsum("bnpc,bmpc->bpnm", turned, turned)
    for offset in range(12):
        line = products.diagonal(offset, -2, -1)
        torch.testing.assert_close(line, line[..., :1].expand_as(line), rtol=1e-5, atol=1e-5)
    assert relative(products[..., 0, 1], products[..., 0, 5]) > 1e-3


def test_too_many_tokens_and_odd_heads_are_refused():
    attention(True, max_tokens=30)(places())
    with pytest.raises(ValueError, match=r"all 30 places of 5 frames of 2x3, .*factorised"):
        attention(True, max_tokens=29)(places())
    with pytest.raises(ValueError, match="heads of 3"):
        attention(channels=6, heads=2)
    with pytest.raises(ValueError, match="attention='temporl' is not one of spatial"):
        attentions("temporl", 8, 2, 8192)
    for changes in ({"dims": 1}, {"conv": "4d"}):
        with pytest.raises(ValueError, match="dims is 2 or 3, conv one of 2d, 2plus1d, 3d"):
            UNet(**{**SMALL, **changes})


# convolutions


def test_cube_convolution_is_torchs():
    conv, x = CubeConv(4, 6).double(), places(channels=4)
    plain = F.conv3d(x.permute(0, 4, 1, 2, 3), conv.weight, conv.bias, padding=1)
    residual = places(channels=6, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(
            conv(x, residual=residual.clone()), plain.permute(0, 2, 3, 4, 1) + residual
        )


# the network


@pytest.mark.parametrize("conv", ["2d", "2plus1d"])
@pytest.mark.parametrize("attention", ["temporal", "factorised", "full3d"])
def test_a_fresh_network_treats_every_frame_by_itself(conv, attention, monkeypatch):
    """But for its norms, which see a whole clip and are left out here."""
    net = fresh(conv=conv, attention=attention)
    nn.init.normal_(net.out.weight, std=0.1)
    monkeypatch.setattr(
        GroupNorm, "forward", lambda self, x, film=None: F.silu(x) if self.silu else x
    )
    x, time = clips()
    with torch.no_grad():
        together = net(x, time=time)
        alone = [net(x[:, :, k], time=time) for k in range(x.shape[2])]
    assert relative(together, torch.stack(alone, 2)) <= 1e-5
    assert together.std() > 1e-3


def test_a_fresh_network_of_clips_is_that_of_frames():
    """With the same weights, of clips in which nothing moves."""
    net, frames = fresh(), UNet(**{**SMALL, "dims": 2, "conv": "2d", "attention": "spatial"})
    nn.init.normal_(net.out.weight, std=0.1)
    state = {k.replace(".space.", "."): v for k, v in net.state_dict().items()}
    frames.load_state_dict({k: state[k] for k in frames.state_dict()})
    x, time = clips(frames=1)
    with torch.no_grad():
        still = net(x.expand(-1, -1, 6, -1, -1), time=time)
        torch.testing.assert_close(still, frames(x, time=time).expand_as(still))


@KINDS
def test_output_is_zero_at_initialisation(changes):
    x, time = clips()
    out = fresh(**changes)(x, time=time)
    assert out.shape == x.shape
    assert not out.any()


@settings(max_examples=12, deadline=None)
@given(
    frames=st.integers(1, 9),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    changes=st.sampled_from(
        ({}, {"conv": "3d", "attention": "full3d"}, {"concat_channels": 2, "out_factor": 2})
    ),
)
def test_any_length_and_size_work_and_clips_stay_apart(frames, height, width, changes):
    net = awake(**changes).eval()
    x, time = clips(2, frames, height, width)
    told = {"concat": clips(2, frames, height, width, 1, 2)[0]} if net.concat_channels else {}
    with torch.no_grad():
        together = net(x, time=time, **told)
        assert together.shape == (2, 3 * changes.get("out_factor", 1), frames, height, width)
        for i in range(2):
            one = {name: v[i : i + 1] for name, v in told.items()}
            # a norm over a handful of nearly equal values magnifies rounding
            assert (
                relative(together[i : i + 1], net(x[i : i + 1], time=time[i : i + 1], **one)) < 2e-3
            )
        if frames == 1:
            image = {name: v[:, :, 0] for name, v in told.items()}
            assert torch.equal(net(x[:, :, 0], time=time, **image), together[:, :, 0])


@KINDS
def test_every_frame_matters_to_every_other(changes):
    net = awake(**changes)
    x, time = clips(1, 7)
    x.requires_grad_(True)
    net(x, time=time)[0, :, 0].square().sum().backward()
    assert (x.grad.abs().sum((0, 1, 3, 4)) > 0).all()


@KINDS
def test_the_first_gradients_reach_every_parameter_in_turn(changes):
    """Zero-initialised layers open one after another; then nothing is left out."""
    net = fresh(**changes)
    x, time = clips()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (net(x, time=time) - x).square().mean().backward()
        optimizer.step()
    idle = [name for name, p in net.named_parameters() if not p.grad.any()]
    assert idle == []


def test_recomputing_activations_leaves_gradients_alone():
    x, time = clips()
    gradients = []
    for checkpoint in (False, True, 2e-4):
        net = awake(checkpoint=checkpoint)
        net(x, time=time).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert 0 < sum(len(stages) for stages in net.plan.known.values()) < len([*net.stages()])
    for same in zip(*gradients, strict=True):
        assert all(torch.equal(same[0], other) for other in same[1:])


@KINDS
def test_bf16_stays_near_float32_and_weights_may_be_rounded_before(changes):
    x, time = clips()
    net = awake(**changes)
    with torch.no_grad():
        exact = net(x, time=time)
        with torch.autocast("cpu", torch.bfloat16):
            rough = net(x, time=time)
        assert rough.dtype == torch.float32
        assert 0 < relative(rough, exact) <= 0.05
        rounded = dict(net.named_parameters())
        for name in net.rounded():
            rounded[name].copy_(rounded[name].bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(net(x, time=time), rough)


def test_sampling_calls_it_with_whole_clips():
    """`Step` gives a network of frames so many at a time, and one of clips all."""
    x, time = clips(1)
    net = awake().eval()
    with torch.no_grad():
        assert torch.equal(Step(frames_at_once=2)(net)(x, time=time), net(x, time=time))


@pytest.mark.slow
def test_the_network_is_one_graph_for_compilers():
    x, time = clips()
    net = awake()
    compiled = torch.compile(net, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert relative(compiled(x, time=time), net(x, time=time)) <= 1e-5


def test_only_convolutions_over_time_add_parameters():
    """To those of frames: a kernel of three and a bias for each, and attention over time."""
    with torch.device("meta"):
        large = {"channels": 64, "channel_mult": (1, 2, 4, 8), "num_res_blocks": 2, "num_heads": 8}
        net = UNet(**{**SMALL, **large, "attention_resolutions": (4, 8)})
        frames = UNet(**{**SMALL, **large, "attention_resolutions": (4, 8), "conv": "2d"})
    outputs = [m.time.out_channels for m in net.modules() if isinstance(m, SpaceTimeConv)]
    added = sum(3 * c * c + c for c in outputs)
    count, plain = (sum(p.numel() for p in each.parameters()) for each in (net, frames))
    assert count - plain == added
    assert len(outputs) == 2 * (4 * 2 + 2 + 4 * 3)
    assert count == 85_878_467  # ../shared/spec/video.md 5.1: 67.5 million with less attention
