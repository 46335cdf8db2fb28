"""How large gradients are, and what happens when they are not finite."""

import logging
import re
from collections import Counter

import pytorch_lightning as pl
import torch

from avdiffusion.callbacks.scalars import Scalars

log = logging.getLogger("avdiffusion")
# Parts of parameter names that tell a stream; modalities tell their own, the rest is "shared".
STREAMS = {"cross": "cross", "spatial": "video", "temporal": "video"}


class Gradients(Scalars):
    """Leaves out optimiser steps whose gradient is not finite; logs what the others work with.

    That is `train/grad_norm` before clipping and `train/grad_norm_<stream>`, means over the steps
    since the last log, `train/lr`, `train/ema_decay`, and how many steps were left out,
    `train/skipped_steps`. Such a step changes neither parameters nor moments. `stop_after` of them
    in a row end the run with an error (0: never), found when it is time to log.
    """

    def __init__(self, *, stop_after: int = 25):
        if stop_after < 0:
            raise ValueError(f"stop_after={stop_after} is below 0")
        self.stop_after, self.skipped, self.streak, self.window = stop_after, 0, 0, []

    def on_train_start(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        super().on_train_start(trainer, system)
        streams = {**{name: name for name in system.shapes}, **STREAMS}
        self.window, self.parameters = [], []
        for name, parameter in system.model.named_parameters():
            words = [word for word in re.split(r"[._]", name) if word in streams]
            self.parameters.append((streams[words[0]] if words else "shared", parameter))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, system: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        found = [(stream, p.grad) for stream, p in self.parameters if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([g for _, g in found], dtype=torch.float32))
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            bad = norms.isfinite().all().logical_not()
            if fused and optimizer.state:
                optimizer.found_inf = bad.float()  # read on the device, as a GradScaler's is
            elif bad:  # a first fused step would leave SGD's momentum undefined
                optimizer.zero_grad(set_to_none=True)
        elif fused:  # the scaler leaves steps out by itself; here it has yet to unscale
            norms = norms / scaler._get_scale_async()
        self.window.append((trainer.global_step + 1, [stream for stream, _ in found], norms))
        self.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, system: pl.LightningModule, *_: object
    ) -> None:
        if not self.due(trainer):
            return
        finite, bad, self.streak = self._read()
        self.skipped, self.window = self.skipped + len(bad), []
        values = {"train/lr": float(self.lr), "train/skipped_steps": self.skipped}
        if hasattr(system.ema, "get_current_decay"):
            values["train/ema_decay"] = float(system.ema.get_current_decay())
        for name in finite[0] if finite else ():
            values[f"train/grad_norm{name}"] = sum(each[name] for each in finite) / len(finite)
        self.send(trainer, values)
        if bad and trainer.is_global_zero:
            shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            many = "s" if len(bad) > 1 else ""
            log.warning(
                "%d step%s skipped: the gradient is not finite (step%s %s)",
                *(len(bad), many, many, shown),
            )
        if 0 < self.stop_after <= self.streak:
            raise ValueError(
                f"the gradient was not finite in {self.streak} steps in a row, up to step "
                f"{trainer.global_step}: nothing is learnt any more. Lower model.optimizer.lr, "
                f"set trainer.gradient_clip_val=1, use trainer.precision=bf16-mixed instead of "
                f"16-mixed, or look for values in the data that are not finite "
                f"(callbacks.gradients.stop_after=0 goes on regardless)"
            )

    def state_dict(self) -> dict:
        _, bad, streak = self._read()
        return {"skipped": self.skipped + len(bad), "streak": streak}

    def load_state_dict(self, state_dict: dict) -> None:
        self.skipped, self.streak = state_dict["skipped"], state_dict["streak"]

    def _read(self):
        """Norms by stream of the window's finite steps, numbers of the others, those in a row."""
        finite, bad, streak = [], [], self.streak
        if not self.window:
            return finite, bad, streak
        norms = torch.cat([norms for _, _, norms in self.window]).double().cpu()
        parts = norms.split([len(norms) for _, _, norms in self.window])
        for (step, streams, _), norms in zip(self.window, parts, strict=True):
            if not norms.isfinite().all():
                bad.append(step)
                streak += 1
                continue
            squares, streak = Counter(), 0
            for stream, square in zip(streams, norms.square().tolist(), strict=True):
                squares[f"_{stream}"] += square
                squares[""] += square
            finite.append({name: square**0.5 for name, square in squares.items()})
        return finite, bad, streak
