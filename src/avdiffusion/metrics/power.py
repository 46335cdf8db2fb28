"""Does a score tell real pairs of picture and sound from spoiled ones? If not, it says nothing.

Sounds are spoiled in arrays float32 [B, C, L]; every draw is of the generator that is given.
"""

from collections.abc import Callable, Sequence

import numpy as np

from avdiffusion.metrics.sources import groups

NEEDED = 0.7  # area under the ROC curve below which a score says nothing
SHARES = (0.25, 0.75)  # of the clip, by which sound is moved where no time is given
PAUSE = 0.5  # s
Spoil = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def auroc(real: np.ndarray, false: np.ndarray) -> float:
    """Probability that a real pair scores above a false one, ties counting half; NaN left out."""
    real, false = real[np.isfinite(real)], np.sort(false[np.isfinite(false)], axis=None)
    if not (real.size and false.size):
        return float("nan")
    below, upto = (np.searchsorted(false, real, side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * false.size))


def interval(
    statistic: Callable[[np.ndarray], float],
    num: int,
    resamples: int,
    seed: int = 0,
    *,
    source: np.ndarray | None = None,
) -> tuple[float | None, float | None]:
    """95 % interval of `statistic(indices)` by the bootstrap's percentiles over `num` clips.

    With `source` [num] whole files are drawn, as many as there are.
    """
    files = groups(np.arange(num) if source is None else source)
    if not resamples or len(files) < 2:
        return None, None
    draws = np.random.default_rng(seed).integers(len(files), size=(resamples, len(files)))
    values = np.array([statistic(np.concatenate([files[k] for k in draw])) for draw in draws])
    if not np.isfinite(values).any():
        return None, None
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return float(low), float(high)


def bootstrapped(low: float | None, resamples: int) -> list[str]:
    """The note beside an interval of `interval`, if there is one."""
    return [] if low is None else [f"interval: bootstrap, {resamples} resamples"]


def pairings(num: int, rng: np.random.Generator, most: int = 32) -> list[np.ndarray]:
    """Up to `most` ways to give each of `num` clips the sound of another, each pair once."""
    order = rng.permutation(num)
    place = np.argsort(order)
    shifts = rng.permutation(np.arange(1, num))[:most]
    return [order[(place + shift) % num] for shift in shifts]


def later(audio: np.ndarray, samples: Sequence[int]) -> np.ndarray:
    """Each sound later by so many samples, its end coming round."""
    return np.stack([np.roll(a, n, axis=-1) for a, n in zip(audio, samples, strict=True)])


def shifted(seconds: float) -> Spoil:
    """The sound later by a given time, its end coming round."""
    return lambda audio, rate, rng: later(audio, [round(seconds * rate)] * len(audio))


def far(audio: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """The sound later by a quarter to three quarters of the clip, its end coming round."""
    return later(audio, np.round(rng.uniform(*SHARES, len(audio)) * audio.shape[-1]).astype(int))


def swapped(audio: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """The sound of another clip."""
    return audio[pairings(len(audio), rng, 1)[0]]


def paused(audio: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Half a second of silence put in between an eighth and half of the clip: the rest is late."""
    length, size = round(PAUSE * rate), audio.shape[-1]
    spoiled = []
    for sound in audio:
        at = rng.integers(size // 8, size // 2)
        gap = np.zeros((len(sound), length), sound.dtype)
        spoiled.append(np.concatenate([sound[:, :at], gap, sound[:, at:]], axis=1)[:, :size])
    return np.stack(spoiled)


def silenced(audio: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Half a second of the sound silenced: the rest stays where it is."""
    length, spoiled = round(PAUSE * rate), audio.copy()
    for sound in spoiled:
        at = rng.integers(max(audio.shape[-1] - length, 1))
        sound[:, at : at + length] = 0
    return spoiled


def hastened(audio: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """The sound 1.25 to 2 times as fast or as slow, with its pitch; a fast one starts again."""
    size = audio.shape[-1]
    spoiled = []
    for sound in audio:
        speed = 2.0 ** (rng.uniform(np.log2(1.25), 1) * rng.choice([-1, 1]))
        length = round(size / speed)
        spectrum = np.fft.rfft(sound)[:, : length // 2 + 1]
        again = -(-size // length)
        played = np.fft.irfft(spectrum, length) * (length / size)
        spoiled.append(np.tile(played, again)[:, :size])
    return np.clip(np.stack(spoiled), -1, 1).astype(audio.dtype)


def softened(audio: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """The sound 3 to 12 dB softer, which is no fault: no score may find it."""
    gain = 10 ** (-rng.uniform(3, 12, len(audio)) / 20)
    return audio * gain[:, None, None].astype(audio.dtype)


SPOILED: dict[str, Spoil] = {
    "shift 25-75 %": far,
    "shift 0.1 s": shifted(0.1),
    "shift 0.2 s": shifted(0.2),
    "shift 0.5 s": shifted(0.5),
    "swapped": swapped,
    "pause": paused,
    "silence": silenced,
    "speed": hastened,
    "softer (control)": softened,
}
