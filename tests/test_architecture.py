"""Who may know whom, and what no file may do (the rules stand here)."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "avdiffusion"
ENTRIES = sorted(ROOT.glob("*.py"))
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(file.relative_to(PACKAGE)) for file in FILES]
EVERY = pytest.mark.parametrize("file", FILES, ids=NAMES)

# Folder or file of the package -> what of the package it may import. Everything else is forbidden.
MAY_IMPORT = {
    "nn": {"nn"},
    "media": set(),
    "io": set(),
    "trust": set(),
    "diffusion": {"diffusion", "media"},
    "samplers": {"samplers", "diffusion", "media"},
    "systems": {"systems", "samplers", "diffusion", "media", "compiled", "memory"},
    "data": {"data", "io"},
    "metrics": {"metrics", "media", "weights"},
    "metrics/report": {"metrics", "data", "io"},  # reads the folders whose metrics it judges
    "weights": set(),
    "evaluation": {"evaluation", "metrics", "data", "io", "media", "strip", "gallery", "writer"},
    "mux": {"io"},
    "strip": {"io", "media"},
    "gallery": {"io", "media", "strip"},
    "layout": set(),
    "writer": {"io", "mux", "media", "strip", "gallery", "layout"},
    "stream": {"io", "mux", "writer"},
    "restore": {"systems", "data", "io", "media", "stream", "writer"},
    "callbacks": {"callbacks", "io", "media", "metrics", "strip", "gallery", "writer"}
    | {"run_folder", "spread"},
    "memory": set(),
    "spread": set(),
    "run_folder": set(),
    "runs": {"run_folder"},
    "sweep": {"run_folder", "runs"},
    "checkpoint": {"systems", "trust", "sweep"},
    "launch": {"checkpoint", "run_folder"},
    "compiled": set(),
    "plan": {"checkpoint", "compiled", "memory", "systems", "samplers", "diffusion"},
    "published": {"nn"},
    "published_unet": {"published", "nn"},
    "published_audio": {"published", "nn"},
    "convert": {"published", "published_unet", "published_audio", "nn", "checkpoint", "weights"},
    "text_to_audio": {"convert", "diffusion", "media", "nn", "samplers", "systems", "weights"},
    "posthoc": {"systems", "checkpoint", "run_folder"},
    "interpolate": {"diffusion", "media"},
    "video_generator": {"checkpoint", "diffusion", "interpolate", "io", "media", "samplers"}
    | {"systems", "writer"},
    "video_to_video": {"checkpoint", "data", "diffusion", "io", "restore", "samplers"}
    | {"stream", "systems"},
    "__init__": {"checkpoint"},
}
# Of the other packages: where alone they may be imported; True: only inside functions.
CONFINED = {
    "hydra": ({"checkpoint.py", "launch.py", "sweep.py"}, False),
    "omegaconf": ({"checkpoint.py", "launch.py", "run_folder.py"}, False),
    "pytorch_lightning": ({"systems", "callbacks", "data/module.py", "launch.py"}, False),
    "lightning_fabric": ({"callbacks"}, False),
    "ema_pytorch": ({"systems"}, False),
    "wandb": ({"callbacks"}, True),
    "av": ({"io.py", "mux.py", "stream.py"}, True),
    "torchvision": (set(NAMES), True),
    "torchaudio": (set(NAMES), True),
    "transformers": (set(NAMES), True),
    "cv2": ({"metrics"}, True),
    "ai_edge_litert": ({"metrics/tflite.py"}, True),
    "safetensors": ({"weights.py"}, True),
    "torchmetrics": ({"metrics"}, False),
    "scipy": (set(), True),
    "matplotlib": (set(), True),
}


@cache
def tree(file):
    return ast.parse(file.read_text())


def unit(file):
    """The folder or the single file of the package that a file is part of."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(file):
    """(module, names, whether inside a function) of every import."""
    inside = {
        id(node)
        for function in ast.walk(tree(file))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield node.module, [alias.name for alias in node.names], id(node) in inside


def ours(file):
    """(module without the package's name, names) of every import of the package."""
    for module, names, _ in imports(file):
        if module == "avdiffusion":
            for name in names:
                yield name, []
        elif module.startswith("avdiffusion."):
            yield module.removeprefix("avdiffusion."), names


@EVERY
def test_dependencies_have_one_direction(file):
    own = str(file.relative_to(PACKAGE)).removesuffix(".py")
    allowed = MAY_IMPORT.get(own) or MAY_IMPORT[unit(file)]
    for module, names in ours(file):
        assert module.split(".")[0] in allowed, f"imports {names} from {module}"


@EVERY
def test_packages_are_imported_where_they_belong(file):
    name = str(file.relative_to(PACKAGE))
    for module, _, inside in imports(file):
        places, only_inside = CONFINED.get(module.split(".")[0], (None, False))
        if places is None:
            continue
        assert name in places or unit(file) in places, f"imports {module}"
        assert inside or not only_inside, f"imports {module} at its top"


def test_samplers_know_paths_predictions_grids_and_noise_alone():
    known = {"Path", "Prediction", "GRIDS", "Noise", "posterior_mean", "posterior_variance"}
    for file in (PACKAGE / "samplers").glob("*.py"):
        for module, names in ours(file):
            if module.startswith("diffusion"):
                assert set(names) <= known, (file, names)


def test_systems_know_no_concrete_network_or_sampler():
    for file in (PACKAGE / "systems").glob("*.py"):
        for module, _ in ours(file):
            assert not module.startswith("samplers.") or module == "samplers.sampler", (
                file,
                module,
            )


def test_no_constructor_takes_a_config_object():
    for file in FILES:
        if file.name not in ("checkpoint.py", "launch.py", "sweep.py"):  # at Hydra's door
            assert "DictConfig" not in file.read_text(), file


@pytest.mark.parametrize(
    "file",
    [PACKAGE / "media.py", PACKAGE / "systems" / "diffusion.py"]
    + [f for f in FILES if unit(f) in ("diffusion", "samplers")],
    ids=lambda file: str(file.relative_to(PACKAGE)),
)
def test_no_modality_is_named(file):
    """In code; a docstring may give an example."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree(file)):
        words = [getattr(node, field, None) for field in ("id", "arg", "attr", "name")]
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            words.append(node.value)
        for word in words:
            if isinstance(word, str):
                assert not {"video", "audio"} & set(word.lower().replace("_", " ").split()), word


@EVERY
def test_no_global_random_numbers(file):
    """Every draw has a generator; initial weights and dropout are torch's business."""
    draws = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
    draws |= {"rand_like", "randn_like", "randint_like"}
    if file != PACKAGE / "systems" / "system.py":  # where dropout gets its seed
        draws.add("manual_seed")
    for module, _, _ in imports(file):
        assert module != "random"
    for node in ast.walk(tree(file)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = ast.unparse(node.func.value)
        if owner == "torch" and node.func.attr in draws:
            assert "generator" in {k.arg for k in node.keywords}, ast.unparse(node)
        if owner in ("np.random", "numpy.random"):
            assert node.func.attr in ("default_rng", "Generator", "SeedSequence", "Philox"), owner
        in_place = node.func.attr in (
            "normal_",
            "uniform_",
            "bernoulli_",
            "random_",
            "exponential_",
        )
        if in_place and not owner.endswith("init"):
            assert "generator" in {k.arg for k in node.keywords}, ast.unparse(node)


@EVERY
def test_house_rules(file):
    text = file.read_text()
    assert "sys.path" not in text
    assert file.name != "utils.py"
    for word in ("TODO", "FIXME", "XXX"):
        assert word not in text
    if file.name == "__init__.py" and file.parent != PACKAGE:
        assert text == ""
    else:
        assert ast.get_docstring(tree(file)), "no docstring"
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom):
            assert "*" not in [alias.name for alias in node.names]
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "exec", "eval"), node.lineno
        if isinstance(node, ast.Name):
            assert node.id != "NotImplementedError", node.lineno
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            assert not any(
                isinstance(default, ast.List | ast.Dict | ast.Set)
                for default in getattr(getattr(node, "args", None), "defaults", [])
            ), f"{node.name} has a default that can change"


