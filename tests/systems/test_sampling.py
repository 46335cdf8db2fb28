"""A sample of a seed is the same to the bit whatever else is made, in what order, and where."""

import dataclasses
import importlib
import itertools
import multiprocessing
import pkgutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from small_system import SHAPES, Net, system
from torch import Tensor, distributed

import avdiffusion.samplers
from avdiffusion.diffusion.diffusion import Diffusion
from avdiffusion.diffusion.guide import AutoGuidance, Clamp, ClassifierFree, IntegerTimes, Threshold
from avdiffusion.diffusion.known import Reconstruct, Replace
from avdiffusion.diffusion.path import EDM, CosineVP, DiscreteVP, RectifiedFlow
from avdiffusion.nn.coupled_unet import CoupledUNet
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.samplers.dpm_solver import FORMS, DPMSolver
from avdiffusion.samplers.euler import Euler
from avdiffusion.samplers.heun import Heun
from avdiffusion.samplers.resample import Resample
from avdiffusion.samplers.sampler import Sampler
from avdiffusion.samplers.sde_dpm_solver import SDEDPMSolver
from avdiffusion.samplers.unipc import UniPC
from avdiffusion.spread import gathered, share
from avdiffusion.systems.codec import Patches
from avdiffusion.systems.diffusion import DiffusionSystem

ALL = list(range(5))  # not a whole number of batches of 3
SUBSETS = ([4], [3, 0, 4, 1], [2, 2])
# What another micro-batch may change, of values in about [-1, 1]; a network that nobody trained
# makes more of small differences.
FINE = {"small": 1e-4, "unet": 5e-4}


# ----------------------------------------------------------------------------------- every sampler


def short(sampler, steps=4):
    """With few steps, large ones of its own choice, and stretches of two where it goes back."""
    if isinstance(sampler, Resample):
        return dataclasses.replace(sampler, sampler=short(sampler.sampler, steps), jump=2, times=2)
    if getattr(sampler, "method", None) == "adaptive":
        return dataclasses.replace(sampler, atol=0.1, rtol=0.2)
    return dataclasses.replace(sampler, steps=steps)


def configured():
    """(name, sampler) of every config."""
    for file in sorted((Path(__file__).parents[2] / "configs" / "sampler").glob("*.yaml")):
        config = OmegaConf.load(file)
        config.pop("defaults", None)
        if "_target_" in config:
            yield file.stem, instantiate(config)


def classes():
    """(name, sampler) of every class in the folder."""
    for module in pkgutil.iter_modules(avdiffusion.samplers.__path__):
        module = importlib.import_module(f"avdiffusion.samplers.{module.name}")
        for kind in vars(module).values():
            mine = isinstance(kind, type) and kind.__module__ == module.__name__
            if mine and kind is not Sampler and hasattr(kind, "together"):
                yield kind.__name__, kind()


def settings():
    """(name, sampler) of settings that go ways of their own."""
    churn = {"churn": 40.0, "churn_min": 0.05, "churn_max": 50.0}
    yield "DDIM eta", DDIM(eta=0.5)
    yield "DDIM shift", DDIM(shift=3.0)
    yield "DDPM large", DDPM(variance="large")
    yield "DDPM learned", DDPM(variance="learned")
    yield "Euler churn", Euler(**churn)
    yield "Heun churn", Heun(**churn)
    yield "SDEDPMSolver 1", SDEDPMSolver(order=1)
    for order in (1, 3):
        yield f"UniPC {order}", UniPC(order=order, variant="bh1", lower_order_final=False)
    for form in FORMS:
        for method in ("multistep", "singlestep", "singlestep_fixed"):
            yield f"DPMSolver {form} {method}", DPMSolver(form=form, method=method, order=3)
        yield f"DPMSolver {form} adaptive", DPMSolver(form=form, method="adaptive", order=3)
    yield "DPMSolver denoise_last", DPMSolver(denoise_last=True)
    yield "Resample DDPM", Resample(sampler=DDPM())
    yield "Resample adaptive", Resample(sampler=DPMSolver(method="adaptive"))


