"""A sweep goes on when one of its points fails, and ends with its table."""

import logging
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hydra.experimental.callback import Callback

from avdiffusion import run_folder, runs

log = logging.getLogger("avdiffusion")


class PointFailed(RuntimeError):
    """What ended a point of a sweep: a folder and a message, which can be sent by a worker."""

    def __init__(self, folder: str, message: str):
        super().__init__(folder, message)
        self.folder, self.message = folder, message

    def __str__(self) -> str:
        return f"{Path(self.folder).name}: {self.message}"


class Point:
    """A point of a sweep: an error inside is written to its log and record, and is `PointFailed`.

    Hydra then runs the other points and raises the first error at the end. A signal or Ctrl-C is no
    error and ends the sweep. `known` are errors whose `message` is all there is to say.
    """

    def __init__(self, folder: str, *, known: tuple, message: Callable[[BaseException], str]):
        self.folder, self.known, self.message = folder, known, message

    def __enter__(self) -> Self:
        if multiprocessing.get_start_method() == "loky":
            # joblib's way to start processes, which a DataLoader's workers cannot be started in
            usual = multiprocessing.get_all_start_methods()[0]
            multiprocessing.set_start_method(usual, force=True)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception):
            return
        text = self.message(error)
        if not isinstance(error, self.known):
            text = f"{type(error).__name__}: {text}"
        trace = None if isinstance(error, self.known) else (kind, error, trace)
        log.error("error: %s", text, exc_info=trace)
        if is_run(Path(self.folder)):
            run_folder.fail(self.folder, text)
        raise PointFailed(self.folder, text) from error


class Table(Callback):
    """Hydra's callback that shows the table of a sweep when its last point is done."""

    def on_multirun_end(self, config: Any, **_: object) -> None:
        show(config.hydra.sweep.dir)


def show(folder: str | Path) -> None:
    """Writes the table of a sweep."""
    rows, notes = runs.read_all(Path(folder))
    if rows:
        largest = runs.larger_is_better(rows)
        rows = runs.ranked(rows, largest=largest)
        table = runs.report(rows, runs.columns(rows), notes, largest=largest)
        sys.stdout.write(f"\n{table}\n")
        sys.stdout.flush()


def ended(error: PointFailed) -> str:
    """What to say of a sweep with failed points, `error` the first of them; shows its table."""
    folder = Path(error.folder)
    if not is_run(folder):  # of sample.py, whose points have no folder of their own
        return error.message
    show(folder.parent)
    rows, _ = runs.read_all(folder.parent)
    failed = sorted(row["run"] for row in rows if row["status"] == "failed")
    if len(failed) < 2:
        return str(error)
    return f"{len(failed)} of {len(rows)} points failed: {', '.join(failed)}; {error}"


def is_run(folder: Path) -> bool:
    """Whether Hydra has made this folder for a run of train.py."""
    return (folder / run_folder.OVERRIDES).is_file()
