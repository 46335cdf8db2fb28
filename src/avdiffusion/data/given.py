"""What is given of a clip, by the clock: some modalities, for all or part of the time."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor, inf, isfinite
from pathlib import Path

import torch
from torch import Tensor

from avdiffusion.data.index import Entry, build_index, examined, fullest
from avdiffusion.io import EDGE, MediaError, read_window

log = logging.getLogger("avdiffusion")
WORDS = {"video": "picture", "audio": "sound"}


@dataclass(frozen=True)
class ClipItem:
    """What is given of one result: `values` [C, T, ...] in [-1, 1], zero where `mask` [T] is not.

    The result begins `start` seconds into the file at `path`, has `steps` of each modality and
    lasts `seconds`; `known` are ranges of it, in seconds, `whole` the modalities of which nothing
    is left to generate.
    """

    path: Path
    start: float
    seconds: float
    steps: dict[str, int]
    values: dict[str, Tensor]
    mask: dict[str, Tensor]
    known: dict[str, list[tuple[float, float]]]
    whole: tuple[str, ...]


class Given:
    """Files that give parts of results; `[i]` reads from file i mod n, in sorted order.

    `path` is a file or a folder. `known` names modalities, each known as long as the file has it,
    or maps them to a range [start, end] or to several, in seconds from where all that is known has
    begun in the file; no end is the file's. `shapes` [C, T, ...] and `rates` are the model's.
    Results last `seconds`: the model's own length by default, or as long as each file ("given").

    Every file is examined at once; those that lack what `known` says are an error. A file may end
    half a step or EDGE early: then silence, or its last frame, takes the place.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        known: Sequence[str] | Mapping[str, Sequence],
        shapes: Mapping[str, Sequence[int]],
        rates: Mapping[str, float],
        seconds: float | str | None = None,
        fit: str = "crop",
        cache: str | Path | None = None,
    ):
        self.shapes, self.rates = {m: tuple(shape) for m, shape in shapes.items()}, dict(rates)
        self.seconds, self.fit = seconds, fit
        if fit not in ("crop", "letterbox"):
            raise ValueError(f"fit={fit!r} is neither crop nor letterbox")
        self.known = [known] if isinstance(known, str) else known
        self.text = "known=" + json.dumps(self.known).replace('"', "").replace(" ", "")
        self.ranges = _ranges(self.known, [m for m in shapes if m in WORDS], self.text)
        self.coarse = min(shapes, key=lambda m: rates[m])  # of the longest steps: sets the length
        self.slack = min(EDGE, 0.5 / rates[self.coarse])
        self.own = self.shapes[self.coarse][1] / rates[self.coarse]
        if isinstance(seconds, str) and seconds != "given":
            raise ValueError(f"seconds={seconds!r} is neither a number nor given")
        if isinstance(seconds, float) and not isfinite(seconds):
            raise ValueError(f"seconds={seconds} is no length")
        if seconds != "given":
            self._steps(seconds)  # if it is wrong, it is for every file

        entries, self.ignored = entries_of(Path(path).expanduser(), cache)
        self.files, self._plans, bad = [], [], []
        for root, entry in entries:
            try:
                self._plans.append(self._plan(entry))
                self.files.append(root / entry.path)
            except MediaError as error:
                error.path = str(root / entry.path)
                bad.append((entry.path, error))
        if bad and len(entries) == 1:
            raise bad[0][1]
        if bad:
            listed = ", ".join(f"{name} ({error.reason})" for name, error in bad[:3])
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise ValueError(
                f"{len(bad)} of {len(entries)} files in {path} cannot be given: {listed}{more}; "
                "take them out of the folder, or give a single file"
            )

    def __len__(self) -> int:
        return len(self.files)

    def steps(self, i: int) -> dict[str, int]:
        """Steps of each modality of result i; reads nothing."""
        return self._plans[i % len(self)][1]

    def digest(self) -> str:
        """What tells these files, by name and size, from others."""
        listed = repr([(file.name, file.stat().st_size) for file in self.files])
        return hashlib.sha256(listed.encode()).hexdigest()[:16]

    def source(self, i: int) -> dict:
        """`path`, `start`, `seconds`, `known` and `whole` of result i; reads nothing."""
        path, (start, steps, parts) = self.files[i % len(self)], self._plans[i % len(self)]
        return {
            "path": path,
            "start": start,
            "seconds": steps[self.coarse] / self.rates[self.coarse],
            "known": {
                m: [(a / self.rates[m], b / self.rates[m]) for a, b in parts[m]] for m in parts
            },
            "whole": tuple(m for m in parts if _covers(parts[m], steps[m])),
        }

    def __getitem__(self, i: int) -> ClipItem:
        source, (_, steps, parts) = self.source(i), self._plans[i % len(self)]
        values, mask = {}, {}
        for m, shape in self.shapes.items():
            values[m] = torch.zeros(shape[0], steps[m], *shape[2:])
            mask[m] = torch.zeros(steps[m], dtype=torch.bool)
            for a, b in parts.get(m, []):
                start = source["start"] + a / self.rates[m]
                values[m][:, a:b] = self._read(source["path"], m, start, b - a)
                mask[m][a:b] = True
        return ClipItem(**source, steps=steps, values=values, mask=mask)

    def _read(self, path, modality, start, count):
        channels, _, *size = self.shapes[modality]
        request = {"modalities": [modality], "snap": False}
        if modality == "video":
            request |= {"fps": self.rates["video"], "frames": count, "size": size, "fit": self.fit}
            return torch.from_numpy(read_window(path, start, **request)["video"]) / 127.5 - 1
        rate = int(self.rates["audio"])
        request |= {"sample_rate": rate, "samples": count, "channels": channels}
        return torch.from_numpy(read_window(path, start, **request)["audio"])

    def _steps(self, seconds):
        """Steps of each modality in a result of about `seconds`: whole ones of the coarsest."""
        rate, own = self.rates[self.coarse], {m: shape[1] for m, shape in self.shapes.items()}
        count = own[self.coarse] if seconds is None else round(seconds * rate)
        if count < own[self.coarse]:
            raise ValueError(
                f"seconds={seconds:.4g}: the model's clips last {self.own:.4g} s, "
                "and results as long or longer"
            )
        if count == own[self.coarse]:
            return own
        return {m: round(count / rate * self.rates[m]) for m in self.shapes}

    def _plan(self, entry):
        """Where a result begins in a file, its steps, and the given ones: modality to ranges."""
        problem = entry.problem(tuple(self.ranges), -inf)
        if problem:
            raise MediaError(f"{problem}; {self.text} needs another file")
        start, end = entry.info.span(tuple(self.ranges))
        seconds = self.seconds
        if seconds == "given":
            rate = self.rates[self.coarse]
            seconds = floor((end - start + self.slack) * rate + 1e-6) / rate
            if seconds < self.own - 1e-6:
                raise MediaError(
                    f"{end - start:.2f} s long, and seconds=given; the model's clips last "
                    f"{self.own:.2f} s"
                )
        steps, parts = self._steps(seconds), {}
        for modality, ranges in self.ranges.items():
            there = max(0.0, getattr(entry.info, f"{modality}_end") - start)
            parts[modality] = [
                self._part(modality, a, b, there, steps[modality]) for a, b in ranges
            ]
        if all(parts.get(m) and _covers(parts[m], steps[m]) for m in self.shapes):
            raise MediaError(
                f"{self.text} leaves nothing to generate; know less, or ask for more seconds"
            )
        return start, steps, parts

    def _part(self, modality, a, b, there, steps):
        """A range in steps, of a file that goes on for `there` seconds."""
        rate, word = self.rates[modality], WORDS[modality]
        lacks = f"{there:.2f} s of {word}"
        complete = there >= steps / rate - self.slack
        if isinstance(self.known, Sequence) and self.seconds is None and not complete:
            said = f"known={{{modality}:[0,{floor(there * 100) / 100:g}]}}"
            raise MediaError(
                f"{lacks}, the model's clips last {self.own:.2f} s; "
                f"say what is known, {said}, or give longer clips"
            )
        first, last = round(a * rate), steps if complete else min(steps, round(there * rate))
        if b < inf:
            if round(b * rate) > steps:
                raise MediaError(
                    f"{self.text} ends after the result, which lasts {steps / rate:.4g} s; "
                    f"seconds={b:g} makes it longer"
                )
            if b > there + self.slack:
                raise MediaError(f"{lacks}, less than {self.text} says")
            last = round(b * rate)
        if first >= last:
            length = f"a result of {steps / rate:.4g} s"
            raise MediaError(f"{lacks} and {length}: no step of it is in {self.text}")
        return first, last


