"""What synchrony scores are worth: how well each tells real pairs from spoiled ones.

python -m avdiffusion.metrics.report --toy
python -m avdiffusion.metrics.report --folder DIR --folder DIR --num 256 --json FILE --markdown FILE
python -m avdiffusion.metrics.report --folder DIR --fps 25 --frames 75
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from avdiffusion.data.clips import Clips
from avdiffusion.data.toy import KINDS, Toy
from avdiffusion.metrics.alignment import ONSET_F1
from avdiffusion.metrics.events import Events
from avdiffusion.metrics.power import SPOILED, auroc, interval
from avdiffusion.metrics.synchrony import Synchrony

RATE, SIDE = 16000, 64


def measured(
    name: str, dataset: Toy | Clips, num: int, fps: float, *, resamples: int = 200, seed: int = 0
) -> dict:
    """The AUROC of each score under each way to spoil the sound, of up to `num` clips of a dataset.

    Taken evenly from all of it. `scores` is key to name to [AUROC, low, high], `none` the clips in
    which a score finds nothing to compare. For onset F1 the target is the real sound itself.
    """
    events = Events()
    chosen = np.unique(np.linspace(0, len(dataset) - 1, num).round().astype(int)).tolist()
    found, sounds = [], []
    for i in tqdm(chosen, desc=name, unit="clip", disable=None):
        item = dataset[i]
        video, audio = item["video"].numpy()[None], item["audio"].numpy()[None]
        sounds.append(audio if audio.dtype == np.float32 else audio.astype(np.float32) / 32768)
        found.append(events({"video": video, "audio": sounds[-1]}, {"video": fps, "audio": RATE}))
    real = {key: np.concatenate([one[key] for one in found]) for key in events.fields}
    real["target"] = real["onsets"]
    audio, frames = np.concatenate(sounds), real["flow"].shape[1] + 1

    scores = {score.key: score for score in (*Synchrony(events).scores, ONSET_F1)}
    right = {key: score.agreement(real, real) for key, score in scores.items()}
    table = {key: {} for key in scores}
    for k, (how, spoil) in enumerate(SPOILED.items()):
        heard = spoil(audio, RATE, np.random.default_rng([seed, k]))
        heard = {**real, **events.heard(heard, fps, RATE, frames)}
        for key, score in scores.items():
            a, b = right[key], score.agreement(real, heard)
            ends = interval(lambda at, a=a, b=b: auroc(a[at], b[at]), len(a), resamples, seed)
            value = auroc(a, b)
            table[key][how] = [value if np.isfinite(value) else None, *ends]
    return {
        "data": name,
        "clips": len(chosen),
        "fps": fps,
        "frames": frames,
        "scores": table,
        "none": {key: int((~np.isfinite(values)).sum()) for key, values in right.items()},
    }


def markdown(results: Sequence[dict]) -> str:
    """The tables, one for each of the datasets, as a page has them."""
    parts = []
    for result in results:
        none = {key: count for key, count in result["none"].items() if count}
        said = "; without a number: " + ", ".join(f"{k} {n}" for k, n in none.items())
        parts += [
            f"**{result['data']}**, {result['clips']} clips of {result['frames']} frames at "
            f"{result['fps']:g} fps{said if none else ''}\n",
            "| | " + " | ".join(SPOILED) + " |",
            "|---" * (len(SPOILED) + 1) + "|",
        ]
        for key, row in result["scores"].items():
            parts.append(f"| {key} | " + " | ".join(_cell(*row[how]) for how in SPOILED) + " |")
        parts.append("")
    return "\n".join(parts)


def _cell(value, low, high):
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" ({low:.2f}–{high:.2f})" if low is not None else "")


def _datasets(given):
    samples = round(RATE * given.frames / given.fps)
    asked = {"fps": given.fps, "frames": given.frames, "size": (SIDE, SIDE)}
    asked |= {"sample_rate": RATE, "samples": samples}
    if given.toy or not given.folder:
        for kind in KINDS:
            yield f"toy {kind}", Toy(num=given.num, kind=kind, **asked)
    for folder in given.folder:
        yield "/".join(Path(folder).parts[-2:]), Clips(folder, split="all", on_bad="skip", **asked)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m avdiffusion.metrics.report",
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--toy", action="store_true", help="all kinds of toy clips (the default)")
    parser.add_argument("--folder", action="append", default=[], help="of clips; may be repeated")
    parser.add_argument("--num", type=int, default=256, help="clips of each, 256")
    parser.add_argument("--fps", type=float, default=10, help="frames a second, 10")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip, 16")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    given = parser.parse_args(words)
    try:
        results = [measured(name, data, given.num, given.fps) for name, data in _datasets(given)]
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    if given.json:
        given.json.write_text(json.dumps(results, indent=1), "utf-8")
    if given.markdown:
        given.markdown.write_text(markdown(results), "utf-8")
    sys.stdout.write(markdown(results))


if __name__ == "__main__":
    main()
