"""Synchrony scores where the truth is known: toy clips, shifted sound, brute force."""

import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.data.toy import Toy
from avdiffusion.metrics.impacts import impacts
from avdiffusion.metrics.sync import (
    Sync,
    ToyF1,
    av_corr,
    matches,
    motion_envelope,
    onset_envelope,
    onsets,
    toy_f1,
)


def batch(num, *, side=32, sample_rate=4000, **options):
    toy = Toy(
        num=num, size=[side, side], sample_rate=sample_rate, samples=round(1.6 * sample_rate),
        **options,
    )  # fmt: skip
    items = list(toy)
    video, audio = (torch.stack([item[key] for item in items]) for key in ("video", "audio"))
    return video, audio, [toy.events(i) for i in range(num)]


def scored(video, audio, *metrics):
    clips, rates = {"video": video, "audio": audio}, {"video": 10, "audio": 4000}
    return {
        k: v for metric in metrics or (Sync(), ToyF1()) for k, v in metric(clips, rates).items()
    }


def later(audio, seconds, sample_rate):
    """The sound moved by whole samples, silence moving in."""
    shift = round(seconds * sample_rate)
    moved = torch.zeros_like(audio)
    if shift > 0:
        moved[..., shift:] = audio[..., :-shift]
    elif shift < 0:
        moved[..., :shift] = audio[..., -shift:]
    else:
        moved[:] = audio
    return moved


def agreement(found, truth, tolerance):
    both = sum(matches(a, b, tolerance) for a, b in zip(found, truth, strict=True))
    return 2 * both / (sum(map(len, found)) + sum(map(len, truth)))


@pytest.mark.parametrize("side", [16, 24, 32, 64])
def test_impacts_of_real_clips_are_the_true_ones(side):
    video, _, events = batch(60, side=side)
    found = impacts(video, 10)
    assert agreement(found, events, 0.1) > 0.98
    assert agreement(found, events, 0.03) > 0.9  # a third of a frame


@pytest.mark.parametrize(("discs", "least"), [(2, 0.95), (3, 0.9)])
def test_several_discs_are_told_apart(discs, least):
    video, _, events = batch(100, discs=discs)
    assert agreement(impacts(video, 10), events, 0.1) > least


@pytest.mark.parametrize("sample_rate", [4000, 8000, 16000])
def test_onsets_of_real_clips_are_the_true_ones(sample_rate):
    _, audio, events = batch(60, side=8, sample_rate=sample_rate, rate=1.5)
    rng = torch.Generator().manual_seed(0)
    for noise in (0, 0.003, 0.02):
        heard = onsets(audio + noise * torch.randn(audio.shape, generator=rng), sample_rate)
        assert agreement(heard, events, 0.015) > 0.95


@pytest.mark.parametrize(("side", "sample_rate"), [(16, 4000), (32, 8000), (48, 16000)])
def test_real_clips_score_high_and_mismatched_ones_at_chance(side, sample_rate):
    video, audio, _ = batch(300, side=side, sample_rate=sample_rate)
    score = toy_f1(video, audio, 10, sample_rate)
    assert min(score[k] for k in ("f1", "precision", "recall")) > 0.98
    assert 0.1 < score["f1_mismatched"] <= 0.2
    assert score["impacts_per_clip"] == pytest.approx(1.12, abs=0.08)


def test_poor_pictures_and_sounds_degrade_gracefully():
    video, audio, _ = batch(100)
    rng = torch.Generator().manual_seed(0)
    picture = video.float() / 127.5 - 1
    soft = torch.nn.functional.avg_pool3d(picture, (1, 3, 3), stride=1, padding=(0, 1, 1))
    faint = 0.5 * soft - 0.25 + 0.1 * torch.randn(soft.shape, generator=rng)
    noisy = 0.5 * audio + 0.02 * torch.randn(audio.shape, generator=rng)
    assert toy_f1(faint, noisy, 10, 4000)["f1"] > 0.9


