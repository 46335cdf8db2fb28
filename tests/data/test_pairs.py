"""Two videos at the same moments: which belong together, and that all is done to both alike."""

import csv
import json
import logging
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from media_files import frame_numbers, make_media
from PIL import Image

from avdiffusion import checkpoint, io
from avdiffusion.data.index import side
from avdiffusion.data.pairs import Pairs

SMALL = {"frames": 8, "size": (16, 32)}
SILENT = {"codecs": ("libx264", None)}


def rng(seed=0):
    return np.random.default_rng(seed)


def waves(count=30, height=48, width=96, phase=0.0):
    """Grey waves that run to the left: no two frames, rows or columns are alike."""
    t, y, x = np.mgrid[:count, :height, :width]
    grey = 128 + 100 * np.sin(x / 13 + y / 31 + 0.6 * t + phase)
    return np.repeat(grey.astype(np.uint8)[None], 3, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pairs in several containers; the source is the negative of its target."""
    root = tmp_path_factory.mktemp("pairs")
    for place in ("input/below", "target/below"):
        (root / place).mkdir(parents=True)
    for k in range(6):
        name = f"below/{k}" if k % 2 else f"{k}"
        video = waves(26 + 5 * k, phase=k)
        io.write_mp4(root / "target" / f"{name}.mp4", video, fps=25)
        if k < 3:
            io.write_mp4(root / "input" / f"{name}.mp4", 255 - video, fps=25)
        else:
            io.write_webm(root / "input" / f"{name}.webm", 255 - video, fps=25)
    (root / "input" / "notes.txt").write_text("ignored")
    return root


def pair(root, name, *, source=None, target=None):
    for place, how in (("input", source), ("target", target)):
        (root / place).mkdir(exist_ok=True)
        make_media(root / place / f"{name}.mp4", **{"seconds": 1.5, **SILENT, **(how or {})})


def tables(folder):
    """The same pairs as a list and as files, relative to the folder of these."""
    rows = []
    for target in sorted((folder / "target").rglob("*.mp4")):
        inner = target.relative_to(folder / "target")
        (source,) = (folder / "input" / inner.parent).glob(f"{inner.stem}.*")
        paths = {"input": source, "target": target}
        rows.append({k: v.relative_to(folder).as_posix() for k, v in paths.items()})
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["note", "input", "target"])
        writer.writeheader()
        writer.writerows({"note": "a, b", **row} for row in rows)
    (folder / "pairs.json").write_text(json.dumps(rows))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def difference(item):
    """Mean distance of the source from the negative of the target."""
    return (item["source"].double() + item["video"].double() - 255).abs().mean().item()


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_both_are_cut_and_mirrored_alike(folder, fit):
    pairs = Pairs(folder, split="all", frames=8, size=(32, 32), fit=fit)
    assert pairs.files == ["0", "2", "4", "below/1", "below/3", "below/5"]
    item = pairs[3]
    assert item.keys() == {"index", "video", "source"}
    assert item["index"] == 3
    for name in ("video", "source"):
        assert item[name].shape == (3, 8, 32, 32)
        assert item[name].dtype == torch.uint8
    inner = slice(None) if fit == "crop" else slice(9, 23)  # black bars have no negative
    for i in range(len(pairs)):
        for item in (pairs[i], pairs.draw(i, rng(i)), pairs.draw(i, rng(100 + i))):
            cut = {name: item[name][:, :, inner] for name in ("video", "source")}
            assert difference(cut) < 2.5
            shifted = {**cut, "source": cut["source"].roll(1, 1)}
            assert difference({k: v[:, 1:] for k, v in shifted.items()}) > 15  # what a frame is
            assert difference({**cut, "source": cut["source"].flip(-1)}) > 15


def test_draws_mirror_at_their_rate(folder):
    """Of one and the same window: without a flip as it is, with one turned round."""
    plain, turned, half = (
        Pairs(folder, split="all", flip=flip, **SMALL) for flip in (0.0, 1.0, 0.5)
    )
    seen = []
    for seed in range(20):
        items = [pairs.draw(2, rng(seed)) for pairs in (plain, turned, half)]
        for name in ("video", "source"):
            assert torch.equal(items[0][name].flip(-1), items[1][name])
        seen.append(torch.equal(items[2]["source"], items[1]["source"]))
        assert torch.equal(items[2]["video"], items[seen[-1]]["video"])
        assert torch.equal(half.draw(2, rng(seed))["source"], items[2]["source"])
    assert 4 < sum(seen) < 16


@pytest.mark.parametrize("fps", [15, 24, 25])
@pytest.mark.parametrize("late", [0, 0.4])
def test_moments_are_the_same_whatever_the_clock(fps, late, tmp_path):
    """Milliseconds in one container, exact fractions in the other; one begins later.

    At 10 frames a second every other one of 25, or of 15, is as near as its neighbour.
    """
    for place in ("input", "target"):
        (tmp_path / place).mkdir()
    make_media(tmp_path / "input" / "a.mkv", fps=fps, seconds=3.2, video_start=late)
    make_media(tmp_path / "target" / "a.mp4", fps=fps, seconds=3.2, **SILENT)
    pairs = Pairs(tmp_path, split="all", flip=0.0, **SMALL)
    assert len(pairs) == 3
    items = [pairs[i] for i in range(3)] + [pairs.draw(0, rng(seed)) for seed in range(30)]
    begins = set()
    for item in items:
        numbers = frame_numbers(item["video"].numpy())
        assert frame_numbers(item["source"].numpy()) == numbers
        steps = (np.array(numbers) - numbers[0]) / fps
        assert np.abs(steps - np.arange(8) / 10).max() <= 0.5 / fps + 2e-3
        begins.add(numbers[0])
    assert frame_numbers(items[0]["video"].numpy())[0] == 0
    assert max(begins) > (3.2 - 0.8 - 0.05) * fps * 0.9
    assert len(begins) > 12


def test_a_smaller_source_of_another_rate_shows_the_same_moments(tmp_path):
    pair(tmp_path, "a", source={"fps": 12.5, "size": (24, 48)}, target={"fps": 25})
    pairs = Pairs(tmp_path, split="all", flip=0.0, **SMALL)
    for seed in range(8):
        item = pairs.draw(0, rng(seed))
        halves = 2 * np.array(frame_numbers(item["source"].numpy()))
        assert np.abs(halves - frame_numbers(item["video"].numpy())).max() <= 1


def test_folders_lists_and_tables_give_the_same(folder, monkeypatch):
    rows = tables(folder)
    monkeypatch.chdir(folder)
    absolute = [{k: str(folder / v) for k, v in row.items()} for row in rows]
    first = Pairs(folder, split="all", **SMALL)
    others = [rows, absolute, *(folder / f"pairs.{kind}" for kind in ("csv", "json", "jsonl"))]
    for listed in others:
        pairs = Pairs(pairs=listed, split="all", **SMALL)
        assert len(pairs.files) == 6
        number = [row["target"].removeprefix("target/")[:-4] for row in rows]
        for i in range(len(first)):
            name, start = first.windows[i]
            j = pairs.windows.index((number.index(first.files[name]), start))
            for one, other in (
                (first[i], pairs[j]),
                (first.draw(i, rng(i)), pairs.draw(j, rng(i))),
            ):
                assert torch.equal(one["video"], other["video"])
                assert torch.equal(one["source"], other["source"])
    monkeypatch.chdir(folder.parent)
    assert len(Pairs(folder, pairs=rows, split="all", **SMALL).files) == 6
    with pytest.raises(FileNotFoundError, match=r"no pairs of videos in \.: 12 files without"):
        Pairs(pairs=rows, split="all", **SMALL)


def test_splits_are_by_hash_or_by_folder(folder, tmp_path):
    names = set(Pairs(folder, split="all", **SMALL).files)
    for fraction in (0.1, 0.5):
        sides = [
            set(Pairs(folder, split=split, val_fraction=fraction, **SMALL).files)
            for split in ("train", "val")
        ]
        assert sides == [side(names, split, fraction, folder) for split in ("train", "val")]
        assert sides[0] | sides[1] == names
        assert not sides[0] & sides[1]
    listed = tables(folder)
    parts = [Pairs(folder, pairs=listed, split=s, **SMALL).files for s in ("train", "val")]
    assert sorted(parts[0] + parts[1]) == sorted(row["target"] for row in listed)

    for part, name in (("train", "a"), ("train", "b"), ("val", "a")):
        (tmp_path / part).mkdir(exist_ok=True)
        pair(tmp_path / part, name)
    given = {s: Pairs(tmp_path, split=s, **SMALL).files for s in ("train", "val", "all")}
    assert given["train"] == ["train/a", "train/b"]
    assert given["val"] == ["val/a"]
    assert given["all"] == [*given["train"], *given["val"]]
    (tmp_path / "val").rename(tmp_path / "valid")
    with pytest.raises(FileNotFoundError, match=r"no folder .*val/input: pairs lie in input and"):
        Pairs(tmp_path, split="val", **SMALL)


def test_files_without_a_partner(tmp_path, caplog):
    pair(tmp_path, "a")
    for name in ("input/b.mp4", "input/d.mp4", "target/c.mkv", "target/e.mkv"):
        make_media(tmp_path / name, seconds=1)
    with pytest.raises(FileNotFoundError) as error:
        Pairs(tmp_path, split="all", **SMALL)
    assert str(error.value) == (
        f"in {tmp_path} are 4 files without a partner: input/b.mp4 (no target), input/d.mp4 "
        "(no target), target/c.mkv (no input) and 1 more; data.train.strict=false leaves them out"
    )
    with caplog.at_level(logging.WARNING):
        assert Pairs(tmp_path, split="all", strict=False, **SMALL).files == ["a"]
    assert f"left out in {tmp_path}: 4 files without a partner: input/b.mp4 (no" in caplog.text

    listed = [{"input": f"input/{k}.mp4", "target": f"target/{k}.mp4"} for k in "ab"]
    with pytest.raises(
        FileNotFoundError, match=r"1 files .*: target/b\.mp4 \(no such file\); data"
    ):
        Pairs(tmp_path, pairs=listed, split="all", **SMALL)
    some = Pairs(tmp_path, pairs=listed, split="all", strict=False, **SMALL)
    assert some.files == ["target/a.mp4"]


def test_no_pairs_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"data\.root=DIR for a folder with input and target"):
        Pairs()
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*input: pairs lie in input and target"
    ):
        Pairs(tmp_path)
    for place in ("input", "target"):
        (tmp_path / place / "clip").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no pairs of videos in .*: no videos$"):
        Pairs(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "input" / "clip" / "000.png")
    with pytest.raises(FileNotFoundError) as error:
        Pairs(tmp_path)
    assert (
        "no videos; 1 files are no media, such as input/clip/000.png: single pictures are not"
        in (str(error.value))
    )
    make_media(tmp_path / "target" / "clip.mp4", seconds=1)
    for strict in (True, False):
        with pytest.raises(
            FileNotFoundError, match=r"no pairs .*: target/clip\.mp4 \(no input\); 1"
        ):
            Pairs(tmp_path, strict=strict)
    make_media(tmp_path / "target" / "clip.mkv", seconds=1)
    with pytest.raises(ValueError, match=r"target/clip\.mkv and target/clip\.mp4 have one name"):
        Pairs(tmp_path)


def test_bad_pairs_are_refused_or_left_out(tmp_path, caplog):
    for name in ("good", "fine"):
        pair(tmp_path, name)
    pair(tmp_path, "brief", source={"seconds": 0.4})
    pair(tmp_path, "square", target={"size": (48, 48)})
    pair(tmp_path, "blind", target={"codecs": (None, "aac")})
    pair(tmp_path, "text")
    (tmp_path / "input" / "text.mp4").write_text("no film\n" * 50)
    with pytest.raises(ValueError, match=r"4 of 6 files .*blind \(no picture in the target\)"):
        Pairs(tmp_path, split="all", **SMALL)
    with caplog.at_level(logging.WARNING):
        pairs = Pairs(tmp_path, split="all", on_bad="skip", **SMALL)
    assert pairs.files == ["fine", "good"]
    reasons = dict(pairs.report.bad)
    assert reasons["brief"] == "shorter than the window of 0.80 s: 0.40 s in the input"
    assert reasons["square"] == "shapes differ: 48x96 in the input, 48x48 in the target"
    assert reasons["text"].startswith("unreadable: Invalid data")
    assert reasons["text"].endswith(" in the input")
    assert "2 files used" in caplog.text


def test_lengths_that_differ_are_counted_and_the_shorter_holds(tmp_path, caplog):
    pair(tmp_path, "a", source={"seconds": 1.2}, target={"seconds": 3})
    pair(tmp_path, "b", source={"seconds": 1.48})
    pair(tmp_path, "c")
    with caplog.at_level(logging.WARNING):
        pairs = Pairs(tmp_path, split="all", flip=0.0, **SMALL)
    assert "1 of 3 pairs in" in caplog.text
    assert "a (1.20 s and 3.00 s)" in caplog.text
    assert len(pairs) == 3
    for seed in range(12):
        item = pairs.draw(0, rng(seed))
        numbers = frame_numbers(item["video"].numpy())
        assert numbers[-1] <= 30
        assert frame_numbers(item["source"].numpy()) == numbers


def test_pairs_that_break_while_read_are_left_out(tmp_path):
    for name in ("a", "b"):
        pair(tmp_path, name)
    pairs = {how: Pairs(tmp_path, split="all", on_bad=how, **SMALL) for how in ("error", "skip")}
    (tmp_path / "input" / "a.mp4").write_bytes(b"gone")
    with pytest.raises(io.MediaError, match=r"input/a\.mp4"):
        pairs["error"][0]
    item = pairs["skip"][0]
    assert item["index"] == 1
    assert torch.equal(item["source"], pairs["skip"][1]["source"])
    assert pairs["skip"].report.bad == [("a", "found broken while being read")]


def test_wrong_lists_of_pairs_are_named(tmp_path):
    def refused(text, suffix=".csv"):
        (tmp_path / f"pairs{suffix}").write_text(text)
        with pytest.raises(ValueError, match=r"pair|target") as error:
            Pairs(pairs=tmp_path / f"pairs{suffix}")
        return str(error.value)

    assert "pair 1 of" in refused("input,output\na,b\n")
    assert "pair 2 of" in refused("input,target\na,b\nc,\n")
    assert "pairs.json is no json file" in refused("[{]", ".json")
    assert "is one of .csv, .json, .jsonl, not .txt" in refused("", ".txt")
    twice = '{"input": "a", "target": "c"}\n{"input": "b", "target": "c"}\n'
    assert "target c is in 2 pairs" in refused(twice, ".jsonl")
    with pytest.raises(
        ValueError, match=r"pair 1 of data\.train\.pairs has no input and no target"
    ):
        Pairs(pairs=["a.mp4"])


def test_pairs_are_configured(folder, tmp_path):
    words = ["data=pairs", "data.size=[16,32]", "data.frames=4", "data.num_workers=0"]
    tables(folder)
    for place in (f"data.root={folder}", f"data.train.pairs={folder / 'pairs.csv'}"):
        data = checkpoint.build(
            checkpoint.compose(["~exp", *words, place, "data.batch_size=2"]).data
        )
        assert data.train.request == data.val.request
        assert set(data.train.files) & set(data.val.files) == set()
        assert data.val.flip == 0
        data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1)
        (batch,) = islice(data.train_dataloader(), 1)
        assert batch.keys() == {"index", "position", "video", "source"}
        assert batch["source"].shape == batch["video"].shape == (2, 3, 4, 16, 32)
