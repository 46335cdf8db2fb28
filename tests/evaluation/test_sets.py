"""Sets of clips: the same windows whatever the order, what they are brought to, what is refused."""

import shutil

import numpy as np
import pytest
import torch
from media_files import frame_numbers, make_media, sound_lag

from avdiffusion.evaluation.form import Form, form_of
from avdiffusion.evaluation.sets import Files, Items, Sampled
from avdiffusion.io import MediaError
from avdiffusion.media import Media

FORM = Form(fps=10, frames=6, size=(48, 96), sample_rate=8000, samples=4800, channels=1, fit="crop")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, seconds in (("a.mp4", 2.0), ("b.mov", 1.3), ("c.mp4", 0.7)):
        make_media(folder / name, seconds=seconds, fps=10, sample_rate=16000)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_windows_are_pictures_and_sound_of_one_moment(folder):
    clips = Files(folder, FORM)
    assert len(clips.names) == 3 + 2 + 1
    assert clips.names[0] == "a.mp4"  # a window at the beginning is the file's own
    found = clips.read(range(len(clips.names)))
    assert found["video"].dtype == np.uint8
    assert found["video"].shape == (6, 3, 6, 48, 96)
    assert found["audio"].shape == (6, 1, 4800)
    for (_, start), video, audio in zip(clips.windows, found["video"], found["audio"], strict=True):
        first = frame_numbers(video)[0]
        assert abs(first - start * 10) < 0.51
        assert abs(sound_lag(audio[0], first / 10, 8000)) < 0.002


def test_a_number_of_windows_is_chosen_by_their_names(folder, tmp_path):
    some = Files(folder, FORM, most=4)
    assert len(some.names) == 4
    shuffled = tmp_path / "other"
    shuffled.mkdir()
    for name in ("c.mp4", "b.mov", "a.mp4"):
        shutil.copy(folder / name, shuffled / name)
    again = Files(shuffled, FORM, most=4)
    assert again.names == some.names
    assert again.digest == some.digest
    fewer = Files(folder, FORM, most=3)
    assert set(fewer.names) < set(some.names)
    assert len(Files(folder, FORM, most=7).names) == 6


def test_random_windows_begin_a_frame_or_more_apart(folder):
    clips = Files(folder, FORM, windows="random", most=10, seed=1)
    assert len(set(clips.windows)) == 10
    for path in ("a.mp4", "b.mov"):
        starts = sorted(start for name, start in clips.windows if name == path)
        assert np.allclose(np.diff(starts) * 10, np.round(np.diff(starts) * 10))
    assert clips.windows != Files(folder, FORM, windows="random", most=10, seed=2).windows
    with pytest.raises(ValueError, match="windows=some is neither disjoint nor random"):
        Files(folder, FORM, windows="some")


def test_a_set_is_told_from_others_by_content_and_form(folder, tmp_path):
    first = Files(folder, FORM)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert Files(copy, FORM).digest == first.digest
    other = Form(**{**first.form.__dict__, "size": (24, 48)})
    assert Files(folder, other).digest != first.digest
    make_media(copy / "b.mov", seconds=1.3, fps=10, sample_rate=16000, codecs=("mpeg4", "aac"))
    changed = Files(copy, FORM)
    assert changed.digest != first.digest
    said = dict(changed.lines)["codec read"]
    assert "mpeg4 + aac (1 files)" in said
    assert "h264 + aac (2 files)" in said


def test_silent_clips_are_kept_and_counted_or_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "some")
    make_media(tmp_path / "some" / "d.mp4", seconds=1.0, fps=10, silent=True)
    with pytest.raises(MediaError, match=r"1 of 4 files .* d.mp4 \(silent from beginning to end\)"):
        Files(tmp_path / "some", FORM)
    clips = Files(tmp_path / "some", FORM, silent=True)
    assert ("silent files", "1") in clips.lines


def test_what_cannot_be_read_is_left_out_and_counted_if_asked(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "some")
    (tmp_path / "some" / "d.mp4").write_bytes(b"no media at all")
    with pytest.raises(MediaError, match=r"1 of 4 files .* d.mp4 .*on_bad=skip leaves them out"):
        Files(tmp_path / "some", FORM)
    clips = Files(tmp_path / "some", FORM, on_bad="skip")
    assert clips.names == Files(folder, FORM).names
    assert dict(clips.lines)["left out"].startswith("1 files: d.mp4 (")


