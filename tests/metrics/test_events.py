"""What is found in clips whose motion and sounds are made by hand."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.metrics.events import EDGE, Events, Onsets, farneback, grey, normal_flow
from avdiffusion.metrics.sync import frame_flux, motion_envelope, onset_envelope


def clicks(times, seconds=1.6, rate=8000):
    """Decaying tones that start at `times`: float32 [1, 1, L]."""
    at = np.arange(round(seconds * rate)) / rate
    wave = sum(
        0.8 * np.sin(2 * np.pi * 700 * (at - t)) * np.exp(-40 * np.maximum(at - t, 0)) * (at >= t)
        for t in times
    )
    return np.float32(wave)[None, None]


def pattern(places, side=48, period=16.0):
    """A soft pattern at horizontal `places` in pixels, one a frame: uint8 [1, 3, T, side, side]."""
    x, y = np.arange(side), np.arange(side)[:, None]
    wave = [np.sin(2 * np.pi * (x - p) / period) * np.cos(2 * np.pi * y / 24) for p in places]
    return np.repeat((127.5 + 100 * np.stack(wave)[None, None]).astype(np.uint8), 3, axis=1)


def snow(frames, seed=0, batch=1):
    shape = (batch, 3, frames, 12, 12)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("speed", [0.3, 0.8, 1.5])
def test_flow_is_the_speed_in_pixels_a_frame(speed):
    pictures = grey(pattern(speed * np.arange(8))[0])
    pytest.importorskip("cv2")
    np.testing.assert_allclose(farneback(pictures), speed, rtol=0.15)
    # Half of the motion is along the edges, where the gradient does not see it.
    assert normal_flow(pictures) == pytest.approx(
        [normal_flow(grey(pattern([0, speed])[0]))[0]] * 7, rel=0.1
    )


@pytest.mark.parametrize("speed", [0.2, 0.5, 1.0])
def test_normal_flow_of_what_moves_along_its_gradient_is_its_speed(speed):
    x = np.arange(64)
    wave = [127.5 + 100 * np.sin(2 * np.pi * (x - speed * t) / 32) for t in range(6)]
    pictures = np.rint(np.repeat(np.stack(wave)[:, None], 64, axis=1)).astype(np.uint8)
    np.testing.assert_allclose(normal_flow(pictures), speed, atol=0.03)


def test_stillness_and_flat_pictures_have_no_flow():
    still = np.repeat(snow(1), 6, axis=2)
    flat = np.full((1, 3, 6, 12, 12), 90, np.uint8)
    for video in (still, flat):
        assert not Events(flow="difference").seen(video, 10)["flow"].any()
    pytest.importorskip("cv2")
    for video in (still, flat):
        assert Events(flow="farneback").seen(video, 10)["flow"].max() < 0.05


def test_grey_is_that_of_opencv():
    cv2 = pytest.importorskip("cv2")
    clip = snow(5)[0]
    theirs = [cv2.cvtColor(np.moveaxis(clip[:, t], 0, -1), cv2.COLOR_RGB2GRAY) for t in range(5)]
    assert np.abs(grey(clip).astype(int) - np.array(theirs)).max() <= 1


@settings(max_examples=25, deadline=None)
@given(
    frames=st.integers(4, 20),
    fps=st.sampled_from([4.0, 10.0, 12.5, 25.0, 30.0, 29.97]),
    rate=st.sampled_from([4000, 8000, 16000, 22050]),
    motion=st.sampled_from(["acceleration", "difference"]),
    extra=st.integers(-3, 400),
)
def test_shapes_follow_the_length_and_loudness_keeps_the_energy(frames, fps, rate, motion, extra):
    events = Events(motion=motion, flow="difference")
    length = round(frames * rate / fps)
    audio = 0.1 * np.random.default_rng(0).standard_normal((2, 1, max(length + extra, 1)))
    found = events({"video": snow(frames, batch=2), "audio": audio}, {"video": fps, "audio": rate})
    steps = 2 * int(np.ceil(50 / fps))
    count = frames - (2 if motion == "acceleration" else 1)
    shapes = {"motion": (count,), "flow": (frames - 1,), "fps": (), "seconds": ()}
    shapes |= {"flux": (frames, steps), "rms": (frames, steps)}
    assert set(found) == set(events.fields)
    for name, shape in shapes.items():
        assert found[name].shape == (2, *shape), name
    heard = audio[:, 0, : min(length, audio.shape[-1])]
    step = rate / (fps * steps)
    np.testing.assert_allclose((found["rms"] ** 2).sum((1, 2)) * step, (heard**2).sum(1), rtol=0.02)
    np.testing.assert_allclose(found["seconds"], frames / fps)


@pytest.mark.parametrize(
    "times", [[0.5], [0.2, 0.9, 1.3], [0.04, 1.5], list(0.1 + 0.15 * np.arange(9))]
)
def test_onsets_are_where_the_tones_start_and_nan_after(times):
    found = Events(flow="difference").heard(clicks(times), 10, 8000, 16)["onsets"]
    assert found.shape[1] > 16
    np.testing.assert_allclose(found[0, : len(times)], times, atol=0.015)
    assert np.isnan(found[0, len(times) :]).all()


def test_what_sounds_throughout_starts_nowhere():
    at = np.arange(12800) / 8000
    tone = np.float32(0.5 * np.sin(2 * np.pi * 440 * at))[None, None]
    found = Events(flow="difference").heard(tone, 10, 8000, 16)
    assert np.isnan(found["onsets"]).all()
    assert found["flux"].max() < 0.1
    np.testing.assert_allclose(found["rms"], 0.5 / np.sqrt(2), rtol=0.1)


def test_envelopes_are_those_of_sync_and_nothing_at_the_ends():
    video, audio = snow(16, batch=3), clicks([0.3, 1.1]).repeat(3, axis=0)
    for motion in ("acceleration", "difference"):
        events = Events(motion=motion, flow="difference")
        found = events({"video": video, "audio": audio}, {"video": 10, "audio": 8000})
        np.testing.assert_array_equal(found["motion"], motion_envelope(video, motion))
        flux, ends = frame_flux(audio, 10, 8000, 16), round(EDGE * 100)
        np.testing.assert_array_equal(found["flux"], flux)
        heard = onset_envelope(audio, 8000, 0.01)
        np.testing.assert_allclose(flux.reshape(3, -1)[:, ends:-ends], heard[:, ends:-ends])
        assert heard[:, 30].min() > 1
    loud = frame_flux(clicks([0.01, 0.5, 1.585]), 10, 8000, 16).reshape(-1)
    assert not loud[:ends].any()
    assert not loud[1 - ends :].any()
    assert loud[48:53].max() > 1


def test_a_clip_is_judged_alone_in_either_number_format():
    events = Events()
    video = np.concatenate([pattern(np.cumsum(np.arange(8) % 3)), pattern(np.arange(8.0))])
    audio = np.concatenate([clicks([0.2], 0.8), clicks([0.4, 0.6], 0.8)])
    rates = {"video": 10, "audio": 8000}
    together = events({"video": video, "audio": audio}, rates)
    tensors = {"video": torch.from_numpy(video), "audio": torch.from_numpy(audio)}
    floats = events({**tensors, "video": tensors["video"].float() / 127.5 - 1}, rates)
    for i in range(2):
        alone = events({"video": video[i : i + 1], "audio": audio[i : i + 1]}, rates)
        for name, values in together.items():
            np.testing.assert_array_equal(alone[name][0], values[i])
            np.testing.assert_allclose(floats[name][i], values[i], atol=0.02)


def test_target_onsets_stand_beside_those_of_the_clips():
    extractor = Onsets()
    found = extractor({"audio": clicks([0.5])}, {"audio": 8000}, {"audio": clicks([0.2, 1.0])})
    assert set(found) == set(extractor.fields)
    assert found["onsets"].shape == found["target"].shape
    np.testing.assert_allclose(found["onsets"][0, :1], [0.5], atol=0.015)
    np.testing.assert_allclose(found["target"][0, :2], [0.2, 1.0], atol=0.015)


def test_names_tell_what_numbers_depend_on_and_load_nothing():
    names = {
        Events(motion=motion, flow=flow).name
        for motion in ("acceleration", "difference")
        for flow in ("farneback", "difference")
    }
    assert len(names) == 4
    assert pickle.loads(pickle.dumps(Events(flow="difference"))).flow == "difference"
    code = """
import sys
from avdiffusion.metrics.events import Events, Onsets
assert "flow" in Events().name and Onsets().name
heavy = {"cv2", "torchmetrics", "scipy", "av", "pytorch_lightning"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_opencv_frame_differences_are_used(monkeypatch):
    monkeypatch.setattr("avdiffusion.metrics.events.find_spec", lambda name: None)
    assert Events().flow == "difference"
    with pytest.raises(ValueError, match="'optical' is unknown: choose farneback or difference"):
        Events(flow="optical")
