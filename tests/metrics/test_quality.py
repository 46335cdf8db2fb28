"""Measures of picture and sound, against other implementations and constants."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from avdiffusion.metrics.mean import Mean
from avdiffusion.metrics.metric import Sets
from avdiffusion.metrics.quality import Flicker, Perceptual, Restoration
from avdiffusion.metrics.sound import Sound, Spectral, k_weighting, loudness, stft_distance

RATES = {"video": 10.0, "audio": 16000.0}


def pictures(*shape, seed=0):
    low = np.random.default_rng(seed).uniform(0, 255, (*shape[:3], 3, 3))
    soft = torch.nn.functional.interpolate(
        torch.from_numpy(low).flatten(0, 2)[:, None], shape[3:], mode="bilinear"
    )
    return soft.reshape(shape).round().to(torch.uint8).numpy()


def noisy(video, sigma, seed=1):
    noise = np.random.default_rng(seed).normal(0, sigma, video.shape)
    return np.clip(np.rint(video + noise), 0, 255).astype(np.uint8)


def restored(video, target):
    return Restoration()({"video": video}, RATES, {"video": target})


@given(
    b=st.integers(1, 3),
    t=st.integers(1, 4),
    h=st.integers(11, 24),
    w=st.integers(11, 24),
    sigma=st.floats(0.5, 60),
)
@settings(max_examples=25, deadline=None)
def test_restoration_is_that_of_torchmetrics_frame_by_frame(b, t, h, w, sigma):
    target = pictures(b, 3, t, h, w)
    video = noisy(target, sigma)
    found = restored(video, target)
    for i in range(b):
        ours, theirs = (torch.from_numpy(x[i] / 255.0).transpose(0, 1) for x in (video, target))
        ratio = peak_signal_noise_ratio(
            ours, theirs, data_range=1.0, dim=(1, 2, 3), reduction="none"
        )
        assert found["psnr"][i] == pytest.approx(ratio.clamp(max=100).mean().item(), abs=1e-5)
        pooled = peak_signal_noise_ratio(ours, theirs, data_range=1.0)
        assert found["psnr_pooled"][i] == pytest.approx(min(pooled.item(), 100), abs=1e-5)
        _, likeness = structural_similarity_index_measure(
            ours, theirs, sigma=1.5, data_range=1.0, return_full_image=True
        )
        inside = likeness[..., 5:-5, 5:-5]  # windows that need nothing beyond the picture
        assert found["ssim"][i] == pytest.approx(inside.mean().item(), abs=1e-7)


def test_known_errors_give_known_ratios():
    target = np.full((2, 3, 4, 16, 16), 100, np.uint8)
    video = target.copy()
    video[0] += 10
    video[1, :, 2:] += 51  # a fifth of the range in half of the frames
    found = restored(video, target)
    assert found["psnr"] == pytest.approx([-20 * np.log10(10 / 255), (100 + 13.9794) / 2], abs=1e-4)
    assert found["psnr_pooled"][1] == pytest.approx(-10 * np.log10(0.04 / 2), abs=1e-9)
    assert found["psnr_identical"].tolist() == [0, 0.5]
    assert found["flicker_error"] == pytest.approx([0, 51 / 3])
    same = restored(target, target)
    assert same["psnr"].tolist() == same["psnr_pooled"].tolist() == [100, 100]
    assert same["ssim"] == pytest.approx([1, 1], abs=1e-12)


def test_floats_in_minus_one_to_one_are_no_factor_of_two_off():
    target = pictures(2, 3, 3, 16, 20)
    video = noisy(target, 12)
    bytes_ = restored(video, target)
    floats = restored(*(torch.from_numpy(x / 127.5 - 1) for x in (video, target)))
    mixed = restored(video, torch.from_numpy(target / 127.5 - 1))
    for name in Restoration.fields:
        assert floats[name] == pytest.approx(bytes_[name], abs=1e-9)
        assert mixed[name] == pytest.approx(bytes_[name], abs=1e-9)


def test_a_clip_does_not_depend_on_its_companions():
    target = pictures(3, 3, 3, 16, 20)
    video = noisy(target, 30)
    together = restored(video, target)
    for i in range(3):
        for name, values in restored(video[i : i + 1], target[i : i + 1]).items():
            assert values[0] == together[name][i]


def test_wrong_pictures_are_refused():
    video = pictures(2, 3, 3, 16, 16)
    with pytest.raises(ValueError, match="same shape"):
        restored(video, video[:, :, :2])
    with pytest.raises(ValueError, match="at least 11 pixels"):
        restored(video[..., :8], video[..., :8])
    with pytest.raises(ValueError, match=r"\[B, 3, T, H, W\]"):
        Flicker()({"video": video[0]}, RATES)


def test_broken_pictures_have_no_number():
    target = pictures(2, 3, 3, 16, 16)
    video = target / 127.5 - 1
    video[1, 0, 0, 0, 0] = np.nan
    found = restored(video, target)
    assert np.isfinite(found["psnr"][0])
    assert np.isnan([found[name][1] for name in ("psnr", "psnr_pooled", "ssim")]).all()


def test_flicker_is_the_change_from_frame_to_frame():
    video = np.zeros((2, 3, 5, 8, 8), np.uint8)
    video[1, :, 1::2] = 40  # every other frame
    found = Flicker()({"video": video}, RATES)["flicker"]
    assert found == pytest.approx([0, 40])
    one = Flicker()({"video": video[:, :, :1]}, RATES)["flicker"]
    assert np.isnan(one).all()


def test_perceptual_distances_are_means_of_frames(monkeypatch):
    import sys
    import types

    class LPIPS:
        def __init__(self, net, device):
            self.name = f"LPIPS {net} on {device}"

        def __call__(self, a, b):
            assert a.dtype == b.dtype == torch.uint8
            return (a.float() - b.float()).abs().mean((1, 2, 3))

    module = types.ModuleType("lpips")
    module.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "avdiffusion.metrics.lpips", module)
    target = pictures(2, 3, 4, 16, 20)
    video = noisy(target, 9)
    extractor = Perceptual(net="vgg", device="cpu")
    assert extractor.name == "LPIPS vgg on cpu"
    expected = np.abs(video.astype(float) - target).mean((1, 2, 3, 4))
    found = extractor({"video": video}, RATES, {"video": target})["lpips"]
    assert found == pytest.approx(expected, rel=1e-5)
    broken = video / 127.5 - 1
    broken[0, 0, 0, 0, 0] = np.nan
    found = extractor({"video": broken}, RATES, {"video": target})["lpips"]
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(expected[1], rel=1e-5)


def tone(rate, seconds, hertz=997.0, level=1.0, channels=1):
    wave = level * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)
    return np.tile(wave, (1, channels, 1))


def test_weighting_is_the_recommendations_tables():
    """ITU-R BS.1770-4, tables 1 and 2: at 48 kHz."""
    (b, a), (low_b, low_a) = k_weighting(48000)
    assert b == pytest.approx([1.53512485958697, -2.69169618940638, 1.19839281085285], abs=1e-12)
    assert a == pytest.approx([1, -1.69065929318241, 0.73248077421585], abs=1e-12)
    assert low_b.tolist() == [1, -2, 1]
    assert low_a == pytest.approx([1, -1.99004745483398, 0.99007225036621], abs=1e-12)


@pytest.mark.parametrize("rate", [44100, 48000])
def test_loudness_of_the_recommendations_tone(rate):
    """997 Hz at full scale in one channel reads -3.01 LKFS; in two, 3.01 more."""
    assert loudness(tone(rate, 3), rate) == pytest.approx([-3.01], abs=0.02)
    assert loudness(tone(rate, 3, channels=2), rate) == pytest.approx([0], abs=0.02)
    assert loudness(tone(rate, 3, level=0.1), rate) == pytest.approx([-23.01], abs=0.02)
    surround = tone(rate, 3, channels=5)
    surround[:, :4] = 0
    assert loudness(surround, rate) == pytest.approx([-3.01 + 1.49], abs=0.03)


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_loudness_is_that_of_torchaudio(rate, channels):
    """Whose filters come from a cookbook: a few tenths of a dB apart at low rates."""
    functional = pytest.importorskip("torchaudio.functional")
    rng = np.random.default_rng(channels)
    wave = 0.05 * rng.standard_normal((1, channels, 3 * rate))
    wave[..., : 2 * rate] *= np.linspace(0, 1, 2 * rate) ** 3  # gated at its beginning
    theirs = functional.loudness(torch.from_numpy(wave[0]).float(), rate).item()
    assert loudness(wave, rate) == pytest.approx([theirs], abs=0.3 if rate == 16000 else 0.1)


def test_loudness_ignores_silence_but_counts_quiet_parts_above_the_gate():
    wave = tone(48000, 4)
    part = wave.copy()
    part[..., 2 * 48000 :] = 0
    assert loudness(part, 48000) == pytest.approx(loudness(wave, 48000), abs=0.6)
    part[..., 2 * 48000 :] = wave[..., 2 * 48000 :] * 0.5
    louder, quieter = loudness(wave, 48000)[0], loudness(part, 48000)[0]
    assert louder - 3 < quieter < louder - 1
    assert np.isnan(loudness(0 * wave, 48000)).all()
    assert np.isnan(loudness(wave[..., :19199], 48000)).all()
    assert np.isfinite(loudness(wave[..., :19200], 48000)).all()


@given(
    b=st.integers(1, 3),
    c=st.integers(1, 6),
    length=st.integers(1, 9000),
    rate=st.sampled_from([4000, 16000, 22050]),
)
@settings(max_examples=40, deadline=None)
def test_sound_of_any_shape(b, c, length, rate):
    audio = np.random.default_rng(length).uniform(-0.5, 0.5, (b, c, length)).astype(np.float32)
    found = Sound()({"audio": audio}, {"audio": rate})
    assert {name: x.shape for name, x in found.items()} == dict.fromkeys(Sound.fields, (b,))
    assert found["peak"] == pytest.approx(np.abs(audio).max((1, 2)))
    assert np.isnan(found["loudness"]).all() == (length < round(0.4 * rate))
    one = Sound()({"audio": torch.from_numpy(audio[-1:])}, {"audio": rate})
    for name in Sound.fields:
        assert one[name][0] == pytest.approx(found[name][-1], rel=1e-9, nan_ok=True)


def test_clipping_and_silence_are_shares():
    audio = np.zeros((2, 1, 16000), np.float32)
    audio[0, 0, :8000] = 0.1 * tone(16000, 0.5)[0, 0]
    audio[0, 0, :160] = np.tile([1.0, -32767 / 32768], 80)
    audio[1, 0] = 0.0009  # -61 dB
    found = Sound()({"audio": audio}, RATES)
    assert found["clipped"].tolist() == [0.01, 0]
    assert found["silence"].tolist() == [0.5, 1]
    assert found["peak"] == pytest.approx([1, 0.0009])
    broken = audio.copy()
    broken[0, 0, 5] = np.inf
    found = Sound()({"audio": broken}, RATES)
    assert all(np.isnan(found[name][0]) for name in Sound.fields)
    assert found["silence"][1] == 1


def test_spectral_distance_has_closed_forms():
    wave = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 16000)))
    convergence, logarithm = stft_distance(0.5 * wave, wave)
    assert convergence.numpy() == pytest.approx([0.5, 0.5], rel=1e-6)
    assert logarithm.numpy() == pytest.approx([np.log(2), np.log(2)], rel=1e-5)
    assert max(x.abs().max() for x in stft_distance(wave, wave)) == 0
    turned, _ = stft_distance(-wave, wave)  # magnitudes know no sign
    assert turned.max() == 0


def test_spectral_distance_against_explicit_frames():
    """One resolution at a time, by numpy's transform of frames cut by hand."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4000))
    convergence, logarithm = [], []
    for size, hop, length in ((512, 50, 240), (1024, 120, 600), (2048, 240, 1200)):
        window = np.zeros(size)
        start = (size - length) // 2
        window[start : start + length] = np.hanning(length + 1)[:-1]

        def magnitude(x, size=size, hop=hop, window=window):
            padded = np.pad(x, size // 2)
            cut = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
            return np.sqrt(np.maximum(np.abs(np.fft.rfft(cut * window)) ** 2, 1e-7))

        one, other = magnitude(a), magnitude(b)
        convergence.append(np.linalg.norm(other - one) / np.linalg.norm(other))
        logarithm.append(np.abs(np.log(other) - np.log(one)).mean())
    found = stft_distance(*(torch.from_numpy(x[None]) for x in (a, b)))
    assert [x.item() for x in found] == pytest.approx(
        [np.mean(convergence), np.mean(logarithm)], rel=1e-9
    )


@given(b=st.integers(1, 3), c=st.integers(1, 3), length=st.integers(1, 5000))
@settings(max_examples=25, deadline=None)
def test_spectral_distance_of_any_shape(b, c, length):
    rng = np.random.default_rng(length)
    audio, target = rng.uniform(-1, 1, (2, b, c, length)).astype(np.float32)
    found = Spectral()({"audio": audio}, RATES, {"audio": target})
    assert found["stft"].shape == (b,)
    assert np.isfinite(found["stft"]).all()
    assert found["stft"] == pytest.approx(found["stft_convergence"] + found["stft_log"])
    silent = Spectral()({"audio": audio}, RATES, {"audio": 0 * target})
    assert np.isfinite(silent["stft"]).all()
    with pytest.raises(ValueError, match="same shape"):
        Spectral()({"audio": audio}, RATES, {"audio": np.zeros((b, c, length + 1))})


class Numbers:
    name, needs, fields, paired = "numbers", ("audio",), ("x", "y"), False
    about = {"x": ("ex", "dB", "higher")}


def test_means_stand_beside_those_of_the_reference():
    rng = np.random.default_rng(0)
    samples = {"x": rng.normal(3, 1, 200), "y": np.full(200, np.nan)}
    samples["x"][:20] = np.nan
    reference = {"x": np.array([4.0, np.nan, 5.0]), "y": np.array([1.0, 1, 1])}
    x, y = Mean(Numbers(), prefix="a_").figures(Sets(samples=samples, reference=reference))
    assert (x.key, x.label, x.unit, x.better) == ("a_x", "ex", "dB", "higher")
    assert x.value == pytest.approx(np.nanmean(samples["x"]))
    assert (x.ceiling, x.n, x.n_reference) == (4.5, 180, 2)
    bootstrap = "interval: bootstrap, 200 resamples"
    assert x.notes == ["20 of 200 clips have no such number", bootstrap]
    assert y.notes == ["200 of 200 clips have no such number"]
    error = np.nanstd(samples["x"]) / np.sqrt(180)
    assert (x.high - x.low) / (2 * 1.96) == pytest.approx(error, rel=0.25)
    assert (y.key, y.label, y.n, y.low) == ("a_y", "y", 0, None)
    assert np.isnan(y.value)
    mixed = {name: values[::-1] for name, values in samples.items()}
    assert Mean(Numbers(), prefix="a_").figures(Sets(samples=mixed, reference=reference))[0] == x
    alone = Mean(Numbers()).figures(Sets(samples=samples, resamples=0))[0]
    assert (alone.ceiling, alone.n_reference, alone.low, alone.high) == (None, None, None, None)


def test_clips_of_one_file_are_drawn_together():
    rng = np.random.default_rng(0)
    files = np.repeat(np.arange(40), 5)
    samples = {"x": rng.normal(0, 1, 40)[files] + rng.normal(0, 0.1, 200), "y": np.ones(200)}
    samples["x"][7] = np.nan

    def figure(order, sources):
        mixed = {name: values[order] for name, values in samples.items()}
        return Mean(Numbers()).figures(Sets(samples=mixed, sources=sources))[0]

    alone, together = (figure(np.arange(200), sources) for sources in (None, {"samples": files}))
    assert together.value == pytest.approx(alone.value)
    assert together.high - together.low > 1.7 * (alone.high - alone.low)  # 5^0.5
    order = rng.permutation(200)
    again = figure(order, {"samples": 100 - 3 * files[order]})
    for name in ("value", "low", "high"):
        assert getattr(again, name) == pytest.approx(getattr(together, name), abs=1e-12)
    assert figure(order, {"samples": np.zeros(200)}).low is None


def test_what_has_targets_reads_no_reference():
    assert Mean(Restoration()).uses == ()
    assert Mean(Flicker()).uses == ("reference",)
