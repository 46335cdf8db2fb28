"""README and docs hold: their commands parse and run, their links lead somewhere."""

import ast
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from entry import ROOT, Project
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object

from avdiffusion import checkpoint

README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
FLAGS = {"-m", "--multirun", "--help", "--hydra-help"}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands(page):
    """Lines of a page's shell blocks, taken apart at `&&`."""
    lines = "".join(blocks(page, "bash")).splitlines()
    return [part.strip() for line in lines for part in line.split("&&")]


SHOWN = {command for page in PAGES.values() for command in commands(page)}
SHOWN = {re.sub(r"^torchrun .*?(?=(train|evaluate)\.py)", "python ", line) for line in SHOWN}
ENTRY = sorted(command for command in SHOWN if command.startswith("python "))
# What needs data, devices or hours that a test has not; all the rest of the README is run.
NOT_RUN = {
    "pip": "installation is what .ci/run does first",
    "pytest": "this is it",
    "exp=folder": "20 000 steps; shortened in tests/test_cli.py",
    "exp=landscape": "needs Landscape and GPUs",
    "reference=": "needs real clips and weights; see tests/evaluation",
    "logger=": "the first command again, with other loggers; see tests/callbacks",
    "sr.ckpt": "needs a model of another training; see tests/test_cascade.py",
    "diffgen.ckpt": "likewise; see tests/test_latent_models.py",
    "v2v.ckpt": "likewise; see tests/test_latent_models.py",
    "-m": "see tests/test_cli.py",
}


def test_ci_runs_the_test_command_of_the_readme():
    """As it stands there, and the files it names are there."""
    lines = "".join(blocks(README, "bash")).splitlines()
    (line,) = [line for line in lines if "&& pytest" in line]
    assert f"({line})" in (ROOT / ".ci" / "run").read_text()
    assert (ROOT / "constraints.txt").is_file()


@pytest.mark.parametrize("command", ENTRY)
def test_commands_parse_and_compose(command):
    """Overrides of all entry points make a config; every point of a sweep does."""
    _, script, *words = shlex.split(command)
    if script == "-m":
        source = Path(find_spec(words[0]).origin).read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
        return
    assert (ROOT / script).is_file()
    if script not in ("train.py", "sample.py", "evaluate.py"):
        return
    if "--cfg" in words:
        at = words.index("--cfg")
        del words[at : at + 2]
    words = [word for word in words if word not in FLAGS]
    if find_spec("hydra_plugins") is None:  # of the extra `sweep`; see tests/test_sweep.py
        words = [word for word in words if not re.match("hydra[./]launcher", word)]
    parsed = OverridesParser.create().parse_overrides(words)
    choices = [
        [f"{each.get_key_element()}={value}" for value in each.sweep_string_iterator()]
        if each.is_sweep_override()
        else [word]
        for each, word in zip(parsed, words, strict=True)
    ]
    # files of docs/extend.md; tests/test_extend.py
    own = {"net=plain", "sampler=renoise", "metrics=[levels,sound]"}
    for point in itertools.product(*choices):
        overrides = [word for word in point if not any(word.endswith(name) for name in own)]
        config = checkpoint.compose(overrides, config=Path(script).stem)
        assert script != "train.py" or config.model._target_


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_commands_of_the_manuals_compose(script):
    manual = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    lines = [line.partition(" #")[0] for line in manual.splitlines() if f" {script} " in line]
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line.split(script)[1].split("  |  ")[0])
        words = [word for word in words if word not in FLAGS and "=" in word]
        checkpoint.compose([w for w in words if "," not in w or "[" in w], config=script[:-3])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SLURM runs on Linux")
