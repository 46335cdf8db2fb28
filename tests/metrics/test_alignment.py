"""Synchrony scores against loops and exhaustive matching, and the figures they become."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.data.clips import Clips
from avdiffusion.data.toy import Toy
from avdiffusion.metrics.alignment import ONSET_F1, SCORES, av_align, beats, level, moved
from avdiffusion.metrics.events import Events, Onsets
from avdiffusion.metrics.metric import Sets
from avdiffusion.metrics.sync import av_corr
from avdiffusion.metrics.synchrony import KEYS, OnsetF1, Synchrony

SHARED = Path(__file__).parents[3] / "shared"
RATES = {"video": 10, "audio": 8000}
FAST = Events(flow="difference")


def toy(num, kind="bounce", **options):
    items = list(Toy(num=num, kind=kind, size=[24, 24], sample_rate=8000, samples=12800, **options))
    return {key: torch.stack([item[key] for item in items]).numpy() for key in ("video", "audio")}


def strokes(num, seed=0):
    """Hand-made impacts: clips of a soft ball that drifts, and jumps and sounds at each event."""
    rng = np.random.default_rng(seed)
    at, grid = np.arange(12800) / 8000, np.arange(24)
    video, audio = [], []
    for _ in range(num):
        times = np.sort(rng.uniform(0.2, 1.4, rng.integers(1, 4)))
        place = rng.uniform(6, 18, (len(times) + 1, 2))
        frame = np.arange(16) / 10
        where = place[np.searchsorted(times, frame)] + 0.8 * frame[:, None]
        far = (grid - where[:, :1])[:, None] ** 2 + (grid - where[:, 1:])[:, :, None] ** 2
        video.append(200 * np.exp(-far / 18) + rng.normal(20, 3, far.shape))
        wave = 0.01 * rng.standard_normal(len(at))
        for time in times:
            since = np.maximum(at - time, 0)
            wave += 0.5 * np.sin(2 * np.pi * 900 * since) * np.exp(-25 * since)
        audio.append(wave)
    pictures = np.clip(np.stack(video), 0, 255).astype(np.uint8)
    sounds = np.clip(np.stack(audio), -1, 1).astype(np.float32)
    return {"video": np.repeat(pictures[:, None], 3, 1), "audio": sounds[:, None]}


def figures(sets, metric=None):
    return {figure.key.removesuffix("_difference"): figure for figure in metric.figures(sets)}


def found(clips):
    return FAST(clips, RATES)


def made(flow, onsets, fps=10.0):
    """Fields of one clip by hand."""
    flow, times = np.array([flow], dtype=float), np.full((1, 24), np.nan)
    times[0, : len(onsets)] = onsets
    seconds = np.array([(flow.shape[1] + 1) / fps])
    return {"flow": flow, "onsets": times, "fps": np.array([fps]), "seconds": seconds}


def most_pairs(a, b, near):
    small, large = sorted((list(a), list(b)), key=len)
    return max(
        sum(near(x, y) for x, y in zip(small, chosen, strict=True))
        for chosen in permutations(large, len(small))
    )


speeds = st.lists(st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0, 2.0]), min_size=3, max_size=9)
onset_times = st.lists(st.floats(0, 1), max_size=4).map(sorted)


@settings(max_examples=300, deadline=None)
@given(speeds, onset_times, st.sampled_from([4.0, 10.0, 25.0]))
def test_av_align_is_intersection_over_union(flow, onsets, fps):
    series = [flow[0], *flow]
    tops = [
        (i / fps, series[i])
        for i in range(1, len(series) - 1)
        if series[i] > series[i - 1] and series[i] > series[i + 1]
    ]
    for legacy in (False, True):
        peaks = [time for time, speed in tops if legacy or speed >= 0.1]
        if legacy:
            both = sum(any(abs(a - v) < 1 / fps - 1e-6 for v in peaks) for a in onsets)
        else:
            both = most_pairs(onsets, peaks, lambda a, v: abs(a - v) < 1 / fps - 1e-6)
        union = len(onsets) + len(peaks) - both
        score = av_align(*[made(flow, onsets, fps)] * 2, legacy=legacy)
        assert score.shape == (1, 1)
        assert score[0, 0] == pytest.approx(both / union if union else np.nan, nan_ok=True)


def test_av_align_of_known_peaks():
    flow = [0, 0, 1, 0, 0, 0.05, 0, 0, 2, 0]  # peaks at 0.3, 0.6 (slow) and 0.9 s
    clip = made(flow, [0.25, 0.35, 0.95])
    assert av_align(clip, clip)[0, 0] == pytest.approx(2 / 3)
    assert av_align(clip, clip, legacy=True)[0, 0] == pytest.approx(3 / 3)
    crowded = made(flow[:5], [0.22, 0.26, 0.3, 0.34])
    assert av_align(crowded, crowded)[0, 0] == pytest.approx(1 / 4)
    assert av_align(crowded, crowded, legacy=True)[0, 0] == pytest.approx(4)  # as was released


@settings(max_examples=100, deadline=None)
@given(speeds, onset_times)
def test_beats_are_the_slowest_instants_and_looked_for_from_both_sides(flow, onsets):
    slow = [
        (k + 0.5) / 10
        for k in range(1, len(flow) - 1)
        if flow[k] < flow[k - 1] and flow[k] < flow[k + 1]
    ]

    def near(these, those):
        each = [
            max((np.exp(-((a - b) ** 2) / (2 * 0.05**2)) for b in those), default=0) for a in these
        ]
        return np.mean(each) if each else np.nan

    score = beats(*[made(flow, onsets)] * 2)
    np.testing.assert_allclose(score[0], [near(slow, onsets), near(onsets, slow)], atol=1e-12)


def test_loudness_is_correlated_between_frames():
    rng = np.random.default_rng(0)
    clip = made(rng.random(9), []) | {"rms": rng.random((1, 10, 6))}
    power = (clip["rms"].reshape(-1)[:54].reshape(9, 6) ** 2).mean(1)
    expected = np.corrcoef(clip["flow"][0], np.sqrt(power))[0, 1]
    assert level(clip, clip)[0, 0] == pytest.approx(expected)
    assert np.isnan(level(made([1] * 9, []), clip)[0, 0])


def test_moved_events_are_those_of_moved_sound():
    clips = toy(12)
    real = found(clips)
    for seconds in (0.1, 0.5, 1.2):
        sound = np.roll(clips["audio"], round(8000 * seconds), axis=-1)
        theirs, ours = FAST.heard(sound, 10, 8000, 16), moved(real, seconds)
        inner = np.s_[:, 2:-2]
        both = np.isfinite(ours["onsets"]) & np.isfinite(theirs["onsets"])
        assert both.sum() >= 10
        np.testing.assert_allclose(
            np.sort(ours["onsets"][both] % 1.6), np.sort(theirs["onsets"][both] % 1.6), atol=0.2
        )
        np.testing.assert_allclose(ours["rms"][inner], theirs["rms"][inner], atol=1e-6)
        back = moved(ours, 1.6 - seconds)
        for name in ("flux", "rms"):
            np.testing.assert_array_equal(back[name], real[name])
        np.testing.assert_allclose(back["onsets"], real["onsets"], atol=1e-9)
    late = moved(made([0] * 9, [0.2, 0.9]), np.array([0.3]))["onsets"][0]
    np.testing.assert_allclose(late[:3], [0.2, 0.5, np.nan], atol=1e-9)


@pytest.mark.parametrize("clips", [toy(200), strokes(200)], ids=["toy", "strokes"])
def test_avcorr_falls_as_the_sound_is_moved_or_exchanged(clips):
    real = found(clips)
    values = []
    for seconds in (0, 0.1, 0.2, 0.5):
        sets = Sets(samples=moved(real, seconds), reference=real, resamples=0)
        values.append(figures(sets, Synchrony(FAST, keys=["avcorr"]))["avcorr"])
    at = [figure.value for figure in values]
    assert at[0] > 0.5
    assert at[0] > at[1] + 0.2
    assert at[1] > max(at[2:])
    assert max(at[2:]) < 0
    assert values[0].chance < 0.1
    assert values[0].ceiling == pytest.approx(at[0])
    assert values[0].power > 0.95
    assert all(figure.power == values[0].power for figure in values)
    told = [values[0].details[f"power_{shift}s"] for shift in (0.1, 0.2, 0.5)]
    assert min(told) > 0.8
    assert values[0].notes == []


def test_figures_agree_with_the_scores_of_sync():
    clips = toy(30)
    late = {**clips, "audio": np.roll(clips["audio"], 800, axis=-1)}
    for motion in ("acceleration", "difference"):
        theirs = av_corr(late["video"], late["audio"], 10, 8000, motion)
        metric = Synchrony(Events(flow="difference", motion=motion))
        ours = figures(Sets(samples=metric.extractor(late, RATES)), metric)
        assert ours["avcorr"].value == pytest.approx(np.nanmean(theirs["corr"]))
        assert ours["av_offset_ms"].value == pytest.approx(1000 * theirs["offset"])
        if motion == "acceleration":  # differences are low at a bounce: their lag is another
            assert ours["av_offset_ms"].value == pytest.approx(100, abs=15)
        details = ours["avcorr"].details
        np.testing.assert_allclose(details["lags"], theirs["lags"])
        np.testing.assert_allclose(details["curve"], np.nanmean(theirs["curve"], 0))
        np.testing.assert_allclose(np.array(details["clips"], float), theirs["corr"])
        assert ours["avcorr"].chance == pytest.approx(theirs["mismatched"], abs=0.02)
        assert details["curve_low"][5] < details["curve_high"][5] < 0.3
        assert len(details["curve_low"]) == len(details["lags"])


def test_every_figure_has_what_is_needed_to_judge_it():
    real, samples = found(strokes(60)), found(strokes(40, seed=1))
    got = figures(Sets(samples=samples, reference=real), Synchrony(FAST))
    assert tuple(got) == KEYS
    for key, figure in got.items():
        assert figure.n_reference == 60
        assert figure.n <= 40 == len(figure.details["clips"]), key
        assert figure.details["power_low"] <= figure.power <= figure.details["power_high"]
        assert figure.low <= figure.value <= figure.high
        assert figure.extractor == FAST.name
        assert (figure.power >= 0.7) == (not any("says nothing" in note for note in figure.notes))
        assert "interval: bootstrap, 200 resamples" in figure.notes
        assert ("difference" in figure.label) == (key in ("av_level", "bas") or "align" in key)
        assert ("librosa" in figure.label) == (key == "bas" or "align" in key)
    assert got["av_offset_ms"].chance is None
    lift = got["avcorr"].details["lift"]
    assert 0.7 < lift < 1.3
    assert got["avcorr"].details["share_with_onsets"] == 1


def test_noise_says_nothing_and_so_does_no_reference():
    rng = np.random.default_rng(0)
    noise = {
        "video": rng.integers(0, 256, (40, 3, 16, 12, 12)).astype(np.uint8),
        "audio": rng.uniform(-0.5, 0.5, (40, 1, 12800)).astype(np.float32),
    }
    heard = found(noise)
    for key, figure in figures(Sets(samples=heard, reference=heard), Synchrony(FAST)).items():
        if np.isfinite(figure.power):
            assert figure.power < 0.7, key
            assert "says nothing on this data" in figure.notes[-1]
        else:
            assert "nothing is known of its power" in figure.notes[-1]
    for figure in figures(Sets(samples=heard), Synchrony(FAST)).values():
        assert figure.power is figure.ceiling is None
        assert "no reference" in figure.notes[-1]


def test_clips_without_events_are_left_out_and_counted():
    clips = toy(8)
    clips["audio"][5:] = 0
    clips["video"][5:] = clips["video"][5:, :, :1]
    got = figures(Sets(samples=found(clips)), Synchrony(FAST))
    for key, figure in got.items():
        assert figure.n == 5, key
        assert figure.notes[0] == "3 of 8 clips have nothing to compare and are left out"
        assert figure.details["clips"][5:] == [None] * 3
        assert figure.details["share_with_both"] == 5 / 8
    assert got["avcorr"].value == pytest.approx(
        figures(Sets(samples=found({k: v[:5] for k, v in clips.items()})), Synchrony(FAST))[
            "avcorr"
        ].value
    )
    silent = figures(Sets(samples=found({k: v[5:] for k, v in clips.items()})), Synchrony(FAST))
    assert all(np.isnan(figure.value) and figure.n == 0 for figure in silent.values())
    alone = figures(Sets(samples=found({k: v[:1] for k, v in clips.items()})), Synchrony(FAST))
    assert alone["avcorr"].chance is alone["avcorr"].low is None


def test_the_order_of_clips_changes_nothing():
    clips, real = strokes(30), found(strokes(30, seed=2))
    order = np.random.default_rng(1).permutation(30)
    first = figures(Sets(samples=found(clips), reference=real), Synchrony(FAST))
    again = {name: values[order] for name, values in found(clips).items()}
    back = {name: values[::-1] for name, values in real.items()}
    second = figures(Sets(samples=again, reference=back), Synchrony(FAST))
    for key, a in first.items():
        b = second[key]
        for name in ("value", "low", "high", "chance", "ceiling", "power"):
            assert getattr(b, name) == pytest.approx(getattr(a, name), abs=1e-9), (key, name)
        expected = [a.details["clips"][i] for i in order]
        assert b.details["clips"] == pytest.approx(expected, nan_ok=True), key


def test_as_validation_metrics_and_over_batches():
    clips, real = strokes(12), strokes(12, seed=3)
    metric = Synchrony(FAST)
    scores = metric(clips, RATES, real)
    assert set(scores) == {figure.key for figure in metric.figures(Sets(samples=found(clips)))}
    for part in (slice(0, 5), slice(5, 12)):
        metric.update({k: v[part] for k, v in clips.items()}, RATES)
        metric.update({k: v[part] for k, v in real.items()}, RATES, real=True)
    assert metric.compute() == pytest.approx(scores, nan_ok=True)


def test_still_pictures_have_no_power_that_is_known():
    clips, moving = toy(8), found(toy(8))
    still = found({**clips, "video": np.repeat(clips["video"][:, :, :1], 16, axis=2)})
    (figure,) = Synchrony(FAST, keys=["avcorr"]).figures(Sets(samples=moving, reference=still))
    assert np.isnan(figure.power)
    assert figure.notes[-1] == "no real clip has such a number: nothing is known of its power"
    assert np.isfinite(figure.value)


def test_clips_of_one_file_are_drawn_together():
    """Four copies of a clip tell no more than it does, whatever their order and file's number."""
    samples, real = found(strokes(20)), found(strokes(15, seed=1))
    copies = {name: np.repeat(values, 4, axis=0) for name, values in samples.items()}
    theirs = {name: np.repeat(values, 2, axis=0) for name, values in real.items()}
    sources = {"samples": np.repeat(np.arange(20), 4), "reference": np.repeat(np.arange(15), 2)}
    metric = Synchrony(FAST, keys=["avcorr", "av_align"])
    once = figures(Sets(samples=samples, reference=real), metric)
    clips = figures(Sets(samples=copies, reference=theirs), metric)
    files = figures(Sets(samples=copies, reference=theirs, sources=sources), metric)
    rng = np.random.default_rng(0)
    i, j = rng.permutation(80), rng.permutation(30)
    mixed = {"samples": rng.permutation(20)[sources["samples"][i]]}
    mixed["reference"] = -sources["reference"][j]
    places = [{k: v[at] for k, v in x.items()} for x, at in ((copies, i), (theirs, j))]
    again = figures(Sets(samples=places[0], reference=places[1], sources=mixed), metric)
    for key, figure in files.items():
        width = once[key].high - once[key].low
        assert figure.high - figure.low == pytest.approx(width, rel=1e-9)
        assert clips[key].high - clips[key].low < 0.7 * width
        for name in ("value", "low", "high", "chance", "power"):
            assert getattr(again[key], name) == pytest.approx(getattr(figure, name), abs=1e-12)
        for name in ("power_low", "power_high"):
            assert again[key].details[name] == pytest.approx(figure.details[name], abs=1e-12)