def _covers(parts, steps):
    return (
        parts[0][0] == 0
        and parts[-1][1] == steps
        and all(b == c for (_, b), (c, _) in pairwise(parts))
    )


def entries_of(
    path: Path, cache: str | Path | None = None
) -> tuple[list[tuple[Path, Entry]], list[str]]:
    """(folder, entry) of a media file or of those of a folder, and the names of other files."""
    if path.is_dir():
        index = build_index(path, cache=cache)
        if not index.entries:
            others = f" ({len(index.ignored)} other files)" if index.ignored else ""
            raise FileNotFoundError(f"no audio or video files in {path}{others}")
        return [(path, entry) for entry in fullest(index.entries)], index.ignored
    if not path.exists():
        raise FileNotFoundError(f"given={path}: no such file or folder")
    return [(path.parent, examined(path.parent, path.name, path.stat()))], []


def _ranges(known, names, text):
    """Modality to its ranges in order, seconds; inf where no end is said."""
    if not known:
        raise ValueError(f"{text}: nothing is known; name some of {', '.join(names)}")
    ranges = {}
    for modality in known:
        if modality not in names:
            raise ValueError(f"{text}: {modality!r} is none of {', '.join(names)}")
        said = known[modality] if isinstance(known, Mapping) else [0, None]
        try:
            several = said if isinstance(said[0], Sequence) else [said]
            ordered = sorted((float(a), inf if b is None else float(b)) for a, b in several)
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise ValueError(
                f"{text}: {modality} wants [start, end] in seconds, or several of them"
            ) from error
        if any(not 0 <= a < b for a, b in ordered):
            raise ValueError(f"{text}: a range of {modality} is empty, reversed or before 0")
        if any(b > c for (_, b), (c, _) in pairwise(ordered)):
            raise ValueError(f"{text}: ranges of {modality} overlap")
        ranges[modality] = ordered
    return ranges
