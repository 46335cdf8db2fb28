"""Judge clips: distances to real ones, synchrony, memorisation; a report with intervals and floors.

python evaluate.py samples=CLIPS reference=REAL_CLIPS
python evaluate.py ckpt=RUN_FOLDER num=1024 "metrics=[fvd,kvd,fad,kad,sync,memorisation]"
python evaluate.py samples=CLIPS target=ORIGINALS "metrics=[restoration,lpips,stft]"
python evaluate.py ckpt=best reference=REAL_CLIPS protocol=mmdiffusion
torchrun --nproc_per_node=4 evaluate.py samples=CLIPS reference=REAL_CLIPS
"""

import hashlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
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
from avdiffusion.evaluation.form import Form, form_of
from avdiffusion.evaluation.sets import ClipSet, Files, Items, Sampled
from avdiffusion.layout import FOLDERS
from avdiffusion.metrics.metric import Metric
from avdiffusion.metrics.power import NEEDED
from avdiffusion.systems.diffusion import DiffusionSystem
from avdiffusion.systems.step import Step
from avdiffusion.trust import objections

log = logging.getLogger("avdiffusion")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SAMPLES = 256  # of a checkpoint, unless told
# What a checkpoint may name as its data: they read, and nothing else.
DATA = {
    f"avdiffusion.data.{name}"
    for name in ("clips.Clips", "windows.Windows", "toy.Toy", "shapes.MovingShapes")
}


def evaluate(config: DictConfig) -> None:
    started = monotonic()
    memory.keep_freed()
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    if WORLD > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if (config.samples is None) == (config.ckpt is None):
        raise ValueError("what is to be judged? Give a folder, samples=DIR, or a model, ckpt=PATH")
    system, path = None, None
    if config.ckpt is not None:
        path = checkpoint.find(config.ckpt)
        chosen = {"sampler": config.sampler, "guide": config.guide}
        system = checkpoint.load(path, trust=config.trust, device=config.device, replace=chosen)
        refuse_conditioned(config.ckpt, system)
    metrics = {name: checkpoint.build(node) for name, node in config.metrics.items()}
    if not metrics:
        raise ValueError('metrics=[] leaves nothing to measure: name some, "metrics=[fvd,sync]"')
    form = form_asked(config, system)
    sets = clip_sets(config, metrics, form, system, path)
    rates, target = form.rates, None
    if config.target is not None:
        looking = [m for m in metrics.values() if m.extractor.paired]
        target = run.targets(
            config.target, real_form(form, looking), sets["samples"], cache=config.cache
        )
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
    groups = run.figures(metrics, found, sets, **options)
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
        warnings=[*config.protocol.notes, *warnings(config, groups, sets)],
    )
    players = report.entries(told, sets, rates, config.show)
    out = folder(config, path)
    page = report.write(out, told, players)
    if config.logger:
        config.paths.run = config.paths.run or str(out)
        loggers = [checkpoint.build(node) for node in config.logger.values()]
        log_report(filter(None, loggers), told, players, checkpoint.plain(config))
    log.info("%s\n\nopen %s", summary(groups), page)


def refuse_conditioned(ckpt: str, system: DiffusionSystem) -> None:
    """Raises ValueError for a model that makes its samples of clips, which have to be given."""
    if not system.remakes and system.model.conditioner is not None:
        raise ValueError(
            f"{ckpt} makes what texts say, and is judged by what it makes of some: "
            f'python sample.py ckpt={ckpt} "text=[...]" num=... out=OUT, then python evaluate.py '
            "samples=OUT reference=REAL_CLIPS"
        )
    if system.remakes:
        raise ValueError(
            f"{ckpt} makes clips of others, and is judged by what it makes of them (of sounds by "
            "metrics=[stft]): "
            f"python sample.py ckpt={ckpt} given=CLIPS out=OUT, then python evaluate.py "
            'samples=OUT target=ORIGINALS "metrics=[restoration,lpips]"'
        )


def form_asked(config: DictConfig, system: DiffusionSystem | None) -> Form:
    """What all clips are brought to: what is set, else the model's own, else the first sample's."""
    asked = {k: v for k, v in checkpoint.plain(config.form).items() if v is not None}
    if "size" in asked:
        asked["size"] = tuple(asked["size"])
    if system is not None:
        own = of_model(system)
        form = Form(**{**own, **asked})
        if any(own[key] != getattr(form, key) for key in own if key not in ("fit", "loudness")):
            said = ", ".join(" ".join(line) for line in Form(**own).lines())
            raise ValueError(
                f"a checkpoint's samples are judged as the model makes them ({said}), and form or "
                f"protocol={config.protocol.name} asks for other clips: sample into a folder first "
                "and judge that with samples=DIR"
            )
        return form
    root = Path(config.samples).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"samples={root} is no folder of clips")
    record = root.parent if root.name in FOLDERS else root  # of the seed's layout
    known = Form(**{**recorded(record / "samples.json"), **asked})
    return form_of(root, known, cache=config.cache)


