"""A folder of samples: complete, resumable, and of one kind."""

import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from media_files import make_media
from PIL import Image

from avdiffusion import io
from avdiffusion.writer import Behind, ClipWriter, Kept, pixels

av = pytest.importorskip("av")
RATES = {"video": 10.0, "audio": 8000.0}


def media(count=2, seed=0, loud=0.5):
    rng = torch.Generator().manual_seed(seed)
    video = torch.rand(count, 3, 8, 16, 16, generator=rng) * 2 - 1
    return {"video": video, "audio": loud * torch.randn(count, 1, 6400, generator=rng).clamp(-2, 2)}


def writer(out, seed=0, **options):
    return ClipWriter(out, rates=RATES, settings={"checkpoint": "abc", "seed": seed}, **options)


def test_writes_every_format(tmp_path):
    save = ("mp4", "webm", "gif", "wav", "png")
    w = writer(tmp_path, save=save)
    w.add([0, 7], media())
    page = w.finish(scores={"f1": {"generated": 0.5, "mismatched": 0.1, "real": float("nan")}})
    clips = {f"{i:06d}.{kind}" for i in (0, 7) for kind in save}
    files = {"samples.json", "contact.png", "gallery.html"}
    assert {f.name for f in tmp_path.iterdir()} == clips | files
    with av.open(tmp_path / "000007.mp4") as file:
        assert file.streams.video[0].average_rate == 10
        assert len(file.streams.audio) == 1
    assert Image.open(tmp_path / "contact.png").width > 400
    assert page.read_text().count("data:video/mp4") == 2
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["settings"] == {"checkpoint": "abc", "seed": 0}
    assert record["rates"] == {"video": 10, "audio": 8000}
    assert record["scores"]["f1"] == {"generated": 0.5, "mismatched": 0.1, "real": None}
    assert [s["index"] for s in record["samples"]] == [0, 7]
    assert set(record["samples"][1]["files"]) == {f for f in clips if f.startswith("000007")}


def test_pixels_are_rounded_and_clipped():
    levels = torch.arange(256).float() / 127.5 - 1
    assert pixels(levels).tolist() == list(range(256))
    assert pixels(levels + 0.45 / 127.5).tolist() == list(range(256))
    assert pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_not_a_number_becomes_grey_and_silent(tmp_path):
    clips = {name: torch.full_like(value, float("nan")) for name, value in media(1).items()}
    w = writer(tmp_path)
    w.add([0], clips)
    w.finish()
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["clipped"] == {"audio": 1.0, "video": 1.0}


def test_share_of_clipped_values_is_recorded(tmp_path):
    clips = media()
    clips["audio"] = torch.zeros_like(clips["audio"])
    clips["audio"][0, 0, :1600] = 2.0
    w = writer(tmp_path)
    w.add([0, 1], clips)
    w.finish()
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["samples"][0]["clipped"] == {"video": 0.0, "audio": 0.25}
    assert record["clipped"] == {"audio": 0.125, "video": 0.0}
    with av.open(tmp_path / "000000.wav") as file:
        wave = np.concatenate([f.to_ndarray() for f in file.decode(audio=0)], 1)
    assert wave.max() == 32767


def test_finished_samples_are_skipped(tmp_path):
    w = writer(tmp_path)
    assert w.missing(range(4)) == [0, 1, 2, 3]
    w.add([0, 1], media())
    before = (tmp_path / "000000.mp4").stat().st_mtime_ns
    again = writer(tmp_path)
    assert again.missing(range(4)) == [2, 3]
    (tmp_path / "000001.wav").unlink()
    assert writer(tmp_path).missing(range(4)) == [1, 2, 3]
    again = writer(tmp_path, save=("mp4", "gif"))
    assert again.missing([0]) == [0]
    again = writer(tmp_path)
    again.add([1, 2], media())
    again.finish()
    assert (tmp_path / "000000.mp4").stat().st_mtime_ns == before
    record = json.loads((tmp_path / "samples.json").read_text())
    assert [s["index"] for s in record["samples"]] == [0, 1, 2]
    assert (tmp_path / "gallery.html").read_text().count("data:video/mp4") == 3


