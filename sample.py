"""Sample clips from a checkpoint; needs nothing but the checkpoint.

python sample.py ckpt=RUN_FOLDER                         # 16 clips and a gallery beside it
python sample.py ckpt=best num=64 seed=1 out=clips       # of the newest run
python sample.py ckpt=last.ckpt sampler=dpm_solver_2m sampler.steps=15 "save=[mp4,gif]"
python sample.py ckpt=RUN_FOLDER "guide=[stored,reconstruct]" given=CLIPS "known=[audio]"
python sample.py ckpt=RUN_FOLDER "guide=[stored,reconstruct]" seconds=10
python sample.py ckpt=RUN_FOLDER num=1024 precision=bf16-mixed compile=true reuse.interval=2
python sample.py "ckpt=[base.ckpt,sr.ckpt]" sr_sampler=dpm_solver_2m sr_sampler.steps=10
python sample.py ckpt=sr.ckpt given=CLIPS                 # existing clips at a higher resolution
python sample.py ckpt=v2v.ckpt given=CLIP.mp4             # or restored
python sample.py ckpt=diffgen.ckpt text="a dog barking" num=4
torchrun --nproc_per_node=4 sample.py ckpt=RUN_FOLDER num=1024
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import distributed
from tqdm import tqdm

from avdiffusion import checkpoint, memory
from avdiffusion.data.given import Given
from avdiffusion.diffusion.noise import key
from avdiffusion.media import Media
from avdiffusion.restore import Existing, restore
from avdiffusion.spread import gathered, share
from avdiffusion.systems.step import Step
from avdiffusion.systems.system import Samples, System
from avdiffusion.writer import Behind, ClipWriter, Kept

log = logging.getLogger("avdiffusion")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def sample(config: DictConfig) -> None:
    memory.keep_freed()
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    paths = [checkpoint.find(each) for each in listed(config.ckpt)]
    if not paths:
        raise ValueError("ckpt=[] names no checkpoint")
    others = [k for k, v in config.sr_sampler.items() if k != "stored" and v is not None]
    if others and len(paths) == 1:
        raise ValueError(
            f"sr_sampler= is of the second of ckpt=[A,B]: of {paths[0].name} alone it is sampler="
        )
    samplers = ["sampler", *["sr_sampler"] * len(paths)]
    systems = [loaded(config, *each) for each in zip(paths, samplers, strict=False)]
    if config.decoding_steps is not None:
        decode(systems[0], config.decoding_steps)
    step = Step(
        precision=config.precision,
        compile=config.compile,
        capture=config.capture,
        frames_at_once=config.frames_at_once,
        **config.reuse,
    )
    plain = [path.name for path, each in zip(paths, systems, strict=True) if not takes(each)][1:]
    if plain:
        raise ValueError(f"{plain[0]} makes clips of its own: only the first of ckpt=[...] may")
    if not takes(systems[0]):
        generate(config, paths, systems, step)
    elif len(systems) == 1:
        remake(config, paths[0], systems[0], step)
    else:
        raise ValueError(
            f"{paths[0].name} makes clips of others: it cannot be the first of several"
        )


def listed(ckpt: object) -> list:
    return list(ckpt) if isinstance(ckpt, ListConfig) else [ckpt]


def takes(system: System) -> bool:
    """Whether it makes clips of others."""
    return system.remakes is not None


def loaded(config: DictConfig, path: Path, sampler: str) -> System:
    """The system of a checkpoint; its guides are of the first alone to be replaced."""
    chosen = {"sampler": config[sampler]}
    if sampler == "sampler":
        chosen["guide"] = config.guide
    device = config.device
    if WORLD > 1 and device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return checkpoint.load(path, trust=config.trust, device=device, replace=chosen)


def decode(system: System, steps: int) -> None:
    """Sets how many steps the codec of a system takes that decodes by sampling."""
    codec = getattr(system, "codec", None)
    if not hasattr(codec, "sampler"):
        raise ValueError(f"decoding_steps={steps}, but this model's clips are not decoded by steps")
    codec.sampler = replace(codec.sampler, steps=steps)


def settings(config: DictConfig, paths: list, systems: list, step: Step) -> dict:
    """What results depend on, whichever of them are made."""
    first, *others = (
        {
            "checkpoint": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
            "sampler": system.config["sampler"],
            "guides": system.config["guide"],
        }
        for path, system in zip(paths, systems, strict=True)
    )
    found = {**first, "seed": config.seed, **asked(config), **step.settings()}
    return {**found, "second_stage": others} if others else found


def folder(config: DictConfig, paths: list[Path]) -> Path:
    """Where results go; the seed's layout has a folder for every checkpoint below `out`."""
    path, names = paths[0], "_".join(each.stem for each in paths)
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    out = Path(config.out or run / "samples" / f"{names}_{config.tag}")
    return out / path.stem if config.layout == "seed" else out