def test_a_change_anywhere_in_a_file_is_noticed(tmp_path):
    make_media(tmp_path / "a.avi", seconds=1.0, fps=10, codecs=("rawvideo", "pcm_s16le"))
    before = Files(tmp_path, FORM).digest
    assert Files(tmp_path, FORM).digest == before
    data = bytearray((tmp_path / "a.avi").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.avi").write_bytes(data)
    assert Files(tmp_path, FORM).digest != before


def test_real_clips_are_levelled_and_say_so(folder):
    form = Form(**{**FORM.__dict__, "loudness": -30.0})
    found = Files(folder, form).read([0])["audio"]
    assert 10 * np.log10(np.mean(np.square(found, dtype=np.float64))) == pytest.approx(-30, abs=0.1)
    assert ("level", "brought to -30 dB") in Files(folder, form).lines
    assert "level" not in dict(Files(folder, FORM).lines)


def test_what_cannot_be_measured_is_named(folder, tmp_path):
    mute = tmp_path / "mute"
    mute.mkdir()
    make_media(mute / "x.mp4", seconds=1.0, fps=10, codecs=("libx264", None))
    with pytest.raises(MediaError, match=r"cannot be measured: x.mp4 \(no sound\)"):
        Files(mute, FORM)
    alone = Form(fps=10, frames=6, size=(48, 96))
    assert Files(mute, alone).read([0])["video"].shape == (1, 3, 6, 48, 96)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("nothing here")
    with pytest.raises(FileNotFoundError, match=r"no audio or video files in .*1 other files"):
        Files(empty, FORM)
    with pytest.raises(FileNotFoundError, match="is no folder of clips"):
        Files(tmp_path / "nowhere", FORM)


def test_a_form_is_filled_in_from_the_files(tmp_path):
    for name in "ab":
        make_media(tmp_path / f"{name}.mp4", seconds=1.6, fps=10, sample_rate=16000, channels=2)
    form = form_of(tmp_path, Form())
    assert form == Form(
        fps=10, frames=16, size=(48, 96), sample_rate=16000, samples=25600, channels=2
    )
    assert form.seconds == 1.6
    assert form.rates == {"video": 10, "audio": 16000}
    assert form.only(["audio"]) == Form(sample_rate=16000, samples=25600, channels=2)
    with pytest.raises(ValueError, match=r"0\.8 s: form.samples=25600 fits"):
        Form(fps=10, frames=16, sample_rate=16000, samples=12800)
    smaller = form_of(tmp_path, Form(size=(24, 48), sample_rate=8000, frames=8))
    assert (smaller.size, smaller.frames, smaller.samples) == ((24, 48), 8, 6400)


def test_mixed_folders_are_refused_until_it_is_said_what_all_become(tmp_path):
    for name, size in (("a", (48, 96)), ("b", (48, 96)), ("c", (48, 64))):
        make_media(tmp_path / f"{name}.mp4", seconds=1.6, fps=10, size=size, sample_rate=16000)
    with pytest.raises(ValueError, match=r"is mixed: 2 of 3 .* but c.mp4 has size=\(48, 64\)"):
        form_of(tmp_path, Form(frames=16, fps=10))
    form = form_of(tmp_path, Form(frames=16, fps=10, size=(32, 32)))
    assert Files(tmp_path, form).read([0, 2])["video"].shape == (2, 3, 16, 32, 32)


def test_items_of_a_dataset(tmp_path):
    class Data:
        def __len__(self):
            return 5

        def __getitem__(self, k):
            video = torch.full((3, 6, 48, 96), 10 * k, dtype=torch.uint8)
            return {"video": video, "audio": torch.full((1, 4800), 100 * k, dtype=torch.int16)}

    clips = Items(Data(), FORM, path="data", most=3)
    found = clips.read([2])
    assert found["video"].max() == found["video"].min() == 20
    assert found["audio"].max() == np.float32(200 / 32768)
    assert clips.digest == Items(Data(), FORM, path="other", most=3).digest
    assert clips.digest != Items(Data(), FORM, path="data", most=2).digest
    assert len(Items(Data(), FORM, path="data", most=6).names) == 5


def test_samples_are_made_once_in_whole_batches(tmp_path):
    asked = []

    def sample(numbers):
        asked.append(list(numbers))
        value = torch.tensor([k / 10 for k in numbers])
        video = value.view(-1, 1, 1, 1, 1).expand(-1, 3, 2, 4, 4)
        return Media(video=video, audio=value.view(-1, 1, 1).expand(-1, 1, 8))

    options = {"path": "m.ckpt", "settings": {"seed": 0}, "folder": tmp_path, "batch": 3}
    clips = Sampled(sample, 5, **options)
    found = clips.read([4])
    assert np.abs(found["audio"] - 0.4).max() < 2**-16
    assert (found["video"] == 178).all()  # (0.4 + 1) * 127.5, rounded
    assert clips.read([3, 4, 0])["audio"][:, 0, 0] == pytest.approx([0.3, 0.4, 0], abs=2**-16)
    assert asked == [[3, 4], [0, 1, 2]]
    more = Sampled(sample, 6, **options)
    more.read([0, 5])
    assert asked[2:] == [[3, 4, 5]]  # the first batch is there
    assert more.digest != clips.digest
    other = Sampled(sample, 5, **{**options, "settings": {"seed": 1}})
    other.read([0])
    assert asked[-1] == [0, 1, 2]
