"""The area under the ROC curve, its interval, and what is done to sounds to have it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.data.toy import KINDS, Toy
from avdiffusion.metrics import report
from avdiffusion.metrics.power import (
    PAUSE,
    SPOILED,
    auroc,
    far,
    hastened,
    interval,
    later,
    pairings,
    paused,
    shifted,
    silenced,
    softened,
    swapped,
)

RATE = 1000
numbers = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, float("nan")]), max_size=12)


@settings(max_examples=200, deadline=None)
@given(numbers, numbers)
def test_auroc_counts_pairs(real, false):
    pairs = [(a, b) for a in real for b in false if np.isfinite(a) and np.isfinite(b)]
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
    found = auroc(np.array(real), np.array(false))
    assert found == pytest.approx(won / len(pairs) if pairs else float("nan"), nan_ok=True)


def test_auroc_of_gaussians_is_known():
    rng = np.random.default_rng(0)
    real, false = rng.normal(1, 1, 20000), rng.normal(0, 1, (10000, 2))
    assert auroc(real, false) == pytest.approx(0.7602, abs=0.005)  # Phi(1 / sqrt 2)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    rng, held = np.random.default_rng(0), 0
    for k in range(200):
        values = rng.exponential(1.0, 60)
        low, high = interval(lambda at, v=values: float(v[at].mean()), 60, 200, seed=k)
        held += low < 1 < high
    assert 175 <= held <= 198
    assert interval(lambda at: 0.0, 60, 0) == (None, None)
    assert interval(lambda at: 0.0, 1, 200) == (None, None)
    assert interval(lambda at: float("nan"), 9, 20) == (None, None)


def test_whole_files_are_drawn():
    rng, held = np.random.default_rng(0), 0
    files = np.repeat(np.arange(40), 4)
    for k in range(100):
        values = rng.normal(0, 1, 40)[files] + rng.normal(0, 0.3, 160)
        low, high = interval(
            lambda at, v=values: float(v[at].mean()), 160, 200, seed=k, source=files
        )
        held += low < 0 < high
    assert held >= 85
    drawn = []
    interval(lambda at: drawn.append(at) or 0.0, 6, 5, source=np.array([4, 9, 4, 7, 7, 7]))
    for at in drawn:
        counts = np.bincount(at, minlength=6)
        assert counts[0] == counts[2]
        assert counts[3] == counts[4] == counts[5]
        assert counts[[0, 1, 3]].sum() == 3
    assert interval(lambda at: 0.0, 9, 20, source=np.ones(9)) == (None, None)
    one, other = (
        interval(lambda at, v=values: float(v[at].mean()), 160, 50, source=source)
        for source in (None, np.arange(160))
    )
    assert one == other


@given(st.integers(1, 40), st.integers(0, 5))
def test_no_clip_keeps_its_sound_and_no_pair_comes_twice(num, seed):
    orders = pairings(num, np.random.default_rng(seed), 8)
    assert len(orders) == min(num - 1, 8)
    pairs = {(i, int(j)) for order in orders for i, j in enumerate(order)}
    assert len(pairs) == num * len(orders)
    assert all(i != j for i, j in pairs)
    for order in orders:
        assert sorted(order) == list(range(num))


def sounds(num=6, channels=2, length=1600, seed=1):
    rng = np.random.default_rng(seed)
    return rng.uniform(-0.9, 0.9, (num, channels, length)).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(SPOILED)), st.integers(2, 5), st.integers(700, 3000))
def test_spoiling_keeps_the_shape_and_follows_the_seed(how, num, length):
    audio = sounds(num, length=length)
    before = audio.copy()
    a, b = (SPOILED[how](audio, RATE, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(audio, before)
    assert a.shape == audio.shape
    assert a.dtype == np.float32
    assert np.abs(a).max() <= 1
    assert not np.array_equal(a, audio)


def test_shifts_are_cyclic_and_of_the_time_asked_for():
    audio, rng = np.zeros((2, 1, 1600), np.float32), np.random.default_rng(0)
    audio[..., 300] = 1
    assert (shifted(0.2)(audio, RATE, rng).argmax(-1) == 500).all()
    assert (shifted(1.5)(audio, RATE, rng).argmax(-1) == 200).all()
    assert later(audio, [100, -100]).argmax(-1).ravel().tolist() == [400, 200]
    moves = (far(np.repeat(audio, 200, 0), RATE, rng).argmax(-1) - 300) % 1600
    assert 400 <= moves.min() < 440
    assert 1160 < moves.max() <= 1200


def test_a_pause_delays_the_rest_and_silence_does_not():
    audio, length = sounds(), round(PAUSE * RATE)
    for before, after in zip(audio, paused(audio, RATE, np.random.default_rng(0)), strict=True):
        at = np.flatnonzero((after == 0).all(0))[0]
        assert (after[:, at : at + length] == 0).all()
        np.testing.assert_array_equal(after[:, :at], before[:, :at])
        np.testing.assert_array_equal(after[:, at + length :], before[:, at:-length])
    for before, after in zip(audio, silenced(audio, RATE, np.random.default_rng(0)), strict=True):
        gone = (after == 0).all(0)
        assert gone.sum() == length == np.ptp(np.flatnonzero(gone)) + 1
        np.testing.assert_array_equal(after[:, ~gone], before[:, ~gone])


def test_another_speed_is_another_pitch():
    at = np.arange(4000) / RATE
    tone = np.tile(np.float32(0.5 * np.sin(2 * np.pi * 100 * at)), (30, 1, 1))
    spoiled = hastened(tone, RATE, np.random.default_rng(0))
    speeds = np.abs(np.fft.rfft(spoiled[:, 0, :1500], 40000)).argmax(-1) / 40 / 100
    assert ((speeds > 0.49) & (speeds < 2.02)).all()
    assert not ((speeds > 0.82) & (speeds < 1.22)).any()
    assert (speeds < 1).any()
    assert (speeds > 1).any()
    assert np.abs(spoiled[:, 0, :1500]).max(-1) == pytest.approx(0.5, abs=0.03)


def test_others_sounds_and_softer_ones():
    audio = sounds()
    other = swapped(audio, RATE, np.random.default_rng(0))
    assert not (other == audio).all((1, 2)).any()
    assert sorted(other[:, 0, 0]) == sorted(audio[:, 0, 0])
    decibel = 20 * np.log10(softened(audio, RATE, np.random.default_rng(0)) / audio)
    assert decibel.max() <= -2.99
    assert decibel.min() >= -12.01
    assert np.ptp(decibel, axis=(1, 2)).max() < 1e-3


def test_a_score_that_knows_the_truth_finds_every_fault_but_the_control():
    toy = Toy(num=40, size=(32, 32))
    result = report.measured("bounce", toy, 40, 10, resamples=20)
    row = result["scores"]["avcorr"]
    assert result["clips"] == 40
    assert result["frames"] == 16
    assert min(row[how][0] for how in SPOILED if "shift" in how) > 0.97
    assert row["swapped"][0] > 0.85
    assert row["pause"][0] > 0.7
    assert row["speed"][0] > 0.85
    assert 0.3 < row["softer (control)"][0] < 0.65
    for how, (value, low, high) in row.items():
        assert low <= value <= high, how
    # An onset is at most 0.1 s from itself moved by that: F1 cannot know, and says so.
    assert result["scores"]["onset_f1"]["shift 0.1 s"][0] < 0.7
    assert result["scores"]["onset_f1"]["shift 0.2 s"][0] > 0.95


def test_the_command_writes_tables_and_numbers(tmp_path, capsys):
    data, page = tmp_path / "power.json", tmp_path / "power.md"
    report.main(["--toy", "--num", "3", "--json", str(data), "--markdown", str(page)])
    results = json.loads(data.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert [result["data"] for result in results] == [f"toy {kind}" for kind in KINDS]
    assert page.read_text() == capsys.readouterr().out
    lines = page.read_text().splitlines()
    rows = [line for line in lines if line.startswith("| avcorr |")]
    assert len(rows) == len(KINDS)
    assert {line.count("|") for line in lines if line.startswith("|")} == {len(SPOILED) + 2}
    steady = results[KINDS.index("pitch")]
    assert steady["none"]["onset_f1"] == 3
    assert steady["scores"]["onset_f1"]["swapped"][0] is None
    assert "without a number: onset_f1 3" in page.read_text()


def test_folders_that_are_none_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        report.main(["--folder", str(tmp_path / "nowhere")])
