"""What an evaluation found as files: report.json, report.md and report.html."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from avdiffusion import io
from avdiffusion.evaluation.page import report_html
from avdiffusion.evaluation.sets import ClipSet
from avdiffusion.evaluation.text import report_markdown
from avdiffusion.gallery import Entry
from avdiffusion.metrics.alignment import drawn
from avdiffusion.metrics.metric import Figure, Found, Rates
from avdiffusion.strip import strip
from avdiffusion.writer import png, write_whole

PAIRS = 32  # nearest pairs that are told


def content(
    groups: Sequence[tuple[str, Sequence[Figure]]],
    sets: Mapping[str, ClipSet],
    found: Mapping[str, Found],
    **facts: object,
) -> dict:
    """The whole report in plain values; what is not finite is null.

    `found`: what each extractor found of the samples.
    """
    described = {
        place: {
            "path": clips.path,
            "count": len(clips.names),
            "hash": clips.digest,
            "lines": [list(line) for line in clips.lines],
        }
        for place, clips in sets.items()
    }
    listed = [
        {"title": title, "figures": [told(figure) for figure in figures]}
        for title, figures in groups
    ]
    return plain({**facts, "sets": described, "groups": listed, **shown(groups, sets, found)})


def told(figure: Figure) -> dict:
    """A figure's fields, and whether its power could not be had of the reference (`blind`)."""
    blind = figure.power is not None and not isfinite(figure.power)
    return {**asdict(figure), **({"blind": True} if blind else {})}


def shown(
    groups: Sequence[tuple[str, Sequence[Figure]]],
    sets: Mapping[str, ClipSet],
    found: Mapping[str, Found],
) -> dict:
    """Of the figures' details, what is told clip by clip: nearest pairs, scores, curves."""
    names, pairs = sets["samples"].names, []
    clips = [{"name": name, "scores": {}} for name in names]
    for figure in (figure for _, figures in groups for figure in figures):
        details = figure.details
        if "train" in details and "train" in sets:
            of_train = sets["train"].names
            columns = (details[key][:PAIRS] for key in ("sample", "train", "distance", "ratio"))
            pairs += [
                {"sample": names[a], "neighbour": of_train[b], "distance": d, "ratio": r}
                for a, b, d, r in zip(*columns, strict=True)
            ]
        for clip, score in zip(clips, details.get("clips", ()), strict=False):
            clip["scores"][figure.key] = score
    for events in found.values():
        if {"motion", "flux", "fps", "seconds"} <= events.keys():
            for k, clip in enumerate(clips):
                clip["curves"] = drawn(events, k)
    return {"pairs": pairs, "clips": clips}


def entry(clips: ClipSet, number: int, rates: Rates, name: str) -> Entry:
    """A clip of a set as a page shows it."""
    arrays = {k: v[0] for k, v in clips.read([number]).items()}
    video, audio = arrays.get("video"), arrays.get("audio")
    shape = {"fps": rates.get("video"), "sample_rate": rates.get("audio") and int(rates["audio"])}
    picture = png(strip(video, audio, **shape))
    clip = (
        wav(audio, shape["sample_rate"]) if video is None else io.mp4_bytes(video, audio, **shape)
    )
    return Entry(name, "", clip, picture)


def wav(audio: np.ndarray, sample_rate: int) -> bytes:
    """Sound alone as a file that browsers play."""
    with TemporaryDirectory() as folder:
        return io.write_wav(Path(folder, "clip.wav"), audio, sample_rate=sample_rate).read_bytes()


def entries(
    report: Mapping, sets: Mapping[str, ClipSet], rates: Rates, most: int
) -> dict[str, Entry]:
    """Players of the first samples and, for the nearest pairs, of both; `most` samples in all."""
    names = sets["samples"].names
    pairs = report["pairs"][: most // 2]
    wanted = list(dict.fromkeys([p["sample"] for p in pairs] + list(names[:most])))[:most]
    players = {n: entry(sets["samples"], names.index(n), rates, n) for n in wanted}
    for pair in report["pairs"]:
        other = f"/train/{pair['neighbour']}"
        if pair["sample"] in players and other not in players:
            number = sets["train"].names.index(pair["neighbour"])
            players[other] = entry(sets["train"], number, rates, pair["neighbour"])
    return players


def write(folder: Path, report: Mapping, players: Mapping[str, Entry]) -> Path:
    """Writes the three files, each whole; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_whole(folder / "report.md", report_markdown(report).encode())
    return write_whole(folder / "report.html", report_html(report, players).encode())


def plain(value: object) -> object:
    """As JSON has it."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not isfinite(value):
        return None
    return value
