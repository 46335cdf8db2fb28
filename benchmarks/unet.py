"""Speed and memory of the coupled U-Net, beside the rate of this machine's convolutions.

python benchmarks/unet.py
python benchmarks/unet.py --sizes tiny,small --dtype bf16 --compile
python benchmarks/unet.py --device cuda --dtype bf16 --json unet.json
python benchmarks/unet.py --sizes base --against unet.json

The forward pass is called as sampling calls it (eager or compiled), in bfloat16 with its weights
rounded beforehand; forward and backward together are as in training.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from machine import DTYPES, PeakMemory, Report, best_time, conv_rate, limits, options
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from avdiffusion import memory
from avdiffusion.nn.coupled_unet import CoupledUNet
from avdiffusion.systems.step import Step

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed"}
CONFIGS = Path(__file__).parents[1] / "configs" / "model" / "net"


class Operations(TorchDispatchMode):
    """Context that counts operations which are no views: on a GPU each starts a kernel or more."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        returns = (each.alias_info for each in operation._schema.returns)
        view = any(alias is not None and not alias.is_write for alias in returns)
        self.count += not view and operation._overloadpacket.__name__ != "_unsafe_view"
        return operation(*arguments, **(options or {}))


def net_config(size):
    """Arguments of a network of the configs."""
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{size}.yaml"))
    config.pop("_target_")
    return config


def flops_of(make, inputs):
    """Floating-point operations of one forward pass, counted without computing it."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        net = make()
        given, named = inputs(net, "meta")
        net(*given, **named)
    return counter.get_total_flops()


def figures(make, inputs, args, **step):
    """What is measured of the network that `make` makes, on `inputs(net, device)`: given, named.

    `step`: of how sampling calls it. Called in a process of its own, so that memory starts from
    nothing.
    """
    memory.keep_freed()
    device = torch.device(args.device)
    flops = flops_of(make, inputs)
    with PeakMemory(device) as peak:
        torch.manual_seed(0)
        net = make().to(device)
        given, named = inputs(net, device)

        def cast():
            if args.dtype == "fp32":
                return nullcontext()
            return torch.autocast(device.type, torch.bfloat16)

        def forward(call):
            with torch.no_grad():
                call(*given, **named)

        def train():
            net.zero_grad()
            with cast():
                outputs = net(*given, **named)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum(output.float().square().mean() for output in outputs).backward()

        chosen = {"precision": PRECISION[args.dtype], "capture": False, **step}
        call = Step(**chosen)(net)
        with Operations() as operations:
            forward(call)
        call = partial(forward, Step(**chosen, compile=args.compile)(net))
        seconds = best_time(call, device, args.repeats)
        del call  # and weights in bfloat16
        if args.compile:
            net.compile(dynamic=False)
        step_seconds = None if args.forward_only else best_time(train, device, args.repeats)
    speed = flops / seconds / 1e9
    rate = conv_rate(device, DTYPES[args.dtype])
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "gflop": flops / 1e9,
        "operations": operations.count,
        "forward_s": seconds,
        "forward_backward_s": step_seconds,
        "peak_mib": peak.mib,
        "gflop_per_s": speed,
        "conv_gflop_per_s": rate,
        "fraction_of_conv_rate": speed / rate,
    }


def measure(size, args):
    """One row of the table."""
    config, batch = net_config(size), args.batch
    config["checkpoint"] = args.checkpoint
    video = batch, config["video_channels"], args.frames, args.pixels, args.pixels
    audio = batch, config["audio_channels"], args.samples

    def inputs(net, device):
        clip = [torch.randn(shape, device=device) for shape in (video, audio)]
        shifts = torch.tensor(net.shift_ranges(args.frames), device=device) // 2
        return clip, {"time": torch.full((batch,), 500.0, device=device), "shifts": shifts}

    return {
        "size": size,
        "dtype": args.dtype,
        "mode": "compiled" if args.compile else "eager",
        "batch": batch,
        "checkpoint": args.checkpoint,
        **figures(partial(CoupledUNet, **config), inputs, args),
    }


def network_options(parser):
    """Adds how a network is computed, and how often."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--checkpoint",
        type=lambda text: (
            {"true": True, "false": False}.get(text) if text.isalpha() else float(text)
        ),
        default=False,
        help="activations computed again in the backward pass: true, or GiB that may be kept",
    )
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    options(parser)


def rows(measure, choices, args):
    """measure(choice, args) of every choice, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        for choice in choices:
            yield processes.submit(measure, choice, args).result()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="tiny,small,base")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--samples", type=int, default=25600)
    network_options(parser)
    args = parser.parse_args()

    report = Report("unet", vars(args))
    for row in rows(measure, args.sizes.split(","), args):
        report.add(row)
    report.limit(limits(torch.device(args.device), (args.dtype,)))
    report.finish(args)


if __name__ == "__main__":
    main()
