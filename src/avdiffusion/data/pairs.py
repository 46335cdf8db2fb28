"""Windows of the same moments of two videos: one that is given, one that is to come of it."""

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import floor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from avdiffusion.data.files import Timed, listed, one_of
from avdiffusion.data.index import Entry, build_index, examined
from avdiffusion.io import read_window

SIDES = ("input", "target")  # names of folders and of columns
AFTER = 1.2e-3  # s; more than files whose clocks count milliseconds are off by, start and frame
log = logging.getLogger(__name__)


class Pairs(Timed):
    """Clips of `frames` pictures of a target, with the same moments of its source.

    Items: `video` uint8 [3, T, H, W] of the target, `source` likewise, `index`. Windows, `draw`,
    `split`, `val_fraction` and `on_bad` are those of `Clips`; both members are cut and mirrored
    alike. Times count from the first picture of each file, and the shorter file is the length.

    A pair has the same path but for its suffix below `root`/input and `root`/target; with these
    below `root`/train and `root`/val, that is the split. Or `pairs` are rows {input, target} of
    paths, listed or in a .csv, .json or .jsonl file, relative to `root`, by default that file's
    folder or the working one; their split is by a hash of the target's path as it is written. A
    file without its partner is an error, or with `strict=False` left out and counted.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        pairs: Sequence[Mapping[str, str]] | str | Path | None = None,
        split: str = "train",
        val_fraction: float = 0.1,
        fps: float = 10,
        frames: int = 16,
        size: Sequence[int] = (64, 64),
        fit: str = "crop",
        flip: float = 0.5,
        strict: bool = True,
        on_bad: str = "error",
        cache: str | Path | None = None,
        index_workers: int | None = None,
    ):
        one_of("fit", fit, ("crop", "letterbox"))
        one_of("on_bad", on_bad, ("error", "skip"))
        one_of("split", split, ("train", "val", "all"))
        self.flip, self.on_bad = flip, on_bad
        self.request = {"fps": fps, "frames": frames, "size": tuple(size), "fit": fit}
        if pairs is not None:
            pairs, folder = rows(pairs)
            self.root, ignored = Path(root or folder).expanduser(), []
            found, lone = in_list(self.root, pairs, index_workers)
        elif root is not None:
            self.root = Path(root).expanduser()
            parts = divided(self.root, split)
            found, lone, ignored = in_folders(self.root, parts, cache, index_workers)
            split = split if parts == ["."] else "all"
        else:
            raise ValueError(
                "no pairs are named: data.root=DIR for a folder with input and target below, "
                "or data.train.pairs=FILE for a list"
            )
        self._check(found, lone, ignored, strict)

        seconds = frames / fps
        problems = {name: problem(pair, seconds, fps) for name, pair in found.items()}
        chosen = self._chosen(problems, ignored, split, val_fraction)
        self._pairs = {name: pair for name, pair in found.items() if name in chosen}
        lengths = {
            name: [e.info.video_end - e.info.video_start for e in pair]
            for name, pair in self._pairs.items()
        }
        room = {name: min(both) - seconds - 0.5 / fps for name, both in lengths.items()}
        self._lay({name: (0.0, max(0.0, value)) for name, value in room.items()}, seconds)
        uneven = [
            (name, f"{source:.2f} s and {target:.2f} s")
            for name, (source, target) in lengths.items()
            if abs(source - target) > 0.5 / fps
        ]
        if uneven:
            log.warning(
                "%d of %d pairs in %s differ in length, what only one of them has is not used: %s",
                *(len(uneven), len(lengths), self.root, listed(uneven)),
            )
        shown = [(target.info.height, target.info.width) for _, target in self._pairs.values()]
        self._begin(shown, size, fit)

    def _check(self, found, lone, ignored, strict):
        """Files without a partner, and that there is any pair at all."""
        if found and not lone:
            return
        without = f"{len(lone)} files without a partner: {listed(lone)}" if lone else "no videos"
        if ignored:
            without += f"; {len(ignored)} files are no media, such as {ignored[0]}"
            without += ": single pictures are not read, only videos made of them"
        if not found:
            raise FileNotFoundError(f"no pairs of videos in {self.root}: {without}")
        if strict:
            remedy = "data.train.strict=false leaves them out"
            raise FileNotFoundError(f"in {self.root} are {without}; {remedy}")
        log.warning("left out in %s: %s", self.root, without)

    def _window(self, path, place):
        """Both pictures of a pair from the same frame on: `video` uint8 [2, 3, T, H, W].

        All moments are a little later: of two frames that are equally near, rounding would choose
        the one in this file, the other in that.
        """
        pair = self._pairs[path]
        rate = max(entry.info.fps for entry in pair) or self.request["fps"]
        moment = floor(place * rate) / rate + AFTER
        both = [
            read_window(
                self.root / entry.path,
                entry.info.video_start + moment,
                modalities=("video",),
                snap=False,
                **self.request,
            )
            for entry in pair
        ]
        return {"video": np.stack([window["video"] for window in both])}

    def _read(self, i, place, mirror):
        item = super()._read(i, place, mirror)
        if item is not None:
            item["source"], item["video"] = item["video"]
        return item


def problem(pair: tuple[Entry, Entry], seconds: float, fps: float) -> str | None:
    """Why no window of `seconds` can be had of source and target, if none can."""
    for side, entry in zip(SIDES, pair, strict=True):
        reason = entry.problem(("video",), seconds, fps)
        if reason:
            return f"{reason} in the {side}"
    (h, w), (height, width) = [(entry.info.height, entry.info.width) for entry in pair]
    if abs(h * width - height * w) > max(w, width):  # more than a row of the smaller picture
        return f"shapes differ: {h}x{w} in the input, {height}x{width} in the target"
    return None


def divided(root: Path, split: str) -> list[str]:
    """The folders below `root` that hold pairs of a split: train and val if they do, else "."."""
    parts = [part for part in ("train", "val") if (root / part / "input").is_dir()]
    return [part for part in parts if split in (part, "all")] or ([split] if parts else ["."])


def in_folders(
    root: Path, parts: Sequence[str], cache: str | Path | None, workers: int | None
) -> tuple[dict[str, tuple[Entry, Entry]], list[tuple[str, str]], list[str]]:
    """Pairs by name, files (path, reason) without a partner, and those that are no media."""
    sides, ignored = ({}, {}), []
    for part in parts:
        for side, entries in zip(SIDES, sides, strict=True):
            folder = root / part / side
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"no folder {folder}: pairs lie in {' and '.join(SIDES)} below data.root, "
                    "or below its folders train and val"
                )
            index = build_index(folder, cache=cache, workers=workers)
            ignored += [Path(part, side, path).as_posix() for path in index.ignored]
            for entry in index.entries:
                name = Path(part, entry.path).with_suffix("").as_posix()
                path = Path(part, side, entry.path).as_posix()
                if name in entries:
                    raise ValueError(f"in {root} {entries[name].path} and {path} have one name")
                entries[name] = replace(entry, path=path)
    sources, targets = sides
    found = {name: (entry, targets[name]) for name, entry in sources.items() if name in targets}
    lone = [
        (entry.path, f"no {other}")
        for entries, other in zip(sides, reversed(SIDES), strict=True)
        for name, entry in entries.items()
        if name not in found
    ]
    return found, lone, ignored


def in_list(
    root: Path, pairs: Sequence[Mapping[str, str]], workers: int | None
) -> tuple[dict[str, tuple[Entry, Entry]], list[tuple[str, str]]]:
    """Pairs by the path of their target, and (path, reason) of files that are not there."""
    paths = {row["target"]: (row["input"], row["target"]) for row in pairs}
    if len(paths) < len(pairs):
        often = Counter(row["target"] for row in pairs).most_common(1)[0]
        raise ValueError(f"target {often[0]} is in {often[1]} pairs, a split could part them")

    def entry(path):
        file = root / Path(path).expanduser()
        return examined(root, str(file), file.stat()) if file.is_file() else None

    every = sorted({path for pair in paths.values() for path in pair})
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        looked = tqdm(pool.map(entry, every), f"reading {root}", len(every), disable=None)
        entries = dict(zip(every, looked, strict=True))
    lone = [(path, "no such file") for path in every if entries[path] is None]
    both = {name: (entries[source], entries[target]) for name, (source, target) in paths.items()}
    return {name: pair for name, pair in both.items() if None not in pair}, lone


def rows(pairs: Sequence[Mapping[str, str]] | str | Path) -> tuple[list[Mapping], Path]:
    """Rows with an input and a target, and the folder that they are relative to."""
    name, folder = "data.train.pairs", Path()
    if isinstance(pairs, str | Path):
        name, folder = Path(pairs).expanduser(), Path(pairs).expanduser().parent
        pairs = read_rows(name)
    pairs = list(pairs)
    for number, row in enumerate(pairs, 1):
        if not isinstance(row, Mapping) or not all(row.get(side) for side in SIDES):
            raise ValueError(f"pair {number} of {name} has no {' and no '.join(SIDES)}: {row}")
    return pairs, folder


def read_rows(path: Path) -> list:
    """What a table of pairs says, by its suffix."""
    one_of("the suffix of data.train.pairs", path.suffix, (".csv", ".json", ".jsonl"))
    text = path.read_text("utf-8-sig")
    try:
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no {path.suffix[1:]} file: {error}") from error
