"""Train a model.

python train.py                                          # the quickstart, minutes on a CPU
python train.py exp=folder data.root=DIR                 # any folder of clips
python train.py exp=landscape strategy=ddp trainer.devices=8
python train.py exp=landscape ckpt=auto                  # go on with the unfinished run
python train.py exp=landscape ckpt=RUN_FOLDER            # a new run from its last checkpoint
python train.py exp=landscape ckpt=landscape.ckpt        # or from converted weights
python train.py exp=folder_sr data.root=DIR init.diffusion=RUN_FOLDER   # begins with its weights
python train.py exp=landscape compile=true               # made for this machine at the first step
python train.py -m exp=folder data.root=DIR seed=0,1     # a sweep
"""

import logging
import signal
import warnings
from pathlib import Path

import hydra
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from avdiffusion import checkpoint, launch, memory, run_folder
from avdiffusion.callbacks.samples import SampleClips
from avdiffusion.callbacks.stop import Stopped
from avdiffusion.compiled import compile_in_place
from avdiffusion.systems.resume import FitLoop
from avdiffusion.writer import write_whole

log = logging.getLogger("avdiffusion")


def train(config: DictConfig) -> float | None:
    memory.keep_freed()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    # Lightning's notes on devices and its other products, and on torch's internals.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # codecs
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    first = rank_zero_only.rank == 0
    if not first:
        log.setLevel(logging.ERROR)
    folder = Path(config.paths.run)
    resume = begin = None
    if config.ckpt == "auto":
        begun = (folder / run_folder.CONFIG).is_file()
        if begun and (other := launch.difference(config, folder)):
            raise ValueError(f"{folder} is another run's: {other}. Give another folder or name")
        if run_folder.status(folder).get("status") == "finished":
            log.info("%s is finished: nothing to do", folder)
            return objective(folder)
        resume = launch.newest(folder)
        log.info("ckpt=auto: %s", f"going on from {resume}" if resume else "a new run")
    elif config.ckpt:
        if config.init.diffusion:
            raise ValueError("ckpt= and init.diffusion= both name weights to begin with: give one")
        resume = checkpoint.find(config.ckpt, config.paths.runs)
        # before anything is written
        stored = checkpoint.read(resume, mmap=True)
        if "optimizer_states" not in stored:
            if "converted" not in stored:
                raise ValueError(
                    f"{resume} holds weights to sample with, but no state to train on from"
                )
            begin, resume = resume, None
        elif config.init.codec.system:
            raise ValueError("ckpt= holds the codec already: leave out init.codec.system=")
    if config.init.diffusion and resume is None:
        begin = checkpoint.find(config.init.diffusion, config.paths.runs)

    in_place = resume is not None and folder.absolute() in resume.absolute().parents
    if first and run_folder.checkpoints(folder) and not in_place:
        raise ValueError(f"{folder} already holds a run: go on with ckpt=auto, or give another")

    grafted = checkpoint.graft(config, resume)
    plain = checkpoint.plain(config)
    data = checkpoint.build(config.data)
    system = checkpoint.build(config.model)
    if begin:
        begin_with(begin, system)
    if grafted:
        checkpoint.pour(grafted, system)
    system.save_hyperparameters(plain)
    callbacks = checkpoint.build(config.callbacks)
    trainer = checkpoint.build(
        config.trainer,
        logger=[each for each in checkpoint.build(config.logger).values() if each],
        callbacks=[each for each in callbacks.values() if each],
    )
    # Clips are sampled last, after the checkpoint: a kill meanwhile costs no step.
    trainer.callbacks.sort(key=lambda callback: isinstance(callback, SampleClips))
    refuse_to_spawn(trainer)
    micro_batch, trainer.accumulate_grad_batches = data.split(trainer.world_size)
    if not isinstance(config.trainer.val_check_interval, int):
        every = config.trainer.val_check_interval
        raise ValueError(f"trainer.val_check_interval={every} is no number of optimiser steps")
    # Lightning counts micro-batches, we optimiser steps and whole batches.
    trainer.val_check_interval = config.trainer.val_check_interval * trainer.accumulate_grad_batches
    if isinstance(config.trainer.limit_val_batches, int):
        trainer.limit_val_batches *= trainer.accumulate_grad_batches
    FitLoop.replace(trainer)
    for network in system.networks:
        compile_in_place(network, config.compile, trainer.strategy.root_device.type)
    if first:
        _held = run_folder.hold(folder)  # until training ends
        write_whole(folder / run_folder.CONFIG, OmegaConf.to_yaml(plain).encode())
    log.info(
        "%s: %.1f M parameters; batch %d = %d device(s) x %d x %d accumulated; run folder %s",
        config.name,
        sum(p.numel() for p in system.model.parameters()) / 1e6,
        data.batch_size,
        trainer.world_size,
        micro_batch,
        trainer.accumulate_grad_batches,
        folder,
    )
    try:
        trainer.fit(system, data, ckpt_path=resume, weights_only=True)
    except Stopped as end:
        if not first:
            raise SystemExit(0) from end  # else a launcher would kill the first process
        log.info("stopped after step %d; to go on: %s", trainer.global_step, launch.again())
        requeue(end)
        raise
    except (RuntimeError, MemoryError) as error:
        if memory.ran_out(error):
            raise ValueError(memory.advice(plain, trainer.world_size)) from error
        raise
    return objective(folder)


def begin_with(ckpt: Path, system: pl.LightningModule) -> None:
    """Puts another model's averaged weights where a new run would have drawn its own."""
    begin, weights = "ema.ema_model.", checkpoint.read(ckpt, mmap=True)["state_dict"]
    own = {k.removeprefix(begin): v for k, v in weights.items() if k.startswith(begin)}
    try:
        for each in (system.model, *system.ema.modules()):
            if isinstance(each, type(system.model)):
                each.load_state_dict(own)
    except RuntimeError as error:
        found = " ".join(str(error).split()[:60])
        raise ValueError(
            f"{ckpt} holds the weights of another model than this config's: {found}"
        ) from error
    log.info("a new run, with the weights of %s", ckpt)


def objective(folder: Path) -> float | None:
    """What a sweep judges a finished run by."""
    return run_folder.status(folder).get("objective", {}).get("value")


def refuse_to_spawn(trainer: pl.Trainer) -> None:
    """Raises ValueError in a sweep whose points need several processes that nobody started."""
    hydra_config = HydraConfig.get()
    if trainer.world_size == 1 or hydra_config.mode != RunMode.MULTIRUN:
        return
    if "submitit" not in hydra_config.launcher._target_:
        raise ValueError(
            f"a sweep cannot start {trainer.world_size} processes a point: use trainer.devices=1, "
            "hydra/launcher=slurm, or one torchrun command for each point"
        )


def requeue(end: Stopped) -> None:
    """Passes SIGUSR2 on, now that all is saved: submitit then queues the job again."""
    number = getattr(signal, "SIGUSR2", None)
    if number and end.code == 128 + number and callable(signal.getsignal(number)):
        signal.raise_signal(number)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> float | None:
    return checkpoint.guarded(train, config)


if __name__ == "__main__":
    checkpoint.run(main, launch.words)
