"""How well what is heard goes with what is seen: scores of clips whose `Events` were found.

A score measures [N, K] numbers of N clips by themselves (NaN where a clip has none) and makes one
number of those of any set of clips. Picture and sound are looked for in two places, so that sounds
can be moved, or exchanged between clips.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from avdiffusion.metrics.metric import Found
from avdiffusion.metrics.sync import in_bins, lag_curves, matches, peak, standard

TOLERANCE = 0.1  # s, within which a sound starts at the time it should (CondFoleyGen)
SIGMA = 0.05  # s, of beat alignment: three frames of AIST++'s 60 fps
LEAST = 0.1  # pixels a frame: a slower peak of the flow is none (AV-Align of 2025)


@dataclass(frozen=True, kw_only=True)
class Score:
    """`measure(seen, heard)` gives [N, K] of each clip, `whole(measured)` a set's number.

    `better` is "higher", or "" where a number is good that is near 0. `flow`: it looks at the
    optical flow, so that it depends on how that was found.
    """

    key: str
    label: str
    measure: Callable[[Found, Found], np.ndarray]
    whole: Callable[[np.ndarray], float]
    better: Literal["higher", ""] = "higher"
    unit: str = ""
    flow: bool = False

    def singly(self, measured: np.ndarray) -> np.ndarray:
        """The number of each clip alone: [N]."""
        return np.array([self.whole(row[None]) for row in measured])

    def agreement(self, seen: Found, heard: Found) -> np.ndarray:
        """[N], the higher the better picture and sound of a clip go together; NaN if unknown."""
        single = self.singly(self.measure(seen, heard))
        return single if self.better else -np.abs(single)


def moved(heard: Found, seconds: np.ndarray | float) -> Found:
    """What would be heard with the sounds `seconds` [N] later, their ends coming round."""
    late = np.broadcast_to(seconds, heard["seconds"].shape)[:, None]
    length = heard["seconds"][:, None]
    after = dict(heard, onsets=np.sort((heard["onsets"] + late) % length, axis=1))  # NaN stay last
    for name in {"flux", "rms"} & heard.keys():
        fine = heard[name].reshape(len(late), -1)
        steps = np.round(late / length * fine.shape[1]).astype(int)
        index = (np.arange(fine.shape[1]) - steps) % fine.shape[1]
        after[name] = np.take_along_axis(fine, index, axis=1).reshape(heard[name].shape)
    return after


def mean(measured: np.ndarray) -> float:
    """The mean of all numbers that there are; NaN without any."""
    known = measured[np.isfinite(measured)]
    return float(known.mean()) if known.size else float("nan")


def mean_curve(curves: np.ndarray) -> np.ndarray:
    """The mean [lags] of the clips' curves that there are; NaN without any."""
    known = curves[np.isfinite(curves).all(1)]
    return known.mean(0) if len(known) else np.full(curves.shape[1], np.nan)


def curves(seen: Found, heard: Found) -> np.ndarray:
    """Correlation of motion and onsets by lag, zero in the middle: [N, lags]."""
    return lag_curves(seen["motion"], heard["flux"], seen["fps"][0])[0]


def timed_curves(seen: Found, heard: Found) -> np.ndarray:
    """`curves`, with the milliseconds of a lag in one more column."""
    found = curves(seen, heard)
    return np.column_stack([found, 1000 / seen["fps"]])


def drawn(events: Found, k: int) -> dict[str, object]:
    """Of clip k what a report draws: `motion` and `onset` at each `time`, and the sound's `lag`.

    Times and lag are in seconds, all plain numbers; the lag is None where no sound goes with a
    motion.
    """
    one = {name: values[k : k + 1] for name, values in events.items()}
    fps, motion = float(one["fps"][0]), one["motion"][0]
    curve = curves(one, one)[0]
    lag = peak(curve) - len(curve) // 2 if np.isfinite(curve).all() else None
    first = (one["flux"].shape[1] - len(motion)) / 2
    return {
        "time": [float(first + n) / fps for n in range(len(motion))],
        "motion": [float(value) for value in motion],
        "onset": [float(bin.max()) for bin in in_bins(one["flux"], len(motion))[0]],
        "lag": None if lag is None else float(lag) / fps,
        "seconds": float(one["seconds"][0]),
    }


