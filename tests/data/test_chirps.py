"""Songs of birds that are not: what is heard in them is what is said and was drawn."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.data.chirps import PACE, PITCH, SWING, Chirps

RATE = 16000


def loud(item):
    """The louder channel, float [L] in [-1, 1]."""
    audio = item["audio"].numpy() / 32768
    return audio[np.abs(audio).max(1).argmax()]


def frequency(wave, rate):
    """(time, Hz) between upward zero crossings, where there is a note."""
    above = wave > 0
    k = np.flatnonzero(~above[:-1] & above[1:])
    crossing = (k - wave[k] / (wave[k + 1] - wave[k])) / rate
    peak = np.array([np.abs(wave[a:b]).max() for a, b in pairwise(k)])
    there = peak > 0.5 * np.abs(wave).max()
    return ((crossing[1:] + crossing[:-1]) / 2)[there], (1 / np.diff(crossing))[there]


def test_a_song_is_a_function_of_seed_and_number():
    data = Chirps(num=8, samples=4000)
    again = Chirps(num=100, samples=4000)[3]
    assert torch.equal(data[3]["audio"], again["audio"])
    assert data[3]["text"] == again["text"]
    assert not torch.equal(data[3]["audio"], data[4]["audio"])
    assert not torch.equal(data[3]["audio"], Chirps(seed=1, samples=4000)[3]["audio"])
    with pytest.raises(IndexError, match="index 8 is outside 0 to 7"):
        data[8]
    with pytest.raises(
        ValueError, match=r"sample_rate=13000 is too low .* 6750 Hz: 13500 is enough"
    ):
        Chirps(sample_rate=13000)
    with pytest.raises(ValueError, match="channels is 1 or 2, not 3"):
        Chirps(channels=3)


@settings(max_examples=25, deadline=None)
@given(
    index=st.integers(0, 9999),
    samples=st.integers(2000, 60000),
    channels=st.sampled_from([1, 2]),
    loudness=st.sampled_from([-30.0, -20.0]),
)
def test_items(index, samples, channels, loudness):
    data = Chirps(sample_rate=RATE, samples=samples, channels=channels, loudness=loudness)
    item = data[index]
    assert item["index"] == index
    assert item["audio"].shape == (channels, samples)
    assert item["audio"].dtype == torch.int16
    level = 10 * np.log10(np.mean((item["audio"].numpy() / 32768) ** 2))
    assert level == pytest.approx(loudness, abs=0.05)
    assert item["audio"].abs().max() < 32767


@pytest.mark.parametrize("index", range(12))
def test_what_is_drawn_is_heard(index):
    """Pitch, swing and its rate by zero crossings; notes by the level of 10 ms."""
    data = Chirps(sample_rate=48000, samples=48000 * 6, seed=5)
    song, wave = data.song(index), loud(data[index])
    t, hertz = frequency(wave, 48000)
    turn = 2 * np.pi * song.rate * t + song.phase
    expected = song.pitch + song.swing / 2 * np.cos(turn)
    assert np.quantile(np.abs(hertz - expected), 0.9) < 20
    assert hertz.min() == pytest.approx(song.pitch - song.swing / 2, abs=40)
    assert hertz.max() == pytest.approx(song.pitch + song.swing / 2, abs=40)

    t = (16 * np.arange(len(wave) // 16 - 29) + 240) / 48000
    level = np.lib.stride_tricks.sliding_window_view(wave**2, 480)[::16].mean(1)
    note = (t - song.note) * song.pace % 1  # periods since the middle of one
    assert level[(note > 0.29) & (note < 0.71)].max() < 1e-4 * level.max()
    assert level[(note < 0.21) | (note > 0.79)].min() > 0.8 * level.max()


def test_captions_say_what_was_drawn_and_are_all_used():
    data = Chirps(num=1200, samples=10)
    texts = data.captions()
    assert len(texts) == len(set(texts)) == 12
    assert "a low slow trilling bird" in texts
    counts = dict.fromkeys(texts, 0)
    for index in range(len(data)):
        song = data.song(index)
        counts[song.text] += 1
        _, pitch, pace, manner, bird = song.text.split()
        assert bird == "bird"
        assert PITCH[pitch][0] <= song.pitch <= PITCH[pitch][1]
        assert PACE[pace][0] <= song.pace <= PACE[pace][1]
        assert SWING[manner][0][0] <= song.swing <= SWING[manner][0][1]
        assert SWING[manner][1][0] <= song.rate <= SWING[manner][1][1]
    assert min(counts.values()) > 60
    assert max(counts.values()) < 150


def test_words_of_a_kind_do_not_touch():
    for kind in (
        PITCH,
        PACE,
        {k: v[0] for k, v in SWING.items()},
        {k: v[1] for k, v in SWING.items()},
    ):
        ranges = sorted(kind.values())
        assert all(low < high for low, high in ranges)
        assert all(a[1] < b[0] for a, b in pairwise(ranges))


def test_the_bird_sits_between_left_and_right():
    data = Chirps(samples=48000, num=40)
    energy = np.array([np.sum(data[k]["audio"].numpy().astype(float) ** 2, 1) for k in range(40)])
    places = np.array([data.song(k).place for k in range(40)])
    found = np.arctan2(*np.sqrt(energy[:, ::-1].T)) / (np.pi / 2)
    np.testing.assert_allclose(found, places, atol=2e-3)
    assert np.ptp(places) > 0.8