def test_other_settings_are_refused_and_replaced_on_demand(tmp_path):
    writer(tmp_path).add([0, 1], media())
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here.*out=.*overwrite=true"):
        writer(tmp_path, seed=1)
    assert len(list(tmp_path.glob("*.mp4"))) == 2
    (tmp_path / "mine.txt").write_text("notes")
    w = writer(tmp_path, seed=1, overwrite=True)
    assert w.missing([0, 1]) == [0, 1]
    assert {f.name for f in tmp_path.iterdir()} == {"mine.txt", "samples.json"}
    w.add([0], media(1))
    (tmp_path / "samples.json").unlink()
    with pytest.raises(ValueError, match=r"unknown settings"):
        writer(tmp_path, seed=1)


def test_scores_stay_until_samples_are_added(tmp_path):
    w = writer(tmp_path)
    w.add([0], media(1))
    w.finish(scores={"avcorr": {"generated": 0.25}})
    assert "0.250" in writer(tmp_path).finish().read_text()
    w = writer(tmp_path)
    w.add([1], media(1))
    assert "0.250" not in w.finish().read_text()


def test_info_may_differ(tmp_path):
    writer(tmp_path, info={"path": "a"}).add([0], media(1))
    assert writer(tmp_path, info={"path": "b"}).missing([0]) == []


def test_a_modality_may_be_missing(tmp_path):
    clips = media()
    rates = {"audio": 8000}
    w = ClipWriter(tmp_path / "a", rates=rates, settings={"seed": 0})
    w.add([0, 1], {"audio": clips["audio"]})
    w.finish()
    assert (tmp_path / "a" / "000001.wav").is_file()
    assert not list((tmp_path / "a").glob("*.mp4"))
    w = ClipWriter(tmp_path / "v", rates={"video": 10}, settings={"seed": 0})
    w.add([0, 1], {"video": clips["video"]})
    assert "data:video/mp4" in w.finish().read_text()
    with pytest.raises(ValueError, match="nothing to write"):
        ClipWriter(tmp_path / "n", rates=rates, settings={}, save=["mp4"])
    with pytest.raises(ValueError, match="avi"):
        ClipWriter(tmp_path / "n", rates=RATES, settings={}, save=["avi"])


def packets(path, kind):
    with av.open(str(path)) as file:
        stream = file.streams.best(kind)
        return [bytes(packet) for packet in file.demux(stream) if packet.size]


def record(folder):
    return json.loads((folder / "samples.json").read_text())["samples"]


def test_a_kept_picture_is_the_files_own(tmp_path):
    source = make_media(tmp_path / "clip.mp4", fps=25, seconds=0.8, size=(48, 96)).path
    kept = Kept(source, 0.0, 0.8, {"video": [(0.0, 0.8)]}, ("video",))
    w = writer(tmp_path / "out", save=("mp4", "webm", "wav", "png"))
    w.add([0, 1], media(), [kept, None])
    w.finish()
    assert packets(tmp_path / "out" / "000000.mp4", "video") == packets(source, "video")
    sizes = {}
    for name in ("000000.mp4", "000000.webm", "000001.mp4"):
        info = io.probe(tmp_path / "out" / name)
        sizes[name] = (info.height, info.width, info.fps)
        assert info.audio_end == pytest.approx(0.8, abs=0.01)
    assert sizes["000000.mp4"] == (48, 96, 25)
    for name in ("000000.webm", "000001.mp4"):
        assert sizes[name] == (16, 16, 10)
    with av.open(tmp_path / "out" / "000000.wav") as file:
        assert file.streams.audio[0].codec_context.sample_rate == 8000
    first, second = record(tmp_path / "out")
    known = {"video": [[0.0, 0.8]]}
    assert first["given"] == {"file": str(source), "known": known, "kept": {"video": "copied"}}
    assert "given" not in second


