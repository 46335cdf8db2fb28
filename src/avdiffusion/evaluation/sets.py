"""Sets of clips to be compared, all in one form: of a folder, of a dataset, or of a model."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import floor
from pathlib import Path
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset

from avdiffusion.data.clips import levelled
from avdiffusion.data.index import build_index, digest, fullest, side
from avdiffusion.data.windows import spread
from avdiffusion.io import MediaError, pcm16, read_window, replacing
from avdiffusion.media import Media
from avdiffusion.writer import pixels, sound

BATCH = 8  # clips read and measured together: part of what a figure depends on, to rounding
EDGE = 64 * 1024  # bytes at either end of a file that tell its content from another's
SCALE = np.float32(2.0**-15)  # of 16-bit samples
ARRAYS = {"video": pixels, "audio": sound}
log = logging.getLogger("avdiffusion")


@dataclass(frozen=True, kw_only=True)
class Form:
    """What every clip is brought to before it is measured; no modality without its numbers.

    `size` is (height, width), `fit` crop or letterbox, `loudness` an RMS level in dB (null: as it
    is). All sets of one evaluation have the same form.
    """

    fps: float | None = None
    frames: int | None = None
    size: tuple[int, int] | None = None
    sample_rate: int | None = None
    samples: int | None = None
    channels: int | None = None
    fit: str = "crop"
    loudness: float | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        there = {"video": self.frames, "audio": self.samples}
        return tuple(name for name, count in there.items() if count)

    @property
    def rates(self) -> dict[str, float]:
        rates = {"video": self.fps, "audio": self.sample_rate}
        return {name: rates[name] for name in self.modalities}

    @property
    def seconds(self) -> float:
        return self.frames / self.fps if self.frames else self.samples / self.sample_rate

    def request(self) -> dict:
        """How `io.read_window` is asked for such a clip."""
        asked = {k: v for k, v in asdict(self).items() if v is not None and k != "loudness"}
        return asked | {"modalities": self.modalities}

    def lines(self) -> list[tuple[str, str]]:
        """In words, for a report."""
        said = []
        if "video" in self.modalities:
            height, width = self.size
            scaled = f"{self.fit}, exact bicubic of swscale (antialiased)"
            said += [("frames", f"{self.frames} at {self.fps:g} frames a second")]
            said += [("picture", f"{width}x{height}, {scaled}")]
        if "audio" in self.modalities:
            level = f", brought to {self.loudness:g} dB" if self.loudness is not None else ""
            ways = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
            said += [("sound", f"{self.samples} samples at {self.sample_rate} Hz, {ways}{level}")]
        return said


class ClipSet(Protocol):
    """Clips by their numbers: `names`, what tells the set from others (`digest`), `lines` about it.

    `read` gives some of them as arrays, video uint8 [B, 3, T, H, W] and audio float32 [B, C, L];
    `batch` of them are measured together.
    """

    batch: int
    path: str
    names: Sequence[str]
    digest: str
    lines: Sequence[tuple[str, str]]

    def read(self, numbers: Sequence[int]) -> dict[str, np.ndarray]: ...


class Files:
    """Windows of the media files of a folder, all of one form.

    `windows`: "disjoint" are those that divide each file evenly, always the same; "random" are any
    that begin a frame or more apart. At most `num` of them, chosen by their names alone (or for
    random ones by `seed`), so that more files give other windows, but no order does. A silent file
    is kept if `silent`; what cannot be read at all is an error that names the files.
    """

    batch = BATCH

    def __init__(
        self,
        root: str | Path,
        form: Form,
        *,
        num: int | None = None,
        windows: str = "disjoint",
        split: str = "all",
        val_fraction: float = 0.1,
        silent: bool = False,
        seed: int = 0,
        cache: str | Path | None = None,
    ):
        self.root, self.form, self.path = Path(root).expanduser(), form, str(root)
        entries = entries_of(self.root, form.modalities, form, silent=silent, cache=cache)
        chosen = side({entry.path for entry in entries}, split, val_fraction, self.root)
        entries = [entry for entry in entries if entry.path in chosen]
        self.windows, held = [], 0
        for entry in entries:
            start, end = entry.info.span(form.modalities)
            room = max(0.0, end - start - form.seconds - (0.5 / form.fps if form.fps else 0))
            if windows == "random":
                hop = 1 / (form.fps or 10)
                starts = [start + k * hop for k in range(floor(room / hop) + 1)]
            else:
                starts, _ = spread(start, room, form.seconds)
            self.windows += [(entry.path, at) for at in starts]
        held = len(self.windows)
        if num is not None and num > held:
            raise ValueError(
                f"{self.root} holds {held} windows of {form.seconds:.2f} s, not {num}: ask for "
                "fewer, or give more clips"
            )
        if num is not None and windows == "random":
            picked = np.random.default_rng(seed).permutation(held)[:num]
            self.windows = [self.windows[k] for k in sorted(picked)]
        elif num is not None and num < held:
            self.windows = sorted(sorted(self.windows, key=_place)[:num])
        self.names = [f"{path}@{at:.3f}" if at else path for path, at in self.windows]
        self._entries = {entry.path: entry for entry in entries}
        self._kind = f"{windows} windows"

    @cached_property
    def digest(self) -> str:
        """Of the windows, and of the names, sizes and ends of the files they are in."""
        files = sorted({path for path, _ in self.windows})
        content = [(path, self._entries[path].size, _ends(self.root / path)) for path in files]
        return digest(json.dumps([content, self.windows, asdict(self.form)]))

    @property
    def lines(self) -> list[tuple[str, str]]:
        codecs = Counter()
        used = {path for path, _ in self.windows}
        for path in used:
            info = self._entries[path].info
            codecs[" + ".join(c for c in (info.video_codec, info.audio_codec) if c)] += 1
        said = ", ".join(f"{name} ({count} files)" for name, count in codecs.most_common())
        lines = [("clips", f"{len(self.names)} {self._kind} of {len(used)} files")]
        lines += [("codec read", said)]
        silent = sum(not self._entries[path].audible for path in used)
        if silent and "audio" in self.form.modalities:
            lines.append(("silent files", str(silent)))
        return lines

    def read(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        return stacked([self._window(*self.windows[k]) for k in numbers])

    def _window(self, path, start):
        window = read_window(self.root / path, start, **self.form.request())
        window.pop("start")
        if "audio" in window:
            window["audio"] = pcm16(levelled(window["audio"], self.form.loudness)) * np.float32(
                SCALE
            )
        return window


class Items:
    """The fixed items of a dataset, as a model's own data are."""

    batch = BATCH

    def __init__(self, dataset: Dataset, form: Form, *, path: str, num: int | None = None):
        self.dataset, self.form, self.path = dataset, form, path
        if num is not None and num > len(dataset):
            raise ValueError(f"{path} holds {len(dataset)} clips, not {num}: ask for fewer")
        self.names = [f"{k:06d}" for k in range(len(dataset) if num is None else num)]

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
        self.names = [f"{k:06d}" for k in range(num)]
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


