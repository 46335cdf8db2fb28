"""The published implementation's recorded figures and the inputs they were recorded on."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

from avdiffusion.media import Media

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict, dict]:
    """(arrays, meta) of a golden file."""
    arrays = np.load(FOLDER / name)
    return arrays, json.loads(str(arrays["meta"]))


def z(name: str, shape, scale: float = 1.0) -> torch.Tensor:
    """The deterministic tensor of golden/README.md."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * scale
    return torch.from_numpy(values.astype(np.float32))


def close(ours: torch.Tensor, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    theirs = torch.from_numpy(np.asarray(theirs)).double()
    worst = (ours.double() - theirs).abs().max() / theirs.abs().max()
    assert worst <= tolerance, f"off by {worst:.2e} of the largest value"


class Recorded:
    """Step noise in the order the published code drew it, for `noise.like`."""

    def __init__(self):
        self.rng = np.random.default_rng(7)

    def like(self, x: Media) -> Media:
        return x.map(lambda v: torch.from_numpy(self.rng.standard_normal(v.shape)).to(v.dtype))


class ClosedForm(torch.nn.Module):
    """The closed-form eps network of golden/README.md, on video [B, F, C, H, W]."""

    def forward(self, video, audio, *, time):
        s = time / 1000

        def mean(v):
            return v.flatten(1).mean(1)

        def row(v, like):
            return v.view(-1, *[1] * (like.dim() - 1))

        eps_video = torch.tanh(video) * row(0.3 + 0.6 * s, video) + row(0.1 * mean(audio), video)
        eps_audio = torch.sin(audio) * row(0.2 + 0.7 * s, audio) + row(0.1 * mean(video), audio)
        return eps_video, eps_audio
