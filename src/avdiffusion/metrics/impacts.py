"""Where coloured discs bounce, found in the picture alone: the visible half of `toy` synchrony."""

import numpy as np
from torch import Tensor

Array = np.ndarray | Tensor
REFRACTORY = 0.08  # seconds within which two impacts are told of as one, as two clicks are


def as_numpy(x: Array) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def unit(clip: np.ndarray) -> np.ndarray:
    """Pixels of uint8 or float [-1, 1] pictures as float32 in [0, 1]; black where NaN."""
    if clip.dtype == np.uint8:
        return clip.astype(np.float32) / 255
    return np.clip((np.nan_to_num(clip.astype(np.float32), nan=-1.0) + 1) / 2, 0, 1)


def hue_masks(clip: np.ndarray) -> np.ndarray:
    """Soft masks [K, T, H, W] of what is vividly coloured in [3, T, H, W], one per hue."""
    chroma = clip.max(0) - clip.min(0)
    floor = max(0.4 * float(np.quantile(chroma, 0.99)), 0.15)
    weight = np.maximum(chroma - floor, 0)
    vivid = np.nonzero(weight)
    mass = weight[vivid]
    red, green, blue = (c[vivid] for c in clip)
    hue = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    bins = np.bincount((hue / 10).astype(int) % 36, weights=mass, minlength=36)
    smooth = sum(w * np.roll(bins, k) for k, w in enumerate((1, 2, 3, 2, 1), start=-2))
    peaks, least = [], max(0.2 * smooth.max(), 1e-4 * weight.size)
    while smooth.max() > least:
        peaks.append(int(smooth.argmax()))
        smooth[(peaks[-1] + np.arange(-3, 4)) % 36] = 0
    masks = np.zeros((len(peaks), *weight.shape), dtype=np.float32)
    if peaks:
        gap = np.abs((hue - 10 * np.array(peaks)[:, None] - 5 + 180) % 360 - 180)  # [K, pixels]
        nearest = np.where(gap.min(0) < 40, gap.argmin(0), -1)
        for k, mask in enumerate(masks):
            mask[vivid] = mass * (nearest == k)
    return masks


def track(mask: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre (x, y) of a soft mask [T, H, W] per frame, and its radius.

    The centre is the mean of the mask, taken again twice within 1.6 radii of itself, which drops
    specks of the same colour. It is NaN where most of the disc is hidden or the mask is no disc.
    """
    height, width = mask.shape[1:]
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    whole = mask.sum(axis=(1, 2))
    radius = float(np.sqrt(np.median(whole) / max(mask.max(), 1e-9) / np.pi)) + 0.5
    near = mask
    for _ in range(3):
        total = near.sum(axis=(1, 2)) + 1e-9
        centre = np.stack([near.sum(1) @ x, near.sum(2) @ y], -1) / total[:, None]
        off_x, off_y = x - centre[:, :1], y - centre[:, 1:]
        inside = off_x[:, None] ** 2 + off_y[:, :, None] ** 2 < (1.6 * radius + 0.5) ** 2
        near = mask * inside
    centre[(total < 0.7 * np.median(total)) | (total < 0.5 * whole) | (whole == 0)] = np.nan
    return centre, radius


def _reversals(place: np.ndarray, least: float) -> list[tuple[float, float]]:
    """(frame time, place) where a coordinate turns back by at least `least` on both sides.

    The time is where the lines through the up to four points before and after the turn cross.
    """
    turns, sign, far, low, high = [0], 0, 0, 0, 0
    for k in range(1, len(place)):
        if sign == 0:
            low = k if place[k] < place[low] else low
            high = k if place[k] > place[high] else high
            sign = int(place[k] - place[low] > least) - int(place[high] - place[k] > least)
            far = k
        elif sign * (place[k] - place[far]) >= 0:
            far = k
        elif sign * (place[far] - place[k]) > least:
            turns.append(far)
            sign, far = -sign, k
    turns.append(len(place) - 1)
    found = []
    for last, turn, following in zip(turns, turns[1:], turns[2:], strict=False):
        before = np.arange(max(last, turn - 4), max(turn, last + 2))
        after = np.arange(min(turn + 1, following - 1), min(following, turn + 4) + 1)
        (v1, b1), (v2, b2) = (np.polyfit(side, place[side], 1) for side in (before, after))
        when = (b2 - b1) / (v1 - v2) if v1 * v2 < 0 else turn
        found.append((float(np.clip(when, turn - 1, turn + 1)), float(place[turn])))
    return found


def impacts(video: Array, fps: float) -> list[np.ndarray]:
    """Times at which a vividly coloured disc bounces off a wall, one float64 array per clip.

    Discs are told apart by hue and followed by their centres; an impact is a reversal of x or y
    by at least 1.2 % of the shorter side, within a tenth of it of touching that wall.
    """
    found = []
    for clip in map(unit, as_numpy(video)):
        sides = clip.shape[:1:-1]
        times = []
        for mask in hue_masks(clip):
            centre, radius = track(mask)
            seen = np.flatnonzero(np.isfinite(centre[:, 0]))
            if len(seen) < 4:
                continue
            # Discs move straight: what shakes, as in poorly generated clips, must turn further.
            shake = float(np.median(np.abs(np.diff(centre[seen], n=2, axis=0))))
            least = max(0.012 * min(sides), 1.5 * shake)
            for axis, side in enumerate(sides):
                for when, place in _reversals(centre[seen, axis], least):
                    if min(place, side - place) < radius + 0.1 * min(sides):
                        times.append(np.interp(when, np.arange(len(seen)), seen) / fps)
        found.append(_apart(np.sort(np.array(times))))
    return found


def _apart(times: np.ndarray) -> np.ndarray:
    """Ascending times without those that follow a kept one within the refractory time."""
    kept = []
    for time in times:
        if not kept or time - kept[-1] > REFRACTORY:
            kept.append(time)
    return np.array(kept)
