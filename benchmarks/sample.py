"""Clips a second and seconds of a clip while sampling, in every way the network can be called.

python benchmarks/sample.py                                    # the tiny network, eager, fp32
python benchmarks/sample.py --sizes small,base --dtypes fp32,bf16 --batches 1,8 --json sample.json
python benchmarks/sample.py --sizes base --device cuda --modes eager,compiled,captured
python benchmarks/sample.py --ckpt RUN_FOLDER --evaluations 100,20,15 --reuse 1,2:2 --num 24
python benchmarks/sample.py --sizes base --shares              # of which depth is how much work

Reuse is `interval:depth`. With --num the clips of each row are compared with those of the first
way: root mean square difference in deviations, and F1 of events with sound.
"""

import argparse
import copy
import itertools

import torch
from machine import DTYPES, PeakMemory, Report, best_time, conv_rate, options
from samplers import error, joined, named, scores
from torch.utils.flop_counter import FlopCounterMode

from avdiffusion import checkpoint
from avdiffusion.memory import keep_freed
from avdiffusion.systems.step import Step

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed"}
MODES = {
    "eager": {"capture": False},
    "compiled": {"capture": False, "compile": True},
    "captured": {"capture": True},
    "both": {"capture": True, "compile": True},
}


def systems(args):
    """(name, system): of the checkpoint, or untrained ones of these sizes."""
    if args.ckpt:
        yield args.ckpt.rstrip("/").split("/")[-1], checkpoint.load(args.ckpt, device=args.device)
        return
    for size in args.sizes.split(","):
        torch.manual_seed(0)
        words = ["~exp", f"model/net={size}", "data.size=[64,64]", "paths.run=run"]
        config = checkpoint.compose(words)
        yield size, checkpoint.build(config.model).eval().to(args.device)


def work(system, depth=None):
    """GFLOP of a clip's evaluation, whole and, with a depth, shallow; counted, not computed."""
    net = copy.deepcopy(system.model.net).to("meta")
    x = [v.to("meta") for v in system.latent(1).values()]
    inputs = {"time": torch.empty(1, device="meta")}
    inputs |= {name: value.to("meta") for name, value in system.shifts("work").items()}

    def count(**more):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            found = net(*x, **inputs, **more)
        return counter.get_total_flops() / 1e9, found

    if depth is None:
        return count()[0], None
    whole, found = count(depth=depth)
    return whole, count(depth=depth, kept=found[len(x) :])[0]


def reused(words):
    """interval:depth, or 1."""
    interval, _, depth = words.partition(":")
    return {"interval": int(interval)} | ({"depth": int(depth)} if depth else {})


def measure(name, system, args, report):
    """Rows of one network, every way it is called."""
    metrics = []
    if args.metrics:
        nodes = checkpoint.compose(["~exp", f"val_metrics=[{args.metrics}]"]).val_metrics
        metrics = [checkpoint.build(node) for node in nodes.values()]
    truth, device = None, torch.device(args.device)
    ways = (args.evaluations, args.dtypes, args.modes, args.reuse, args.batches)
    for steps, dtype, mode, reuse, batch in itertools.product(*(way.split(",") for way in ways)):
        step, batch = Step(precision=PRECISION[dtype], **MODES[mode], **reused(reuse)), int(batch)
        sampler = named(f"{args.sampler} steps={steps}")
        chosen = {"sampler": sampler, "seed": 0, "step": step}

        def sample(chosen=chosen, batch=batch):
            return list(system.samples(range(batch), micro_batch=batch, **chosen))

        with PeakMemory(device) as memory:
            calls = sample()[0].evaluations  # also compiles and captures
            seconds = best_time(sample, device, args.repeats)
        whole, shallow = work(system, step.depth if step.interval > 1 else None)
        most = -(-calls // step.interval)
        gflop = batch * (most * whole + (calls - most) * (shallow or 0))
        row = {
            "network": name,
            "dtype": dtype,
            "mode": mode,
            "reuse": reuse,
            "batch": batch,
            "evaluations": calls,
            "seconds": seconds,
            "clips_per_s": batch / seconds,
            "ms_per_evaluation": 1e3 * seconds / calls,
            "peak_mib": memory.mib,
            "gflop_per_s": gflop / seconds,
            "of_conv_rate": gflop / seconds / report.limits[f"conv_{dtype}_gflop_per_s"],
        }
        if args.num:
            parts = system.samples(range(args.num), micro_batch=min(args.num, 16), **chosen)
            clips = joined([part.clips for part in parts])
            truth = truth or clips
            apart = error(clips, truth, {k: float(v.std()) for k, v in truth.items()})
            row |= {f"error_{k}": v for k, v in apart.items()}
            row |= scores(clips, metrics, system.rates)
        report.add(row)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="tiny")
    parser.add_argument("--ckpt", help="a checkpoint or run folder instead of --sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", default="eager", help=",".join(MODES))
    parser.add_argument("--dtypes", default="fp32", help="fp32,bf16")
    parser.add_argument("--reuse", default="1", help="interval:depth, e.g. 1,2:2,3:2")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--sampler", default="dpm_solver_3m")
    parser.add_argument("--evaluations", default="15", help="steps of the sampler, e.g. 100,15,10")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--num", type=int, default=0, help="clips that are compared")
    parser.add_argument("--metrics", default="", help="of configs/val_metrics, e.g. toy_f1")
    parser.add_argument("--shares", action="store_true", help="only count the work of each depth")
    options(parser)
    args = parser.parse_args(words)
    report = Report("sample", vars(args))
    device = torch.device(args.device)
    if not args.shares:
        for dtype in args.dtypes.split(","):
            report.limit({f"conv_{dtype}_gflop_per_s": conv_rate(device, DTYPES[dtype])})
    for name, system in systems(args):
        if not args.shares:
            measure(name, system, args, report)
            continue
        for depth in range(system.model.net.deepest + 1):
            whole, shallow = work(system, depth)
            report.add(
                {"network": name, "depth": depth, "gflop": shallow, "of_whole": shallow / whole}
            )
    report.finish(args)


if __name__ == "__main__":
    keep_freed()
    main()
