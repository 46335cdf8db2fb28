"""What a model makes of existing clips of any size and length, file by file and part by part."""

import json
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from avdiffusion.data.clips import levelled
from avdiffusion.data.given import entries_of
from avdiffusion.io import MediaError, read_clip, write_wav
from avdiffusion.media import Media
from avdiffusion.stream import CONTAINERS, place, rewrite
from avdiffusion.systems.system import System
from avdiffusion.writer import pixels, sound, write_whole

RECORD = "restored.json"
SOUND = ".wav"


class Existing:
    """The clips at `path`, a file or a folder with all below it, and where in `out` each goes.

    `files` are names below `root`, in order; `targets` have the same names but for their suffix,
    so that both can be compared. `modality` is what they have to have.
    """

    def __init__(self, path: str | Path, out: str | Path, *, modality: str = "video"):
        entries, self.ignored = entries_of(Path(path).expanduser())
        self.root, self.out = entries[0][0], Path(out)
        bad = {entry.path: entry.problem([modality], 0) for _, entry in entries}
        bad = [MediaError(reason, str(self.root / name)) for name, reason in bad.items() if reason]
        if bad:
            more = f"; {len(bad) - 1} more of {len(entries)} files" if len(bad) > 1 else ""
            raise ValueError(f"{bad[0]}{more}: take them out of {path}, or give a single file")
        self.files = [entry.path for _, entry in entries]
        self.targets = [self._target(name, modality) for name in self.files]
        for stem, names in groupby(sorted(self.targets), lambda file: file.with_suffix("")):
            if len(list(names)) > 1:
                raise ValueError(f"{path} holds several clips named {stem.name}: give them apart")
        sources = {(self.root / name).resolve() for name in self.files}
        here, results = self.root.resolve(), self.out.resolve()
        within = Path(path).expanduser().is_dir() and here in (results, *results.parents)
        if within or any(target.resolve() in sources for target in self.targets):
            raise ValueError(f"out={out} is where the clips are: results need another folder")

    def _target(self, name, modality):
        if modality == "audio":
            return (self.out / name).with_suffix(SOUND)
        return place(self.root / name, self.out / name)

    def claim(self, settings: Mapping[str, object], *, overwrite: bool) -> list[int]:
        """The numbers of clips still to be made, in a folder for results of these settings alone.

        Also of those that are older than their sources. A folder with results of other settings is
        refused, unless `overwrite`, which removes them.
        """
        record, made = self.out / RECORD, [file for file in self.targets if file.is_file()]
        settings = json.loads(json.dumps(dict(settings), default=str))
        if overwrite:
            for file in made:
                file.unlink()
        elif not record.is_file():
            if made:
                self._refuse(f"unknown settings ({RECORD} is missing)")
        elif (before := json.loads(record.read_text())) != settings and self._holds_clips():
            name = next(k for k in {**before, **settings} if before.get(k) != settings.get(k))
            self._refuse(
                f"other settings ({name}: {before.get(name)} there, {settings.get(name)} here)"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(record, (json.dumps(settings, indent=1) + "\n").encode())
        for part in self.out.rglob(".*.part.*"):  # of a run that was killed
            part.unlink()
        return [i for i in range(len(self.files)) if not self._made(i)]

    def _made(self, i):
        source, target = self.root / self.files[i], self.targets[i]
        return target.is_file() and target.stat().st_mtime >= source.stat().st_mtime

    def _holds_clips(self):
        """Whether an earlier run came to anything, whichever clips it was given."""
        files = (file for file in self.out.rglob("*") if not file.name.startswith("."))
        return any(file.suffix in (*CONTAINERS, SOUND) for file in files)

    def _refuse(self, what):
        raise ValueError(
            f"{self.out} already holds clips of {what}: choose another folder with out=, or "
            "overwrite=true to replace them"
        )


def restore(
    system: System,
    source: Path,
    target: Path,
    *,
    index: int,
    frames: int = 16,
    loudness: float | None = None,
    progress: Callable[[int], object] | None = None,
    **options: object,
) -> None:
    """Writes `source` with the picture that a system makes of it, as sample `index`, or its sound.

    Pictures are given to it `frames` at a time, sound as a whole, at the `loudness` of what it was
    trained on, and comes back at its own; `options` are those of `DiffusionSystem.conditioned`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if system.remakes.modality == "audio":
        rate, channels = int(system.rates["audio"]), system.shapes["audio"][0]
        heard = read_clip(source, sample_rate=rate, channels=channels, modalities=["audio"])
        audio = levelled(heard["audio"], loudness)
        gain = np.abs(audio).max() / max(np.abs(heard["audio"]).max(), 1e-9) or 1.0
        batch = system.remakes.batch(Media(audio=torch.from_numpy(audio)[None]))
        made = system.conditioned(batch, [index], **options)
        write_wav(target, sound(made.clips["audio"][0] / gain), sample_rate=rate)
        if progress:
            progress(1)
        return
    start = 0

    def change(video: np.ndarray) -> np.ndarray:
        nonlocal start
        clip = Media(video=torch.from_numpy(video)[None].float() / 127.5 - 1)
        batch = system.remakes.batch(clip)
        made = system.conditioned(batch, [index], start=start, **options)
        start += video.shape[1]
        return pixels(made.clips["video"][0])

    rewrite(source, target, change, frames=frames, progress=progress)
