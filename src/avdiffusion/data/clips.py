"""Windows of picture and sound from a folder of media files."""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from avdiffusion.data.index import build_index, cache_folder, digest, side
from avdiffusion.data.windows import KeptFile, Windows, as_item, keep, spread
from avdiffusion.io import DECODER, MediaError, pcm16, read_window

MAX_GAIN = 30.0  # dB: the noise of a pause is not to become a storm
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


class Clips:
    """Clips of `frames` pictures and `samples` of sound that begin at the same time.

    `[i]` is one of the windows that divide the files evenly, always the same. `draw(i, rng)` is a
    random window of the same file, mirrored with probability `flip` (and stereo with it). Items:
    `video` uint8 [3, T, H, W], `audio` int16 [C, L] (full scale 32768), `index`.

    With `keep` every window is decoded once, into a folder of `cache`, and read from there ever
    after. The fixed windows are the same to the bit; `draw` then chooses among those kept of the
    file, which begin about `hop` seconds apart, by default the length of a window.

    `loudness` (dB of full scale) is the RMS level each window is brought to, by at most 30 dB and
    without clipping. A file is in `val` by a hash of its path below `root`, so it stays there when
    others come; `val_fraction` of the files are. Unreadable, silent and too short files and those
    without a modality are refused with `on_bad="error"`, left out and reported with `"skip"`.
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
        modalities: Sequence[str] = ("video", "audio"),
        fit: str = "crop",
        flip: float = 0.5,
        loudness: float | None = None,
        on_bad: str = "error",
        keep: bool = False,
        hop: float | None = None,
        cache: str | Path | None = None,
        index_workers: int | None = None,
    ):
        if hop is not None and hop <= 0:
            raise ValueError(f"hop={hop} has to be above 0")
        _one_of("channels", channels, (1, 2))
        _one_of("fit", fit, ("crop", "letterbox"))
        _one_of("on_bad", on_bad, ("error", "skip"))
        for modality in modalities or [None]:
            _one_of("modalities", modality, ("video", "audio"))
        self.root = Path(root).expanduser()
        self.flip, self.loudness, self.on_bad = flip, loudness, on_bad
        self.request = {"modalities": tuple(modalities)}
        if "video" in modalities:
            self.request |= {"fps": fps, "frames": frames, "size": tuple(size), "fit": fit}
            seconds = frames / fps
        if "audio" in modalities:
            self.request |= {"sample_rate": sample_rate, "samples": samples, "channels": channels}
            seconds = samples / sample_rate
        if len(self.request["modalities"]) == 2 and samples != round(sample_rate * frames / fps):
            raise ValueError(
                f"{frames} frames at {fps:g} fps last {frames / fps:.4f} s, {samples} samples at "
                f"{sample_rate} Hz {seconds:.4f} s: {round(sample_rate * frames / fps)} samples fit"
            )

        if not self.root.is_dir():
            raise FileNotFoundError(f"data.root is no folder: {self.root}")
        index = build_index(self.root, cache=cache, workers=index_workers)
        if not index.entries:
            others = f" ({len(index.ignored)} other files)" if index.ignored else ""
            raise FileNotFoundError(f"no audio or video files in {self.root}{others}")
        usable = self._usable(index, seconds)
        chosen = side({entry.path for entry in usable}, split, val_fraction, self.root)
        self.files, self.windows, self._spans, self._kept = [], [], [], None
        for entry in usable:
            if entry.path in chosen:
                start, room = self._span(entry, seconds)
                starts, _ = spread(start, room, seconds)
                self.windows += [(len(self.files), s) for s in starts]
                self._spans.append((start, room))
                self.files.append(entry.path)
        if keep:
            self._kept = self._keep(usable, seconds, hop, cache, index_workers, split, val_fraction)
        # in shared memory: the workers of a loader tell each other and the main process
        self._broken = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()
        if self._bad:
            log.warning("%s; the first: %s", self.report, _listed(self._bad))
        else:
            log.info("%s", self.report)

    def _usable(self, index, seconds):
        modalities, fps = self.request["modalities"], self.request.get("fps", 0)
        problems = {e.path: e.problem(modalities, seconds, fps) for e in index.entries}
        self._bad = [(path, problem) for path, problem in problems.items() if problem]
        usable = [entry for entry in index.entries if not problems[entry.path]]
        self._used, self._ignored = len(usable), index.ignored
        if self._bad and (not usable or self.on_bad == "error"):
            remedy = "; data.train.on_bad=skip leaves them out" if usable else ""
            raise ValueError(
                f"{len(self._bad)} of {len(problems)} files in {self.root} cannot be used: "
                f"{_listed(self._bad)}{remedy}"
            )
        return usable

    def _span(self, entry, seconds):
        """The first start of a window in a file, and how much later the last one may be."""
        start, end = entry.info.span(self.request["modalities"])
        snapping = 0.5 / self.request["fps"] if "fps" in self.request else 0
        return start, max(0.0, end - start - seconds - snapping)

    def _keep(self, usable, seconds, hop, cache, workers, split, val_fraction):
        """The dataset of kept windows; both sides of a split share one folder."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in self.request.items()}
        settings |= {"loudness": self.loudness, "hop": hop, "decoder": [DECODER, version("av")]}
        for name in {"fps", "loudness", "hop"} & settings.keys():  # -20 is -20.0
            settings[name] = settings[name] and float(settings[name])
        family = f"windows-{digest(os.path.realpath(self.root))}"
        folder = cache_folder(cache) / f"{family}-{digest(json.dumps(settings))}"
        files = [
            KeptFile(e.path, e.size, e.mtime, *spread(*self._span(e, seconds), seconds, hop))
            for e in usable
        ]
        keep(
            folder,
            files,
            settings,
            self._window,
            root=self.root,
            on_bad=self.on_bad,
            workers=workers,
        )
        for other in sorted(folder.parent.glob(f"{family}-*")):
            if other != folder:
                with suppress(OSError):  # another process may be building there
                    size = sum(file.stat().st_size for file in other.iterdir()) / 1e9
                    log.info("windows with other settings, %.2f GB, lie in %s", size, other)
        shape = {k: v for k, v in self.request.items() if k not in ("modalities", "fit")}
        kept = Windows(folder, split=split, val_fraction=val_fraction, flip=self.flip, **shape)
        if kept.bad and self.on_bad == "error":
            raise ValueError(
                f"{len(kept.bad)} of {len(files)} files in {self.root} cannot be used: "
                f"{_listed(kept.bad)}; data.train.on_bad=skip leaves them out"
            )
        self._bad, self._used = self._bad + kept.bad, self._used - len(kept.bad)
        self.files, self.windows = kept.files, kept.windows
        return kept

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
        if self._kept is not None:
            return self._kept[i]
        for j in range(len(self)):
            number = (i + j) % len(self)
            item = self._read(number, self.windows[number][1], False)
            if item is not None:
                return item
        raise MediaError(f"every file of {self.root} has become unreadable")

    def draw(self, i: int, rng: np.random.Generator) -> dict:
        """A random window of the file of window i; if that is broken and skipped, of another's."""
        if self._kept is not None:
            return self._kept.draw(i, rng)
        for _ in range(len(self) + 100):
            start, room = self._spans[self.windows[i][0]]
            place, coin = rng.random(2)
            item = self._read(i, start + place * room, coin < self.flip)
            if item is not None:
                return item
            i = int(rng.integers(len(self)))
        raise MediaError(f"the files of {self.root} have become unreadable")

    def _read(self, i, start, mirror):
        number = self.windows[i][0]
        if self._broken[number]:
            return None
        try:
            window = self._window(self.files[number], start)
        except (MediaError, OSError) as error:
            if self.on_bad == "error":
                raise
            self._broken[number] = True
            log.warning("left out from now on, other clips take its place: %s", error)
            return None
        return as_item(i, window, mirror)

    def _window(self, path, start):
        """Arrays of one window: `video` uint8, `audio` int16, levelled before it is rounded."""
        window = read_window(self.root / path, start, **self.request)
        window.pop("start")
        if "audio" in window:
            window["audio"] = pcm16(levelled(window["audio"], self.loudness))
        return window


def levelled(audio, loudness):
    peak = np.abs(audio).max()
    if loudness is None or peak == 0:
        return audio
    level = 10 * np.log10(np.mean(np.square(audio, dtype=np.float64)))
    return audio * np.float32(min(10 ** (min(loudness - level, MAX_GAIN) / 20), 1 / peak))


def _listed(bad, most=3):
    more = f" and {len(bad) - most} more" if len(bad) > most else ""
    return ", ".join(f"{path} ({reason})" for path, reason in bad[:most]) + more


def _one_of(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(map(str, choices))}, not {value}")
