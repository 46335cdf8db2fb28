"""Speed and memory of the coupled U-Net, beside the rate of this machine's convolutions.

python benchmarks/unet.py
python benchmarks/unet.py --sizes tiny,small --dtype bf16 --compile
python benchmarks/unet.py --device cuda --dtype bf16 --json unet.json
"""

import argparse
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from avdiffusion.nn.coupled_unet import CoupledUNet

CONFIGS = Path(__file__).parents[1] / "configs" / "model" / "net"
# 3x3 convolutions of the published network: channels in, channels out, pixels
CONVS = [(128, 128, 64), (384, 128, 64), (256, 256, 32), (640, 256, 32)]
CONVS += [(384, 384, 16), (896, 384, 16), (512, 512, 8), (1024, 512, 8)]


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def best_time(function, device, repeats):
    """Seconds of the fastest of `repeats` calls, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def conv_rate(device, dtype):
    """FLOP-weighted rate of the published network's 3x3 convolutions on 16 frames, in GFLOP/s."""
    flops = seconds = 0
    for inputs, outputs, size in CONVS:
        x = torch.randn(16, inputs, size, size, device=device, dtype=dtype)
        w = torch.randn(outputs, inputs, 3, 3, device=device, dtype=dtype)
        x, w = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, w))
        seconds += best_time(lambda x=x, w=w: F.conv2d(x, w, padding=1), device, 3)
        flops += 2 * 9 * inputs * outputs * 16 * size**2
    return flops / seconds / 1e9


class PeakMemory:
    """Context whose `mib` is the most memory taken inside it above what was held at its start."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            self.start = self.peak = resident()
            self.done = threading.Event()
            self.watch = threading.Thread(target=self.poll, daemon=True)
            self.watch.start()
        return self

    def poll(self):
        while not self.done.wait(0.005):
            self.peak = max(self.peak, resident())

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.done.set()
            self.watch.join()
        self.mib = (self.peak - self.start) / 2**20


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def flops_of(config, shapes):
    """Floating-point operations of one forward pass, counted without computing it."""
    with torch.device("meta"):
        net, inputs = CoupledUNet(**config), [torch.empty(shape) for shape in shapes]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(*inputs, time=torch.empty(shapes[0][0]))
    return counter.get_total_flops()


def measure(size, args):
    """One row of the table; called in a process of its own, so that memory starts from nothing."""
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{size}.yaml"))
    config.pop("_target_")
    device, batch = torch.device(args.device), args.batch
    channels, frames, pixels, samples = (
        config["video_channels"], args.frames, args.pixels, args.samples,
    )  # fmt: skip
    shapes = [(batch, channels, frames, pixels, pixels), (batch, config["audio_channels"], samples)]
    flops = flops_of(config, shapes)
    with PeakMemory(device) as memory:
        torch.manual_seed(0)
        net = CoupledUNet(**config).to(device)
        video, audio = (torch.randn(shape, device=device) for shape in shapes)
        steps = torch.full((batch,), 500.0, device=device)
        shifts = torch.tensor(net.shift_ranges(frames), device=device) // 2

        def cast():
            if args.dtype == "fp32":
                return nullcontext()
            return torch.autocast(device.type, torch.bfloat16)

        if args.compile:
            net.compile()

        def forward():
            with torch.no_grad(), cast():
                net(video, audio, time=steps, shifts=shifts)

        def step():
            net.zero_grad()
            with cast():
                outputs = net(video, audio, time=steps, shifts=shifts)
            sum(output.float().square().mean() for output in outputs).backward()

        seconds = best_time(forward, device, args.repeats)
        step_seconds = None if args.forward_only else best_time(step, device, args.repeats)
    speed = flops / seconds / 1e9
    rate = conv_rate(device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    return {
        "size": size,
        "parameters": sum(p.numel() for p in net.parameters()),
        "gflop": flops / 1e9,
        "forward_s": seconds,
        "forward_backward_s": step_seconds,
        "peak_mib": memory.mib,
        "gflop_per_s": speed,
        "conv_gflop_per_s": rate,
        "fraction_of_conv_rate": speed / rate,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="tiny,small,base")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--samples", type=int, default=25600)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()

    print(
        f"{args.device} {args.dtype} {'compiled' if args.compile else 'eager'}, "
        f"batch {args.batch} of {args.frames}x{args.pixels}x{args.pixels} and {args.samples} "
        f"samples, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(
        f"{'size':6} {'parameters':>11} {'GFLOP':>8} {'forward':>9} {'+backward':>9} "
        f"{'peak memory':>11} {'GFLOP/s':>8} {'conv2d':>8} {'fraction':>8}"
    )
    rows = []
    processes = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    for size in args.sizes.split(","):
        row = processes.submit(measure, size, args).result()
        rows.append(row)
        print(
            f"{size:6} {row['parameters']:11,} {row['gflop']:8.1f} {row['forward_s']:7.3f} s "
            f"{row['forward_backward_s'] or float('nan'):7.3f} s {row['peak_mib']:7.0f} MiB "
            f"{row['gflop_per_s']:8.0f} {row['conv_gflop_per_s']:8.0f} "
            f"{row['fraction_of_conv_rate']:8.0%}",
            flush=True,
        )
    if args.json:
        args.json.write_text(
            json.dumps({"arguments": vars(args), "rows": rows}, default=str, indent=1)
        )


if __name__ == "__main__":
    main()
