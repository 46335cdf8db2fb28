"""Sample clips from a checkpoint; needs nothing but the checkpoint.

python sample.py ckpt=RUN_FOLDER                         # 16 clips and a gallery beside it
python sample.py ckpt=best num=64 seed=1 out=clips       # of the newest run
python sample.py ckpt=last.ckpt sampler=ddim sampler.steps=25 "save=[mp4,gif]"
"""

import hashlib
import logging
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from avdiffusion import checkpoint
from avdiffusion.writer import ClipWriter

log = logging.getLogger("avdiffusion")


def sample(config: DictConfig) -> None:
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    path = checkpoint.find(config.ckpt)
    chosen = {"sampler": config.sampler, "guide": config.guide}
    system = checkpoint.load(path, trust=config.trust, device=config.device, replace=chosen)
    index = list(config.index) if config.index is not None else list(range(config.num))
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    out = Path(config.out or run / "samples" / f"{path.stem}_{config.tag}")
    settings = {
        "checkpoint": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        "sampler": system.config["sampler"],
        "guides": system.config["guide"],
        "seed": config.seed,
        "micro_batch": config.micro_batch,
    }
    writer = ClipWriter(
        out,
        rates=system.rates,
        settings=settings,
        info={"file": str(path), "name": system.config["name"], "threads": torch.get_num_threads()},
        save=list(config.save),
        overwrite=config.overwrite,
    )
    missing = writer.missing(index)
    if len(missing) < len(index):
        log.info("%d of %d samples are already in %s", len(index) - len(missing), len(index), out)
    with tqdm(total=len(missing), unit="clip", disable=None if missing else True) as bar:
        options = {"seed": config.seed, "micro_batch": config.micro_batch}
        for group, clips in system.samples(missing, progress=bar.refresh, **options):
            writer.add(group, clips)
            bar.update(len(group))
    log.info("%d samples in %s; open %s", len(index), out, writer.finish(title=out.name))


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
def main(config: DictConfig) -> None:
    checkpoint.guarded(sample, config)


if __name__ == "__main__":
    checkpoint.run(main)
