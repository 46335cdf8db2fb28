"""`debug=overfit` and `debug=profile`, as commands."""

import inspect
import os
import re

import pytest
from entry import Project
from hydra.utils import get_object
from media_files import make_media

from avdiffusion import checkpoint

SMALL = (
    "logger=csv data.batch_size=2 sampler.steps=2 callbacks.samples.save=[wav] "
    "callbacks.samples.final_num=1"
)


@pytest.mark.parametrize("name", ["overfit", "profile"])
@pytest.mark.parametrize("exp", ["quickstart", "folder", "landscape"])
def test_the_arguments_stand_in_the_config(name, exp):
    config = checkpoint.compose([f"exp={exp}", f"debug={name}", "paths.run=x", "data.root=clips"])
    node = checkpoint.plain(config)["callbacks"][name]
    parameters = inspect.signature(get_object(node.pop("_target_"))).parameters
    assert node.keys() == parameters.keys()
    assert all(value == parameters[k].default for k, value in node.items() if k != "out")


@pytest.fixture
def project(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    project = Project(tmp_path_factory.mktemp("project"))
    yield project
    project.close()


def verdict(result):
    assert result.status == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("overfit: ")]
    first, last = map(float, re.search(r"loss (\S+) -> (\S+) in", line).groups())
    return first, last, line


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")
def test_one_batch_is_learnt_by_heart(project, tmp_path):
    first, last, line = verdict(project(f"python train.py debug=overfit {SMALL}"))
    assert line.endswith("it learns")
    assert last < 0.4 * first

    for number in range(3):
        make_media(tmp_path / f"{number}.mp4", seconds=3, sample_rate=16000)
    words = 'exp=folder "data.size=[16,16]" data.frames=8 data.samples=12800 data.num_workers=0'
    result = project(f"python train.py {words} data.root={tmp_path} debug=overfit {SMALL}")
    first, last, line = verdict(result)
    assert line.endswith("it learns")
    assert last < 0.4 * first


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")
def test_a_profile_and_nothing_else(project):
    result = project("python train.py debug=profile data.batch_size=2")
    assert result.status == 0, result.err
    (run,) = project.folder.glob("runs/quickstart/*")
    assert sorted(f.name for f in (run / "profile").iterdir()) == [
        "operations.txt",
        "trace.json.gz",
    ]
    assert not (run / "checkpoints").exists()
    assert not (run / "samples").exists()
    head = result.out[result.out.index("operation  ") :].splitlines()
    assert len([line for line in head[1:11] if "%" in line]) == 10
    assert any("aten::" in line for line in head[1:11])
