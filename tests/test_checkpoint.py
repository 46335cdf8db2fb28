"""Checkpoints are found, read and built; and nothing they say can do more than build a model."""

import ast
import copy
import importlib
import inspect
import io
import os
import pickle
import pkgutil
import time
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

import avdiffusion
from avdiffusion import checkpoint, trust
from avdiffusion.checkpoint import CheckpointError
from avdiffusion.samplers.ddim import DDIM

SMALL = [
    "~exp",
    "name=small",
    "model/net=tiny",
    "model/codec=patches",
    "data.sample_rate=4000",
    "data.frames=4",
    "data.size=[8,8]",
    "data.samples=1600",
    "model.diffusion.net.video_channels=48",
    "model.diffusion.net.audio_channels=16",
    "model.diffusion.net.channel_mult=[1,2]",
    "model.diffusion.net.cross_attention_resolutions=[2]",
    "model.diffusion.net.cross_attention_windows=[2]",
    "model.diffusion.net.channels=8",
    "model.diffusion.net.num_heads=2",
    "model.diffusion.net.head_channels=8",
    "sampler=ddim",
    "sampler.steps=2",
    "paths.run=run",
]


@pytest.fixture(scope="module")
def stored():
    """A checkpoint's content, as training writes it."""
    torch.manual_seed(0)
    config = checkpoint.plain(checkpoint.compose(SMALL))
    system = checkpoint.build(config["model"])
    with torch.no_grad():
        for p in system.parameters():
            p.add_(0.05 * torch.randn_like(p))
    content = {"state_dict": system.state_dict(), "hyper_parameters": config}
    system.on_save_checkpoint(content)
    return content


@pytest.fixture
def fresh(stored):
    """The same with a config of its own to spoil."""
    return {**stored, "hyper_parameters": copy.deepcopy(stored["hyper_parameters"])}


def save(content, folder):
    path = Path(folder) / "x.ckpt"
    torch.save(content, path)
    return path


# ------------------------------------------------------------------------- compose and build


def test_compose_takes_overrides_and_can_be_called_again():
    one = checkpoint.compose(["data.batch_size=5"])
    two = checkpoint.compose(["data.batch_size=6", "seed=3"])
    assert (one.data.batch_size, two.data.batch_size, two.model.seed) == (5, 6, 3)
    assert checkpoint.compose(["ckpt=x"], config="sample").num is None


def test_build_raises_the_cause():
    node = {"_target_": "avdiffusion.samplers.ddim.DDIM", "steps": 0}
    with pytest.raises(ValueError, match=r"^steps=0: a sampler takes at least one step$"):
        checkpoint.build(node)
    with pytest.raises(ValueError, match=r"^steps=0"):
        checkpoint.build({"nested": {"_target_": "builtins.list", "_args_": [[node]]}})
    assert checkpoint.build({**node, "steps": 3}, eta=0.5) == DDIM(steps=3, eta=0.5)
    assert checkpoint.build({}) == {}


def test_plain_resolves_and_refuses_what_is_missing():
    assert checkpoint.plain(OmegaConf.create({"a": [1, {"b": "${c}"}], "c": 2})) == {
        "a": [1, {"b": 2}],
        "c": 2,
    }
    with pytest.raises(MissingMandatoryValue):
        checkpoint.plain(OmegaConf.create({"a": "???"}))


# -------------------------------------------------------------------------------------- find


