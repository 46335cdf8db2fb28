"""What the media files of a folder hold, found once and kept in the user's cache."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from avdiffusion.io import EDGE, ClipInfo, MediaError, audible, probe

VERSION = 1  # of the cached facts
MEDIA = re.compile(
    r"\.(3gp|asf|avi|flv|gif|m2ts|m4v|mkv|mov|mp4|mpeg|mpg|mts|mxf|ogv|ts|vob|webm|wmv"
    r"|aac|ac3|aif|aiff|caf|flac|m4a|mka|mp2|mp3|oga|ogg|opus|wav|wma)$",
    re.IGNORECASE,
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One file: its path below the root, its facts, or the error that reading it gave."""

    path: str
    size: int
    mtime: int
    info: ClipInfo | None = None
    audible: bool = False
    error: str | None = None

    def problem(self, modalities: Sequence[str], seconds: float, fps: float = 0) -> str | None:
        """Why no window of `seconds` can be had of it, if none can."""
        if self.info is None:
            return self.error
        for modality in modalities:
            if modality in self.info.missing:
                return self.info.missing[modality]
        if "audio" in modalities and not self.audible:
            return "silent from beginning to end"
        start, end = self.info.span(modalities)
        if end - start < seconds - min(EDGE, 0.5 / fps if fps else EDGE):
            return f"shorter than the window of {seconds:.2f} s: {max(0.0, end - start):.2f} s"
        return None


@dataclass(frozen=True)
class Index:
    """The media files of a folder in sorted order, and the files that are something else."""

    root: Path
    entries: list[Entry]
    ignored: list[str]


def build_index(
    root: str | Path, *, cache: str | Path | None = None, workers: int | None = None
) -> Index:
    """Probe every media file below `root` that is new or whose size or time has changed.

    `cache` is a folder, by default `avdiffusion` in $XDG_CACHE_HOME or ~/.cache.
    """
    root = Path(root)
    media, ignored = files_below(root, MEDIA)
    store = cache_folder(cache) / f"index-{digest(os.path.realpath(root))}.json"
    known = _stored(store)
    stats = {path: (root / path).stat() for path in media}
    entries = {
        path: known[path]
        for path, stat in stats.items()
        if path in known
        and (known[path].size, known[path].mtime) == (stat.st_size, stat.st_mtime_ns)
    }
    new = [path for path in media if path not in entries]
    if new:
        with (
            ThreadPoolExecutor(workers or os.cpu_count()) as pool,
            tqdm(total=len(new), desc=f"reading {root}", unit="file", disable=None) as bar,
        ):
            for entry in pool.map(lambda path: examined(root, path, stats[path]), new):
                entries[entry.path] = entry
                bar.update()
    if entries.keys() != known.keys() or new:
        _store(store, entries.values())
    return Index(root, [entries[path] for path in media], ignored)


def examined(root: Path, path: str, stat: os.stat_result) -> Entry:
    """One file below `root`, opened and listened to."""
    facts = {}
    try:
        facts["info"] = probe(root / path)
        facts["audible"] = "audio" in facts["info"].modalities and audible(root / path)
    except MediaError as error:
        facts = {"error": error.reason}
    except OSError as error:
        facts = {"error": f"unreadable: {error.strerror or error}"}
    return Entry(path, stat.st_size, stat.st_mtime_ns, **facts)


def fullest(entries: Sequence[Entry]) -> list[Entry]:
    """Of files that differ in their suffix alone, the one that holds most: mp4 beside its wav."""
    kept = {}
    for entry in entries:
        stem = str(Path(entry.path).with_suffix(""))
        best = kept.setdefault(stem, entry)
        if entry.info and (not best.info or len(entry.info.modalities) > len(best.info.modalities)):
            kept[stem] = entry
    if len(kept) < len(entries):
        log.info("%d files beside fuller ones of their name left out", len(entries) - len(kept))
    return list(kept.values())


def side(paths: set[str], split: str, val_fraction: float, root: Path) -> set[str]:
    """The paths of one side, never none of two files with a fraction between 0 and 1."""
    if split not in ("train", "val", "all"):
        raise ValueError(f"split is one of train, val, all, not {split}")
    if split == "all":
        return paths
    place = {
        path: int(hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest(), 16) / 2**256
        for path in paths
    }
    ordered = sorted(paths, key=place.get)
    count = sum(place[path] < val_fraction for path in ordered)
    if 0 < val_fraction < 1:
        count = min(max(count, 1), len(ordered) - 1)
    chosen = set(ordered[:count] if split == "val" else ordered[count:])
    if not chosen:
        raise ValueError(
            f"of {len(paths)} files in {root} none is left for {split} at {val_fraction=:g}"
        )
    return chosen


def cache_folder(cache: str | Path | None) -> Path:
    """The folder asked for, by default the user's."""
    if cache is not None:
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avdiffusion"


def digest(text: str) -> str:
    """16 hexadecimal digits that tell texts apart."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def files_below(root: Path, wanted: re.Pattern) -> tuple[list[str], list[str]]:
    """Paths below `root`, also through links: those wanted, and others; dot files are left out."""
    found, others, seen = [], [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                path = Path(folder, name).relative_to(root).as_posix()
                (found if wanted.search(name) else others).append(path)
    return sorted(found), sorted(others)


def _stored(path):
    try:
        stored = json.loads(path.read_text("utf-8"))
        if stored["version"] != VERSION:
            return {}
        return {
            entry["path"]: Entry(**entry | {"info": entry["info"] and ClipInfo(**entry["info"])})
            for entry in stored["entries"]
        }
    except (OSError, ValueError, KeyError, TypeError):  # absent, damaged or of another version
        return {}


def _store(path, entries):
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"version": VERSION, "entries": [asdict(e) for e in entries]}))
        os.replace(part, path)
    except OSError as error:
        log.warning("the index is not kept for the next time: %s", error)
        with suppress(OSError):
            part.unlink()
