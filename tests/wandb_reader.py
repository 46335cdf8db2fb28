"""What an offline W&B run holds, read with W&B's own reader."""

import json
import subprocess
import sys
from pathlib import Path


def inspect(folder: Path, *options: str) -> str:
    """What the reader prints; W&B leaves a log where it is called."""
    words = [sys.executable, "-m", "wandb", "leet", "inspect", *options, str(folder)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout


def records(folder: Path, kind: str) -> list[dict]:
    """The records of one kind (run, history, config, metric, ...) in a run's folder, in order."""
    lines = [json.loads(line) for line in inspect(folder, "--json").splitlines()]
    return [line[kind] for line in lines if line["type"] == kind]


def history(folder: Path) -> list[dict]:
    """The rows that were logged."""
    return [record["item"] for record in records(folder, "history")]


def summary(folder: Path) -> dict:
    """Everything the table of runs shows of a run: its config, metrics, state."""
    return json.loads(inspect(folder, "--summary", "--json"))
