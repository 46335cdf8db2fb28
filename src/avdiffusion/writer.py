"""Samples as files of one folder: clips, their strips, a record, a contact sheet and a page."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from avdiffusion import io
from avdiffusion.gallery import Entry, gallery_html
from avdiffusion.layout import Layout
from avdiffusion.mux import sound_of, write_with
from avdiffusion.strip import contact_sheet, strip

SHEET = 64  # strips on a contact sheet at most


@dataclass(frozen=True)
class Kept:
    """What was given of a sample: a file, where in it the sample begins and lasts, in seconds.

    `known`: modality to ranges of the sample, `whole`: the modalities that nothing was added to.
    """

    path: Path
    start: float
    seconds: float
    known: Mapping[str, Sequence] = field(default_factory=dict)
    whole: Sequence[str] = ()


class ClipWriter:
    """Writes samples as files of a folder that lie as a `Layout` says, and pages about them.

    Every file appears complete or not at all. `settings` is what the samples depend on
    (checkpoint hash, sampler, seed, guides): it is kept in `samples.json` from the start, and a
    folder that holds samples of other settings is refused unless `overwrite`, which empties it.
    `info` is shown beside it and may differ. `rates`: {"video": frames a second, "audio": Hz};
    formats of a modality that has no rate are left out. `stages`: how many models one after another
    make the samples; of several the seed's layout shows the first one's clips too.

    Of a sample with a modality that was given whole, the mp4 has the file's own picture (in its
    size and frame rate) or sound, and the wav its sound; other formats are as the model saw it.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        rates: Mapping[str, float],
        settings: Mapping[str, object],
        info: Mapping[str, object] | None = None,
        save: Sequence[str] = ("mp4", "wav", "png"),
        layout: str = "flat",
        stages: int = 1,
        overwrite: bool = False,
    ):
        self.out, self.rates = Path(out), {k: _exact(v) for k, v in rates.items()}
        self.layout = Layout(layout, self.out, save=save, modalities=self.rates, stages=stages)
        self.settings = json.loads(json.dumps(dict(settings), default=str))
        self.info = json.loads(json.dumps(dict(info or {}), default=str))
        self.samples = {}  # index to what samples.json says of it
        self.scores = {}
        self.strips = {}  # index to PNG bytes, where they are not in a file
        self.out.mkdir(parents=True, exist_ok=True)
        self.layout.sweep()
        if overwrite:
            self.layout.clear()
        self._continue()
        self._record()

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of `indices` of which a requested file is not there yet."""
        return [i for i in indices if not self.layout.complete(i)]

    def add(
        self,
        indices: Sequence[int],
        media: Mapping[str, Tensor],
        kept: Sequence[Kept | None] | None = None,
        base: Mapping[str, Tensor] | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        """Writes a batch: video [B, 3, T, H, W], audio [B, C, L], both in [-1, 1].

        Values outside are clipped and their share is recorded. `kept`: what was given of each.
        `base`: what the first of several stages made of them. `texts`: what each is of.
        """
        self.scores = {}  # of fewer samples
        for k, index in enumerate(indices):
            clip = {name: value[k] for name, value in media.items()}
            first = clip if base is None else {name: value[k] for name, value in base.items()}
            self._write(index, clip, kept[k] if kept else None, first)
            if texts:
                self.samples[index]["text"] = texts[k]
        self._record()

    def finish(
        self, *, scores: Mapping[str, Mapping[str, float]] | None = None, title: str = "Samples"
    ) -> Path:
        """Writes scores, contact sheet and page over all samples here; returns the page."""
        if scores is not None:
            rows = {key: {k: _finite(v) for k, v in row.items()} for key, row in scores.items()}
            self.scores = rows
        self._record()
        strips = {i: self._strip(i) for i in sorted(self.samples)[:SHEET]}
        shown = [i for i, png in strips.items() if png is not None]
        if shown:
            pictures = [Image.open(BytesIO(strips[i])) for i in shown]
            sheet = contact_sheet(pictures, [f"{i:06d}" for i in shown])
            write_whole(self.out / "contact.png", png(sheet))
        facts = {**self.settings, **self.info, **_rate_texts(self.rates)}
        page = gallery_html(title, self.entries(), settings=facts, scores=self.scores)
        return write_whole(self.out / "gallery.html", page.encode())

    def entries(self) -> list[Entry]:
        """All samples of the folder, in order, as a page shows them."""
        seed = f"seed {self.settings['seed']}" if "seed" in self.settings else ""

        def entry(i: int) -> Entry:
            said = self.samples[i].get("text", seed)
            return Entry(f"{i:06d}", said, self._player(i), self._strip(i))

        return [entry(i) for i in sorted(self.samples)]

    def _write(self, index, media, kept, base):
        outside = {name: ~(value.abs() <= 1) for name, value in media.items()}  # NaN too
        clipped = {name: round(float(mask.float().mean()), 6) for name, mask in outside.items()}
        video = pixels(media["video"]) if "video" in media else None
        audio = sound(media["audio"]) if "audio" in media else None
        fps, sample_rate = self.rates.get("video"), self.rates.get("audio")
        row = {"clipped": clipped}
        if kept:
            row["given"] = {"file": str(kept.path), "known": dict(kept.known)}
        for kind in self.layout.kinds:
            path = self.layout.file(index, kind)
            shown = pixels(base["video"]) if kind in ("base", "frames") else video
            if kind in ("mp4", "base") and kept and kept.whole:
                row["given"]["kept"] = self._write_kept(path, kept, shown, audio)
            elif kind in ("mp4", "base", "webm"):
                write = io.write_webm if kind == "webm" else io.write_mp4
                write(path, shown, audio, fps=fps, sample_rate=sample_rate)
            elif kind == "wav" and kept and "audio" in kept.whole:
                own, rate = sound_of(kept.path, kept.start, kept.seconds)
                io.write_wav(path, own, sample_rate=rate)
            elif kind == "wav":
                io.write_wav(path, audio, sample_rate=sample_rate)
            elif kind == "gif":
                io.write_gif(path, video, fps=fps)
            elif kind == "frames":
                io.write_frames(path, shown)
        picture = png(strip(video, audio, fps=fps, sample_rate=sample_rate))
        if "png" in self.layout.kinds:
            write_whole(self.layout.file(index, "png"), picture)
        elif len(self.strips) < SHEET:
            self.strips[index] = picture
        self.samples[index] = {"files": self.layout.files(index), **row}

    def _write_kept(self, path, kept, video, audio):
        """The mp4 with the file's own stream; says whether that was copied or encoded."""
        if "video" in kept.whole:
            keep, new = "video", {"audio": audio, "sample_rate": self.rates.get("audio")}
        else:
            keep, new = "audio", {"video": video, "fps": self.rates["video"]}
        how = write_with(path, kept.path, keep, start=kept.start, seconds=kept.seconds, **new)
        return {keep: how}

    def _continue(self):
        """Takes over what an earlier run wrote here, if its settings were the same."""
        found = self.layout.numbers()
        record = self.out / "samples.json"
        if not record.is_file():
            if found:
                self._refuse("clips of unknown settings (samples.json is missing)")
            return
        if not found:  # an earlier run came to nothing
            return
        before = json.loads(record.read_text())
        mine = {**self.settings, **self.rates, "layout": self.layout.name}
        theirs = {**before.get("settings", {}), **before.get("rates", {})}
        theirs["layout"] = before.get("layout", "flat")
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                there, here = json.dumps(theirs.get(name)), json.dumps(mine.get(name))
                self._refuse(f"samples of other settings ({name}: {there} there, {here} here)")
        self.scores = before.get("scores", {})
        known = {sample["index"]: sample for sample in before.get("samples", [])}
        for index in filter(self.layout.complete, found):
            row = {"clipped": {}, **known.get(index, {}), "files": self.layout.files(index)}
            self.samples[index] = {k: row[k] for k in row if k != "index"}

    def _refuse(self, what):
        raise ValueError(
            f"{self.out} already holds {what}: choose another folder with out=, "
            "or overwrite=true to replace them"
        )

    def _record(self):
        samples = [{"index": i, **self.samples[i]} for i in sorted(self.samples)]
        names = sorted({name for sample in samples for name in sample["clipped"]})
        record = {
            "settings": self.settings,
            "info": self.info,
            "rates": self.rates,
            "layout": self.layout.name,
            "scores": self.scores,
            "clipped": {n: _mean([s["clipped"].get(n, 0) for s in samples]) for n in names},
            "samples": samples,
        }
        write_whole(self.out / "samples.json", (json.dumps(record, indent=1) + "\n").encode())

    def _strip(self, index):
        if "png" in self.layout.names and (path := self.layout.file(index, "png")).is_file():
            return path.read_bytes()
        return self.strips.get(index)

    def _player(self, index):
        kinds = [kind for kind in ("mp4", "webm", "gif", "wav") if kind in self.layout.names]
        paths = (self.layout.file(index, kind) for kind in kinds)
        return next((path for path in paths if path.is_file()), None)


