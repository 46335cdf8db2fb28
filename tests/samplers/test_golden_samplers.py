"""Samplers and the loss against numbers recorded from the published implementation."""

import pytest
import torch
from golden_media import ClosedForm, Recorded, close, load, z

from avdiffusion.diffusion.diffusion import Diffusion
from avdiffusion.diffusion.guide import Clamp, IntegerTimes, Task, Threshold
from avdiffusion.diffusion.known import Replace
from avdiffusion.diffusion.path import DiscreteVP
from avdiffusion.media import Media
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.samplers.dpm_solver import DPMSolver
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


ADAPTIVE = {"method": "adaptive", "error": "batch"}
THIRD = {"order": 3, "method": "singlestep"}
DPM_SOLVERS = {
    "dpm_solver.singlestep3.logSNR.20": DPMSolver(form="noise", **THIRD),
    "dpm_solver.singlestep2.time_uniform.15": DPMSolver(
        form="noise", method="singlestep", steps=15, grid="time_uniform"
    ),
    "dpm_solver.multistep3.time_uniform.20": DPMSolver(form="noise", order=3, grid="time_uniform"),
    "dpm_solver.adaptive3": DPMSolver(form="noise", order=3, **ADAPTIVE),
    "dpm_solver++.multistep2.time_uniform.20": DPMSolver(grid="time_uniform"),
    "dpm_solver++.multistep3.logSNR.20": DPMSolver(order=3),
    "dpm_solver++.singlestep3.time_quadratic.18": DPMSolver(steps=18, grid="quadratic", **THIRD),
    "dpm_solver++.adaptive2.thresholding": DPMSolver(**ADAPTIVE),
}


def test_every_dpm_solver_case_is_there():
    cases = {name.rsplit(".", 1)[0] for name in ARRAYS if name.startswith("dpm_solver")}
    assert cases == DPM_SOLVERS.keys()


@pytest.mark.parametrize("case", DPM_SOLVERS)
def test_dpm_solver(case):
    """The published code told the network truncated times; ours does so when asked."""
    path = DiscreteVP()
    diffusion = Diffusion(net=ClosedForm(), path=path)
    denoise = IntegerTimes()(lambda x, t: diffusion.predict(x, t, {}), Task(path))
    if case.endswith("thresholding"):
        denoise = Threshold()(denoise, Task(path))
    x = last(DPM_SOLVERS[case](denoise, inputs("xT"), path))
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


@pytest.mark.parametrize(("given", "made"), [("audio", "video"), ("video", "audio")])
def test_replacement(given, made):
    """The published way to hold a modality: noised with the same noise at every step."""
    path, start = DiscreteVP(), inputs("xT")
    diffusion = Diffusion(net=ClosedForm(), path=path)
    known = inputs("x0", 0.5).map(lambda v: v.clamp(-1, 1))
    mask = known.map(lambda v: torch.zeros_like(v, dtype=torch.bool))
    mask[given] |= True
    task = Task(path, known=known, mask=mask, noise=start)
    denoise = Clamp()(lambda x, t: diffusion.predict(x, t, {}), task)
    sampler = DDPM(steps=50, grid="sections", variance="large")
    x = last(sampler(Replace()(denoise, task), start, path, noise=Recorded()))
    close(x[made], ARRAYS[f"{given}2{made}.replacement.ddpm50.{made}"])
