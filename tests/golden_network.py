"""Weights and inputs of the recorded network cases, drawn from names (tests/golden/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

GOLDEN = Path(__file__).parent / "golden"


def recording(case):
    """A case's arrays and its description."""
    arrays = np.load(GOLDEN / f"coupled_unet.{case}.npz")
    return arrays, json.loads(str(arrays["meta"]))


def z(name, shape):
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def weight(key, shape, salt="a."):
    """A tensor of the published layout."""
    value = z(salt + key, shape)
    if len(shape) > 1:
        value = value / np.sqrt(np.prod(shape[1:]))
    else:
        value = 0.1 * value + key.endswith("weight")
    return torch.tensor(value, dtype=torch.float32)


def weights(meta):
    return {key: weight(key, shape, meta["salt"]) for key, shape in meta["parameters"]}


def inputs(meta):
    """video [B, C, T, H, W], audio [B, C, L] and times [B]."""
    salt, config = meta["salt"], meta["config"]
    video = torch.tensor(z(salt + "in.video", (meta["batch"], *config["video_size"]))).float()
    audio = torch.tensor(z(salt + "in.audio", (meta["batch"], *config["audio_size"]))).float()
    return (
        rearrange(video, "b t c h w -> b c t h w"),
        audio,
        torch.tensor(meta["timesteps"]).float(),
    )


def frames_first(video):
    """As the arrays have it."""
    return rearrange(video, "b c t h w -> b t c h w")


def relative(ours, theirs):
    theirs = torch.as_tensor(theirs)
    return ((ours.detach() - theirs).abs().max() / theirs.abs().max()).item()
