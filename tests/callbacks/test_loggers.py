"""Loggers need no account and stop no run."""

import csv
import logging
import sys

import pytest
from tiny_system import fit

from avdiffusion.callbacks import loggers
from avdiffusion.callbacks.loggers import Csv, logged_in, wandb_logger


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without a W&B account."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def rows(tmp_path):
    with (tmp_path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_csv_is_written_at_once_and_appended_to(tmp_path, recwarn):
    first = Csv(save_dir=tmp_path)
    first.log_metrics({"train/loss": 1.0}, 0)
    first.log_metrics({"val/loss": 2.0}, 1)
    assert [r["step"] for r in rows(tmp_path)] == ["0", "1"]
    Csv(save_dir=tmp_path).log_metrics({"train/loss": 0.5, "sample/avcorr": 0.1}, 2)
    assert [r["train/loss"] for r in rows(tmp_path)] == ["1.0", "", "0.5"]
    assert rows(tmp_path)[1]["val/loss"] == "2.0"
    assert rows(tmp_path)[2]["sample/avcorr"] == "0.1"
    assert not [w for w in recwarn if "not empty" in str(w.message)]


def test_login_is_looked_for_without_asking(tmp_path, nobody, monkeypatch):
    assert not logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "k" * 40)
    assert logged_in()
    (tmp_path / "netrc").write_text("machine example.org login user password x")
    assert not logged_in()
    (tmp_path / "netrc").write_text("nonsense {")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert logged_in()


def test_without_the_package_one_line_and_no_logger(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        assert wandb_logger(save_dir=tmp_path) is None
    assert len(caplog.messages) == 1
    assert "not installed" in caplog.text


def test_a_server_that_refuses_makes_the_run_offline(tmp_path, nobody, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    with caplog.at_level(logging.INFO, "avdiffusion"):
        fit(logger=[wandb_logger(save_dir=tmp_path)], steps=2)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert sum("cannot start in mode online" in m for m in caplog.messages) == 1
    assert sum("wandb sync" in m for m in caplog.messages) == 1


def test_a_logger_that_breaks_does_not_stop_the_run(tmp_path, nobody, monkeypatch, caplog):
    logger = wandb_logger(save_dir=tmp_path)
    run = logger.experiment

    def broken(*_, **__):
        raise BrokenPipeError("the service is gone")

    monkeypatch.setattr(run, "log", broken)
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        trainer, _ = fit(logger=[logger], steps=6)
    assert trainer.global_step == 6
    assert sum("the service is gone" in m for m in caplog.messages) == 1


def test_the_mode_can_be_set_from_outside(tmp_path, nobody, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    fit(logger=[wandb_logger(save_dir=tmp_path)], steps=2)
    assert not list(tmp_path.glob("wandb/*run-*"))


def test_building_a_logger_starts_no_run(tmp_path, nobody):
    logger = wandb_logger(save_dir=tmp_path / "quickstart" / "now", tags=["a"])
    assert logger._wandb_init["name"] == "quickstart/now"
    assert logger._experiment is None
    assert not list(tmp_path.glob("**/offline-run-*"))
    assert "wandb" in sys.modules
