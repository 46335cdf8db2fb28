"""Speed and memory of frame super-resolution, beside the rate of this machine's convolutions.

python benchmarks/superres.py                            # the published network, one frame at once
python benchmarks/superres.py --frames 1,4,16 --dtype bf16
python benchmarks/superres.py --sizes sr_tiny,sr_small --pixels 128 --compile
python benchmarks/superres.py --device cuda --dtype bf16 --frames 16,64 --json superres.json
python benchmarks/superres.py --forward-only --against superres.json

The second table says how long a clip takes by the number of evaluations: so many forward passes
over all its frames, at the fastest of the rows above. What a sampler computes itself is not in it.
"""

import argparse
import math
from functools import partial
from itertools import product

import torch
from machine import Report, limits
from unet import figures, net_config, network_options, rows

from avdiffusion.nn.unet import UNet


def measure(choice, args):
    """One row of the table: a network, and how many frames it is given at once."""
    size, frames = choice
    config = net_config(size)
    config["checkpoint"] = args.checkpoint
    shape = 1, config["video_channels"], frames, args.pixels, args.pixels

    def inputs(net, device):
        x, low = (torch.randn(shape, device=device) for _ in range(2))
        return [x], {"time": torch.full((1,), 500.0, device=device), "concat": low}

    found = figures(partial(UNet, **config), inputs, args, frames_at_once=frames)
    return {
        "size": size,
        "dtype": args.dtype,
        "mode": "compiled" if args.compile else "eager",
        "pixels": args.pixels,
        "frames": frames,
        "checkpoint": args.checkpoint,
        "frame_s": found["forward_s"] / frames,
        **found,
    }


def clips(found, evaluations, length):
    """Rows of the second table, for clips of `length` frames."""
    best = {}
    for row in found:
        seconds = math.ceil(length / row["frames"]) * row["forward_s"]
        if seconds < best.get(row["size"], (math.inf,))[0]:
            best[row["size"]] = seconds, row
    for (seconds, row), count in product(best.values(), evaluations):
        kept = {key: row[key] for key in ("size", "dtype", "mode", "pixels", "frames")}
        yield {**kept, "evaluations": count, "clip_s": count * seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="sr_published")
    parser.add_argument("--pixels", type=int, default=256, help="height and width of a frame")
    parser.add_argument("--frames", default="1", help="how many at once, such as 1,4,16")
    parser.add_argument("--evaluations", default="5,10,15,25")
    parser.add_argument("--clip", type=int, default=16, help="frames of a clip")
    network_options(parser)
    args = parser.parse_args()
    sizes, frames, evaluations = (
        text.split(",") for text in (args.sizes, args.frames, args.evaluations)
    )

    report = Report("superres", vars(args))
    for row in rows(measure, product(sizes, map(int, frames)), args):
        report.add(row)
    for row in list(clips(report.rows, [*map(int, evaluations)], args.clip)):
        report.add(row)
    report.limit(limits(torch.device(args.device), (args.dtype,)))
    report.finish(args)


if __name__ == "__main__":
    main()
