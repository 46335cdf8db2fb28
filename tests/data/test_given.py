"""Given parts of clips: which steps they are, what they hold, and what cannot be given."""

import numpy as np
import pytest
import torch
from media_files import frame_numbers, make_media, signal, sound_lag

from avdiffusion import io
from avdiffusion.data import given as module
from avdiffusion.data.given import Given

SHAPES = {"video": [3, 16, 24, 48], "audio": [1, 6400]}
RATES = {"video": 10.0, "audio": 4000.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def give(path, known, seconds=None, shapes=SHAPES, rates=RATES):
    return Given(path, known=known, shapes=shapes, rates=rates, seconds=seconds)


def clip(path, **options):
    """2.5 s of picture and sound."""
    return make_media(path, **{"seconds": 2.5, "channels": 2, "sample_rate": 44100} | options)


def numbers(video):
    return np.array(frame_numbers(((video + 1) * 127.5).round().byte().numpy()))


def check_sound(audio, start, rate=4000):
    """Float [L] is the sound of that time."""
    lag = sound_lag(audio, start, rate)
    assert abs(lag) < 2e-3
    wanted = signal(start - lag + np.arange(len(audio)) / rate)
    assert np.corrcoef(audio, wanted)[0, 1] > 0.9


def spans(mask):
    """Ranges of True."""
    edges = np.flatnonzero(np.diff(np.pad(mask.numpy().astype(int), 1)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
def test_a_whole_modality(tmp_path, suffix):
    rate = 48000 if suffix == ".webm" else 44100
    media = clip(tmp_path / f"clip{suffix}", sample_rate=rate)
    item = give(media.path, ["audio"])[0]
    assert (item.path, item.start, item.seconds) == (media.path, 0.0, 1.6)
    assert item.steps == {"video": 16, "audio": 6400}
    assert item.whole == ("audio",)
    assert item.known == {"audio": [(0.0, 1.6)]}
    assert item.values["video"].shape == (3, 16, 24, 48)
    assert item.values["audio"].shape == (1, 6400)
    assert {v.dtype for v in item.values.values()} == {torch.float32}
    assert {m.dtype for m in item.mask.values()} == {torch.bool}
    assert item.mask["audio"].all()
    assert not item.mask["video"].any()
    assert not item.values["video"].any()
    check_sound(item.values["audio"][0].numpy(), 0.0)

    item = give(media.path, "video")[0]
    assert item.whole == ("video",)
    assert not item.values["audio"].any()
    assert item.values["video"].min() < -0.85
    assert item.values["video"].max() > 0.75
    wanted = np.abs(media.frame_times - np.arange(16)[:, None] / 10).min(1)
    found = np.abs(media.frame_times[numbers(item.values["video"])] - np.arange(16) / 10)
    assert found == pytest.approx(wanted, abs=2e-3)


def test_variable_frame_rate(tmp_path):
    times = np.cumsum([0.0] + [0.02, 0.05, 0.033, 0.1, 0.04, 0.02, 0.02, 0.067] * 6)
    media = clip(tmp_path / "clip.mp4", frame_times=times)
    item = give(media.path, {"video": [0.4, 1.2]})[0]
    found = times[numbers(item.values["video"][:, 4:12])]
    wanted = np.arange(4, 12) / 10
    assert np.abs(found - wanted) == pytest.approx(np.abs(times - wanted[:, None]).min(1), abs=2e-3)


def test_ranges_hold_what_the_whole_holds(tmp_path):
    path = clip(tmp_path / "clip.mp4", fps=24).path
    ranges = {"video": [[1.2, 1.6], [0, 0.4]], "audio": [0.8, None]}
    item = give(path, ranges)[0]
    assert spans(item.mask["video"]) == [(0, 4), (12, 16)]
    assert spans(item.mask["audio"]) == [(3200, 6400)]
    assert item.whole == ()
    assert item.known == {"video": [(0.0, 0.4), (1.2, 1.6)], "audio": [(0.8, 1.6)]}
    for modality in ranges:
        whole = give(path, [modality])[0].values[modality]
        known = item.mask[modality]
        error = (item.values[modality] - whole)[:, known].abs()
        assert error.max() < (1e-6 if modality == "video" else 2e-2)  # half a source sample
        assert not item.values[modality][:, ~known].any()


def test_touching_ranges_are_whole(tmp_path):
    path = clip(tmp_path / "clip.mp4").path
    assert give(path, {"audio": [[0, 0.7], [0.7, 1.6]]})[0].whole == ("audio",)


def test_continuing_past_the_end(tmp_path):
    path = clip(tmp_path / "clip.mp4", seconds=1.6).path
    for known in (["audio", "video"], {"audio": [0, None], "video": [[0, None]]}):
        item = give(path, known, seconds=10)[0]
        assert item.seconds == 10
        assert item.steps == {"video": 100, "audio": 40000}
        assert item.whole == ()
        assert spans(item.mask["video"]) == [(0, 16)]
        ((first, last),) = spans(item.mask["audio"])
        assert first == 0
        assert last == pytest.approx(6400, abs=200)
        assert numbers(item.values["video"][:, :16])[-1] == pytest.approx(37, abs=1)
        check_sound(item.values["audio"][0, :6400].numpy(), 0.0)
        assert not item.values["audio"][:, last:].any()


def test_as_long_as_what_is_given(tmp_path):
    clip(tmp_path / "a.mp4", seconds=2.5)
    clip(tmp_path / "b.mp4", seconds=3.72)
    clip(tmp_path / "c.wav", seconds=1.97, codecs=(None, "pcm_s16le"))
    found = give(tmp_path, ["audio"], seconds="given")
    assert [found.steps(i)["video"] for i in range(4)] == [25, 37, 20, 25]
    for i in range(3):
        item = found[i]
        assert item.steps == found.steps(i)
        assert item.whole == ("audio",)
        assert item.values["audio"].shape[1] == item.steps["video"] * 400
        assert item.seconds == pytest.approx(item.steps["video"] / 10)
    assert not found[2].values["audio"][:, -100:].any()  # 1.97 s are given as 2.0: silence
    assert found[2].values["audio"][:, -150:].any()


def test_lengths_of_rates_that_do_not_divide(tmp_path):
    path = clip(tmp_path / "clip.mp4").path
    shapes, rates = {"video": [3, 11, 8, 8], "audio": [2, 7567]}, {"video": 16, "audio": 11007}
    assert give(path, ["audio"], shapes=shapes, rates=rates)[0].steps["audio"] == 7567
    item = give(path, ["audio"], 1.3, shapes, rates)[0]
    assert item.steps == {"video": 21, "audio": round(21 / 16 * 11007)}
    assert item.values["audio"].shape == (2, 14447)


def test_streams_that_begin_late_are_given_from_where_all_are(tmp_path):
    path = clip(tmp_path / "clip.mp4", video_start=0.2, audio_start=0.52, seconds=3).path
    info = io.probe(path)
    item = give(path, {"video": [0, 0.4], "audio": [0, None]})[0]
    assert item.start == info.audio_start == pytest.approx(0.52, abs=0.025)
    check_sound(item.values["audio"][0].numpy(), item.start)
    shown = numbers(item.values["video"][:, :4]) / 25 + 0.2
    assert shown == pytest.approx(item.start + np.arange(4) / 10, abs=0.021)
    assert give(path, ["video"])[0].start == pytest.approx(0.2)


def test_one_modality_files_and_models(tmp_path):
    wave = clip(tmp_path / "a.wav", codecs=(None, "pcm_s16le")).path
    mute = clip(tmp_path / "b.mp4", codecs=("libx264", None)).path
    assert give(wave, ["audio"])[0].whole == ("audio",)
    assert give(mute, ["video"])[0].whole == ("video",)
    shapes, rates = {"audio": [1, 6400]}, {"audio": 4000}
    item = give(wave, {"audio": [0.4, 0.8]}, shapes=shapes, rates=rates)[0]
    assert item.steps == {"audio": 6400}
    assert spans(item.mask["audio"]) == [(1600, 3200)]
    check_sound(item.values["audio"][0, 1600:3200].numpy(), 0.4)
    assert give(wave, ["audio"], 4, shapes, rates)[0].steps == {"audio": 16000}
    shapes, rates = {"video": [3, 16, 24, 48]}, {"video": 10}
    assert give(mute, ["video"], 3, shapes, rates)[0].known == {"video": [(0.0, 2.5)]}


def test_files_of_a_folder_come_in_order_and_again(tmp_path):
    folder = tmp_path / "given"
    (folder / "sub").mkdir(parents=True)
    for k, name in enumerate(["b.wav", "sub/c.wav", "a.wav"]):
        sound = np.full((1, 8000), 0.1 * (k + 1), np.float32)
        io.write_wav(folder / name, sound, sample_rate=4000)
    (folder / "d.wav").symlink_to(folder / "b.wav")
    (folder / "notes.txt").write_text("no media")
    found = give(folder, ["audio"])
    assert len(found) == 4
    assert found.ignored == ["notes.txt"]
    assert [f.relative_to(folder).as_posix() for f in found.files] == [
        *("a.wav", "b.wav", "d.wav", "sub/c.wav")
    ]
    levels = [float(found[i].values["audio"].mean()) for i in (0, 1, 2, 3, 4, 9)]
    assert levels == pytest.approx([0.3, 0.1, 0.1, 0.2, 0.3, 0.1], abs=1e-4)


def test_only_what_is_known_is_read(tmp_path, monkeypatch):
    asked, read = [], io.read_window

    def noted(path, start, **request):
        asked.append((start, request.get("frames"), request.get("samples")))
        return read(path, start, **request)

    monkeypatch.setattr(module, "read_window", noted)
    path = clip(tmp_path / "clip.mp4", seconds=4).path
    found = give(path, {"video": [[0.2, 0.4], [3.0, 3.1]], "audio": [1, 1.5]}, seconds=3.5)
    assert asked == []
    found[0]
    assert asked == [(0.2, 2, None), (3.0, 1, None), (1.0, None, 2000)]


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ([], r"known=\[\]: nothing is known; name some of video, audio"),
        (["sound"], r"known=\[sound\]: 'sound' is none of video, audio"),
        ({"text": [0, 1]}, "'text' is none of video, audio"),
        ({"audio": None}, r"audio wants \[start, end\] in seconds, or several of them"),
        ({"audio": []}, r"wants \[start, end\]"),
        ({"audio": 1.0}, r"wants \[start, end\]"),
        ({"audio": [0, 1, 2]}, r"wants \[start, end\]"),
        ({"audio": [[0, 1], [1]]}, r"wants \[start, end\]"),
        ({"audio": ["a", "b"]}, r"wants \[start, end\]"),
        ({"audio": [0.8, 0.2]}, "a range of audio is empty, reversed or before 0"),
        ({"audio": [0.8, 0.8]}, "empty, reversed"),
        ({"audio": [-0.1, 0.8]}, "before 0"),
        ({"audio": [float("nan"), 0.8]}, "empty, reversed"),
        ({"video": [[0, 0.8], [0.4, 1.2]]}, "ranges of video overlap"),
        ({"video": [[0, None], [0.4, 1.2]]}, "ranges of video overlap"),
        ({"audio": [0, 3]}, r"clip.mp4: known={audio:\[0,3\]} ends after the result, .*1.6 s;.*=3"),
        ({"audio": [1.7, None]}, "clip.mp4: 2.50 s of sound and a result of 1.6 s: no step"),
        ({"video": [0.01, 0.04]}, r"clip.mp4: 2.48 s of picture and .*: no step"),
        (["audio", "video"], "clip.mp4: .* leaves nothing to generate"),
        ({"audio": [0, 1.6], "video": [[0, 1], [1, None]]}, "leaves nothing to generate"),
    ],
)
def test_what_cannot_be_known(tmp_path, known, message):
    path = clip(tmp_path / "clip.mp4").path  # 62 frames, 2.48 s
    with pytest.raises(ValueError, match=message) as error:
        give(path, known)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("known", "seconds", "message"),
    [
        (["audio"], None, r"short.wav: 1.20 s of sound, the model's clips last 1.60 s; .*"
            r"known={audio:\[0,1.2\]}, or give longer clips"),
        (["audio"], "given", r"short.wav: 1.20 s long, .*the model's clips last 1.60 s"),
        ({"audio": [0, 1.5]}, None, r"short.wav: 1.20 s of sound, less than known="),
        ({"audio": [1.3, None]}, 3, r"short.wav: 1.20 s of sound and a result of 3 s: no step"),
        (["video"], None, r"short.wav: no picture; known=\[video\] needs another file"),
        (["audio"], 1.2, r"seconds=1.2: the model's clips last 1.6 s"),
        (["audio"], "long", r"seconds='long' is neither a number nor given"),
    ],
)  # fmt: skip
def test_clips_that_do_not_suffice(tmp_path, known, seconds, message):
    path = clip(tmp_path / "short.wav", seconds=1.2, codecs=(None, "pcm_s16le")).path
    with pytest.raises(ValueError, match=message):
        give(path, known, seconds)
    assert give(path, {"audio": [0, 1.2]})[0].whole == ()
    assert give(path, {"audio": [0, None]})[0].known == {"audio": [(0.0, 1.2)]}


