"""Judge clips: distances to real ones, synchrony, memorisation; a report with intervals and floors.

python evaluate.py samples=CLIPS reference=REAL_CLIPS
python evaluate.py ckpt=RUN_FOLDER num=1024 "metrics=[fvd,kvd,fad,kad,sync,memorisation]"
python evaluate.py samples=CLIPS target=ORIGINALS "metrics=[psnr,ssim,lpips]"
python evaluate.py ckpt=best reference=REAL_CLIPS protocol=mmdiffusion
torchrun --nproc_per_node=4 evaluate.py samples=CLIPS reference=REAL_CLIPS
"""

import hashlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from time import monotonic

import hydra
import torch
from omegaconf import DictConfig
from torch import distributed

from avdiffusion import checkpoint, memory
from avdiffusion.callbacks.evaluated import log_report
from avdiffusion.data.index import cache_folder
from avdiffusion.evaluation import report, run
from avdiffusion.evaluation.sets import ClipSet, Files, Form, Items, Sampled, form_of
from avdiffusion.metrics.power import NEEDED
from avdiffusion.systems.diffusion import DiffusionSystem
from avdiffusion.systems.step import Step

log = logging.getLogger("avdiffusion")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SAMPLES = 256  # of a checkpoint, unless told


def evaluate(config: DictConfig) -> None:
    started = monotonic()
    memory.keep_freed()
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    if (config.samples is None) == (config.ckpt is None):
        raise ValueError("what is to be judged? Give a folder, samples=DIR, or a model, ckpt=PATH")
    system, path = None, None
    if config.ckpt is not None:
        path = checkpoint.find(config.ckpt)
        chosen = {"sampler": config.sampler, "guide": config.guide}
        system = checkpoint.load(path, trust=config.trust, device=config.device, replace=chosen)
    metrics = {name: checkpoint.build(node) for name, node in config.metrics.items()}
    if not metrics:
        raise ValueError('metrics=[] leaves nothing to measure: name some, "metrics=[fvd,sync]"')
    form = form_asked(config, system)
    sets = clip_sets(config, metrics, form, system, path)
    rates, target = form.rates, None
    if config.target is not None:
        target = Files(config.target, form, silent=True, cache=config.cache)
        target = run.Ordered(target, run.paired(sets["samples"], target))
    run.checked(metrics, sets, target, rates)
    if WORLD > 1:
        distributed.init_process_group("gloo", timeout=timedelta(days=7))
    kept = cache_folder(config.cache) / "features"
    found = run.measured(metrics, sets, rates, kept, target=target, rank=RANK, world=WORLD)
    if WORLD > 1:
        distributed.destroy_process_group()
    if RANK:
        return
    options = {name: config[name] for name in ("seed", "resamples", "allow_small")}
    groups = run.figures(metrics, found, **options)
    told = report.content(
        groups,
        sets,
        found["samples"],
        title=f"Evaluation of {sets['samples'].path}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version("avdiffusion"),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        seconds=round(monotonic() - started, 1),
        protocol={"name": config.protocol.name, "lines": form.lines()},
        warnings=[*config.protocol.notes, *warnings(groups, sets)],
    )
    players = report.entries(told, sets, rates, config.show)
    out = folder(config, path)
    page = report.write(out, told, players)
    if config.logger:
        config.paths.run = config.paths.run or str(out)
        loggers = [checkpoint.build(node) for node in config.logger.values()]
        log_report(filter(None, loggers), told, players, checkpoint.plain(config))
    log.info("%s\n\nopen %s", summary(groups), page)


def form_asked(config: DictConfig, system: DiffusionSystem | None) -> Form:
    """What all clips are brought to: what is set, else the model's own, else the first sample's."""
    asked = {
        key: value for key, value in checkpoint.plain(config.form).items() if value is not None
    }
    if "size" in asked:
        asked["size"] = tuple(asked["size"])
    if system is not None:
        own = of_model(system)
        form = Form(**{**own, **asked})
        if any(own[key] != getattr(form, key) for key in own if key not in ("fit", "loudness")):
            raise ValueError(
                "a checkpoint's samples are judged as the model makes them, "
                f"{', '.join(' '.join(line) for line in Form(**own).lines())}: leave form as it "
                "is, or sample into a folder first and judge that with samples=DIR"
            )
        return form
    root = Path(config.samples).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"samples={root} is no folder of clips")
    record = root / "samples.json"
    made = json.loads(record.read_text()).get("info", {}) if record.is_file() else {}
    own = {key: made[key] for key in ("fit", "loudness") if made.get(key) is not None}
    return form_of(root, Form(**{**own, **asked}), cache=config.cache)


def of_model(system: DiffusionSystem) -> dict:
    """The form of a model's clips, and what its data were brought to."""
    found, trained = {}, system.config["data"].get("train") or {}
    if "video" in system.shapes:
        _, frames, height, width = system.shapes["video"]
        found |= {"fps": system.rates["video"], "frames": frames, "size": (height, width)}
    if "audio" in system.shapes:
        channels, samples = system.shapes["audio"]
        found |= {"channels": channels, "samples": samples}
        found |= {"sample_rate": int(system.rates["audio"])}
    own = {key: trained[key] for key in ("fit", "loudness") if trained.get(key) is not None}
    return found | own


