"""Where the files of samples lie in their folder: side by side, or as in the seed's folders."""

import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

NAMES = {  # layout, format and kind of file to its name, in which {:06d} is the sample's number
    "flat": {kind: {kind: f"{{:06d}}.{kind}"} for kind in ("mp4", "webm", "gif", "wav", "png")},
    "seed": {
        "mp4": {"base": "original/{:06d}.mp4", "mp4": "sr_mp4/{:06d}.mp4"},
        "wav": {"wav": "audios/{:06d}.wav"},
        "png": {"frames": "img/{:06d}"},
    },
}
FOLDERS = ("original", "sr_mp4", "audios", "img")
NEEDS = {"wav": {"audio"}, "png": set()}  # all other kinds need video
SAMPLE = re.compile(
    r"\d{6,}\.(mp4|webm|gif|wav|png)|(original|sr_mp4)/\d{6,}\.mp4|audios/\d{6,}\.wav|img/\d{6,}"
)
PART = re.compile(rf"(({'|'.join(FOLDERS)})/)?\..*\.part.*")
PAGES = ("contact.png", "gallery.html", "samples.json")


class Layout:
    """The files of a folder of samples: which `kinds` are written of each, and where they lie.

    flat: `000000.mp4`, `.webm`, `.gif`, `.wav` and `.png`, the strip. seed, that of MM-Diffusion's
    scripts: `original/000000.mp4`, of the first stage (kind `base` if there is a second, whose mp4
    is `sr_mp4/000000.mp4`), `audios/000000.wav`, and the first stage's frames in `img/000000/`.
    """

    def __init__(
        self,
        name: str,
        out: Path,
        *,
        save: Sequence[str],
        modalities: Collection[str],
        stages: int = 1,
    ):
        if name not in NAMES:
            raise ValueError(f"layout={name} is none of {', '.join(NAMES)}")
        formats = NAMES[name]
        unknown = [form for form in save if form not in formats]
        if unknown:
            where = "" if name == "flat" else f", which layout={name} has"
            wrong = f"{unknown[0]!r} is none of {', '.join(formats)}{where}"
            raise ValueError(f"save={list(save)}: {wrong}")
        self.name, self.out = name, out
        self.names = {kind: file for kinds in formats.values() for kind, file in kinds.items()}
        if stages == 1 and "base" in self.names:
            self.names["mp4"] = self.names.pop("base")
        asked = [kind for form in save for kind in formats[form] if kind in self.names]
        self.kinds = [kind for kind in asked if NEEDS.get(kind, {"video"}) <= set(modalities)]
        if not self.kinds:
            raise ValueError(f"save={list(save)} leaves nothing to write for {sorted(modalities)}")

    def file(self, index: int, kind: str) -> Path:
        return self.out / self.names[kind].format(index)

    def files(self, index: int) -> list[str]:
        """The names of a sample's files that are there, also of kinds that are not written now."""
        names = [name.format(index) for name in self.names.values()]
        return [name for name in names if (self.out / name).exists()]

    def complete(self, index: int) -> bool:
        return all(self.file(index, kind).exists() for kind in self.kinds)

    def numbers(self) -> set[int]:
        """The samples of which any file is there, in whatever layout."""
        return {int(path.stem) for path in self._matching(SAMPLE)}

    def sweep(self) -> None:
        """Removes what was being written when a run was killed."""
        _remove(self._matching(PART))

    def clear(self) -> None:
        """Removes all samples, in whatever layout, and the pages about them."""
        _remove([*self._matching(SAMPLE), *(self.out / page for page in PAGES)])
        for folder in FOLDERS:
            if (self.out / folder).is_dir() and not any((self.out / folder).iterdir()):
                (self.out / folder).rmdir()

    def _matching(self, pattern):
        paths = [*self.out.glob("*"), *self.out.glob("*/*")]
        return [path for path in paths if pattern.fullmatch(path.relative_to(self.out).as_posix())]


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
