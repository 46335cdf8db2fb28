"""When and under which names checkpoints are written."""

import logging
import os
import shutil
from pathlib import Path
from weakref import proxy

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from avdiffusion.run_folder import STEP

log = logging.getLogger("avdiffusion")


class Checkpoint(ModelCheckpoint):
    """`step0001000.ckpt` every so many optimiser steps, `last.ckpt`, and `best.ckpt`.

    A validation whose `monitor` is among the `best` best of the run is saved as well. Of the
    periodic files the `keep` newest stay (-1: all). `last` and `best` are links to step files where
    the file system can link, else copies. Every file is written beside its place and renamed.
    """

    def __init__(
        self,
        *,
        dirpath: str | Path,
        every: int = 1000,
        keep: int = -1,
        best: int = 1,
        monitor: str = "val/loss",
        mode: str = "min",
    ):
        if every < 1 or best < 0 or keep < -1:
            raise ValueError(f"every={every}, best={best}, keep={keep}: at least 1, 0 and -1")
        super().__init__(
            dirpath,
            monitor=monitor,
            mode=mode,
            save_top_k=best,
            save_on_exception=True,
            every_n_train_steps=every,
            enable_version_counter=False,
        )
        self.every, self.keep, self.written = every, keep, []
        self.failed = ""  # why the last file could not be written

    def setup(self, trainer: pl.Trainer, system: pl.LightningModule, stage: str) -> None:
        self.dirpath = trainer.strategy.broadcast(self.dirpath)
        if trainer.is_global_zero and stage == "fit":
            Path(self.dirpath).mkdir(parents=True, exist_ok=True)
            for part in Path(self.dirpath).glob(".*.part"):
                part.unlink()

    def on_train_start(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        first = trainer.strategy.broadcast(trainer.global_step)
        if first != trainer.global_step:
            raise ValueError(
                f"process {trainer.global_rank} goes on from step {trainer.global_step}, the first "
                f"from {first}: do all of them see the same run folders?"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        step = trainer.global_step
        if step and step % self.every == 0 and not self._should_skip_saving_checkpoint(trainer):
            self._save_step(trainer)

    def on_validation_end(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        if self.save_top_k == 0 or trainer.global_step == 0:
            return
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"checkpoint.monitor={self.monitor!r} is not logged by validation, which logs "
                f"{sorted(trainer.callback_metrics)}"
            )
        path = self._step_file(trainer)
        score = trainer.callback_metrics[self.monitor].detach().cpu()
        if torch.isnan(score):
            return
        before = dict(self.best_k_models)
        self._rank({**before, path: score})
        if path not in self.best_k_models:
            return
        self.current_score = score
        if self._last_global_step_saved != trainer.global_step and not self._save_step(trainer):
            self.best_k_models = before
        elif self.best_model_path == path:
            self._safely(trainer, self._link, path, "best.ckpt")
            self._safely(trainer, self._prune)

    def on_train_epoch_end(self, *_: object) -> None:
        """Nothing: checkpoints go by steps."""

    def on_train_end(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        if not trainer.global_step or self._should_skip_saving_checkpoint(trainer):
            return
        if not self._save_step(trainer):
            raise OSError(
                f"what was trained since the last checkpoint cannot be saved: {self.failed}"
            )

    def on_exception(
        self, trainer: pl.Trainer, system: pl.LightningModule, exception: BaseException
    ) -> None:
        """Saves what is finished; where several processes train, perhaps only this one failed."""
        if trainer.global_step and self._should_save_on_exception(trainer):
            self._save_step(trainer)

    def state_dict(self) -> dict:
        """Names only: the folder may have moved when the run goes on."""
        best = {Path(path).name: float(score) for path, score in self.best_k_models.items()}
        return {"written": [Path(path).name for path in self.written], "best": best}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes over those files that lie in this run's folder."""
        written = [Path(name).name for name in state_dict["written"]]
        here = {name: str(Path(self.dirpath, name)) for name in written}
        here = {name: path for name, path in here.items() if Path(path).is_file()}
        best = {here[n]: score for n, score in state_dict.get("best", {}).items() if n in here}
        self.written = list(here.values())
        if best:
            self._rank({path: torch.tensor(score) for path, score in best.items()})

    @property
    def best(self) -> dict:
        """Step, score and metric of the best validated file."""
        step, score = _step(self.best_model_path), float(self.best_model_score)
        return {"step": step, "value": score, "monitor": self.monitor}

    def _step_file(self, trainer):
        return str(Path(self.dirpath, f"step{trainer.global_step:07d}.ckpt"))

    def _rank(self, scores):
        """Keeps the best of these files, and says so where Lightning looks for it."""
        sign = 1 if self.mode == "min" else -1
        ranked = sorted(scores.items(), key=lambda x: sign * x[1])[: self.save_top_k]
        self.best_k_models = dict(ranked)
        self.best_model_path, self.best_model_score = ranked[0]
        self.kth_best_model_path, self.kth_value = ranked[-1]

    def _save_step(self, trainer):
        """Writes a file of this step and points `last` at it; False if that failed."""
        path, before = self._step_file(trainer), self.written
        self.written = [p for p in before if p != path] + [path]
        if not self._safely(trainer, self._write, path):
            self.written = before  # the file may be there, but `last` does not point at it
            return False
        self.last_model_path = str(Path(self.dirpath, "last.ckpt"))
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, path
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        return True

    def _safely(self, trainer, action, *arguments):
        """Whether `action` on the first process succeeded; a full disk costs a message.

        No process waits for another here: one may be alone on its way out, another may fail.
        """
        try:
            action(trainer, *arguments)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise  # not of torch's file writer
            for part in Path(self.dirpath).glob(".*.part"):
                part.unlink(missing_ok=True)
            if not self.failed:
                log.warning("no checkpoint can be written, training goes on: %s", error)
            self.failed = str(error)
            return False
        if self.failed:
            log.info("step %d: checkpoints can be written again", trainer.global_step)
        self.failed = ""
        return True

    def _write(self, trainer, path):
        # not `trainer.save_checkpoint`, after which all processes wait for each other
        content = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
        part = str(Path(path).with_name(f".{Path(path).name}.part"))
        trainer.strategy.save_checkpoint(content, part)
        if trainer.is_global_zero:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())  # else a power cut may leave a name without content
            os.replace(part, path)
        self._link(trainer, path, "last.ckpt")
        self._prune(trainer)

    def _link(self, trainer, path, name):
        """Gives a file a second name that always points at something whole."""
        if not trainer.is_global_zero:
            return
        part = Path(self.dirpath, f".{name}.part")
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
        except OSError:
            shutil.copyfile(path, part)
        os.replace(part, Path(self.dirpath, name))

    def _prune(self, trainer):
        """Removes files of this run that are neither periodic and new enough nor among the best."""
        periodic = [p for p in self.written if _step(p) % self.every == 0]
        kept = {*(periodic if self.keep < 0 else periodic[len(periodic) - self.keep :])}
        kept |= {*self.best_k_models, self.written[-1]}
        if trainer.ckpt_path is not None:
            kept.add(str(Path(trainer.ckpt_path).absolute()))
        for path in set(self.written) - kept if trainer.is_global_zero else ():
            Path(path).unlink(missing_ok=True)
        self.written = [p for p in self.written if p in kept]


def _step(path):
    return int(STEP.fullmatch(Path(path).name)[1])
