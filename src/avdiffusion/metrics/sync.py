"""Do picture and sound happen together? Classical signal processing on arrays, no weights.

Video is [B, 3, T, H, W], uint8 or float in [-1, 1]; audio is float [B, C, L] in [-1, 1]. Frame k
shows the instant k / fps, both start together, times are seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from avdiffusion.metrics.impacts import REFRACTORY, Array, as_numpy, impacts, unit

LAG = 0.5  # seconds of offset searched on either side
GRID = 16  # cells a side at which motion is judged
EDGE = 0.03  # s; what sounds at the very ends does not start there, the clip is cut there


def motion_envelope(video: Array, motion: str = "acceleration") -> np.ndarray:
    """How much the picture's content changes course, or place: float64 [B, N].

    `acceleration`: mean |x[k+1] - 2 x[k] + x[k-1]|, N = T - 2, at frame times k = 1 to T - 2, of
    pictures seen through Gaussians of 7 % of each side. So softened, steady motion all but
    cancels, while bounces, jumps and flashes stand out. `difference`: mean |x[k+1] - x[k]|,
    N = T - 1, at frame times k + 1/2; it is low at a bounce.
    """
    if motion not in ("acceleration", "difference"):
        raise ValueError(f"motion {motion!r} is unknown: choose acceleration or difference")
    order = 2 if motion == "acceleration" else 1
    video = as_numpy(video)
    rows, columns = (_soft(n) for n in video.shape[-2:])
    envelope = []
    for clip in map(unit, video):
        if order == 2:
            clip = rows @ clip @ columns.T
        envelope.append(np.abs(np.diff(clip, n=order, axis=1)).mean(axis=(0, 2, 3)))
    return np.array(envelope, dtype=np.float64)


def _soft(length: int) -> np.ndarray:
    """Weights [GRID, length] of Gaussian averages around evenly spaced places."""
    centre, pixel = (np.arange(GRID) + 0.5) / GRID, (np.arange(length) + 0.5) / length
    weight = np.exp(-0.5 * ((centre[:, None] - pixel) / 0.07) ** 2)
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def onset_envelope(audio: Array, sample_rate: int, hop: float = 0.01) -> np.ndarray:
    """Log-spectral flux at times 0, hop, 2 hop, ...: float64 [B, ceil(L / (rate hop))].

    Band powers are compressed by log(1 + P / floor), the floor being eight times the band's median
    but at least -60 dB of full scale, so that a steady hiss or hum adds next to nothing.
    """
    wave = mono(audio)
    step = sample_rate * hop
    count = int(np.ceil(wave.shape[1] / step - 1e-9))
    length = max(round(0.016 * sample_rate), 8) * 2
    start = np.round(np.arange(-1, count) * step).astype(int)
    index = (start - start[0])[:, None] + np.arange(length)  # one frame before time 0 for the flux
    before, after = length // 2 - start[0], max(index[-1, -1] - wave.shape[1], 0) + 1
    window = np.hanning(length + 1)[:-1]
    edges = np.unique(np.round(np.geomspace(2, length // 2, 16)).astype(int))
    flux = np.empty((len(wave), count))
    for out, one in zip(flux, wave, strict=True):
        spectrum = np.fft.rfft(np.pad(one, (before, after))[index] * window)
        power = np.abs(spectrum * (2 / window.sum())) ** 2
        bands = np.add.reduceat(power, edges, axis=-1)  # [1 + N, bands]
        floor = np.maximum(8 * np.median(bands, axis=0), 1e-6)
        out[:] = np.maximum(np.diff(np.log1p(bands / floor), axis=0), 0).mean(axis=-1)
    return flux


def frame_flux(audio: Array, fps: float, sample_rate: int, frames: int) -> np.ndarray:
    """The onset envelope in fine steps of at most 10 ms, an even number a frame: [B, T, steps].

    Zero within EDGE of the ends of the picture.
    """
    steps = 2 * int(np.ceil(50 / fps))
    flux = onset_envelope(audio, sample_rate, 1 / (fps * steps))
    flux = np.pad(flux, ((0, 0), (0, max(frames * steps - flux.shape[1], 0))))
    flux, time = flux[:, : frames * steps], np.arange(frames * steps) / (fps * steps)
    flux[:, (time < EDGE) | (time > frames / fps - EDGE)] = 0
    return flux.reshape(len(flux), frames, steps)


def in_bins(fine: np.ndarray, count: int) -> np.ndarray:
    """Fine steps [B, T, steps] cut into `count` bins as long as a frame: [B, count, steps].

    A bin is centred where the change of a motion envelope of that length is: with T - 1 between
    two frames, with T - 2 at a frame.
    """
    num, frames, steps = fine.shape
    start = steps // 2 * (frames - count - 1)
    return fine.reshape(num, -1)[:, start : start + count * steps].reshape(num, count, steps)


def lag_curves(change: np.ndarray, flux: np.ndarray, fps: float) -> tuple[np.ndarray, np.ndarray]:
    """Correlations [B, lags] of motion [B, N] and onsets [B, T, steps], and the lags in seconds.

    The sound is moved earlier by the lag, zeros beyond the ends; NaN where a side never changes.
    """
    count = change.shape[1]
    a, b = standard(change), standard(in_bins(flux, count).max(-1))
    reach = min(round(LAG * fps), count - 1)
    lags = np.arange(-reach, reach + 1)
    late = np.pad(b, ((0, 0), (reach, reach)))
    curve = np.stack([(a * late[:, reach + k : reach + k + count]).mean(-1) for k in lags], -1)
    curve[~(a.any(-1) & b.any(-1))] = np.nan
    return curve, lags / fps


def mono(audio: Array) -> np.ndarray:
    """The mean of the channels, float64 [B, L]; silent where not finite."""
    return np.nan_to_num(as_numpy(audio).mean(axis=1, dtype=np.float64), posinf=0, neginf=0)


def checked(video: Array, audio: Array) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; an error where they are no clips, or too short to judge motion."""
    video, audio = as_numpy(video), as_numpy(audio)
    if video.ndim != 5 or audio.ndim != 3 or video.shape[1] != 3:
        raise ValueError(
            f"video {video.shape} and audio {audio.shape} must be [B, 3, T, H, W] and [B, C, L]"
        )
    if len(video) != len(audio):
        raise ValueError(f"{len(video)} videos and {len(audio)} sounds cannot be paired")
    if video.shape[2] < 4:
        raise ValueError(f"{video.shape[2]} frames are too few to judge motion: give at least 4")
    return video, audio