def generate(config: DictConfig, paths: list, systems: list, step: Step) -> None:
    """Samples of the first system, which those after it make larger in turn."""
    system, finer = systems[0], systems[1:]
    trained = checkpoint.clips_of(system.config)
    given, texts = parts(config, system), texts_of(config)
    num = len(given or texts or range(16)) if config.num is None else config.num
    index = list(range(num)) if config.index is None else list(config.index)
    if not index or not all(isinstance(i, int) and i >= 0 for i in index):
        raise ValueError(f"num={num} and index={config.index} name no samples: 0, 1, 2, ...")
    for each in finer if given else ():
        modality = each.remakes.modality
        if any(modality in given.source(i)["whole"] for i in index):
            raise ValueError(
                f"the {modality} of given clips is kept as it is: there is nothing for a second "
                "checkpoint to make. Enlarge them by themselves: ckpt=SR given=DIR"
            )
    options = {
        "seed": config.seed,
        "given": given,
        "seconds": config.seconds if given is None else None,
        "overlap": config.overlap,
        "told": texts and (lambda numbers: {"text": [texts[i % len(texts)] for i in numbers]}),
        "micro_batch": config.micro_batch,
        "step": step,
    }
    system.samples([], **options)  # what is wrong with them is said before anything is written
    made = set(system.shapes)
    for each, name in zip(finer, paths[1:], strict=True):
        if each.remakes.modality not in made:
            raise ValueError(f"{name} makes {each.remakes.modality} larger, not {made}")
    out = folder(config, paths)
    if given and config.given and Path(config.given).resolve() in out.resolve().parents:
        raise ValueError(
            f"out={out} lies in given={config.given}, and would be given the next time"
        )
    writer, missing = None, None
    if RANK == 0:
        writer = ClipWriter(
            out,
            rates=system.rates,
            settings={
                **settings(config, paths, systems, step),
                "micro_batch": config.micro_batch,
                **({"files": given.digest()} if given else {}),
            },
            info={
                "file": ", ".join(map(str, paths)),
                "name": system.config["name"],
                "threads": torch.get_num_threads(),
                # what real clips have to be brought to if they are to be compared
                **{k: trained[k] for k in ("fit", "loudness") if trained.get(k) is not None},
            },
            save=list(config.save),
            layout=config.layout,
            stages=len(paths),
            overwrite=config.overwrite,
        )
        missing = writer.missing(index)
        if len(missing) < len(index):
            there = len(index) - len(missing)
            log.info("%d of %d samples are already in %s", there, len(index), out)
    if WORLD > 1:
        # One that has nothing left to do waits for the others' last clips.
        distributed.init_process_group("gloo", timeout=timedelta(days=7))
        shared = [missing]
        distributed.broadcast_object_list(shared)
        missing = shared[0]
    evaluations = []
    with (
        tqdm(
            total=len(missing), unit="clip", disable=None if missing and not RANK else True
        ) as bar,
        Behind(writer and writer.add) as add,
    ):

        def progress():
            bar.refresh()
            add.check()

        size = config.micro_batch if system.sampler.together else 1
        own = share(missing, size, RANK, WORLD)
        made = system.samples(own, progress=progress, **options)
        made = refined(made, finer, seed=config.seed, step=step, progress=progress)
        for (group, clips, calls), base in gathered(made, WORLD):
            if writer:
                kept = given and [Kept(**given.source(i)) for i in group]
                said = texts and [texts[i % len(texts)] for i in group]
                add(group, clips, kept, base, said)
            evaluations += [calls] * len(group)
            bar.update(len(group))
    if WORLD > 1:
        distributed.destroy_process_group()
    if writer:
        cost = f", {sum(evaluations) / len(evaluations):g} evaluations each" if evaluations else ""
        log.info(
            "%d samples in %s%s; open %s", len(index), out, cost, writer.finish(title=out.name)
        )


