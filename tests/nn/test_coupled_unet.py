"""The coupled network against recorded figures of the published one, and its own promises."""

import hashlib

import golden_network
import numpy as np
import pytest
import torch
from einops import rearrange
from golden_network import frames_first, recording, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avdiffusion.compiled import missing
from avdiffusion.nn.attention import CrossAttention, SelfAttention
from avdiffusion.nn.blocks import Branch, time_embedding
from avdiffusion.nn.coupled_unet import CoupledUNet
from avdiffusion.published import from_published, to_published

SMALL = {
    "channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "num_heads": 2,
    "head_channels": 8,
    "cross_attention_resolutions": (1, 2),
    "cross_attention_windows": (1, 2),
    "video_attention_resolutions": (2,),
    "audio_rate": 2,
}


def awake(seed=0, **changes):
    """A small network whose zero-initialised branches are drawn as well."""
    torch.manual_seed(seed)
    net = CoupledUNet(**{**SMALL, **changes})
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def inputs(batch=2, frames=4, pixels=8, samples=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, 3, frames, pixels, pixels, generator=generator)
    audio = torch.randn(batch, 1, samples, generator=generator)
    return video, audio, 1000 * torch.rand(batch, generator=generator)


# golden/coupled_unet.*.npz


def network(meta):
    config = meta["config"]
    net = CoupledUNet(
        channels=config["model_channels"],
        head_channels=config["num_head_channels"],
        num_res_blocks=config["num_res_blocks"],
    )
    published = golden_network.weights(meta)
    assert list(published) == list(to_published(net))
    net.load_state_dict(from_published(net, published))
    return net, *golden_network.inputs(meta)


@pytest.mark.slow
def test_the_network_is_one_graph_for_compilers_and_the_published_one():
    """Traced and differentiated as torch.compile does; making its kernels takes many minutes."""
    theirs, meta = recording("noshift")
    net, video, audio, time = network(meta)
    video.requires_grad_()
    net.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    outputs = net(video, audio, time=time)
    sum(output.square().mean() for output in outputs).backward()
    assert relative(frames_first(outputs[0]), theirs["video"]) <= 1e-4
    assert relative(outputs[1], theirs["audio"]) <= 1e-4
    assert relative(frames_first(video.grad), theirs["grad_video"]) <= 1e-4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(missing("cpu") is not None, reason=f"torch.compile needs {missing('cpu')}")
def test_kernels_of_the_default_compiler_give_the_published_numbers():
    """Block by block, so that equal ones share kernels: as one graph it takes many minutes.

    The decoder's residual blocks, which differ from the encoder's in widths alone, stay eager.
    """
    theirs, meta = recording("midshift")
    net, video, audio, time = network(meta)
    shifts = torch.tensor(net.shift_ranges(video.shape[2])) // 2
    wide = {branch for stage in net.decoder for branch in stage.res.children()}
    for block in net.modules():
        if isinstance(block, Branch | SelfAttention | CrossAttention) and block not in wide:
            block.compile(dynamic=False, fullgraph=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=100):
        outputs = net(video, audio, time=time, shifts=shifts)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before + 30
    assert relative(frames_first(outputs[0]), theirs["video"]) <= 1e-4
    assert relative(outputs[1], theirs["audio"]) <= 1e-4


@pytest.mark.parametrize("case", ["noshift", "midshift"])
def test_forward_and_gradients_are_the_published_ones(case):
    theirs, meta = recording(case)
    net, video, audio, time = network(meta)
    video.requires_grad_()
    audio.requires_grad_()
    shifts = torch.tensor(net.shift_ranges(video.shape[2])) // 2 if case == "midshift" else None
    video_out, audio_out = net(video, audio, time=time, shifts=shifts)
    assert relative(frames_first(video_out), theirs["video"]) <= 1e-4
    assert relative(audio_out, theirs["audio"]) <= 1e-4
    if "grad_norms" in theirs:
        (video_out.square().mean() + audio_out.square().mean()).backward()
        assert relative(frames_first(video.grad), theirs["grad_video"]) <= 1e-4
        assert relative(audio.grad, theirs["grad_audio"]) <= 1e-4
        gradients = to_published(net, {k: p.grad for k, p in net.named_parameters()})
        norms = torch.stack([gradient.norm() for gradient in gradients.values()])
        assert relative(norms, theirs["grad_norms"]) <= 1e-4


