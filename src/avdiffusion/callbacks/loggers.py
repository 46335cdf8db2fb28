"""Loggers that write files of the run folder, and that a full disk does not turn into an error."""

import csv
import io
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only

from avdiffusion.writer import write_whole

log = logging.getLogger("avdiffusion")


class Once:
    """Turns errors of the disk into one warning: `with once("what failed"):`."""

    def __init__(self):
        self.said = set()

    @contextmanager
    def __call__(self, what: str, *errors: type[BaseException]) -> Iterator[None]:
        """Inside, an OSError and `errors` are said, the first time, and otherwise passed over."""
        try:
            yield
        except (OSError, *errors) as error:
            if what not in self.said:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                log.warning("%s (training goes on): %s", what, reason)
            self.said.add(what)


class Csv(CSVLogger):
    """`metrics.csv` in the run folder, written row by row.

    A run that goes on appends to it, without what is logged again.
    """

    def __init__(self, *, save_dir: str | Path):
        super().__init__(save_dir, name=None, version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _Rows(log_dir=self.log_dir)
        return self._experiment

    def log_hyperparams(self, *_: object) -> None:
        """Nothing: `config.yaml` lies beside `metrics.csv`."""

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Removes the rows of steps after `step`, which are taken again.

        What is logged at `step` from now on, such as its validation, replaces what is there.
        """
        self.experiment.resume(step)


class _Rows(ExperimentWriter):
    """Rows wait in memory until the disk takes them; Lightning's writer deletes what it finds."""

    def __init__(self, log_dir: str):
        super().__init__(log_dir=log_dir)
        self.once, self.start, self.continued = Once(), math.inf, False

    def _check_log_dir_exists(self) -> None:
        """Nothing: a folder that is not empty is a run that goes on."""

    def resume(self, step: int) -> None:
        """See `Csv`."""
        self.start, self.continued = step, False
        if Path(self.metrics_file_path).is_file():
            self._save()

    def save(self) -> None:
        if self.metrics:
            self._save()

    def _save(self):
        with self.once(f"{self.metrics_file_path} cannot be written"):
            self._write(Path(self.metrics_file_path))
            self.metrics = []

    def _write(self, path):
        new = set().union(*self.metrics) - set(self.metrics_keys)
        again = set().union(*(row for row in self.metrics if row["step"] == self.start))
        if new or again or not self.continued or not path.is_file():
            columns, rows = _whole_rows(path)
            if not self.continued:
                rows = [row for row in rows if int(row["step"]) <= self.start]
            rows = _without(again - {"step"}, self.start, rows) if again else rows
            columns = sorted({*columns, *new, *self.metrics_keys})
            write_whole(path, _text(columns, [*rows, *self.metrics], header=True))
            self.metrics_keys, self.continued = columns, True
            return
        size, text = path.stat().st_size, _text(self.metrics_keys, self.metrics)
        try:
            with path.open("ab") as file:
                file.write(text)
        except OSError:
            os.truncate(path, size)  # half a row would spoil the next one
            raise


def _text(columns, rows, header=False):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def _whole_rows(path):
    """(columns, rows) of a file without the half row that a kill may leave at its end."""
    if not path.is_file():
        return [], []
    text = path.read_text()
    reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    whole = [r for r in reader if None not in (*r, *r.values()) and r.get("step", "").isdigit()]
    return list(reader.fieldnames or []), whole


def _without(columns, step, rows):
    """The rows, those of `step` without some columns and without rows that hold nothing else."""
    for row in rows:
        if int(row["step"]) != step:
            yield row
            continue
        rest = {key: value for key, value in row.items() if value and key not in columns}
        if rest.keys() != {"step"}:
            yield rest


class TensorBoard(TensorBoardLogger):
    """TensorBoard's files in `save_dir/tensorboard`; a run that goes on hides what it repeats."""

    def __init__(self, *, save_dir: str | Path):
        if find_spec("tensorboard") is None:
            raise ValueError(
                'logger=tensorboard needs a package: pip install -e ".[tensorboard]", '
                "or choose logger=csv"
            )
        super().__init__(save_dir, name="tensorboard", version="", default_hp_metric=False)
        self.once = Once()

    @contextmanager
    def tolerant(self) -> Iterator[None]:
        """A disk that is full becomes one line."""
        with self.once("TensorBoard's files cannot be written"):
            yield

    @rank_zero_only
    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        with self.tolerant():
            for name, value in metrics.items():  # Lightning's own hides what went wrong
                self.experiment.add_scalar(name, float(value), step)

    @rank_zero_only
    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        with self.tolerant():
            super().log_hyperparams(*args, **kwargs)

    @rank_zero_only
    def save(self) -> None:
        with self.tolerant():
            super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with self.tolerant():
            super().finalize(status)

    @rank_zero_only
    def resume(self, step: int) -> None:
        """TensorBoard passes over what earlier files hold of steps after `step`."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        with self.tolerant():
            self.experiment.file_writer.add_event(Event(session_log=start), step + 1)
