"""How the host's memory is held, and what to say when there is no more of any."""

import ctypes
import platform
from collections.abc import Mapping

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


def advice(config: Mapping, devices: int) -> str:
    """What needed the memory, by a run's resolved config, and what to change, cheapest first."""
    data, trainer, model = config["data"], config["trainer"], config["model"]
    share = data["micro_batch"] or data["batch_size"] // devices
    checkpointing = model["diffusion"]["net"].get("checkpoint")
    recomputed = f"{checkpointing} GiB"
    if checkpointing is None or isinstance(checkpointing, bool):
        recomputed = "on" if checkpointing else "off"
    height, width = data["size"]
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
        f"over {devices}), {data['frames']} frames of {height}x{width}, {data['samples']} samples, "
        f"precision {trainer['precision']}, activation checkpointing "
        f"{recomputed}. Try, in this order: {'; '.join(steps)}"
    )
