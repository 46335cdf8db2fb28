"""How near sound is to what it should be, and what is wrong with it by itself.

Audio is float [B, C, L] in [-1, 1]; each number is of one clip, NaN where that is not finite.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from avdiffusion.metrics.impacts import as_numpy
from avdiffusion.metrics.metric import Array, Clips, Found, Rates

RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))  # FFT, hop, window: samples
FULL_SCALE = 0.9999  # below the greatest 16-bit sample, 32767 / 32768


def _waves(audio: Array) -> np.ndarray:
    audio = as_numpy(audio)
    if audio.ndim != 3:
        raise ValueError(f"audio {audio.shape} must be [B, C, L]")
    return audio.astype(np.float64)  # a copy


def stft_distance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Spectral convergence and log-magnitude distance of a from b, [N, L]: [N] each.

    | |B| - |A| |_F / | |B| |_F and the mean |ln |B| - ln |A||, each the mean over the three
    resolutions of Yamamoto et al. 2020 (1910.11480, eq. 4 to 6): FFTs of 1024, 2048 and 512
    samples, hops of 120, 240 and 50, Hann windows of 600, 1200 and 240, whatever the rate. Powers
    are at least 1e-7, and there are zeros beyond the ends.
    """
    convergence, logarithm = [], []
    for size, hop, length in RESOLUTIONS:
        window = torch.hann_window(length, dtype=a.dtype)

        def magnitude(x, size=size, hop=hop, length=length, window=window):
            spectrum = torch.stft(
                x, size, hop, length, window, pad_mode="constant", return_complex=True
            )
            return spectrum.abs().square().clamp(min=1e-7).sqrt()

        one, other = magnitude(a), magnitude(b)
        norms = [torch.linalg.matrix_norm(x) for x in (other - one, other)]
        convergence.append(norms[0] / norms[1])
        logarithm.append((other.log() - one.log()).abs().mean((-2, -1)))
    return torch.stack(convergence).mean(0), torch.stack(logarithm).mean(0)


@dataclass(kw_only=True)
class Spectral:
    """Multi-resolution STFT distance of sound from what it should be (`stft_distance`).

    `stft` is the sum of `stft_convergence` and `stft_log`, each the mean over channels.
    """

    name: ClassVar[str] = (
        "multi-resolution STFT, FFT 1024/2048/512, hop 120/240/50, Hann 600/1200/240 samples"
    )
    needs: ClassVar[tuple[str, ...]] = ("audio",)
    paired: ClassVar[bool] = True
    about: ClassVar[dict] = {
        "stft": ("multi-resolution STFT distance", "", "lower"),
        "stft_convergence": ("spectral convergence", "", "lower"),
        "stft_log": ("log-magnitude distance", "", "lower"),
    }
    fields: ClassVar[tuple[str, ...]] = tuple(about)

    def __call__(self, clips: Clips, rates: Rates, targets: Clips) -> Found:
        pair = [_waves(x["audio"]) for x in (clips, targets)]
        if pair[0].shape != pair[1].shape:
            shapes = " has targets ".join(str(x.shape) for x in pair)
            raise ValueError(f"audio {shapes}: both must be of the same shape")
        flat = (torch.from_numpy(x.reshape(-1, x.shape[-1])) for x in pair)
        shape = pair[0].shape[:2]
        convergence, logarithm = (x.numpy().reshape(shape).mean(1) for x in stft_distance(*flat))
        values = (convergence + logarithm, convergence, logarithm)
        return dict(zip(self.fields, values, strict=True))


