"""Diffusion models of synchronised audio and video.

`avdiffusion.load("last.ckpt").sample(num=4, seed=0)` gives clips as tensors.
"""


def load(ckpt, *, trust: bool = False, device: str | None = None):
    """The system of a checkpoint; see `avdiffusion.checkpoint.load`."""
    from avdiffusion.checkpoint import load  # Lightning and Hydra take seconds to import

    return load(ckpt, trust=trust, device=device)
