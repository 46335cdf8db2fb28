"""The calls by which LLM_agent_v2v made videos of others, on the systems and data that are here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avdiffusion import checkpoint
from avdiffusion.data.pairs import Pairs
from avdiffusion.diffusion.noise import key
from avdiffusion.io import read_clip
from avdiffusion.restore import restore
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.stream import place
from avdiffusion.systems.system import System

SAMPLERS = {"ddim": DDIM, "ddpm": DDPM}
SOURCES = {"list": "pairs", "directory": "root"}  # and what `Pairs` calls them
TRAINED = (
    "models are described by configs and trained by one command here, "
    "python train.py exp=v2v_seed data.root=PAIRS init.codec.system=VAE_RUN: "
    "docs/video_to_video.md has a line for each of the original's keys"
)


class VideoToVideoDiffusion:
    """Where models of videos of others are had; a model is a `DiffusionSystem`."""

    def __init__(self, config: Mapping[str, Any] | None = None):
        raise ValueError(TRAINED)

    @staticmethod
    def load_checkpoint(
        path: str | Path, *, device: str | None = None, trust: bool = False
    ) -> tuple[System, dict[str, Any]]:
        """The averaged model of a file, run folder, `best` or `last`, and what the file holds."""
        system = checkpoint.load(path, device=device, trust=trust)
        if not (system.sampler and system.remakes and system.remakes.modality == "video"):
            raise ValueError(f"{path} makes no video of another one: train one with exp=v2v")
        return system, checkpoint.read(path, mmap=True)


class Trainer:
    """Training by the original's call, which is refused: train.py does it."""

    def __init__(self, *parts: object, **named: object):
        raise ValueError(TRAINED)


class VideoDataset(Pairs):
    """Pairs of videos: a list of {input, target}, or a folder with `input` and `target` in it.

    Items are those of `Pairs`, whose other settings are taken as well: `source` and `video` uint8
    [3, T, H, W], both of the same moments. All pairs are in it unless told another `split`.
    """

    def __init__(
        self,
        data_source: Sequence[Mapping[str, str]] | str | Path,
        source_type: str = "directory",
        *,
        num_frames: int = 16,
        resolution: Sequence[int] = (256, 256),
        split: str = "all",
        **others: Any,
    ):
        if source_type not in SOURCES:
            raise ValueError(
                f"source_type={source_type!r} is not one of {', '.join(SOURCES)}: save a set from "
                "elsewhere as files first"
            )
        where = {SOURCES[source_type]: data_source}
        super().__init__(**where, frames=num_frames, size=resolution, split=split, **others)


def generate_video(
    model: System,
    input_video_path: str | Path,
    output_path: str | Path,
    sampler_type: str = "ddim",
    num_inference_steps: int = 20,
    *,
    seed: int = 0,
) -> Tensor:
    """Writes what a model makes of a video, and returns its pictures, [3, T, H, W] in [-1, 1].

    They are read back from the file, at its mean rate. It has the input's size, frame times and
    sound, and the suffix of a container in which the sound can stay as it is.
    """
    if sampler_type not in SAMPLERS:
        raise ValueError(f"sampler_type={sampler_type!r} is not one of {', '.join(SAMPLERS)}")
    source = Path(input_video_path)
    target = place(source, output_path)
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the video that is given: the result needs another name")
    restore(
        model,
        source,
        target,
        index=key("clip", source.name),  # as sample.py counts files
        frames=16 if getattr(model.model.net, "framewise", False) else model.shapes["video"][1],
        seed=seed,
        sampler=SAMPLERS[sampler_type](steps=num_inference_steps),
    )
    made = read_clip(target, modalities=["video"])["video"]
    return torch.from_numpy(made).float() / 127.5 - 1
