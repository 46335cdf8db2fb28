"""What training and sampling will cost on this machine, measured before there is any data.

python -m avdiffusion.plan exp=landscape
python -m avdiffusion.plan exp=folder model/net=small data.micro_batch=4
python -m avdiffusion.plan exp=landscape --steps 20000,50000 --devices 1,4,8

Other words are those of train.py. Clips are random, and nothing is written.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from avdiffusion import checkpoint
from avdiffusion.compiled import compile_in_place
from avdiffusion.diffusion.diffusion import Prediction
from avdiffusion.diffusion.noise import Noise
from avdiffusion.memory import advice, keep_freed, ran_out
from avdiffusion.samplers.sampler import last
from avdiffusion.systems.system import System, empty

PARTS = ("copy", "forward", "backward", "optimizer", "average")
DTYPES = {"32-true": None, "32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PATIENCE = 20.0  # seconds of a micro-batch above which single clips are measured instead

log = logging.getLogger("avdiffusion")


class Trial:
    """Training steps as `train.py` makes them of a config, without trainer and data."""

    def __init__(self, config: Mapping[str, Any], device: torch.device):
        precision = str(config["trainer"]["precision"])
        if precision not in DTYPES:
            raise ValueError(f"trainer.precision={precision} is none of {', '.join(DTYPES)}")
        self.dtype, self.device = DTYPES[precision], device
        self.clip = config["trainer"]["gradient_clip_val"]
        self.system: System = checkpoint.build(config["model"]).to(device)
        if isinstance(codec := getattr(self.system, "codec", None), torch.nn.Module):
            codec.eval()  # noise as clips is not judged
        found = self.system.configure_optimizers()
        self.optimizer = found["optimizer"] if isinstance(found, dict) else found
        for network in self.system.networks:
            compile_in_place(network, config["compile"], device.type)

    def clips(self, count: int) -> dict:
        """A batch of noise as a dataset has it: uint8 frames, int16 sound, a float condition."""
        generator, batch = torch.Generator().manual_seed(0), {}
        for name, shape in self.system.shapes.items():
            low, high, dtype = (0, 256, torch.uint8) if len(shape) > 2 else (-(2**15), 2**15, None)
            value = torch.randint(low, high, (count, *shape), generator=generator)
            value = value.to(dtype or torch.int16)
            batch[name] = value
        batch |= blank(self.system, count)
        if self.device.type == "cuda":
            batch = {name: value.pin_memory() for name, value in batch.items()}
        return {**batch, "position": list(range(count))}

    def step(self, batches: Sequence[dict]) -> dict[str, float]:
        """One optimiser step over these micro-batches; seconds of each part."""
        spans = dict.fromkeys(PARTS, 0.0)
        marks = []
        for batch in batches:
            marks.append(("copy", self._mark()))
            batch = {k: self._moved(v) for k, v in batch.items()}
            marks.append(("forward", self._mark()))
            with self.autocast():
                loss = self.system.training_loss(batch)["loss"]
            marks.append(("backward", self._mark()))
            (loss / len(batches)).backward()
        marks.append(("optimizer", self._mark()))
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.system.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(("average", self._mark()))
        self.system.ema.update()
        marks.append(("", self._mark()))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for (name, start), (_, end) in pairwise(marks):
            spans[name] += seconds(start, end)
        return spans

    def sample(self, count: int) -> float:
        """Seconds of one evaluation of the model for `count` clips."""
        batch = {k: self._moved(v) for k, v in self.clips(count).items()}
        with torch.no_grad():
            start = self._mark()
            self.system.once(batch)
            end = self._mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return seconds(start, end)

    def autocast(self) -> AbstractContextManager:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=False)

    def _moved(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value

    def _mark(self):
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def blank(system: System, count: int) -> dict[str, Tensor]:
    """What a batch has besides the clips that are learned from."""
    conditioner = getattr(system.model, "conditioner", None)
    return {} if conditioner is None else conditioner.blank(count, system.shapes)


def seconds(start: Any, end: Any) -> float:
    """Between two marks, of the host's clock or of the device's."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def best(spans: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The parts of the fastest step."""
    return dict(min(spans, key=lambda each: sum(each.values())))


def flops(config: Mapping[str, Any]) -> tuple[int, int]:
    """Operations of one clip: a forward pass, and that with the backward pass; nothing computed."""
    with torch.device("meta"):
        system = checkpoint.build(config["model"]).to("meta")
        batch, counts = {**empty(1, system.shapes, "meta"), **blank(system, 1)}, []
        for train in (False, True):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
                out = system.once(batch)
                if train:
                    sum(each.sum() for each in out).backward()
            counts.append(counter.get_total_flops())
    return counts[0], counts[1]


def evaluations(system: System) -> int:
    """How often the network is asked for a sample, found by a sampler's run over nothing."""
    if system.sampler is None:
        return 1
    calls = 0

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        nonlocal calls
        calls += 1
        return Prediction(torch.zeros_like(x), x, None)

    last(system.sampler(denoise, torch.ones(1, 1), system.model.path, noise=Noise(0, [0])))
    return calls


def peak(device: torch.device) -> int:
    """Bytes, the most that this process has held: of the device's memory, or of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free(device: torch.device) -> int:
    """Bytes that are free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def held(config: Mapping[str, Any], devices: int) -> tuple[int, int]:
    """(micro-batch, how many of them a step takes) on each of `devices`."""
    data = config["data"]
    share, rest = divmod(data["batch_size"], devices)
    micro = data["micro_batch"] or share
    if rest or not share or share % micro:
        raise ValueError(
            f"data.batch_size={data['batch_size']} is not whole micro-batches of {micro} on "
            f"{devices} devices"
        )
    return micro, share // micro


