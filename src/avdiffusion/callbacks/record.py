"""What became of a run, in a file that tables of runs and `ckpt=auto` read."""

import json
import logging
import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic

import pytorch_lightning as pl
import torch

from avdiffusion import run_folder
from avdiffusion.callbacks.checkpoint import Checkpoint
from avdiffusion.callbacks.loggers import Csv, TensorBoard
from avdiffusion.callbacks.stop import Stopped
from avdiffusion.callbacks.wandb_run import Wandb
from avdiffusion.writer import write_whole

log = logging.getLogger("avdiffusion")


class Record(pl.Callback):
    """Keeps `run.json` in the run folder: status, step, seconds over all starts, scores, machine.

    The status is `running`, `finished`, `stopped` (by a signal) or `failed`. A process that is
    killed leaves `running`. `objective` is the metric a sweep is judged by. W&B is told of the
    machine, too, and loggers that write files of the step they go on from.
    """

    def __init__(self, *, folder: str | Path, objective: str):
        self.path, self.objective = Path(folder, run_folder.RECORD), objective
        self.metrics, self.before, self.environment = {}, {}, {}
        self.status, self.since, self.began = "running", monotonic(), now()

    def setup(self, trainer: pl.Trainer, system: pl.LightningModule, stage: str) -> None:
        self.before = run_folder.status(self.path.parent)
        self.metrics = dict(self.before.get("metrics", {}))
        self.since, self.status = monotonic(), "running"

    def on_train_start(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.environment = environment(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, Csv | TensorBoard):
                logger.resume(trainer.global_step)
            if isinstance(logger, Wandb):
                logger.log_hyperparams({"environment": self.environment})
        self._write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._write(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, system: pl.LightningModule, checkpoint: dict
    ) -> None:
        self._write(trainer)

    def on_fit_end(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        """After all that other callbacks do at the end."""
        self.status = "finished"
        self._write(trainer)

    def on_exception(
        self, trainer: pl.Trainer, system: pl.LightningModule, exception: BaseException
    ) -> None:
        stopped = isinstance(exception, Stopped | KeyboardInterrupt)
        self.status = "stopped" if stopped else "failed"
        self._write(trainer)

    def _write(self, trainer):
        if not trainer.is_global_zero:
            return
        for name, value in trainer.callback_metrics.items():
            if name.startswith(("val/", "sample/")):
                self.metrics[name] = run_folder.number(value)
        best = {}
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoint) and callback.best_k_models:
                best = callback.best
        content = {
            "name": self.path.parent.name,
            "status": self.status,
            "step": trainer.global_step,
            "max_steps": trainer.max_steps,
            "seconds": round(self.before.get("seconds", 0) + monotonic() - self.since, 1),
            "starts": self.before.get("starts", 0) + 1,
            "started": self.before.get("started", self.began),
            "updated": now(),
            "objective": {"name": self.objective, "value": self.metrics.get(self.objective)},
            "metrics": dict(sorted(self.metrics.items())),
            "best": best,
            "environment": self.environment,
        }
        try:
            write_whole(self.path, json.dumps(content, indent=1).encode())
        except OSError as error:
            log.warning("%s could not be written, training goes on: %s", self.path, error)


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def environment(trainer: pl.Trainer) -> dict:
    """The command, the state of the source, versions and devices of this process."""
    root = Path(__file__).parents[3]
    packages = ("avdiffusion", "torch", "pytorch-lightning", "hydra-core", "av")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "git_commit": _git(root, "rev-parse", "HEAD"),
        "git_dirty": bool(_git(root, "status", "--porcelain")),
        "python": platform.python_version(),
        "versions": dict(_versions(packages)),
        "cuda": torch.version.cuda,
        "devices": devices or [f"{platform.processor() or platform.machine()}"],
        "processes": trainer.world_size,
        "cpus": os.cpu_count(),
        "host": platform.node(),
        "system": platform.platform(),
    }


def _versions(packages):
    for name in packages:
        with suppress(PackageNotFoundError):  # kept windows need no av
            yield name, version(name)


def _git(root, *words):
    """What git says about the folder the package is run from; empty if it is no checkout."""
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