def test_a_kept_sound_is_the_files_own(tmp_path):
    levels = np.random.default_rng(0).integers(-20000, 20000, (2, 66150))
    source = io.write_wav(tmp_path / "a.wav", levels / 32768, sample_rate=44100)
    kept = Kept(source, 0.5, 0.8, {"audio": [(0.0, 0.8)]}, ("audio",))
    w = writer(tmp_path / "out")
    w.add([0], media(1), [kept])
    info = io.probe(tmp_path / "out" / "000000.mp4")
    assert (info.height, info.fps, info.sample_rate, info.channels) == (16, 10, 44100, 2)
    assert info.video_end == info.audio_end == pytest.approx(0.8, abs=1e-3)
    with av.open(tmp_path / "out" / "000000.wav") as file:
        sound = np.concatenate([f.to_ndarray() for f in file.decode(audio=0)], 1)
    assert sound.reshape(-1, 2).T.tolist() == levels[:, 22050 : 22050 + 35280].tolist()
    assert record(tmp_path / "out")[0]["given"]["kept"] == {"audio": "encoded"}


def test_a_part_that_was_given_is_recorded_and_stays_recorded(tmp_path):
    source = make_media(tmp_path / "clip.mp4", seconds=0.8).path
    kept = Kept(source, 0.0, 0.8, {"audio": [(0.0, 0.4)]})
    writer(tmp_path / "out").add([3], media(1), [kept])
    assert io.probe(tmp_path / "out" / "000003.mp4").sample_rate == 8000
    row = record(tmp_path / "out")[0]
    assert row["given"] == {"file": str(source), "known": {"audio": [[0.0, 0.4]]}}
    again = writer(tmp_path / "out")
    assert again.missing([3]) == []
    again.finish()
    assert record(tmp_path / "out") == [row]


def test_clips_of_different_lengths_share_a_folder(tmp_path):
    w = writer(tmp_path)
    for index, frames in enumerate((8, 30, 200)):
        video, audio = torch.zeros(3, frames, 16, 16), torch.zeros(1, frames * 800)
        w.add([index], {"video": [video], "audio": [audio]})
    page = w.finish().read_text()
    assert page.count("data:video/mp4") == 3
    ends = [io.probe(tmp_path / f"00000{i}.mp4").audio_end for i in range(3)]
    assert ends == pytest.approx([0.8, 3, 20], abs=1e-3)
    assert Image.open(tmp_path / "contact.png").height > 3 * 150


KILLED = """
import os, sys, torch
from avdiffusion.writer import ClipWriter
w = ClipWriter(sys.argv[1], rates={"video": 10.0, "audio": 8000.0}, settings={"seed": 0})
left, replace = int(sys.argv[2]), os.replace
def dying(a, b):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    replace(a, b)
os.replace = dying
torch.manual_seed(0)
for i in range(3):
    w.add([i], {"video": torch.rand(1, 3, 8, 16, 16), "audio": torch.rand(1, 1, 6400)})
"""


@pytest.mark.parametrize(
    ("after", "whole"),
    [(0, []), (5, ["000000.mp4", "000000.png", "000000.wav", "000001.mp4"])],
)
def test_killed_in_the_middle_leaves_no_partial_file(tmp_path, after, whole):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(after)]
    assert subprocess.run(command, check=False).returncode == 9
    names = sorted(f.name for f in tmp_path.iterdir() if not f.name.startswith("."))
    assert names == [*whole, "samples.json"]
    for name in names:
        if name.endswith((".mp4", ".wav")):
            with av.open(tmp_path / name) as file:
                assert len(list(file.decode(audio=0))) > 0
    w = ClipWriter(tmp_path, rates=RATES, settings={"seed": 0})
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    assert w.missing(range(3)) == ([0, 1, 2] if after == 0 else [1, 2])


# ---------------------------------------------------------------------------- the seed's folders


def cascade(count=2):
    """What two stages make: the last one's media and the first one's."""
    base = media(count)
    video = base["video"].repeat_interleave(4, 3).repeat_interleave(4, 4)
    return {"video": video, "audio": base["audio"]}, base


def tree(folder):
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def seed_files(index, frames=8, stages=2):
    names = {f"original/{index:06d}.mp4", f"audios/{index:06d}.wav"}
    names |= {f"sr_mp4/{index:06d}.mp4"} if stages == 2 else set()
    return names | {f"img/{index:06d}/{k:08d}.png" for k in range(frames)}


PAGES = {"samples.json", "contact.png", "gallery.html"}


