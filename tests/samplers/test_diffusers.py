"""The samplers against those of a second library: same network, times and noise."""

from itertools import pairwise

import diffusers
import pytest
import torch
from test_samplers import normal

from avdiffusion.diffusion.diffusion import Prediction
from avdiffusion.diffusion.path import DiscreteVP, RectifiedFlow
from avdiffusion.samplers.dpm_solver import DPMSolver
from avdiffusion.samplers.euler import Euler, EulerAncestral
from avdiffusion.samplers.heun import Heun
from avdiffusion.samplers.sampler import last
from avdiffusion.samplers.sde_dpm_solver import SDEDPMSolver
from avdiffusion.samplers.unipc import UniPC

PATHS = {"linear": DiscreteVP(), "flow": RectifiedFlow()}
DOUBLE, SINGLE = 1e-12, 3e-6  # by what a scheduler computes in


class Drawn:
    """Step noise as the other library draws it."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def like(self, x):
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


def eps(x, t):
    """The noise that a closed form sees in x at a time; no distribution has it."""
    return torch.tanh(x) * (0.3 + 0.6 * t) + 0.2 * torch.sin(2 * x) * t**2


def denoiser(path):
    def denoise(x, t):
        found = eps(x, t)
        return Prediction((x - path.sigma(t) * found) / path.alpha(t), found)

    return denoise


def levels(scheduler, steps):
    """The scheduler's own sigma / alpha (a flow's: sigma), kept by it in double precision."""
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    return scheduler.sigmas


def check(ours, theirs, tolerance):
    assert torch.isfinite(theirs).all()
    worst = float((ours - theirs).abs().max() / theirs.abs().max())
    assert worst <= tolerance, f"off by {worst:.1e} of the largest value"


def states(scheduler, sampler, steps, path):
    """Ours and theirs after each step, where a scheduler's state is x and it is called once a step.

    Both are, at any step, those before a correction.
    """
    flow = isinstance(path, RectifiedFlow)
    sigmas = levels(scheduler, steps)
    times = sigmas if flow else path.time(-sigmas.log())
    x = theirs = normal(2, 50)
    noise, sde = Drawn(), isinstance(sampler, SDEDPMSolver)
    ours = sampler.solve(denoiser(path), x, path, times, Drawn())
    for state, place, t in zip(ours, scheduler.timesteps, times[:-1], strict=True):
        found = eps(theirs, t)
        if flow:  # its network predicts eps - x0
            found = (found - theirs) / path.alpha(t)
        drawn = {"variance_noise": noise.like(theirs)} if sde else {}
        theirs = scheduler.step(found, place, theirs, **drawn).prev_sample
        yield state, theirs


def options(path):
    if isinstance(path, RectifiedFlow):
        return {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return {}


ON_BOTH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
STEPS = pytest.mark.parametrize("steps", [2, 8, 20])


@STEPS
@ON_BOTH
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_to_the_data(variant, order, path, steps):
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type=variant, **options(path)
    )
    *pairs, end = states(scheduler, UniPC(order=order, variant=variant), steps, path)
    if variant == "bh2":
        pairs.append(end)
    else:  # their B(h) = h is infinite in the last step, times 0
        assert end[1].isnan().all()
    for ours, theirs in pairs:
        check(ours, theirs, DOUBLE)


@STEPS
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_of_full_order_to_the_lowest_time(variant, order, steps):
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order,
        solver_type=variant,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    sampler = UniPC(order=order, variant=variant, lower_order_final=False)
    for ours, theirs in states(scheduler, sampler, steps, PATHS["linear"]):
        check(ours, theirs, DOUBLE)


@STEPS
@ON_BOTH
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_plus_plus(order, path, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=order, **options(path))
    sampler = DPMSolver(order=order, form="data", method="multistep")
    for ours, theirs in states(scheduler, sampler, steps, path):
        check(ours, theirs, SINGLE)


@STEPS
@ON_BOTH
@pytest.mark.parametrize("order", [1, 2])
def test_sde_dpm_solver_plus_plus(order, path, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=order,
        algorithm_type="sde-dpmsolver++",
        lower_order_final=False,
        **options(path),
    )
    for ours, theirs in states(scheduler, SDEDPMSolver(order=order), steps, path):
        check(ours, theirs, SINGLE)


@STEPS
@pytest.mark.parametrize(
    ("kind", "scheduler", "tolerance"),
    [
        (Euler, diffusers.EulerDiscreteScheduler(), SINGLE),
        (Euler, diffusers.EulerDiscreteScheduler(use_karras_sigmas=True), SINGLE),
        (EulerAncestral, diffusers.EulerAncestralDiscreteScheduler(), SINGLE),
        (Heun, diffusers.HeunDiscreteScheduler(), DOUBLE),
        (Heun, diffusers.HeunDiscreteScheduler(use_karras_sigmas=True), DOUBLE),
    ],
    ids=["euler", "euler karras", "ancestral", "heun", "heun karras"],
)
def test_samplers_in_x_over_alpha(kind, scheduler, tolerance, steps):
    """Schedulers whose state that is, called at every evaluation."""
    path = PATHS["linear"]
    times = path.time(-levels(scheduler, steps).log())
    evaluated = times[:-1]
    if kind is Heun:
        times = torch.cat([times[:1], times[1:-1:2], times[-1:]])
    x = normal(2, 50)
    ours = last(kind().solve(denoiser(path), x, path, times, Drawn()))
    theirs, drawn = x / path.alpha(times[0]), Drawn()
    for place, t in zip(scheduler.timesteps, evaluated, strict=True):
        seen = scheduler.scale_model_input(theirs, place)
        noise = {} if kind is Heun else {"generator": drawn.generator}
        theirs = scheduler.step(eps(seen, t), place, theirs, **noise).prev_sample
    check(ours, theirs, tolerance)


@STEPS
def test_euler_on_a_shifted_flow(steps):
    """Its levels, from ones that are uniform, are our times."""
    path, sampler = PATHS["flow"], Euler(steps=steps, grid="trailing", shift=3.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = sampler.times(path)
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    torch.testing.assert_close(scheduler.sigmas.double(), times, rtol=1e-6, atol=0)
    scheduler.sigmas = times
    x = theirs = normal(2, 50)

    def denoise(x, t):
        slope = eps(x, t)
        return Prediction(x - t * slope, x + (1 - t) * slope)

    ours = last(sampler(denoise, x, path))
    for place, t in zip(scheduler.timesteps, times[:-1], strict=True):
        theirs = scheduler.step(eps(theirs, t), place, theirs).prev_sample
    check(ours, theirs.double(), SINGLE)


def test_the_networks_noise_matters():
    """What agrees above is no straight line: the orders of one solver differ."""
    path = PATHS["linear"]
    times = torch.linspace(1, 0, 9, dtype=torch.float64)
    found = [
        last(UniPC(order=k).solve(denoiser(path), normal(50), path, times, None)) for k in (1, 2, 3)
    ]
    for a, b in pairwise(found):
        assert float((a - b).abs().max() / b.abs().max()) > 100 * SINGLE
