"""Single blocks against recorded figures of the published ones and against plain definitions."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avdiffusion.nn.attention import CrossAttention, SelfAttention
from avdiffusion.nn.blocks import ResBlock, checkpointed, mean_pool, through
from avdiffusion.nn.coupled_unet import Stage
from avdiffusion.nn.norm import GroupNorm, norm_groups


def set_waves(modules):
    """Closed-form weights and biases of these modules, numbered in this order."""
    parameters = [(key, getattr(m, key)) for m in modules for key in ("weight", "bias")]
    for j, (key, parameter) in enumerate(parameters):
        base = np.sin(0.37 * np.arange(parameter.numel()) + 1.3 * j + 0.1)
        if parameter.dim() > 1:
            base = base / np.sqrt(np.prod(parameter.shape[1:]))
        else:
            base = 1 + 0.1 * base if key == "weight" else 0.05 * base
        parameter.data = torch.tensor(base).float().view(parameter.shape)


def wave(shape):
    n = np.arange(np.prod(shape))
    return torch.tensor(np.sin(0.01 * n + 0.3) + 0.5 * np.cos(0.11 * n)).float().reshape(shape)


def clips(frames, channels, pixels, samples):
    """Video [2, T, H, W, C] and audio [2, 1, 1, L, C] of waves laid out channels first."""
    video = wave((2, frames, channels, pixels, pixels)).permute(0, 1, 3, 4, 2).contiguous()
    audio = torch.tensor(np.sin(0.05 * np.arange(2 * channels * samples) + 0.7)).float()
    audio = audio.view(2, channels, samples).transpose(1, 2)[:, None, None].contiguous()
    return video, audio


def figures(video, audio):
    """L2 norm, first and last value of each, read channels first."""
    flat = (video.permute(0, 1, 4, 2, 3).flatten(), audio[:, 0, 0].transpose(1, 2).flatten())
    return torch.stack([f for x in flat for f in (x.norm(), x[0], x[-1])]).detach()


CROSS = {
    (32, 1, 0): (10.471586, -0.146648, 0.155669, 8.953428, -0.170580, 0.203739),
    (32, 1, 3): (10.470940, -0.165844, 0.158468, 8.953745, -0.116488, 0.182735),
    (32, 2, 2): (10.471890, -0.163368, 0.158674, 8.797922, -0.122505, 0.170487),
    (35, 2, 2): (10.548484, -0.157982, 0.157557, 9.195812, -0.122173, 0.170611),
    (35, 4, 0): (10.542520, -0.159027, 0.156714, 9.091040, -0.135141, 0.168633),
}


@pytest.mark.parametrize("case", CROSS)
def test_cross_attention_is_the_published_one(case):
    samples, window, shift = case
    block = CrossAttention(64, head_channels=32, window=window)
    set_waves(block.children())
    video, audio = clips(4, 64, 3, samples)
    v, a = block(video, audio, torch.tensor(shift))
    found = figures(v - video, a - audio)
    torch.testing.assert_close(found, torch.tensor(CROSS[case]), atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    frames=st.integers(1, 5),
    window=st.integers(1, 6),
    samples=st.integers(5, 23),
    shift=st.integers(0, 4),
    pixels=st.integers(1, 3),
)
def test_cross_attention_is_its_definition_frame_by_frame(frames, window, samples, shift, pixels):
    torch.manual_seed(0)
    block = CrossAttention(8, head_channels=4, window=window).requires_grad_(False)
    for out in (block.video_out, block.audio_out):
        nn.init.eye_(out.weight)
    window = min(window, frames)
    shift = min(shift, frames - window)
    video, audio = clips(frames, 8, pixels, samples)
    v, a = block(video, audio, torch.tensor(shift))
    v, a = (v - video).reshape(2, frames, -1, 8), (a - audio).view(2, samples, 8)

    tokens, count = samples // frames, pixels**2 * frames
    qkv = block.video_qkv(F.group_norm(video.reshape(2, -1, 8).mT, 8).mT)
    vq, vk, vv = qkv.chunk(3, -1)
    aq, ak, av = block.audio_qkv(F.group_norm(audio.view(2, -1, 8).mT, 8).mT).chunk(3, -1)

    def ask(q, k, v):
        heads = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (q, k, v))
        q, k, v = heads
        return ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)

    for i in range(frames):
        keys = torch.arange((i + shift) * tokens, (i + shift + window) * tokens) % samples
        asking = slice(i * pixels**2, (i + 1) * pixels**2)
        found = ask(vq[:, asking], ak[:, keys], av[:, keys])
        torch.testing.assert_close(v[:, i], found, atol=1e-5, rtol=1e-4)
        keys = torch.arange((i + shift) * pixels**2, (i + shift + window) * pixels**2) % count
        asking = slice(i * tokens, (i + 1) * tokens if i < frames - 1 else samples)
        found = ask(aq[:, asking], vk[:, keys], vv[:, keys])
        torch.testing.assert_close(a[:, asking], found, atol=1e-5, rtol=1e-4)


RES = {
    "attention": (
        96, {"dilation": 8}, (2, 4, 4, 4), 64, (111.817047, 1.414298, 29.306384, -0.149836),
    ),
    "down": (
        64, {"dilation": 4, "resample": "down"},
        (2, 4, 2, 2), 16, (36.334644, 1.123745, 32.756024, 0.564933),
    ),
    "up": (
        64, {"dilation": 2, "resample": "up"},
        (2, 4, 8, 8), 256, (145.906994, 1.093922, 131.220112, 0.539995),
    ),
    "far taps": (64, {"dilation": 512}, (2, 4, 4, 4), 64, (None, None, 66.037117, 0.430347)),
}  # fmt: skip


@pytest.mark.parametrize("name", RES)
def test_res_block_is_the_published_one(name):
    width, settings, shape, samples, recorded = RES[name]
    res = ResBlock(64, width, **settings)
    kinds = ("spatial", "temporal", "audio") if name == "attention" else ()
    stage = Stage(res, **{kind: SelfAttention(width, 4) for kind in kinds})
    film = nn.Linear(32, 2 * width)
    v, a = res.video, res.audio
    modules = [v.norm, v.conv.space, v.conv.time, a.norm, a.conv, film]
    modules += [v.film_norm, v.out, a.film_norm, a.out]
    modules += [x.skip for x in (v, a) if not isinstance(x.skip, nn.Identity)]
    set_waves(modules + [m for kind in kinds for m in getattr(stage, kind).children()])

    films = [film(F.silu(wave((2, 32))))]
    video, audio = stage(*clips(4, 64, 4, 64), films)
    assert video.shape == (*shape, width)
    assert audio.shape == (2, 1, 1, samples, width)
    found = figures(video, audio)[[0, 1, 3, 4]]
    kept = [i for i, value in enumerate(recorded) if value is not None]
    expected = torch.tensor([recorded[i] for i in kept])
    torch.testing.assert_close(found[kept], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dilation", [1, 2, 4, 6, 8, 32])
def test_taking_means_commutes_with_the_convolutions(dilation):
    torch.manual_seed(0)
    plain = ResBlock(8, 8, dilation=dilation)
    down = ResBlock(8, 8, dilation=dilation, resample="down")
    down.load_state_dict(plain.state_dict())
    video, audio = clips(3, 8, 6, 24)
    expected = mean_pool(plain.video.conv(video), (2, 2))
    torch.testing.assert_close(down.video.conv(video), expected)
    expected = mean_pool(plain.audio.conv(audio), (1, 4))
    torch.testing.assert_close(down.audio.conv(audio), expected)


def test_repeating_late_equals_repeating_early():
    torch.manual_seed(0)
    block = ResBlock(8, 8, dilation=1, resample="up", dropout=1e-9)
    for branch in (block.video, block.audio):
        nn.init.normal_(branch.out.weight)
    arguments = (*clips(3, 8, 4, 12), torch.randn(2, 16))
    early = block.train()(*arguments)
    late = block.eval()(*arguments)
    for pair in zip(early, late, strict=True):
        torch.testing.assert_close(*pair, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [6, 32, 96])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_group_norm_and_its_gradient_are_those_of_torch(channels, silu, modulated):
    torch.manual_seed(0)
    norm = GroupNorm(channels, silu=silu)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3 * torch.randn(2, 5, 3, channels) + 10).requires_grad_()
    film = torch.randn(2, 2 * channels, requires_grad=True) if modulated else None

    def plain():
        sequences = x.permute(0, 2, 3, 1).flatten(0, 1)
        y = F.group_norm(sequences, norm.num_groups, norm.weight, norm.bias)
        y = y.unflatten(0, (2, 3)).permute(0, 3, 1, 2)
        if modulated:
            scale, shift = film[:, None, None].chunk(2, -1)
            y = y * (1 + scale) + shift
        return F.silu(y) if silu else y

    leaves = [x, norm.weight, norm.bias] + [film] * modulated
    direction = torch.randn(x.shape)
    ours, theirs = norm(x, film), plain()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    gradients = (torch.autograd.grad(y, leaves, direction) for y in (ours, theirs))
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair, atol=2e-5, rtol=1e-3)


def test_norm_groups_divide_and_stay_at_most_32():
    expected = {1: 1, 7: 7, 16: 16, 32: 32, 48: 24, 66: 22, 128: 32, 896: 32}
    assert {channels: norm_groups(channels) for channels in expected} == expected


def test_of_what_is_computed_again_nothing_is_kept_between():
    """Not even what `through` would make its own tensor from."""
    between = []

    def function(x):
        h = x.exp()
        between.append(weakref.ref(h))
        return through(torch.cos, torch.sin, h)

    x = torch.ones(3, requires_grad=True)
    plain = function(x)
    assert between[0]() is not None
    y = checkpointed(function, x)
    assert between[1]() is None
    found, expected = (torch.autograd.grad(each.sum(), x)[0] for each in (y, plain))
    assert torch.equal(found, expected)
