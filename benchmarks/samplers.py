"""Error of every sampler against what it costs, for a checkpoint of yours.

python benchmarks/samplers.py ckpt=RUN_FOLDER
python benchmarks/samplers.py ckpt=last threads=1 num=16 "budgets=[10,20,50]" out=samplers
python benchmarks/samplers.py ckpt=last "samplers=[ddim,unipc order=2 grid=log_snr]"
python benchmarks/samplers.py ckpt=last num=256 reference=100 "metrics=[toy_f1]" "samplers=[ddim]"

Samples of one start noise are compared with a reference of `reference` evaluations; both tables,
a picture and all figures go to `out` (the run's `samplers/`). docs/samplers.md says what they mean.
"""

import json
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from chart import COLOURS, Panel, Style, draw
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from avdiffusion import checkpoint
from avdiffusion.diffusion.diffusion import Prediction
from avdiffusion.diffusion.noise import Noise
from avdiffusion.media import Media
from avdiffusion.samplers.dpm_solver import DPMSolver
from avdiffusion.samplers.sampler import last
from avdiffusion.samplers.unipc import UniPC
from avdiffusion.writer import pixels, sound

# Names of configs/sampler and settings to put on them.
SAMPLERS = [
    "ddim",
    "ddim grid=log_snr",
    "euler",
    "heun",
    "dpm_solver",
    "dpm_solver form=data",
    "dpm_solver_2m grid=log_snr",
    "dpm_solver_2m grid=log_snr denoise_last=true",
    "dpm_solver_2m",
    "dpm_solver_3m grid=log_snr",
    "dpm_solver_3m grid=log_snr denoise_last=true",
    "dpm_solver_3m",
    "unipc order=2 grid=log_snr",
    "unipc order=2 variant=bh1 grid=log_snr",
    "unipc grid=log_snr",
    "unipc order=2",
    "unipc order=2 variant=bh1",
    "unipc",
    "dpm_solver method=adaptive",
    "dpm_solver_pp",
    "ddpm",
    "sde_dpm_solver grid=log_snr",
    "sde_dpm_solver",
    "euler_ancestral",
    "heun churn=10",
]
DEFAULTS = {
    "ckpt": "???",
    "num": 24,
    "seed": 0,
    "budgets": [5, 8, 10, 15, 20, 30, 50],
    "tolerances": [4.0, 1.0, 0.25],  # of adaptive samplers, in those of their config
    "samplers": SAMPLERS,
    "reference": 1000,
    "metrics": [],  # of configs/val_metrics
    "micro_batch": 32,
    "threads": None,
    "device": None,
    "trust": False,
    "out": None,
}
SEEDS = 3  # other seeds whose clips are compared with the reference's
QUIET = 1e-8  # power of the spectrum below which nothing is heard or seen


class Ends:
    """A sampler down to where the trained noise ends, and one evaluation more, whose x0 it gives.

    `left` holds what it had before that, batch by batch.
    """

    together = True

    def __init__(self, sampler):
        self.sampler, self.left = replace(sampler, steps=sampler.steps - 1), []

    def __call__(self, denoise, x, path, *, noise):
        for state in self.sampler(denoise, x, path, noise=noise, t_end=path.t_min):
            x = state
            yield x
        self.left.append(x)
        yield denoise(x, torch.tensor(path.t_min, dtype=torch.float64)).x0


def joined(parts):
    """Batches as one."""
    return Media({k: torch.cat([part[k] for part in parts]) for k in parts[0]})


def reference(system, sampler, count, **options):
    """Clips at the two ends a sampler may have, by name."""
    ends = Ends(sampler)
    parts = [part.clips for part in system.samples(range(count), sampler=ends, **options)]
    left = joined([system.task.decode(part) for part in ends.left])
    return {"data": joined(parts), "t_min": left.map(lambda v: v[:count].float().cpu())}


