"""The frame network against recorded figures of the published one, and its own promises."""

import json
from functools import partial
from math import prod

import pytest
import torch
import torch.nn.functional as F
from golden_media import close, load, z
from golden_network import relative, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coupled_unet import wave, wave_audio, wave_video
from torch.utils.flop_counter import FlopCounterMode

from avdiffusion.diffusion.diffusion import Diffusion
from avdiffusion.diffusion.guide import Clamp, Task
from avdiffusion.diffusion.path import DiscreteVP
from avdiffusion.media import Media
from avdiffusion.nn.blocks import Conv, UpConv, repeat
from avdiffusion.nn.unet import UNet
from avdiffusion.published_unet import from_published, to_published
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.sampler import last
from avdiffusion.systems.step import Step

SMALL = {
    "channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "num_heads": 2,
    "attention_resolutions": (2,),
}


def awake(seed=0, **changes):
    """A small network whose zero-initialised branches are drawn as well."""
    torch.manual_seed(seed)
    net = UNet(**{**SMALL, **changes})
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def inputs(batch=2, frames=3, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, low = (torch.randn(batch, 3, frames, height, width, generator=generator) for _ in range(2))
    return x, 1000 * torch.rand(batch, generator=generator), low


def upsampled(low, size):
    return F.interpolate(low, size, mode="bilinear", align_corners=False)


def loop(net, noise, concat):
    """The published 25 steps from this noise."""
    path = DiscreteVP()
    diffusion = Diffusion(net=net, path=path, learned_variance=True)
    predict = partial(diffusion.predict, cond={"concat": concat})
    denoise = Clamp()(lambda x, t: predict(x, t), Task(path))
    with torch.no_grad():
        return last(DDIM(steps=25, grid="leading")(denoise, Media(video=noise), path))["video"]


def loss(net, x0, noise, concat, steps):
    diffusion = Diffusion(net=net, path=DiscreteVP(), learned_variance=True)
    times = (torch.tensor(steps, dtype=torch.float64) + 1) / 1000
    given = {"t": times, "noise": Media(video=noise)}
    with torch.no_grad():
        return diffusion.loss(Media(video=x0), {"concat": concat}, **given)


# golden/sr_unet.npz


@pytest.fixture(scope="module")
def recorded():
    """The recorded network, what it is told, and the recording."""
    arrays, meta = load("sr_unet.npz")
    config = meta["config"]
    net = UNet(
        channels=config["model_channels"],
        channel_mult=tuple(config["channel_mult"]),
        num_res_blocks=config["num_res_blocks"],
        num_heads=config["num_heads"],
        attention_resolutions=tuple(config["attention_downsample_factors"]),
    )
    published = weights(meta)
    assert list(published) == list(to_published(net))
    assert sum(p.numel() for p in net.parameters()) == meta["parameter_count"]
    net.load_state_dict(from_published(net, published))
    low = z("r.in.low_res", (2, 3, 8, 8), 0.5).clamp(-1, 1)
    return net, upsampled(low, (32, 32)), arrays, meta


def test_the_forward_pass_is_the_published_one(recorded):
    net, concat, arrays, meta = recorded
    x, time = z("r.in.x", (2, 3, 32, 32)), torch.tensor(meta["timesteps"]).float()
    with torch.no_grad():
        close(net(x, time=time, concat=concat), arrays["output"])


def test_the_sampling_loop_is_the_published_one(recorded):
    net, concat, arrays, _ = recorded
    close(loop(net, z("r.xT", (2, 3, 32, 32)), concat), arrays["ddim25"])


def test_the_loss_is_the_published_one(recorded):
    net, concat, arrays, _ = recorded
    shape = (2, 3, 32, 32)
    found = loss(net, z("r.x0", shape, 0.5).clamp(-1, 1), z("r.n", shape), concat, [0, 640])
    close(found["video"], arrays["loss.mse"])
    close(found["video_vb"], arrays["loss.vb"])
    close(found["video"] + found["video_vb"], arrays["loss.loss"])


# recorded figures of closed-form weights and inputs


def test_closed_form_figures_are_the_published_ones():
    net = UNet(
        channels=32, channel_mult=(1, 2, 3, 4), num_res_blocks=1, attention_resolutions=(4, 8)
    )
    published = {
        key: wave(key, value.shape, j) for j, (key, value) in enumerate(to_published(net).items())
    }
    assert len(published) == 274
    assert sum(p.numel() for p in net.parameters()) == 4_475_526
    net.load_state_dict(from_published(net, published))
    x, concat = wave_video((2, 3, 64, 64)), upsampled(wave_audio((2, 3, 16, 16)), (64, 64))
    with torch.no_grad():
        out = net(x, time=torch.tensor([7.0, 613.0]), concat=concat)
    flat = out.flatten()
    figures = torch.stack((flat.norm(), flat.mean(), *flat[:4]))
    expected = [77.034166, -0.00835096, 0.113976, 0.153651, 0.132613, 0.126557]
    torch.testing.assert_close(figures, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    sample = loop(net, x, concat)
    figures = torch.stack((sample.norm(), sample.mean()))
    torch.testing.assert_close(
        figures, torch.tensor([153.294343, -0.02793395]), atol=1e-5, rtol=1e-4
    )


# the published configuration


def listing():
    """Every tensor's name and shape as ../shared/spec lists the levels, in the published order."""
    rows = {"time_embed.0": (768, 192), "time_embed.2": (768, 768)}
    rows["input_blocks.0.0"] = (192, 6, 3, 3)

    def res(name, inputs, outputs):
        rows[f"{name}.in_layers.0"] = (inputs,)
        rows[f"{name}.in_layers.2"] = (outputs, inputs, 3, 3)
        rows[f"{name}.emb_layers.1"] = (2 * outputs, 768)
        rows[f"{name}.out_layers.0"] = (outputs,)
        rows[f"{name}.out_layers.3"] = (outputs, outputs, 3, 3)
        if inputs != outputs:
            rows[f"{name}.skip_connection"] = (outputs, inputs, 1, 1)

    def attention(name, width):
        rows[f"{name}.norm"] = (width,)
        rows[f"{name}.qkv"] = (3 * width, width, 1)
        rows[f"{name}.proj_out"] = (width, width, 1)

    downs, attends = (3, 6, 9, 12, 15), (10, 11, 13, 14, 16, 17)
    widths = [192] * 7 + [384] * 6 + [768] * 5  # after each of the input blocks
    for number in range(1, 18):
        res(f"input_blocks.{number}.0", widths[number - 1], widths[number])
        if number in attends:
            attention(f"input_blocks.{number}.1", widths[number])
        assert number not in downs or widths[number - 1] == widths[number]
    res("middle_block.0", 768, 768)
    attention("middle_block.1", 768)
    res("middle_block.2", 768, 768)
    ins = [1536] * 5 + [1152, 1152, 768, 768, 768, 768, 576, 576, 384, 384, 384, 384, 384]
    outs = [768] * 6 + [384] * 6 + [192] * 6
    for number in range(18):
        name = f"output_blocks.{number}"
        res(f"{name}.0", ins[number], outs[number])
        if number < 9:
            attention(f"{name}.1", outs[number])
        if number % 3 == 2 and number < 17:
            res(f"{name}.{1 + (number < 9)}", outs[number], outs[number])
    rows["out.0"] = (192,)
    rows["out.2"] = (6, 192, 3, 3)
    return {
        f"{name}.{kind}": shape if kind == "weight" else shape[:1]
        for name, shape in rows.items()
        for kind in ("weight", "bias")
    }


def test_published_keys_shapes_and_order():
    with torch.device("meta"):
        net = UNet()
    published = {key: tuple(value.shape) for key, value in to_published(net).items()}
    assert sum(p.numel() for p in net.parameters()) == 311_027_910
    assert sum(prod(shape) for shape in published.values()) == 311_027_910
    assert len(published) == 566
    assert list(published.items()) == list(listing().items())


def test_it_does_the_work_of_the_published_one_and_less_where_it_resamples(monkeypatch):
    with torch.device("meta"):
        net, x = UNet(), torch.empty(1, 3, 256, 256)

    def gflop():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, time=torch.empty(1, device="meta"), concat=x)
        return round(counter.get_total_flops() / 1e9)

    assert gflop() == 1204
    monkeypatch.setattr(UpConv, "forward", lambda conv, x: Conv.forward(conv, repeat(x, (2, 2))))
    assert gflop() == 1263


def test_published_weights_round_trip():
    for changes in ({}, {"resblock_updown": False, "scale_shift_norm": False}):
        net = awake(**changes)
        published = {f"module.{key}": value for key, value in to_published(net).items()}
        back = from_published(net, published)
        assert back.keys() == net.state_dict().keys()
        assert all(torch.equal(back[key], value) for key, value in net.state_dict().items())


def test_weights_of_another_network_are_refused():
    published = to_published(UNet(**SMALL))
    for changes in ({"num_res_blocks": 2}, {"channels": 16}, {"resblock_updown": False}):
        with pytest.raises(ValueError, match=r"missing|not"):
            from_published(UNet(**{**SMALL, **changes}), published)


# what the network is


def test_output_is_zero_at_initialisation():
    x, time, concat = inputs()
    out = UNet(**SMALL)(x, time=time, concat=concat)
    assert out.shape == (2, 6, 3, 8, 8)
    assert not out.any()


@settings(max_examples=10, deadline=None)
@given(
    frames=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    changes=st.sampled_from(
        ({}, {"resblock_updown": False}, {"scale_shift_norm": False}, {"concat_channels": 0})
    ),
)
def test_any_size_works_and_frames_stay_apart(frames, height, width, changes):
    net = awake(**changes).eval()
    x, time, concat = inputs(2, frames, height, width)
    told = {"concat": concat} if net.concat_channels else {}
    with torch.no_grad():
        together = net(x, time=time, **told)
        assert together.shape == (2, 6, frames, height, width)
        for i in range(2):
            for k in range(frames):
                frame = {name: v[i : i + 1, :, k] for name, v in told.items()}
                alone = net(x[i : i + 1, :, k], time=time[i : i + 1], **frame)
                # a norm over a handful of nearly equal values magnifies rounding
                assert relative(together[i : i + 1, :, k], alone) <= 2e-3

        even = [
            F.pad(v[:, :, 0], (0, width % 2, 0, height % 2), mode="replicate") for v in (x, concat)
        ]
        filled = net(even[0], time=time, **dict.fromkeys(told, even[1]))
        assert relative(together[:, :, 0], filled[..., :height, :width]) <= 2e-3


def test_one_time_for_all_is_the_same_as_many():
    net = awake()
    x, _, concat = inputs()
    found = []
    for time in (torch.tensor([300.0]), torch.tensor([300.0, 300.0])):
        net.zero_grad()
        out = net(x, time=time, concat=concat)
        out.square().sum().backward()
        found.append((out, torch.cat([p.grad.flatten() for p in net.parameters()])))
    for one, many in zip(*found, strict=True):
        assert relative(one, many) <= 1e-4


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 2),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
)
def test_up_sampling_convolution_is_one_of_the_larger_picture(n, height, width, inputs, outputs):
    torch.manual_seed(0)
    fast, plain = UpConv(inputs, outputs).double(), Conv(inputs, outputs, (3, 3)).double()
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(n, height, width, inputs, dtype=torch.float64, requires_grad=True)
    found = []
    for made in (fast(x), plain(repeat(x, (2, 2)))):
        net = fast if not found else plain
        cotangent = torch.cos(torch.arange(made.numel(), dtype=torch.float64)).view(made.shape)
        found.append((made, *torch.autograd.grad((made * cotangent).sum(), [x, *net.parameters()])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_recomputing_activations_leaves_gradients_alone():
    x, time, concat = inputs()
    gradients = []
    for checkpoint in (False, True, 2e-4):
        net = awake(checkpoint=checkpoint)
        net(x, time=time, concat=concat).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert 0 < sum(len(stages) for stages in net.plan.known.values()) < len([*net.stages()])
    for same in zip(*gradients, strict=True):
        assert all(torch.equal(same[0], other) for other in same[1:])


def test_dropout_acts_in_training_only():
    x, time, concat = inputs()
    net = awake(dropout=0.5)
    with torch.no_grad():
        assert not torch.equal(*(net(x, time=time, concat=concat) for _ in range(2)))
        net.eval()
        assert torch.equal(*(net(x, time=time, concat=concat) for _ in range(2)))


def test_bf16_stays_near_float32_and_weights_may_be_rounded_before():
    x, time, concat = inputs()
    net = awake()
    exact = net(x, time=time, concat=concat)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(x, time=time, concat=concat)
    rough.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() <= 0.05 * exact.norm()
    rounded = dict(net.named_parameters())
    with torch.no_grad():
        for name in net.rounded():
            rounded[name].copy_(rounded[name].bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(net(x, time=time, concat=concat), rough)


def test_sampling_in_bf16_is_automatic_mixed_precision():
    x, time, concat = inputs(1)
    net = awake().eval()
    with torch.no_grad():
        found = Step(precision="bf16-mixed")(net)(x, time=time, concat=concat)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(found, net(x, time=time, concat=concat))


@pytest.mark.slow
def test_the_network_is_one_graph_for_compilers(recorded):
    net, concat, arrays, meta = recorded
    x, time = z("r.in.x", (2, 3, 32, 32)), torch.tensor(meta["timesteps"]).float()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        close(compiled(x, time=time, concat=concat), arrays["output"])


def test_the_memory_of_a_frame_is_told_beforehand(tmp_path):
    net = awake(channels=32).eval()
    x, concat = torch.randn(2, 1, 3, 96, 160).unbind()
    time = torch.tensor([500.0])
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        net(x, time=time, concat=concat)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    held = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"]
    measured = max(held) - min(held)
    assert net.frame_bytes(96, 160) == pytest.approx(measured, rel=0.3)
    assert net.frame_bytes(96, 320) == pytest.approx(2 * net.frame_bytes(96, 160), rel=0.1)


@pytest.mark.parametrize(
    ("concat", "told", "message"),
    [
        (3, None, r"concat is None, but of frames .* is told \(2, 3, 3, 8, 8\)"),
        (3, (2, 3, 3, 4, 4), r"concat is \(2, 3, 3, 4, 4\)"),
        (0, (2, 3, 3, 8, 8), r"is told nothing"),
    ],
)
def test_another_condition_is_refused(concat, told, message):
    x, time, _ = inputs()
    with pytest.raises(ValueError, match=message):
        UNet(**SMALL, concat_channels=concat)(
            x, time=time, concat=None if told is None else torch.zeros(told)
        )