def test_entry_points_begin_with_their_manual():
    assert {"train.py", "sample.py", "evaluate.py"} <= {file.name for file in ENTRIES}
    for file in ENTRIES:
        manual = ast.get_docstring(ast.parse(file.read_text()))
        assert manual.count(f"python {file.name}") >= 3, file
        assert "sys.path" not in file.read_text()


@cache
def project():
    """Every file of the project: what git tracks, or would if it were added."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("this copy is no git repository")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


def test_no_file_is_large():
    assert [str(file) for file in project() if file.stat().st_size > 1_000_000] == []


def test_nothing_names_a_machine():
    folders = ["work", "home", "root", "farm", "Users", "mnt", "tmp/venvs"]
    hosts = ["index-" + "url", "artifact" + "ory"]
    words = [f"/{folder}/" for folder in folders] + hosts
    for file in project():
        if file.suffix in (".npz", ".png", ".mp4", ".wav") or file == Path(__file__):
            continue
        text = file.read_text()
        found = [word for word in words if word in text]
        assert not found, f"{file} holds {found}"
    constraints = ROOT / "constraints.txt"
    if constraints.is_file():
        assert "://" not in constraints.read_text()


def test_test_files_have_names_of_their_own():
    names = Counter(file.name for file in (ROOT / "tests").rglob("*.py"))
    assert [name for name, count in names.items() if count > 1] == []
    assert not list((ROOT / "tests").rglob("__init__.py"))


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200
    )


def test_the_package_imports_without_media_and_logging_packages():
    """A machine without them trains from a window cache with logger=csv."""
    code = """
import importlib, importlib.metadata, pkgutil, sys
blocked = ("av", "wandb", "torchaudio", "torchvision", "transformers")
blocked += ("cv2", "ai_edge_litert", "safetensors")
installed = importlib.metadata.distribution
def distribution(name):
    if name in blocked:
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)
importlib.metadata.distribution = distribution
for name in blocked:
    sys.modules[name] = None
import avdiffusion
light = {"torch", "pytorch_lightning", "hydra"} & sys.modules.keys()
assert not light, f"import avdiffusion alone loads {light}"
for module in pkgutil.walk_packages(avdiffusion.__path__, "avdiffusion."):
    importlib.import_module(module.name)
assert all(sys.modules[name] is None for name in blocked)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_samplers_import_neither_lightning_nor_hydra():
    code = """
import sys
import avdiffusion.samplers.ddpm, avdiffusion.diffusion.guide, avdiffusion.nn.coupled_unet
import avdiffusion.metrics.sync, avdiffusion.data.toy
heavy = {"pytorch_lightning", "hydra", "omegaconf", "wandb", "av", "torchvision"}
heavy &= sys.modules.keys()
assert not heavy, heavy
"""
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]