SAMPLERS = {
    name: short(sampler) for kind in (configured, classes, settings) for name, sampler in kind()
}
CONFIGURED = [name for name, _ in configured()]
FEW = ("DDIM", "DDPM", "dpm_solver_2m", "dpm_solver_pp", "Heun churn", "Resample DDPM")
LEARNED = "DDPM learned"  # needs a network that says its variance


# ------------------------------------------------------------------------------------- every guide


class Part(NamedTuple):
    values: dict[str, Tensor]
    mask: dict[str, Tensor]


def part(i, shapes, *, own=False):
    """Of lengths and with known parts that differ from sample to sample; of one nothing is known.

    `own`: all of the model's length.
    """
    frames = shapes["video"][1] if own else shapes["video"][1] + (0, 3, 1, 5, 2)[i % 5]
    samples = shapes["audio"][1] * frames // shapes["video"][1]
    rng = torch.Generator().manual_seed(i)
    video = torch.rand(3, frames, *shapes["video"][2:], generator=rng) * 2 - 1
    audio = torch.rand(1, samples, generator=rng) * 2 - 1
    seen, heard = torch.zeros(frames, dtype=torch.bool), torch.zeros(samples, dtype=torch.bool)
    if i % 5 == 0:
        heard[:] = True
    elif i % 5 == 1:
        seen[:2] = True
        heard[: samples // 3] = True
    elif i % 5 == 3:
        seen[frames // 2] = True
        heard[5:9] = heard[-7:] = True
    elif i % 5 == 4:
        seen[-1] = True
    values = {"video": video * seen.view(-1, 1, 1), "audio": audio * heard}
    return Part(values, {"video": seen, "audio": heard})


class Case(NamedTuple):
    """Guides and what else a system is asked for with them."""

    guides: list
    options: dict = {}


def cases(model, weak):
    shapes = model.shapes
    own = {"given": [part(i, shapes, own=True) for i in range(8)]}
    long = {"given": [part(i, shapes) for i in range(8)]}
    seconds = {"seconds": 7 / model.rates["video"]}
    return {
        "none": Case([]),
        "clamp": Case([Clamp()]),
        "threshold": Case([Threshold(quantile=0.9, floor=0.5)]),
        "integer times": Case([IntegerTimes(), Clamp()]),
        "classifier-free": Case([ClassifierFree(scale=2.0, rescale=0.5)]),
        "auto": Case([AutoGuidance(weak=weak), Clamp()]),
        "replace": Case([Clamp(), Replace()], own),
        "reconstruct": Case([Reconstruct(), Clamp()], own),
        "replace, long": Case([Replace()], long),
        "reconstruct, long": Case([Reconstruct()], long),
        "reconstruct, no overlap": Case([Reconstruct()], {**long, "overlap": 0}),
        "reconstruct, seconds": Case([Clamp(), Reconstruct()], seconds),
    }


class Free(DiffusionSystem):
    """With a prediction under no condition: what it makes of everything upside down."""

    @property
    def task(self):
        def free(x, t):
            found = self.ema.ema_model.predict(-x, t, {})
            return found._replace(x0=-found.x0, eps=-found.eps)

        return super().task._replace(free=free)


def awake(**options):
    """A system whose average is drawn anew where it begins with zeros."""
    model = system(**options)
    model.__class__ = Free
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.ema.ema_model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=rng)
    return model


def unet(seed=0, **options):
    """Convolutions, attention in and between streams, shifted windows, a learned variance.

    No layer's values fill whole vector registers: at another place in the batch some would be
    computed by other instructions, and rounded differently.
    """
    torch.manual_seed(seed)
    net = CoupledUNet(
        channels=12,
        channel_mult=(1, 2),
        num_res_blocks=1,
        num_heads=2,
        head_channels=6,
        cross_attention_resolutions=(1, 2),
        cross_attention_windows=(1, 2),
        video_attention_resolutions=(2,),
        audio_rate=2,
        out_factor=2,
    )
    return awake(
        diffusion=Diffusion(net=net, path=DiscreteVP(), learned_variance=True),
        shapes={"video": [3, 4, 8, 8], "audio": [1, 36]},
        rates={"video": 8.0, "audio": 72.0},
        seed=seed,
        **options,
    )


MODELS = {"small": awake, "unet": unet}
NAMES = list(cases(awake(), None))


@pytest.fixture(scope="module")
def built():
    """By name: a system and its cases."""
    models = {name: (make(), make(seed=1)) for name, make in MODELS.items()}
    return {name: (model, cases(model, weak)) for name, (model, weak) in models.items()}


def combinations(quick, slow):
    """Every (model, sampler, case) that either says, in this order; the others marked slow."""
    found = []
    for what in itertools.product(MODELS, SAMPLERS, NAMES):
        if what[:2] != ("small", LEARNED) and (quick(*what) or slow(*what)):
            marks = () if quick(*what) else pytest.mark.slow
            found.append(pytest.param(*what, marks=marks, id="-".join(what)))
    return found


def each_once(model, sampler, name):
    """Every sampler and every guide."""
    if model == "unet":
        return sampler == LEARNED and name in ("threshold", "reconstruct")
    return name == "none" or sampler == "DDPM" or (sampler in FEW and name == "reconstruct, long")


def all_of_them(model, sampler, name):
    """A few samplers with every guide, all with the one whose samples depend on most.

    The larger network: those of the configs with that guide, a few with a plain one.
    """
    most = name == "reconstruct, long"
    if model == "small":
        return most or sampler in FEW
    if sampler in FEW and name == "clamp":
        return True
    return SAMPLERS[sampler].together and (sampler == LEARNED or (sampler in CONFIGURED and most))


# --------------------------------------------------------------------------------------- the tests


def test_nothing_is_left_out():
    assert {"ddim", "unipc", "resample", "dpm_solver_pp"} <= SAMPLERS.keys()
    assert {"DDIM", "DDPM", "DPMSolver", "EulerAncestral", "Resample", *FEW} <= SAMPLERS.keys()
    guides = {type(g).__name__ for case in cases(awake(), None).values() for g in case.guides}
    modules = [importlib.import_module(f"avdiffusion.diffusion.{m}") for m in ("guide", "known")]
    every = [value for module in modules for value in vars(module).values()]
    assert guides == {kind.__name__ for kind in every if dataclasses.is_dataclass(kind)}


def made(model, index, sampler, case, *, micro_batch=3):
    """The groups of samples as the system hands them out."""
    options = {"guides": case.guides, "micro_batch": micro_batch, "seed": 5, **case.options}
    return model.samples(index, sampler=sampler, **options)


def clips(groups):
    """[(number, clip)] of groups."""
    return [
        (number, {name: value[k] for name, value in group.clips.items()})
        for group in groups
        for k, number in enumerate(group.index)
    ]


def same(part, whole, index):
    """Asserts that these are the clips asked for, and to the bit what they are in the whole."""
    assert [number for number, _ in part] == list(index)
    whole = dict(whole)
    for number, clip in part:
        for name, value in clip.items():
            assert value.isfinite().all()
            assert torch.equal(value, whole[number][name]), (number, name)


@pytest.mark.parametrize(("model", "sampler", "name"), combinations(each_once, all_of_them))
def test_subsets_orders_and_groupings(built, model, sampler, name):
    model, with_guides = built[model]
    asked = SAMPLERS[sampler], with_guides[name]
    whole = clips(made(model, ALL, *asked))
    same(whole, whole, ALL)
    for index in SUBSETS:
        same(clips(made(model, index, *asked)), whole, index)


PATHS = {"flow": RectifiedFlow(), "quarter": CosineVP(), "edm": EDM(), "linear": DiscreteVP()}


@pytest.mark.parametrize(
    "name", ["clamp", pytest.param("reconstruct, long", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("sampler", FEW)
@pytest.mark.parametrize("path", PATHS)
def test_other_paths(path, sampler, name):
    model = awake(diffusion=Diffusion(net=Net(), path=PATHS[path], target="v"))
    asked = SAMPLERS[sampler], cases(model, None)[name]
    same(clips(made(model, [3, 0, 4, 1], *asked)), clips(made(model, ALL, *asked)), [3, 0, 4, 1])


@pytest.mark.parametrize("name", ["reconstruct", "replace, long"])
def test_known_parts_that_end_within_a_block_of_the_codec(name):
    codec = Patches(patch={"video": [2, 2, 2], "audio": [8]}, scale={"audio": 2.0})
    model = awake(codec=codec)
    asked = DDIM(steps=4), cases(model, None)[name]
    same(clips(made(model, [1, 4], *asked)), clips(made(model, ALL, *asked)), [1, 4])


def test_numbers_of_any_type():
    model = awake()
    whole = model.sample(3)
    for index in (np.arange(3), torch.arange(3), range(3)):
        assert torch.equal(model.sample(index=index)["audio"], whole["audio"])


@pytest.mark.parametrize("name", ["clamp", "reconstruct, long"])
def test_going_on_after_an_interruption(built, name):
    model, with_guides = built["small"]
    asked = DDPM(steps=4), with_guides[name]
    whole, begun = clips(made(model, ALL, *asked)), made(model, ALL, *asked)
    there = clips([next(begun)])
    begun.close()
    same(there, whole, [number for number, _ in there])
    rest = [i for i in ALL if i not in dict(there)]
    assert rest
    same(clips(made(model, rest, *asked)), whole, rest)


def test_neighbours_share_batches_in_any_order():
    """Sample i has place i mod micro_batch; numbers of one place make a batch of their own."""
    groups = {
        (0, 1, 2, 3, 4, 5, 6): [[0, 1, 2], [3, 4, 5], [6]],
        (5, 1, 0, 2): [[5, 1, 0], [2]],
        (2, 3, 4, 5): [[2, 3, 4], [5]],
        (3, 0, 6): [[3], [0], [6]],
    }
    for index, expected in groups.items():
        assert [part.index for part in awake().samples(index, micro_batch=3)] == expected


# ---------------------------------------------------------------------------- several processes


def shared():
    """What several processes are to make together."""
    yield from (("small", sampler, name) for sampler in FEW for name in NAMES)
    yield from (("unet", sampler, "reconstruct, long") for sampler in ("DDPM", LEARNED))


def process(rank, world, folder):
    """One of several; the first writes what all have made."""
    torch.set_num_threads(1)
    models = {name: (make(), make(seed=1)) for name, make in MODELS.items()}
    found, start = {}, f"file://{folder}/start"
    distributed.init_process_group("gloo", init_method=start, rank=rank, world_size=world)
    for model, sampler, name in shared():
        asked = SAMPLERS[sampler], cases(*models[model])[name]
        groups = made(models[model][0], share(ALL, 3, rank, world), *asked)
        found[model, sampler, name] = clips(gathered(groups, world))
    distributed.destroy_process_group()
    if rank == 0:
        torch.save(found, f"{folder}/found")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_processes_share_whole_batches(world, size):
    shares = [share(range(30), size, rank, world) for rank in range(world)]
    assert sorted(i for each in shares for i in each) == list(range(30))
    batches = [{i // size for i in each} for each in shares]
    assert sum(map(len, batches)) == -(-30 // size)
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_make_what_one_does(built, tmp_path, world):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=process, args=(r, world, tmp_path)) for r in range(world)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(250)
        assert each.exitcode == 0
    found = torch.load(tmp_path / "found", weights_only=True)
    for model, sampler, name in shared():
        whole = clips(made(built[model][0], ALL, SAMPLERS[sampler], built[model][1][name]))
        mine = found[model, sampler, name]
        same(sorted(mine, key=lambda clip: clip[0]), whole, ALL)


# --------------------------------------------------------------------------------- micro-batches


def difference(model, sampler, case, sizes=(1, 3, 8)):
    """The largest between samples made so many at a time."""
    first, *others = (
        dict(clips(made(model, range(8), sampler, case, micro_batch=size))) for size in sizes
    )
    return max(
        float((other[i][name] - first[i][name]).abs().max())
        for other in others
        for i in first
        for name in first[i]
    )


@pytest.mark.parametrize(
    ("model", "sampler", "name"),
    combinations(
        lambda model, sampler, name: model == "small" and name == "clamp" and sampler in CONFIGURED,
        lambda model, sampler, name: (
            sampler in (FEW if model == "small" else CONFIGURED)
            if name == "clamp"
            else model == "small" and (sampler == "DDPM" or name == "reconstruct, long")
        ),
    ),
)
def test_other_micro_batches(built, model, sampler, name):
    """Kernels round differently; a sampler that takes one sample at a time knows no others."""
    asked = short(SAMPLERS[sampler], 20), built[model][1][name]
    assert difference(built[model][0], *asked) <= (FINE[model] if asked[0].together else 0)


def test_an_error_over_the_batch_is_another_sampler(built):
    """One that is exempt: its samples take their steps together."""
    model, with_guides = built["small"]
    sampler = DPMSolver(method="adaptive", error="batch", order=3)
    assert sampler.together
    assert difference(model, sampler, with_guides["none"]) > FINE["small"]


# ------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("sampler", CONFIGURED)
def test_evaluations_are_counted(sampler):
    model = awake()
    with_guides = cases(model, awake(seed=1))
    for name, index in (("auto", ALL), ("reconstruct", ALL), ("reconstruct, long", [3])):
        model.ema.ema_model.net.seen.clear()
        groups = list(made(model, index, SAMPLERS[sampler], with_guides[name]))
        assert sum(group.evaluations for group in groups) == len(model.ema.ema_model.net.seen) > 0


# -------------------------------------------------------------------------------------- long clips


@pytest.mark.parametrize("name", ["replace, long", "reconstruct, long", "reconstruct, no overlap"])
def test_what_is_given_stays_and_lengths_are_exact(built, name):
    model, with_guides = built["small"]
    for number, clip in clips(made(model, ALL, DDPM(steps=4), with_guides[name])):
        there = part(number, model.shapes)
        for m, mask in there.mask.items():
            assert clip[m].shape == there.values[m].shape
            assert torch.equal(clip[m][:, mask], there.values[m][:, mask])
            assert bool((clip[m][:, ~mask] != 0).any()) == bool((~mask).any())


@pytest.mark.parametrize("guide", [Replace(), Reconstruct()], ids=["replace", "reconstruct"])
def test_the_first_window_of_nothing_given_is_the_sample(built, guide):
    """A longer clip begins with the one of the model's own length."""
    model, _ = built["small"]
    options, second = {"sampler": DDPM(steps=4), "guides": [Clamp()]}, model.rates["video"]
    plain, own = model.sample(4, **options), model.sample(4, seconds=4 / second, **options)
    long = model.sample(4, **{**options, "guides": [Clamp(), guide]}, seconds=10 / second)
    for name, value in plain.items():
        assert torch.equal(own[name], value)
        assert long[name].shape[2] == value.shape[2] * 10 // 4
        assert torch.equal(long[name][:, :, : value.shape[2]], value)


def test_windows_have_noise_of_their_own(built):
    """Where nothing is taken over from the window before."""
    model, _ = built["small"]
    long = model.sample(1, sampler=DDPM(steps=4), guides=[Replace()], seconds=1, overlap=0)
    assert not torch.equal(long["audio"][..., :32], long["audio"][..., 32:])


def test_what_does_not_go_together_is_named(built):
    model, _ = built["small"]
    given = {"given": [part(0, SHAPES)]}
    with pytest.raises(ValueError, match=r"no guide holds .*guide=\[stored,reconstruct\]"):
        model.sample(1, **given)
    with pytest.raises(ValueError, match="no guide holds"):
        model.sample(1, seconds=2.0)
    with pytest.raises(ValueError, match="nothing is given: say what with given= and known="):
        model.sample(1, guides=[Replace()])
    with pytest.raises(ValueError, match=r"seconds=0\.3 is shorter than one window of 0\.5 s"):
        model.sample(1, guides=[Replace()], seconds=0.3)
    for overlap in (-1, 4):
        with pytest.raises(
            ValueError, match=f"overlap of {overlap} steps is not within 0 and .* 4"
        ):
            model.sample(1, guides=[Replace()], seconds=2.0, overlap=overlap)
