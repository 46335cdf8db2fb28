"""A clip in small: what it looks and sounds like at a glance, found without weights."""

from dataclasses import dataclass

import numpy as np

from avdiffusion.metrics.impacts import as_numpy, unit
from avdiffusion.metrics.metric import Clips, Found, Rates

LOUDEST, RANGE = -10.0, 60.0  # dB of full scale a band may have, and how far below is nothing


@dataclass(kw_only=True)
class Thumbnail:
    """Frames and spectrogram averaged over a coarse grid, as one vector [B, D] in about [0, 1].

    Picture: means over `cells` x `cells` places of `moments` stretches of the clip, in colour.
    Sound: levels in dB of `bands` bands, evenly spaced on the mel scale, in as many stretches as
    the picture has cells a side. Either part is scaled so that its distance is a mean over its
    entries: both count alike, whatever their numbers. Near copies are near each other, also after
    an encoder, small shifts and noise.
    """

    cells: int = 8
    moments: int = 8
    bands: int = 16
    needs: tuple[str, ...] = ("video", "audio")

    fields = ("thumbnail",)
    paired = False

    @property
    def name(self) -> str:
        picture = f"{self.moments}x{self.cells}x{self.cells} colours"
        sound = f"{self.moments}x{self.bands} mel levels"
        parts = {"video": picture, "audio": sound}
        return "thumbnail of " + " and ".join(parts[name] for name in self.needs)

    def __call__(self, clips: Clips, rates: Rates) -> Found:
        parts = []
        if "video" in self.needs:
            parts.append(self._picture(as_numpy(clips["video"])))
        if "audio" in self.needs:
            parts.append(self._sound(as_numpy(clips["audio"]), rates["audio"]))
        scaled = [part.reshape(len(part), -1) for part in parts]
        scaled = [part / np.sqrt(part.shape[1]) for part in scaled]
        return {"thumbnail": np.concatenate(scaled, 1).astype(np.float32)}

    def _picture(self, video):
        small = unit(video)
        for axis, count in ((2, self.moments), (3, self.cells), (4, self.cells)):
            small = _means(small, axis, count)
        return small

    def _sound(self, audio, rate):
        wave = np.nan_to_num(audio.mean(1, dtype=np.float64))
        length = max(16, int(rate * 0.064))
        count = max(self.moments, 2 * wave.shape[1] // length)
        starts = np.linspace(0, max(wave.shape[1] - length, 0), count).astype(int)
        wave = np.pad(wave, ((0, 0), (0, max(0, length - wave.shape[1]))))
        pieces = wave[:, starts[:, None] + np.arange(length)] * np.hanning(length)
        power = np.abs(np.fft.rfft(pieces)) ** 2 / np.hanning(length).sum() ** 2
        power = _means(power @ _mel(length, rate, self.bands).T, 1, self.moments)
        level = 10 * np.log10(np.maximum(power, 1e-12))
        return np.clip((level - LOUDEST) / RANGE + 1, 0, 1)


def _means(x, axis, count):
    """Means over `count` even stretches of an axis; those of a shorter axis repeat."""
    length = x.shape[axis]
    edges = np.linspace(0, length, count + 1)
    low = np.minimum(np.floor(edges[:-1]).astype(int), length - 1)
    high = np.maximum(np.ceil(edges[1:]).astype(int), low + 1)
    total = np.cumsum(x, axis=axis, dtype=np.float64)
    total = np.concatenate([np.zeros_like(total.take([0], axis)), total], axis)
    shape = [-1 if k == axis else 1 for k in range(x.ndim)]
    return (total.take(high, axis) - total.take(low, axis)) / (high - low).reshape(shape)


def _mel(length, rate, bands):
    """Triangular weights [bands, frequencies] evenly spaced on the mel scale, of sum 1 or 0."""
    frequency = np.fft.rfftfreq(length, 1 / rate)
    top = 2595 * np.log10(1 + rate / 2 / 700)
    knots = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    rise = (frequency - knots[:-2, None]) / np.diff(knots)[:-1, None]
    fall = (knots[2:, None] - frequency) / np.diff(knots)[1:, None]
    weight = np.maximum(0, np.minimum(rise, fall))
    return weight / np.maximum(weight.sum(1, keepdims=True), 1e-9)
