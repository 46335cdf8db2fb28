"""Captions: every item has words of the file that was really read."""

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from media_files import make_media
from torch.utils.data import DataLoader

from avdiffusion import checkpoint
from avdiffusion.data import clips as clips_module
from avdiffusion.data.captions import Captioned, is_pause
from avdiffusion.data.clips import Clips
from avdiffusion.data.module import DataModule
from avdiffusion.io import MediaError, write_wav

SHARED = Path(__file__).parents[3] / "shared" / "data"
RATE, LENGTH = 8000, 4000
FILES = ["a_robin/one.wav", "a_robin/two.wav", "wren/one.wav", "wren/deep/three.wav", "four.wav"]


def tone(path, hertz, seconds=1.6, until=None):
    """A tone of a pitch by which its file is known; silence `until` some second, if given."""
    t = np.arange(round(seconds * RATE)) / RATE
    wave = 0.5 * np.sin(2 * np.pi * hertz * t) * (t >= (until or 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_wav(path, wave[None].astype(np.float32), sample_rate=RATE)


def heard(item):
    """Which of FILES an item's sound is of."""
    spectrum = np.abs(np.fft.rfft(item["audio"][0].numpy()))
    return FILES[round(spectrum.argmax() * RATE / LENGTH / 400) - 1]


@pytest.fixture
def root(tmp_path):
    for k, name in enumerate(FILES):
        tone(tmp_path / "sounds" / name, 400 * (k + 1))
    return tmp_path / "sounds"


def sounds(root, **settings):
    asked = {"split": "all", "modalities": ["audio"], "sample_rate": RATE, "samples": LENGTH}
    return Clips(root, **asked | settings)


def written(root, rows, suffix=".csv", names=("file", "caption")):
    """A table beside the folder."""
    path = root.parent / f"captions{suffix}"
    if suffix == ".jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    else:
        mark = "\t" if suffix == ".tsv" else ","
        lines = [mark.join(f'"{each}"' for each in row) for row in [names, *rows]]
    path.write_text("\n".join(lines), "utf-8-sig" if suffix == ".csv" else "utf-8")
    return path


ROWS = [(name, f"sound, of {name}") for name in FILES]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_items_have_the_words_of_their_file(root, suffix, keep, tmp_path):
    clips = sounds(root, keep=keep, cache=tmp_path / "cache")
    data = Captioned(clips, captions=written(root, ROWS, suffix))
    assert len(data) == len(clips) == 15
    assert data.report == clips.report
    rng = np.random.default_rng(0)
    for k in range(len(data)):
        for item in (data[k], data.draw(k, rng)):
            assert item["text"] == f"sound, of {heard(item)}"
            assert heard(item) == clips.files[clips.windows[k][0]]
        assert data[k]["index"] == k
    with pytest.raises(IndexError, match="item 15 of 15"):
        data[15]
    assert pickle.loads(pickle.dumps(data))[4]["text"] == data[4]["text"]


def test_columns_template_and_several_captions(root):
    rows = [(name, f"{word} {{}}") for word in ("first", "second", "third") for name in FILES]
    path = written(root, rows, names=("path", "said"))
    asked = {"captions": path, "column": "said", "file_column": "path"}
    data = Captioned(sounds(root), **asked, template="the {}!")
    assert {data[k]["text"] for k in range(len(data))} == {"the first {}!"}
    drawn = [data.draw(3, np.random.default_rng(k))["text"] for k in range(60)]
    assert all(drawn.count(f"the {word} {{}}!") > 8 for word in ("first", "second", "third"))
    with pytest.raises(ValueError, match=r"row 1 of .*captions.csv has no 'file' but path, said"):
        Captioned(sounds(root), captions=path)
    with pytest.raises(ValueError, match=r"template 'birds' has no \{\}"):
        Captioned(sounds(root), **asked, template="birds")


def test_folders_and_texts_beside_the_files(root):
    (root / "wren/one.txt").write_text("one wren\n\n  two wrens \n")
    (root / "four.txt").write_text("a sparrow")
    data = Captioned(sounds(root), template="song of {}")
    assert data.texts == {
        "a_robin/one.wav": ["song of a robin"],
        "a_robin/two.wav": ["song of a robin"],
        "wren/one.wav": ["song of one wren", "song of two wrens"],
        "wren/deep/three.wav": ["song of deep"],
        "four.wav": ["song of a sparrow"],
    }
    (root / "wren/one.txt").write_text("\n")  # an empty text is none
    (root / "four.txt").unlink()
    with pytest.raises(
        ValueError, match=r"2 of 5 files in .* have no caption: four.wav .*, wren/o"
    ):
        Captioned(sounds(root))


def test_bare_names_count_where_they_are_unique(root, caplog):
    rows = [("two.wav", "a"), ("./four.wav", "b"), ("one.wav", "c"), ("five.wav", "d")]
    rows += [("wren/deep/three.wav", "e")]
    with caplog.at_level(logging.WARNING):
        data = Captioned(sounds(root), captions=written(root, rows), on_missing="skip")
    assert {file: texts[0] for file, texts in data.texts.items()} == {
        "a_robin/two.wav": "a",
        "four.wav": "b",
        "wren/deep/three.wav": "e",
    }
    lost, missing = caplog.messages
    assert lost.startswith(f"2 of 5 captions have no file in {root}: one.wav (2 of that name)")
    assert "five.wav (not there)" in lost
    assert missing.startswith(f"2 of 5 files in {root} left out: a_robin/one.wav")


def test_rows_of_the_other_side_are_not_lost(root, caplog):
    path = written(root, ROWS)
    with caplog.at_level(logging.WARNING):
        sides = {s: Captioned(sounds(root, split=s), captions=path) for s in ("train", "val")}
    assert caplog.messages == []
    assert sorted(sides["train"].texts | sides["val"].texts) == sorted(FILES)
    assert not set(sides["train"].texts) & set(sides["val"].texts)


def test_files_without_a_caption_are_refused_or_left_out(root):
    path = written(root, ROWS[1:3])
    with pytest.raises(ValueError, match=r"3 of 5 files .* data.train.on_missing=skip leaves them"):
        Captioned(sounds(root), captions=path)
    data = Captioned(sounds(root), captions=path, on_missing="skip")
    assert len(data) == 6
    rng = np.random.default_rng(0)
    for k in range(6):
        for item in (data[k], data.draw(k, rng)):
            assert item["text"] == f"sound, of {heard(item)}"
        assert data[k]["index"] == k
    with pytest.raises(ValueError, match=r"none of 1 captions is of a file in .*elsewhere.wav"):
        Captioned(sounds(root), captions=written(root, [("elsewhere.wav", "a")]), on_missing="skip")
    with pytest.raises(ValueError, match=r"captions.csv has no row with a text in its 'caption'"):
        Captioned(sounds(root), captions=written(root, [(FILES[0], " ")] * 2), on_missing="skip")
    bare = root / "wren/deep"
    with pytest.raises(ValueError, match=r"1 of 1 files in [^;]*$"):
        Captioned(sounds(bare), on_missing="skip")


def test_tables_that_cannot_be_read(root):
    with pytest.raises(FileNotFoundError, match=r"data.train.captions is no file: .*nothing.csv"):
        Captioned(sounds(root), captions=root / "nothing.csv")
    for content, reason in (("{", "line 1 of .* is no JSON"), ("[1]", "line 1 of .* is no object")):
        (root / "a.jsonl").write_text(content)
        with pytest.raises(ValueError, match=reason):
            Captioned(sounds(root), captions=root / "a.jsonl")
    (root / "a.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"suffix of captions is one of .csv, .tsv, .jsonl, not"):
        Captioned(sounds(root), captions=root / "a.xlsx")


@pytest.mark.parametrize("broken", ["a_robin/two.wav", "wren/deep/three.wav"])
def test_what_takes_a_broken_files_place_has_its_own_words(root, broken, monkeypatch):
    """Also where the next file has none."""
    rows = [row for row in ROWS if row[0] != "wren/one.wav"]
    asked = {"captions": written(root, rows), "on_missing": "skip"}
    data = Captioned(sounds(root, on_bad="skip"), **asked)
    read = clips_module.read_window

    def failing(path, *args, **request):
        if path == root / broken:
            raise MediaError("broken", str(path))
        return read(path, *args, **request)

    monkeypatch.setattr(clips_module, "read_window", failing)
    rng = np.random.default_rng(0)
    for k in range(len(data)):
        for item in (data[k], data.draw(k, rng)):
            assert item["text"] == f"sound, of {heard(item)}"
            assert heard(item) not in ("wren/one.wav", broken)
            assert data[item["index"]]["text"] == item["text"]
    assert data.report.bad == [(broken, "found broken while being read")]


def test_draws_pass_over_pauses(tmp_path):
    tone(tmp_path / "birds" / "late.wav", 400, seconds=4, until=3)
    clips = sounds(tmp_path)
    data = Captioned(clips)
    pauses = [is_pause(clips.draw(0, np.random.default_rng(k))) for k in range(60)]
    assert sum(pauses) > 25
    found = [is_pause(data.draw(0, np.random.default_rng(k))) for k in range(60)]
    assert sum(found) < 12  # 0.71 to the ninth
    assert is_pause(data[0])
    assert data[0]["text"] == "birds"


def test_batches_hold_lists_of_texts_and_pictures_stay(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make_media(tmp_path / name / "clip.mp4", seconds=1)
    clips = Clips(tmp_path, split="all", frames=4, samples=6400, size=(16, 32))
    batch = next(iter(DataLoader(Captioned(clips), batch_size=2)))
    assert batch["video"].shape == (2, 3, 4, 16, 32)
    assert batch["audio"].shape == (2, 1, 6400)
    assert batch["text"] == ["a", "a"]


def composed(*words):
    config = checkpoint.compose(["~exp", *words])
    return checkpoint.build(config.data)


def test_configs_build_what_they_say(root):
    words = [f"data.root={root}", f"data.train.captions={written(root, ROWS)}"]
    words += [f"data.sample_rate={RATE}", f"data.samples={LENGTH}", "data.channels=1"]
    data = composed("data=captions", *words, "data.train.template='heard: {}'")
    assert isinstance(data, DataModule)
    for side in (data.train, data.val):
        assert side[0]["text"] == f"heard: sound, of {heard(side[0])}"
        assert side[0]["audio"].shape == (1, LENGTH)
    songs = composed("data=chirps", "data.samples=6000")
    assert songs.val[0]["audio"].shape == (2, 6000)
    assert songs.val[0]["text"] in songs.val.captions()
    assert len(songs.train) == 100000


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
def test_real_sounds():
    asked = {"split": "all", "modalities": ["audio"], "sample_rate": 48000, "channels": 2}
    captions = SHARED / "audio.csv"
    data = Captioned(Clips(SHARED / "audio", samples=2**17, **asked), captions=captions)
    assert len(data.texts) == 150
    assert "a dog barking" in {text for texts in data.texts.values() for text in texts}
    long = Captioned(
        Clips(SHARED / "audio", samples=2**18, on_bad="skip", **asked), captions=captions
    )
    assert len(long.texts) == 32
    assert all("shorter than" in reason for _, reason in long.report.bad)
