"""A model of plain noise ends where mathematics says, which shows that training works at all."""

from functools import partial

import pytest
import torch
from small_system import fit

from avdiffusion.data.module import DataModule
from avdiffusion.data.shapes import GaussianNoise
from avdiffusion.diffusion.diffusion import Diffusion
from avdiffusion.diffusion.path import DiscreteVP
from avdiffusion.diffusion.weight import Uniform
from avdiffusion.media import Media
from avdiffusion.nn.unet import UNet
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.systems.average import EMA
from avdiffusion.systems.diffusion import DiffusionSystem

CLIP = {"frames": 4, "size": (8, 8)}
BEST = {"linear": 0.2755, "cosine": 0.4956}  # means of alpha^2 over 1000 steps, spec/video.md 1.6


def noise_system(betas):
    torch.manual_seed(0)
    net = UNet(
        dims=3,
        concat_channels=0,
        channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        num_heads=1,
        conv="2plus1d",
        attention="factorised",
        attention_resolutions=(),
        resblock_updown=False,
        out_factor=1,
    )
    return DiffusionSystem(
        diffusion=Diffusion(net=net, path=DiscreteVP(betas=betas), density=Uniform(steps=1000)),
        shapes={"video": [3, 4, 8, 8]},
        rates={"video": 10},
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
        ema=partial(EMA, beta=0.95, inv_gamma=1.0, power=2 / 3),
        sampler=DDIM(steps=5),
    )


@pytest.mark.parametrize("betas", BEST)
def test_the_best_loss_is_the_mean_signal(betas):
    path = DiscreteVP(betas=betas)
    steps = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert float((path.alpha(steps) ** 2).mean()) == pytest.approx(BEST[betas], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("betas", BEST)
def test_a_small_network_gets_there_in_a_minute(betas):
    """Two different noises in the loss would end at 1, a network that gives 0 begins there."""
    system = noise_system(betas)
    data = DataModule(
        train=GaussianNoise(**CLIP), **CLIP, fps=10, sample_rate=None, samples=None, batch_size=16
    )
    held_out = GaussianNoise(seed=1, **CLIP)
    x0, eps = (torch.stack([held_out[k]["video"] for k in range(n, n + 250)]) for n in (0, 250))
    t = (torch.arange(250, dtype=torch.float64) * 4 + 2) / 1000

    def loss():
        with torch.no_grad():
            given = {"t": t, "noise": Media(video=eps)}
            return float(system.ema.ema_model.loss(Media(video=x0), {}, **given)["video"].mean())

    assert loss() == pytest.approx(1, abs=0.02)
    fit(system, 150, data, gradient_clip_val=1.0)
    assert loss() == pytest.approx(BEST[betas], abs=0.02)
