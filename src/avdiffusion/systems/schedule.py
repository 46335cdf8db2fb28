"""Learning-rate schedules."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup(
    optimizer: Optimizer,
    *,
    warmup_steps: int = 0,
    decay: str = "constant",
    total_steps: int | None = None,
    final: float = 0.0,
) -> LambdaLR:
    """A linear rise over `warmup_steps`, then constant, or a cosine down to `final` at the end."""
    if decay not in ("constant", "cosine"):
        raise ValueError(f"decay={decay!r} is not one of constant, cosine")
    if decay == "cosine" and (total_steps is None or total_steps < 1):
        raise ValueError(f"decay=cosine needs an end, not {total_steps}: set trainer.max_steps")

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup_steps + 1))
        if decay == "constant" or step < warmup_steps:
            return rise
        share = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share))

    return LambdaLR(optimizer, factor)