def av_corr(
    video: Array, audio: Array, fps: float, sample_rate: int, motion: str = "acceleration"
) -> dict[str, np.ndarray | float]:
    """AVCorr: Pearson correlation of motion and onsets, the latter's maxima in bins of a frame.

    `corr` [B] is each clip's at lag 0 (NaN where nothing moves or nothing sounds), `mismatched`
    the mean over all pairs of different clips; `curve` [B, lags] correlates with the sound moved
    earlier by `lags` (seconds, up to 0.5 either way; zeros beyond the ends) and `offset` is how
    late the sound is: the maximum of the mean curve, by the parabola through its neighbours.
    """
    video, audio = checked(video, audio)
    change = motion_envelope(video, motion)
    flux = frame_flux(audio, fps, sample_rate, video.shape[2])
    curve, lags = lag_curves(change, flux, fps)
    a, b = standard(change), standard(in_bins(flux, change.shape[1]).max(-1))
    valid, count, reach = np.isfinite(curve[:, 0]), change.shape[1], len(lags) // 2
    pairs = (a @ b.T / count)[np.ix_(valid, valid)]
    others = pairs[~np.eye(len(pairs), dtype=bool)]
    return {
        "corr": curve[:, reach],
        "mismatched": float(others.mean()) if others.size else float("nan"),
        "lags": lags,
        "curve": curve,
        "offset": (peak(curve[valid].mean(0)) - reach) / fps if valid.any() else float("nan"),
    }


