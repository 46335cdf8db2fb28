"""Do vividly coloured things keep their shape and their course? For clips like `data.shapes`.

T frames, H, W height and width; (x, y) in pixels, times in frames.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from avdiffusion.metrics.impacts import as_numpy, hue_masks, track, unit
from avdiffusion.metrics.metric import Clips, Found, Rates

WINDOW = 8  # frames in which a coordinate turns back no more than once
TURNS = np.arange(1, 16 * WINDOW - 16) / 16  # moments at which it may
STILL = 0.25  # pixels of deviation below which nothing moves


def course_error(place: np.ndarray) -> float:
    """The share of the motion of [T, 2] that is no uniform motion, from 0 to 1; NaN without motion.

    Over windows of up to 8 frames every coordinate is fitted by a straight line that may turn back
    at one moment, at the same speed, as at a wall: root of the sum of squares that is left over
    that about the mean. Places that are NaN are left out.
    """
    left = total = 0.0
    count = len(place)
    starts = range(0, max(1, count - WINDOW // 2), WINDOW // 2)
    for window in (place[start : start + WINDOW] for start in starts):
        seen = np.flatnonzero(np.isfinite(window[:, 0]))
        if len(seen) < 5:
            continue
        for values in window[seen].T:
            own = ((values - values.mean()) ** 2).sum()
            if own > len(seen) * STILL**2:
                left, total = left + _bounced(seen, values), total + own
    return float(np.sqrt(left / total)) if total else float("nan")


def _bounced(time: np.ndarray, values: np.ndarray) -> float:
    """Squares left of the best x0 + v w(t), where w is t, or t that turns back at some moment."""
    way = np.vstack([time, time - 2 * np.maximum(time - TURNS[:, None], 0)])  # [moments, N]
    way = way - way.mean(1, keepdims=True)
    values = values - values.mean()
    power = np.maximum((way**2).sum(1), 1e-9)
    return float(np.maximum((values**2).sum() - (way @ values) ** 2 / power, 0).min())


def overlaps(mask: np.ndarray, centre: np.ndarray) -> tuple[float, float]:
    """How alike a thing is in all frames of its soft mask [T, H, W], moved onto one another.

    The intersection of each with their mean over the union of both, and the mean deviation of the
    area from its median, as a share of its mean. Frames in which `centre` is NaN are left out of
    the first, not of the second.
    """
    area = mask.sum((1, 2))
    change = np.abs(area - np.median(area)).mean() / max(area.mean(), 1e-9)
    seen = np.isfinite(centre[:, 0])
    off = centre[seen] - np.array(mask.shape[:0:-1]) / 2
    across, down = (np.fft.fftfreq(n) * off[:, k, None] for k, n in enumerate(mask.shape[:0:-1]))
    turn = np.exp(2j * np.pi * (across[:, None] + down[:, :, None]))
    moved = np.fft.ifft2(np.fft.fft2(mask[seen]) * turn).real.clip(0)
    mean = moved.mean(0)
    both, either = (np.sum(f(moved, mean), (1, 2)) for f in (np.minimum, np.maximum))
    return float((both / np.maximum(either, 1e-9)).mean()), float(change)


@dataclass(kw_only=True)
class Motion:
    """Shapes of a clip, told apart by hue and followed by their centres; means over them.

    `shapes` is how many there are, `area_change` and `shape_overlap` say whether they stay as they
    are (see `overlaps`), `speed` how fast they move, `course_error` whether at a constant velocity
    but for bounces (see `course_error`). Where one is in front of another, real shapes change too:
    compare with those. A clip without shapes has no overlap and is all error.
    """

    name: ClassVar[str] = "shapes 1: soft masks by hue, 8 frames with one turn of each coordinate"
    needs: ClassVar[tuple[str, ...]] = ("video",)
    paired: ClassVar[bool] = False
    about: ClassVar[dict] = {
        "shapes": ("shapes in a clip", "", ""),
        "area_change": ("change of a shape's area", "share", "lower"),
        "shape_overlap": ("overlap of a shape with itself", "share", "higher"),
        "speed": ("speed of shapes", "px/frame", ""),
        "course_error": ("motion that is not uniform", "share", "lower"),
    }
    fields: ClassVar[tuple[str, ...]] = tuple(about)

    def __call__(self, clips: Clips, rates: Rates) -> Found:
        rows = [self._of_clip(unit(clip)) for clip in as_numpy(clips["video"])]
        columns = np.array(rows, dtype=np.float64).reshape(-1, len(self.fields)).T
        return dict(zip(self.fields, columns, strict=True))

    def _of_clip(self, clip):
        found = []
        for mask in hue_masks(clip):
            centre, _ = track(mask)
            seen = np.isfinite(centre[:, 0])
            if seen.sum() < 2:
                continue
            overlap, change = overlaps(mask, centre)
            step = np.linalg.norm(np.diff(centre, axis=0), axis=1)
            found.append((change, overlap, _mean(step), course_error(centre)))
        if not found:
            return 0, np.nan, 0.0, np.nan, 1.0
        return len(found), *map(_mean, np.transpose(found))


def _mean(values):
    values = values[np.isfinite(values)]
    return values.mean() if len(values) else np.nan