def at_zero(curves: np.ndarray) -> float:
    return mean(curves[:, curves.shape[1] // 2])


def offset(timed: np.ndarray) -> float:
    """Where the mean curve is highest, in ms; positive: the sound is late."""
    *curve, step = mean_curve(timed)
    return float(step * (peak(np.array(curve)) - len(curve) // 2))


def sharpness(seen: Found, heard: Found) -> np.ndarray:
    """How far a curve's highest point is above the mean of all but its neighbours: [N, 1]."""
    found = curves(seen, heard)
    away = np.abs(np.arange(found.shape[1]) - found.argmax(1)[:, None]) > 1
    rest = np.where(away, found, 0).sum(1) / np.maximum(away.sum(1), 1)
    return (found.max(1) - rest)[:, None]


def level(seen: Found, heard: Found) -> np.ndarray:
    """Correlation of the flow with the loudness (RMS) between the same two frames: [N, 1]."""
    speed = standard(seen["flow"])
    loud = standard(np.sqrt((in_bins(heard["rms"], speed.shape[1]) ** 2).mean(-1)))
    known = speed.any(-1) & loud.any(-1)
    return np.where(known, (speed * loud).mean(-1), np.nan)[:, None]


def peaks(flow: np.ndarray, fps: float, least: float = LEAST) -> list[np.ndarray]:
    """Times of the flow's strict maxima, the first value standing twice as in AV-Align."""
    flow = np.concatenate([flow[:, :1], flow], axis=1)
    top = (flow[:, 1:-1] > flow[:, :-2]) & (flow[:, 1:-1] > flow[:, 2:])
    top &= flow[:, 1:-1] >= least
    return [(np.flatnonzero(row) + 1) / fps for row in top]


def listed(times: np.ndarray) -> list[np.ndarray]:
    return [row[np.isfinite(row)] for row in times]


def av_align(seen: Found, heard: Found, legacy: bool = False) -> np.ndarray:
    """Intersection over union of flow peaks and onsets less than a frame apart: [N, 1].

    As of 2025 peaks of less than LEAST pixels are none and each time counts once; `legacy` (2023)
    has neither rule, so that it can exceed 1. NaN without any peak and onset.
    """
    fps = seen["fps"][0]
    within = 1 / fps - 1e-6
    ratios = []
    seen_at = peaks(seen["flow"], fps, 0 if legacy else LEAST)
    for a, v in zip(listed(heard["onsets"]), seen_at, strict=True):
        both = (np.abs(a[:, None] - v) < within).any(1).sum() if legacy else matches(a, v, within)
        total = len(a) + len(v) - both
        ratios.append(both / total if total else np.nan)
    return np.array(ratios)[:, None]


def beats(seen: Found, heard: Found) -> np.ndarray:
    """Mean nearness of beats seen (slowest flow) to onsets and of onsets to beats seen: [N, 2].

    exp(-d^2 / 2 SIGMA^2) of the distance to the nearest (Li et al. 2021, AIST++, the former side
    alone); 0 without any to be near to, NaN where there is nothing that could be.
    """
    fps = seen["fps"][0]
    sides = []
    slow = peaks(-seen["flow"], fps, -np.inf)
    for beat, onset in zip(slow, listed(heard["onsets"]), strict=True):
        near = np.exp(-0.5 * ((beat - 0.5 / fps)[:, None] - onset) ** 2 / SIGMA**2)
        sides.append([mean(near.max(axis, initial=0)) for axis in (1, 0)])
    return np.array(sides)


def both_sides(sides: np.ndarray) -> float:
    return mean(np.array([mean(side) for side in sides.T]))


def hits(seen: Found, heard: Found) -> np.ndarray:
    """Onsets that match one of the target's one to one, all, and all of the target's: [N, 3]."""
    pairs = zip(listed(heard["onsets"]), listed(seen["target"]), strict=True)
    return np.array([[matches(a, b, TOLERANCE), len(a), len(b)] for a, b in pairs], dtype=float)


def f1(counts: np.ndarray) -> float:
    both, heard, target = counts.sum(0)
    return float(2 * both / (heard + target)) if heard + target else float("nan")


ONSET_F1 = Score(
    key="onset_f1", label="Onset F1 within 0.1 s of the target's sound", measure=hits, whole=f1
)
SCORES = (
    Score(key="avcorr", label="AVCorr: motion against sound onsets", measure=curves, whole=at_zero),
    Score(
        key="av_offset_ms",
        label="Offset: how late the sound is",
        measure=timed_curves,
        whole=offset,
        better="",
        unit="ms",
    ),
    Score(
        key="av_sharpness",
        label="Sharpness of the lag curves of AVCorr",
        measure=sharpness,
        whole=mean,
    ),
    Score(key="av_level", label="Speed against loudness", measure=level, whole=mean, flow=True),
    Score(key="av_align", label="AV-Align", measure=av_align, whole=mean, flow=True),
    Score(
        key="av_align_legacy",
        label="AV-Align as of 2023",
        measure=partial(av_align, legacy=True),
        whole=mean,
        flow=True,
    ),
    Score(
        key="bas",
        label="Beat alignment, both sides",
        measure=beats,
        whole=both_sides,
        flow=True,
    ),
)
