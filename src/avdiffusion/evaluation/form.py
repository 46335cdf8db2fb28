"""What every clip is brought to before it is measured."""

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from avdiffusion.data.index import build_index, fullest


@dataclass(frozen=True, kw_only=True)
class Form:
    """What every clip is brought to before it is measured; no modality without its numbers.

    `size` is (height, width), `fit` crop or letterbox, `loudness` an RMS level in dB (null: as it
    is) of real clips alone: what a model makes is judged as loud as it is.
    """

    fps: float | None = None
    frames: int | None = None
    size: tuple[int, int] | None = None
    sample_rate: int | None = None
    samples: int | None = None
    channels: int | None = None
    fit: str = "crop"
    loudness: float | None = None

    def __post_init__(self):
        if self.fit not in ("crop", "letterbox"):
            raise ValueError(f"form.fit={self.fit!r} is neither crop nor letterbox")
        if self.frames and self.samples and self.fps and self.sample_rate:
            fits = round(self.sample_rate * self.frames / self.fps)
            if abs(self.samples - fits) > self.sample_rate / self.fps / 2:
                raise ValueError(
                    f"{self.frames} frames at {self.fps:g} fps last {self.frames / self.fps:.4g} "
                    f"s, {self.samples} samples at {self.sample_rate} Hz "
                    f"{self.samples / self.sample_rate:.4g} s: form.samples={fits} fits"
                )

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

    def only(self, modalities: Collection[str]) -> "Form":
        """Without the numbers of other modalities."""
        cut = {} if "video" in modalities else {"fps": None, "frames": None, "size": None}
        if "audio" not in modalities:
            cut |= {"sample_rate": None, "samples": None, "channels": None}
        return replace(self, **cut)

    def lines(self) -> list[tuple[str, str]]:
        """In words, for a report."""
        said = []
        if "video" in self.modalities:
            height, width = self.size
            scaled = f"{self.fit}, exact bicubic of swscale (antialiased)"
            said += [("frames", f"{self.frames} at {self.fps:g} frames a second")]
            said += [("picture", f"{width}x{height}, {scaled}")]
        if "audio" in self.modalities:
            ways = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
            said += [("sound", f"{self.samples} samples at {self.sample_rate} Hz, {ways}")]
        return said


def form_of(root: Path, known: Form, *, cache: str | Path | None = None) -> Form:
    """A form filled in from the first file of a folder, where `known` leaves anything open.

    Raises ValueError if the files differ from each other in what is taken from them.
    """
    index = build_index(root, cache=cache)
    infos = {entry.path: entry.info for entry in fullest(index.entries) if entry.info}
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