def recorded(path: Path) -> dict:
    """How the data of the model that made a folder of samples were brought to their form."""
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text()).get("info", {})
        found = {"fit": info.get("fit"), "loudness": info.get("loudness")}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no record of samples: remove it, or mend it") from error
    if found["fit"] not in (None, "crop", "letterbox") or not isinstance(
        found["loudness"], int | float | None
    ):
        raise ValueError(f"{path} says {found}: remove it, or mend it")
    return {key: value for key, value in found.items() if value is not None}


def real_form(form: Form, metrics: Iterable[Metric]) -> Form:
    """Without the modalities of real clips that no metric looks at: they may lack them."""
    return form.only({need for metric in metrics for need in metric.extractor.needs})


def of_model(system: DiffusionSystem) -> dict:
    """The form of a model's clips, and what its data were brought to."""
    found, trained = {}, checkpoint.clips_of(system.config)
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
        judged = replace(form, loudness=None)
        sets["samples"] = Files(config.samples, judged, most=config.num, silent=True, **common)
    else:
        sets["samples"] = sampled(config, system, path)
    count = len(sets["samples"].names)
    if config.num is not None and count < config.num:
        raise ValueError(f"{config.samples} holds {count} clips, not num={config.num}")
    for place in ("reference", "real", "train"):
        looking = [metric for metric in metrics.values() if run.looks(metric, place)]
        if not looking:
            if config[place] is not None:
                log.warning("%s=%s is not read: no metric here looks at it", place, config[place])
            continue
        asked = config.train_num if place == "train" else config.reference_num
        options = {
            "most": count if asked is None else asked,
            "windows": config.windows if place != "train" else "disjoint",
            **common,
        }
        wanted = real_form(form, looking)
        if config[place] is not None:
            sets[place] = Files(config[place], wanted, on_bad=config.on_bad, **options)
        elif system is not None and place != "real":
            own = "train" if place == "train" or not config.held_out else "val"
            sets[place] = own_clips(config, system, own, wanted, **options)
    return sets


def own_clips(
    config: DictConfig, system: DiffusionSystem, part: str, form: Form, **options: object
) -> ClipSet:
    """The clips a checkpoint was validated (`part` val) or trained with, if they are there."""
    node = dict(system.config["data"].get(part) or {})
    target = node.pop("_target_", None)
    if not config.trust and (target not in DATA or any(objections({part: node}))):
        raise ValueError(
            f"the checkpoint's {part} clips are of {target}, which is not built from a file of "
            f"unknown origin: give folders, reference=DIR and train=DIR, or trust=true"
        )
    root = node.get("root")
    if root is not None and not Path(root).expanduser().is_dir():
        raise FileNotFoundError(
            f"the checkpoint's {part} clips were in {root}, and there is no such folder: give "
            "reference=DIR (and train=DIR)"
        )
    if target == "avdiffusion.data.clips.Clips":
        split = {key: node[key] for key in ("split", "val_fraction", "on_bad")}
        return Files(root, form, **split, **options)
    dataset = checkpoint.build({**node, "_target_": target, **({"flip": 0.0} if root else {})})
    path = f"{root or target.rpartition('.')[2]} ({part})"
    return Items(dataset, form, path=path, most=options["most"])


def sampled(config: DictConfig, system: DiffusionSystem, path: Path) -> ClipSet:
    """A checkpoint's samples."""
    step = Step(precision=config.precision)
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    settings = {
        "checkpoint": content,
        "sampler": system.config["sampler"],
        "guides": system.config["guide"],
        "seed": config.seed,
        "micro_batch": config.micro_batch,
        **step.settings(),
        "device": system.device.type,
        "threads": torch.get_num_threads(),
        "version": version("avdiffusion"),
    }

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
        return Path(config.out).expanduser()
    if path is None:
        return Path(f"{Path(config.samples).expanduser()}_evaluation")
    home = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return home / "evaluation" / path.stem


def warnings(config: DictConfig, groups: list, sets: Mapping[str, ClipSet]) -> list[str]:
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
    if config.reference is None and not config.held_out:
        found.append("the reference is what the model was trained on: distances reward copying")
    seen = [set(files(sets[place])) for place in ("reference", "train") if place in sets]
    if len(seen) == 2 and (both := len(seen[0] & seen[1])):
        found.append(f"{both} files are in the training set and in the reference: not held out")
    return found


def files(clips: ClipSet) -> Iterator[Path]:
    """The files of a set, if it has any."""
    if isinstance(clips, Files):
        yield from ((clips.root / path).resolve() for path in set(clips.sources))


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