def dry(sampler, path):
    """Evaluations of a run over nothing, how often it drew noise, and the end it comes to."""
    noise, calls = Noise(0, [0]), 0

    def denoise(x, t):
        nonlocal calls
        calls += 1
        return Prediction(torch.zeros_like(x), x, None)

    last(sampler(denoise, torch.ones(1, 1), path, noise=noise))
    left = path.sigma(sampler.times(path)[-1]) > 0 and not getattr(sampler, "denoise_last", False)
    return calls, noise.calls, "t_min" if left else "data"


def within(sampler, budget, path):
    """The sampler with the most steps whose evaluations the budget allows; None if one is more."""
    for steps in range(budget, 0, -1):
        fitting = replace(sampler, steps=steps)
        if dry(fitting, path)[0] <= budget:
            return fitting
    return None


def settings(sampler, config, path):
    """(budget or tolerance, sampler) to run."""
    if getattr(sampler, "method", None) == "adaptive":
        for share in config.tolerances:
            yield share, replace(sampler, atol=sampler.atol * share, rtol=sampler.rtol * share)
        return
    for budget in config.budgets:
        if fitting := within(sampler, budget, path):
            yield budget, fitting


def error(x, truth, deviation):
    """Root mean square difference of each modality in deviations of the reference."""
    return {k: float((x[k] - truth[k]).square().mean().sqrt() / deviation[k]) for k in x}


def spectrum(x):
    """log10 of the power along the last axis, in 13 bands or less: [B, ...] to float64 [B, N]."""
    power = torch.fft.rfft(x.double(), norm="ortho").abs().square().flatten(1, -2).mean(1)
    edges = np.unique(np.geomspace(1, power.shape[-1], 13).round().astype(int)).tolist()
    bands = [power[:, a:b].mean(1) for a, b in zip([0, *edges], edges, strict=False)]
    return torch.stack(bands, 1).clamp(min=QUIET).log10()


def energy_distance(a, b):
    """Between the laws of two sets [N, D]: 2 E|a - b| - E|a - a'| - E|b - b'|, unbiased.

    In mean distances within `b`. Samples of one number may share their noise: no such pair counts.
    """

    def mean(distances):
        return (distances.sum() - distances.diagonal().sum()) / (distances.numel() - len(distances))

    between, within_a, within_b = (mean(torch.cdist(u, v)) for u, v in ((a, b), (a, a), (b, b)))
    return float((2 * between - within_a - within_b) / within_b)


def distance(x, truth):
    """Energy distance of each modality's log spectra."""
    return {k: energy_distance(spectrum(x[k]), spectrum(truth[k])) for k in x}


def scores(clips, metrics, rates):
    kinds = {"video": pixels, "audio": sound}
    media = {k: kinds[k](v) for k, v in clips.items() if k in kinds}
    found = {}
    for metric in metrics:
        found |= {key: float(value) for key, value in metric(media, rates).items()}
    return found


def clocks(system):
    """Readings of which the one that advances less tells the time: others may use the machine."""
    read = [time.perf_counter()]
    return read if system.device.type == "cuda" else [*read, time.process_time()]


def run(system, sampler, config, options):
    """Clips, evaluations of each, seconds of each."""
    start = clocks(system)
    parts = list(system.samples(range(config.num), sampler=sampler, **options))
    spent = min(b - a for a, b in zip(start, clocks(system), strict=True))
    evaluations = sum(part.evaluations * len(part.index) for part in parts)
    return joined([part.clips for part in parts]), evaluations / config.num, spent / config.num


def named(words):
    """A sampler of the configs with some of its settings changed."""
    name, *changes = words.split()
    changes = [f"sampler.{change}" for change in changes]
    composed = checkpoint.compose(["ckpt=x", f"sampler={name}", *changes], config="sample")
    return checkpoint.build(composed.sampler)