class Behind:
    """Context whose calls make those of `function`, one after another, in a thread of their own.

    A call returns at once unless `most` are waiting. What has failed there is raised at the next
    call, `check` or regular end, which waits for the rest; after an error none of that is begun.
    """

    def __init__(self, function: Callable[..., object], most: int = 2):
        self.function, self.most = function, most
        self.thread, self.waiting = ThreadPoolExecutor(1), deque()

    def __enter__(self) -> "Behind":
        return self

    def __call__(self, *args: object) -> None:
        while len(self.waiting) >= self.most:
            self.waiting.popleft().result()
        self.check()
        self.waiting.append(self.thread.submit(self.function, *args))

    def check(self) -> None:
        """Raises what has failed."""
        while self.waiting and self.waiting[0].done():
            self.waiting.popleft().result()

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self.check()


def pixels(video: Tensor) -> np.ndarray:
    """Video in [-1, 1] as uint8, rounded to the nearest level; values outside are clipped.

    Pixels stay what they are.
    """
    if video.dtype == torch.uint8:
        return video.numpy()
    return ((video.float().nan_to_num(0).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def sound(audio: Tensor) -> np.ndarray:
    """Audio as float32 clipped to [-1, 1], silence where it is not a number.

    Integers are 16-bit samples.
    """
    if audio.dtype == torch.int16:
        return audio.numpy() * np.float32(2.0**-15)
    return audio.float().nan_to_num(0).clamp(-1, 1).numpy()


def write_whole(path: Path, data: bytes) -> Path:
    """The file appears under its name only when all of it is on the disk."""
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=3)  # 7 % larger than at best, 4 times sooner
    return buffer.getvalue()


def _exact(rate):
    return int(rate) if float(rate).is_integer() else float(rate)


def _rate_texts(rates):
    units = {"video": "frames a second", "audio": "samples a second"}
    return {name: f"{rate:g} {units.get(name, 'a second')}" for name, rate in rates.items()}


def _finite(value):
    return float(value) if np.isfinite(value) else None


def _mean(values):
    return round(sum(values) / len(values), 6)
