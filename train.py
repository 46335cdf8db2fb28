"""Train a model.

python train.py                                          # the quickstart, minutes on a CPU
python train.py exp=folder data.root=DIR                 # any folder of clips
python train.py exp=landscape strategy=ddp trainer.devices=8
python train.py exp=landscape ckpt=RUN_FOLDER            # go on from its last checkpoint
python train.py -m exp=folder data.root=DIR seed=0,1     # a sweep
"""

import logging
import warnings

import hydra
import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from avdiffusion import checkpoint

log = logging.getLogger("avdiffusion")


def train(config: DictConfig) -> float | None:
    pl.seed_everything(config.seed, workers=True, verbose=False)
    # Lightning's notes on devices and its other products, and on torch's internals.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    plain = checkpoint.plain(config)
    resume = checkpoint.find(config.ckpt, config.paths.runs) if config.ckpt else None
    if resume:
        checkpoint.read(resume)  # before anything is written
    data = checkpoint.build(config.data)
    system = checkpoint.build(config.model)
    system.save_hyperparameters(plain)
    trainer = checkpoint.build(
        config.trainer,
        logger=[each for each in checkpoint.build(config.logger).values() if each],
        callbacks=list(checkpoint.build(config.callbacks).values()),
    )
    micro_batch, trainer.accumulate_grad_batches = data.split(trainer.world_size)
    # Lightning counts micro-batches, we optimiser steps.
    trainer.val_check_interval = config.trainer.val_check_interval * trainer.accumulate_grad_batches
    OmegaConf.save(OmegaConf.create(plain), f"{config.paths.run}/config.yaml")
    log.info(
        "%s: %.1f M parameters; batch %d = %d device(s) x %d x %d accumulated; run folder %s",
        config.name,
        sum(p.numel() for p in system.model.parameters()) / 1e6,
        data.batch_size,
        trainer.world_size,
        micro_batch,
        trainer.accumulate_grad_batches,
        config.paths.run,
    )
    trainer.fit(system, data, ckpt_path=resume, weights_only=True)
    objective = trainer.callback_metrics.get(config.objective)
    return None if objective is None else float(objective)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> float | None:
    return checkpoint.guarded(train, config)


if __name__ == "__main__":
    checkpoint.run(main)