def touch(path, age):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_find(tmp_path):
    runs = tmp_path / "runs of [a, b]=c ~"
    old = touch(runs / "toy" / "one" / "checkpoints" / "last.ckpt", 50)
    best = touch(runs / "toy" / "one" / "checkpoints" / "best.ckpt", 90)
    new = touch(runs / "other" / "two" / "checkpoints" / "last.ckpt", 5)
    assert checkpoint.find(old) == old
    assert checkpoint.find(str(old)) == old
    assert checkpoint.find(runs / "toy" / "one") == old
    assert checkpoint.find(runs / "toy" / "one" / "checkpoints") == old
    assert checkpoint.find(runs / "toy" / "one" / "best") == best
    assert checkpoint.find("last", runs) == new
    assert checkpoint.find("best", runs) == best
    for wrong, words in {
        runs / "toy": "holds no checkpoints/last.ckpt",
        runs / "none.ckpt": "no checkpoint at",
        runs / "other" / "two" / "best": "no best.ckpt below",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            checkpoint.find(wrong)
    with pytest.raises(CheckpointError, match=r"no last\.ckpt below"):
        checkpoint.find("last", tmp_path / "nowhere")


# -------------------------------------------------------------------------------------- load


def test_load_gives_the_system_that_was_saved(fresh, tmp_path):
    path = save(fresh, tmp_path)
    system = checkpoint.load(path, device="cpu")
    assert not system.training
    for name, value in system.state_dict().items():
        assert torch.equal(value, fresh["state_dict"][name])
    assert system.config["name"] == "small"
    clips = system.sample(3, seed=1)
    assert clips["video"].shape == (3, 3, 4, 8, 8)
    assert clips["audio"].shape == (3, 1, 1600)
    again = avdiffusion.load(path, device="cpu").sample(3, seed=1)
    assert all(torch.equal(clips[k], again[k]) for k in clips)


def test_sampler_and_guides_can_be_replaced_or_set(fresh, tmp_path):
    path = save(fresh, tmp_path)

    def load(**replace):
        return checkpoint.load(path, device="cpu", replace=replace)

    as_stored = load()
    assert as_stored.sampler == DDIM(steps=2)
    assert len(as_stored.guides) == 1
    system = load(sampler={"stored": True, "steps": 7, "eta": None})
    assert system.sampler == DDIM(steps=7)
    assert system.config["sampler"]["steps"] == 7
    ddpm = {"_target_": "avdiffusion.samplers.ddpm.DDPM", "steps": 4}
    assert type(load(sampler=OmegaConf.create(ddpm)).sampler).__name__ == "DDPM"
    assert load(guide={}).guides == []
    assert len(load(guide={"stored": True}).guides) == 1
    with pytest.raises(
        ValueError, match=r"sampler\.variance is no setting of .*steps, grid, shift, eta"
    ):
        load(sampler={"stored": True, "variance": "large"})


def test_a_sampler_of_the_users_own_may_be_anything(fresh, tmp_path):
    """What the command line names is the user's, what the file names is not."""
    own = {"_target_": "test_checkpoint.Own", "steps": 1}
    system = checkpoint.load(save(fresh, tmp_path), device="cpu", replace={"sampler": own})
    assert type(system.sampler).__name__ == "Own"


class Own(DDIM):
    pass


# ------------------------------------------------------------------------ files of other kinds


def refused(content, folder, words, **options):
    """Loading ends in one line that says why."""
    path = folder / "x.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=words) as error:
        checkpoint.load(path, device="cpu", **options)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)  # torch advises to switch it off
    return str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"Some notes about the run.\n" * 50, b"\0" * 2000, pickle.dumps({"a": 1}), b"PK\3\4"],
    ids=["empty", "text", "zeros", "pickle", "magic"],
)
def test_files_that_are_no_checkpoint(content, tmp_path):
    refused(content, tmp_path, "is no checkpoint")


def test_a_truncated_file(fresh, tmp_path):
    whole = save(fresh, tmp_path).read_bytes()
    for share in (0.1, 0.5, 0.99):
        refused(whole[: int(share * len(whole))], tmp_path, "only the beginning")


