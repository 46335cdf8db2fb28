"""`evaluate.py` as people run it: the same figures from any order, processes and restarts."""

import json
import os
import re
import shutil
import time

import numpy as np
import pytest
import torch
from entry import Project
from media_files import make_media

from avdiffusion import checkpoint, io

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked"),
    pytest.mark.timeout(600),
]
TOY = [
    "data=toy",
    "~exp",
    "name=small",
    "model/net=tiny",
    "model/codec=patches",
    "data.sample_rate=4000",
    "data.frames=8",
    "data.size=[16,16]",
    "data.samples=3200",
    "model.diffusion.net.video_channels=48",
    "model.diffusion.net.audio_channels=16",
    "model.diffusion.net.channel_mult=[1,2]",
    "model.diffusion.net.cross_attention_resolutions=[2]",
    "model.diffusion.net.cross_attention_windows=[2]",
    "model.diffusion.net.num_res_blocks=1",
    "model.diffusion.net.channels=8",
    "model.diffusion.net.num_heads=2",
    "model.diffusion.net.head_channels=8",
    "sampler=ddpm",
    "sampler.steps=3",
    "paths.run=run",
]
METRICS = '"metrics=[kvd_thumbnail,sync]" allow_small=true resamples=20'


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        project = Project(tmp_path_factory.mktemp("project"))
        yield project
        project.close()


@pytest.fixture(scope="module")
def folders(project):
    """Twelve samples and twelve real clips of 0.8 s; the real ones are four long files."""
    for k in range(12):
        write_sample(project.folder / "samples" / f"{k:06d}.mp4", k)
    for k in range(4):
        name = project.folder / "real" / f"{'dbca'[k]}.mp4"
        name.parent.mkdir(exist_ok=True)
        make_media(name, seconds=2.6, fps=20, sample_rate=22050)
    return project.folder


def write_sample(path, k, write=io.write_mp4, more=0):
    """Eight frames of a bar at another place each (and `more`), and a tone of another height."""
    path.parent.mkdir(exist_ok=True)
    video = np.full((3, 8 + more, 32, 64), 40, np.uint8)
    for t in range(8 + more):
        video[:, t, :, (5 * k + 7 * t) % 60 :][..., :4] = 200
    now = np.arange(12800 + 1600 * more)
    tone = np.sin(now * (0.1 + 0.02 * k)) * (now % 3200 < 800)
    write(path, video, 0.5 * tone[None].astype(np.float32), fps=10, sample_rate=16000)


@pytest.fixture
def evaluate(project, folders, tmp_path):
    """Runs the command; returns what report.json holds."""

    def run(words, *, samples="samples", cache=None, processes=1):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        line = f"python evaluate.py samples={samples} {METRICS} {words} out={out}"
        line += f" cache={cache}" if cache else ""
        if processes > 1:
            results = [each.wait() for each in project.spread(line, processes)]
        else:
            results = [project(line)]
        assert [each.status for each in results] == [0] * processes, results[0].err
        report = json.loads((out / "report.json").read_text())
        assert {file.name for file in out.iterdir()} == {
            "report.json",
            "report.md",
            "report.html",
        }
        return report

    return run


def values(report):
    return {f["key"]: f["value"] for group in report["groups"] for f in group["figures"]}


