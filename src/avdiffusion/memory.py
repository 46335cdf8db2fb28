"""How the host's memory is held, and what to say when there is no more of any."""

import ctypes
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of mallopt(3)


def keep_freed() -> None:
    """Lets the process keep memory it frees, for what it takes next.

    By default glibc hands large blocks back at once, and each new one is filled with zeros page by
    page: a tenth to a sixth of the time of a large network on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(MMAP_MAX, 0)
        library.mallopt(TRIM_THRESHOLD, -1)  # never


def ran_out(error: BaseException) -> bool:
    """Whether an error means that an accelerator or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "out of memory", "failed to allocate")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def room(size: int, device: torch.device) -> int:
    """How many of `size` bytes fit into half of the memory that a device, or the host, has free."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = available()
    return free // 2 // size


def available(root: Path = Path("/")) -> int:
    """Bytes that the host can still give, within what a container allows; 4 GiB if it won't say.

    Copies of files that lie in memory are given up where it is needed. `root` is where the system
    says all this.
    """
    found = []
    with suppress(OSError, ValueError, LookupError):
        found.append(int(_words(root / "proc/meminfo")["MemAvailable:"]) * 1024)
    with suppress(OSError, ValueError, LookupError):
        group = root / "sys/fs/cgroup"
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        files = int(_words(group / "memory.stat")["inactive_file"])
        found.append(max(0, limit - used + files))
    return min(found, default=4 * 2**30)


def _words(path):
    """The second word of every line by its first."""
    return dict(line.split()[:2] for line in path.read_text().splitlines())


def advice(config: Mapping, devices: int) -> str:
    """What needed the memory, by a run's resolved config, and what to change, cheapest first."""
    data, trainer, model = config["data"], config["trainer"], config["model"]
    share = data["micro_batch"] or data["batch_size"] // devices
    checkpointing = model["diffusion"]["net"].get("checkpoint")
    recomputed = f"{checkpointing} GiB"
    if checkpointing is None or isinstance(checkpointing, bool):
        recomputed = "on" if checkpointing else "off"
    clips = []
    if data["frames"] is not None:
        clips.append(f"{data['frames']} frames of {data['size'][0]}x{data['size'][1]}")
    if data["samples"] is not None:
        clips.append(f"{data['samples']} samples")
    steps = []
    if share > 1:
        steps.append(f"data.micro_batch={max(1, share // 2)} (the same training, more slowly)")
    if checkpointing is not True and checkpointing is not None:  # 1 GiB is no True
        steps.append(
            "model.diffusion.net.checkpoint=true, or the GiB of activations to keep "
            "(the same, up to a third slower)"
        )
    if str(trainer["precision"]).startswith("32") and trainer["accelerator"] != "cpu":
        steps.append("trainer.precision=bf16-mixed")
    steps.append("a smaller model/net, or data.frames and data.size below these")
    samples = (config["callbacks"].get("samples") or {}).get("micro_batch", 1)
    if samples > 1:
        steps.append(f"callbacks.samples.micro_batch={samples // 2} if clips were being sampled")
    return (
        f"out of memory with {share} clips a device at once (data.batch_size={data['batch_size']} "
        f"over {devices}), {', '.join(clips)}, precision {trainer['precision']}, "
        f"activation checkpointing {recomputed}. Try, in this order: {'; '.join(steps)}"
    )
