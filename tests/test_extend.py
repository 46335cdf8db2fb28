"""What docs/extend.md promises: its files and commands, as they stand there."""

import os
import re

import pytest
from entry import ROOT, Project

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
PAGE = (ROOT / "docs" / "extend.md").read_text()
FILES = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("WANDB_MODE", "offline")
        project = Project(tmp_path_factory.mktemp("project"))
        for name, text in FILES:
            (project.folder / name).write_text(text)
        yield project
        project.close()


def test_the_page_has_files_and_commands():
    assert {name for name, _ in FILES} > {
        "my_data.py",
        "my_net.py",
        "my_sampler.py",
        "my_metric.py",
        "my_features.py",
    }
    assert len(COMMANDS) >= 5
    dataset = dict(FILES)["my_data.py"].strip()
    assert len([line for line in dataset.splitlines() if line.strip()]) <= 15


def test_its_commands_run_in_their_order(project):
    for command in COMMANDS:
        result = project(command)
        assert result.status == 0, f"{command}\n{result.err}"
    runs = sorted(project.folder.glob("runs/*/*/"), key=lambda f: f.stat().st_mtime)
    assert [run.parent.name for run in runs] == ["folder", "folder", "quickstart"]
    assert all((run / "checkpoints" / "last.ckpt").is_file() for run in runs)
    assert (runs[1] / "samples").is_dir()
    assert (project.folder / "renoised" / "000001.mp4").is_file()
    (report,) = project.folder.glob("runs/*/*/evaluation/*/report.md")
    assert "levels of eight stretches, above -80 dB" in report.read_text()
    assert "sample/rms" in (runs[2] / "metrics.csv").read_text().splitlines()[0]