def test_scores_can_be_chosen():
    chosen = Synchrony(FAST, keys=["avcorr", "bas"])
    assert [figure.key for figure in chosen.figures(Sets(samples=found(strokes(3))))] == [
        "avcorr",
        "bas_difference",
    ]
    with pytest.raises(ValueError, match=r"'corr'.* choose of avcorr, av_offset_ms"):
        Synchrony(FAST, keys=["corr"])
    assert len({score.key for score in (*SCORES, ONSET_F1)}) == 8


def tracks(*onsets, seconds=1.6):
    table = np.full((len(onsets), 21), np.nan)
    for row, times in zip(table, onsets, strict=True):
        row[: len(times)] = times
    return table


def test_onset_f1_against_a_target():
    samples = {
        "onsets": tracks([0.2, 0.55], [0.4, 0.9, 1.2], [], []),
        "target": tracks([0.25, 0.7], [0.35, 0.95], [0.5], []),
        "seconds": np.full(4, 1.6),
    }
    (figure,) = OnsetF1().figures(Sets(samples=samples))
    assert figure.value == pytest.approx(2 * 3 / (5 + 5))
    assert figure.details["clips"] == pytest.approx([0.5, 0.8, 0, None])
    assert figure.details["precision"] == figure.details["recall"] == pytest.approx(3 / 5)
    assert figure.details["same_count"] == 0.5
    assert figure.n == 3
    assert figure.ceiling is figure.n_reference is None
    assert figure.chance < figure.value