def standard(x: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance along the last axis; all zero where there is no variation."""
    x = x - x.mean(-1, keepdims=True)
    scale = x.std(-1, keepdims=True)
    return np.where(scale > 1e-9, x / np.maximum(scale, 1e-9), 0)


def peak(curve: np.ndarray) -> float:
    """Fractional index of the maximum, by the parabola through it and its neighbours."""
    k = int(curve.argmax())
    if not 0 < k < len(curve) - 1:
        return float(k)
    left, top, right = curve[k - 1 : k + 2]
    return k + 0.5 * (left - right) / min(left - 2 * top + right, -1e-12)


def onsets(audio: Array, sample_rate: int, threshold: float = 0.27) -> list[np.ndarray]:
    """Times at which a sound starts, one float64 array per clip.

    A start is the highest point of the onset envelope within the refractory time, above
    `threshold` (white noise stays below 0.25), and followed within 40 ms by a peak of at least
    a tenth of the clip's greatest.
    """
    hop = 0.01
    wave = np.abs(mono(audio))
    reach, after = round(REFRACTORY / hop), round(0.04 * sample_rate)
    found = []
    for flux, level in zip(onset_envelope(audio, sample_rate, hop), wave, strict=True):
        around = np.lib.stride_tricks.sliding_window_view(np.pad(flux, reach), 2 * reach + 1)
        times = []
        for k in np.flatnonzero((flux >= around.max(-1)) & (flux > threshold)):
            at = round(k * hop * sample_rate)
            loud = level[max(at - after // 4, 0) : at + after].max() >= 0.1 * level.max()
            if loud and (not times or k * hop - times[-1] > REFRACTORY):
                times.append(k * hop)
        # The envelope of a sharp attack peaks 4 ms early.
        found.append(np.clip(np.array(times) + 0.004, 0, None))
    return found


def matches(a: np.ndarray, b: np.ndarray, tolerance: float) -> int:
    """Most pairs, each time used once, of ascending times at most `tolerance` apart."""
    i = j = count = 0
    while i < len(a) and j < len(b):
        if abs(a[i] - b[j]) <= tolerance + 1e-9:
            count, i, j = count + 1, i + 1, j + 1
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    return count


def toy_f1(video: Array, audio: Array, fps: float, sample_rate: int) -> dict[str, float]:
    """Agreement, within one frame, of the clicks heard and the impacts seen in the same clips.

    Times are matched one to one and counted over the whole batch: `precision` is the share of
    clicks with an impact, `recall` of impacts with a click. `f1_mismatched` is the same number
    with video i beside audio i + s, averaged over up to 63 shifts s: the level of chance.
    """
    video, audio = checked(video, audio)
    seen, heard = impacts(video, fps), onsets(audio, sample_rate)
    n_seen, n_heard = sum(map(len, seen)), sum(map(len, heard))

    def agreed(shift: int) -> int:
        other = heard[shift:] + heard[:shift]
        return sum(matches(a, b, 1 / fps) for a, b in zip(seen, other, strict=True))

    shifts = range(1, min(len(seen), 64))
    mismatched = np.mean([agreed(s) for s in shifts]) if shifts else np.nan
    return {
        "f1": 2 * agreed(0) / max(n_seen + n_heard, 1),
        "precision": agreed(0) / max(n_heard, 1),
        "recall": agreed(0) / max(n_seen, 1),
        "f1_mismatched": float(2 * mismatched / max(n_seen + n_heard, 1)),
        "impacts_per_clip": n_seen / len(seen),
        "clicks_per_clip": n_heard / len(seen),
    }


@dataclass(kw_only=True)
class Sync:
    """Synchrony of any clips; `avcorr_mismatched` is the level of chance in the same batch.

    `avcorr`, `av_offset_ms` (positive: the sound is late), `events_share` (clips in which a sound
    starts). NaN where a number has no meaning, such as the correlation of silence.
    """

    motion: str = "acceleration"

    def __call__(self, clips: Mapping[str, Array], rates: Mapping[str, float]) -> dict[str, float]:
        sample_rate = int(rates["audio"])
        found = av_corr(clips["video"], clips["audio"], rates["video"], sample_rate, self.motion)
        corr = found["corr"][np.isfinite(found["corr"])]
        heard = onsets(clips["audio"], sample_rate)
        return {
            "avcorr": float(corr.mean()) if corr.size else float("nan"),
            "avcorr_mismatched": found["mismatched"],
            "av_offset_ms": 1000 * float(found["offset"]),
            "events_share": float(np.mean([len(times) > 0 for times in heard])),
        }


@dataclass(kw_only=True)
class ToyF1:
    """What `toy_f1` says of the discs of `data.toy`, each name with `toy_` in front."""

    def __call__(self, clips: Mapping[str, Array], rates: Mapping[str, float]) -> dict[str, float]:
        scores = toy_f1(clips["video"], clips["audio"], rates["video"], int(rates["audio"]))
        return {f"toy_{name}": value for name, value in scores.items()}