def k_weighting(sample_rate: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """(b, a) of both filters of ITU-R BS.1770-4: a head's shelf and the revised low-frequency B.

    The analogue prototypes whose bilinear transforms at 48 kHz are the recommendation's tables.
    """
    k, q, gain = np.tan(np.pi * 1681.974450955533 / sample_rate), 0.7071752369554196, 3.999843853973
    high = 10 ** (gain / 20)
    middle = high**0.4996667741545416
    shelf = [high + middle * k / q + k * k, 2 * (k * k - high), high - middle * k / q + k * k]
    below = [1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k]
    filters = [(np.array(shelf) / below[0], np.array(below) / below[0])]
    k, q = np.tan(np.pi * 38.13547087602444 / sample_rate), 0.5003270373238773
    below = [1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k]
    return [*filters, (np.array([1.0, -2.0, 1.0]), np.array(below) / below[0])]


def loudness(audio: np.ndarray, sample_rate: float) -> np.ndarray:
    """Integrated loudness in LUFS (ITU-R BS.1770-4) of float64 [B, C, L]: [B].

    NaN for clips shorter than a block of 0.4 s and where every block is below the gate of -70.
    Five channels are L, R, C and both surrounds; all channels of another number count alike.
    """
    length = audio.shape[-1]
    block, hop = round(0.4 * sample_rate), round(0.1 * sample_rate)
    if length < block:
        return np.full(len(audio), np.nan)
    # Over 0.2 s the filters' response dies out to below 1e-12, so that nothing wraps around.
    size = length + round(0.2 * sample_rate)
    turn = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
    response = np.prod(
        [
            np.polyval(b[::-1], turn) / np.polyval(a[::-1], turn)
            for b, a in k_weighting(sample_rate)
        ],
        axis=0,
    )
    weighted = np.fft.irfft(np.fft.rfft(audio, size) * response, size)[..., :length]
    energy = np.pad(np.cumsum(weighted**2, axis=-1), ((0, 0), (0, 0), (1, 0)))
    start = np.arange(0, length - block + 1, hop)
    mean = (energy[..., start + block] - energy[..., start]) / block
    gains = [1, 1, 1, 1.41, 1.41] if audio.shape[1] == 5 else np.ones(audio.shape[1])
    power = np.einsum("bcn,c->bn", np.maximum(mean, 0), gains)

    def gated(threshold):
        inside = power > threshold
        count = inside.sum(-1, keepdims=True)
        total = np.where(inside, power, 0).sum(-1, keepdims=True)
        return np.where(count, total / np.maximum(count, 1), np.nan)

    absolute = 10 ** ((-70 + 0.691) / 10)
    relative = np.nan_to_num(gated(absolute)) / 10  # 10 LU below
    return -0.691 + 10 * np.log10(gated(np.maximum(absolute, relative))[:, 0])


@dataclass(kw_only=True)
class Sound:
    """What can be wrong with a sound by itself.

    `loudness` is integrated, in LUFS; `peak` the greatest |sample|; `clipped` the share of samples
    at full scale; `silence` the share of blocks of 20 ms whose mean power over channels is below
    -60 dB of full scale.
    """

    name: ClassVar[str] = (
        "loudness of ITU-R BS.1770-4, peak, share of samples at full scale, share of 20 ms blocks "
        "below -60 dB"
    )
    needs: ClassVar[tuple[str, ...]] = ("audio",)
    paired: ClassVar[bool] = False
    about: ClassVar[dict] = {
        "loudness": ("integrated loudness", "LUFS", ""),
        "peak": ("peak", "of full scale", ""),
        "clipped": ("samples at full scale", "share", "lower"),
        "silence": ("silence", "share", ""),
    }
    fields: ClassVar[tuple[str, ...]] = tuple(about)

    def __call__(self, clips: Clips, rates: Rates) -> Found:
        audio = _waves(clips["audio"])
        finite = np.isfinite(audio).all((1, 2))
        audio[~finite] = 0
        size = np.abs(audio)
        length = min(round(0.02 * rates["audio"]), audio.shape[-1])
        whole = audio.shape[-1] // length * length
        power = (audio[..., :whole] ** 2).reshape(*audio.shape[:2], -1, length).mean((1, 3))
        found = {
            "loudness": loudness(audio, rates["audio"]),
            "peak": size.max((1, 2)),
            "clipped": (size >= FULL_SCALE).mean((1, 2)),
            "silence": (power < 1e-6).mean(1),
        }
        return {name: np.where(finite, values, np.nan) for name, values in found.items()}