def test_onset_f1_of_sounds():
    target, other = strokes(30)["audio"], strokes(30, seed=1)["audio"]
    for made_of, least, most in ((target, 1, 1), (other, 0.1, 0.4)):
        samples = Onsets()({"audio": made_of}, RATES, {"audio": target})
        (figure,) = OnsetF1().figures(Sets(samples=samples))
        assert least <= figure.value <= most
        assert 0.1 < figure.chance < 0.4
        assert figure.power > 0.95
        assert figure.details["power_0.1s"] < 0.8 < figure.details["power_0.2s"]


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "pouring").is_dir(), reason="no ../shared")
def test_pouring_water_has_no_synchrony_to_measure():
    clips = Clips(SHARED / "data" / "pouring" / "test", split="all")
    items = [clips[i] for i in range(0, len(clips), 2)]
    video, audio = (np.stack([item[key] for item in items]) for key in ("video", "audio"))
    rates = {"video": 10, "audio": 16000}
    real = Events()({"video": video, "audio": audio.astype(np.float32) / 32768}, rates)
    got = figures(Sets(samples=real, reference=real), Synchrony())
    assert got["avcorr"].power == pytest.approx(0.52, abs=0.06)
    for figure in got.values():
        assert figure.power < 0.6
        assert "says nothing on this data" in figure.notes[-1]
