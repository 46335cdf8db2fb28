"""Items read from the files of a folder, any of which may be broken."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from avdiffusion.data.index import side
from avdiffusion.data.windows import as_item, spread
from avdiffusion.io import MediaError

SKIP = (
    "data.train.on_bad=skip leaves them out "
    "(data.train.clips.on_bad=skip where data.train has clips of its own)"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What a folder gave: files used, files that are no media, and (file, reason) for bad ones."""

    root: Path
    used: int
    ignored: list[str]
    bad: list[tuple[str, str]]

    def __str__(self) -> str:
        kinds = Counter(reason.split(": ")[0] for _, reason in self.bad)
        parts = [f"{self.used} files used"]
        parts += [f"{n} left out ({kind})" for kind, n in kinds.most_common()]
        parts += [f"{len(self.ignored)} that are no media"] if self.ignored else []
        return f"{self.root}: " + ", ".join(parts)


class FromFiles:
    """A dataset of places in files: `windows` are (number of a file of `files`, place in it).

    A subclass says what is at a place, `_window(path, place)`, arrays by modality, and which place
    is drawn for item i, and whether mirrored: `_random(i, rng)`. What breaks while it is read is an
    error with `on_bad="error"`; else it is left out and reported, and another item takes its place.
    """

    root: Path
    on_bad: str
    files: list[str]
    windows: list[tuple[int, object]]

    def _chosen(
        self,
        problems: Mapping[str, str | None],
        ignored: list[str],
        split: str,
        val_fraction: float,
    ) -> set[str]:
        """Of files, with the reason why one is of no use, the good ones of one side."""
        self._bad = [(path, problem) for path, problem in problems.items() if problem]
        usable = {path for path, problem in problems.items() if not problem}
        self._used, self._ignored = len(usable), ignored
        if self._bad and (not usable or self.on_bad == "error"):
            raise ValueError(refusal(self._bad, len(problems), self.root))
        return side(usable, split, val_fraction, self.root)

    def _begin(self, shown=(), size=None, fit=None):
        """Says how the folder fared, and how many of its pictures [H, W] are too small."""
        # in shared memory: the workers of a loader tell each other and the main process
        self._broken = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()
        if self._bad:
            log.warning("%s; the first: %s", self.report, listed(self._bad))
        else:
            log.info("%s", self.report)
        small = sum(scaling(each, size, fit) > 1 for each in shown)
        if small:
            log.warning(
                "%d of %d files in %s are smaller than %dx%d: enlarged, they are blurred",
                *(small, len(shown), self.root, *size),
            )

    @property
    def report(self) -> Report:
        """How the whole folder fared, files that broke while being read included."""
        broken = [self.files[i] for i in self._broken.nonzero().flatten().tolist()]
        late = [(path, "found broken while being read") for path in broken]
        return Report(self.root, self._used - len(late), self._ignored, self._bad + late)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        for j in range(len(self)):
            number = (i + j) % len(self)
            item = self._read(number, self.windows[number][1], False)
            if item is not None:
                return item
        raise MediaError(f"every file of {self.root} has become unreadable")

    def draw(self, i: int, rng: np.random.Generator) -> dict:
        """A random place in the file of item i; if that is broken and skipped, in another."""
        for _ in range(len(self) + 100):
            item = self._read(i, *self._random(i, rng))
            if item is not None:
                return item
            i = int(rng.integers(len(self)))
        raise MediaError(f"the files of {self.root} have become unreadable")

    def _read(self, i, place, mirror):
        number = self.windows[i][0]
        if self._broken[number]:
            return None
        try:
            window = self._window(self.files[number], place)
        except (MediaError, OSError) as error:
            if self.on_bad == "error":
                raise
            self._broken[number] = True
            log.warning("left out from now on, other clips take its place: %s", error)
            return None
        return as_item(i, window, mirror)


class Timed(FromFiles):
    """A dataset of windows of `seconds` that begin at some time of their files.

    `[i]` is one of those that divide the files evenly, `draw` any, mirrored at the rate `flip`.
    """

    flip: float

    def _lay(self, spans: Mapping[str, tuple[float, float]], seconds: float) -> None:
        """Of each file: the first start of a window, and how much later the last one may be."""
        self.files, self._spans, self.windows = list(spans), list(spans.values()), []
        for number, (start, room) in enumerate(self._spans):
            self.windows += [(number, s) for s in spread(start, room, seconds)[0]]

    def _random(self, i, rng):
        start, room = self._spans[self.windows[i][0]]
        place, coin = rng.random(2)
        return start + place * room, coin < self.flip


def scaling(shown: Sequence[float], size: Sequence[int], fit: str) -> float:
    """The factor that makes a picture [H, W] cover `size`, or fit in with a letterbox."""
    return (min if fit == "letterbox" else max)(b / a for a, b in zip(shown, size, strict=True))


def refusal(bad: Sequence[tuple[str, str]], count: int, root: Path) -> str:
    """Why a folder of `count` files is not taken, and what can be done if some of them are good."""
    remedy = f"; {SKIP}" if len(bad) < count else ""
    return f"{len(bad)} of {count} files in {root} cannot be used: {listed(bad)}{remedy}"


def listed(bad: Sequence[tuple[str, str]], most: int = 3) -> str:
    """The first few of (file, reason)."""
    more = f" and {len(bad) - most} more" if len(bad) > most else ""
    return ", ".join(f"{path} ({reason})" for path, reason in bad[:most]) + more


def one_of(name: str, value: object, choices: Sequence) -> None:
    """Raises ValueError unless a setting is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(map(str, choices))}, not {value}")
