"""Windows that are decoded once: the same to the bit, whoever builds them and whatever happens."""

import json
import logging
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from entry import Project
from media_files import make_media
from torch.utils.data import DataLoader

from avdiffusion import checkpoint, io
from avdiffusion.data.clips import Clips
from avdiffusion.data.module import Draws, collate
from avdiffusion.data.windows import Windows, spread

SMALL = {"frames": 8, "samples": 12800, "size": (16, 32), "split": "all", "keep": True}
SHAPE = {k: SMALL[k] for k in ("frames", "samples", "size")}
DECODED = SMALL | {"keep": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six files of several containers and rates, one with stereo sound."""
    root = tmp_path_factory.mktemp("clips")
    (root / "below").mkdir()
    for k, suffix in enumerate([".mp4", ".mkv", ".avi"] * 2):
        path = root / ("below" if k % 2 else ".") / f"clip{k}{suffix}"
        make_media(path, fps=(15, 25, 30)[k % 3], seconds=1.5 + k / 2, channels=1 + k % 2)
    return root


@pytest.fixture
def folder(source, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(source, tmp_path / "clips")


def kept(cache):
    """The folders of windows in a cache."""
    return sorted(Path(cache).glob("windows-*"))


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        equal = torch.equal if isinstance(one[name], torch.Tensor) else lambda a, b: a == b
        assert equal(one[name], other[name]), name


def decodes(monkeypatch):
    """A list that grows by the name of the file with every window that is decoded."""
    read = []
    real = io.read_window
    monkeypatch.setattr(
        "avdiffusion.data.clips.read_window",
        lambda path, *a, **k: read.append(path.name) or real(path, *a, **k),
    )
    return read


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loudness": -20, "channels": 2, "fit": "letterbox"},
        {"hop": 0.3},
        {"modalities": ["audio"]},
        {"modalities": ["video"]},
    ],
    ids=str,
)
def test_fixed_windows_are_the_decoded_ones_to_the_bit(source, monkeypatch, settings):
    decoded = Clips(source, **DECODED, **settings)
    clips = Clips(source, **SMALL, **settings)
    assert clips.files == decoded.files
    assert clips.windows == decoded.windows
    assert str(clips.report) == str(decoded.report)
    wanted = list(decoded)
    read = decodes(monkeypatch)
    for one, other in zip(clips, wanted, strict=True):
        same(one, other)
    assert read == []
    with pytest.raises(IndexError):
        clips[len(clips)]


def test_both_sides_of_a_split_share_one_folder(source, tmp_path, monkeypatch):
    sides = {s: Clips(source, **DECODED | {"split": s}) for s in ("train", "val")}
    Clips(source, **SMALL, cache=tmp_path)
    read = decodes(monkeypatch)
    for name, decoded in sides.items():
        clips = Clips(source, **SMALL | {"split": name}, cache=tmp_path)
        assert clips.files == decoded.files
        assert clips.windows == decoded.windows
    assert len(kept(tmp_path)) == 1
    assert read == []


def test_draws_depend_on_the_generator_alone(source):
    clips = Clips(source, **SMALL, flip=0.5, channels=2)
    number = clips.windows[-1][0]
    fixed = [clips[i] for i, (file, _) in enumerate(clips.windows) if file == number]
    seen, mirrored = set(), 0
    for k in range(60):
        item = clips.draw(len(clips) - 1, np.random.default_rng(k))
        same(item, clips.draw(len(clips) - 1, np.random.default_rng(k)))
        assert item["index"] == len(clips) - 1
        place, coin = np.random.default_rng(k).random(2)
        wanted = fixed[int(place * len(fixed))]
        video, audio = wanted["video"], wanted["audio"]
        if coin < 0.5:
            mirrored += 1
            video, audio = video.flip(3), audio.flip(0)
        assert torch.equal(item["video"], video)
        assert torch.equal(item["audio"], audio)
        seen.add(int(place * len(fixed)))
    assert seen == set(range(len(fixed)))
    assert 15 < mirrored < 45


def test_a_hop_gives_more_to_draw_from_and_no_other_items(source, tmp_path):
    wide, dense = Clips(source, **SMALL), Clips(source, **SMALL, hop=0.4, flip=0)
    assert wide.windows == dense.windows
    i = len(dense) - 1
    drawn = [dense.draw(i, np.random.default_rng(k))["video"] for k in range(40)]
    fixed = [
        wide[k]["video"] for k, (file, _) in enumerate(wide.windows) if file == wide.windows[i][0]
    ]
    others = [v for v in drawn if not any(torch.equal(v, f) for f in fixed)]
    assert 5 < len(others) < 35
    with pytest.raises(ValueError, match="hop=0 has to be above 0"):
        Clips(source, **SMALL, hop=0)


def test_starts():
    starts, fixed = spread(2.0, 7.0, 1.6)
    assert starts == np.linspace(2, 9, 5).tolist()
    assert fixed == [0, 1, 2, 3, 4]
    dense, fixed = spread(2.0, 7.0, 1.6, 0.4)
    assert [dense[k] for k in fixed] == starts
    assert np.diff(dense) == pytest.approx(0.4, rel=0.15)
    assert spread(2.0, 7.0, 1.6, 1.6) == spread(2.0, 7.0, 1.6, 5.0) == (starts, [0, 1, 2, 3, 4])
    assert spread(0.0, 1.0, 1.6) == ([0.5], [0])
    assert spread(0.0, 1.0, 1.6, 0.5) == ([0.0, 0.5, 1.0], [1])
    assert spread(3.0, 0.0, 1.6, 0.5) == ([3.0], [0])


def test_settings_have_folders_of_their_own(source, tmp_path, caplog):
    cache = tmp_path / "cache"
    changes = [{}, {"loudness": -20}, {"fit": "letterbox"}, {"size": (8, 16)}, {"hop": 0.2}]
    changes += [{"channels": 2}, {"frames": 6, "samples": 9600}, {"fps": 5, "frames": 4}]
    with caplog.at_level(logging.INFO):
        for change in changes:
            Clips(source, **SMALL | change, cache=cache)
    assert len(kept(cache)) == len(changes)
    assert "windows with other settings, 0.0" in caplog.text
    assert str(kept(cache)[0]) in caplog.text
    for change in changes:
        Clips(source, **SMALL | change, cache=cache)
    no_changes = [{"flip": 0}, {"val_fraction": 0.5}, {"on_bad": "skip"}, {"index_workers": 1}]
    no_changes += [{"loudness": -20.0}, {"fps": 10.0}, {"size": [16, 32]}]
    for change in no_changes:
        Clips(source, **SMALL | change, cache=cache)
    assert len(kept(cache)) == len(changes)


def test_another_decoder_decodes_again(source, tmp_path, monkeypatch):
    Clips(source, **SMALL, cache=tmp_path)
    monkeypatch.setattr("avdiffusion.data.clips.DECODER", -1)
    Clips(source, **SMALL, cache=tmp_path)
    assert len(kept(tmp_path)) == 2


def test_changes_of_the_source_are_noticed(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = Clips(folder, **SMALL, cache=cache)
    read = decodes(monkeypatch)
    make_media(folder / "clip0.mp4", seconds=3.1)  # changed
    (folder / "clip2.avi").unlink()
    make_media(folder / "new.mkv", seconds=1)
    clips = Clips(folder, **SMALL, cache=cache)
    assert set(read) == {"clip0.mp4", "new.mkv"}  # the others are taken over
    assert clips.files != first.files
    fresh = Clips(folder, **DECODED)
    assert clips.windows == fresh.windows
    for one, other in zip(clips, fresh, strict=True):
        same(one, other)
    read.clear()
    os.utime(folder / "new.mkv", ns=(0, 1))
    Clips(folder, **SMALL, cache=cache)
    assert set(read) == {"new.mkv"}
    (place,) = kept(cache)
    named = json.loads((place / "windows.json").read_text())["arrays"].values()
    assert {f.name for f in place.iterdir()} == {"windows.json", ".lock", *named}
    for _ in range(2):  # what was opened before goes on with what it has
        same(first[0], first[0])


@pytest.mark.parametrize("damage", ["json", "cut", "gone", "version"])
def test_damage_is_noticed(source, tmp_path, damage):
    Clips(source, **SMALL, cache=tmp_path)
    (place,) = kept(tmp_path)
    (video,) = place.glob("video-*.npy")
    content = json.loads((place / "windows.json").read_text())
    if damage == "json":
        (place / "windows.json").write_text(json.dumps(content)[:-5])
    elif damage == "version":
        (place / "windows.json").write_text(json.dumps(content | {"format": 0}))
    elif damage == "cut":
        os.truncate(video, video.stat().st_size - 1)
    else:
        video.unlink()
    with pytest.raises(FileNotFoundError, match="no kept windows in"):
        Windows(place)
    clips = Clips(source, **SMALL, cache=tmp_path)
    same(clips[3], Clips(source, **DECODED)[3])


BUILD = """
import logging, sys, time
from pathlib import Path
logging.basicConfig(level=logging.WARNING, format="%(message)s")
import avdiffusion.data.clips as clips
real, log = clips.read_window, Path(sys.argv[3])
def slow(path, *a, **k):
    with log.open("a") as file:
        file.write(path.name + "\\n")
    time.sleep(0.05)
    return real(path, *a, **k)
clips.read_window = slow
print("ready", flush=True)
sys.stdin.readline()
made = clips.Clips(sys.argv[1], cache=sys.argv[2], index_workers=2, keep=True, split="all",
                   frames=8, samples=12800, size=(16, 32))
print(len(made), sum(int(item["video"].sum()) for item in made))
"""


def builders(count, folder, cache, log):
    """Processes that stand ready to build; a line on their stdin lets them."""
    words = [sys.executable, "-c", BUILD, str(folder), str(cache), str(log)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(words, text=True, **pipes) for _ in range(count)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    return started


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_of_two_processes_one_builds_and_the_other_waits(source, tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    both = builders(2, source, cache, log)
    for process in both:
        go(process)
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    decoded = Clips(source, **DECODED)
    expected = f"{len(decoded)} {sum(int(item['video'].sum()) for item in decoded)}\n"
    assert [out for out, _ in outputs] == [expected, expected]
    assert len(log.read_text().splitlines()) == len(decoded)
    said = [err for _, err in outputs if "another process is decoding into" in err]
    assert len(said) == 1
    assert f"{kept(cache)[0]}: waiting for it" in said[0]


def test_a_killed_build_is_never_taken_for_complete(source, tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    first, second, third = builders(3, source, cache, log)
    go(first)
    until(lambda: log.is_file() and len(log.read_text().splitlines()) >= 4)
    go(second)  # waits for the first, and takes its place
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    before = len(log.read_text().splitlines())
    until(lambda: len(log.read_text().splitlines()) >= before + 4)
    second.send_signal(signal.SIGKILL)
    second.communicate(timeout=60)
    (place,) = kept(cache)
    assert not (place / "windows.json").exists()
    assert list(place.glob("*.part"))
    log.unlink()
    go(third)
    out, err = third.communicate(timeout=60)
    decoded = Clips(source, **DECODED)
    assert out.split()[0] == str(len(decoded)), err
    assert len(log.read_text().splitlines()) == len(decoded)
    assert not list(place.glob("*.part"))
    for one, other in zip(Clips(source, **SMALL, cache=cache), decoded, strict=True):
        same(one, other)


def test_a_full_disk_is_one_line(source, tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    Clips(source, **DECODED, cache=tmp_path)  # the index
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ValueError, match="cannot be kept") as caught:
            Clips(source, **SMALL, cache=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (place,) = kept(tmp_path)
    assert re.fullmatch(
        rf"the windows cannot be kept in {place}: File too large; data\.train\.cache names "
        r"another folder, data\.train\.keep=false decodes them every time",
        str(caught.value),
    )
    assert [f.name for f in place.iterdir()] == [".lock"]

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"0\.00 GB are needed and 0\.00 GB free; data\.train\.ca"):
        Clips(source, **SMALL, cache=tmp_path)


def test_a_disk_that_fills_up_meanwhile(source, tmp_path, monkeypatch):
    put = "avdiffusion.data.windows._Rows.put"

    def full(self, row, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(put, full)
    with pytest.raises(ValueError, match=r"cannot be kept in .*: No space left on device; "):
        Clips(source, **SMALL, on_bad="skip", cache=tmp_path)
    assert [f.name for f in kept(tmp_path)[0].iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_one_line(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be kept in .*: Not a directory; data") as caught:
        Clips(source, **SMALL, cache=tmp_path / "file")
    assert "\n" not in str(caught.value)


def break_file(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 10 :] = bytes(len(data) - len(data) // 10)
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # so that the index does not see it


def test_files_that_break_while_they_are_decoded(folder, tmp_path, caplog):
    Clips(folder, **DECODED, cache=tmp_path)
    break_file(folder / "below" / "clip1.mkv")
    with pytest.raises(io.MediaError, match=r"clip1\.mkv: "):
        Clips(folder, **SMALL, cache=tmp_path)
    assert [f.name for f in kept(tmp_path)[0].iterdir()] == [".lock"]
    for _ in range(2):  # the second time from the cache
        clips = Clips(folder, **SMALL, on_bad="skip", cache=tmp_path)
        assert clips.report.bad == [("below/clip1.mkv", "found broken while being read")]
        assert clips.report.used == 5
        assert "below/clip1.mkv" not in clips.files
        assert len(clips.files) == 5
    with pytest.raises(ValueError, match=r"1 of 6 .* cannot be used: below/clip1\.mkv \(found"):
        Clips(folder, **SMALL, cache=tmp_path)
    decoded = Clips(folder, **DECODED, on_bad="skip", cache=tmp_path)
    starts = {(decoded.files[n], s): i for i, (n, s) in enumerate(decoded.windows)}
    for i, (number, start) in enumerate(clips.windows):
        other = decoded[starts[clips.files[number], start]]
        same(clips[i], other | {"index": i})


def test_workers_and_copies_read_the_same(source):
    clips = Clips(source, **SMALL)
    requests = [[(k % len(clips), k, 0) for k in range(4 * j, 4 * j + 4)] for j in range(4)]
    read = {"batch_sampler": requests, "collate_fn": collate}
    alone = list(DataLoader(Draws(clips), **read))
    for dataset, workers in ((clips, 2), (pickle.loads(pickle.dumps(clips)), 0)):
        for one, other in zip(
            DataLoader(Draws(dataset), num_workers=workers, **read), alone, strict=True
        ):
            same(one, other)
    item = clips[0]
    item["video"].zero_()  # a copy: what is kept stays
    assert clips[0]["video"].any()


def test_a_copied_folder_needs_neither_the_source_nor_a_decoder(source, tmp_path):
    first = {
        s: Clips(source, **SMALL | {"split": s}, cache=tmp_path / "a") for s in ("train", "val")
    }
    place = shutil.copytree(kept(tmp_path / "a")[0], tmp_path / "elsewhere")
    expected = {s: [clips.files, int(clips[0]["video"].sum())] for s, clips in first.items()}
    code = f"""
import json, sys
for name in ("av", "torchvision", "torchaudio", "wandb"):
    sys.modules[name] = None
import numpy as np
from avdiffusion.data.windows import Windows
found = {{}}
for split in ("train", "val"):
    clips = Windows({str(place)!r}, split=split, frames=8, samples=12800, size=[16, 32])
    assert clips.draw(0, np.random.default_rng(0))["audio"].shape == (1, 12800)
    found[split] = [clips.files, int(clips[0]["video"].sum())]
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == expected
    text = (place / "windows.json").read_text()
    assert len(text.splitlines()) < 60  # a line for each file
    for name, clips in first.items():
        portable = Windows(place, split=name, **SHAPE)
        assert portable.windows == clips.windows
        for one, other in zip(portable, clips, strict=True):
            same(one, other)

    with pytest.raises(
        ValueError, match=r"are of data\.frames=8, not 16: set it so, or keep others$"
    ):
        Windows(place)
    with pytest.raises(ValueError, match=r"are of data\.size=\[16,32\], not \[16, 16\]"):
        Windows(place, **SHAPE | {"size": [16, 16]})
    with pytest.raises(ValueError, match=r"are of data\.train\.loudness=null, not -20"):
        Windows(place, **SHAPE, loudness=-20)
    assert Windows(place, **SHAPE, fit="crop").files
    with pytest.raises(FileNotFoundError, match=r"no kept windows in .*: windows\.json or"):
        Windows(tmp_path)


@pytest.mark.parametrize("experiment", ["folder", "pouring", "landscape", "aist"])
def test_experiments_take_kept_windows(experiment):
    words = [f"exp={experiment}", "data=windows", "data.root=x", "paths.run=run"]
    config = checkpoint.compose(words)
    assert config.data.train._target_.endswith("Windows")
    assert config.data.val.split == "val"
    clips = checkpoint.compose([*words[:1], *words[2:]])
    for key in ("fit", "loudness", "hop"):  # the recipe's, or whatever they are
        assert config.data.train[key] in (None, clips.data.train[key])
    assert clips.data.train.keep is False


SMALLEST = (
    "exp=folder data.frames=4 data.samples=1600 data.sample_rate=4000 'data.size=[8,8]' "
    "data.num_workers=0 data.batch_size=2 data.train.flip=0 model.diffusion.net.channels=16 "
    "'model.diffusion.net.channel_mult=[1,2]' model.diffusion.net.num_res_blocks=1 "
    "'model.diffusion.net.cross_attention_resolutions=[2]' "
    "'model.diffusion.net.cross_attention_windows=[1]' "
    "'model.diffusion.net.video_attention_resolutions=[2]' trainer=cpu logger=csv "
    "callbacks.samples=null trainer.val_check_interval=4 trainer.log_every_n_steps=1"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = Project(tmp_path_factory.mktemp("project"))
    yield made
    made.close()


def losses(project, name):
    (file,) = project.folder.glob(f"runs/{name}/*/metrics.csv")
    header, *rows = [line.split(",") for line in file.read_text().splitlines()]
    column = header.index("train/loss")
    return [row[column] for row in rows if row[column]]


def test_training_is_the_same_with_kept_windows_and_goes_on(project, source, tmp_path):
    begin = f"python train.py {SMALLEST} data.random=false"
    runs = {
        "plain": f"data.root={source} data.train.cache={tmp_path} trainer.max_steps=4",
        "kept": f"data.root={source} data.train.cache={tmp_path} trainer.max_steps=4 "
        "data.train.keep=true",
        "copied": f"data=windows data.root={tmp_path}/copy trainer.max_steps=2",
        "goes_on": f"data=windows data.root={tmp_path}/copy trainer.max_steps=4 ckpt={{ckpt}}",
    }
    found = {}
    for name, words in runs.items():
        ckpt = next(project.folder.glob("runs/copied/*/checkpoints/last.ckpt"), None)
        done = project(f"{begin} name={name} {words.format(ckpt=ckpt)}")
        assert done.status == 0, done.err
        found[name] = losses(project, name)
        if name == "kept":
            shutil.copytree(kept(tmp_path)[0], tmp_path / "copy")
    assert len(found["plain"]) == 4
    assert found["kept"] == found["plain"]
    assert found["copied"] + found["goes_on"] == found["plain"]


WITHOUT = """
import importlib.metadata, runpy, sys
blocked, installed = ("av", "torchvision", "torchaudio", "wandb"), importlib.metadata.distribution
def distribution(name):
    if name in blocked:
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)
importlib.metadata.distribution = distribution
for name in blocked:
    sys.modules[name] = None
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_training_from_a_copied_folder_without_media_packages(project, source, tmp_path):
    settings = {"frames": 4, "samples": 1600, "sample_rate": 4000, "size": [8, 8]}
    Clips(source, **SMALL | settings, cache=tmp_path)
    words = [word for word in shlex.split(SMALLEST) if "callbacks.samples" not in word]
    words += ["data=windows", f"data.root={kept(tmp_path)[0]}", "trainer.max_steps=1"]
    words += ["callbacks.samples.save=[wav,png]", "callbacks.samples.num=1", "name=without"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *words, "sampler.steps=2"],
        cwd=project.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(project.folder.glob("runs/without/*/samples/final/*.wav"))
