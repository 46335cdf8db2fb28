"""A clip of any length that is filled in window by window, around what is known of it."""

from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from avdiffusion.media import Media


class Part(Protocol):
    """What is known of a clip, by modality: values [C, T, ...] and whether each step is [T]."""

    values: dict[str, Tensor]
    mask: dict[str, Tensor]


class Timeline:
    """The values of a clip so far, which of them are there, and which window is to be next.

    `window`: steps of each modality that are made at once. Time is counted in steps of the slowest
    one; `overlap` of them, if there are so many, come before the first that is missing.
    """

    def __init__(self, part: Part, *, window: dict[str, int], overlap: int):
        self.values = {name: value.clone() for name, value in part.values.items()}
        self.mask = {name: mask.clone() for name, mask in part.mask.items()}
        self.window, self.overlap = window, overlap
        self.lengths = {name: len(mask) for name, mask in self.mask.items()}
        self.slow = min(window, key=window.get)
        if not 0 <= overlap < window[self.slow]:
            raise ValueError(
                f"an overlap of {overlap} steps is not within 0 and the window's "
                f"{window[self.slow]} - 1"
            )
        short = [name for name in window if self.lengths[name] < window[name]]
        if short:
            raise ValueError(f"{short[0]} lasts {self.lengths[short[0]]} steps, a window {window}")
        self.last = self.lengths[self.slow] - window[self.slow]  # where the last window starts
        for name, size in window.items():
            if self.lengths[name] - size > self.last * size:
                raise ValueError(f"windows of {window} steps leave some of {self.lengths} out")

    def next(self) -> int | None:
        """Where the next window starts; None when nothing is missing."""
        places = [self._place(name) for name, mask in self.mask.items() if not mask.all()]
        if not places:
            return None
        start = min(max(min(places) - self.overlap, 0), self.last)
        # Where lengths are rounded, a window that far back may end before what is missing.
        while all(mask[self._steps(name, start)].all() for name, mask in self.mask.items()):
            start += 1
        return start

    def read(self, start: int) -> tuple[Media, Media]:
        """Values and mask of the window from `start` on, the mask shaped like the values."""
        values = {name: self.values[name][:, self._steps(name, start)] for name in self.window}
        masks = {}
        for name, value in values.items():
            mask = self.mask[name][self._steps(name, start)]
            masks[name] = mask.view(1, -1, *[1] * (value.dim() - 2)).expand_as(value)
        return Media(values), Media(masks)

    def write(self, start: int, clip: Media, own: Media) -> None:
        """Fills in what is missing in that window; what is known stays as it is.

        `own` is what the model by itself makes of the whole window. Where known steps meet made
        ones it errs on both sides alike: two thirds of its error on the known step are taken from
        the made one beside it and a third from the next, so that no seam shows.
        """
        for name, value in clip.items():
            steps = self._steps(name, start)
            missing, there = ~self.mask[name][steps], self.values[name][:, steps]
            value = value + faded(there - own[name], missing)
            there[:, missing] = value[:, missing]
            self.mask[name][steps] = True

    def _place(self, name: str) -> int:
        """The last start of a window with the first missing step in it, wherever the clip ends."""
        first, rest = int((~self.mask[name]).nonzero()[0]), self.lengths[name] - self.window[name]
        return ((first + 1) * self.last - 1) // rest if rest else self.last

    def _steps(self, name: str, start: int) -> slice:
        """Windows are as far apart in each modality, from its beginning to its end."""
        size = self.window[name]
        first = start * (self.lengths[name] - size) // self.last if self.last else 0
        return slice(first, first + size)


def faded(error: Tensor, missing: Tensor, reach: int = 2) -> Tensor:
    """The error [C, T, ...] of the step beside each run of missing ones, falling to zero in it."""
    out, places = torch.zeros_like(error), missing.nonzero().flatten()
    if not len(places):
        return out
    breaks = (places.diff() > 1).nonzero().flatten() + 1
    for run in places.tensor_split(breaks):
        first, end = int(run[0]), int(run[-1]) + 1
        size = min(reach, end - first)
        fall = 1 - torch.arange(1, size + 1) / (size + 1)
        fall = fall.view(1, -1, *[1] * (error.dim() - 2))
        if first > 0:
            out[:, first : first + size] += fall * error[:, first - 1, None]
        if end < len(missing):
            out[:, end - size : end] += fall.flip(1) * error[:, end, None]
    return out


class Blank:
    """A clip of which nothing is known, `seconds` long (or one window)."""

    def __init__(
        self,
        shapes: dict[str, list[int]],
        rates: dict[str, float],
        seconds: float | None = None,
    ):
        self.values, self.mask = {}, {}
        slow = min(shapes, key=lambda name: shapes[name][1])
        if seconds is not None and not isfinite(seconds):
            raise ValueError(f"seconds={seconds} is no length")
        steps = shapes[slow][1] if seconds is None else round(seconds * rates[slow])
        if steps < shapes[slow][1]:
            least = shapes[slow][1] / rates[slow]
            raise ValueError(f"seconds={seconds} is shorter than one window of {least:g} s")
        for name, (channels, window, *rest) in shapes.items():
            count = window if steps == shapes[slow][1] else round(steps * rates[name] / rates[slow])
            self.values[name] = torch.zeros(channels, count, *rest)
            self.mask[name] = torch.zeros(count, dtype=torch.bool)
