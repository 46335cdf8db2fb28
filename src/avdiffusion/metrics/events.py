"""What is seen and heard to happen in a clip, found once: all that synchrony is judged by."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise

import numpy as np

from avdiffusion.metrics.impacts import REFRACTORY, Array, as_numpy, unit
from avdiffusion.metrics.sync import EDGE, checked, frame_flux, mono, motion_envelope, onsets

FLOWS = ("farneback", "difference")
FARNEBACK = (0.5, 3, 15, 3, 5, 1.2, 0)  # as AV-Align has it: pyramid, window, rounds, polynomial


@dataclass(kw_only=True)
class Events:
    """Motion, flow, onsets and loudness of clips over time: `alignment` compares them.

    With T frames: `motion` [B, T - 2 or T - 1] (see `sync.motion_envelope`), `flow` [B, T - 1] the
    mean speed between two frames in pixels a frame, `flux` (onset envelope) and `rms` (linear)
    [B, T, steps] in fine steps of a frame, `onsets` [B, K] in seconds, ascending, NaN after the
    last, `fps` and `seconds` [B]. `flow` is found by "farneback" (OpenCV) or "difference" (frame
    difference over gradient); None is the former where OpenCV is installed.
    """

    motion: str = "acceleration"
    flow: str | None = None

    needs = ("video", "audio")
    fields = ("motion", "flow", "flux", "rms", "onsets", "fps", "seconds")
    paired = False

    def __post_init__(self):
        if self.flow is None:
            self.flow = "farneback" if find_spec("cv2") else "difference"
        if self.flow not in FLOWS:
            raise ValueError(f"flow {self.flow!r} is unknown: choose {' or '.join(FLOWS)}")

    @property
    def name(self) -> str:
        how = f" {FARNEBACK[:-1]}" if self.flow == "farneback" else ""
        return f"events 1: motion {self.motion}, flow {self.flow}{how}, onsets of metrics.sync"

    def __call__(self, clips, rates) -> dict[str, np.ndarray]:
        video, audio = checked(clips["video"], clips["audio"])
        seen = self.seen(video, rates["video"])
        return seen | self.heard(audio, rates["video"], int(rates["audio"]), video.shape[2])

    def seen(self, video: Array, fps: float) -> dict[str, np.ndarray]:
        """The fields that the picture gives."""
        flow = farneback if self.flow == "farneback" else normal_flow
        return {
            "motion": motion_envelope(video, self.motion),
            "flow": np.array([flow(grey(clip)) for clip in as_numpy(video)]),
            "fps": np.full(len(video), float(fps)),
        }

    def heard(self, audio: Array, fps: float, sample_rate: int, frames: int) -> dict:
        """The fields that the sound gives, beside a picture of so many `frames`."""
        flux = frame_flux(audio, fps, sample_rate, frames)
        steps, seconds = flux.shape[2], frames / fps
        return {
            "flux": flux,
            "rms": _rms(mono(audio), sample_rate / (fps * steps), frames, steps),
            "onsets": _within(onsets(audio, sample_rate), seconds),
            "seconds": np.full(len(audio), seconds),
        }


@dataclass(kw_only=True)
class Onsets:
    """When sounds start in clips and in those that they should be, for onset F1.

    `onsets` and `target` [B, K] in seconds, ascending, NaN after the last; `seconds` [B].
    """

    name = "onsets 1: of metrics.sync, beside those of the target"
    needs = ("audio",)
    fields = ("onsets", "target", "seconds")
    paired = True

    def __call__(self, clips, rates, target) -> dict[str, np.ndarray]:
        sample_rate = int(rates["audio"])
        sounds = {"onsets": as_numpy(clips["audio"]), "target": as_numpy(target["audio"])}
        seconds = sounds["onsets"].shape[-1] / sample_rate
        return {
            key: _within(onsets(sound, sample_rate), seconds) for key, sound in sounds.items()
        } | {"seconds": np.full(len(sounds["onsets"]), seconds)}


def grey(clip: np.ndarray) -> np.ndarray:
    """Luma of [3, T, H, W] as uint8 [T, H, W]."""
    luma = np.tensordot(np.float32([0.299, 0.587, 0.114]), unit(clip), 1)
    return np.rint(255 * luma).astype(np.uint8)


def farneback(pictures: np.ndarray) -> np.ndarray:
    """Mean length of the dense flow between following pictures [T, H, W], in pixels: [T - 1].

    Farnebäck (2003) with the parameters of AV-Align (Yariv et al. 2023).
    """
    import cv2

    flows = (cv2.calcOpticalFlowFarneback(a, b, None, *FARNEBACK) for a, b in pairwise(pictures))
    return np.array([np.hypot(*np.moveaxis(flow, -1, 0)).mean(dtype=np.float64) for flow in flows])


def normal_flow(pictures: np.ndarray) -> np.ndarray:
    """Frame difference over gradient, in pixels a frame: [T - 1]; 0 where all is flat.

    The speed along the gradient, if brightness moves and does not change.
    """
    pictures = pictures.astype(np.float64)
    change = np.abs(np.diff(pictures, axis=0)).mean(axis=(1, 2))
    slope = np.hypot(*np.gradient((pictures[1:] + pictures[:-1]) / 2, axis=(1, 2)))
    return change / np.maximum(slope.mean(axis=(1, 2)), 1e-9) * (change > 0)


def _within(times: Sequence[np.ndarray], seconds: float) -> np.ndarray:
    """Ascending times but for those at the ends, each row filled up with NaN: [B, K]."""
    table = np.full((len(times), int(np.ceil(seconds / REFRACTORY)) + 1), np.nan)
    for row, found in zip(table, times, strict=True):
        found = found[(found >= EDGE) & (found <= seconds - EDGE)]
        row[: len(found)] = found
    return table


def _rms(wave, step, frames, steps):
    """Of fine steps that last `step` samples, which need not be whole: [B, frames, steps]."""
    edges = np.minimum(np.round(np.arange(frames * steps + 1) * step).astype(int), wave.shape[1])
    energy = np.pad(np.cumsum(wave**2, axis=1), ((0, 0), (1, 0)))
    power = np.diff(energy[:, edges], axis=1) / step
    return np.sqrt(np.maximum(power, 0)).reshape(len(wave), frames, steps)