def measure(system, config):
    """Everything, as what goes to samplers.json."""
    samplers = {words: named(words) for words in config.samplers}
    chosen = f"val_metrics=[{','.join(config.metrics)}]"
    nodes = checkpoint.compose(["~exp", chosen]).val_metrics if config.metrics else {}
    metrics = [checkpoint.build(node) for node in nodes.values()]

    options = {"seed": config.seed, "micro_batch": min(config.micro_batch, config.num)}
    system.sample(options["micro_batch"], sampler=DPMSolver(steps=2), **options)  # warm
    truth = reference(system, DPMSolver(steps=config.reference), config.num, **options)
    deviation = {k: float(v.std()) for k, v in truth["data"].items()}
    some = max(config.num // 4, 1)
    other = reference(system, UniPC(steps=config.reference, order=3), some, **options)
    agree = {e: error(other[e], truth[e].map(lambda v: v[:some]), deviation) for e in truth}
    quick, floors = DPMSolver(steps=min(config.reference, 100)), []
    for seed in range(config.seed + 1, config.seed + 1 + SEEDS):
        again = reference(system, quick, config.num, **{**options, "seed": seed})
        floors.append(distance(again["data"], truth["data"]))

    path, rows = system.model.path, []
    for words, sampler in samplers.items():
        for budget, fitting in settings(sampler, config, path):
            clips, evaluations, seconds = run(system, fitting, config, options)
            _, draws, end = dry(fitting, path)
            row = {
                "sampler": words,
                "budget": budget,
                "steps": fitting.steps,
                "adaptive": getattr(fitting, "method", None) == "adaptive",
                "evaluations": evaluations,
                "seconds": seconds,
                "end": end,
                "error": None if draws else error(clips, truth[end], deviation),
                "distance": distance(clips, truth["data"]),
                "scores": scores(clips, metrics, system.rates),
            }
            rows.append(row)
            kinds = [row[kind] or {} for kind in ("error", "distance", "scores")]
            figures = "  ".join(f"{k} {v:8.4f}" for kind in kinds for k, v in kind.items())
            print(f"{words:32} {evaluations:6.1f} {seconds:7.3f} s  {figures}", flush=True)
    return {
        "machine": machine(system),
        "deviation": deviation,
        "agree": agree,
        "gap": error(truth["t_min"], truth["data"], deviation),
        "floor": {k: max(abs(each[k]) for each in floors) for k in deviation},
        "scores": scores(truth["data"], metrics, system.rates),
        "rows": rows,
    }


def machine(system):
    """What the seconds are of."""
    if system.device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    processor = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{processor}, {threads} thread{'s' if threads > 1 else ''}, "
        f"torch {torch.__version__.partition('+')[0]}"
    )


def short(value):
    """Two or three digits of it."""
    digits = next((d for d, least in enumerate((10, 1, 0.1)) if abs(value) >= least), 3)
    return f"{value:.{digits}f}"


def table(rows, kind, scale=1.0, form=short, beside=False):
    """Samplers as rows, budgets as columns; `beside`: also where they end, and their time."""
    rows = [row for row in rows if not row["adaptive"] and row[kind]]
    if not rows:
        return ""
    budgets = sorted({row["budget"] for row in rows})
    head = [" / ".join(rows[0][kind]), *map(str, budgets), *["end", "ms"] * beside]
    lines = [head, ["---"] * len(head)]
    for words in dict.fromkeys(row["sampler"] for row in rows):
        own = {row["budget"]: row for row in rows if row["sampler"] == words}
        cells = {
            b: " / ".join(form(scale * v) for v in row[kind].values()) for b, row in own.items()
        }
        line = [f"`{words}`", *(cells.get(budget, "") for budget in budgets)]
        if beside:
            least = min(row["seconds"] / row["evaluations"] for row in own.values())
            line += [next(iter(own.values()))["end"], f"{1000 * least:.1f}"]
        lines.append(line)
    return markdown(lines)


