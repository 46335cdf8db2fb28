"""Where a run goes on: Lightning's loops as they stand between two optimiser steps.

Lightning stores its counters as they happen to be, in micro-batches of the devices it ran on. Here
they are rewritten from the optimiser step alone, so that a run may go on with other devices, after
a stop amid an accumulated step, before the validation of its step, or after its last step.
"""

from collections.abc import Mapping

import pytorch_lightning as pl
from pytorch_lightning.loops.fit_loop import _FitLoop
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def due(trainer: pl.Trainer, step: int) -> bool:
    """Whether optimiser step `step` is followed by a validation."""
    interval = trainer.val_check_interval
    if not trainer.enable_validation or not isinstance(interval, int) or not step:
        return False
    return step * trainer.accumulate_grad_batches % interval == 0


def rewind(loops: Mapping, trainer: pl.Trainer, *, step: int, validated: int) -> None:
    """Sets the counters of a checkpoint's `loops` to just after optimiser step `step`.

    `validated` is the step of the last validation that was completed; one that is due at `step` and
    was not is run before training goes on.
    """
    fit, epoch = loops["fit_loop"], "epoch_loop."
    optimisation = fit[f"{epoch}automatic_optimization.optim_progress"]["optimizer"]
    for progress in (optimisation["step"], optimisation["zero_grad"]):
        _count(progress, step)
    _count(fit[f"{epoch}scheduler_progress"], step)
    _count(fit[f"{epoch}batch_progress"], step * trainer.accumulate_grad_batches)
    fit[f"{epoch}batch_progress"]["is_last_batch"] = False
    _count(fit["epoch_progress"], 0, begun=1)
    pending = due(trainer, step) and validated != step
    _count(fit[f"{epoch}val_loop.batch_progress"], 0)
    fit[f"{epoch}val_loop.batch_progress"]["is_last_batch"] = False
    if pending:  # as if it had stopped within its first batch
        fit[f"{epoch}val_loop.batch_progress"]["total"].update(ready=1, started=1)
    # Lightning adds the step that a validation belongs to when that is over or passed by.
    fit[f"{epoch}state_dict"]["_batches_that_stepped"] = step - due(trainer, step)


def settle(optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Takes the settings from the config where a checkpoint has brought its own.

    State, such as moments and how far a schedule is, remains the checkpoint's.
    """
    for group in optimizer.param_groups:
        group.update({k: v for k, v in optimizer.defaults.items() if k != "lr"})
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [optimizer.defaults["lr"]] * len(optimizer.param_groups)
        rates = zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        for group, base, factor in rates:
            group.update(initial_lr=base, lr=base * factor(scheduler.last_epoch))
    elif scheduler is None:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"]


def _count(progress, done, begun=0):
    for part in (progress["total"], progress["current"]):
        begin = {key: done + begun for key in ("ready", "started") if key in part}
        part.update(dict.fromkeys(part, done) | begin)


class FitLoop(_FitLoop):
    """Lightning's loop, which leaves out what ends a run when that goes on after its last step.

    A run killed while it validates or samples for the last time still has that to do.
    """

    @classmethod
    def replace(cls, trainer: pl.Trainer) -> None:
        """Gives a trainer this loop for its own."""
        old = trainer.fit_loop
        trainer.fit_loop = cls(trainer, old.min_epochs, old.max_epochs)
        trainer.fit_loop.epoch_loop = old.epoch_loop

    @property
    def skip(self) -> bool:
        return self.trainer.limit_train_batches == 0 or self.max_batches == 0

    def on_run_start(self) -> None:
        super().on_run_start()
        validation = self.epoch_loop.val_loop
        validation.update_restart_stage()
        if self.restarting and self.done and validation.restarted_mid_evaluation:
            self.trainer.validating = True
            validation.run()
            self.trainer.training = True
        if self.done:
            self.epoch_loop._batches_that_stepped = self.epoch_loop.global_step
