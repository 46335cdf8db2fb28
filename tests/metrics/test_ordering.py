"""Distances put spoilt real clips in the order in which people would."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fetched_weights import fetched

from avdiffusion.evaluation.form import Form
from avdiffusion.evaluation.sets import Files
from avdiffusion.metrics.distance import Frechet, Kernel
from avdiffusion.metrics.metric import Sets

SHARED = Path(__file__).parents[3] / "shared"
POURING = SHARED / "data" / "pouring"
RATES = {"video": 10, "audio": 16000}
FORM = Form(fps=10, frames=16, size=(64, 64), sample_rate=16000, samples=25600, channels=1)

needs_clips = pytest.mark.skipif(not POURING.is_dir(), reason="needs ../shared")


def frozen(video):
    """The first picture, all the time."""
    return np.broadcast_to(video[:, :, :1], video.shape)


def pixelated(video):
    """Blocks of 8x8 pixels."""
    return video[..., ::8, ::8].repeat(8, -2).repeat(8, -1)


def noise(video):
    return np.random.default_rng(0).integers(0, 256, video.shape, dtype=np.uint8)


def low_pass(audio):
    """Nothing above 1 kHz."""
    spectrum = np.fft.rfft(audio)
    spectrum[..., np.fft.rfftfreq(audio.shape[-1], 1 / RATES["audio"]) > 1000] = 0
    return np.fft.irfft(spectrum, audio.shape[-1]).astype(np.float32)


def white(audio):
    """Noise of each clip's level."""
    level = audio.std(-1, keepdims=True)
    return (level * np.random.default_rng(0).standard_normal(audio.shape)).astype(np.float32)


def distances(extractor, modality, spoilers, num):
    """(Fréchet, kernel) of real clips as they are and spoilt, against others."""
    # ten frames take less time, and the sounds' embeddings have tails that want many clips
    form = replace(FORM.only(["video"]), frames=10) if modality == "video" else FORM
    others, ours = (
        Files(POURING / side, form, most=num).read(range(num))[modality]
        for side in ("test", "train")
    )
    reference = extractor({modality: others}, RATES)
    kind = {"video": "polynomial", "audio": "gaussian"}[modality]
    metrics = Frechet(extractor), Kernel(extractor, kernel=kind)
    found = []
    for spoil in (lambda x: x, *spoilers):
        samples = extractor({modality: spoil(ours)}, RATES)
        sets = Sets(samples=samples, reference=reference)
        found.append([metric.figures(sets)[0].value for metric in metrics])
    return np.array(found).T


@needs_clips
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_video_distances_tell_spoilt_clips_apart(monkeypatch):
    from avdiffusion.metrics.i3d import I3D

    monkeypatch.setenv("XDG_CACHE_HOME", str(fetched("i3d")))
    for values in distances(I3D(), "video", (frozen, pixelated, noise), 64):
        assert (np.diff(values) > 0).all(), values


@needs_clips
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sound_distances_tell_spoilt_clips_apart():
    from avdiffusion.metrics.tflite import YAMNet

    pytest.importorskip("ai_edge_litert")
    for values in distances(
        YAMNet(weights=str(SHARED / "weights" / "yamnet.tflite")), "audio", (low_pass, white), 256
    ):
        assert (np.diff(values) > 0).all(), values