def refined(
    made: Iterator[Samples],
    systems: Sequence[System],
    *,
    seed: int,
    step: Step,
    progress: Callable[[], object],
) -> Iterator[tuple[Samples, Media | None]]:
    """Samples as the systems in turn make them larger, and as they were if there is one."""
    step = replace(step, interval=1)  # of the first system, whose network keeps deep features
    for group, base, calls in made:
        clips = base
        for stage, system in enumerate(systems, 1):
            own = key(seed, "stage", stage)  # else it had the numbers that the first began with
            # One at a time: whatever others are made, a sample stays the same.
            parts = []
            for k, i in enumerate(group):
                source = system.remakes.batch(clips.map(lambda v, k=k: v[k : k + 1]))
                parts.append(
                    system.conditioned(source, [i], seed=own, step=step, progress=progress)
                )
            finer = {n: torch.cat([p.clips[n] for p in parts]) for n in parts[0].clips}
            clips, calls = Media({**clips, **finer}), calls + parts[0].evaluations
        yield Samples(group, clips, calls), base if systems else None


def remake(config: DictConfig, path: Path, system: System, step: Step) -> None:
    """What a system makes of existing clips, each as long as it is and with its own sound."""
    for name in ("num", "index", "known", "fit", "seconds", "overlap", "text"):
        if config[name] is not None:
            raise ValueError(f"{path.name} makes a clip of each given one: leave out {name}=")
    if config.layout != "flat":
        raise ValueError(f"layout={config.layout} is of generated clips: leave it out")
    if config.given is None:
        raise ValueError(
            f"{path.name} makes clips of others: give them with given=DIR, or the checkpoint of a "
            'model that makes them, "ckpt=[BASE,' + f'{path.name}]"'
        )
    modality = system.remakes.modality
    existing = Existing(config.given, folder(config, [path]), modality=modality)
    missing = []
    if RANK == 0:
        chosen = settings(config, [path], [system], step)
        chosen.pop("given")  # results of several folders may lie in one
        missing = existing.claim(chosen, overwrite=config.overwrite)
        if len(missing) < len(existing.files):
            there = len(existing.files) - len(missing)
            log.info("%d of %d clips are already in %s", there, len(existing.files), existing.out)
        if existing.ignored:
            log.info("%d other files in %s", len(existing.ignored), existing.root)
    if WORLD > 1:
        distributed.init_process_group("gloo", timeout=timedelta(days=7))
        shared = [missing]
        distributed.broadcast_object_list(shared)
        missing = shared[0]
    step = replace(step, capture=bool(config.capture))  # each size of clips would keep a graph
    framewise = getattr(system.model.net, "framewise", False)
    frames = (config.frames_at_once or 16) if framewise else system.shapes[modality][1]
    options = {"seed": config.seed, "step": step, "frames": frames}
    options["loudness"] = checkpoint.clips_of(system.config).get("loudness")
    unit = "frame" if modality == "video" else "clip"
    with tqdm(unit=unit, disable=None if not RANK else True) as bar:
        for i in missing[RANK::WORLD]:
            bar.set_description(Path(existing.files[i]).name)
            source, number = existing.root / existing.files[i], key("clip", existing.files[i])
            # by its name, so that others beside it do not matter
            restore(
                system,
                source,
                existing.targets[i],
                index=number,
                progress=bar.update,
                **options,
            )
    if WORLD > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    if RANK == 0:
        log.info("%d clips in %s", len(existing.files), existing.out)


def parts(config: DictConfig, system) -> Given | None:
    """The files that give a part of each sample."""
    if config.given is None:
        if config.known is not None:
            raise ValueError("known= says what is known of given clips: give them with given=")
        if config.seconds == "given":
            raise ValueError("seconds=given is the length of given clips: give them with given=")
        return None
    if config.known is None:
        raise ValueError('given= needs known=, what of it is to be kept: "known=[audio]"')
    trained = checkpoint.clips_of(system.config)
    return Given(
        config.given,
        known=asked(config)["known"],
        shapes=system.shapes,
        rates=system.rates,
        seconds=config.seconds,
        fit=config.fit or trained.get("fit", "crop"),
    )


def texts_of(config: DictConfig) -> list[str] | None:
    """The texts that samples are made of, in turn."""
    texts = [config.text] if isinstance(config.text, str) else config.text
    if texts is None:
        return None
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"text={config.text} is no text, nor a list of some")
    return list(texts)


def asked(config: DictConfig) -> dict:
    """What samples depend on besides the model, where it was set."""
    names = ("given", "known", "fit", "seconds", "overlap", "text", "decoding_steps")
    settings = OmegaConf.to_container(OmegaConf.masked_copy(config, list(names)))
    return {name: value for name, value in settings.items() if value is not None}


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
def main(config: DictConfig) -> None:
    checkpoint.guarded(sample, config)


if __name__ == "__main__":
    checkpoint.run(main)
