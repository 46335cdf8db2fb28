"""A table of runs, the best first.

python -m avdiffusion.runs runs                             # all runs
python -m avdiffusion.runs SWEEP_FOLDER                     # the points of a sweep
python -m avdiffusion.runs runs --sort seconds --columns run,lr,objective --csv runs.csv
"""

import argparse
import csv
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import time

from avdiffusion.run_folder import folders, is_better_larger, number, read, updated

FIXED = ("run", "status", "step", "max_steps", "best", "best_step", "objective", "seconds")
OTHERS = ("monitor", "objective_name", "starts", "started", "updated", "folder", "error")
SAMPLED = ("sample/toy_f1", "sample/avcorr")
WIDEST = 24  # characters of a value; names of runs are longer
HIDDEN = ("ckpt", "paths.runs")  # overrides that make no other run
MOST = 6  # overrides with a column of their own


def read_all(root: Path) -> tuple[list[dict], list[str]]:
    """A row for each run at or below `root`, and what could not be read."""
    problems = []
    rows = [read(folder, root, problems) for folder in sorted(folders(root))]
    return rows, [f"not readable: {problem}" for problem in problems]


def larger_is_better(rows: Iterable[dict]) -> bool:
    """Whether the objective of these runs is one of which more is better, by its name."""
    return any(is_better_larger(row["objective_name"]) for row in rows)


def ranked(rows: Iterable[dict], key: str = "objective", largest: bool = False) -> list[dict]:
    """Rows by a column, numbers before words before nothing; what failed has no objective."""
    numbers, words, rest = [], [], []
    for row in rows:
        value = cell(row, key)
        if value in (None, "") or (key == "objective" and row["status"] == "failed"):
            rest.append(row)
        else:
            (words if number(value) is None else numbers).append(row)
    numbers.sort(key=lambda row: number(cell(row, key)), reverse=largest)
    words.sort(key=lambda row: str(cell(row, key)), reverse=largest)
    return [*numbers, *words, *rest]


def cell(row: dict, column: str) -> object:
    """A row's value in a column, a metric, or an override by its full name or its last part."""
    for part in (row, row["metrics"], row["overrides"]):
        if column in part:
            return part[column]
    short = [v for k, v in row["overrides"].items() if k.rpartition(".")[2] == column]
    return short[0] if len(short) == 1 else None


def columns(rows: Sequence[dict]) -> list[str]:
    """What the table of these runs shows: of the overrides those in which they differ."""
    keys = dict.fromkeys(key for row in rows for key in row["overrides"])
    values = {key: {row["overrides"].get(key) for row in rows} for key in keys}
    differing = [k for k in keys if len(values[k]) > 1 and k not in (*HIDDEN, *FIXED)]
    sampled = [key for key in SAMPLED if any(key in row["metrics"] for row in rows)]
    best = ["best", "best_step"] if any(row["best"] is not None for row in rows) else []
    shown = ["status", "step", *best, *sampled, "objective", "seconds"]
    if len(differing) > MOST:
        return ["run", *shown, "overrides"]
    return ["run", *differing, *shown]


def table(rows: Sequence[dict], chosen: Sequence[str], width: int | None = None) -> str:
    """Rows as aligned text; to fit `width` characters, first the names of the runs are cut."""
    lines = [[title(column, rows, chosen) for column in chosen]]
    lines += [[text(row, column) for column in chosen] for row in rows]
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    excess = sum(sizes) + 2 * (len(sizes) - 1) - (width or sum(sizes) * 2)
    if excess > 0 and "run" in chosen:
        at = chosen.index("run")
        sizes[at] = max(sizes[at] - excess, 12)
        for line in lines:
            line[at] = cut(line[at], sizes[at])
    left = [all(number(each) is None for each in column[1:]) for column in zip(*lines, strict=True)]
    for line in lines:
        for at, size in enumerate(sizes):
            line[at] = line[at].ljust(size) if left[at] else line[at].rjust(size)
    return "\n".join("  ".join(line).rstrip()[:width] for line in lines)


def title(column: str, rows: Sequence[dict], chosen: Sequence[str]) -> str:
    """The head of a column: the metric's name, or the last part of an override's."""
    metric = {"best": "monitor", "objective": "objective_name"}.get(column)
    names = {row[metric] for row in rows} if metric else set()
    if len(names) == 1 and names != {None}:
        return f"best {names.pop()}" if column == "best" else names.pop()
    if column in ("best_step", "seconds"):
        return {"best_step": "at", "seconds": "time"}[column]
    short = column.rpartition(".")[2]
    return short if sum(c.rpartition(".")[2] == short for c in chosen) == 1 else column


