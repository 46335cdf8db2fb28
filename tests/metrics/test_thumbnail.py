"""Clips in small: what is kept of them, and that copies stay near."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.metrics.thumbnail import Thumbnail, _means, _mel

RATES = {"video": 10, "audio": 8000}


def clips(rng, count=4, frames=16, size=(32, 48), samples=12800):
    """Each with its own colours and tone."""
    colours = rng.random((count, 3, 1, 1, 1))
    waves = np.linspace(0, 1, frames)[:, None, None] + np.linspace(0, 2, size[1])
    video = colours + 0.2 * np.sin(6 * waves + 6 * colours)
    tone = np.sin(np.arange(samples) * rng.uniform(0.1, 1.5, (count, 1, 1)))
    audio = 0.3 * tone + 0.01 * rng.standard_normal((count, 1, samples))
    return {
        "video": (255 * np.clip(video * np.ones((1, 1, 1, size[0], 1)), 0, 1)).astype(np.uint8),
        "audio": audio.astype(np.float32),
    }


@settings(deadline=None, max_examples=25)
@given(
    frames=st.integers(1, 20),
    height=st.integers(3, 40),
    width=st.integers(3, 40),
    samples=st.integers(50, 9000),
    rate=st.sampled_from([2000, 8000, 44100]),
)
def test_any_clip_has_one_of_the_same_length(frames, height, width, samples, rate):
    made = clips(np.random.default_rng(0), 2, frames, (height, width), samples)
    found = Thumbnail()(made, {"video": 10, "audio": rate})["thumbnail"]
    assert found.shape == (2, 8 * 8 * 8 * 3 + 8 * 16)
    assert np.isfinite(found).all()


def test_means_are_those_of_even_stretches():
    x = np.arange(12.0).reshape(1, 12)
    assert _means(x, 1, 4).tolist() == [[1, 4, 7, 10]]
    assert _means(x, 1, 12).tolist() == x.tolist()
    assert _means(x[:, :2], 1, 4).tolist() == [[0, 0, 1, 1]]


def test_bands_follow_the_mel_scale():
    weight = _mel(2048, 16000, 16)
    frequency = np.fft.rfftfreq(2048, 1 / 16000)
    centres = weight @ frequency
    mel = 2595 * np.log10(1 + centres / 700)
    assert np.diff(mel) == pytest.approx(np.full(15, np.diff(mel).mean()), rel=0.05)
    assert weight.sum(1) == pytest.approx(np.ones(16))


def test_black_silence_is_nothing_and_distances_are_means():
    quiet = {"video": np.zeros((1, 3, 16, 32, 32), np.uint8), "audio": np.zeros((1, 1, 12800))}
    white = {**quiet, "video": np.full((1, 3, 16, 32, 32), 255, np.uint8)}
    found = [Thumbnail()(each, RATES)["thumbnail"] for each in (quiet, white)]
    assert not found[0].any()
    assert np.linalg.norm(found[1] - found[0]) == pytest.approx(1)


def test_copies_are_nearer_than_other_clips():
    rng = np.random.default_rng(1)
    made = clips(rng)
    noise = rng.normal(0, 6, made["video"].shape)
    copies = {
        "video": np.clip(made["video"] + noise, 0, 255).astype(np.uint8),
        "audio": made["audio"] + 0.003 * rng.standard_normal(made["audio"].shape),
    }
    for needs in (("video", "audio"), ("video",), ("audio",)):
        extractor = Thumbnail(needs=needs)
        a, b = (extractor(x, RATES)["thumbnail"] for x in (made, copies))
        apart = np.linalg.norm(a[:, None] - b[None], axis=-1)
        assert (apart.argmin(1) == np.arange(4)).all()
        others = apart + 9 * np.eye(4)
        assert (np.diag(apart) < 0.5 * others.min(1)).all()
