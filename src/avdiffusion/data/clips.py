"""Windows of picture and sound from a folder of media files."""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np

from avdiffusion.data.files import Timed, one_of, refusal
from avdiffusion.data.index import build_index, cache_folder, digest
from avdiffusion.data.windows import KeptFile, Windows, keep, spread
from avdiffusion.io import DECODER, pcm16, read_window

MAX_GAIN = 30.0  # dB: the noise of a pause is not to become a storm
log = logging.getLogger(__name__)


class Clips(Timed):
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
        sample_rate: int | None = 16000,
        samples: int | None = 25600,
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
        one_of("channels", channels, (1, 2))
        one_of("fit", fit, ("crop", "letterbox"))
        one_of("on_bad", on_bad, ("error", "skip"))
        for modality in modalities or [None]:
            one_of("modalities", modality, ("video", "audio"))
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
        fps = self.request.get("fps", 0)
        problems = {e.path: e.problem(modalities, seconds, fps) for e in index.entries}
        chosen = self._chosen(problems, index.ignored, split, val_fraction)
        usable = [entry for entry in index.entries if not problems[entry.path]]
        self._lay({e.path: self._span(e, seconds) for e in usable if e.path in chosen}, seconds)
        self._kept = None
        if keep:
            self._kept = self._keep(usable, seconds, hop, cache, index_workers, split, val_fraction)
        looking = "video" in modalities
        shown = [(e.info.height, e.info.width) for e in usable if looking and e.path in chosen]
        self._begin(shown, size, fit)

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
            raise ValueError(refusal(kept.bad, len(files), self.root))
        self._bad, self._used = self._bad + kept.bad, self._used - len(kept.bad)
        self.files, self.windows = kept.files, kept.windows
        return kept

    def __getitem__(self, i: int) -> dict:
        return super().__getitem__(i) if self._kept is None else self._kept[i]

    def draw(self, i: int, rng: np.random.Generator) -> dict:
        """A random window of the file of window i; if that is broken and skipped, of another's."""
        return super().draw(i, rng) if self._kept is None else self._kept.draw(i, rng)

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
