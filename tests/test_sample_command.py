"""`sample.py` as people run it: the same files from any subset, order, processes and restarts."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from entry import Project
from media_files import frame_numbers, make_media, sound_lag
from media_files import signal as sound_at

from avdiffusion import checkpoint
from avdiffusion.data.given import Given

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked"),
    pytest.mark.timeout(600),
]
FPS, FRAMES, RATE, SAMPLES = 10, 4, 4000, 1600  # of the model's clips, which last 0.4 s
SMALL = [
    "~exp",
    "name=small",
    "model/net=tiny",
    "model/codec=patches",
    f"data.sample_rate={RATE}",
    f"data.frames={FRAMES}",
    "data.size=[16,16]",
    f"data.samples={SAMPLES}",
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
    "sampler.steps=4",
    "paths.run=run",
]
HOLD = "guide=[stored,reconstruct]"
ALL = "save=[mp4,wav,png,gif]"
EXACT = ("wav", "png", "gif")  # of equal samples, equal bytes


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        project = Project(tmp_path_factory.mktemp("project"))
        yield project
        project.close()


def write(path, words):
    """A checkpoint as training writes it, whose average has been somewhere."""
    torch.manual_seed(0)
    config = checkpoint.plain(checkpoint.compose(words))
    system = checkpoint.build(config["model"])
    with torch.no_grad():
        for p in system.parameters():
            p.add_(0.05 * torch.randn_like(p))
    content = {"state_dict": system.state_dict(), "hyper_parameters": config}
    system.on_save_checkpoint(content)
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)


@pytest.fixture(scope="module")
def ckpt(project):
    path = project.folder / "runs" / "small.ckpt"
    write(path, SMALL)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of three clips, of 1.2, 0.9 and 0.6 s, whose every frame and sample is known."""
    folder = tmp_path_factory.mktemp("sources")
    for name, seconds in (("a.mp4", 1.2), ("b.mov", 0.9), ("c.mov", 0.6)):
        make_media(folder / name, seconds=seconds, sample_rate=16000)
    return folder


@pytest.fixture(scope="module")
def command(ckpt):
    """The command line of these words, which writes to `out`."""

    def line(out, *words):
        first = f"python sample.py ckpt={ckpt} micro_batch=3 cpu_threads=1 seed=7"
        return " ".join([first, f"out={out}", ALL, *map(shlex.quote, words)])

    return line


@pytest.fixture
def sample(project, command, tmp_path):
    """Runs that command and returns the folder."""

    def run(out, *words):
        result = project(command(tmp_path / out, *words))
        assert result.status == 0, result.err
        return tmp_path / out

    return run


def pictures(path):
    with av.open(str(path)) as file:
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])


def sound(path):
    """int16 [L, C] and the sample rate of a wav file."""
    with wave.open(str(path)) as file:
        data = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return data.reshape(-1, file.getnchannels()), file.getframerate()


def packets(path, kind):
    with av.open(str(path)) as file:
        stream = file.streams.best(kind)
        return [bytes(packet) for packet in file.demux(stream) if packet.size]


def lasts(path):
    """Seconds of picture and sound."""
    with av.open(str(path)) as file:
        streams = file.streams.video[0], file.streams.audio[0]
        return tuple(float(each.duration * each.time_base) for each in streams)


def same(part, whole, index):
    """Asserts that samples of these numbers are in the folder, and as they are in the other."""
    assert {int(f.stem) for f in part.glob("*.wav")} == set(index)
    for i in index:
        for kind in EXACT:
            name = f"{i:06d}.{kind}"
            assert (part / name).read_bytes() == (whole / name).read_bytes(), name
        # one in hundreds of encodings differs in some levels
        one, other = (pictures(folder / f"{i:06d}.mp4") for folder in (part, whole))
        assert one.shape == other.shape
        assert np.abs(one.astype(int) - other).mean() < 2


CASES = {
    "plain": [],
    "sound given": [HOLD, "given={sources}", "known=[audio]"],
    "long": [HOLD, "seconds=0.9"],
    "given and long": [HOLD, "given={sources}", "known=[audio,video]", "seconds=1.4"],
    "as long as each": [
        HOLD,
        "given={sources}",
        "known={{audio:[[0,0.1],[0.3,null]]}}",
        "seconds=given",
    ],
    "kept features": ["sampler=ddim", "sampler.steps=6", "reuse.interval=2", "reuse.depth=1"],
    "other sampler": ["sampler=dpm_solver_2m", "sampler.steps=5", "guide=[threshold]"],
    "own steps": ["sampler=dpm_solver_pp", "sampler.atol=0.1", "sampler.rtol=0.2"],
}
NUM = 4  # not a whole number of batches of 3


