"""Decoded windows on disk: arrays that every process maps into its memory, and what they hold.

A folder with `windows.json` and, named there, `video-*.npy` uint8 [N, 3, T, H, W] and `audio-*.npy`
int16 [N, C, L]. The JSON is written last: without it nothing is taken for complete.
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from avdiffusion.data.index import digest, side
from avdiffusion.io import MediaError, replacing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1
DESCRIPTION = "windows.json"
DTYPES = {"video": np.dtype("u1"), "audio": np.dtype("<i2")}
Read = Callable[[str, float], Mapping[str, np.ndarray]]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptFile:
    """One source file and its windows: rows `row`, `row` + 1, ... begin at `starts` (seconds).

    `fixed` are the numbers of those starts that divide the file evenly.
    """

    path: str
    size: int
    mtime: int
    starts: list[float]
    fixed: list[int]
    row: int = 0


class Windows(Dataset):
    """Clips from a folder of kept windows, which may have been copied from another machine.

    `[i]` is one of the windows that divide the files evenly, always the same; `draw(i, rng)` any
    one of the same file, mirrored with probability `flip` (and stereo with it). Items: `video`
    uint8 [3, T, H, W], `audio` int16 [C, L] (full scale 32768), `index`. Nothing is decoded.

    A file is in `val` by a hash of its path, as in `Clips`; `val_fraction` of the files are. The
    folder says what its windows are; where `fps`, `frames` and the others say something else, that
    is an error. None for `fit`, `loudness` (dB) and `hop` (s) takes them as they are.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        val_fraction: float = 0.1,
        fps: float = 10,
        frames: int = 16,
        size: Sequence[int] = (64, 64),
        sample_rate: int = 16000,
        samples: int = 25600,
        channels: int = 1,
        fit: str | None = None,
        flip: float = 0.5,
        loudness: float | None = None,
        hop: float | None = None,
    ):
        self.root, self.flip = Path(root).expanduser(), flip
        content = described(self.root)
        if content is None:
            raise FileNotFoundError(
                f"no kept windows in {self.root}: {DESCRIPTION} or the arrays it names are missing"
            )
        stored = content["settings"]
        asked = {"fps": fps, "frames": frames, "size": list(size), "sample_rate": sample_rate}
        asked |= {"samples": samples, "channels": channels}
        recipe = {"train.fit": fit, "train.loudness": loudness, "train.hop": hop}
        asked |= {key: value for key, value in recipe.items() if value is not None}
        for key, value in asked.items():
            there = stored.get(key.removeprefix("train."), value)
            if there != value:
                said = "null" if there is None else str(there).replace(" ", "")
                raise ValueError(
                    f"the windows in {self.root} are of data.{key}={said}, "
                    f"not {value}: set it so, or keep others"
                )
        self.arrays, self._mapped = content["arrays"], {}
        self.bad = [tuple(pair) for pair in content["bad"]]
        kept = [KeptFile(**file) for file in content["files"]]
        chosen = side({file.path for file in kept}, split, val_fraction, self.root)
        kept = [file for file in kept if file.path in chosen]
        self.files = [file.path for file in kept]
        self.windows = [(n, file.starts[k]) for n, file in enumerate(kept) for k in file.fixed]
        self._fixed = [file.row + k for file in kept for k in file.fixed]
        self._rows = [range(file.row, file.row + len(file.starts)) for file in kept]
        self._map()
        size = sum(rows.nbytes for rows in self._mapped.values()) / 1e9
        log.info("%d files, %.2f GB of kept windows in %s", len(content["files"]), size, self.root)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        return as_item(i, self._row(self._fixed[i]))

    def draw(self, i: int, rng: np.random.Generator) -> dict:
        """Any kept window of the file of window i."""
        rows = self._rows[self.windows[i][0]]
        place, coin = rng.random(2)
        return as_item(i, self._row(rows[int(place * len(rows))]), coin < self.flip)

    def _row(self, row):
        return {name: rows[row] for name, rows in self._mapped.items()}

    def _map(self):
        for name, file in self.arrays.items():
            self._mapped[name] = np.asarray(np.load(self.root / file, mmap_mode="r"))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_mapped": {}}

    def __setstate__(self, state: dict) -> None:
        """In another process, which maps the arrays for itself."""
        self.__dict__.update(state)
        self._map()


def as_item(i: int, arrays: Mapping[str, np.ndarray], mirror: bool = False) -> dict:
    """A dataset's item, its tensors copies: they can be written to, and mapped pages not.

    To `mirror` exchanges left and right, in the picture and with it in stereo sound.
    """
    if mirror and "video" in arrays:
        arrays = {k: v[..., ::-1] if k == "video" else v[::-1] for k, v in arrays.items()}
    return {"index": i, **{k: torch.from_numpy(np.array(v, order="C")) for k, v in arrays.items()}}


def spread(
    start: float, room: float, seconds: float, hop: float | None = None
) -> tuple[list[float], list[int]]:
    """Where windows of `seconds` begin between `start` and `start + room`, and which are fixed.

    The fixed ones divide the file evenly; with a `hop` below `seconds` others lie between them,
    about so far apart.
    """
    count = 1 + int(room / seconds)
    fixed = np.linspace(start, start + room, count) if count > 1 else np.array([start + room / 2])
    fixed = starts = fixed.tolist()
    if hop and hop < seconds:
        knots = fixed
        if count == 1 and room >= hop:
            knots = [start, *fixed, start + room]
        steps = [np.linspace(a, b, max(1, round((b - a) / hop)), False) for a, b in pairwise(knots)]
        starts = [*(float(s) for step in steps for s in step), knots[-1]]
    return starts, [starts.index(s) for s in fixed]