def test_nearly_long_enough_is_enough(tmp_path):
    path = clip(tmp_path / "clip.wav", seconds=1.56, codecs=(None, "pcm_s16le")).path
    item = give(path, ["audio"])[0]
    assert item.whole == ("audio",)
    assert item.values["audio"][:, 6100:6200].any()
    assert not item.values["audio"][:, 6300:].any()


def test_files_that_hold_nothing(tmp_path):
    mute = clip(tmp_path / "mute.mp4", codecs=("libx264", None)).path
    silent = clip(tmp_path / "silent.mp4", silent=True).path
    (tmp_path / "text.mp4").write_text("no film\n" * 50)
    for path, message in [
        (mute, r"mute.mp4: no sound; known=\[audio\] needs another file"),
        (silent, r"silent.mp4: silent from beginning to end"),
        (tmp_path / "text.mp4", r"text.mp4: unreadable"),
    ]:
        with pytest.raises(io.MediaError, match=message):
            give(path, ["audio"])
    assert give(silent, ["video"])[0].whole == ("video",)
    with pytest.raises(FileNotFoundError, match=r"none.mp4: no such file or folder"):
        give(tmp_path / "none.mp4", ["audio"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no audio or video files in .*1 other files"):
        give(tmp_path / "empty", ["audio"])


def test_a_folder_with_bad_files_is_refused_at_once(tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    clip(folder / "a.mp4")
    clip(folder / "b.mp4", codecs=("libx264", None))
    (folder / "c.mp4").write_text("no film\n" * 50)
    clip(folder / "d.wav", seconds=1, codecs=(None, "pcm_s16le"))
    clip(folder / "e.mp4", silent=True)
    with pytest.raises(ValueError, match=r"4 of 5 files in .*given cannot be given") as error:
        give(folder, ["audio"])
    for said in ("b.mp4 (no sound", "c.mp4 (unreadable", "d.wav (1.00 s", "and 1 more; take them"):
        assert said in str(error.value)
    assert "\n" not in str(error.value)
