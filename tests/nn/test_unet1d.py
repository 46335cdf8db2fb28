"""The U-Net of sound: what it promises of lengths, conditions and copies.

What it computes is in tests/test_published_audio.py, by the published numbers.
"""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from golden_network import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avdiffusion.nn.blocks1d import Attention, modulated
from avdiffusion.nn.unet1d import UNet1d

SMALL = {
    "audio_channels": 2,
    "channels": (8, 16, 16),
    "factors": (1, 2, 3),
    "items": (1, 2, 1),
    "attentions": (0, 0, 1),
    "cross_attentions": (0, 1, 1),
    "inject_depth": 1,
    "inject_channels": 3,
    "attention_heads": 2,
    "attention_features": 4,
    "context_width": 5,
    "modulation": 16,
    "groups": 4,
    "filters": 4,
    "window_length": 8,
    "stride": 4,
}
PLAIN = {"attentions": None, "cross_attentions": None, "inject_depth": None, "filters": None}


def fresh(**changes):
    torch.manual_seed(0)
    return UNet1d(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def net():
    return fresh().double()


def sounds(length=48, batch=2, seed=0, dtype=torch.float64):
    """A call's x and keywords, of the small network."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)

    told = {"concat": draw(3, -(-length // 8)), "context": draw(6, 5)}
    return draw(2, length), {"time": draw().abs().clamp(0, 1), **told}


# lengths


@given(length=st.integers(1, 100))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_a_sound_of_any_length_is_filled_up_with_zeros(net, length):
    assert (net.multiple, net.inject_factor) == (24, 8)
    x, given_ = sounds(length)
    more = -length % 24
    concat = given_["concat"]
    full = F.pad(concat, (0, (length + more) // 8 - concat.shape[-1]))
    expected = net(F.pad(x, (0, more)), **{**given_, "concat": full})
    found = net(x, **given_)
    assert found.shape == x.shape
    assert torch.equal(found, expected[..., :length])
    assert torch.equal(net(x, **{**given_, "concat": full}), found)


@given(
    factors=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    window=st.sampled_from([4, 6, 10]),
    filters=st.sampled_from([None, 4]),
    depth=st.integers(0, 2),
)
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_every_shape_of_network_keeps_the_length(factors, window, filters, depth):
    levels = len(factors)
    shape = {"channels": [8] * levels, "factors": factors, "items": [1] * levels}
    depth = min(depth, levels - 1)
    change = {**PLAIN, **shape, "filters": filters, "window_length": window, "stride": 2}
    net = fresh(**change | {"inject_depth": depth})
    hop = 2 if filters else 1
    assert net.multiple == hop * math.prod(factors)
    assert net.inject_factor == hop * math.prod(factors[: depth + 1])
    x = torch.ones(1, 2, 12 * net.multiple)
    concat = torch.ones(1, 3, x.shape[-1] // net.inject_factor)
    assert net(x, time=torch.ones(1), concat=concat).shape == x.shape


# conditions


@torch.no_grad()
def test_each_sound_of_a_batch_is_by_itself(net):
    x, given_ = sounds(batch=3)
    each = [net(x[k : k + 1], **{n: v[k : k + 1] for n, v in given_.items()}) for k in range(3)]
    assert relative(net(x, **given_), torch.cat(each)) < 1e-12
    assert relative(net(x, **{**given_, "time": given_["time"][:1]}), torch.cat(each)) > 1e-6
    same = {**given_, "time": given_["time"][:1].expand(3)}
    one = {**given_, "time": given_["time"][:1]}
    assert relative(net(x, **one), net(x, **same)) < 1e-12


@torch.no_grad()
def test_what_the_mask_hides_is_not_attended_to(net):
    x, given_ = sounds()
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    short = {**given_, "context": given_["context"][:, :4]}
    found = net(x, **given_, context_mask=mask)
    assert relative(found, net(x, **short)) < 1e-12
    assert relative(found, net(x, **given_)) > 1e-6
    assert relative(net(x, **given_, context_mask=mask | True), net(x, **given_)) < 1e-12
    mask[0] = False  # no text at all
    assert net(x, **given_, context_mask=mask).isfinite().all()


@torch.no_grad()
def test_every_condition_tells(net):
    x, given_ = sounds()
    before = net(x, **given_)
    for name, value in given_.items():
        assert relative(net(x, **{**given_, name: value.flip(0)}), before) > 1e-6, name


def test_a_condition_that_does_not_fit_is_one_clear_error(net):
    x, given_ = sounds()
    wrong = {
        "concat": [None, *(torch.zeros(shape) for shape in ((2, 3, 7), (2, 3, 5), (2, 4, 6)))],
        "context": [None, *(torch.zeros(shape) for shape in ((2, 6, 4), (1, 6, 5), (2, 5)))],
        "context_mask": [torch.ones(2, 5).bool(), torch.ones(6).bool()],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"^{name} ") as error:
                net(x, **{**given_, name: value})
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"is told \(2, 3, 6\), a step for every 8 samples"):
        net(x, **{**given_, "concat": torch.zeros(2, 3, 7)})
    plain = fresh(**PLAIN).double()
    assert (plain.inject_channels, plain.context_width, plain.takes) == (0, 0, [2])
    assert plain(x, time=given_["time"]).shape == x.shape
    for name in ("concat", "context"):
        with pytest.raises(ValueError, match=rf"{name} .* is told nothing$"):
            plain(x, time=given_["time"], **{name: given_[name]})


@pytest.mark.parametrize(
    ("change", "words"),
    [({"items": (1, 1)}, "3, 3, 2, 3, 3"), ({"inject_depth": 3}, "inject_depth=3 is none of 3")],
)
def test_arguments_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        fresh(**change)


# blocks


@torch.no_grad()
def test_attention_is_that_of_its_formula():
    torch.manual_seed(1)
    x, context = torch.randn(2, 5, 8).double(), torch.randn(2, 3, 6).double()
    layer = Attention(8, 6, heads=2, features=4).double()
    q = layer.query(layer.norm(x)).unflatten(-1, (2, 4))
    k, v = (
        part.unflatten(-1, (2, 4))
        for part in layer.key_value(layer.norm_context(context)).chunk(2, -1)
    )
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 2).softmax(-1)
    expected = x + layer.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2))
    assert relative(layer(x, context), expected) < 1e-12


def test_modulation_replaces_each_step_by_its_norm():
    x, film = torch.randn(2, 5, 8).double(), torch.randn(1, 16).double()
    plain = modulated(x, torch.zeros_like(film))
    assert plain.mean(-1).abs().max() < 1e-12
    assert (plain.std(-1, correction=0) - 1).abs().max() < 1e-4
    assert relative(modulated(x, film), plain * (1 + film[:, :8]) + film[:, 8:]) < 1e-12


# training


def test_the_gradient_reaches_all_parameters_and_conditions(net):
    x, given_ = sounds()
    given_ = {name: value.requires_grad_() for name, value in given_.items()}
    net.zero_grad()
    net(x, **given_).square().sum().backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    assert all(value.grad.any() for value in given_.values())


def test_computing_again_changes_no_gradient():
    found = []
    for checkpoint in (False, True):
        net = fresh(checkpoint=checkpoint).double()
        x, given_ = sounds(43)
        net(x, **given_, context_mask=torch.ones(2, 6).bool()).square().sum().backward()
        found.append([parameter.grad for parameter in net.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_copy_is_another_network(net):
    x, given_ = sounds()
    before, twin = net(x, **given_), copy.deepcopy(net)
    assert torch.equal(twin(x, **given_), before)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(net(x, **given_), before)
    assert not torch.allclose(twin(x, **given_), before)
    twin.zero_grad()
    net.zero_grad()
    twin(x, **given_).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_network_can_be_pickled(net):
    x, given_ = sounds()
    assert torch.equal(pickle.loads(pickle.dumps(net))(x, **given_), net(x, **given_))


def test_mixed_precision_is_near_full_precision():
    net = fresh()
    x, given_ = sounds(dtype=torch.float32)
    seen = {}
    net.time.register_forward_hook(lambda _, __, out: seen.update(time=out.dtype))
    net.levels[1].after[0].register_forward_hook(lambda _, __, out: seen.update(item=out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x, **given_)
    found.sum().backward()
    assert seen == {"time": torch.float32, "item": torch.bfloat16}
    assert found.dtype == torch.float32
    assert relative(found, net(x, **given_)) < 0.05
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_what_mixed_precision_rounds_may_be_rounded_before():
    net = fresh()
    x, given_ = sounds(dtype=torch.float32)
    halves = {name: net.get_parameter(name).bfloat16() for name in net.rounded()}
    assert not any(name.startswith(("time.", "film.")) for name in halves)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        early = torch.func.functional_call(net, halves, (x,), given_)
        assert torch.equal(early, net(x, **given_))


def test_shapes_are_known_without_values():
    with torch.device("meta"):
        net = UNet1d(filters=128, inject_depth=4)
        x, concat = torch.empty(1, 2, 2**18), torch.empty(1, 32, 256)
        with torch.no_grad():
            assert net(x, time=torch.empty(1), concat=concat).shape == x.shape
    assert (net.multiple, net.inject_factor, net.inject_channels) == (4096, 1024, 32)
