"""Clips with words: what is heard in each file, from a table, a text beside it, or its folder."""

import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from avdiffusion.data.clips import Clips
from avdiffusion.data.files import Report, listed, one_of
from avdiffusion.data.index import MEDIA, files_below
from avdiffusion.io import MediaError

PAUSE = 33  # of 32768, -60 dB: a window that stays below it is a pause
TRIES = 8  # windows drawn of a file, until one is no pause
log = logging.getLogger(__name__)


class Captioned(Dataset):
    """The items of `clips`, each with a caption of the file it is of: `text`, a str.

    `captions` is a .csv, .tsv or .jsonl file, whose `file_column` names files relative to the
    folder of the clips (or by their bare names, where these are unique) and whose `column` says
    what is in them; a file may have several rows. Without it a file's captions are the lines of
    the .txt of its name beside it, or else the name of the folder it is in. All are put into
    `template`, such as "the song of {}".

    `[i]` has the first caption of its file; `draw(i, rng)` a random one, and passes over windows
    that are pauses, in which nothing is heard of it. Files without a caption are refused with
    `on_missing="error"`, left out and counted with `"skip"`.
    """

    def __init__(
        self,
        clips: Clips,
        *,
        captions: str | Path | None = None,
        column: str = "caption",
        file_column: str = "file",
        template: str = "{}",
        on_missing: str = "error",
    ):
        one_of("on_missing", on_missing, ("error", "skip"))
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}}, where the caption is to stand")
        if captions is None:
            found = {file: beside(clips.root, file) for file in clips.files}
        else:
            found = by_file(table(Path(captions).expanduser(), file_column, column), clips.root)
        self.clips = clips
        self.texts = {
            file: [template.replace("{}", text) for text in found[file]]
            for file in clips.files
            if found.get(file)
        }
        self._check(on_missing)
        files = [clips.files[number] for number, _ in clips.windows]
        self._numbers = [k for k, file in enumerate(files) if file in self.texts]
        self._places = {number: i for i, number in enumerate(self._numbers)}

    def _check(self, on_missing):
        missing = [(file, "no caption") for file in self.clips.files if file not in self.texts]
        if not missing:
            return
        what = f"{len(missing)} of {len(self.clips.files)} files in {self.clips.root}"
        if on_missing == "error" or not self.texts:
            remedy = "; data.train.on_missing=skip leaves them out" if self.texts else ""
            raise ValueError(
                f"{what} have no caption: {listed(missing)}. Give each a row in data.train.captions"
                f" or, with none, a .txt of its name or a folder that says what it is{remedy}"
            )
        log.warning("%s left out: %s", what, listed(missing))

    @property
    def report(self) -> Report:
        """How the folder fared; of captions it says nothing."""
        return self.clips.report

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        for j in range(len(self)):
            item = self.clips[self._numbers[(i + j) % len(self)]]
            if item["index"] in self._places:
                return self._with_text(item, 0)
        raise MediaError(f"every file with a caption in {self.clips.root} has become unreadable")

    def draw(self, i: int, rng: np.random.Generator) -> dict:
        """A random window of the file of item i, with any caption of the file that was read."""
        for attempt in range(len(self) + 100):
            item = self.clips.draw(self._numbers[i], rng)
            if item["index"] not in self._places:  # of no caption, in the place of a broken file's
                i = int(rng.integers(len(self)))
            elif attempt >= TRIES or not is_pause(item):
                return self._with_text(item, rng.random())
        raise MediaError(f"the files with a caption in {self.clips.root} have become unreadable")

    def _with_text(self, item, share):
        """The item under its number here, with the caption that lies at a share of the list."""
        number, _ = self.clips.windows[item["index"]]
        texts = self.texts[self.clips.files[number]]
        text = texts[int(share * len(texts))]
        return {**item, "text": text, "index": self._places[item["index"]]}


def is_pause(item: dict[str, Tensor]) -> bool:
    """Whether there is sound, and next to nothing to be heard of it."""
    return "audio" in item and int(item["audio"].int().abs().max()) < PAUSE


def beside(root: Path, file: str) -> list[str]:
    """The lines of the .txt beside a file, or the name of its folder below `root`, if it has one.

    An empty .txt is a caption that is missing.
    """
    text = (root / file).with_suffix(".txt")
    if text.is_file():
        return [line.strip() for line in text.read_text("utf-8-sig").splitlines() if line.strip()]
    return [name.replace("_", " ") for name in PurePosixPath(file).parent.parts[-1:]]


def table(path: Path, file_column: str, column: str) -> list[tuple[str, str]]:
    """(file, text) of every row that has a text."""
    if not path.is_file():
        raise FileNotFoundError(f"data.train.captions is no file: {path}")
    one_of("the suffix of captions", path.suffix, (".csv", ".tsv", ".jsonl"))
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            rows = [_object(path, n, line) for n, line in enumerate(file, 1) if line.strip()]
        else:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    for number, row in enumerate(rows, 1):
        for name in (file_column, column):
            if name not in row:
                raise ValueError(
                    f"row {number} of {path} has no {name!r} but {', '.join(map(str, row))}: "
                    "data.train.column and data.train.file_column name what it has"
                )
    pairs = [(str(row[file_column]).strip(), str(row[column] or "").strip()) for row in rows]
    pairs = [pair for pair in pairs if pair[1]]
    if not pairs:
        raise ValueError(f"{path} has no row with a text in its {column!r}")
    return pairs


def _object(path, number, line):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"line {number} of {path} is no object with names and values")
    return row


def by_file(rows: Sequence[tuple[str, str]], root: Path) -> dict[str, list[str]]:
    """The texts of each media file below `root`, of rows that name a file and a text.

    Rows whose file is not there are counted; it is an error if no row has one.
    """
    media, _ = files_below(root, MEDIA)
    names = {}
    for file in media:
        names.setdefault(PurePosixPath(file).name, []).append(file)
    texts, lost = {file: [] for file in media}, []
    for name, text in rows:
        path = PurePosixPath(name).as_posix()
        meant = [path] if path in texts else names.get(path, [])
        if len(meant) == 1:
            texts[meant[0]].append(text)
        else:
            lost.append((name, f"{len(meant)} of that name" if meant else "not there"))
    if len(lost) == len(rows):
        raise ValueError(
            f"none of {len(rows)} captions is of a file in {root}: {listed(lost)}. Files are named "
            "relative to that folder"
        )
    if lost:
        log.warning(
            "%d of %d captions have no file in %s: %s", len(lost), len(rows), root, listed(lost)
        )
    return texts
