"""Loggers that write files: every row once, and no full disk stops a run."""

import csv
import logging
from pathlib import Path

import pytest
import pytorch_lightning as pl
from tiny_system import fit

from avdiffusion.callbacks import loggers
from avdiffusion.callbacks.loggers import Csv, TensorBoard
from avdiffusion.callbacks.record import Record


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


def test_a_run_that_goes_on_has_every_row_once(tmp_path):
    """A killed process wrote steps 2 and 3 again later, and half a row."""
    first = Csv(save_dir=tmp_path)
    for step in range(4):
        first.log_metrics({"train/loss": float(step), "val/loss": 0.5}, step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,0.12345,0.")
    second = Csv(save_dir=tmp_path)
    second.resume(1)
    assert [r["step"] for r in rows(tmp_path)] == ["0", "1"]
    second.log_metrics({"train/loss": 20.0}, 2)
    second.log_metrics({"val/loss": 21.0}, 2)
    second.log_metrics({"sample/avcorr": 30.0}, 3)
    assert [(r["step"], r["train/loss"]) for r in rows(tmp_path)] == [
        ("0", "0.0"),
        ("1", "1.0"),
        ("2", "20.0"),
        ("2", ""),
        ("3", ""),
    ]
    assert {r["sample/avcorr"] for r in rows(tmp_path)[:4]} == {""}
    assert [f.name for f in tmp_path.glob("*metrics*")] == ["metrics.csv"]


def test_what_is_logged_again_of_the_step_it_goes_on_from_replaces(tmp_path):
    first = Csv(save_dir=tmp_path)
    for step in (3, 4, 6):
        first.log_metrics({"train/loss": 1.0}, step)
    first.log_metrics({"sample/avcorr": 2.0}, 4)
    first.log_metrics({"val/loss": 3.0, "val/gap": 4.0}, 4)
    first.log_metrics({"val/loss": 5.0, "train/grad_norm": 6.0}, 4)
    second = Csv(save_dir=tmp_path)
    second.resume(4)
    second.log_metrics({"val/loss": 7.0, "val/gap": 8.0}, 4)
    second.log_metrics({"train/loss": 9.0}, 6)
    second.log_metrics({"sample/new": 10.0}, 6)
    assert [{k: v for k, v in row.items() if v} for row in rows(tmp_path)] == [
        {"step": "3", "train/loss": "1.0"},
        {"step": "4", "train/loss": "1.0"},
        {"step": "4", "sample/avcorr": "2.0"},
        {"step": "4", "train/grad_norm": "6.0"},
        {"step": "4", "val/loss": "7.0", "val/gap": "8.0"},
        {"step": "6", "train/loss": "9.0"},
        {"step": "6", "sample/new": "10.0"},
    ]


def test_rows_that_a_full_disk_keeps_are_removed_with_the_next(tmp_path, monkeypatch, caplog):
    first = Csv(save_dir=tmp_path)
    for step in range(1, 4):
        first.log_metrics({"train/loss": 1.0}, step)

    def full(*_):
        raise OSError(28, "No space left on device")

    second = Csv(save_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(loggers, "write_whole", full)
        second.resume(1)
    assert "No space left" in caplog.text
    second.log_metrics({"train/loss": 2.0}, 2)
    assert [(r["step"], r["train/loss"]) for r in rows(tmp_path)] == [("1", "1.0"), ("2", "2.0")]


def test_loggers_learn_where_training_goes_on(tmp_path):
    """Rows of steps that are taken again are gone before any other is written."""
    save = pl.callbacks.ModelCheckpoint(
        dirpath=tmp_path / "saved", every_n_train_steps=2, save_top_k=-1, filename="{step}"
    )
    first = Csv(save_dir=tmp_path)
    for step in (2, 3, 5):
        first.log_metrics({"train/loss": 1.0}, step)
    fit(save, steps=2)
    seen = []

    class See(pl.Callback):
        def on_train_start(self, trainer, *_):
            seen.extend(rows(tmp_path))

    record, ckpt = Record(folder=tmp_path, objective="val/loss"), tmp_path / "saved" / "step=2.ckpt"
    fit(record, See(), logger=[Csv(save_dir=tmp_path)], steps=4, ckpt=ckpt)
    assert [row["step"] for row in seen] == ["2"]


def test_a_full_disk_costs_one_line_and_no_row(tmp_path, monkeypatch, caplog):
    logger = Csv(save_dir=tmp_path)
    logger.log_metrics({"train/loss": 1.0}, 0)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "avdiffusion"):
        patch.setattr(Path, "open", full)
        logger.log_metrics({"train/loss": 2.0}, 1)
        logger.log_metrics({"train/loss": 3.0}, 2)
    (told,) = caplog.messages
    assert "metrics.csv cannot be written (training goes on)" in told
    assert "No space left" in told
    assert len(rows(tmp_path)) == 1
    logger.log_metrics({"train/loss": 4.0}, 3)
    assert [r["train/loss"] for r in rows(tmp_path)] == ["1.0", "2.0", "3.0", "4.0"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_half_a_row_is_taken_back(tmp_path):
    logger = Csv(save_dir=tmp_path)
    logger.log_metrics({"train/loss": 1.0}, 0)
    before = (tmp_path / "metrics.csv").read_bytes()

    class Half(type(tmp_path)):
        def open(self, mode="r", **options):
            file = super().open(mode, **options)
            write = file.write

            def half(data):
                write(data[:3])
                file.flush()
                raise OSError(28, "No space left on device")

            return Wrapped(file, half)

    class Wrapped:
        def __init__(self, file, write):
            self.file, self.write = file, write

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    rows_ = logger.experiment
    rows_.log_metrics({"train/loss": 2.0}, 1)
    with pytest.raises(OSError, match="No space"):
        rows_._write(Half(tmp_path / "metrics.csv"))
    assert (tmp_path / "metrics.csv").read_bytes() == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_hides_repeated_steps_and_survives_a_full_disk(tmp_path, caplog, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = TensorBoard(save_dir=tmp_path)
    for step in range(4):
        first.log_metrics({"train/loss": 1.0}, step)
    first.finalize("failed")
    second = TensorBoard(save_dir=tmp_path)
    second.resume(1)
    for step in range(2, 5):
        second.log_metrics({"train/loss": 2.0}, step)
    second.save()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert found == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        second.experiment.file_writer.event_writer._async_writer._writer, "write", full
    )
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        fit(logger=[second], steps=4)
    (told,) = [r.getMessage() for r in caplog.records if r.name == "avdiffusion"]
    assert "TensorBoard's files cannot be written (training goes on)" in told


def test_without_tensorboard_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install -e \"\.\[tensorboard\]\""):
        TensorBoard(save_dir=tmp_path)
