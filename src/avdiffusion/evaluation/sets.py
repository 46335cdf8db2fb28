"""Sets of clips to be compared, all in one form: of a folder, of a dataset, or of a model."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from math import floor
from pathlib import Path
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset

from avdiffusion.data.clips import levelled
from avdiffusion.data.index import Entry, build_index, cache_folder, digest, fullest, side
from avdiffusion.data.windows import spread
from avdiffusion.evaluation.form import Form
from avdiffusion.io import DECODER, MediaError, pcm16, read_window, replacing
from avdiffusion.media import Media
from avdiffusion.writer import pixels, sound, write_whole

BATCH = 8  # clips read and measured together: part of what a figure depends on, to rounding
SCALE = np.float32(2.0**-15)  # of 16-bit samples
ARRAYS = {"video": pixels, "audio": sound}


class ClipSet(Protocol):
    """Clips by their numbers: `names`, what tells the set from others (`digest`), `lines` about it.

    `read` gives some of them as arrays, video uint8 [B, 3, T, H, W] and audio float32 [B, C, L];
    `batch` of them are measured together. Clips of one of the `sources` are cut from one recording.
    """

    batch: int
    path: str
    names: Sequence[str]
    sources: Sequence[str]
    digest: str
    lines: Sequence[tuple[str, str]]

    def read(self, numbers: Sequence[int]) -> dict[str, np.ndarray]: ...


class Files:
    """Windows of the media files of a folder, all of one form.

    `windows`: "disjoint" are those that divide each file evenly, always the same; "random" are any
    that begin a frame or more apart; or a list of them, (file, start in seconds). At most `most`,
    chosen by their names alone (random ones by `seed`), whatever the order of the files. A silent
    file is kept if `silent`. What cannot be read is an error that names the files, or with
    `on_bad="skip"` left out and counted.
    """

    batch = BATCH

    def __init__(
        self,
        root: str | Path,
        form: Form,
        *,
        most: int | None = None,
        windows: str | Sequence[tuple[str, float]] = "disjoint",
        split: str = "all",
        val_fraction: float = 0.1,
        silent: bool = False,
        on_bad: str = "error",
        seed: int = 0,
        cache: str | Path | None = None,
    ):
        self.root, self.form, self.cache = Path(root).expanduser(), form, cache
        self.path = str(root) if split == "all" else f"{root} ({split})"
        entries, self.left_out = usable(self.root, form, silent, on_bad, cache)
        chosen = side({entry.path for entry in entries}, split, val_fraction, self.root)
        self.entries = {entry.path: entry for entry in entries if entry.path in chosen}
        self.kind = windows if isinstance(windows, str) else "given"
        if self.kind == "given":
            self.windows = list(windows)
        else:
            self.windows = [(e.path, at) for e in self.entries.values() for at in self._starts(e)]
        if most is not None and most < len(self.windows):
            self.windows = sorted(sorted(self.windows, key=self._place(seed))[:most])
        self.places = [(_stem(path), at - self.begin(path)) for path, at in self.windows]
        self.names = [f"{path}@{at:.3f}" if at else path for path, at in self.windows]
        self.sources = [path for path, _ in self.windows]

    def begin(self, path: str) -> float:
        """When all that is measured of a file has begun, on the file's own clock."""
        return self.entries[path].info.span(self.form.modalities)[0]

    def _starts(self, entry):
        start, end = entry.info.span(self.form.modalities)
        snapping = 0.5 / self.form.fps if self.form.fps else 0
        room = max(0.0, end - start - self.form.seconds - snapping)
        if self.kind == "disjoint":
            return spread(start, room, self.form.seconds)[0]
        if self.kind != "random":
            raise ValueError(f"windows={self.kind} is neither disjoint nor random")
        hop = 1 / (self.form.fps or 10)
        return [start + k * hop for k in range(floor(room / hop) + 1)]

    def _place(self, seed):
        """A function of a window that puts any number of them in an order of chance."""
        salt = f"{seed} " if self.kind == "random" else ""
        return lambda window: digest(f"{salt}{window[0]}@{window[1]:.6f}")

    @cached_property
    def digest(self) -> str:
        """Of the windows, of the content of the files they are in, and of how they are read."""
        paths = sorted(set(self.sources))
        content = hashes(self.root, [self.entries[path] for path in paths], self.cache)
        how = [asdict(self.form), DECODER, version("av")]
        return digest(json.dumps([paths, content, self.windows, how]))

    @property
    def lines(self) -> list[tuple[str, str]]:
        used = [self.entries[path] for path in sorted(set(self.sources))]
        codecs = Counter(
            " + ".join(c for c in (e.info.video_codec, e.info.audio_codec) if c) for e in used
        )
        said = ", ".join(f"{name} ({count} files)" for name, count in codecs.most_common())
        lines = [("clips", f"{len(self.names)} {self.kind} windows of {len(used)} files")]
        lines.append(("codec read", said))
        if self.left_out:
            lines.append(("left out", f"{len(self.left_out)} files: {listed(self.left_out)}"))
        if "audio" in self.form.modalities:
            if self.form.loudness is not None:
                lines.append(("level", f"brought to {self.form.loudness:g} dB"))
            if silent := sum(not entry.audible for entry in used):
                lines.append(("silent files", str(silent)))
        return lines

    def read(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        return stacked([self._window(*self.windows[k]) for k in numbers])

    def _window(self, path, start):
        window = read_window(self.root / path, start, **self.form.request())
        window.pop("start")
        if "audio" in window:
            levels = pcm16(levelled(window["audio"], self.form.loudness))
            window["audio"] = levels * SCALE
        return window


class Items:
    """The fixed items of a dataset, as a model's own data are."""

    batch = BATCH

    def __init__(self, dataset: Dataset, form: Form, *, path: str, most: int | None = None):
        self.dataset, self.form, self.path = dataset, form, path
        count = len(dataset) if most is None else min(most, len(dataset))
        self.names = self.sources = [f"{k:06d}" for k in range(count)]

    @cached_property
    def digest(self) -> str:
        """Of the content of all items, which is read once for it."""
        found = hashlib.sha256(json.dumps(asdict(self.form)).encode())
        for k in range(len(self.names)):
            for value in self.read([k]).values():
                found.update(np.ascontiguousarray(value))
        return found.hexdigest()[:16]

    @property
    def lines(self) -> list[tuple[str, str]]:
        kind = type(self.dataset).__name__
        return [("clips", f"{len(self.names)} of {len(self.dataset)} fixed items of {kind}")]

    def read(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        arrays = {name: ARRAYS[name] for name in self.form.modalities}
        items = [self.dataset[k] for k in numbers]
        return stacked([{k: make(item[k]) for k, make in arrays.items()} for item in items])


class Sampled:
    """Samples of a model, as arrays: pixels rounded to 8 bits and sound to 16, through no codec.

    `sample(numbers)` makes them, `batch` at a time; `settings` is all that they depend on. What was
    made is kept in `folder`, so that another metric needs no other samples.
    """

    def __init__(
        self,
        sample: Callable[[Sequence[int]], Media],
        num: int,
        *,
        path: str,
        settings: Mapping[str, object],
        folder: Path,
        batch: int = BATCH,
    ):
        self.sample, self.path, self.batch = sample, path, batch
        self.names = self.sources = [f"{k:06d}" for k in range(num)]
        self.places = [(name, 0.0) for name in self.names]
        own = digest(json.dumps(dict(settings), sort_keys=True, default=str))
        self.folder, self.digest = folder / own, f"{own}-{num}"
        said = ", ".join(f"{k} {_name(v)}" for k, v in settings.items() if v)
        self.lines = [("clips", f"{num} samples as arrays (no codec)"), ("made by", said)]

    def read(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        batches = {k // self.batch for k in numbers}
        made = {k: self._made(k) for k in sorted(batches)}
        return {
            name: np.stack([made[k // self.batch][name][k % self.batch] for k in numbers])
            for name in next(iter(made.values()))
        }

    def _made(self, k):
        path = self.folder / f"{k:05d}-{min(self.batch, len(self.names) - k * self.batch)}.npz"
        if not path.is_file():
            first = k * self.batch
            clips = self.sample(range(first, min(first + self.batch, len(self.names))))
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays = {name: ARRAYS[name](value) for name, value in clips.items()}
            arrays = {k: v if v.dtype == np.uint8 else pcm16(v) for k, v in arrays.items()}
            with replacing(path) as part, open(part, "wb") as file:
                np.savez(file, **arrays)
        with np.load(path) as stored:
            arrays = dict(stored)
        return {k: v if v.dtype == np.uint8 else v * SCALE for k, v in arrays.items()}


def _name(value):
    """Of what a config describes, its class and plain settings."""
    if not isinstance(value, Mapping):
        return str(value)
    own = str(value.get("_target_", "")).rpartition(".")[2]
    rest = ", ".join(f"{k} {_name(v)}" for k, v in value.items() if k != "_target_")
    return f"{own}({rest})" if rest or own else "none"


def stacked(windows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([window[name] for window in windows]) for name in windows[0]}


def usable(
    root: Path, form: Form, silent: bool, on_bad: str, cache: str | Path | None
) -> tuple[list[Entry], list[str]]:
    """The media files of a folder that give windows of a form, and why others do not."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder of clips")
    index = build_index(root, cache=cache)
    if not index.entries:
        others = f" ({len(index.ignored)} other files)" if index.ignored else ""
        raise FileNotFoundError(f"no audio or video files in {root}{others}")
    good, bad = [], []
    for entry in fullest(index.entries):
        problem = entry.problem(form.modalities, form.seconds, form.fps or 0)
        if problem and not (silent and problem.startswith("silent")):
            bad.append(f"{entry.path} ({problem})")
        else:
            good.append(entry)
    if bad and (on_bad == "error" or not good):
        remedy = "; on_bad=skip leaves them out" if good else ""
        raise MediaError(
            f"{len(bad)} of {len(bad) + len(good)} files in {root} cannot be measured: "
            f"{listed(bad)}{remedy}"
        )
    return good, bad


def listed(texts: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def hashes(root: Path, entries: Sequence[Entry], cache: str | Path | None) -> list[str]:
    """Of the files' content, each read once and remembered while its size and time stay."""
    store = cache_folder(cache) / f"hashes-{digest(os.path.realpath(root))}.json"
    try:
        known = json.loads(store.read_text())
    except (OSError, ValueError):
        known = {}
    found = []
    for entry in entries:
        mark = [entry.size, entry.mtime]
        if known.get(entry.path, [])[:2] != mark:
            with open(root / entry.path, "rb") as file:
                known[entry.path] = [*mark, hashlib.file_digest(file, "sha256").hexdigest()[:16]]
        found.append(known[entry.path][2])
    with suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        write_whole(store, json.dumps(known).encode())
    return found


def _stem(path):
    return str(Path(path).with_suffix(""))
