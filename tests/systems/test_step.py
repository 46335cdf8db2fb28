"""How sampling calls a network: what it gives is the network's own, whatever makes it faster."""

from contextlib import contextmanager

import pytest
import torch
from omegaconf import OmegaConf
from small_system import SHAPES, Net
from test_sampling import ALL, LEARNED, SAMPLERS, awake, cases, classes, clips, made, same, unet
from test_waiting import Copies
from torch.overrides import TorchFunctionMode

from avdiffusion import checkpoint
from avdiffusion.diffusion import known
from avdiffusion.diffusion.guide import AutoGuidance, Clamp, Threshold
from avdiffusion.diffusion.known import Reconstruct, Replace
from avdiffusion.diffusion.noise import Noise
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.heun import Heun
from avdiffusion.systems.step import Captured, Step, cuda_graph

# --------------------------------------------------------------------------------- no round trips


class Quiet(Net):
    """The small network without its record, for which it would read what it is given."""

    def forward(self, video, audio, *, time, shifts=None):
        x = dict(zip(SHAPES, (video, audio), strict=True))
        h = sum(self.into[k](v.flatten(1)) for k, v in x.items())
        h = h + self.time(torch.stack([time / 1000, (time / 1000).square()], 1))
        h = torch.relu(self.hidden(torch.relu(h if shifts is None else h + 0.01 * shifts.sum())))
        return tuple(self.skip[k] * v + self.out[k](h).view_as(v) for k, v in x.items())


CLASSES = [name for name, _ in classes()]  # as configured


class Made(TorchFunctionMode):
    """Refuses tensors of numbers that are made on another device: a copy that waits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert func not in (torch.tensor, torch.as_tensor) or out.is_cpu, "torch.tensor waits"
        return out


def quiet():
    model = awake()
    model.ema.ema_model.net.__class__ = Quiet
    return model


FIXED = [k for k, v in SAMPLERS.items() if v.together and k != LEARNED and k not in CLASSES]


@pytest.mark.parametrize("sampler", FIXED)
def test_between_states_nothing_is_read_and_no_copy_waits(monkeypatch, sampler):
    """On the meta device there is nothing to read: whatever tries raises.

    An adaptive sampler reads the error of each of its steps.
    """
    monkeypatch.setattr(known, "anything", lambda *_: True)  # asks once a window
    model = quiet().to("meta")
    own, noise = model.latent(2), Noise(0, [0, 1], "sample")
    mask = own.map(lambda v: torch.empty_like(v, dtype=torch.bool))
    task = model.task._replace(known=own, mask=mask, noise=own)
    guides = [Clamp(), Threshold(), Replace(), Reconstruct()]
    denoise = model._guided(guides, task)
    with Made(), Copies() as copies:
        for _ in SAMPLERS[sampler](denoise, own, model.model.path, noise=noise):
            # at most, of each of three evaluations, its shifts, and noise of two modalities
            assert copies.count <= 5
            copies.count = 0


def test_what_would_be_read_is_noticed():
    model = quiet().to("meta")
    model.ema.ema_model.net.__class__ = Net
    with pytest.raises(RuntimeError, match="meta"):
        model.denoise(model.task)(model.latent(2), torch.tensor(0.5, dtype=torch.float64))


# --------------------------------------------------------------------------------------- captured


class Recorder:
    """Records as a CUDA graph does: results stay where the first call has put them."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def __call__(self, function):
        results = function()
        self.recorded += 1

        def replay():
            self.replayed += 1
            for place, value in zip(results, function(), strict=True):
                place.copy_(value)

        return replay, results


class Recording(Step):
    """A step that is recorded on any device."""

    def _make(self, net):
        self.recorder = Recorder()
        return Captured(net, self.recorder)


def test_results_outlive_the_next_replay():
    recorder = Recorder()
    double = Captured(lambda x, add=0.0: (2 * x + add, x - 1), recorder)
    with torch.no_grad():
        first, second = (double(torch.full((2, 3), value)) for value in (1.0, 5.0))
    assert first[0].tolist() == [[2.0] * 3] * 2
    assert second[0].tolist() == [[10.0] * 3] * 2
    assert second[1].tolist() == [[4.0] * 3] * 2
    assert (recorder.recorded, recorder.replayed) == (1, 2)


def test_one_recording_for_each_kind_of_call():
    recorder, x = Recorder(), torch.ones(2, 3)

    def function(x, *, time, kept=None, depth=None):
        times = time if isinstance(time, tuple) else (time,)
        out = x + sum(times) + (depth or 0)
        return (out if kept is None else out + kept[0] * kept[1],)

    calls = [
        {"time": x},
        {"time": 2 * x},  # as the first
        {"time": (x, x)},
        {"time": x, "depth": 1},
        {"time": x, "depth": 2},
        {"time": x, "depth": 2, "kept": (x, x)},
        {"time": x, "depth": 2, "kept": (3 * x, x.clone())},  # as the one before
        {"time": x.double()},
    ]
    captured = Captured(function, recorder)
    with torch.no_grad():
        for call in calls:
            assert torch.equal(captured(x, **call)[0], function(x, **call)[0])
        captured(x[:1], time=x[:1])
        captured(x.T, time=x.T)
    assert recorder.recorded == 8
    assert recorder.replayed == 10