def form_of(root: Path, known: Form, *, cache: str | Path | None = None) -> Form:
    """A form filled in from the first file of a folder, where `known` leaves anything open.

    Raises ValueError if the files differ from each other in what is taken from them.
    """
    index = build_index(root, cache=cache)
    infos = {entry.path: entry.info for entry in index.entries if entry.info}
    if not infos:
        raise FileNotFoundError(f"no audio or video files in {root}")
    facts = {path: _facts(info, known) for path, info in infos.items()}
    kinds = Counter(facts.values())
    if len(kinds) > 1:
        (usual, count), (other, _) = kinds.most_common(2)
        odd = next(path for path, fact in facts.items() if fact == other)
        raise ValueError(
            f"{root} is mixed: {count} of {len(facts)} files have {_said(usual)}, but {odd} has "
            f"{_said(other)}: say what all are brought to (form.fps, form.frames, form.size, "
            "form.sample_rate, form.samples), or take the odd ones out"
        )
    return replace(known, **{k: v for k, v in facts.popitem()[1] if v is not None})


def _facts(info, known):
    """(key, value) of what a file says to the keys that `known` leaves open."""
    found = {}
    fps, rate = known.fps or info.fps, known.sample_rate or info.sample_rate
    if "video" in info.modalities:
        seconds = info.video_end - info.video_start
        found |= {"fps": round(fps, 3), "size": (info.height, info.width)}
        found |= {"frames": max(1, round(seconds * fps))}
    if "audio" in info.modalities:
        seconds = info.audio_end - info.audio_start
        frames = known.frames or found.get("frames")
        if frames:
            seconds = frames / fps
        found |= {"sample_rate": rate, "channels": min(info.channels, 2)}
        found |= {"samples": round(seconds * rate)}
    return tuple((k, v) for k, v in found.items() if getattr(known, k) is None)


def _said(facts):
    return ", ".join(f"{k}={v}" for k, v in facts) or "nothing"


def entries_of(root: Path, modalities: Sequence[str], form: Form, *, silent=False, cache=None):
    """The usable media files of a folder; an error that names the others, if there are any."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder of clips")
    index = build_index(root, cache=cache)
    if not index.entries:
        others = f" ({len(index.ignored)} other files)" if index.ignored else ""
        raise FileNotFoundError(f"no audio or video files in {root}{others}")
    entries = fullest(index.entries)
    bad = []
    for entry in entries:
        problem = entry.problem(modalities, form.seconds, form.fps or 0)
        if problem and not (silent and problem.startswith("silent")):
            bad.append(f"{entry.path} ({problem})")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise MediaError(
            f"{len(bad)} of {len(entries)} files in {root} cannot be measured: "
            f"{', '.join(bad[:3])}{more}; take them out, or choose metrics that do not need what "
            "they lack"
        )
    return entries


def _ends(path):
    """A hash of the first and last bytes of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        found.update(file.read(EDGE))
        file.seek(max(file.tell(), path.stat().st_size - EDGE))
        found.update(file.read(EDGE))
    return found.hexdigest()[:16]


def _place(window):
    return hashlib.sha256(
        f"{window[0]}@{window[1]:.6f}".encode("utf-8", "surrogateescape")
    ).digest()