@pytest.mark.parametrize("status", [0, 1, 138, 143])
def test_the_slurm_script_queues_again_what_sigusr1_has_stopped(tmp_path, status):
    """With stand-ins for its commands; 143 is a pre-emption, which SLURM itself queues again."""
    (script,) = blocks(PAGES[ROOT / "docs" / "scale.md"], "sh")
    for name, end in {"srun": f"exit {status}", "scontrol": ""}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n{end}\n')
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    env["SLURM_CPUS_PER_TASK"] = "8"
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == status
    srun, *others = done.stdout.splitlines()
    assert others == (["scontrol requeue 7"] if status == 138 else [])
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(\d+)$", script, re.MULTILINE))
    config = checkpoint.compose(srun.partition("train.py ")[2].split())
    assert config.trainer.devices == int(asked["ntasks-per-node"])
    assert config.trainer.num_nodes == int(asked["nodes"])
    assert config.ckpt == "auto"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_brackets_are_quoted_for_every_shell(page):
    for command in commands(PAGES[page]):
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", command)
        assert not re.search(r"[\[\]{}*?~]", bare), command


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_files_exist(page):
    text = PAGES[page]
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for name in re.findall(r"`((?:tests|docs|src|configs|benchmarks|\.ci)/[\w./-]+)`", prose):
        if name != "configs/local/default.yaml":
            assert (ROOT / name).exists(), name
    for name in re.findall(r"`(avdiffusion(?:\.\w+)+)[`(]", prose):
        assert get_object(name) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_nothing_is_left_to_fill_in(page):
    assert not re.findall(r"<<.*?>>", PAGES[page])


def test_both_citations_are_there():
    text = (ROOT / "docs" / "references.md").read_text()
    assert "{ruan2022mmdiffusion," in text
    assert "{ruan2023mmdiffusionlearningmultimodaldiffusion," in text


def test_every_parameter_of_the_published_scripts_has_its_line():
    training, sampling = (ROOT / "docs" / "seed_parameters.md").read_text().split("## Sampling")
    theirs = "data_dir output_dir batch_size num_workers video_size audio_size video_fps audio_fps"
    theirs += " lr t_lr sample_fn save_interval log_interval use_fp16"
    for name in theirs.split():
        assert f"\n| `{name}`" in training, name
    theirs = "multimodal_model_path sr_model_path output_dir batch_size all_save_num large_size"
    theirs += " sample_fn sr_sample_fn save_type"
    for name in theirs.split():
        assert f"\n| `{name}`" in sampling, name


def test_every_promise_is_kept_or_open():
    """As many lines as were promised, each with its keeper."""
    text = (ROOT / "docs" / "promises.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in rows if not line.startswith("| promise")]
    assert len(rows) >= 60
    for row in rows:
        assert "open" in row[-1] or "`" in row[-1] or "this repository" in row[-1], row


def test_the_drawing_is_of_this_network():
    script = ROOT / "docs" / "images" / "coupled_unet.py"
    assert runpy.run_path(str(script))["draw"]() == script.with_suffix(".svg").read_text()


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")
def test_the_readme_from_the_top(tmp_path_factory):
    """Its commands and its Python, as they stand, in a folder that holds only what they need."""
    project = Project(tmp_path_factory.mktemp("project"))
    lines = [c for c in commands(README) if not any(word in c for word in NOT_RUN)]
    assert lines[0] == "python train.py"
    assert len(lines) >= 3
    for command in lines:
        result = project(command)
        assert result.status == 0, f"{command}\n{result.err}"
    (run,) = project.folder.glob("runs/quickstart/*/")
    final = run / "samples" / "final"
    assert "data:video/mp4" in (final / "gallery.html").read_text()
    scores = json.loads((final / "samples.json").read_text())["scores"]["toy_f1"]
    assert scores["real"] >= 0.9
    assert scores["mismatched"] <= 0.25
    assert scores["generated"] >= scores["mismatched"] + 0.15

    (project.folder / "snippet.py").write_text("".join(blocks(README, "python")))
    printed = project("python snippet.py")
    assert printed.status == 0, printed.err
    assert "torch.Size([4, 3, " in printed.out
    project.close()

    bench = runpy.run_path(str(ROOT / "benchmarks" / "conditional.py"))
    rows = bench["main"]([f"ckpt={run}", "num=48", "long_num=8"])
    for known in ("audio given", "video given"):
        unguided, guided = rows[known, "none"][0], rows[known, "reconstruct"][0]
        assert guided >= unguided + 0.1  # 0.46 and 0.27, 0.69 and 0.23 with one thread
        assert guided >= rows[known, "reconstruct"][1] + 0.2  # pairs of different clips
    _, _, frames, samples, picture, sound = rows["10 s from 1.6 s", "reconstruct"]
    assert (frames, samples) == (100, 40000)
    assert picture <= 1.2
    assert sound <= 1.2
    assert rows["10 s from 1.6 s", "reconstruct"][0] >= rows["both", "made together"][1] + 0.2