def test_where_a_gradient_is_asked_for_nothing_is_recorded():
    recorder, x = Recorder(), torch.ones(3, requires_grad=True)
    captured = Captured(lambda x: (x**2,), recorder)
    captured(x)[0].sum().backward()
    assert x.grad.tolist() == [2.0] * 3
    assert recorder.recorded == 0


class Driver:
    """Stands in for `torch.cuda`, and says what is asked of it in which order."""

    def __init__(self, monkeypatch):
        self.said = []
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, self.context(name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)

    def context(self, name):
        @contextmanager
        def entered(_):
            self.said.append(f"{name} (")
            yield
            self.said.append(f"{name} )")

        return entered

    def wait_stream(self, _):
        self.said.append("wait")

    def replay(self):
        self.said.append("replay")


def test_a_graph_is_captured_after_a_warm_up_beside(monkeypatch):
    driver = Driver(monkeypatch)

    def function():
        driver.said.append("work")
        return (torch.full((2,), float(driver.said.count("work"))),)

    replay, results = cuda_graph(function)
    replay()
    assert results[0].tolist() == [4.0, 4.0]  # of the call that was captured
    assert driver.said == [
        *("work", "device (", "wait", "stream (", "work", "work", "stream )", "wait"),
        *("graph (", "work", "graph )", "device )", "replay"),
    ]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.AcceleratorError("operation not permitted when stream is capturing"), ValueError),
        (RuntimeError("Cannot copy between CPU and CUDA tensors during capture"), ValueError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ],
)
def test_a_network_that_cannot_be_captured_is_named_with_the_remedy(monkeypatch, error, raised):
    driver = Driver(monkeypatch)

    def function():
        if driver.said.count("graph (") > 0:
            raise error
        return (torch.ones(2),)

    said = "use capture=false" if raised is ValueError else "out of memory"
    with pytest.raises(raised, match=said):
        cuda_graph(function)


@pytest.mark.parametrize("sampler", ["DDPM", "Heun churn", "dpm_solver_2m", "dpm_solver_pp"])
@pytest.mark.parametrize("name", ["none", "auto", "replace, long", "reconstruct, long"])
def test_captured_samples_are_the_same_to_the_bit(sampler, name):
    model, weak = quiet(), quiet()
    case = cases(model, weak)[name]
    plain = clips(made(model, ALL, SAMPLERS[sampler], case))
    step = Recording()
    case = case._replace(options={**case.options, "step": step})
    same(clips(made(model, ALL, SAMPLERS[sampler], case)), plain, ALL)
    # a sample of which nothing is known needs no gradient
    assert step.recorder.recorded == 1 or name == "reconstruct, long"


# ------------------------------------------------------------------------------------ deep features


def network():
    """A coupled network whose every part counts, its inputs, and the rest it is told."""
    net = unet().ema.ema_model.net.eval()
    rng = torch.Generator().manual_seed(0)
    x = [torch.randn(2, *shape, generator=rng) for shape in ((3, 4, 8, 8), (1, 36))]
    shifts = torch.ones(len(net.shift_ranges(4)), dtype=torch.long)
    return net, x, {"time": torch.full((2,), 300.0), "shifts": shifts}


@torch.no_grad()
def test_kept_features_stand_for_all_that_lies_deeper():
    net, x, told = network()
    whole = net(*x, **told)
    ran = []
    for number, stage in enumerate(net.stages()):
        stage.register_forward_hook(lambda *_, number=number: ran.append(number))
    stages = len(list(net.stages()))
    for depth in range(net.deepest + 1):
        *found, v, a = net(*x, **told, depth=depth)
        assert all(map(torch.equal, found, whole))
        ran.clear()
        again = net(*x, **told, depth=depth, kept=(v, a))
        assert all(map(torch.equal, again, whole))
        assert ran == [*range(depth), *range(stages - depth - 1, stages)]
        other = net(*x, **told, depth=depth, kept=(v + 1, a))
        assert not torch.equal(other[0], whole[0])


def calls_of(net, sampler, guides=(), **settings):
    """Whether each call of a network was whole, in turn."""
    seen, forward = [], net.forward

    def watched(*args, kept=None, **kwargs):
        seen.append(kept is None)
        return forward(*args, kept=kept, **kwargs)

    net.forward = watched
    model = settings.pop("model")
    step = Step(**settings)
    list(model.samples([0], sampler=sampler, guides=guides, micro_batch=1, step=step))
    del net.forward
    return seen


def test_every_so_many_evaluations_compute_all():
    model, weak = unet(), unet(seed=1)
    net = model.ema.ema_model.net
    found = calls_of(net, DDIM(steps=7), model=model, interval=3, depth=1)
    assert found == [True, False, False, True, False, False, True]
    found = calls_of(net, Heun(steps=3), model=model, interval=2, depth=0)
    assert found == [True, False, True, False, True]  # of evaluations, not of steps
    # each network by its own count, and from the start in each window
    guides = [AutoGuidance(weak=weak)]
    for each in (net, weak.ema.ema_model.net):
        found = calls_of(each, DDIM(steps=3), guides, model=model, interval=2, depth=1)
        assert found == [True, False, True]


