"""A report in the loggers: figures everywhere, tables and clips in W&B."""

import csv
import json
from base64 import b64decode
from io import BytesIO

import av
import pytest
from small_report import small_entries, small_report
from wandb_reader import history

from avdiffusion.callbacks.evaluated import log_report
from avdiffusion.callbacks.loggers import Csv
from avdiffusion.callbacks.wandb_run import wandb_logger


@pytest.fixture
def logged(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    report = small_report()
    loggers = [Csv(save_dir=tmp_path), wandb_logger(save_dir=tmp_path)]
    log_report(loggers, report, small_entries(), {"samples": "a", "num": 80})
    return tmp_path, report


def test_every_figure_is_a_value_of_every_logger(logged):
    folder, _ = logged
    (row,) = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    assert float(row["eval/kvd"]) == 11.52
    assert float(row["eval/kvd_low"]) == 9.81
    assert float(row["eval/kvd_floor"]) == 0.62
    assert "eval/silent" not in row  # it has no value
    (run,) = folder.glob("wandb/offline-run-*")
    found = {key: value for row in history(run) for key, value in row.items()}
    assert found["eval/avcorr"] == 0.214


def test_wandb_holds_tables_and_clips_that_play(logged):
    folder, report = logged
    tables = [json.loads(file.read_text()) for file in folder.glob("wandb/**/table/**/*.json")]
    rows = {row[0]: row for table in tables for row in table["data"]}
    labels = {f["label"] for group in report["groups"] for f in group["figures"]}
    assert rows.keys() == labels
    (page,) = folder.glob("wandb/**/html/**/*.html")
    clips = page.read_text().split('src="data:video/mp4;base64,')[1:]
    assert clips
    with av.open(BytesIO(b64decode(clips[0].partition('"')[0]))) as file:
        assert file.streams.video
        assert file.streams.audio
