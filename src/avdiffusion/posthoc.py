"""Averages of any width, put together after training from a run's step checkpoints.

python -m avdiffusion.posthoc RUN_FOLDER --sigma-rel 0.15
python -m avdiffusion.posthoc RUN_FOLDER --sigma-rel 0.15 --step 80000 --out wide.ckpt

The run was trained with `model/ema=power` (Karras et al. 2024a, section 3.2).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avdiffusion import checkpoint, run_folder
from avdiffusion.checkpoint import CheckpointError
from avdiffusion.systems.average import coefficients, gamma, places

POWER = "avdiffusion.systems.average.PowerEMA"
LIMIT = 0.1  # error of a profile that passes for the one asked for


def snapshots(run: str | Path) -> dict[int, Path]:
    """The step files of a run folder, by step."""
    folder = Path(run).parent if Path(run).name == "checkpoints" else Path(run)
    if not folder.is_dir():
        raise CheckpointError(f"no run folder at {run}")
    found = run_folder.checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no step checkpoints, such as step0001000.ckpt")
    return dict(sorted(found.items()))


def reconstruct(
    run: str | Path, sigma_rel: float, *, step: int | None = None, out: str | Path | None = None
) -> dict[str, Any]:
    """Writes a checkpoint of `step` (the last) with the average of a width; tells how it was made.

    `checkpoint.load` takes it like any other; there is no optimiser state in it to train on with.
    However many step files there are, only one network's weights are in memory.
    """
    files, goal = snapshots(run), gamma(sigma_rel)
    step = max(files) if step is None else step
    if step not in files:
        raise CheckpointError(f"{run} holds no checkpoint of step {step}, but of {_listed(files)}")
    files = {at: file for at, file in files.items() if at <= step}
    averages = {file: _averages(file) for file in files.values()}
    end = files[step]
    widths, updates = averages[end]
    for file, (other, _) in averages.items():
        if other != widths:
            raise CheckpointError(f"{file} holds averages of {other}, {end} of {widths}")
    factors, error = coefficients(
        [t for _, t in averages.values() for _ in widths],
        [gamma(width) for width in widths] * len(files),
        updates,
        goal,
    )
    if error > LIMIT:
        raise CheckpointError(
            f"steps {_listed(files)} make sigma_rel={sigma_rel:g} at step {step} only to within "
            f"{100 * error:.0f} %: it takes a run with more of them (callbacks.checkpoint.every, "
            "callbacks.checkpoint.keep=-1)"
        )

    content = checkpoint.read(end, mmap=True)
    rows = factors.reshape(len(files), -1).tolist()
    state = _combined(dict(zip(averages, rows, strict=True)), content["state_dict"])
    content["hyper_parameters"]["model"]["ema"]["sigma_rels"] = [sigma_rel]
    made = {"sigma_rel": sigma_rel, "step": step, "steps": list(files), "error": error}
    kept = {key: content[key] for key in ("avdiffusion", "hyper_parameters", "global_step")}
    path = Path(out or end.with_name(f"ema{sigma_rel:g}_{end.name}"))
    checkpoint.write({**kept, "state_dict": state, "posthoc": made}, path)
    return {**made, "file": path}


def _combined(rows: dict[Path, list[float]], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with its averages replaced by one, the sum of the files' times these factors."""
    names = [f"ema.{place}." for place in places(len(next(iter(rows.values()))))]
    state = {key: value for key, value in state.items() if not key.startswith(tuple(names[1:]))}
    total = {
        key: torch.zeros_like(value, dtype=torch.float64)
        for key, value in state.items()
        if key.startswith(names[0]) and value.is_floating_point()
    }
    for file, row in rows.items():
        stored = checkpoint.read(file, mmap=True)["state_dict"]
        for name, factor in zip(names, row, strict=True):
            for key, value in total.items():
                part = stored.get(name + key.removeprefix(names[0]))
                if part is None or part.shape != value.shape:
                    raise CheckpointError(f"{file} holds another network than the last one")
                value.add_(part, alpha=factor)
    return state | {key: value.to(state[key].dtype) for key, value in total.items()}


def _averages(file: Path) -> tuple[list[float], int]:
    """The widths of a checkpoint's averages, and how many updates they have seen."""
    content = checkpoint.read(file, mmap=True)
    ema = content["hyper_parameters"]["model"].get("ema")
    if not isinstance(ema, dict) or ema.get("_target_") != POWER:
        raise CheckpointError(
            f"{file} holds no averages to make others from: train with model/ema=power"
        )
    return list(ema["sigma_rels"]), int(content["state_dict"]["ema.step"])


def _listed(steps: dict[int, Path]) -> str:
    """The first and the last few."""
    words = [str(step) for step in steps]
    return ", ".join(words if len(words) <= 8 else [*words[:3], "...", *words[-3:]])


def _run(given: argparse.Namespace) -> None:
    made = reconstruct(given.run, given.sigma_rel, step=given.step, out=given.out)
    sys.stdout.write(
        f"{made['file']}: sigma_rel {given.sigma_rel:g} at step {made['step']}, from "
        f"{len(made['steps'])} step files; its profile to within {100 * made['error']:.2g} %\n"
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m avdiffusion.posthoc", description="The average of another width of a run."
    )
    parser.add_argument("run", help="a run folder, trained with model/ema=power")
    parser.add_argument("--sigma-rel", type=float, required=True, help="width, a share of the run")
    parser.add_argument("--step", type=int, help="where the average ends; the last step file")
    parser.add_argument("--out", help="file; ema<width>_step<step>.ckpt beside the step files")
    checkpoint.guarded(_run, parser.parse_args(words))


if __name__ == "__main__":
    main()