@pytest.fixture(scope="module")
def words(sources):
    return lambda case: [word.format(sources=sources) for word in CASES[case]]


@pytest.fixture(scope="module")
def whole(project, command, words, tmp_path_factory):
    """The folder of a case's samples, all made in one go; it is made once."""
    made = {}

    def find(case, *more):
        key = (case, *more)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            line = command(made[key], f"num={NUM}", *words(case), *more)
            assert project(line).status == 0
        return made[key]

    return find


def by_case(*quick):
    marks = {name: () if name in quick else pytest.mark.slow for name in CASES}
    return pytest.mark.parametrize("case", [pytest.param(n, marks=m) for n, m in marks.items()])


# ------------------------------------------------------------------------------ the same samples


@by_case("plain")
def test_subsets_and_orders(sample, words, whole, case):
    same(sample("one", "index=[1]", *words(case)), whole(case), [1])
    same(sample("more", "index=[3,0,2]", *words(case)), whole(case), [0, 2, 3])


@by_case("plain")
def test_two_processes(project, command, words, whole, tmp_path, case):
    """Started as torchrun starts them; the first writes everything."""
    line = command(tmp_path / "two", f"num={NUM}", *words(case))
    first, second = [each.wait() for each in project.spread(line, 2)]
    assert first.status == second.status == 0, first.err + second.err
    same(tmp_path / "two", whole(case), range(NUM))
    assert first.out.count(f"{NUM} samples in ") == 1
    assert "samples in" not in second.out
    assert record(tmp_path / "two")["samples"] == record(whole(case))["samples"]
    assert record(tmp_path / "two")["settings"] == record(whole(case))["settings"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "as long as each"])
def test_torchrun(project, command, words, whole, tmp_path, case):
    """The documented command, with nothing prepared for it."""
    done = torchrun(project, command(tmp_path / "two", f"num={NUM}", *words(case)))
    assert done.returncode == 0, done.stderr
    same(tmp_path / "two", whole(case), range(NUM))


def torchrun(project, line):
    begin = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*begin, *shlex.split(line)[1:]],
        cwd=project.folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_an_error_of_one_of_two_processes_ends_both(project, command, whole, tmp_path):
    started = time.monotonic()
    done = torchrun(project, command(whole("plain"), "num=4", "sampler.steps=3"))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "already holds samples of other settings" in done.stderr
    assert time.monotonic() - started < 120
    done = torchrun(project, command(tmp_path / "none", "num=4", "known=[audio]"))
    assert done.returncode != 0
    assert "give them with given=" in done.stderr


# ------------------------------------------------------------------------------------------ kills


def record(folder):
    return json.loads((folder / "samples.json").read_text())


def complete(folder):
    """Numbers of the samples that are there in all their files, and what those files are."""
    files = {}
    for file in folder.glob("0*.*"):
        files.setdefault(int(file.stem), []).append(file)
    return {
        i: sorted((f.name, f.stat().st_mtime_ns, f.stat().st_ino, f.read_bytes()) for f in found)
        for i, found in files.items()
        if len(found) == 4
    }


