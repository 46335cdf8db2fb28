"""Training steps of an experiment: what their time goes into, beside the machine's own rates.

python benchmarks/train.py                                        # the quickstart, on noise
python benchmarks/train.py exp=folder --nets tiny,small,base --batches 1
python benchmarks/train.py exp=folder model/net=small --batches 1,2,4 --modes eager,compiled
python benchmarks/train.py exp=landscape --precisions 32-true,bf16-mixed --json train.json
python benchmarks/train.py exp=landscape --batches double --checkpoint false,true
python benchmarks/train.py exp=folder data.root=DIR --data --against train.json

Batches are clips of noise in memory, or with --data what the experiment's loader delivers. All
words with = are those of train.py. `double`: batches of 1, 2, 4, ... as long as memory lasts.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import count, product
from time import perf_counter
from types import SimpleNamespace

import torch
from machine import PeakMemory, Report, conv_rate, copy_rate, matmul_rate, options

from avdiffusion import checkpoint, plan
from avdiffusion.memory import keep_freed, ran_out

KEYS = ("net", "batch", "precision", "mode", "checkpoint")


def measure(overrides, args, batch, net, precision, mode, recompute):
    """One row; called in a process of its own. None where memory does not suffice."""
    keep_freed()
    words = [*overrides, *([f"model/net={net}"] if net else [])]
    words += [f"data.batch_size={batch}", "data.micro_batch=null", "paths.run=."]
    words += [f"trainer.precision={precision}", f"compile={str(mode == 'compiled').lower()}"]
    words += [f"model.diffusion.net.checkpoint={recompute}"]
    if not args.data and not any("data.root=" in word for word in words):
        words.append("data.root=.")
    config, device = checkpoint.compose(words), torch.device(args.device)
    try:
        with PeakMemory(device) as memory:
            trial = plan.Trial(config, device)
            began = perf_counter()
            trial.step([trial.clips(batch)])
            first = perf_counter() - began
            steps = list(timed(trial, config, batch, args))
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        return None
    spans = plan.best(steps)
    whole = sum(spans.values())
    speed = plan.flops(config)[1] * batch / whole / 1e9
    dtype = trial.dtype or torch.float32
    rates = {"conv": conv_rate(device, dtype), "matmul": matmul_rate(device, dtype)}
    return {
        "experiment": config.name,
        "net": net,
        "batch": batch,
        "precision": precision,
        "mode": mode,
        "checkpoint": recompute,
        "data": "real" if args.data else "noise",
        "first_s": first,
        **{f"{name}_ms": value * 1e3 for name, value in spans.items()},
        "step_s": whole,
        "clips_per_s": batch / whole,
        "peak_mib": memory.mib,
        "gflop_per_s": speed,
        **{f"of_{name}": speed / rate for name, rate in rates.items()},
    }


def timed(trial, config, batch, args):
    """Seconds of the parts of single steps, the wait for their data among them."""
    if args.data:
        module = checkpoint.build(config.data)
        module.trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=0)
        source = iter(module.train_dataloader())
        next(source)  # which starts the workers
    else:
        clips = trial.clips(batch)
        source = (dict(clips) for _ in count())
    for _ in range(args.repeats):
        began = perf_counter()
        found = next(source)
        yield {"data": perf_counter() - began, **trial.step([found])}


def rows(args):
    """A row for every combination, each from a process that starts from nothing."""
    processes = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    for choice in product(args.nets, args.precisions, args.modes, args.checkpoint):
        doubling = args.batches == ["double"]
        for batch in (2**k for k in count()) if doubling else map(int, args.batches):
            row = processes.submit(measure, args.overrides, args, batch, *choice).result()
            if row is None:
                print(f"out of memory with {batch} clips, {', '.join(filter(None, choice))}")
                break
            yield row
            # A host out of memory does not say so: the system ends the process.
            free = plan.free(torch.device("cpu")) / 2**20
            if doubling and args.device == "cpu" and 2 * row["peak_mib"] > free:
                print(f"{2 * batch} clips may take more than the {free:,.0f} MiB that are free")
                break


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="as for train.py, such as exp=landscape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=words_of, default=["8"], help="such as 1,2,4, or double")
    parser.add_argument("--nets", type=words_of, default=[None], help="such as tiny,small,base")
    parser.add_argument("--precisions", type=words_of, default=["32-true"])
    parser.add_argument("--modes", type=words_of, default=["eager"], help="eager, compiled")
    parser.add_argument("--checkpoint", type=words_of, default=["false"], help="of activations")
    parser.add_argument("--data", action="store_true", help="from the experiment's own loader")
    parser.add_argument("--repeats", type=int, default=5)
    options(parser)
    args = parser.parse_intermixed_args(words)
    report = Report("train", vars(args))
    for row in rows(args):
        report.add(row)
    report.limit({"copy_gb_per_s": copy_rate(torch.device(args.device))})
    if report.rows:
        most = max(report.rows, key=lambda row: row["clips_per_s"])
        name = ", ".join(f"{k} {most[k]}" for k in KEYS if most[k] is not None)
        print(f"most clips a second: {most['clips_per_s']:.3g} with {name}")
    report.finish(args)


def words_of(text):
    return text.split(",")


if __name__ == "__main__":
    main()
