"""Videos of a model of video alone: new ones, and ones that lie between two others.

The calls are those of DiffusionPlayground's `VideoGenerator`. Files with pages about them, several
devices and other guides are what sample.py is for.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from einops import rearrange
from torch import Tensor

from avdiffusion import checkpoint, io
from avdiffusion.diffusion.known import Reconstruct
from avdiffusion.diffusion.noise import Noise
from avdiffusion.interpolate import invert, morph, slerp, transition
from avdiffusion.media import Media
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.sampler import Sampler, last
from avdiffusion.systems.system import System, unit
from avdiffusion.writer import pixels

MODES = ("morph", "transition", "between")
STRENGTHS = {"ddim_inversion": 1.0, "noise": 0.5}
BLENDS = {"ddim_inversion": slerp, "noise": torch.lerp}
CONTEXT = 2  # frames on either side from which new ones go on: two say how fast things move
log = logging.getLogger("avdiffusion")


class VideoGenerator:
    """The averaged model of a checkpoint: a file, a run folder, `best` or `last` of the newest run.

    Videos are [B, 3, T, H, W] in [-1, 1], on the CPU.
    """

    def __init__(
        self, ckpt: str | Path = "best", *, device: str | None = None, trust: bool = False
    ):
        system = checkpoint.load(ckpt, device=device, trust=trust)
        if list(system.shapes) != ["video"] or system.remakes or system.model.conditioner:
            raise ValueError(
                f"{ckpt} makes {' and '.join(system.shapes)}, or makes it of something given: "
                "VideoGenerator is for models of video alone, sample.py takes every model"
            )
        self.system = system

    def generate(
        self,
        num_samples: int = 2,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_steps: int | None = None,
        *,
        seed: int = 0,
        sampler: Sampler | None = None,
        micro_batch: int = 8,
        return_uint8: bool = False,
    ) -> Tensor:
        """New videos, of the length and size of those the model was trained on unless told others.

        `num_steps` are evaluations of the network, the checkpoint's own number by default, as its
        `sampler` is. Sample i of a seed does not depend on how many there are but for rounding.
        """
        channels, *own = self.system.shapes["video"]
        asked = (num_frames, height, width)
        size = [n if one is None else one for n, one in zip(own, asked, strict=True)]
        made = self._sized(channels, *size).sample(
            num_samples,
            seed=seed,
            sampler=self._sampler(num_steps, sampler),
            micro_batch=min(micro_batch, max(num_samples, 1)),
        )["video"]
        return torch.from_numpy(pixels(made)) if return_uint8 else made.clamp(-1, 1)

    @torch.no_grad()
    def interpolate(
        self,
        video1: Tensor,
        video2: Tensor,
        num_steps: int = 50,
        num_interp_frames: int = 20,
        *,
        mode: str = "morph",
        encode: str = "ddim_inversion",
        strength: float | None = None,
        refine: int = 3,
        concat: bool = False,
        clip_endpoints: bool = False,
        seed: int = 0,
        batch_size: int = 8,
    ) -> Tensor:
        """What lies between two videos of one size, after `num_steps` evaluations of each.

        "morph": `num_interp_frames` videos [B, N, 3, T, H, W] from the first to the second, with
        `concat` one after another, [B, 3, N T, H, W]. "transition": a video that begins as the
        first and ends as the second. "between": the last two frames of the first, as many new
        frames as asked for and the first two of the second, which are held (`Reconstruct`).

        The first two blend what lies at `strength` of the way to the noise: where deterministic
        DDIM came from, along a circle ("ddim_inversion", with `refine` as `invert` has it; to the
        end), or the videos with noise of `seed` that they share, along a line ("noise"; half the
        way). No guide takes part, else none would lead back. `clip_endpoints` puts the given
        videos, or frames, at both ends.
        """
        if mode not in MODES or encode not in STRENGTHS:
            raise ValueError(
                f"mode={mode!r} is one of {', '.join(MODES)}, and encode={encode!r} of "
                f"{', '.join(STRENGTHS)}"
            )
        strength = STRENGTHS[encode] if strength is None else strength
        if num_interp_frames < 1 or not 0 < strength <= 1:
            raise ValueError(
                f"num_interp_frames={num_interp_frames} is 1 or more, and strength={strength} "
                "above 0 and at most 1"
            )
        first, second = self._pair(video1, video2, any_length=mode == "between")
        if mode == "between":
            return self._between(first, second, num_steps, num_interp_frames, seed, batch_size)
        path, blend = self.system.model.path, BLENDS[encode]
        times = DDIM(steps=num_steps).times(path, path.t_max * strength)
        ends = self._raised(torch.cat((first, second)), times, encode, refine, seed, batch_size)
        if mode == "morph":
            states = morph(*ends.chunk(2), num_interp_frames, blend)
        else:
            states = transition(*ends.chunk(2), blend)[:, None]
        made = self._lowered(states.flatten(0, 1), times, batch_size)
        made = made[..., : first.shape[-2], : first.shape[-1]].clamp(-1, 1)
        made, axis = made.unflatten(0, states.shape[:2]), 1
        if mode == "transition":
            made, axis, first, second = made[:, 0], 2, first[:, :, 0], second[:, :, -1]
        if clip_endpoints and made.shape[axis] > 1:
            made.select(axis, 0).copy_(first)
            made.select(axis, -1).copy_(second)
        if concat and mode == "morph":
            made = rearrange(made, "b n c t h w -> b c (n t) h w")
        return made.cpu()

    def save(self, videos: Tensor, folder: str | Path) -> list[Path]:
        """Writes each video, also [B, N, 3, T, H, W] or uint8, as an MP4 at the model's rate."""
        return [
            io.write_mp4(
                Path(folder) / f"{i:06d}.mp4", pixels(video), fps=self.system.rates["video"]
            )
            for i, video in enumerate(videos.flatten(0, -5))
        ]

    def _sampler(self, steps: int | None, sampler: Sampler | None = None) -> Sampler:
        sampler = sampler or self.system.sampler
        return sampler if steps is None else replace(sampler, steps=steps)

    def _sized(self, *shape: int) -> System:
        """The system with the same weights for videos of another shape."""
        like = copy.copy(self.system)
        like.shapes = {"video": list(shape)}
        return like

    def _pair(self, *videos: Tensor, any_length: bool) -> list[Tensor]:
        """Both on the model's device in [-1, 1], where they have to be of one shape."""
        channels = self.system.shapes["video"][0]
        for video in videos:
            if video.dim() != 5 or video.shape[1] != channels:
                raise ValueError(f"a video is [B, {channels}, T, H, W], not {list(video.shape)}")
        sizes = [[n for k, n in enumerate(v.shape) if k != 2 or not any_length] for v in videos]
        if sizes[0] != sizes[1]:
            raise ValueError(f"videos of {sizes[0]} and {sizes[1]} have no middle: make them alike")
        pair = [unit(video).to(self.system.device) for video in videos]
        reach = max(float(video.abs().max()) for video in pair)
        if reach > 1.01:
            log.warning("these videos reach %.3g: models know clips in [-1, 1]", reach)
        return pair

    def _raised(self, clips, times, encode, refine, seed, size):
        """Of the first and the second videos, states at the first of `times`."""
        codec, path = self.system.codec, self.system.model.path
        x = batched(codec.encode, clips, size)
        if encode == "ddim_inversion":
            denoise = self.system.denoise(self.system.task)
            up = partial(invert, denoise, path=path, times=times, refine=refine)
            return batched(up, x, size)
        shared = Noise(seed, [*range(len(x) // 2)] * 2, "interpolate")
        return path.alpha(times[0]) * x + path.sigma(times[0]) * codec.noise(shared).like(x)

    def _lowered(self, states, times, size):
        """The videos that DDIM makes of states at the first of `times`."""
        task, path = self.system.task, self.system.model.path
        denoise, walk = self.system.denoise(task), DDIM()

        def made(x: Media) -> Media:
            return task.decode(last(walk.solve(denoise, x, path, times, None)))

        return batched(made, states, size)

    def _between(self, first, second, steps, count, seed, batch_size):
        """Both ends, held, and `count` frames that the model makes to go with them."""
        before, after = first[:, :, -CONTEXT:].cpu(), second[:, :, :CONTEXT].cpu()
        gap = before.new_zeros(*before.shape[:2], count, *before.shape[3:])
        clips = torch.cat((before, gap, after), 2)
        there = torch.ones(clips.shape[2], dtype=torch.bool)
        there[before.shape[2] : -after.shape[2]] = False
        given = [SimpleNamespace(values={"video": v}, mask={"video": there}) for v in clips]
        made = self._sized(*clips.shape[1:]).sample(
            len(clips),
            seed=seed,
            given=given,
            sampler=self._sampler(steps),
            guides=[*self.system.guides, Reconstruct()],
            micro_batch=min(batch_size, len(clips)),
        )["video"]
        return torch.where(there[:, None, None], made, made.clamp(-1, 1))


def batched(function: Callable[[Media], Media], x: Tensor, size: int) -> Tensor:
    """A function of clips, `size` at a time."""
    return torch.cat([function(Media(video=part))["video"] for part in x.split(size)])