def close(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value is None or b[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key


def test_the_same_folder_gives_the_same_figures(evaluate, folders, tmp_path):
    """Twice, from what was kept, from nothing, in two processes and in another order."""
    first = evaluate("reference=real", cache=tmp_path / "one")
    found = values(first)
    assert {"kvd_thumbnail", "avcorr"} <= found.keys()
    assert first["sets"]["samples"]["count"] == 12
    assert first["sets"]["reference"]["count"] == 12
    close(found, values(evaluate("reference=real", cache=tmp_path / "one")))
    close(found, values(evaluate("reference=real", cache=tmp_path / "two")))
    two = evaluate("reference=real", cache=tmp_path / "three", processes=2)
    close(found, values(two))
    other = tmp_path / "shuffled"
    other.mkdir()
    for k, file in enumerate(sorted((folders / "samples").iterdir(), reverse=True)):
        shutil.copy(file, other / f"{k:06d}.mp4")
    close(found, values(evaluate("reference=real", samples=other)))


def test_another_codec_is_another_set_and_is_named(evaluate, folders, tmp_path):
    first = evaluate("reference=real")
    again = tmp_path / "again"
    again.mkdir()
    for k, file in enumerate(sorted((folders / "samples").iterdir())):
        write_sample(again / f"{file.stem}.webm", k, io.write_webm)
    second = evaluate("reference=real form.sample_rate=16000 form.samples=12800", samples=again)
    said = [dict(report["sets"]["samples"]["lines"])["codec read"] for report in (first, second)]
    assert said[0].startswith("h264 + aac")
    assert re.match(r"vp\d \+ opus", said[1])
    assert first["sets"]["samples"]["hash"] != second["sets"]["samples"]["hash"]
    assert values(first)["kvd_thumbnail"] != values(second)["kvd_thumbnail"]


def test_a_killed_evaluation_goes_on(project, folders, tmp_path):
    """What was measured is kept batch by batch."""
    cache = tmp_path / "cache"
    line = f"python evaluate.py samples=samples reference=real {METRICS} cache={cache} out="
    running = project.start(line + str(tmp_path / "a"))
    begun, found = time.monotonic(), "features/*/*/*/[0-9]*.npz"
    while not list(cache.glob(found)):
        assert time.monotonic() < begun + 100
        time.sleep(0.01)
    running.kill()
    running.wait()
    kept = {file: file.stat().st_mtime_ns for file in cache.glob(found)}
    assert kept
    done = project(line + str(tmp_path / "b"))
    assert done.status == 0, done.err
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())


@pytest.fixture(scope="module")
def ckpt(project):
    return write_checkpoint(project.folder / "runs" / "small.ckpt", TOY)


def write_checkpoint(path, words):
    torch.manual_seed(0)
    config = checkpoint.plain(checkpoint.compose(words))
    system = checkpoint.build(config["model"])
    content = {"state_dict": system.state_dict(), "hyper_parameters": config}
    system.on_save_checkpoint(content)
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return path


def test_a_checkpoint_is_judged_by_arrays_against_its_own_data(project, ckpt, tmp_path):
    metrics = '"metrics=[kvd_thumbnail,memorisation]" allow_small=true resamples=20'
    line = f"python evaluate.py ckpt={ckpt} {metrics} num=6 train_num=9 out={tmp_path}/a"
    done = project(line)
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert [report["sets"][p]["count"] for p in ("samples", "reference", "train")] == [6, 6, 9]
    assert "no codec" in dict(report["sets"]["samples"]["lines"])["clips"]
    assert values(report)["kvd_thumbnail"] > 0
    assert len(report["pairs"]) == 6
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("<video") >= 12  # every sample and a neighbour of each
    text = (tmp_path / "a" / "report.md").read_text()
    assert report["sets"]["reference"]["hash"][:12] in text


@pytest.fixture
def hostile(project, ckpt, tmp_path):
    """A checkpoint with another node for its validation data."""

    def made(node):
        content = torch.load(ckpt, weights_only=True)
        content["hyper_parameters"]["data"]["val"] = node
        torch.save(content, tmp_path / "other.ckpt")
        return tmp_path / "other.ckpt"

    return made


@pytest.mark.parametrize("inner", [False, True])
def test_a_checkpoint_cannot_have_anything_called(project, hostile, tmp_path, inner):
    call = {"_target_": "avdiffusion.data.index.os.mkdir", "path": str(tmp_path / "made")}
    toy = {"_target_": "avdiffusion.data.toy.Toy", "num": call}
    words = 'num=2 allow_small=true "metrics=[kvd_thumbnail]"'
    done = project(f"python evaluate.py ckpt={hostile(toy if inner else call)} {words}")
    assert done.status == 1
    assert "not built from a file of unknown origin" in done.error
    assert not (tmp_path / "made").exists()


def test_what_sample_py_writes_is_judged(project, ckpt, folders, tmp_path):
    """An mp4 and a wav of each sample, and where the model's data were levelled, the real clips."""
    assert project(f"python sample.py ckpt={ckpt} num=4 out={tmp_path}/made").status == 0
    record = tmp_path / "made" / "samples.json"
    content = json.loads(record.read_text())
    content["info"]["loudness"] = -40
    record.write_text(json.dumps(content))
    line = f'python evaluate.py samples={tmp_path}/made reference=real "metrics=[sound]" out='
    done = project(line + str(tmp_path / "out"))
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sets"]["samples"]["count"] == 4
    said = {place: dict(report["sets"][place]["lines"]) for place in ("samples", "reference")}
    assert said["reference"]["level"] == "brought to -40 dB"
    assert "level" not in said["samples"]
    for broken in ("[1]", '{"info": {"loudness": "x"}}', "{"):
        record.write_text(broken)
        assert "samples.json" in project(line + str(tmp_path / "none")).error


def test_samples_are_compared_with_the_stretch_of_their_target(project, folders, tmp_path):
    """Whatever its container, and though it goes on."""
    for k in range(12):
        write_sample(tmp_path / "targets" / f"{k:06d}.webm", k, io.write_webm, more=3)
    line = f'python evaluate.py samples=samples "metrics=[restoration,stft]" out={tmp_path}/out'
    done = project(f"{line} target={tmp_path}/targets")
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = values(report)
    assert found["psnr"] > 25  # codecs apart they are the same
    assert found["ssim"] > 0.8


def test_a_model_that_makes_clips_of_others_is_judged_by_what_it_makes(project, tmp_path):
    """The line that refuses it names two commands, and they work."""
    words = ["exp=pouring_sr_cpu", "data.root=clips", "data.size=[32,32]", "paths.run=run"]
    words += ["model.diffusion.net.channels=8", "model.diffusion.net.channel_mult=[1,2]"]
    ckpt = write_checkpoint(tmp_path / "sr.ckpt", [*words, "sampler.steps=1"])
    for name, size in (("small", 16), ("large", 64)):
        path = tmp_path / name / "sub" / "one.mp4"
        path.parent.mkdir(parents=True)
        video = np.full((3, 8, size, size), 60, np.uint8)
        video[:, :, size // 4 :] = 180
        io.write_mp4(path, video, None, fps=10)
    refused = project(f"python evaluate.py ckpt={ckpt}")
    assert refused.status == 1
    assert f"{ckpt} makes clips of others" in refused.error
    advice = refused.error.strip()
    assert "\n" not in advice
    for word, name in (("CLIPS", "small"), ("OUT", "made"), ("ORIGINALS", "large")):
        advice = advice.replace(f"={word}", f"={tmp_path}/{name}")
    sample, evaluate = advice[advice.index("python sample.py") :].split(", then ")
    made = project(sample)
    assert made.status == 0, made.err
    done = project(f"{evaluate} resamples=0 out={tmp_path}/report".replace(",lpips", ""))
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert 5 < values(report)["psnr"] < 50


def test_real_clips_may_lack_what_no_metric_looks_at(project, folders, tmp_path):
    for k in range(3):
        (tmp_path / "mute").mkdir(exist_ok=True)
        make_media(tmp_path / "mute" / f"{k}.mp4", seconds=1.0, fps=10, codecs=("libx264", None))
    line = f"python evaluate.py samples=samples reference={tmp_path}/mute out={tmp_path}/out"
    assert project(f'{line} "metrics=[flicker]"').status == 0
    assert "0.mp4 (no sound)" in project(f'{line} "metrics=[flicker,sound]"').error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "what is to be judged? Give a folder, samples=DIR, or a model, ckpt=PATH"),
        ("samples=nowhere", "samples=nowhere is no folder of clips"),
        ('samples=samples "metrics=[]"', "leaves nothing to measure"),
        (
            'samples=samples "metrics=[kvd_thumbnail]"',
            "metrics.kvd_thumbnail needs real clips to compare with: reference=DIR",
        ),
        (
            'samples=samples reference=real "metrics=[kvd_thumbnail]"',
            "metrics.kvd_thumbnail: kvd_thumbnail of 12 samples against 12 reference clips says "
            "nothing",
        ),
        (
            'samples=samples "metrics=[restoration]"',
            "metrics.restoration compares each sample with the clip it should be",
        ),
        (
            'samples=samples "metrics=[restoration]" target=real',
            "12 of 12 samples have no clip of their name in real, such as 000000.mp4",
        ),
        ('samples=samples num=13 "metrics=[flicker]"', "samples holds 12 clips, not num=13"),
        (
            'samples=samples "metrics=[fvd]" reference=real',
            "I3D needs at least 9 frames, these clips have 8: evaluate longer clips",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(project, folders, words, said):
    done = project(f"python evaluate.py {words}")
    assert done.status == 1
    assert said in done.error
    assert not (folders / "samples_evaluation").exists()
