"""A super-resolution system small enough to sample from within a test."""

from functools import partial

import torch

from avdiffusion.diffusion.diffusion import Diffusion
from avdiffusion.diffusion.path import DiscreteVP
from avdiffusion.nn.unet import UNet
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.systems.average import EMA
from avdiffusion.systems.codec import Frames
from avdiffusion.systems.condition import LowRes
from avdiffusion.systems.diffusion import DiffusionSystem


def sr_system(*, scale=4, size=16, frames=1, codec=None, sampler=None, target="v", **options):
    """Frames of `size` made of those `scale` times smaller; its average has been somewhere."""
    torch.manual_seed(0)
    net = UNet(channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,))
    system = DiffusionSystem(
        diffusion=Diffusion(
            net=net,
            path=DiscreteVP(betas="linear"),
            target=target,
            learned_variance=True,
            conditioner=LowRes(scale=scale),
        ),
        shapes={"video": [3, frames, size, size]},
        rates={"video": 10},
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        ema=partial(EMA, beta=0.9),
        sampler=sampler or DDIM(steps=3),
        codec=codec or Frames(),
        **options,
    )
    with torch.no_grad():
        for parameter in system.ema.ema_model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return system


def low_res(count=2, frames=3, height=4, width=4, seed=0):
    """A batch of small clips, no two frames alike."""
    rng = torch.Generator().manual_seed(seed)
    return {"low_res": torch.rand(count, 3, frames, height, width, generator=rng) * 2 - 1}
