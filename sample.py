"""Sample clips from a checkpoint; needs nothing but the checkpoint.

python sample.py ckpt=RUN_FOLDER                         # 16 clips and a gallery beside it
python sample.py ckpt=best num=64 seed=1 out=clips       # of the newest run
python sample.py ckpt=last.ckpt sampler=dpm_solver_2m sampler.steps=15 "save=[mp4,gif]"
python sample.py ckpt=RUN_FOLDER "guide=[stored,reconstruct]" given=CLIPS "known=[audio]"
python sample.py ckpt=RUN_FOLDER "guide=[stored,reconstruct]" seconds=10
python sample.py ckpt=RUN_FOLDER num=1024 precision=bf16-mixed compile=true reuse.interval=2
torchrun --nproc_per_node=4 sample.py ckpt=RUN_FOLDER num=1024
"""

import hashlib
import logging
import os
from datetime import timedelta
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import distributed
from tqdm import tqdm

from avdiffusion import checkpoint, memory
from avdiffusion.data.given import Given
from avdiffusion.spread import gathered, share
from avdiffusion.systems.step import Step
from avdiffusion.writer import Behind, ClipWriter, Kept

log = logging.getLogger("avdiffusion")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def sample(config: DictConfig) -> None:
    memory.keep_freed()
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    path = checkpoint.find(config.ckpt)
    chosen = {"sampler": config.sampler, "guide": config.guide}
    device = config.device
    if WORLD > 1 and device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    system = checkpoint.load(path, trust=config.trust, device=device, replace=chosen)
    trained = system.config["data"].get("train") or {}
    given = parts(config, system)
    num = config.num if config.num is not None else len(given) if given else 16
    index = list(range(num)) if config.index is None else list(config.index)
    if not index or not all(isinstance(i, int) and i >= 0 for i in index):
        raise ValueError(f"num={num} and index={config.index} name no samples: 0, 1, 2, ...")
    step = Step(
        precision=config.precision,
        compile=config.compile,
        capture=config.capture,
        **config.reuse,
    )
    options = {
        "seed": config.seed,
        "given": given,
        "seconds": config.seconds if given is None else None,
        "overlap": config.overlap,
        "micro_batch": config.micro_batch,
        "step": step,
    }
    system.samples([], **options)  # what is wrong with them is said before anything is written
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    out = Path(config.out or run / "samples" / f"{path.stem}_{config.tag}")
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
                "checkpoint": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
                "sampler": system.config["sampler"],
                "guides": system.config["guide"],
                "seed": config.seed,
                "micro_batch": config.micro_batch,
                **asked(config),
                **step.settings(),
                **({"files": given.digest()} if given else {}),
            },
            info={
                "file": str(path),
                "name": system.config["name"],
                "threads": torch.get_num_threads(),
                # what real clips have to be brought to if they are to be compared
                **{k: trained[k] for k in ("fit", "loudness") if trained.get(k) is not None},
            },
            save=list(config.save),
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
        for group, clips, calls in gathered(made, WORLD):
            if writer:
                add(group, clips, given and [Kept(**given.source(i)) for i in group])
            evaluations += [calls] * len(group)
            bar.update(len(group))
    if WORLD > 1:
        distributed.destroy_process_group()
    if writer:
        cost = f", {sum(evaluations) / len(evaluations):g} evaluations each" if evaluations else ""
        log.info(
            "%d samples in %s%s; open %s", len(index), out, cost, writer.finish(title=out.name)
        )


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
    trained = system.config["data"].get("train") or {}
    return Given(
        config.given,
        known=asked(config)["known"],
        shapes=system.shapes,
        rates=system.rates,
        seconds=config.seconds,
        fit=config.fit or trained.get("fit", "crop"),
    )


def asked(config: DictConfig) -> dict:
    """What samples depend on besides the model, where it was set."""
    names = ("given", "known", "fit", "seconds", "overlap")
    settings = OmegaConf.to_container(OmegaConf.masked_copy(config, list(names)))
    return {name: value for name, value in settings.items() if value is not None}


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
def main(config: DictConfig) -> None:
    checkpoint.guarded(sample, config)


if __name__ == "__main__":
    checkpoint.run(main)
