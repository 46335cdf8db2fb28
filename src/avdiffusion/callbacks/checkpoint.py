"""When and under which names checkpoints are written."""

import os
import re
import shutil
from pathlib import Path
from weakref import proxy

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

STEP = re.compile(r"step(\d{7,})\.ckpt")


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

    def setup(self, trainer: pl.Trainer, system: pl.LightningModule, stage: str) -> None:
        self.dirpath = trainer.strategy.broadcast(self.dirpath)
        if trainer.is_global_zero and stage == "fit":
            Path(self.dirpath).mkdir(parents=True, exist_ok=True)
            for part in Path(self.dirpath).glob(".*.part"):
                part.unlink()

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
        path, score = (
            self._step_file(trainer),
            trainer.callback_metrics[self.monitor].detach().cpu(),
        )
        sign = 1 if self.mode == "min" else -1
        ranked = sorted({**self.best_k_models, path: score}.items(), key=lambda x: sign * x[1])
        ranked = ranked[: self.save_top_k]
        if path not in dict(ranked) or torch.isnan(score):
            return
        self.best_k_models, self.current_score = dict(ranked), score
        self.best_model_path, self.best_model_score = ranked[0]
        self.kth_best_model_path, self.kth_value = ranked[-1]
        if self._last_global_step_saved != trainer.global_step:
            self._save_step(trainer)
        if self.best_model_path == path:
            self._link(trainer, path, "best.ckpt")
        self._prune(trainer)

    def on_train_epoch_end(self, *_: object) -> None:
        """Nothing: checkpoints go by steps."""

    def on_train_end(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        if trainer.global_step and not self._should_skip_saving_checkpoint(trainer):
            self._save_step(trainer)

    def on_exception(
        self, trainer: pl.Trainer, system: pl.LightningModule, exception: BaseException
    ) -> None:
        if trainer.global_step and self._should_save_on_exception(trainer):
            self._save_step(trainer)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "written": self.written}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if state_dict["dirpath"] == self.dirpath:
            self.written = list(state_dict["written"])

    def _step_file(self, trainer):
        return str(Path(self.dirpath, f"step{trainer.global_step:07d}.ckpt"))

    def _save_step(self, trainer):
        path = self._step_file(trainer)
        self.written = [p for p in self.written if p != path] + [path]
        self.last_model_path = str(Path(self.dirpath, "last.ckpt"))
        self._save_checkpoint(trainer, path)
        self._link(trainer, path, "last.ckpt")
        self._prune(trainer)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        part = str(Path(filepath).with_name(f".{Path(filepath).name}.part"))
        trainer.save_checkpoint(part, self.save_weights_only)
        if trainer.is_global_zero:
            os.replace(part, filepath)
        trainer.strategy.barrier()
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

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
        periodic = [p for p in self.written if int(STEP.match(Path(p).name)[1]) % self.every == 0]
        kept = {*(periodic if self.keep < 0 else periodic[len(periodic) - self.keep :])}
        kept |= {*self.best_k_models, self.written[-1]}
        if trainer.ckpt_path is not None:
            kept.add(str(Path(trainer.ckpt_path).absolute()))
        for path in set(self.written) - kept if trainer.is_global_zero else ():
            Path(path).unlink(missing_ok=True)
        self.written = [p for p in self.written if p in kept]
