import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import frame_numbers, make_media, signal, sound_lag
from torch.utils.data import DataLoader

from avdiffusion import io
from avdiffusion.data.clips import Clips
from avdiffusion.data.index import build_index

SHARED = Path(__file__).parents[3] / "shared" / "data"
SMALL = {"frames": 8, "samples": 12800, "size": (16, 32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve good files in two folders, of several containers and rates."""
    root = tmp_path_factory.mktemp("clips")
    (root / "below").mkdir()
    for k, suffix in enumerate([".mp4", ".mkv", ".avi"] * 4):
        below = "below" if k % 2 else "."
        make_media(root / below / f"clip{k:02}{suffix}", fps=(15, 25, 30)[k % 3], seconds=2 + k / 4)
    (root / "labels.csv").write_text("a,b\n")
    (root / ".hidden.mp4").write_text("not even looked at")
    return root


@pytest.fixture
def bad_folder(tmp_path):
    make_media(tmp_path / "good.mp4", seconds=2)
    make_media(tmp_path / "good too.mkv", seconds=2)
    make_media(tmp_path / "mute.mp4", codecs=("libx264", None))
    make_media(tmp_path / "blind.mp4", codecs=(None, "aac"))
    make_media(tmp_path / "silent.mp4", silent=True)
    make_media(tmp_path / "hollow.mkv", audio_seconds=0)
    make_media(tmp_path / "short.mp4", seconds=0.5)
    (tmp_path / "text.mp4").write_text("no film\n" * 50)
    whole = make_media(tmp_path / "cut.mkv", seconds=4).path.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "notes.txt").write_text("ignored")
    return tmp_path


REASONS = {
    "mute.mp4": "no sound",
    "blind.mp4": "no picture",
    "silent.mp4": "silent from beginning to end",
    "hollow.mkv": "sound stream is empty",
    "short.mp4": "shorter than the window of 0.80 s: 0.",
    "text.mp4": "unreadable: Invalid data found when processing input",
    "cut.mkv": "truncated: 4.0",
}


def test_items(folder):
    clips = Clips(folder, split="all", **SMALL)
    assert len(clips.files) == 12
    assert clips.report.ignored == ["labels.csv"]
    item = clips[3]
    assert item.keys() == {"video", "audio", "index"}
    assert item["video"].shape == (3, 8, 16, 32)
    assert item["video"].dtype == torch.uint8
    assert item["audio"].shape == (1, 12800)
    assert item["audio"].dtype == torch.int16
    again = clips[3]
    assert item["index"] == again["index"] == 3
    assert torch.equal(item["video"], again["video"])
    assert torch.equal(item["audio"], again["audio"])


def test_fixed_windows_divide_every_file_evenly(folder):
    clips = Clips(folder, split="all", **SMALL)
    for number, name in enumerate(clips.files):
        starts = np.array([start for file, start in clips.windows if file == number])
        start, end = io.probe(folder / name).span(("video", "audio"))
        assert len(starts) == (end - start - 0.05) // 0.8
        assert starts[0] >= start
        assert starts[-1] + 0.8 <= end
        assert np.ptp(np.diff(starts)) < 1e-6 if len(starts) > 1 else True
        assert (np.diff(starts) >= 0.8).all()


def test_draws_are_random_windows_keyed_by_the_generator(folder):
    clips = Clips(folder, split="all", flip=0.5, **SMALL)
    number = clips.windows[5][0]
    source = folder / clips.files[number]
    fps, mirrored, starts = io.probe(source).fps, 0, []
    for k in range(24):
        item = clips.draw(5, np.random.default_rng(k))
        video = item["video"].numpy()
        numbers = frame_numbers(video)
        if numbers != sorted(numbers) or numbers[-1] > 4 * fps:  # the bits run the other way
            mirrored += 1
            numbers = frame_numbers(video[..., ::-1])
        starts.append(numbers[0] / fps)
        assert np.abs(np.array(numbers) / fps - starts[-1] - np.arange(8) / 10).max() < 0.05 + 1e-6
        assert abs(sound_lag(item["audio"][0].numpy(), starts[-1], 16000)) < 2e-3
    assert 4 < mirrored < 20
    assert len(set(starts)) > 8
    again = clips.draw(5, np.random.default_rng(3))
    assert torch.equal(again["video"], clips.draw(5, np.random.default_rng(3))["video"])


def test_split_is_by_file_and_stable(folder, tmp_path):
    sides = {split: Clips(folder, split=split, **SMALL).files for split in ("train", "val", "all")}
    assert sorted(sides["train"] + sides["val"]) == sides["all"]
    assert 1 <= len(sides["val"]) <= 5
    half = Clips(folder, split="val", val_fraction=0.5, **SMALL).files
    assert set(sides["val"]) <= set(half)

    for name in "ab":  # two files: one for each side, whatever their hashes
        make_media(tmp_path / f"{name}.mp4", seconds=1)
    for fraction in (0.001, 0.1, 0.999):
        files = [
            Clips(tmp_path, split=s, val_fraction=fraction, **SMALL).files for s in ("train", "val")
        ]
        assert sorted(files[0] + files[1]) == ["a.mp4", "b.mp4"]
        assert len(files[0]) == len(files[1]) == 1
    assert len(Clips(tmp_path, val_fraction=0, **SMALL).files) == 2
    with pytest.raises(ValueError, match=r"none is left for val at val_fraction=0"):
        Clips(tmp_path, split="val", val_fraction=0, **SMALL)


def test_one_modality(folder, tmp_path):
    silent = Clips(folder, split="all", modalities=["video"], **SMALL)
    assert silent[0].keys() == {"video", "index"}
    sound = Clips(folder, split="all", modalities=["audio"], **SMALL)
    assert sound[0].keys() == {"audio", "index"}

    t = np.arange(32000) / 16000
    for k in range(3):
        io.write_wav(tmp_path / f"{k}.wav", np.stack([signal(t), 0 * t]), sample_rate=16000)
    waves = Clips(tmp_path, split="all", modalities=["audio"], samples=12800, channels=2)
    item = waves.draw(0, np.random.default_rng(0))
    assert item["audio"].shape == (2, 12800)
    assert item["audio"][0].abs().max() > 0.3
    assert item["audio"][1].abs().max() == 0  # without a picture nothing is mirrored
    with pytest.raises(ValueError, match=r"3 of 3 files .* cannot be used: 0\.wav \(no picture\)"):
        Clips(tmp_path)


def test_mirrored_stereo_changes_sides(tmp_path):
    video = np.zeros((3, 10, 32, 32), np.uint8)
    video[:, :, :, :16] = 250
    sound = np.stack([signal(np.arange(16000) / 16000), np.zeros(16000)])
    io.write_mp4(tmp_path / "left.mp4", video, sound, fps=10, sample_rate=16000)
    clips = Clips(tmp_path, split="all", channels=2, flip=1, **SMALL | {"size": (32, 32)})
    for item, side in ((clips[0], 0), (clips.draw(0, np.random.default_rng(0)), 1)):
        bright = item["video"].float().mean((0, 1, 2))
        assert (bright[:12].mean() > bright[20:].mean()) == (side == 0)
        assert item["audio"][side].abs().max() > 10 * item["audio"][1 - side].abs().max()


def test_loudness(tmp_path):
    t = np.arange(16000) / 16000
    levels = {"quiet": 1e-2, "faint": 2e-4, "loud": 0.9}
    for name, level in levels.items():
        io.write_wav(
            tmp_path / f"{name}.wav", level * np.sin(2000 * t)[None] + 0 * t, sample_rate=16000
        )
    read = {"split": "all", "modalities": ["audio"], "samples": 8000}
    clips = Clips(tmp_path, loudness=-20, **read)
    gains = {}
    for (file, _), item in zip(clips.windows, clips, strict=True):
        name = clips.files[file].removesuffix(".wav")
        gains[name] = (item["audio"] / 32768).square().mean().sqrt().item() * 2**0.5 / levels[name]
    assert gains["quiet"] == pytest.approx(10 ** (-20 / 20) * 2**0.5 / 1e-2, rel=0.02)
    assert gains["faint"] == pytest.approx(10 ** (30 / 20), rel=0.1)  # no more than 30 dB
    full = Clips(tmp_path, loudness=3, **read)
    peaks = {
        full.files[n]: int(full[i]["audio"].int().abs().max())
        for i, (n, _) in enumerate(full.windows)
    }
    assert 32766 <= peaks["loud.wav"] <= 32768  # full scale, and no further
    assert peaks["faint.wav"] < 300


def test_sound_is_the_nearest_level_after_its_gain(tmp_path):
    wave = 0.3 * np.sin(0.05 * np.arange(8000))[None]
    io.write_wav(tmp_path / "a.wav", wave, sample_rate=16000)
    read = {"split": "all", "modalities": ["audio"], "samples": 8000}
    plain = Clips(tmp_path, **read)[0]["audio"].numpy()
    assert (
        plain == np.round(np.float32(wave) * 32768)
    ).all()  # what 16-bit PCM holds comes as it is
    stored = io.read_window(
        tmp_path / "a.wav", 0, sample_rate=16000, samples=8000, modalities=["audio"]
    )["audio"]
    gain = 10 ** (-6 / 20) / np.sqrt(np.mean(np.square(stored.astype(np.float64))))
    levelled = Clips(tmp_path, loudness=-6, **read)[0]["audio"].numpy()
    gain = min(gain, 1 / np.abs(stored).max())
    assert np.abs(levelled - gain * stored.astype(np.float64) * 32768).max() < 0.51


def test_bad_files_are_refused_in_one_line(bad_folder):
    with pytest.raises(ValueError, match="cannot be used") as caught:
        Clips(bad_folder, **SMALL)
    message = str(caught.value)
    assert message.count("\n") == 0
    assert f"7 of 9 files in {bad_folder} cannot be used: blind.mp4 (no picture), " in message
    assert "and 4 more; data.train.on_bad=skip leaves them out (" in message


def test_bad_files_are_skipped_and_reported(bad_folder, caplog):
    with caplog.at_level(logging.INFO):
        clips = Clips(bad_folder, on_bad="skip", split="all", **SMALL)
    assert clips.files == ["good too.mkv", "good.mp4"]
    found = dict(clips.report.bad)
    assert found.keys() == REASONS.keys()
    for name, reason in REASONS.items():
        assert found[name].startswith(reason), name
    assert str(clips.report).startswith(f"{bad_folder}: 2 files used, 1 left out (")
    assert str(clips.report) in caplog.text
    # what is bad depends on what is asked for
    seen = Clips(bad_folder, on_bad="skip", split="all", modalities=["video"], **SMALL).files
    assert {"mute.mp4", "silent.mp4", "hollow.mkv"} < set(seen)


def test_nothing_to_use(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no folder: .*missing"):
        Clips(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no audio or video files in"):
        Clips(tmp_path)
    (tmp_path / "a.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"no audio or video files in .* \(1 other file"):
        Clips(tmp_path)
    for name in "abcd":
        make_media(tmp_path / f"{name}.mp4", seconds=1, silent=True)
    for on_bad in ("error", "skip"):
        with pytest.raises(ValueError, match=r"4 of 4 .*\(silent .*and 1 more$"):
            Clips(tmp_path, on_bad=on_bad, **SMALL)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 16000}, r"16 frames at 10 fps last 1\.6000 s, 16000 .* 1\.0000 s: 25600"),
        ({"split": "test"}, "split is one of train, val, all, not test"),
        ({"channels": 3}, "channels is one of 1, 2, not 3"),
        ({"on_bad": "replace"}, "on_bad is one of error, skip, not replace"),
        ({"fit": "stretch"}, "fit is one of"),
        ({"modalities": ["smell"]}, "modalities is one of"),
        ({"modalities": []}, "modalities is one of"),
    ],
)
def test_wrong_settings(folder, wrong, message):
    with pytest.raises(ValueError, match=message):
        Clips(folder, **wrong)


def break_file(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 10 :] = bytes(len(data) - len(data) // 10)
    path.write_bytes(data)


def test_a_file_that_breaks_later(tmp_path, caplog):
    for name in ("a", "b", "c"):
        make_media(tmp_path / f"{name}.mkv", seconds=2)
    strict = Clips(tmp_path, split="all", **SMALL)
    lenient = Clips(tmp_path, split="all", on_bad="skip", **SMALL)
    assert len(lenient) == 6
    break_file(tmp_path / "a.mkv")
    (tmp_path / "b.mkv").unlink()
    with pytest.raises(io.MediaError, match=r"a\.mkv: "):
        strict[0]
    with pytest.raises(FileNotFoundError, match=r"b\.mkv"):
        strict[2]
    assert lenient[0]["index"] == 4  # says which window it is
    for k in range(6):
        assert lenient.draw(k, np.random.default_rng(k))["index"] in (4, 5)
    assert [name for name, _ in lenient.report.bad] == ["a.mkv", "b.mkv"]
    assert lenient.report.used == 1
    assert caplog.text.count("a.mkv: ") == 1
    (tmp_path / "c.mkv").unlink()
    with pytest.raises(io.MediaError, match="unreadable"):
        lenient[4]
    with pytest.raises(io.MediaError, match="unreadable"):
        lenient.draw(4, np.random.default_rng(0))


def test_workers_tell_what_broke(tmp_path):
    for name in ("a", "b"):
        make_media(tmp_path / f"{name}.mkv", seconds=2)
    clips = Clips(tmp_path, split="all", on_bad="skip", **SMALL)
    break_file(tmp_path / "a.mkv")
    batches = list(DataLoader(clips, batch_size=2, num_workers=1))
    assert [batch["index"].tolist() for batch in batches] == [[2, 2], [2, 3]]
    assert [name for name, _ in clips.report.bad] == ["a.mkv"]
    assert pickle.loads(pickle.dumps(clips)).files == ["a.mkv", "b.mkv"]


def test_index_is_kept_and_renewed(folder, tmp_path, monkeypatch):
    probed = []
    monkeypatch.setattr(
        "avdiffusion.data.index.probe", lambda path: probed.append(path.name) or io.probe(path)
    )
    root, cache = tmp_path / "clips", tmp_path / "cache"
    root.mkdir()
    for name in "abc":
        make_media(root / f"{name}.mp4", seconds=1)
    first = build_index(root, cache=cache)
    assert sorted(probed) == ["a.mp4", "b.mp4", "c.mp4"]
    assert build_index(root, cache=cache) == first
    assert len(probed) == 3

    make_media(root / "b.mp4", seconds=1.5)
    (root / "c.mp4").unlink()
    (root / "d.mp4").write_text("bad")
    second = build_index(root, cache=cache)
    assert sorted(probed[3:]) == ["b.mp4", "d.mp4"]
    assert [entry.path for entry in second.entries] == ["a.mp4", "b.mp4", "d.mp4"]
    assert second.entries[1].info.video_end == pytest.approx(1.5, abs=0.05)
    os.utime(root / "a.mp4", ns=(0, 1))
    build_index(root, cache=cache)
    assert probed[5:] == ["a.mp4"]

    (store,) = cache.iterdir()  # and no temporary file
    for damage in ("{", json.dumps({"version": 0}), json.dumps({"version": 1, "entries": [{}]})):
        store.write_text(damage)
        assert len(build_index(root, cache=cache).entries) == 3


def test_index_lies_in_the_users_cache(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build_index(folder)
    assert [p.name[:6] for p in (tmp_path / "avdiffusion").iterdir()] == ["index-"]
    (tmp_path / "file").touch()
    assert len(build_index(folder, cache=tmp_path / "file").entries) == 12
    assert "the index is not kept" in caplog.text


def test_index_follows_links_once(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    (tmp_path / "link2").symlink_to(tmp_path, target_is_directory=True)
    assert len(build_index(tmp_path).entries) == 12


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="the shared clips are not here")
def test_varied_real_clips():
    clips = Clips(SHARED / "clips", split="all")
    assert len(clips.files) == 73
    assert not clips.report.bad
    first = {number: i for i, (number, _) in reversed(list(enumerate(clips.windows)))}
    for number in range(73):
        item = clips[first[number]]
        assert item["video"].shape == (3, 16, 64, 64)
        assert item["audio"].shape == (1, 25600)
        assert item["video"].float().std() > 1
