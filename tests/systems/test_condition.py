"""What is made of given clips: its size, its noise, and that frames keep to themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_sr import low_res, sr_system
from small_system import fit, system

from avdiffusion.data.module import DataModule
from avdiffusion.diffusion.guide import ClassifierFree
from avdiffusion.diffusion.noise import Noise, SharedNoise
from avdiffusion.media import Media
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.samplers.dpm_solver import DPMSolver
from avdiffusion.systems.codec import Frames, Identity
from avdiffusion.systems.condition import LowRes
from avdiffusion.systems.step import Step

ANCESTRAL = DDPM(steps=3, variance="learned")
EXACT = {"rtol": 0, "atol": 0}
NEAR = {"rtol": 1e-4, "atol": 1e-4}  # of the largest values, about 1


@settings(deadline=None, max_examples=30)
@given(
    scale=st.sampled_from([1, 1.5, 2, 3, 4]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    frames=st.integers(1, 3),
)
def test_low_resolution_is_brought_to_the_higher_one(scale, height, width, frames):
    batch, conditioner = low_res(2, frames, height, width), LowRes(scale=scale)
    concat = conditioner(batch, None)["concat"]
    shape = conditioner.shapes(batch, {"video": [3, 1, 64, 64]})["video"]
    assert list(concat.shape) == [2, *shape]
    assert shape == [3, frames, round(scale * height), round(scale * width)]
    # bilinear between the centres of pixels, the edges held: every axis by itself
    value = batch["low_res"].double().numpy()
    for axis, n in ((-2, height), (-1, width)):
        size = round(scale * n)
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        low, share = np.floor(at).astype(int), at - np.floor(at)
        high = np.minimum(low + 1, n - 1)
        share = share.reshape([-1] + [1] * (-axis - 1))
        value = value.take(low, axis) * (1 - share) + value.take(high, axis) * share
    np.testing.assert_allclose(concat.numpy(), value, atol=2e-5)


def test_a_batch_without_the_condition_is_named():
    with pytest.raises(ValueError, match=r"no 'low_res'.*holds \['video'\]"):
        LowRes()({"video": torch.zeros(1)}, None)
    with pytest.raises(ValueError, match=r"scale=0\.5"):
        LowRes(scale=0.5)


def test_shared_noise_is_one_map_for_all_frames_and_parts():
    x = torch.empty(2, 3, 5, 4, 4)
    noise = Frames().noise(Noise(1, [7, (8, 16)], "sample"))
    map_ = noise.fork("start").like(Media(video=x))["video"]
    assert torch.equal(map_, map_[:, :, :1].expand_as(x))
    again = Frames().noise(Noise(1, [(7, 4), 8], "sample")).fork("start").like(Media(video=x))
    assert torch.equal(map_, again["video"])
    assert not torch.equal(map_[0], map_[1])
    # the second step's is another one, and each is standard normal
    source = SharedNoise(0, range(64), "step")
    first, second = (source.like(torch.empty(64, 3, 2, 16, 16)) for _ in range(2))
    assert abs(float((first * second).mean())) < 0.02
    assert float(first.mean()) == pytest.approx(0, abs=0.01)
    assert float(first.std()) == pytest.approx(1, abs=0.01)
    plain = Noise(1, [7])
    assert Identity().noise(plain) is plain


@pytest.mark.parametrize("sampler", [None, ANCESTRAL, DPMSolver(steps=3, method="multistep")])
def test_equal_frames_become_equal_frames(sampler):
    """Also with noise in every step; with independent noise they would not."""
    batch = {"low_res": low_res()["low_res"][:, :, :1].expand(-1, -1, 3, -1, -1)}
    clip = sr_system(sampler=sampler).conditioned(batch, [0, 1]).clips["video"]
    assert clip.shape == (2, 3, 3, 16, 16)
    torch.testing.assert_close(clip, clip[:, :, :1].expand_as(clip), **NEAR)
    apart = sr_system(sampler=sampler, codec=Identity()).conditioned(batch, [0, 1]).clips["video"]
    assert float((apart - apart[:, :, :1]).abs().max()) > 0.1


def test_a_frame_depends_on_its_own_low_resolution_alone():
    model, batch = sr_system(sampler=ANCESTRAL), low_res()
    clip = model.conditioned(batch, [3, 4]).clips["video"]
    batch["low_res"][0, :, 1] *= -1
    other = model.conditioned(batch, [3, 4]).clips["video"]
    torch.testing.assert_close(other[1], clip[1], **NEAR)
    torch.testing.assert_close(other[0][:, [0, 2]], clip[0][:, [0, 2]], **NEAR)
    assert float((other[0][:, 1] - clip[0][:, 1]).abs().max()) > 0.05


def test_samples_do_not_depend_on_their_batch_or_on_how_a_clip_is_cut():
    model, batch = sr_system(sampler=ANCESTRAL), low_res(frames=5)
    whole = model.conditioned(batch, [3, 4], seed=2).clips["video"]
    one = {"low_res": batch["low_res"][1:]}
    alone = model.conditioned(one, [4], seed=2).clips["video"]
    torch.testing.assert_close(alone[0], whole[1], **NEAR)
    parts = [
        model.conditioned({"low_res": one["low_res"][:, :, a:b]}, [4], seed=2, start=a)
        for a, b in ((0, 2), (2, 5))
    ]
    joined = torch.cat([part.clips["video"] for part in parts], 2)
    torch.testing.assert_close(joined[0], whole[1], **NEAR)
    assert not torch.allclose(model.conditioned(one, [4], seed=3).clips["video"], alone, atol=0.1)
    # independent noise is another for each part
    model = sr_system(sampler=ANCESTRAL, codec=Identity())
    first, second = (model.conditioned(one, [4], start=s).clips["video"] for s in (0, 5))
    assert float((first - second).abs().max()) > 0.1


@settings(deadline=None, max_examples=8)
@given(frames=st.integers(1, 7), at_once=st.integers(1, 8))
def test_frames_at_once_change_nothing(frames, at_once):
    model, batch = sr_system(), low_res(2, frames)
    plain = model.conditioned(batch, [0, 1]).clips["video"]
    seen = []
    net = model.ema.ema_model.net
    hook = net.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    split = model.conditioned(batch, [0, 1], step=Step(frames_at_once=at_once)).clips["video"]
    hook.remove()
    torch.testing.assert_close(split, plain, **NEAR)
    assert max(seen) == min(at_once, 2 * frames)
    assert sum(seen) == 3 * 2 * frames


def test_memory_sets_how_many_frames_are_computed_at_once(monkeypatch):
    model = sr_system()
    each = model.model.net.frame_bytes(16, 16)
    for free, expected in ((5 * each, 2), (0, 1), (1000 * each, 64)):
        monkeypatch.setattr("avdiffusion.memory.available", lambda free=free: free)
        step = Step()
        model.conditioned(low_res(1, 2), [0], step=step)
        assert list(step.fitting.values()) == [expected]
    with pytest.raises(ValueError, match="frames_at_once=0"):
        Step(frames_at_once=0)


def test_bfloat16_makes_nearly_the_same():
    model, batch = sr_system(), low_res()
    exact = model.conditioned(batch, [0, 1]).clips["video"]
    half = model.conditioned(batch, [0, 1], step=Step(precision="bf16-mixed")).clips["video"]
    error = (half - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < float(error) < 0.03


def test_only_clips_of_others_are_made():
    model = sr_system()
    with pytest.raises(ValueError, match="makes clips of others, of low_res"):
        model.sample(2)
    with pytest.raises(ValueError, match="leaves out a condition, and this model has none"):
        model.conditioned(low_res(), [0, 1], guides=[ClassifierFree()])
    with pytest.raises(ValueError, match="holds \\['other'\\]"):
        model.conditioned({"other": torch.zeros(1)}, [0])


class Pairs(torch.utils.data.Dataset):
    """Two colours, larger and smaller."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        colour = torch.full((3, 1, 1, 1), 255 * (i % 2), dtype=torch.uint8)
        low = (colour.float() / 127.5 - 1).expand(3, 1, 4, 4).clone()
        return {"video": colour.expand(3, 1, 16, 16).clone(), "low_res": low}


def test_training_learns_to_use_the_condition():
    """Plain colours: after a few steps the loss with the right condition is below the wrong's."""
    clip = {"fps": 10, "frames": 1, "size": [16, 16], "sample_rate": 10, "samples": 1}
    model = sr_system(target="x0", weights={"video": 1.0})
    data = DataModule(train=Pairs(), val=Pairs(), batch_size=8, **clip)
    run = fit(model, 40, data, val_check_interval=20)
    items = [Pairs()[i] for i in range(8)]
    batch = {k: torch.stack([item[k] for item in items]) for k in items[0]}
    x0, noise = model.encode(batch), Noise(0, range(8))
    t = torch.full((8,), 0.95, dtype=torch.float64)
    fixed = noise.like(x0)

    def loss(low):
        cond = model.model.condition({"low_res": low})
        return float(model.model.loss(x0, cond, t=t, noise=fixed)["video"].detach().mean())

    assert loss(batch["low_res"]) < 0.5 * loss(batch["low_res"].flip(0))
    assert {"val/loss", "val/loss_video", "val/loss_video_vb"} <= run.callback_metrics.keys()


def test_models_without_a_condition_are_told_nothing():
    assert system().model.condition({"video": torch.zeros(1)}) == {}
