import csv
import pickle
import sys
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from fetched_weights import fetched
from hypothesis import given
from hypothesis import strategies as st

from avdiffusion.io import read_clip
from avdiffusion.metrics.tflite import BirdNET, YAMNet, resampled, windows

SHARED = Path(__file__).parents[3] / "shared"
FILE = SHARED / "weights" / "yamnet.tflite"
AUDIO = SHARED / "data" / "audio"
needs_yamnet = pytest.mark.skipif(not FILE.is_file(), reason="needs ../shared")


def sounds(label, count):
    """The first sounds of a label, one by one: clips, rates."""
    with (SHARED / "data" / "audio.csv").open() as file:
        names = [row["file"] for row in csv.DictReader(file) if row["label"] == label]
    assert len(names) >= count
    for name in names[:count]:
        clip = read_clip(AUDIO / name, modalities=("audio",))
        yield {"audio": clip["audio"][None]}, {"audio": clip["sample_rate"]}


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40))
def test_windows_cover_all_of_a_clip_and_nothing_else(total, length, hop):
    hop = min(hop, length)
    audio = torch.arange(1.0, total + 1)[None]
    found = windows(audio, length, hop)[0]
    assert found.shape[1] == length
    if total <= length:
        assert found.tolist() == [audio[0].tolist() + [0.0] * (length - total)]
        return
    assert (found[:, 0] >= 1).all()
    assert (found.diff(dim=1) == 1).all()
    starts = found[:, 0] - 1
    assert (starts[0], starts[-1]) == (0, total - length)
    assert starts.diff().max() <= hop
    assert len(starts) == 1 + ceil((total - length) / hop)


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000])
def test_a_tone_is_the_same_tone_at_another_rate(rate):
    def tone(rate):
        return np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)

    stereo = np.stack([tone(rate), 0.5 * tone(rate)])[None]
    found = resampled(stereo, rate, 16_000)
    assert found.shape == (1, 16_000)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[0, 200:-200], 0.75 * tone(16_000)[200:-200], atol=5e-3)
    assert torch.equal(resampled(stereo, rate, rate)[0], torch.as_tensor(stereo).mean(1)[0])


def test_names_tell_weights_and_windows_before_anything_is_loaded():
    assert "weights yamnet 687f226c" in YAMNet().name
    assert "0.975 s" in YAMNet().name
    assert "weights birdnet 55f3e405" in BirdNET().name
    assert "48000 Hz" in BirdNET().name


def test_without_the_runtime_the_command_is_named(tmp_path, monkeypatch):
    (tmp_path / "any.tflite").write_bytes(b"any")
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ValueError, match="pip install ai-edge-litert"):
        YAMNet(weights=str(tmp_path / "any.tflite"))(
            {"audio": np.zeros((1, 1, 16_000), np.float32)}, {"audio": 16_000}
        )


def test_without_torchaudio_the_rate_that_needs_none_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    sound = np.zeros((1, 1, 800), np.float32)
    with pytest.raises(ValueError, match=r"torchaudio.*or set form.sample_rate=16000"):
        resampled(sound, 8000, 16000)
    assert resampled(sound, 16000, 16000).shape == (1, 800)


@needs_yamnet
def test_yamnet_gives_one_embedding_a_clip_whatever_comes_along():
    pytest.importorskip("ai_edge_litert")
    extractor = pickle.loads(pickle.dumps(YAMNet(weights=str(FILE))))
    audio = np.random.default_rng(0).uniform(-0.3, 0.3, (3, 2, 35_280)).astype(np.float32)
    audio[1] *= np.linspace(0, 1, 35_280, dtype=np.float32)
    together = extractor({"audio": audio}, {"audio": 22_050})["embedding"]
    assert together.shape == (3, 1024)
    assert together.dtype == np.float32
    alone = [extractor({"audio": audio[k : k + 1]}, {"audio": 22_050}) for k in (2, 0, 1)]
    alone = np.concatenate([found["embedding"] for found in alone])
    assert np.array_equal(alone[[1, 2, 0]], together)
    assert np.abs(together[0] - together[1]).max() > 0.1
    again = YAMNet(weights=str(FILE), threads=2)({"audio": audio}, {"audio": 22_050})
    np.testing.assert_allclose(again["embedding"], together, atol=1e-5)
    with pytest.raises(ValueError, match="float audio"):
        extractor({"audio": (audio * 1000).astype(np.int16)}, {"audio": 22_050})


@needs_yamnet
def test_short_sounds_are_followed_by_zeros():
    pytest.importorskip("ai_edge_litert")
    extractor, rates = YAMNet(weights=str(FILE)), {"audio": 16_000}
    audio = np.random.default_rng(0).uniform(-0.3, 0.3, (1, 1, 8_000)).astype(np.float32)
    longer = np.pad(audio, ((0, 0), (0, 0), (0, 7_600)))
    short = extractor({"audio": audio}, rates)["embedding"]
    assert np.array_equal(short, extractor({"audio": longer}, rates)["embedding"])


@needs_yamnet
def test_yamnet_hears_what_is_there():
    """Of ten classes, each sound's own is heard most, in the mean over four sounds."""
    pytest.importorskip("ai_edge_litert")
    with (SHARED / "weights" / "yamnet_class_map.csv").open() as file:
        names = [row["display_name"] for row in csv.DictReader(file)]
    classes = {
        "Dog bark": "Dog",
        "Rain": "Rain",
        "Sea waves": "Ocean",
        "Baby cry": "Baby cry, infant cry",
        "Clock tick": "Tick",
        "Person sneeze": "Sneeze",
        "Helicopter": "Helicopter",
        "Chainsaw": "Chainsaw",
        "Rooster": "Crowing, cock-a-doodle-doo",
        "Fire crackling": "Crackle",
    }
    columns = [names.index(name) for name in classes.values()]
    extractor = YAMNet(weights=str(FILE))
    heard = []
    for label in classes:
        scores = [extractor.scores(*sound)[0] for sound in sounds(label, 4)]
        assert scores[0].shape == (521,)
        assert 0 <= np.min(scores) <= np.max(scores) <= 1
        heard.append(np.mean(scores, axis=0)[columns])
    assert np.argmax(heard, axis=1).tolist() == list(range(10))


@pytest.mark.slow
@pytest.mark.skipif(not AUDIO.is_dir(), reason="needs ../shared")
def test_birdnet_tells_birds_from_rain(monkeypatch, caplog):
    pytest.importorskip("ai_edge_litert")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fetched("birdnet")))
    extractor = BirdNET()
    birds, rain = (
        np.concatenate([extractor(*sound)["embedding"] for sound in sounds(label, 6)])
        for label in ("birds", "Rain")
    )
    assert caplog.text.count("non-commercial") == 1
    assert birds.shape == (6, 1024)

    def apart(a, b):
        return np.linalg.norm(a[:, None] - b, axis=2)

    within = max(apart(x, x).max(1).mean() for x in (birds, rain))
    assert apart(birds, rain).min(1).mean() > 0.9 * within
    centres = np.stack([birds[:3].mean(0), rain[:3].mean(0)])
    assert apart(birds[3:], centres).argmin(1).tolist() == [0, 0, 0]
    assert apart(rain[3:], centres).argmin(1).tolist() == [1, 1, 1]
    again = np.concatenate([extractor(*sound)["embedding"] for sound in sounds("birds", 2)])
    assert np.array_equal(again, birds[:2])