def keep(
    folder: Path,
    files: Sequence[KeptFile],
    settings: Mapping[str, object],
    read: Read,
    *,
    root: Path,
    on_bad: str = "error",
    workers: int | None = None,
) -> None:
    """Sees to it that `folder` holds the windows of `files`, decoding what is new or has changed.

    `read(path, start)` gives one window as arrays. One process builds, others wait for it; what a
    killed one leaves is never taken for complete. Files that break while they are read are an
    error, or with `on_bad="skip"` left out and listed.
    """
    source = digest(json.dumps([asdict(file) for file in files]))
    if _holds(folder, source):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not _holds(folder, source):
                _build(folder, files, source, dict(settings), read, root, on_bad, workers)
    except OSError as error:
        raise ValueError(
            f"the windows cannot be kept in {folder}: {error.strerror or error}; data.train.cache "
            "names another folder, data.train.keep=false decodes them every time"
        ) from error


def described(folder: Path) -> dict | None:
    """What `windows.json` of a folder says; None if that or an array is missing or not whole."""
    try:
        content = json.loads((folder / DESCRIPTION).read_text("utf-8"))
        if content["format"] != FORMAT:
            return None
        for file in content["arrays"].values():
            np.load(folder / file, mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content


def _holds(folder, source):
    content = described(folder)
    return content is not None and content["source"] == source


@contextmanager
def _alone(folder) -> Iterator[None]:
    """Waits until no other process builds here; a lock of the process, which a kill releases."""
    with open(folder / ".lock", "w") as file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("another process is decoding into %s: waiting for it", folder)
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _build(folder, files, source, settings, read, root, on_bad, workers):
    files, count = _placed(files)
    shapes = {
        "video": (count, 3, settings.get("frames"), *settings.get("size", ())),
        "audio": (count, settings.get("channels"), settings.get("samples")),
    }
    arrays = {name: f"{name}-{source}.npy" for name in settings["modalities"]}
    for left in folder.glob("*.part*"):  # by a build that was killed
        left.unlink()
    need = sum(prod(shapes[name]) * DTYPES[name].itemsize for name in arrays)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(None, f"{need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free")
    log.info("%d windows of %s, %.2f GB, are kept in %s", count, root, need / 1e9, folder)

    known = _known(folder)
    with ExitStack() as stack:
        out = {
            name: stack.enter_context(_Rows(folder / file, DTYPES[name], shapes[name]))
            for name, file in arrays.items()
        }

        def fill(file):
            for k, start in enumerate(file.starts):
                try:
                    old = known.get((file.path, file.size, file.mtime, start))
                    window = old() if old else read(file.path, start)
                except (MediaError, OSError) as error:
                    if on_bad == "error":
                        raise MediaError(str(error)) from error
                    log.warning("left out: %s", error)
                    return "found broken while being read"
                for name, rows in out.items():
                    rows.put(file.row + k, window[name])
                bar.update()
            return None

        bar = stack.enter_context(
            tqdm(total=count, desc=f"decoding {root}", unit="window", disable=None)
        )
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            reasons = dict(zip((f.path for f in files), pool.map(fill, files), strict=True))
        bad = [(path, reason) for path, reason in reasons.items() if reason]
        if len(bad) == len(files):
            raise MediaError(f"every file of {root} has become unreadable")
        for rows in out.values():
            rows.finish()

    content = {"format": FORMAT, "made_from": os.path.abspath(root), "source": source}
    content |= {"settings": settings, "arrays": arrays, "bad": bad, "files": None}
    good = [json.dumps(asdict(file)) for file in files if not reasons[file.path]]
    listed = '"files": [\n  ' + ",\n  ".join(good) + "\n ]"
    with replacing(folder / DESCRIPTION) as part:
        part.write_text(json.dumps(content, indent=1).replace('"files": null', listed), "utf-8")
    for other in folder.glob("*.npy"):  # of the source as it was
        if other.name not in arrays.values():
            other.unlink()


def _placed(files):
    """Files with the rows of their windows, and how many rows there are."""
    row, placed = 0, []
    for file in files:
        placed.append(KeptFile(**{**asdict(file), "row": row}))
        row += len(file.starts)
    return placed, row


def _known(folder):
    """(path, size, mtime, start) of every window that is kept already -> what reads it."""
    content = described(folder)
    if content is None:
        return {}
    arrays = {
        name: np.load(folder / file, mmap_mode="r") for name, file in content["arrays"].items()
    }

    def reader(row):
        return lambda: {name: array[row] for name, array in arrays.items()}

    return {
        (file["path"], file["size"], file["mtime"], start): reader(file["row"] + k)
        for file in content["files"]
        for k, start in enumerate(file["starts"])
    }


class _Rows:
    """A .npy file written row by row, from any thread; it gets its name when it is finished.

    Plain writes: a full disk is an error here, where through a map it would kill the process.
    """

    def __init__(self, path, dtype, shape):
        self.path, self.part = path, path.with_suffix(".part")
        self.dtype, self.shape, self.lock = dtype, shape, threading.Lock()

    def __enter__(self):
        self.file = open(self.part, "wb")
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self.file, header)
        self.begin, self.bytes = self.file.tell(), prod(self.shape[1:]) * self.dtype.itemsize
        return self

    def put(self, row, values):
        data = np.ascontiguousarray(values, self.dtype).data
        with self.lock:
            self.file.seek(self.begin + row * self.bytes)
            self.file.write(data)

    def finish(self):
        self.file.flush()
        self.file.truncate(self.begin + self.shape[0] * self.bytes)  # if the last row is left out
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.part, self.path)

    def __exit__(self, *error):
        try:
            self.file.close()
        finally:
            self.part.unlink(missing_ok=True)