def markdown(lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def adaptive_table(rows):
    rows = [row for row in rows if row["adaptive"]]
    if not rows:
        return ""
    head = ["adaptive", "tolerances", "evaluations", "s", "error, %", "distance"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        off = " / ".join(short(100 * v) for v in row["error"].values())
        far = " / ".join(f"{v:.3f}" for v in row["distance"].values())
        cost = [f"{row['evaluations']:.1f}", f"{row['seconds']:.2f}"]
        lines.append([f"`{row['sampler']}`", f"x {row['budget']:g}", *cost, off, far])
    return markdown(lines)


def report(found, config):
    """The tables, and what they are to be read with."""
    rows, batch = found["rows"], min(config.micro_batch, config.num)

    def listed(figures, scale=1.0, form=short):
        return ", ".join(f"{k} {form(scale * v)}" for k, v in figures.items())

    agree, gap = found["agree"], found["gap"]
    parts = [
        f"{config.num} clips of seed {config.seed}, {batch} at a time, on {found['machine']}.",
        f"Error: root mean square difference from {config.reference} evaluations of DPM-Solver++ "
        "2M, from the same noise to the same end (data or t_min), in % of the reference's "
        f"deviation ({listed(found['deviation'])}). The same from UniPC-3: "
        f"{listed(agree['data'], 100, '{:.4f}'.format)} at the data, "
        f"{listed(agree['t_min'], 100, '{:.4f}'.format)} at t_min. Between the two ends: "
        f"{listed(gap, 100)}.",
        table(rows, "error", 100),
        "Distance: energy distance between the log spectra of these clips and of the reference's "
        f"at the data. Of other seeds of the reference: up to {listed(found['floor'])}. "
        "ms: milliseconds per evaluation and clip.",
        table(rows, "distance", form="{:.3f}".format, beside=True),
        adaptive_table(rows),
    ]
    if found["scores"]:
        parts += [f"Scores. Of the reference: {listed(found['scores'])}.", table(rows, "scores")]
    return "\n\n".join(part for part in parts if part) + "\n"


def picture(found, config, file):
    """Error and distance over evaluations, and error over seconds; a column per modality."""
    names = list(dict.fromkeys(row["sampler"] for row in found["rows"]))
    families = list(dict.fromkeys(name.split()[0] for name in names))
    styles = {}
    for name in names:
        family = name.split()[0]
        drawn = any(row["error"] is None for row in found["rows"] if row["sampler"] == name)
        colour = COLOURS[families.index(family) % len(COLOURS)]
        styles[name] = Style(colour, sum(s.split()[0] == family for s in styles), drawn)

    def curves(x, kind, modality):
        points = {}
        for row in found["rows"]:
            if row[kind]:
                points.setdefault(row["sampler"], []).append((row[x], row[kind][modality]))
        return points

    def panels(kind, x, label, y):
        return [
            Panel(
                modality,
                label,
                y,
                curves(x, kind, modality),
                config.budgets if x == "evaluations" else (),
                found["floor"][modality] if kind == "distance" else None,
            )
            for modality in found["deviation"]
            if curves(x, kind, modality)
        ]

    relative = "error, in deviations of the reference"
    rows = [
        panels("error", "evaluations", "evaluations of the network", relative),
        panels("distance", "evaluations", "evaluations of the network", "distance of log spectra"),
        panels("error", "seconds", f"seconds per clip ({found['machine']})", relative),
    ]
    head = f"{config.num} clips against {config.reference} evaluations; broken lines draw noise"
    draw(file, [row for row in rows if row], styles, head)


def main(words):
    config = OmegaConf.create(DEFAULTS)
    OmegaConf.set_struct(config, True)
    try:
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(words))
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.ckpt is None:
            raise ValueError("ckpt is needed: give it as ckpt=...")
        file = checkpoint.find(config.ckpt)
        system = checkpoint.load(file, device=config.device, trust=config.trust)
        folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
        out = Path(config.out or folder / "samplers")
        out.mkdir(parents=True, exist_ok=True)
        found = measure(system, config)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as stopped:
        raise SystemExit(f"error: {checkpoint.message(stopped)}") from stopped
    (out / "samplers.json").write_text(
        json.dumps({"arguments": OmegaConf.to_container(config), **found}, indent=1)
    )
    (out / "samplers.md").write_text(report(found, config))
    picture(found, config, out / "samplers.png")
    print(f"\n{report(found, config)}\n{out}/samplers.png")


if __name__ == "__main__":
    main(sys.argv[1:])