def test_the_seeds_layout_has_what_both_stages_made(tmp_path):
    final, base = cascade()
    w = writer(tmp_path, layout="seed", stages=2)
    w.add([0, 7], final, None, base)
    page = w.finish()
    assert tree(tmp_path) == seed_files(0) | seed_files(7) | PAGES
    assert {f.name for f in tmp_path.iterdir() if f.is_dir()} == {
        "original",
        "sr_mp4",
        "audios",
        "img",
    }
    for folder, size in (("original", 16), ("sr_mp4", 64)):
        info = io.probe(tmp_path / folder / "000007.mp4")
        assert (info.height, info.width, info.fps, info.sample_rate) == (size, size, 10, 8000)
        assert info.audio_end == pytest.approx(0.8, abs=1e-3)
    files = sorted((tmp_path / "img" / "000007").iterdir())
    frames = np.stack([np.asarray(Image.open(file)) for file in files])
    assert (frames.transpose(3, 0, 1, 2) == pixels(base["video"][1])).all()
    first, second = record(tmp_path)
    assert first["files"] == [
        "original/000000.mp4",
        "sr_mp4/000000.mp4",
        "audios/000000.wav",
        "img/000000",
    ]
    assert second["index"] == 7
    players = [entry.clip for entry in w.entries()]
    assert players == [tmp_path / "sr_mp4" / name for name in ("000000.mp4", "000007.mp4")]
    assert page.read_text().count("data:video/mp4") == 2


@pytest.mark.parametrize(
    ("modality", "folders"),
    [(None, {"original", "audios", "img"}), ("video", {"original", "img"}), ("audio", {"audios"})],
)
def test_the_seeds_layout_of_one_stage(tmp_path, modality, folders):
    clips = {name: value for name, value in media(1).items() if modality in (None, name)}
    w = ClipWriter(
        tmp_path, rates={name: RATES[name] for name in clips}, settings={}, layout="seed"
    )
    w.add([3], clips)
    w.finish()
    wanted = {name for name in seed_files(3, stages=1) if name.split("/")[0] in folders}
    assert tree(tmp_path) == wanted | PAGES


def test_the_flat_layout_has_the_last_stage_alone(tmp_path):
    final, base = cascade(1)
    writer(tmp_path, stages=2).add([0], final, None, base)
    assert tree(tmp_path) == {"000000.mp4", "000000.wav", "000000.png", "samples.json"}
    assert io.probe(tmp_path / "000000.mp4").height == 64


@pytest.mark.parametrize(
    "gone", ["original/000001.mp4", "sr_mp4/000001.mp4", "audios/000001.wav", "img/000001"]
)
def test_a_sample_of_the_seeds_layout_is_done_when_all_is_there(tmp_path, gone):
    final, base = cascade()
    options = {"layout": "seed", "stages": 2}
    writer(tmp_path, **options).add([0, 1], final, None, base)
    assert writer(tmp_path, **options).missing(range(3)) == [2]
    path = tmp_path / gone
    path.rename(tmp_path / "elsewhere")
    w = writer(tmp_path, **options)
    assert w.missing(range(3)) == [1, 2]
    w.add([1], {n: v[1:] for n, v in final.items()}, None, {n: v[1:] for n, v in base.items()})
    assert w.missing(range(2)) == []
    assert [row["index"] for row in record(tmp_path)] == [0, 1]


def test_frames_appear_when_all_are_there_and_take_the_place_of_others(tmp_path, monkeypatch):
    final, base = cascade(1)
    w = writer(tmp_path, layout="seed", stages=2, save=["png"])
    w.add([0], final, None, base)
    w.add([0], final, None, {"video": -base["video"][:, :, :5]})
    assert tree(tmp_path) == {*(f"img/000000/{k:08d}.png" for k in range(5)), "samples.json"}
    shown = np.asarray(Image.open(tmp_path / "img/000000/00000000.png"))
    assert (shown.transpose(2, 0, 1) == pixels(-base["video"][0, :, 0])).all()

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="disk full"):
        w.add([1], final, None, base)
    assert [f.name for f in (tmp_path / "img").iterdir()] == ["000000"]