def measure(config: Mapping[str, Any], device: torch.device, devices: int = 1) -> dict[str, Any]:
    """Seconds of the parts of one device's micro-batch, its peak memory, and of sampling."""
    micro, _ = held(config, devices)
    try:
        start, room = peak(device), free(device)
        trial = Trial(config, device)
        parameters = sum(p.numel() for p in trial.system.model.parameters())
        one = [trial.step([trial.clips(1)])]
        began = perf_counter()
        one.append(trial.step([trial.clips(1)]))
        took, memory = perf_counter() - began, peak(device) - start
        # all but what the clips take: weights, their average, gradients and two moments
        fixed = min(memory, 20 * parameters)
        needed = fixed + micro * (memory - fixed)
        if needed > room:
            raise ValueError(
                f"{advice(config, devices)} (it would take {needed / 2**30:.1f} GiB, and "
                f"{room / 2**30:.1f} GiB are free)"
            )
        count = micro if took * micro < PATIENCE else 1
        repeats = 3 if took * micro < PATIENCE / 6 else 1
        if count > 1:
            trial.step([trial.clips(count)])  # the choice of kernels, the first memory
            one = [trial.step([trial.clips(count)]) for _ in range(repeats)]
        spans = {k: v * (micro / count if k in PARTS[:3] else 1) for k, v in best(one).items()}
        memory = peak(device) - start if count == micro else needed
        batch = min(8, count)
        trial.sample(batch)
        evaluation = min(trial.sample(batch) for _ in range(repeats)) / batch
    except (RuntimeError, MemoryError) as error:
        if ran_out(error):
            raise ValueError(advice(config, devices)) from error
        raise
    system = trial.system
    return {
        "parameters": parameters,
        "micro": micro,
        "measured": count,
        "spans": spans,
        "memory": memory,
        "evaluation": evaluation,
        "evaluations": evaluations(system),
    }


def report(
    config: Mapping[str, Any],
    device: torch.device,
    steps: Sequence[int] = (),
    devices: Sequence[int] = (1,),
) -> str:
    """The plan as text."""
    shares = [held(config, count) for count in devices]
    found = measure(config, device, min(devices))
    forward, both = flops(config)
    spans, micro = found["spans"], found["micro"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    mode = "compiled" if config["compile"] else "eager"
    lines = [
        f"{config['name']} on {name}, {config['trainer']['precision']}, {mode}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        f"network      {found['parameters'] / 1e6:.2f} M parameters; a clip takes "
        f"{forward / 1e9:.4g} GFLOP forward, {both / 1e9:.4g} with the backward pass",
        f"micro-batch  {micro} clips in {sum(spans[k] for k in PARTS[:3]):.3g} s ("
        + ", ".join(f"{k} {spans[k]:.3g} s" for k in PARTS[:3])
        + ")"
        + ("" if found["measured"] == micro else f", reckoned from {found['measured']} at a time"),
        f"step         optimizer {spans['optimizer']:.3g} s, average {spans['average']:.3g} s",
        f"memory       {found['memory'] / 2**30:.2f} GiB at most with micro-batches of {micro}",
        f"sampling     {found['evaluations']} evaluations a clip, "
        f"{found['evaluations'] * found['evaluation']:.3g} s",
    ]
    wanted = [*steps, config["trainer"]["max_steps"]]
    for count, (there, accumulated) in zip(devices, shares, strict=True):
        step = accumulated * there / micro * sum(spans[k] for k in PARTS[:3])
        step += spans["optimizer"] + spans["average"]
        times = ", ".join(f"{n} steps {lasting(n * step)}" for n in sorted(set(wanted)) if n > 0)
        perfect = "" if count == 1 else ", if devices cost each other nothing"
        lines.append(
            f"{count} device{'s' if count > 1 else ''}".ljust(13)
            + f"{step:.3g} s a step of {config['data']['batch_size']} clips{perfect}: {times}"
        )
    if config["trainer"]["accelerator"] == "gpu" and device.type != "cuda":
        lines.append("This experiment trains on a GPU and there is none here: trainer=cpu or wait.")
    return "\n".join(lines)


def lasting(time: float) -> str:
    """Seconds in the unit that suits them."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if time < limit:
            return f"{time / size:.3g} {unit}"
    return f"{time / 86400:.3g} days"


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def _run(given: argparse.Namespace) -> None:
    checkpoint.check(given.overrides)
    # What is not looked at, and has no default where an experiment needs data of one's own.
    needed = ["data.root=."] if not any("data.root=" in w for w in given.overrides) else []
    config = checkpoint.compose([*given.overrides, *needed, "paths.run=."])
    checkpoint.graft(config)
    device = torch.device("cuda" if wants_cuda(config) else "cpu")
    for name in ("pytorch_lightning", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.stdout.write(report(config, device, given.steps, given.devices) + "\n")


def wants_cuda(config: Mapping[str, Any]) -> bool:
    return torch.cuda.is_available() and config["trainer"]["accelerator"] != "cpu"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m avdiffusion.plan",
        description="What training and sampling will cost on this machine.",
    )
    parser.add_argument("overrides", nargs="*", help="as for train.py, such as exp=landscape")
    parser.add_argument("--steps", type=numbers, default=[], help="as well, such as 1000,10000")
    parser.add_argument("--devices", type=numbers, default=[1], help="such as 1,4,8")
    checkpoint.guarded(_run, parser.parse_intermixed_args(words))


if __name__ == "__main__":
    keep_freed()
    main()
