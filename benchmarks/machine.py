"""What this machine can do, and the reports of all benchmarks.

python benchmarks/machine.py                              # the limits of this machine
python benchmarks/machine.py --device cuda
python benchmarks/machine.py OLD.json NEW.json            # two reports of one benchmark, compared
"""

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

# 3x3 convolutions of the published network: channels in, channels out, pixels
CONVS = [(128, 128, 64), (384, 128, 64), (256, 256, 32), (640, 256, 32)]
CONVS += [(384, 384, 16), (896, 384, 16), (512, 512, 8), (1024, 512, 8)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def best_time(function: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Seconds of the fastest call, once `repeats` calls in a row were not 3 % faster than before.

    The first few take memory from the system, and fill it page by page.
    """
    best, since = float("inf"), 0
    while since < repeats:
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        seconds = time.perf_counter() - start
        since = 0 if seconds < 0.97 * best else since + 1
        best = min(best, seconds)
    return best


def conv_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP-weighted rate of the published network's 3x3 convolutions on 16 frames, in GFLOP/s."""
    flops = seconds = 0
    for inputs, outputs, size in CONVS:
        x = torch.randn(16, inputs, size, size, device=device, dtype=dtype)
        w = torch.randn(outputs, inputs, 3, 3, device=device, dtype=dtype)
        x, w = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, w))
        seconds += best_time(lambda x=x, w=w: F.conv2d(x, w, padding=1), device)
        flops += 2 * 9 * inputs * outputs * 16 * size**2
    return flops / seconds / 1e9


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of one large product of square matrices, in GFLOP/s."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / best_time(lambda: a @ b, device) / 1e9


def copy_rate(device: torch.device) -> float:
    """Bytes read and written by a large copy within the device's memory, in GB/s."""
    a = torch.zeros(2**28, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    return 2 * a.numel() / best_time(lambda: b.copy_(a), device) / 1e9


def limits(device: torch.device, dtypes: tuple[str, ...] = ("fp32",)) -> dict[str, float]:
    """What a benchmark's figures are to be held against, measured now."""
    found = {"copy_gb_per_s": copy_rate(device)}
    for name in dtypes:
        found[f"conv_{name}_gflop_per_s"] = conv_rate(device, DTYPES[name])
        found[f"matmul_{name}_gflop_per_s"] = matmul_rate(device, DTYPES[name])
    return found


class PeakMemory:
    """Context whose `mib` is the most memory taken inside it above what was held at its start."""

    def __init__(self, device: torch.device):
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
            self.peak = max(self.peak, resident())
        self.mib = (self.peak - self.start) / 2**20


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


class Report:
    """A benchmark's rows and the machine's limits: a table while it runs, JSON, a comparison.

    In a row floats are figures (None: not measured); all other values say which row it is.
    """

    def __init__(self, name: str, arguments: Mapping[str, object]):
        self.name, self.arguments = name, dict(arguments)
        self.rows, self.limits, self.columns = [], {}, []
        cuda = str(self.arguments.get("device", "cpu")).startswith("cuda")
        self.machine = {
            "name": torch.cuda.get_device_name() if cuda else processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        print(
            f"{self.machine['name']}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        )

    def add(self, row: Mapping[str, object]) -> None:
        """Keeps a row and prints it."""
        self.rows.append(dict(row))
        if list(row) != self.columns:
            self.columns = list(row)
            print("  ".join(f"{name:>9}" for name in self.columns))
        widths = (max(9, len(name)) for name in self.columns)
        cells = zip(row.values(), widths, strict=True)
        print("  ".join(f"{shown(value):>{width}}" for value, width in cells), flush=True)

    def limit(self, found: Mapping[str, float]) -> None:
        """Keeps limits of the machine and prints them."""
        self.limits |= found
        print("limits: " + ", ".join(f"{name} {shown(value)}" for name, value in found.items()))

    def write(self, path: Path) -> None:
        path.write_text(
            json.dumps(
                {
                    "benchmark": self.name,
                    "arguments": self.arguments,
                    "machine": self.machine,
                    "limits": self.limits,
                    "rows": self.rows,
                },
                default=str,
                indent=1,
            )
        )

    def compare(self, old: Path) -> None:
        """Prints every figure beside that of an earlier report, and the ratio."""
        before = json.loads(Path(old).read_text())
        mine = {"benchmark": self.name, "machine": self.machine, "limits": self.limits}
        compare(before, {**mine, "rows": self.rows})

    def finish(self, args: argparse.Namespace) -> None:
        """What the options of `options` ask for."""
        if args.json:
            self.write(args.json)
        if args.against:
            self.compare(args.against)


def options(parser: argparse.ArgumentParser) -> None:
    """Adds what every benchmark can do with its report."""
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--against", type=Path, help="compare with the figures written here")


def compare(old: Mapping, new: Mapping) -> None:
    """Prints the figures of two reports side by side; rows are matched by what is no figure."""
    if old["benchmark"] != new["benchmark"]:
        raise SystemExit(f"error: reports of {old['benchmark']} and {new['benchmark']} differ")
    for part in ("name", "threads", "torch"):
        pair = [report["machine"][part] for report in (old, new)]
        if pair[0] != pair[1]:
            print(f"{part}: {pair[0]} -> {pair[1]}")
    earlier = {identity(row): row for row in old["rows"]}
    pairs = [("limits", old["limits"], new["limits"])]
    for row in new["rows"]:
        name = " ".join(f"{key}={value}" for key, value in identity(row))
        if identity(row) in earlier:
            pairs.append((name, earlier[identity(row)], row))
        else:
            print(f"{name}: new")
    for name, before, after in pairs:
        figures = [key for key, value in after.items() if isinstance(value, float)]
        figures = [key for key in figures if isinstance(before.get(key), float)]
        if figures:
            print(name)
        for key in figures:
            ratio = after[key] / before[key] if before[key] else float("nan")
            print(f"  {key:30} {shown(before[key]):>12} {shown(after[key]):>12} {ratio:8.3f}")


def identity(row: Mapping[str, object]) -> tuple:
    """What is no figure of a row."""
    kept = {k: v for k, v in row.items() if v is not None and not isinstance(v, float)}
    return tuple(sorted((key, str(value)) for key, value in kept.items()))


def shown(value: object) -> str:
    """A cell of a table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="*", type=Path, help="OLD.json NEW.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options(parser)
    args = parser.parse_args()
    if args.reports:
        if len(args.reports) != 2:
            parser.error("two reports are compared: OLD.json NEW.json")
        compare(*(json.loads(path.read_text()) for path in args.reports))
        return
    report = Report("machine", vars(args))
    report.limit(limits(torch.device(args.device), ("fp32", "bf16")))
    report.finish(args)


if __name__ == "__main__":
    main()
