"""What extractors find of a set of clips, in one pass, kept as it comes."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from avdiffusion.data.index import digest
from avdiffusion.evaluation.sets import ClipSet
from avdiffusion.io import replacing
from avdiffusion.metrics.metric import Extractor, Found, Rates

VERSION = 1  # raised when an extractor comes to find other numbers under the same name


class Features:
    """What has been found of one set, in `folder`: a file for every extractor and batch of clips.

    Batches are always the same, so that a figure depends on neither the number of processes nor on
    a stop between. A file appears whole or not at all. `target`: the clips that those of the same
    place should be, for extractors that compare the two.
    """

    def __init__(
        self,
        clips: ClipSet,
        extractors: Sequence[Extractor],
        rates: Rates,
        folder: Path,
        *,
        target: ClipSet | None = None,
    ):
        self.clips, self.rates, self.target = clips, rates, target
        self.folder = folder / f"{version('avdiffusion')}-{VERSION}"
        self.extractors = {extractor.name: extractor for extractor in extractors}
        count = len(clips.names)
        size = clips.batch
        self.batches = [range(k, min(k + size, count)) for k in range(0, count, size)]

    def missing(self) -> list[int]:
        """Batches of which something is still to be found."""
        return [
            k
            for k in range(len(self.batches))
            if not all(self._file(name, k).is_file() for name in self.extractors)
        ]

    def find(self, batches: Sequence[int], progress: Callable[[int], object]) -> None:
        """Measures these batches; the next one is read meanwhile. `progress` gets clips done."""
        with ThreadPoolExecutor(1) as ahead:
            for k, clips, target in self._read(ahead, batches):
                for name, extractor in self.extractors.items():
                    path = self._file(name, k)
                    if path.is_file():
                        continue
                    given = (clips, self.rates) + ((target,) if extractor.paired else ())
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(path) as part, open(part, "wb") as file:
                        np.savez(file, **extractor(*given))
                progress(len(self.batches[k]))

    def all(self) -> dict[str, Found]:
        """Of every extractor, by its name, what it found of all clips in order."""
        found = {}
        for name, extractor in self.extractors.items():
            parts = [self._load(name, k) for k in range(len(self.batches))]
            found[name] = {
                field: np.concatenate([part[field] for part in parts]) for field in extractor.fields
            }
        return found

    def _read(self, ahead, batches) -> Iterator:
        waiting = None
        for k in [*batches, None]:
            task = None if k is None else (k, ahead.submit(self._clips, k))
            if waiting:
                yield waiting[0], *waiting[1].result()
            waiting = task

    def _clips(self, k):
        target = self.target and self.target.read(self.batches[k])
        return self.clips.read(self.batches[k]), target

    def _file(self, name, k):
        against = f"-{self.target.digest}" if self.target and self.extractors[name].paired else ""
        return self.folder / f"{self.clips.digest}{against}" / digest(name) / f"{k:05d}.npz"

    def _load(self, name, k):
        path = self._file(name, k)
        try:
            with np.load(path) as arrays:
                return {field: arrays[field] for field in self.extractors[name].fields}
        except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
            os.unlink(path)
            raise ValueError(f"{path} was damaged and is removed: run the command again") from error
