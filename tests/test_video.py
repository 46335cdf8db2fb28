"""Video without sound from the command line: trained, resumed, sampled, judged."""

import csv
import json
import os
from pathlib import Path

import pytest
from entry import Project
from media_files import make_media

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked"),
    pytest.mark.timeout(600),
]
FAST = "debug=fast logger=csv trainer.limit_val_batches=1 data.val.num=6 callbacks.samples.num=2"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        project = Project(tmp_path_factory.mktemp("project"))
        yield project
        project.close()


@pytest.fixture(scope="module")
def trained(project):
    result = project(f"python train.py exp=video_ddpm_cpu {FAST} callbacks.samples.final_num=4")
    assert result.status == 0, result.err
    (run,) = project.folder.glob("runs/video_ddpm_cpu/*/")
    return run


def test_samples_while_training_are_scored_beside_real_ones(trained):
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    (scores,) = [row for row in rows if row["sample/shapes_real"]]
    assert float(scores["sample/shapes_real"]) > 1
    assert 0 < float(scores["sample/course_error_real"]) < 0.1
    assert float(scores["sample/course_error"]) > 0.3
    names = {path.name for path in (trained / "samples" / "final").iterdir()}
    assert {"000003.mp4", "000003.png", "gallery.html"} <= names


def test_training_goes_on_and_samples_are_judged(project, trained):
    words = f"exp=video_ddpm_cpu {FAST} trainer.max_steps=6 callbacks.samples.final_num=0"
    result = project(f"python train.py {words} ckpt={trained}")
    assert result.status == 0, result.err
    result = project(f"python sample.py ckpt={trained} num=3 micro_batch=2 out=clips_alone")
    assert result.status == 0, result.err
    names = {path.name for path in (project.folder / "clips_alone").iterdir()}
    assert {"000002.mp4", "000002.png", "gallery.html"} <= names
    assert not [name for name in names if name.endswith(".wav")]

    result = project(
        f'python evaluate.py ckpt={trained} num=4 "metrics=[motion]" out=report '
        "resamples=0 cache=kept"
    )
    assert result.status == 0, result.err
    (report,) = Path(project.folder / "report").glob("*.json")
    figures = {f["key"]: f for g in json.loads(report.read_text())["groups"] for f in g["figures"]}
    assert figures["shapes"]["ceiling"] > 1
    assert figures["course_error"]["ceiling"] < 0.1 < figures["course_error"]["value"]


def test_a_folder_of_videos_without_sound_is_enough(project, tmp_path):
    for k in range(4):
        make_media(tmp_path / f"{k}.mp4", seconds=2, codecs=("mpeg4", None))
    words = "model/net=video_tiny data.frames=4 'data.size=[16,16]' data.num_workers=0"
    result = project(
        f"python train.py exp=video_ddpm data.root={tmp_path} {words} debug=fast trainer=cpu "
        "callbacks.samples.num=1 data.train.val_fraction=0.25"
    )
    assert result.status == 0, result.err
    (run,) = project.folder.glob("runs/video_ddpm/*/")
    assert (run / "samples" / "final" / "000000.mp4").is_file()
