"""How the clip of a fixed seed changes while training, from the strips that lie in the folders."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from avdiffusion.strip import contact_sheet
from avdiffusion.writer import png, write_whole

ROWS = 10  # steps that a picture shows at most
WIDTH = 512  # pixels of each sample where several stand side by side


def evolution(samples: Path, numbers: Sequence[int]) -> Image.Image | None:
    """Sample by sample its strips at all steps, oldest on top, in `evolution/<number>.png`.

    `samples` is the folder that holds `step<7 digits>` and `final`; because their strips are what
    the pictures are made of, a run that goes on after a stop goes on with them as well. Returns
    the pictures side by side and smaller, or None where no strips were saved.
    """
    steps, beside = thinned(sampled_steps(samples)), {}
    (samples / "evolution").mkdir(exist_ok=True)
    for number in numbers:
        files = {step: folder / f"{number:06d}.png" for step, folder in steps}
        rows = {step: Image.open(file) for step, file in files.items() if file.is_file()}
        if rows:
            sheet = contact_sheet(list(rows.values()), [f"step {k}" for k in rows], columns=1)
            write_whole(samples / "evolution" / f"{number:06d}.png", png(sheet))
            height = round(sheet.height * WIDTH / sheet.width)
            beside[number] = sheet.resize((WIDTH, height), Image.Resampling.LANCZOS)
    if not beside:
        return None
    names = [f"{number:06d}" for number in beside]
    return contact_sheet(list(beside.values()), names, columns=len(beside))


def sampled_steps(samples: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything sampled so far, in order."""
    found = {}
    record = samples / "final" / "samples.json"
    if record.is_file():
        found[json.loads(record.read_text())["settings"]["step"]] = record.parent
    for folder in samples.glob("step*"):
        if re.fullmatch(r"step\d{7,}", folder.name):
            found[int(folder.name.removeprefix("step"))] = folder
    return sorted(found.items())


def thinned(steps: Sequence, count: int = ROWS) -> list:
    """At most `count` of them, evenly spaced, with the first and the last."""
    chosen = np.linspace(0, len(steps) - 1, min(count, len(steps)))
    return [steps[round(k)] for k in chosen]