# recorded figures of closed-form weights and inputs


def wave(key, shape, j):
    """Weights number j in the published order: a sine of the position, scaled by kind."""
    base = np.sin(0.37 * np.arange(np.prod(shape)) + 1.3 * j + 0.1).reshape(shape)
    if len(shape) > 1:
        base = base / np.sqrt(np.prod(shape[1:]))
    else:
        base = 1 + 0.1 * base if key.endswith("weight") else 0.05 * base
    return torch.tensor(base, dtype=torch.float32)


def wave_video(shape):
    n = np.arange(np.prod(shape))
    return torch.tensor(np.sin(0.01 * n + 0.3) + 0.5 * np.cos(0.11 * n)).float().reshape(shape)


def wave_audio(shape):
    return torch.tensor(np.sin(0.05 * np.arange(np.prod(shape)) + 0.7)).float().reshape(shape)


def wave_network(**changes):
    net = CoupledUNet(channels=32, head_channels=32, **changes)
    published = {
        key: wave(key, value.shape, j) for j, (key, value) in enumerate(to_published(net).items())
    }
    net.load_state_dict(from_published(net, published))
    return net.eval(), len(published)


def run_wave(net, shifts=None):
    video = rearrange(wave_video((2, 8, 3, 32, 32)), "b t c h w -> b c t h w")
    time, shifts = torch.tensor([7.0, 613.0]), None if shifts is None else torch.tensor(shifts)
    with torch.no_grad():
        v, a = net(video, wave_audio((2, 1, 1024)), time=time, shifts=shifts)
    return rearrange(v, "b c t h w -> b t c h w"), a


WAVES = {
    (0,) * 15: (
        [
            0.05279166, 0.11689883, 28.436764,
            0.058342, 0.056907, 0.054646, 0.052347, 0.043344, 0.033238,
        ],
        [
            0.04354757, 0.13085429, 6.239733,
            0.132125, 0.119863, 0.094305, 0.118503, 0.079461, 0.122768,
        ],
    ),
    (7, 7, 4, 4, 0, 0, 0, 0, 0, 4, 4, 4, 7, 7, 7): (
        [
            0.05283514, 0.11722134, 28.505902,
            0.058281, 0.056799, 0.054502, 0.052182, 0.043184, 0.033061,
        ],
        [
            0.04354529, 0.13085275, 6.239635,
            0.132142, 0.119867, 0.094283, 0.118427, 0.079414, 0.122735,
        ],
    ),
    (6, 6, 0, 2, 0, 0, 0, 0, 0, 4, 1, 4, 2, 4, 2): (
        [
            0.05272404, 0.11659530, 28.369269,
            0.058356, 0.056819, 0.054654, 0.052474, 0.043967, 0.033692,
        ],
        [
            0.04354894, 0.13085017, 6.239576,
            0.132001, 0.119665, 0.094165, 0.118319, 0.079396, 0.122718,
        ],
    ),
}  # fmt: skip


def test_window_shifts_are_the_published_ones():
    net, _ = wave_network()
    assert sum(p.numel() for p in net.parameters()) == 8_418_948
    assert net.shift_ranges(8) == list(list(WAVES)[1])
    for shifts, recorded in WAVES.items():
        for ours, theirs in zip(run_wave(net, shifts), recorded, strict=True):
            flat = ours.flatten()
            figures = torch.stack((flat.mean(), flat.std(), flat.norm(), *flat[:4], *flat[-2:]))
            torch.testing.assert_close(figures, torch.tensor(theirs), atol=1e-5, rtol=1e-5)


