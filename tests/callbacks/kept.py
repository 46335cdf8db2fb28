"""A logger that keeps what it is given, and a system that can be led astray."""

import math

from pytorch_lightning.loggers.logger import Logger
from small_system import system

from avdiffusion.systems.diffusion import DiffusionSystem


class Kept(Logger):
    """`rows`: (step, metrics) in order; `steps`: step to all metrics of it."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *_):
        pass

    @property
    def steps(self):
        merged = {}
        for step, metrics in self.rows:
            merged.setdefault(step, {}).update(metrics)
        return merged


def straying(at, *, only=None, **options):
    """The small system, whose loss is NaN in optimiser steps `at`, counted from 1.

    `only`: in the process of this rank.
    """
    model = system(**options)

    def step(batch, batch_idx):
        out = DiffusionSystem.training_step(model, batch, batch_idx)
        if model.global_step + 1 in at and only in (None, model.global_rank):
            out["loss"] = out["loss"] * math.nan
        return out

    model.training_step = step
    return model