def test_one_folder_holds_one_layout_and_is_emptied_of_both(tmp_path):
    final, base = cascade(1)
    w = writer(tmp_path, layout="seed", stages=2)
    w.add([0], final, None, base)
    w.finish()
    (tmp_path / "img" / ".000001.9.part").mkdir()
    (tmp_path / "sr_mp4" / ".000001.9.part.mp4").touch()
    (tmp_path / "img" / "mine.txt").write_text("notes")
    with pytest.raises(ValueError, match=r'layout: "seed" there, "flat" here.*overwrite=true'):
        writer(tmp_path)
    assert tree(tmp_path) == seed_files(0) | PAGES | {"img/mine.txt"}
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here"):
        writer(tmp_path, seed=1, layout="seed", stages=2)
    w = writer(tmp_path, overwrite=True)
    assert {f.name for f in tmp_path.iterdir()} == {"img", "samples.json"}
    assert tree(tmp_path / "img") == {"mine.txt"}
    w.add([0], media(1))
    (tmp_path / "samples.json").unlink()
    with pytest.raises(ValueError, match="unknown settings"):
        writer(tmp_path, layout="seed")


def test_layouts_say_what_they_lack(tmp_path):
    with pytest.raises(ValueError, match="layout=tree is none of flat, seed"):
        writer(tmp_path, layout="tree")
    with pytest.raises(ValueError, match="'gif' is none of mp4, wav, png, which layout=seed has"):
        writer(tmp_path, layout="seed", save=["mp4", "gif"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["flat", "seed"])
def test_a_kept_sound_goes_with_every_stage(tmp_path, layout):
    source = make_media(tmp_path / "clip.mp4", seconds=0.8, channels=2).path
    kept = Kept(source, 0.0, 0.8, {"audio": [(0.0, 0.8)]}, ("audio",))
    final, base = cascade()
    w = writer(tmp_path / "out", layout=layout, stages=2)
    w.add([0, 1], final, [kept, None], base)
    folders = {"flat": {".": 64}, "seed": {"original": 16, "sr_mp4": 64}}[layout]
    for folder, size in folders.items():
        info = io.probe(tmp_path / "out" / folder / "000000.mp4")
        assert (info.height, info.sample_rate, info.channels) == (size, 44100, 2)
        own = packets(tmp_path / "out" / folder / "000000.mp4", "audio")
        assert own == packets(source, "audio")[: len(own)]
        assert io.probe(tmp_path / "out" / folder / "000001.mp4").sample_rate == 8000
    wav = tmp_path / "out" / {"flat": ".", "seed": "audios"}[layout] / "000000.wav"
    assert io.probe(wav).sample_rate == 44100
    assert record(tmp_path / "out")[0]["given"]["kept"] == {"audio": "copied"}


# ---------------------------------------------------------------------------------- in a thread


def test_calls_are_made_behind_in_their_order_and_no_more_than_bound():
    begun, go, done = threading.Semaphore(0), threading.Semaphore(0), []

    def slow(number):
        begun.release()
        assert go.acquire(timeout=60)
        done.append((number, threading.current_thread()))

    with Behind(slow, most=2) as behind:
        behind(0)
        behind(1)
        assert begun.acquire(timeout=60)
        assert done == []
        third = threading.Thread(target=behind, args=(2,))
        third.start()
        third.join(0.05)
        assert third.is_alive()  # two are waiting
        go.release(3)
        third.join(60)
        assert not third.is_alive()
    assert [number for number, _ in done] == [0, 1, 2]
    assert threading.current_thread() not in {thread for _, thread in done}
    assert not any(thread.is_alive() for _, thread in done)


@pytest.mark.parametrize("where", ["check", "call", "end"])
def test_what_fails_behind_is_raised_in_front(where):
    def fail(number):
        raise OSError(f"disk full at {number}")

    def front():
        with Behind(fail) as behind:
            behind(0)
            end = time.monotonic() + 60
            while where != "end":
                assert time.monotonic() < end
                behind.check() if where == "check" else behind(1)

    with pytest.raises(OSError, match="disk full at 0"):
        front()


def test_after_an_error_in_front_what_has_begun_is_ended_and_nothing_else_begun():
    begun, go, done = threading.Event(), threading.Event(), []

    def slow(number):
        begun.set()
        assert go.wait(60)
        done.append(number)

    def front():
        with Behind(slow) as behind:
            behind(0)
            behind(1)
            assert begun.wait(60)
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        front()
    assert done == [0]
