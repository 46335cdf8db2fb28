"""DDPM, DDIM and the loss against numbers recorded from the published implementation."""

import pytest
import torch
from golden_media import ClosedForm, Recorded, close, load, z

from avdiffusion.diffusion.diffusion import Diffusion
from avdiffusion.diffusion.guide import Clamp, Task
from avdiffusion.diffusion.path import DiscreteVP
from avdiffusion.media import Media
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.samplers.sampler import last

ARRAYS, META = load("samplers.npz")
SHAPES = {"video": META["video_shape"], "audio": META["audio_shape"]}


def inputs(name: str, scale: float = 1.0) -> Media:
    return Media({k: z(f"s.{name}.{k}", shape, scale) for k, shape in SHAPES.items()})


@pytest.mark.parametrize(
    ("case", "betas", "sampler"),
    [
        ("ddpm50.linear", "linear", DDPM(steps=50, grid="sections", variance="large")),
        ("ddpm50.cosine", "cosine", DDPM(steps=50, grid="sections", variance="large")),
        ("ddim25.linear", "linear", DDIM(steps=25, grid="leading")),
        ("ddim25.cosine", "cosine", DDIM(steps=25, grid="leading")),
        ("ddim25.eta0.5.linear", "linear", DDIM(steps=25, grid="leading", eta=0.5)),
    ],
)
def test_sampler(case, betas, sampler):
    path = DiscreteVP(betas=betas)
    diffusion = Diffusion(net=ClosedForm(), path=path)
    denoise = Clamp()(lambda x, t: diffusion.predict(x, t, {}), Task(path))
    x = last(sampler(denoise, inputs("xT"), path, noise=Recorded()))
    for name in SHAPES:
        close(x[name], ARRAYS[f"{case}.{name}"])


@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_loss(betas):
    diffusion = Diffusion(net=ClosedForm(), path=DiscreteVP(betas=betas))
    steps = torch.tensor(META["timesteps_for_loss"], dtype=torch.float64)
    x0 = inputs("x0", 0.5).map(lambda v: v.clamp(-1, 1))
    loss = diffusion.loss(x0, {}, t=(steps + 1) / 1000, noise=inputs("n"))
    for name in SHAPES:
        close(loss[name], ARRAYS[f"loss.{betas}.mse_{name}"])
