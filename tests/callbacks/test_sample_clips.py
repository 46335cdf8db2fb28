"""Clips while training: in the run folder and in every logger."""

import csv
import json
import logging
import re
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
from pytorch_lightning.loggers import TensorBoardLogger
from tiny_system import fit

from avdiffusion.callbacks.loggers import Csv, wandb_logger
from avdiffusion.callbacks.publish import BUDGET, players
from avdiffusion.callbacks.samples import SampleClips
from avdiffusion.gallery import Entry

av = pytest.importorskip("av")


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without a W&B account."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def clips(tmp_path, **options):
    return SampleClips(out=tmp_path / "samples", **{"every": 2, "num": 2, "toy": True, **options})


def has_sound(data):
    with av.open(BytesIO(data)) as file:
        assert file.streams.video[0].frames == 16
        wave = np.concatenate([f.to_ndarray() for f in file.decode(audio=0)], 1)
    return np.abs(wave).max() > 0.1


def test_clips_scalars_and_summary(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "avdiffusion"):
        trainer, system = fit(
            clips(tmp_path, final_num=10, seed=5), logger=[Csv(save_dir=tmp_path)], steps=5
        )
    assert system.asked == [(2, [0, 1], 5), (4, [0, 1], 5), (5, list(range(10)), 5)]
    names = {f.name for f in (tmp_path / "samples").iterdir()}
    assert names == {"step0000002", "step0000004", "final"}
    files = {f.name for f in (tmp_path / "samples" / "step0000004").iterdir()}
    assert {"000001.mp4", "000001.wav", "000001.png", "contact.png", "gallery.html"} < files
    record = json.loads((tmp_path / "samples" / "final" / "samples.json").read_text())
    assert record["settings"]["seed"] == 5
    assert record["settings"]["step"] == 5
    assert record["scores"]["toy_f1"]["generated"] > 0.8
    assert record["scores"]["toy_f1"]["mismatched"] < 0.5
    assert record["scores"]["toy_f1"]["real"] > 0.8

    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows = {int(r["step"]): r for r in rows if r.get("sample/avcorr")}
    assert sorted(rows) == [2, 4, 5]
    for name in ("avcorr", "avcorr_mismatched", "avcorr_real", "toy_f1", "toy_f1_real"):
        assert rows[5][f"sample/{name}"]
    assert float(trainer.callback_metrics["sample/toy_f1"]) > 0.8

    told = caplog.messages[-1]
    assert str(tmp_path / "samples" / "final" / "gallery.html") in told
    assert re.search(r"AVCorr.* 0\.\d{3} +-?0\.\d{3} +0\.\d{3}", told)
    assert max(map(len, told.splitlines()[1:])) < 100


def test_the_last_step_is_sampled_once(tmp_path):
    _, system = fit(clips(tmp_path, sync=False), steps=4)
    assert [step for step, *_ in system.asked] == [2, 4]
    assert not (tmp_path / "samples" / "step0000004").exists()
    _, system = fit(clips(tmp_path, sync=False, final_num=0), steps=4)
    assert [step for step, *_ in system.asked] == [2, 4]
    assert (tmp_path / "samples" / "step0000004").exists()


def test_wandb_offline_keeps_clips_that_play_with_sound(tmp_path, nobody, caplog):
    with caplog.at_level(logging.INFO, "avdiffusion"):
        logger = wandb_logger(save_dir=tmp_path)
        fit(clips(tmp_path), logger=[logger], steps=4)
    pages = list(tmp_path.glob("wandb/offline-run-*/files/media/html/**/*.html"))
    assert len(pages) == 2
    found = re.findall(r'src="data:video/mp4;base64,([^"]+)"', pages[0].read_text())
    assert len(found) == 2
    assert all(has_sound(b64decode(mp4)) for mp4 in found)
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == 2
    assert sum("wandb sync" in message for message in caplog.messages) == 1
    import wandb

    assert wandb.run is None


def test_tensorboard_shows_strips_clips_and_sound(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    fit(clips(tmp_path), logger=[logger], steps=2)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"sample/strips", "sample/000000", "sample/000001"} <= set(events.Tags()["images"])
    assert events.Images("sample/000000")[0].encoded_image_string[:6] == b"GIF89a"
    assert "sample/000001" in events.Tags()["audio"]
    assert "sample/avcorr" in events.Tags()["scalars"]


def test_a_page_for_wandb_stays_within_its_budget():
    entries = [Entry(f"{i:06d}", "", b"x" * 400_000) for i in range(20)]
    page = players(entries, BUDGET)
    assert len(page) <= BUDGET
    assert "11 more" in page
