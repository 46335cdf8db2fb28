"""Quality of super-resolution against what it costs, beside bicubic enlargement.

python benchmarks/restoration.py ckpt=RUN_FOLDER data=CLIPS
python benchmarks/restoration.py ckpt=last data=CLIPS num=64 "evaluations=[5,10,25]" out=quality

Clips of `frames` frames from the folder `data`, which the model has not learned from, are made
small as in its training, and large again: by every sampler with so many evaluations, and with noise
of its own for each frame in place of noise they share. Tables, figures and a picture go to `out`.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import processor
from omegaconf import OmegaConf
from samplers import named

from avdiffusion import checkpoint
from avdiffusion.callbacks.held_out import HeldOut
from avdiffusion.data.clips import Clips
from avdiffusion.data.degrade import Degrade, Degraded
from avdiffusion.metrics.quality import Flicker, Perceptual, Restoration
from avdiffusion.systems.codec import Identity
from avdiffusion.weights import MissingWeights
from avdiffusion.writer import pixels, write_whole

DEFAULTS = {
    "ckpt": "???",
    "data": "???",
    "num": 64,
    "frames": 16,
    "samplers": ["dpm_solver_2m", "dpm_solver_2m grid=trailing", "ddim"],  # of configs/sampler
    "evaluations": [5, 10, 15, 25],
    "micro_batch": 4,
    "seed": 0,
    "lpips": ["alex", "vgg"],  # networks whose weights are here; none: []
    "device": None,
    "trust": False,
    "out": None,
}
SHOWN = ("psnr", "ssim", "lpips_alex", "lpips_vgg", "flicker_error", "flicker")


def held_out(system, config):
    """Clips of the folder, degraded as the model has learned it."""
    trained = system.config["data"]
    clips = Clips(
        config.data,
        split="train",
        val_fraction=0,
        fps=trained["fps"],
        frames=config.frames,
        size=trained["size"],
        modalities=["video"],
        fit=trained["train"]["clips"].get("fit", "crop"),
        on_bad="skip",
    )
    # not built as the checkpoint says, which may name anything
    settings = {k: v for k, v in trained["train"]["degrade"].items() if k != "_target_"}
    return Degraded(clips, degrade=Degrade(**settings), num=config.num)


def measured(video, targets, rates, lpips):
    """Means over clips of all numbers of video in [-1, 1] or uint8 [N, 3, T, H, W]."""
    clips = {"video": pixels(torch.as_tensor(video))}
    found = Restoration()(clips, rates, targets) | Flicker()(clips, rates)
    for metric in lpips:
        found[f"lpips_{metric.net}"] = metric(clips, rates, targets)["lpips"]
    return {name: float(np.mean(values)) for name, values in found.items()}


def row(name, evaluations, noise, seconds, scores):
    found = {"clips": name, "evaluations": evaluations, "noise": noise, "seconds": seconds}
    found |= {key: scores[key] for key in SHOWN if key in scores}
    cells = (f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in found.items())
    print("  ".join(cells), flush=True)
    return found


def measure(system, config):
    """All rows, and the middle frames of some clips."""
    source = HeldOut(held_out(system, config), system)
    beside = source.beside(len(source.data))
    targets = {"video": beside.targets["video"].numpy()}
    lpips = [Perceptual(net=net, device=config.device) for net in config.lpips]

    def scored(video):
        return measured(video, targets, system.rates, lpips)

    rows = [
        row("real", 0, "", 0.0, scored(targets["video"])),
        row(beside.name, 0, "", 0.0, scored(beside.baseline["video"])),
    ]
    runs = [("shared", name, steps) for name in config.samplers for steps in config.evaluations]
    runs += [("independent", config.samplers[0], steps) for steps in config.evaluations[:2]]
    codecs, shown = {"shared": system.codec, "independent": Identity()}, None
    for noise, name, steps in runs:
        system.codec = codecs[noise]
        sampler = replace(named(name), steps=steps)
        options = {"micro_batch": config.micro_batch, "sampler": sampler, "seed": config.seed}
        start = time.perf_counter()
        parts = list(source.samples(range(len(source.data)), **options))
        seconds = (time.perf_counter() - start) / len(source.data)
        video = torch.cat([part.clips["video"] for part in parts])
        rows.append(row(name, parts[0].evaluations, noise, seconds, scored(video)))
        if steps == config.evaluations[-1] and shown is None:
            shown = beside.comparison({"video": pixels(video)})
    return rows, shown


def table(rows):
    """As Markdown; PSNR in dB, flicker in grey levels of 255, seconds a clip."""
    names = [name for name in rows[0] if name != "seconds"] + ["seconds"]
    lines = [names, ["---"] * len(names)]
    for each in rows:
        cells = (each[name] for name in names)
        lines.append([f"{v:.3g}" if isinstance(v, float) else str(v) for v in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(words=None):
    config = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli(sys.argv[1:] if words is None else words))
    path = checkpoint.find(config.ckpt)
    system = checkpoint.load(path, trust=config.trust, device=config.device)
    if not system.remakes:
        raise SystemExit(f"error: {path} makes clips of its own, not larger ones of others")
    out = Path(config.out or path.parent.parent / "restoration")
    out.mkdir(parents=True, exist_ok=True)
    try:
        rows, shown = measure(system, config)
    except (MissingWeights, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    about = {"machine": f"{processor()}, {torch.get_num_threads()} threads", "ckpt": str(path)}
    text = json.dumps({**about, **OmegaConf.to_container(config), "rows": rows}, indent=1)
    write_whole(out / "restoration.json", text.encode())
    write_whole(out / "restoration.md", (table(rows) + "\n").encode())
    shown.save(out / "restoration.png")
    print(f"\n{table(rows)}\n\n{out}")


if __name__ == "__main__":
    main()
