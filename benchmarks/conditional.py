"""How well a model of the toy discs makes one part of a clip for another, and goes on with one.

python benchmarks/conditional.py ckpt=last
python benchmarks/conditional.py ckpt=RUN_FOLDER num=64 sampler=ddpm seconds=10 json=out.json

Sound given: do the discs of the made pictures bounce where the given clicks are? Pictures given: do
the made clicks sound where the given discs bounce? F1 within one frame, against the same pictures
and sounds paired without guidance, and against pairs of different clips.
"""

import json
import sys
import time
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from avdiffusion import checkpoint
from avdiffusion.data.toy import Toy
from avdiffusion.diffusion.known import Reconstruct, Replace
from avdiffusion.media import Media
from avdiffusion.metrics.sync import toy_f1
from avdiffusion.systems.timeline import Blank

DEFAULTS = {"ckpt": "last", "num": "64", "sampler": "stored", "seconds": "10", "long_num": "16"}
DEFAULTS |= {"threads": "", "json": "", "micro_batch": "16"}


class Clips:
    """Toy clips no run has trained on, as what is known of samples `seconds` long."""

    def __init__(self, system, known, seconds=None):
        stored = system.config["data"]["train"]
        self.toy = Toy(**{k: v for k, v in stored.items() if k != "_target_"} | {"seed": 1_000_003})
        self.system, self.known, self.seconds = system, known, seconds

    def clip(self, i):
        item = self.toy[i]
        return {"video": torch.as_tensor(item["video"]) / 127.5 - 1, "audio": item["audio"]}

    def __getitem__(self, i):
        part = Blank(self.system.shapes, self.system.rates, self.seconds)
        for name in self.known:
            value = torch.as_tensor(self.clip(i)[name])
            part.values[name][:, : value.shape[1]] = value
            part.mask[name][: value.shape[1]] = True
        return part


def agreement(clips, rates):
    found = toy_f1(clips["video"], clips["audio"], rates["video"], int(rates["audio"]))
    return found["f1"], found["f1_mismatched"]


def seam(value, places):
    """Change from step to step over the seams, as a multiple of that everywhere else."""
    change = value.diff(dim=2).abs().transpose(1, 2).flatten(2).mean((0, 2))
    at = torch.zeros(len(change), dtype=torch.bool)
    at[[place - 1 for place in places]] = True
    return float(change[at].mean() / change[~at].mean())


def seams(steps, window, overlap):
    """Where windows begin to be filled in, in steps of the pictures."""
    places = [window]
    while places[-1] < steps:
        places.append(min(places[-1] - overlap, steps - window) + window)
    return places[:-1]


def measure(system, num, long_num, seconds, micro_batch, progress):
    """Rows (task, guide, what it says) of the table."""
    rates, rows = system.rates, {}
    guides = {"none": None, "replace": Replace(), "reconstruct": Reconstruct()}
    guides["reconstruct, strength 3"] = Reconstruct(strength=3.0)
    clips = Clips(system, [])
    real = [clips.clip(i) for i in range(num)]
    real = {k: torch.stack([torch.as_tensor(clip[k]) for clip in real]) for k in real[0]}
    free = system.sample(num, micro_batch=micro_batch, progress=progress)
    rows["both", "real clips"] = agreement(real, rates)
    rows["both", "made together"] = agreement(free, rates)
    for known, guide in product(("audio", "video"), guides):
        if guides[guide] is None:
            made = Media(free)
        else:
            chosen = [*system.guides, guides[guide]]
            given = Clips(system, [known])
            options = {"guides": chosen, "given": given, "micro_batch": micro_batch}
            made = system.sample(num, progress=progress, **options)
            if not torch.equal(made[known], real[known]):
                raise SystemExit(f"error: the given {known} was changed")
        rows[f"{known} given", guide] = agreement({**made, known: real[known]}, rates)
    window = system.shapes["video"][1]
    places = seams(round(seconds * rates["video"]), window, window // 2)
    for guide in ("replace", "reconstruct"):
        chosen = [*system.guides, guides[guide]]
        given = Clips(system, ["video", "audio"], seconds)
        options = {"guides": chosen, "given": given, "micro_batch": micro_batch}
        made = system.sample(long_num, progress=progress, **options)
        steps = made["video"].shape[2], made["audio"].shape[2]
        per_frame = steps[1] / steps[0]
        rows[f"{seconds:g} s from {window / rates['video']:g} s", guide] = (
            *agreement(made, rates),
            *steps,
            seam(made["video"], places),
            seam(made["audio"], [round(place * per_frame) for place in places]),
        )
    return rows


def table(rows):
    lines = [
        "| task | guide | F1 | F1 of different clips | frames, samples | seam: picture, sound |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for (task, guide), (f1, chance, *long) in rows.items():
        steps = f"{long[0]}, {long[1]}" if long else ""
        change = f"{long[2]:.2f}, {long[3]:.2f}" if long else ""
        lines.append(f"| {task} | {guide} | {f1:.2f} | {chance:.2f} | {steps} | {change} |")
    return "\n".join(lines)


def main(words):
    given = dict(word.partition("=")[::2] for word in words)
    unknown = given.keys() - DEFAULTS.keys()
    if unknown:
        raise SystemExit(f"error: {min(unknown)}= is none of {', '.join(DEFAULTS)}")
    options = DEFAULTS | given
    if options["threads"]:
        torch.set_num_threads(int(options["threads"]))
    replace = None
    if options["sampler"] != "stored":
        words = ["ckpt=x", f"sampler={options['sampler']}"]
        replace = {"sampler": checkpoint.compose(words, config="sample").sampler}
    system = checkpoint.load(checkpoint.find(options["ckpt"]), replace=replace)
    start = time.time()
    with tqdm(desc="states", leave=False) as bar:
        rows = measure(
            system,
            int(options["num"]),
            int(options["long_num"]),
            float(options["seconds"]),
            int(options["micro_batch"]),
            bar.update,
        )
    print(f"{system.sampler}; {options['num']} clips; {time.time() - start:.0f} s\n")
    print(table(rows))
    if options["json"]:
        text = json.dumps([[*key, *value] for key, value in rows.items()], indent=1)
        Path(options["json"]).write_text(text + "\n")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