@pytest.mark.parametrize(
    ("sampler", "name"),
    [("DPMSolver noise singlestep", "clamp"), ("Heun churn", "clamp"), ("DDPM", "replace, long")],
)
def test_samples_with_kept_features_do_not_depend_on_others(sampler, name):
    model = unet()
    case = cases(model, None)[name]
    reusing = case._replace(options={**case.options, "step": Step(interval=2, depth=1)})
    whole = clips(made(model, ALL, SAMPLERS[sampler], reusing))
    same(clips(made(model, [3, 0, 4], SAMPLERS[sampler], reusing)), whole, [3, 0, 4])
    exact = clips(made(model, ALL[:1], SAMPLERS[sampler], case))
    assert not torch.equal(whole[0][1]["video"], exact[0][1]["video"])


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "16"}, "precision=16 is not one of 32-true, bf16-mixed"),
        ({"compile": "fast"}, "compile=fast is not true, false or default"),
        ({"compile": "max-autotune", "capture": True}, "leave out capture=true"),
        ({"interval": 0}, r"reuse\.interval=0"),
        ({"interval": 2, "depth": -1}, r"reuse\.depth=-1"),
    ],
)
def test_settings_that_mean_nothing_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        Step(**settings)


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (awake, {"interval": 2}, r"Net keeps no deep features: leave out reuse\.interval"),
        (unet, {"interval": 2, "depth": 9}, r"reuse\.depth=9 is above this network's 3"),
        (unet, {"capture": True}, "makes CUDA graphs, and the model is on cpu"),
    ],
)
def test_what_a_network_cannot_do_is_said_before_any_work(make, settings, said):
    with pytest.raises(ValueError, match=said):
        make().samples([], step=Step(**settings))


def test_a_guide_that_follows_gradients_needs_the_whole_network():
    options = {"seconds": 1.0, "step": Step(interval=2, depth=1)}
    with pytest.raises(ValueError, match=r"gradient .* reuse\.interval=1"):
        unet().samples([], guides=[Reconstruct()], **options)
    unet().samples([], guides=[Replace()], **options)


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile=true needs .*no-such-compiler"):
        awake().samples([], step=Step(compile=True))


# -------------------------------------------------------------------------- precision, compilation


def test_what_samples_depend_on():
    assert Step().settings() == Step(capture=False, depth=1).settings() == {}
    every = Step(precision="bf16-mixed", compile="default", interval=3, depth=1)
    assert every.settings() == {
        "precision": "bf16-mixed",
        "compile": "default",
        "reuse": {"interval": 3, "depth": 1},
    }


def test_the_command_begins_with_the_same_defaults():
    config = OmegaConf.to_container(checkpoint.compose(["ckpt=x"], config="sample"))
    told = {name: config[name] for name in ("precision", "compile", "capture")}
    assert Step(**told, **config["reuse"]) == Step()


def test_half_precision_is_the_networks_alone():
    model, types = unet(), set()
    for module in model.ema.ema_model.net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *args: types.add(args[-1].dtype))
    options = {"sampler": DDIM(steps=4), "guides": []}
    full, half = (
        model.sample(2, step=Step(precision=p), **options) for p in ("32-true", "bf16-mixed")
    )
    assert types == {torch.float32, torch.bfloat16}
    plain = model.sample(2, **options)
    for name, value in full.items():
        assert torch.equal(value, plain[name])
        assert half[name].dtype == torch.float32
        apart = (half[name] - value).norm() / value.norm()
        assert 1e-4 < apart < 0.03


@torch.no_grad()
def test_weights_are_rounded_beforehand_as_mixed_precision_rounds_them():
    net, x, told = network()
    step, given = Step(precision="bf16-mixed"), []
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_pre_hook(
                lambda module, _, name=name: given.append((name, module.weight.dtype))
            )

    def compared():
        found = step(net)(*x, **told)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = net(*x, **told)
        assert all(map(torch.equal, found, mixed))
        return found

    before = compared()
    half = {name for name, dtype in given if dtype == torch.bfloat16}
    assert {name for name, _ in given} - half == {"time.0", "time.2", "film"}
    assert len(half) > 30
    for parameter in net.parameters():  # as an average goes on between two samples
        assert parameter.dtype == torch.float32
        parameter.mul_(1.01)
    after = compared()
    assert not torch.equal(before[0], after[0])
    assert len(step.made) == 1


@pytest.mark.slow
def test_compiled_samples_agree():
    model = quiet()
    keys, options = list(model.state_dict()), {"sampler": DDIM(steps=4), "guides": []}
    plain = model.sample(3, **options)
    found = model.sample(3, step=Step(compile=True), **options)
    for name, value in plain.items():
        assert torch.allclose(found[name], value, atol=1e-5)
    assert list(model.state_dict()) == keys
