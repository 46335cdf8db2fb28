"""What a run folder tells of its run: `run.json`, `metrics.csv`, `config.yaml`, its overrides."""

import csv
import json
import os
import re
from datetime import datetime
from math import isfinite
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one run folder
    fcntl = None

RECORD, METRICS, CONFIG = "run.json", "metrics.csv", "config.yaml"
OVERRIDES = ".hydra/overrides.yaml"
STEP = re.compile(r"step(\d+)\.ckpt")
LARGER = ("avcorr", "f1", "psnr", "ssim")  # in the names of metrics of which more is better


def folders(root: str | Path) -> list[Path]:
    """Run folders at or below `root`, the one written to last first."""
    found = []
    for place, names, files in os.walk(root):
        if RECORD in files or METRICS in files or ".hydra" in names:
            found.append(Path(place))
            names.clear()
        names[:] = [name for name in names if not name.startswith(".")]
    return sorted(found, key=updated, reverse=True)


def updated(folder: str | Path) -> float:
    """When a run last wrote to its records, in seconds since 1970."""
    files = [Path(folder, name) for name in (RECORD, METRICS, OVERRIDES)]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def status(folder: str | Path) -> dict:
    """What `run.json` of a run says; {} if there is none, or only half of one."""
    return _record(Path(folder), [])


def config(folder: str | Path) -> dict:
    """The resolved config of a run; {} if there is none, or only half of one."""
    return _yaml(Path(folder, CONFIG), dict, [])


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """The step files of a run, by step, the last one first."""
    found = {f: STEP.fullmatch(f.name) for f in Path(folder, "checkpoints").glob("step*.ckpt")}
    steps = {int(match[1]): file for file, match in found.items() if match}
    return dict(sorted(steps.items(), reverse=True))


def hold(folder: str | Path) -> object:
    """Keeps other processes from training in this folder for as long as the result lives."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder, ".lock").open("w")  # noqa: SIM115
    if fcntl is not None:
        try:
            # a lock of the process: workers don't inherit it, and a kill releases it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process is training in {folder}") from error
    return file


def held(folder: str | Path) -> bool:
    """Whether another process trains in this folder, or this one may not."""
    try:
        hold(folder).close()
    except (ValueError, OSError):
        return True
    return False


def fail(folder: str | Path, error: str) -> None:
    """Notes why a run failed in its `run.json`, which is made if training had not begun.

    A run that is finished, or that another process trains, is left alone.
    """
    path, content = Path(folder, RECORD), status(folder)
    if content.get("status") == "finished" or held(folder):
        return
    content = {"name": path.parent.name, **content, "status": "failed", "error": error}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


def read(folder: Path, root: Path, problems: list[str]) -> dict:
    """Everything known of a run, as a row; what cannot be read is added to `problems`.

    `objective` is the last value of the metric the run is judged by, `best` the best one of the
    metric its checkpoints are chosen by. `metrics` and `overrides` are dicts.
    """
    record, curves = _record(folder, problems), _curves(folder, problems)
    config = _yaml(folder / CONFIG, dict, problems)
    goal = _part(record, "objective") or {"name": config.get("objective", "val/loss")}
    best = _part(record, "best")
    monitor = best.get("monitor", "val/loss")
    metrics = {key: points[-1][1] for key, points in curves.items()}
    metrics = {k: v for k, v in metrics.items() if k.startswith(("val/", "sample/"))}
    metrics |= _part(record, "metrics")
    best = best or _best(curves, monitor)
    steps = [step for points in curves.values() for step, _ in points]
    written = datetime.fromtimestamp(updated(folder)).astimezone().isoformat(timespec="seconds")
    return {
        "run": folder.name if folder == root else str(folder.relative_to(root)),
        "status": record.get("status", "unknown" if curves else "not begun"),
        "step": record.get("step", max(steps, default=None)),
        "max_steps": record.get("max_steps", _part(config, "trainer").get("max_steps")),
        "best": best.get("value"),
        "best_step": best.get("step"),
        "monitor": monitor,
        "objective": number(goal.get("value", metrics.get(goal.get("name")))),
        "objective_name": goal.get("name"),
        "seconds": number(record.get("seconds")),
        "starts": record.get("starts"),
        "started": record.get("started"),
        "updated": record.get("updated", written),
        "folder": str(folder),
        "error": record.get("error"),
        "metrics": metrics,
        "overrides": _overrides(folder, problems),
    }


def is_better_larger(metric: str | None) -> bool:
    """Whether more of a metric is better; of losses and distances, less is."""
    return any(part in (metric or "") for part in LARGER)


def number(value: object) -> float | None:
    """A value as a finite number, None if it is none."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if isfinite(value) else None


def _record(folder, problems):
    path = folder / RECORD
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path} ({error})")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path} (no record of a run)")
        return {}
    return content


def _part(content, key):
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _yaml(path, kind, problems):
    if not path.is_file():
        return kind()
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        problems.append(f"{path} ({str(error).splitlines()[0]})")
        return kind()
    return content if isinstance(content, kind) else kind()


def _overrides(folder, problems):
    """Key (or config group) to value of what was given on the command line."""
    words = _yaml(folder / OVERRIDES, list, problems)
    pairs = (str(word).lstrip("+").partition("=") for word in words)
    return {key: value for key, _, value in pairs}


def _curves(folder, problems):
    """(step, value) pairs of every metric of `metrics.csv`."""
    path, curves = folder / METRICS, {}
    if not path.is_file():
        return curves
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                step = number(row.pop("step", None))
                for key, text in row.items():
                    value = number(text) if key else None
                    if value is not None and step is not None:
                        curves.setdefault(key, []).append((int(step), value))
    except (OSError, ValueError, csv.Error) as error:
        problems.append(f"{path} ({error})")
    return curves


def _best(curves, monitor):
    if monitor not in curves:
        return {}
    sign = -1 if is_better_larger(monitor) else 1
    step, value = min(curves[monitor], key=lambda point: sign * point[1])
    return {"step": step, "value": value}