def text(row: dict, column: str) -> str:
    """A cell as the table shows it."""
    value = cell(row, column)
    if value is None:
        return "-"
    if column == "overrides":
        shown = {key.rpartition(".")[2]: v for key, v in value.items() if key not in HIDDEN}
        return " ".join(f"{key}={v}" for key, v in shown.items())
    if column == "seconds":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    if column == "step":
        return f"{value}/{row['max_steps']}" if row["max_steps"] else str(value)
    if column == "status" and value == "running":
        age = max(time() - updated(row["folder"]), 0)
        units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
        seconds, unit = next((each for each in units if age >= each[0]), units[-1])
        return f"running, {age / seconds:.0f} {unit} ago"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if column == "run" else cut(str(value), WIDEST)


def cut(text: str, size: int) -> str:
    """The beginning and the end of a text that is too long."""
    end = (size - 1) // 2
    return text if len(text) <= size else f"{text[: size - 1 - end]}…{text[len(text) - end :]}"


def report(
    rows: Sequence[dict],
    chosen: Sequence[str],
    notes: Sequence[str] = (),
    *,
    largest: bool,
    width: int | None = None,
) -> str:
    """The table, below it why runs failed, notes, and in the last line the best run."""
    errors = [f"{row['run']}: {row['error']}" for row in rows if row["error"]]
    lines = [table(rows, chosen, width), "", *errors, *notes, verdict(rows, largest)]
    return "\n".join(lines)


def verdict(rows: Sequence[dict], largest: bool) -> str:
    """The best of these runs and its checkpoint, in a line."""
    best = ranked(rows, largest=largest)[0]
    if best["objective"] is None or best["status"] == "failed":
        return "none of these runs has an objective yet"
    names = dict.fromkeys(str(row["objective_name"]) for row in rows if row["objective_name"])
    if len(names) > 1:
        return f"no best run: the objectives differ ({', '.join(names)})"
    files = [Path(best["folder"], "checkpoints", f"{name}.ckpt") for name in ("best", "last")]
    files = [str(file) for file in files if file.is_file()]
    where = files[0] if files else f"{best['folder']} (no checkpoint)"
    return f"best: {best['run']}, {best['objective_name']} {best['objective']:.4g}: {where}"


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """All that is known of these runs; written beside its place and renamed."""
    overrides = dict.fromkeys(key for row in rows for key in row["overrides"] if key not in FIXED)
    metrics = sorted({key for row in rows for key in row["metrics"]})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", newline="") as file:
        names = [*FIXED, *overrides, *metrics, *OTHERS]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row["overrides"], **row["metrics"], **row} for row in rows)
    os.replace(part, path)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m avdiffusion.runs", description="A table of the runs in a folder."
    )
    parser.add_argument("root", type=Path, help="a sweep's, an experiment's or any folder of runs")
    parser.add_argument("--sort", default="objective", help="by a column, metric or override")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument("--best", choices=("min", "max"), help="what is better of the objective")
    parser.add_argument("--columns", help="their names, with commas: also metrics and overrides")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="all columns, to a file")
    parser.add_argument("--all", action="store_true", help="also what ended before training")
    given = parser.parse_args(words)
    if not given.root.is_dir():
        raise SystemExit(f"error: no folder: {given.root}")
    found, problems = read_all(given.root)
    rows = [row for row in found if given.all or row["status"] != "not begun"]
    hidden = f"{len(found) - len(rows)} more ended before training began; --all shows them"
    if not rows:
        raise SystemExit(f"error: no runs in {given.root}" + (f"; {hidden}" if found else ""))
    if given.sort != "objective" and all(cell(row, given.sort) is None for row in rows):
        raise SystemExit(f"error: --sort {given.sort}: none of these runs has it")
    largest = larger_is_better(rows) if given.best is None else given.best == "max"
    rows = ranked(rows, given.sort, (given.sort == "objective" and largest) != given.reverse)
    notes = [*problems, *([hidden] if len(rows) < len(found) else [])]
    chosen = given.columns.split(",") if given.columns else columns(rows)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    sys.stdout.write(report(rows, chosen, notes, largest=largest, width=width) + "\n")
    if given.csv:
        write_csv(given.csv, rows)


if __name__ == "__main__":
    main()