@pytest.mark.parametrize(
    ("case", "processes"),
    [
        ("plain", 1),
        pytest.param("plain", 2, marks=pytest.mark.slow),
        pytest.param("as long as each", 1, marks=pytest.mark.slow),
        pytest.param("as long as each", 2, marks=pytest.mark.slow),
        pytest.param("long", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_and_run_again(project, command, words, whole, tmp_path, case, processes):
    slow = "sampler.steps=15"
    line = command(tmp_path, f"num={NUM}", *words(case), slow)
    running = project.spread(line, 2) if processes == 2 else [project.start(line)]
    end = time.monotonic() + 120
    while not complete(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.005)
    for each in running:
        each.kill()
    assert [each.wait().status for each in running] == [-signal.SIGKILL] * processes
    before = complete(tmp_path)
    assert 1 <= len(before) < NUM
    result = project(line)
    assert result.status == 0
    assert f"{len(before)} of {NUM} samples are already in" in result.out
    after = complete(tmp_path)
    assert {i: after[i] for i in before} == before
    same(tmp_path, whole(case, slow), range(NUM))
    assert not list(tmp_path.glob(".*"))
    rows, others = (record(folder)["samples"] for folder in (tmp_path, whole(case, slow)))
    assert [row["index"] for row in rows] == list(range(NUM))
    for row, other in zip(rows, others, strict=True):  # of some the kill came before the record
        assert row == other or row["index"] in before
    if case != "plain":
        assert f"{NUM} of {NUM} samples are already in" in project(line).out
        assert complete(tmp_path) == after


# ------------------------------------------------------------------------------------------ errors


def refused(project, line):
    """The only line a command says that has to fail and leave nothing behind."""
    before = project.files()
    result = project(line)
    assert result.status == 1, result
    assert project.files() == before
    return result.error


GIVEN, KNOWN = "given={sources}", "known=[audio]"
WRONG = {
    "needs known=, what of it is to be kept": [GIVEN, HOLD],
    'add one, such as "guide=[stored,reconstruct]"': [GIVEN, KNOWN],
    "give them with given=": [KNOWN, HOLD],
    "nothing is given: say what with given= and known=": ["guide=[stored,replace]"],
    "one window of 0.4 s": [HOLD, "seconds=0.2"],
    "with given=": ["seconds=given", HOLD],
    "nothing is given": [HOLD],
    "such as": ["seconds=2"],
    "clips last 0.4 s": [HOLD, GIVEN, KNOWN, "seconds=0.2"],
    "neither a number nor given": [HOLD, GIVEN, KNOWN, "seconds=long"],
    "overlap of 4 steps": [HOLD, GIVEN, KNOWN, "overlap=4"],
    "none of video, audio": [HOLD, GIVEN, "known=[depth]"],
    "name some of video, audio": [HOLD, GIVEN, "known=[]"],
    "reversed": [HOLD, GIVEN, "known={{audio:[0.2,0.1]}}"],
    "ask for more seconds": [HOLD, GIVEN, "known=[audio,video]"],
    "no such file": [HOLD, GIVEN + "/none.mp4", KNOWN],
    "would be given the next time": [HOLD, GIVEN, KNOWN, "out={sources}/out"],
    "leaves out a condition, and this model has none": ["guide=[cfg]"],
    "follows the gradient": [HOLD, GIVEN, KNOWN, "reuse.interval=2"],
    "above this network's": ["reuse.interval=2", "reuse.depth=9"],
    "not one of 32-true": ["precision=16"],
    "on cpu": ["capture=true", "device=cpu"],
    "micro_batch=0": ["micro_batch=0"],
    "name no samples": ["num=0"],
    "index=[-1]": ["index=[-1]"],
}


@pytest.mark.parametrize(
    "said",
    [w if k < 2 else pytest.param(w, marks=pytest.mark.slow) for k, w in enumerate(WRONG)],
)
def test_what_does_not_go_together_is_said_with_its_remedy(
    project, command, sources, tmp_path, said
):
    words = [word.format(sources=sources) for word in WRONG[said]]
    line = command(tmp_path / "none", *words)
    if any(word.startswith(("micro_batch", "out=")) for word in words):
        (word,) = words[-1:]
        line = re.sub(rf"{word.partition('=')[0]}=\S+ ", "", line, count=1)
    assert said in refused(project, line)
    assert not (tmp_path / "none").exists()


def test_how_the_network_is_called_is_part_of_what_samples_depend_on(project, command, tmp_path):
    """Each word alone makes other samples, which no folder mixes."""
    line = command(tmp_path / "out", "index=[1]", "precision=bf16-mixed", "reuse.interval=2")
    assert project(line).status == 0
    chosen = record(tmp_path / "out")["settings"]
    assert chosen["precision"] == "bf16-mixed"
    assert chosen["reuse"] == {"interval": 2, "depth": 2}
    error = refused(project, line.replace("bf16-mixed", "32-true"))
    assert 'precision: "bf16-mixed" there, null here' in error
    error = refused(project, line.replace("reuse.interval=2", "reuse.interval=3"))
    assert '(reuse: {"interval": 2, "depth": 2} there' in error


@pytest.mark.slow
def test_files_that_lack_what_is_known_are_named(project, command, tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    make_media(folder / "good.mp4", seconds=0.6, sample_rate=16000)
    make_media(folder / "mute.mp4", seconds=0.6, codecs=("libx264", None))
    error = refused(project, command(tmp_path / "none", HOLD, f"given={folder}", "known=[audio]"))
    assert "1 of 2 files" in error
    assert "mute.mp4" in error
    make_media(folder / "mute.mp4", seconds=0.3, sample_rate=16000)
    error = refused(project, command(tmp_path / "none", HOLD, f"given={folder}", "known=[audio]"))
    assert "mute.mp4 (0.30 s of sound, the model's clips last 0.40 s; say what is known" in error


# ------------------------------------------------------------------------- one part for another


def test_pictures_for_given_sound(sample, sources):
    out = sample("out", HOLD, f"given={sources}", "known=[audio]")
    rows = record(out)["samples"]
    assert [Path(row["given"]["file"]).name for row in rows] == ["a.mp4", "b.mov", "c.mov"]
    for i, row in enumerate(rows):
        data, rate = sound(out / f"{i:06d}.wav")
        assert (rate, data.shape) == (16000, (6400, 1))
        assert row["given"]["known"] == {"audio": [[0.0, 0.4]]}
        if i:  # stored without loss
            wanted = sound_at(np.arange(6400) / 16000) * 32768
            assert np.abs(data[:, 0] - wanted).max() <= 1
        assert abs(sound_lag(data[:, 0] / 32768, 0, 16000)) <= 1 / 16000
        video = pictures(out / f"{i:06d}.mp4")
        assert video.shape == (FRAMES, 16, 16, 3)
        assert lasts(out / f"{i:06d}.mp4") == pytest.approx((0.4, 0.4), abs=1e-3)
    assert rows[0]["given"]["kept"] == {"audio": "copied"}
    kept, whole = packets(out / "000000.mp4", "audio"), packets(sources / "a.mp4", "audio")
    assert kept
    assert kept == whole[: len(kept)]


def test_sound_for_given_pictures(sample, sources):
    out = sample("out", "guide=[stored,replace]", f"given={sources}", "known=[video]", "num=4")
    wavs = [sound(out / f"{i:06d}.wav") for i in range(4)]
    for i, (data, rate) in enumerate(wavs):
        assert (rate, data.shape) == (RATE, (SAMPLES, 1))
        video = pictures(out / f"{i:06d}.mp4")
        assert video.shape[1:] == (48, 96, 3)  # as it is in the file, at its own rate
        assert frame_numbers(np.moveaxis(video, 3, 0))[:10] == list(range(10))
        assert len(video) == 10
        assert lasts(out / f"{i:06d}.mp4") == pytest.approx((0.4, 0.4), abs=1e-3)
    # samples 0 and 3 share a file, and are two samples
    assert not np.array_equal(wavs[0][0], wavs[3][0])


def test_what_is_known_in_part_stays(sample, sources, ckpt):
    words = {"known": {"audio": [[0, 0.15], [0.6, None]], "video": [0.2, 0.5]}, "seconds": 0.8}
    out = sample(
        "out",
        HOLD,
        f"given={sources}/b.mov",
        "known={audio:[[0,0.15],[0.6,null]],video:[0.2,0.5]}",
        "seconds=0.8",
    )
    system = checkpoint.load(ckpt)
    item = Given(sources / "b.mov", **words, shapes=system.shapes, rates=system.rates)[0]
    (data, rate), mask = sound(out / "000000.wav"), item.mask["audio"].numpy()
    assert (rate, len(data)) == (RATE, 3200)
    assert mask.tolist() == [True] * 600 + [False] * 1800 + [True] * 800
    wanted = item.values["audio"][0].numpy().clip(-1, 1)
    assert np.abs(data[mask, 0] / 32767 - wanted[mask]).max() < 1e-4
    assert np.abs(data[~mask, 0]).max() > 0
    assert pictures(out / "000000.mp4").shape == (8, 16, 16, 3)


@pytest.mark.slow
def test_a_clip_goes_on(sample, sources):
    out = sample("out", HOLD, f"given={sources}/c.mov", "known=[audio,video]", "seconds=1.5")
    data, _ = sound(out / "000000.wav")
    assert len(data) == 6000
    assert pictures(out / "000000.mp4").shape == (15, 16, 16, 3)
    assert abs(sound_lag(data[:2400, 0] / 32768, 0, RATE)) <= 1 / RATE
    assert np.abs(data[2400:]).max() > 0
    assert lasts(out / "000000.mp4") == pytest.approx((1.5, 1.5), abs=1e-3)