def clip_sets(
    config: DictConfig,
    metrics: Mapping,
    form: Form,
    system: DiffusionSystem | None,
    path: Path | None,
) -> dict[str, ClipSet]:
    """The samples and what they are compared with, as far as any metric looks at it."""
    common = {"cache": config.cache, "seed": config.seed}
    sets: dict[str, ClipSet] = {}
    if system is None:
        sets["samples"] = Files(config.samples, form, num=config.num, silent=True, **common)
    else:
        sets["samples"] = sampled(config, system, path)
    count = len(sets["samples"].names)
    limits = {"reference": config.reference_num, "real": config.reference_num}
    limits["train"] = config.train_num
    for place in ("reference", "real", "train"):
        if not any(run.looks(metric, place) for metric in metrics.values()):
            continue
        limit = limits[place] if limits[place] is not None else count
        own = "train" if place == "train" or not config.held_out else "val"
        windows = config.windows if place != "train" else "disjoint"
        options = {"windows": windows, **common}
        if config[place] is not None:
            sets[place] = limited(config[place], form, limit, **options)
        elif system is not None and place != "real":
            sets[place] = own_clips(system, own, form, limit, **options)
    return sets


def own_clips(
    system: DiffusionSystem, side: str, form: Form, most: int, **options: object
) -> ClipSet:
    """The clips a checkpoint was validated or trained with, if they are there."""
    node = system.config["data"].get(side)
    target = str((node or {}).get("_target_", ""))
    if not target.startswith("avdiffusion.data."):
        raise ValueError(
            f"the checkpoint's {side} clips are no data of ours: give folders, reference=DIR"
        )
    if target.endswith(".Clips"):
        split = {"split": side, "val_fraction": node["val_fraction"]}
        return limited(node["root"], form, most, **split, **options)
    if replace(form, **of_model(system)) != form:
        raise ValueError(
            f"the checkpoint's {side} clips come as it was trained with them: leave form as it is"
        )
    dataset = checkpoint.build({**node, "flip": 0.0} if "flip" in node else node)
    path = f"{node.get('root') or target.rpartition('.')[2]} ({side})"
    return Items(dataset, form, path=path, num=min(most, len(dataset)))


def limited(root: str, form: Form, most: int, **options: object) -> Files:
    """The windows of a folder, or `most` of them."""
    clips = Files(root, form, **options)
    return clips if len(clips.names) <= most else Files(root, form, num=most, **options)


def sampled(config: DictConfig, system: DiffusionSystem, path: Path) -> ClipSet:
    """A checkpoint's samples."""
    step = Step(precision=config.precision)
    settings = {
        "checkpoint": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        "sampler": system.config["sampler"],
        "guides": system.config["guide"],
        "seed": config.seed,
        "micro_batch": config.micro_batch,
        **step.settings(),
    }
    settings["threads"] = torch.get_num_threads()

    def sample(numbers):
        return system.sample(
            index=numbers, seed=config.seed, micro_batch=config.micro_batch, step=step
        )

    return Sampled(
        sample,
        SAMPLES if config.num is None else config.num,
        path=str(path),
        settings=settings,
        folder=cache_folder(config.cache) / "samples",
        batch=config.micro_batch,
    )


def folder(config: DictConfig, path: Path | None) -> Path:
    """Where the report goes."""
    if config.out is not None:
        return Path(config.out)
    if path is None:
        return Path(f"{Path(config.samples)}_evaluation")
    home = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return home / "evaluation" / path.stem


def warnings(groups: list, sets: Mapping[str, ClipSet]) -> list[str]:
    """What a reader must know before any number."""
    found = []
    for title, figures in groups:
        judged = [f for f in figures if f.power is not None]
        weak = [f.key for f in judged if not f.power >= NEEDED]
        if weak:
            which = "no figure" if len(weak) == len(judged) else f"none of {', '.join(weak)}"
            found.append(
                f"{title}: {which} can tell real pairs from shifted ones on this reference "
                f"(power below {NEEDED:g}): nothing follows from them"
            )
    if "reference" in sets and "train" in sets and sets["reference"].path == sets["train"].path:
        found.append("the reference is what the model was trained on: distances reward copying it")
    return found


def summary(groups: list) -> str:
    """The figures as a table for the terminal."""
    lines = [f"{'':44s}{'value':>12s}{'95 % interval':>24s}{'real':>12s}{'chance':>10s}"]
    for title, figures in groups:
        lines.append(title)
        for f in figures:
            span = f"[{f.low:.4g}, {f.high:.4g}]" if f.low is not None else ""
            real = f.floor if f.floor is not None else f.ceiling
            rest = [f"{v:.4g}" if v is not None else "" for v in (real, f.chance)]
            label = f"  {f.label}{f' ({f.unit})' if f.unit else ''}"[:43]
            lines.append(f"{label:44s}{f.value:12.4g}{span:>24s}{rest[0]:>12s}{rest[1]:>10s}")
    return "\n".join(lines)


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(config: DictConfig) -> None:
    checkpoint.guarded(evaluate, config)


if __name__ == "__main__":
    checkpoint.run(main)