def test_shaky_tracks_do_not_bounce_at_every_shake():
    video, audio, _ = batch(100)
    rng = np.random.default_rng(0)
    for clip in video:
        for t, (down, right) in enumerate(rng.integers(-1, 2, (16, 2))):
            clip[:, t] = clip[:, t].roll((int(down), int(right)), (1, 2))
    score = toy_f1(video, audio, 10, 4000)
    assert score["f1"] > 0.65
    assert score["impacts_per_clip"] < 1.4


def test_noise_stillness_and_silence_have_no_events():
    video, audio, _ = batch(30)
    rng = torch.Generator().manual_seed(0)
    still = video[:, :, :1].expand_as(video)
    snow = torch.randn(video.shape, generator=rng)
    hiss = 0.1 * torch.randn(audio.shape, generator=rng)
    assert not any(map(len, impacts(still, 10)))
    assert sum(map(len, impacts(snow, 10))) <= 1
    assert not any(map(len, onsets(hiss, 4000)))
    assert not any(map(len, onsets(torch.zeros_like(audio), 4000)))
    assert toy_f1(still, audio, 10, 4000)["f1"] == 0
    broken = scored(snow * torch.nan, audio * torch.nan)
    assert broken["toy_f1"] == broken["events_share"] == 0
    assert np.isnan(broken["avcorr"])


def test_scores_fall_as_the_sound_is_moved():
    video, audio, _ = batch(200, side=16)
    moved = [later(audio, seconds, 4000) for seconds in (0, 0.05, 0.1, 0.15, 0.2, 0.5)]
    scores = [scored(video, sound) for sound in moved]
    f1, corr = ([score[key] for score in scores] for key in ("toy_f1", "avcorr"))
    assert f1[0] >= f1[1] > f1[2] + 0.2 > f1[3] + 0.4  # the tolerance is 0.1 s
    assert corr[0] > corr[1] + 0.2 > corr[2] + 0.4
    assert max(f1[4:] + corr[3:]) < 0.1


@pytest.mark.parametrize("shift", [-0.3, -0.2, -0.05, 0.0, 0.07, 0.1, 0.25])
@pytest.mark.parametrize("side", [16, 48])
def test_the_offset_is_how_late_the_sound_is(side, shift):
    video, audio, _ = batch(40, side=side)
    found = av_corr(video, later(audio, shift, 4000), 10, 4000)
    assert found["offset"] == pytest.approx(shift, abs=0.05)


def test_matched_clips_stand_out_from_cyclic_shifts():
    video, audio, _ = batch(100)
    rng = np.random.default_rng(0)
    shifts = rng.integers(1600, 4800, len(audio))
    moved = torch.stack([a.roll(int(s), -1) for a, s in zip(audio, shifts, strict=True)])
    real, false = (av_corr(video, sound, 10, 4000)["corr"] for sound in (audio, moved))
    false = false[np.isfinite(false)]  # a click may have moved to the very end
    assert len(false) > 80
    assert (real[:, None] > false).mean() > 0.99  # the area under the ROC curve
    assert real.mean() > 0.85


def test_av_corr_is_pearson_and_mismatched_is_all_other_pairs():
    video, audio, _ = batch(5, side=16)
    found = av_corr(video, audio, 10, 4000, motion="difference")
    motion = motion_envelope(video, "difference")
    flux = onset_envelope(audio, 4000, 0.01).reshape(5, 16, 10).max(-1)[:, :15]
    table = np.array([[np.corrcoef(m, f)[0, 1] for f in flux] for m in motion])
    np.testing.assert_allclose(found["corr"], np.diag(table), atol=1e-9)
    assert found["mismatched"] == pytest.approx(table[~np.eye(5, dtype=bool)].mean())
    np.testing.assert_allclose(found["lags"], np.arange(-5, 6) / 10)
    np.testing.assert_array_equal(found["curve"][:, 5], found["corr"])