def test_a_zip_of_something_else(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("notes/readme.txt", "hello")
    refused(buffer.getvalue(), tmp_path, "not a readable checkpoint")


@pytest.mark.parametrize(
    "content",
    [
        {"conv.weight": torch.zeros(3)},
        {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "hyper_parameters": {}},
        [torch.zeros(2)],
        torch.zeros(2),
        {"avdiffusion": 1},
        {"avdiffusion": {"format": "1"}},
        {"avdiffusion": {}},
    ],
    ids=["weights", "lightning", "list", "tensor", "mark", "text", "bare"],
)
def test_checkpoints_of_other_projects(content, tmp_path):
    refused(content, tmp_path, "is no avdiffusion checkpoint")


def test_a_newer_format(fresh, tmp_path):
    refused({**fresh, "avdiffusion": {"format": 99}}, tmp_path, "format 99, .*update avdiffusion")


def test_parts_that_are_missing_or_do_not_fit(fresh, tmp_path):
    config = fresh["hyper_parameters"]
    without = {k: v for k, v in config.items() if k != "sampler"}
    refused({**fresh, "hyper_parameters": without}, tmp_path, "is damaged: its config lacks")
    refused({**fresh, "hyper_parameters": None}, tmp_path, "is damaged")
    refused({**fresh, "state_dict": {}}, tmp_path, "does not fit its own config")
    refused({**fresh, "state_dict": None}, tmp_path, "does not fit its own config")
    refused({k: v for k, v in fresh.items() if k != "state_dict"}, tmp_path, "does not fit")
    path = {"_target_": "avdiffusion.diffusion.path.EDM"}
    other = {**fresh, "hyper_parameters": {**config, "model": path}}
    refused(other, tmp_path, "describes no model|describes a EDM")


# ------------------------------------------------------------------------------- hostile files


class Payload:
    """What pickle turns into a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", ["system", "exec", "open", "write", "load"])
def test_pickles_that_would_run(name, fresh, tmp_path):
    mark = tmp_path / "executed"
    payload = {
        "system": Payload(os.system, f"touch {mark}"),
        "exec": Payload(exec, f"open({str(mark)!r}, 'w')"),
        "open": Payload(open, str(mark), "w"),
        "write": Payload(Path.write_text, mark, "x"),
        "load": Payload(torch.hub.load, str(tmp_path), "x"),
    }[name]
    for content in (
        {**fresh, "optimizer_states": [payload]},
        {**fresh, "hyper_parameters": payload},
        payload,
    ):
        refused(content, tmp_path, "is refused.*it would call")
    assert not mark.exists()


HOSTILE = [
    ("pathlib.Path.write_text", ["{mark}", "x"]),
    ("pathlib.Path", ["{mark}"]),
    ("os.system", ["touch {mark}"]),
    ("os.mkdir", ["{mark}"]),
    ("posix.system", ["touch {mark}"]),
    ("builtins.open", ["{mark}", "w"]),
    ("builtins.exec", ["open('{mark}', 'w')"]),
    ("builtins.eval", ["open('{mark}', 'w')"]),
    ("builtins.__import__", ["os"]),
    ("builtins.getattr", [1, "real"]),
    ("subprocess.run", [["touch", "{mark}"]]),
    ("subprocess.Popen", [["touch", "{mark}"]]),
    ("urllib.request.urlopen", ["http://127.0.0.1:9/"]),
    ("urllib.request.urlretrieve", ["http://127.0.0.1:9/", "{mark}"]),
    ("torch.load", ["{mark}"]),
    ("torch.save", [1, "{mark}"]),
    ("torch.hub.load", ["{mark}", "x"]),
    ("torch.hub.download_url_to_file", ["http://127.0.0.1:9/", "{mark}"]),
    ("torch.jit.load", ["{mark}"]),
    ("torch.ops.load_library", ["{mark}"]),
    ("torch.compile", [1]),
    ("torch.nn.functional.torch.save", [1, "{mark}"]),
    ("torch.nn.modules.module.torch.save", [1, "{mark}"]),
    ("torch.nn.modules.module.functools.partial", [1]),
    ("torch.nn.modules.module.OrderedDict", []),
    ("torch.nn.modules.module.warnings.warn", ["x"]),
    ("torch.nn.parallel.distributed.os.system", ["touch {mark}"]),
    ("torch.nn.utils.parametrize.copyreg", []),
    ("torch.nn.Module.load_state_dict", []),
    ("torch.nn.Module.apply", []),
    ("torch.nn.Module.__init__.__globals__", []),
    ("torch.nn.Module.__subclasses__", []),
    ("torch.nn.init.xavier_uniform_", []),
    ("torch.optim.optimizer.torch.save", [1, "{mark}"]),
    ("torch.optim.lr_scheduler.partial", [1]),
    ("torch.nn", []),
    ("torch.nn.modules", []),
    ("ema_pytorch.PostHocEMA", [{}, "{mark}"]),
    ("ema_pytorch.post_hoc_ema.Path", ["{mark}"]),
    ("ema_pytorch.post_hoc_ema.torch.save", [1, "{mark}"]),
    ("avdiffusion.io.os.system", ["touch {mark}"]),
    ("avdiffusion.load", ["{mark}"]),
    ("avdiffusion.checkpoint.load", ["{mark}"]),
    ("avdiffusion.checkpoint.torch.save", [1, "{mark}"]),
    ("avdiffusion.checkpoint.instantiate", [{"_target_": "os.mkdir", "_args_": ["{mark}"]}]),
    ("avdiffusion.checkpoint.build", [{"_target_": "os.mkdir", "_args_": ["{mark}"]}]),
    ("avdiffusion.checkpoint.os.mkdir", ["{mark}"]),
    ("avdiffusion.nn.blocks.torch.save", [1, "{mark}"]),
    ("avdiffusion.diffusion.diffusion.torch.save", [1, "{mark}"]),
    ("avdiffusion.diffusion.noise.hashlib.blake2b", []),
    ("avdiffusion.systems.diffusion.pl.Trainer", []),
    ("avdiffusion.systems.diffusion.version", ["torch"]),
    ("avdiffusion.systems.diffusion.reduce", []),
    ("avdiffusion.systems.diffusion.DiffusionSystem.load_from_checkpoint", ["{mark}"]),
    ("avdiffusion.data.module.DataModule", []),
    ("avdiffusion.callbacks.publish.os.mkdir", ["{mark}"]),
    ("avdiffusion.writer.ClipWriter", ["{mark}"]),
    ("avdiffusion.diffusion.weight._normal", [1]),
    ("avdiffusion.diffusion.path.BETAS", []),
    ("avdiffusion.samplers.sampler.GRIDS", []),
    ("avdiffusion.diffusion.path.Path.__init__.__globals__", []),
    ("pytorch_lightning.Trainer", []),
    ("hydra.utils.instantiate", [{"_target_": "os.mkdir", "_args_": ["{mark}"]}]),
    ("hydra.utils.get_method", ["os.system"]),
    ("hydra.utils.call", [{"_target_": "os.mkdir", "_args_": ["{mark}"]}]),
    ("hydra._internal.utils._locate", ["os.system"]),
    ("omegaconf.OmegaConf.save", [{}, "{mark}"]),
    ("numpy.save", ["{mark}", 1]),
    ("numpy.load", ["{mark}"]),
    ("logging.FileHandler", ["{mark}"]),
    ("test_checkpoint.Own", []),
    (" os.mkdir", ["{mark}"]),
    ("os.mkdir ", ["{mark}"]),
    ("avdiffusion.diffusion.path.EDM ", []),
    ("\tavdiffusion.diffusion.path.EDM", []),
    ("avdiffusion.diffusion.path..EDM", []),
    (".avdiffusion.diffusion.path.EDM", []),
    ("avdiffusion.diffusion.path.", []),
    ("avdiffusion.diffusion.path.\0", []),
    ("avdiffusion.diffusion\0.path", []),
    ("avdiffusion/diffusion/path.EDM", []),
    ("avdiffusion.diffusionx.path.EDM", []),
    ("torch.nnx.Linear", []),
    ("torch.nn.ＬayerNorm", []),
    ("", []),
    (".", []),
    ("_target_", []),
    (None, []),
    (0, []),
    (True, []),
    (["os.mkdir"], ["{mark}"]),
    ({"_target_": "os.mkdir", "_args_": ["{mark}"]}, []),
    (b"os.mkdir", ["{mark}"]),
]


def filled(value, mark):
    """`{mark}` in every text."""
    if isinstance(value, str):
        return value.replace("{mark}", str(mark))
    if isinstance(value, dict):
        return {k: filled(v, mark) for k, v in value.items()}
    return [filled(v, mark) for v in value] if isinstance(value, list) else value


def put(config, node, place):
    """The config with a node hidden somewhere that gets built."""
    model = config["model"]
    if place == "model":
        config["model"] = node
    elif place == "part":
        model["diffusion"]["path"] = node
    elif place == "unknown argument":
        model["diffusion"]["surprise"] = node
    elif place == "list":
        model["diffusion"]["net"]["channel_mult"] = [1, [2, {"x": node}]]
    elif place == "args":
        model["diffusion"]["path"] = {
            "_target_": "avdiffusion.diffusion.path.EDM",
            "_args_": [node],
        }
    elif place == "sampler":
        config["sampler"] = node
    elif place == "guide":
        config["guide"] = {"clamp": {"high": 1.0, "low": node}}
    elif place == "key":
        model["weights"] = {"_target_": "builtins.dict", "x": node}
    return config


PLACES = ["model", "part", "unknown argument", "list", "args", "sampler", "guide"]


def test_hostile_configs_are_refused_before_anything_is_built(fresh, tmp_path):
    """Through `load`, in every place for some and in one place for all."""
    mark = tmp_path / "executed"
    for number, (target, args) in enumerate(HOSTILE):
        places = PLACES if target in ("os.system", "builtins.exec") else PLACES[number % 7 :][:1]
        for place in places:
            node = {"_target_": filled(target, mark), "_args_": filled(args, mark)}
            config = put(copy.deepcopy(fresh["hyper_parameters"]), node, place)
            # Without the weights, which are never reached.
            content = {"avdiffusion": fresh["avdiffusion"], "hyper_parameters": config}
            words = refused(content, tmp_path, "is refused")
            assert "would call" in words, (target, place)
            assert list(tmp_path.iterdir()) == [tmp_path / "x.ckpt"], (target, place)


@pytest.mark.parametrize("target", [target for target, _ in HOSTILE], ids=repr)
def test_hostile_names_are_not_trusted(target):
    assert not trust.trusted(target)


def test_the_stored_sampler_stays_checked_when_settings_are_put_on_it(fresh, tmp_path):
    mark = tmp_path / "executed"
    fresh["hyper_parameters"]["sampler"] = {
        "_target_": "os.system",
        "command": f"touch {mark}",
        "steps": 3,
    }
    replace = {"sampler": {"stored": True, "steps": 5}}
    refused(fresh, tmp_path, "would call 'os.system'", replace=replace)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    ["${oc.env:HOME}", "a ${name}", "${hydra:runtime.cwd}", "\\${x}", "${", "${oc.decode:1}"],
)
def test_interpolations_are_refused(text, fresh, tmp_path):
    for place in ("part", "list", "sampler", "guide"):
        config = put(copy.deepcopy(fresh["hyper_parameters"]), text, place)
        if place == "sampler":
            config["sampler"] = {"_target_": "avdiffusion.samplers.ddim.DDIM", "grid": text}
        words = refused({**fresh, "hyper_parameters": config}, tmp_path, "holds an interpolation")
        assert os.environ.get("HOME", "?") not in words or text not in words


def test_values_that_are_not_plain_are_refused(fresh, tmp_path):
    for value in (torch.zeros(1), {1, 2}, OrderedDict(a=1), torch.float16, b"x", 1j):
        fresh["hyper_parameters"]["model"]["weights"] = value
        refused(fresh, tmp_path, "is refused: config.model.weights holds a")
    fresh["hyper_parameters"]["model"]["weights"] = {1: 2.0}
    refused(fresh, tmp_path, "keys that are no text")


def test_configs_without_end_are_refused(fresh, tmp_path):
    loop = []
    loop.append(loop)
    wide = [[0] * 2] * 2
    for _ in range(40):
        wide = [wide, wide]
    for value in (loop, wide):
        fresh["hyper_parameters"]["model"]["weights"] = value
        refused(fresh, tmp_path, "more than 10000 entries")


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("model", "_partial_", True),
        ("model", "_recursive_", False),
        ("model", "_recursive_", "maybe"),
        ("model", "_convert_", "object"),
        ("model", "_args_", 3),
        ("model", "surprise", 3),
        ("model", "diffusion", None),
        ("model", "shapes", "???"),
        ("diffusion", "_partial_", True),
        ("diffusion", "net", {"_target_": "torch.nn.Linear"}),
        ("diffusion", "net", "torch.nn.Linear"),
        ("diffusion", "path", {"_target_": "avdiffusion.diffusion.path.Path"}),
    ],
)
def test_configs_that_build_something_else_end_in_one_line(place, key, value, fresh, tmp_path):
    model = fresh["hyper_parameters"]["model"]
    (model if place == "model" else model[place])[key] = value
    path = save(fresh, tmp_path)
    if key == "_convert_":  # harmless: what is stored holds plain values
        checkpoint.load(path, device="cpu")
        return
    with pytest.raises(ValueError, match=r"^[^\n]+$"):  # also what our own constructors say
        checkpoint.load(path, device="cpu")


def test_trust_allows_and_says_so(fresh, tmp_path, caplog):
    fresh["hyper_parameters"]["sampler"]["_target_"] = "test_checkpoint.Own"
    refused(fresh, tmp_path, "config.sampler would call 'test_checkpoint.Own'.*trust=true")
    with caplog.at_level("WARNING", logger="avdiffusion"):
        system = checkpoint.load(tmp_path / "x.ckpt", device="cpu", trust=True)
    assert type(system.sampler).__name__ == "Own"
    assert "test_checkpoint.Own" in caplog.text


# --------------------------------------------------------------------------- what is trusted


def test_what_configs_name_is_trusted():
    for target in (
        "avdiffusion.systems.diffusion.DiffusionSystem",
        "avdiffusion.systems.schedule.warmup",
        "avdiffusion.nn.coupled_unet.CoupledUNet",
        "avdiffusion.diffusion.weight.MinSNR",
        "avdiffusion.diffusion.guide.Clamp",
        "avdiffusion.systems.average.PowerEMA",
        "avdiffusion.samplers.ddpm.DDPM",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.CosineAnnealingLR",
        "torch.nn.SiLU",
        "torch.nn.modules.activation.SiLU",
        "ema_pytorch.EMA",
    ):
        assert trust.trusted(target), target


def trusted_names():
    """Every trusted name of the libraries and of ours."""
    for root in trust.LIBRARIES + trust.OURS:
        package = importlib.import_module(root)
        modules = pkgutil.walk_packages(package.__path__, f"{root}.", onerror=lambda _: None)
        for name in [root, *(m.name for m in modules if "._" not in m.name)]:
            if name.startswith(("torch.nn.quant", "torch.nn.qat", "torch.nn.intrinsic")):
                continue
            for attribute in vars(importlib.import_module(name)):
                if trust.trusted(f"{name}.{attribute}"):
                    yield f"{name}.{attribute}"


def test_everything_trusted_is_a_part_of_a_model():
    names = list(trusted_names())
    assert len(names) > 300
    for name in names:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        if not name.startswith("avdiffusion."):
            assert issubclass(found, trust.nn.Module | trust.Optimizer | trust.LRScheduler), name
        else:
            assert found.__module__ == module, name
            assert inspect.isclass(found) or inspect.isfunction(found), name


def test_trusted_code_of_ours_touches_no_files_and_runs_no_names():
    """What a stored config can reach imports nothing to open, run, load or fetch with."""
    harmless = {
        "avdiffusion",
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "einops",
        "ema_pytorch",
        "functools",
        "hashlib",
        "importlib",
        "itertools",
        "logging",
        "math",
        "numpy",
        "pytorch_lightning",
        "threading",
        "torch",
        "transformers",  # T5Encoder: safetensors of its own model types, no code of others
        "typing",
        "weakref",
        "zlib",
    }
    forbidden = {"open", "exec", "eval", "compile", "__import__", "getattr", "import_module"}
    forbidden |= {"load", "save", "load_library"}
    for package in trust.OURS:
        folder = Path(avdiffusion.__file__).parent / package.split(".")[1]
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    assert {a.name.split(".")[0] for a in node.names} <= harmless, file
                elif isinstance(node, ast.ImportFrom):
                    assert node.module.split(".")[0] in harmless, file
                    if node.module.startswith("importlib"):
                        assert node.module == "importlib.metadata", file
                elif isinstance(node, ast.Call):
                    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                    if name == "getattr" and isinstance(node.args[1], ast.Constant):
                        continue
                    if name == "eval" and isinstance(node.func, ast.Attribute) and not node.args:
                        continue  # a module's mode
                    assert name not in forbidden, (file, node.lineno)


@cache
def archive_of_a_checkpoint():
    """The files inside one, by name."""
    buffer = io.BytesIO()
    content = {"avdiffusion": {"format": 1}, "hyper_parameters": {"a": [1, 2.5, "é", 2**70]}}
    torch.save({**content, "state_dict": {"w": torch.zeros(2, 3)}}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_end_in_one_line(data, tmp_path):
    parts = archive_of_a_checkpoint()
    name = next(n for n in parts if n.endswith("data.pkl"))
    spoilt = bytearray(parts[name])
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in {**parts, name: bytes(spoilt)}.items():
            archive.writestr(part, content)
    with pytest.raises(CheckpointError):
        checkpoint.load(path, device="cpu")