VARIANTS = {
    "windows": (
        {"cross_attention_windows": (1, 2, 4), "middle_cross_attention": False},
        8_286_340, 1034, (18.506437, -0.024366, 15.698941, -0.203549),
    ),
    "learned variance": (
        {"out_factor": 2}, 8_421_640, 1046, (38.851857, 0.058342, 12.736750, 0.132125),
    ),
    "shift only": (
        {"scale_shift_norm": False}, 8_341_860, 1046, (25.601029, 0.053129, 5.247970, 0.129664),
    ),
    "audio attention": (
        {"audio_attention_resolutions": (4, 8)},
        8_937_668, 1106, (34.369560, -0.098683, 14.829157, -0.121715),
    ),
    "one block": (
        {"num_res_blocks": 1}, 5_866_372, 726, (19.140708, 0.02924, 10.505751, 0.019261),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_the_published_ones(name):
    changes, parameters, keys, recorded = VARIANTS[name]
    net, count = wave_network(**changes)
    assert (sum(p.numel() for p in net.parameters()), count) == (parameters, keys)
    v, a = run_wave(net)
    figures = torch.stack((v.norm(), v.flatten()[0], a.norm(), a.flatten()[0]))
    torch.testing.assert_close(figures, torch.tensor(recorded), atol=1e-5, rtol=3e-5)


def test_time_embedding_is_the_published_one():
    embedding = time_embedding(torch.tensor([7.0]), 32)[0]
    recorded = [0.7539023, -0.7004298, -0.5994375, 0.6569866, -0.7137213, 0.8004216]
    found = embedding[[0, 1, 2, 16, 17, 18]]
    torch.testing.assert_close(found, torch.tensor(recorded), atol=1e-5, rtol=1e-5)


# the landscape configuration and its key map

LANDSCAPE = {
    "native": "d0ba1fd24b1c94171b36d0448f11b3471e73f3aeaaf448f15799a1e479182784",
    "sorted": "f817d202caef6bd4fadb3a4fbb469c32fcae1297a6d84c5967828c3873052c1d",
}


def test_landscape_keys_shapes_and_order():
    with torch.device("meta"):
        net = CoupledUNet()
    published = to_published(net)
    assert sum(p.numel() for p in net.parameters()) == 133_675_524
    assert len(published) == 1046
    assert net.shift_ranges(16) == [15] * 2 + [12] * 2 + [8] * 5 + [12] * 3 + [15] * 3
    lines = [f"{k} {'x'.join(map(str, v.shape))}\n" for k, v in published.items()]
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == LANDSCAPE["native"]
    assert hashlib.sha256("".join(sorted(lines)).encode()).hexdigest() == LANDSCAPE["sorted"]


def test_published_weights_round_trip():
    net = awake()
    published = {f"module.{key}": value for key, value in to_published(net).items()}
    back = from_published(net, published)
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in net.state_dict().items())


def test_weights_of_another_network_are_refused():
    published = to_published(CoupledUNet(**SMALL))
    with pytest.raises(ValueError, match="missing"):
        from_published(CoupledUNet(**{**SMALL, "num_res_blocks": 2}), published)
    with pytest.raises(ValueError, match="not"):
        from_published(CoupledUNet(**{**SMALL, "channels": 16}), published)


# what the network is


def test_output_is_zero_at_initialisation():
    video, audio, time = inputs()
    for output in CoupledUNet(**SMALL)(video, audio, time=time):
        assert not output.any()


@settings(max_examples=10, deadline=None)
@given(
    frames=st.integers(1, 6),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    samples=st.integers(6, 24),
    channels=st.sampled_from((2, 6, 8)),
    seed=st.integers(0, 3),
)
def test_any_size_that_divides_works_and_samples_stay_apart(
    frames, height, width, samples, channels, seed
):
    net = awake(seed, channels=channels, head_channels=channels)
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(3, 3, frames, 2 * height, 2 * width, generator=generator)
    audio = torch.randn(3, 1, 2 * samples, generator=generator)
    time = torch.tensor([3.0, 500.0, 999.0])
    shifts = torch.tensor([highest // 2 for highest in net.shift_ranges(frames)])
    with torch.no_grad():
        together = net(video, audio, time=time, shifts=shifts)
        alone = net(video[1:2], audio[1:2], time=time[1:2], shifts=shifts)
    assert together[0].shape == video.shape
    assert together[1].shape == audio.shape
    for ours, one in zip(together, alone, strict=True):
        assert ours.isfinite().all()
        # a norm over a handful of nearly equal values magnifies rounding
        assert relative(ours[1:2], one) <= 2e-3


def test_recomputing_activations_leaves_gradients_alone():
    video, audio, time = inputs()
    gradients = []
    for checkpoint in (False, True, 5e-4):
        net = awake(checkpoint=checkpoint)
        shifts = torch.tensor(net.shift_ranges(4))
        outputs = net(video, audio, time=time, shifts=shifts)
        sum(output.square().sum() for output in outputs).backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    for same in zip(*gradients, strict=True):
        assert all(torch.equal(same[0], other) for other in same[1:])


def kept_bytes(net, video, audio, time):
    """What a forward pass holds for the gradient, beside parameters."""
    kept = {}

    def keep(x):
        if not isinstance(x if x._base is None else x._base, nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = net(video, audio, time=time)
    assert all(output.grad_fn for output in outputs)
    return sum(kept.values())


def test_activations_kept_are_within_the_budget():
    clip = inputs()
    everything = kept_bytes(awake(), *clip)
    found = [kept_bytes(awake(checkpoint=s * everything / 2**30), *clip) for s in (2.0, 0.7, 0.4)]
    assert found[0] == everything
    assert 0.4 * everything < found[1] <= 0.72 * everything
    assert found[2] <= 0.42 * everything
    # too small a budget: the least there is, which is everything recomputed
    least = [kept_bytes(awake(checkpoint=value), *clip) for value in (1e-9, True)]
    assert least[0] == least[1] < found[2]


def test_dropout_acts_in_training_only():
    video, audio, time = inputs()
    net = awake(dropout=0.5)
    a, b = (net(video, audio, time=time)[0] for _ in range(2))
    assert not torch.equal(a, b)
    net.eval()
    a, b = (net(video, audio, time=time)[0] for _ in range(2))
    assert torch.equal(a, b)


def test_bf16_autocast_stays_near_float32():
    video, audio, time = inputs()
    net = awake()
    exact = net(video, audio, time=time)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(video, audio, time=time)
    sum(output.float().square().mean() for output in rough).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    for ours, theirs in zip(rough, exact, strict=True):
        assert (ours.float() - theirs).norm() <= 0.05 * theirs.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": 9}, r"9x9 pixels.*use 10x10"),
        ({"samples": 47}, r"47 samples.*use 46 or 48"),
        ({"samples": 6}, r"3 audio tokens for 4 frames.*at least 8 samples"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    video, audio, time = inputs(**change)
    with pytest.raises(ValueError, match=message):
        CoupledUNet(**SMALL)(video, audio, time=time)


def test_wrong_number_of_shifts_is_refused():
    net, (video, audio, time) = CoupledUNet(**SMALL), inputs()
    with pytest.raises(ValueError, match=f"3 shifts for {len(net.shift_ranges(4))}"):
        net(video, audio, time=time, shifts=torch.zeros(3, dtype=torch.long))


def test_heads_and_windows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="16 channels do not split into 3 heads"):
        CoupledUNet(**{**SMALL, "num_heads": 3})
    with pytest.raises(ValueError, match="10 channels do not split into 3 cross-attention heads"):
        CoupledUNet(**{**SMALL, "channels": 10, "head_channels": 3})
    with pytest.raises(ValueError, match="1 cross_attention_windows for 2"):
        CoupledUNet(**{**SMALL, "cross_attention_windows": (1,)})