def test_motion_envelope_knows_known_pictures():
    video = torch.full((1, 3, 6, 8, 8), -1.0)
    video[:, :, 3:] = 1  # a cut to white between frames 2 and 3
    np.testing.assert_allclose(motion_envelope(video, "difference")[0], [0, 0, 1, 0, 0])
    np.testing.assert_allclose(motion_envelope(video)[0], [0, 1, 1, 0], atol=1e-6)
    bytes_ = ((video + 1) * 127.5).to(torch.uint8)
    np.testing.assert_allclose(motion_envelope(bytes_), motion_envelope(video), atol=1e-6)
    with pytest.raises(ValueError, match=r"speed.* choose acceleration"):
        motion_envelope(video, "speed")


def most_pairs(a, b, tolerance):
    small, large = sorted((a, b), key=len)
    return max(
        (
            sum(abs(x - y) <= tolerance + 1e-9 for x, y in zip(small, chosen, strict=True))
            for chosen in permutations(large, len(small))
        ),
        default=0,
    )


times = st.lists(st.floats(0, 1.6), max_size=5).map(sorted).map(np.array)


@settings(max_examples=300, deadline=None)
@given(times, times, st.sampled_from([0.05, 0.1, 0.4]))
def test_matching_is_the_best_assignment(a, b, tolerance):
    assert matches(a, b, tolerance) == most_pairs(a, b, tolerance)


def test_a_clip_is_judged_alone_in_either_number_format():
    video, audio, _ = batch(6)
    together, floats = impacts(video, 10), impacts(video.numpy() / 127.5 - 1, 10)
    heard = onsets(audio, 4000)
    for i in range(6):
        np.testing.assert_array_equal(impacts(video[i : i + 1], 10)[0], together[i])
        np.testing.assert_allclose(floats[i], together[i], atol=1e-3)
        np.testing.assert_array_equal(onsets(audio[i : i + 1], 4000)[0], heard[i])
        stereo = audio[i : i + 1].expand(1, 2, -1)
        np.testing.assert_array_equal(onsets(stereo, 4000)[0], heard[i])


def test_scores_have_stable_names():
    video, audio, _ = batch(2, side=16)
    general = {"avcorr", "avcorr_mismatched", "av_offset_ms", "events_share"}
    toy = {"f1", "precision", "recall", "f1_mismatched", "impacts_per_clip", "clicks_per_clip"}
    assert set(scored(video, audio, Sync())) == general
    scores = scored(video, audio)
    assert set(scores) == general | {f"toy_{name}" for name in toy}
    assert all(isinstance(value, float) for value in scores.values())
    alone = scored(video[:1], audio[:1])
    assert np.isnan(alone["avcorr_mismatched"])
    assert np.isnan(alone["toy_f1_mismatched"])


def test_the_motion_that_is_compared_can_be_chosen():
    video, audio, _ = batch(20, side=16)
    found = scored(video, audio, Sync(motion="difference"))["avcorr"]
    corr = av_corr(video, audio, 10, 4000, "difference")["corr"]
    assert found == pytest.approx(np.nanmean(corr))
    assert found < scored(video, audio, Sync())["avcorr"] - 0.2


def test_wrong_shapes_are_named():
    video, audio, _ = batch(2, side=16)
    with pytest.raises(ValueError, match="2 videos and 1 sounds"):
        scored(video, audio[:1])
    with pytest.raises(ValueError, match=r"\(2, 6400\)"):
        scored(video, audio[:, 0])
    with pytest.raises(ValueError, match="3 frames"):
        scored(video[:, :, :3], audio)


def test_importing_the_scores_loads_nothing_heavy():
    code = """
import sys
import avdiffusion.metrics.sync
heavy = {"torchmetrics", "cv2", "scipy", "av", "pytorch_lightning", "torchvision", "torchaudio"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
