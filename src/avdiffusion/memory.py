"""What to say when memory runs out."""

from collections.abc import Mapping

import torch


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
    height, width = data["size"]
    steps = []
    if share > 1:
        steps.append(f"data.micro_batch={max(1, share // 2)} (the same training, more slowly)")
    if checkpointing is False:
        steps.append("model.diffusion.net.checkpoint=true (the same, about a third slower)")
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
        f"{'on' if checkpointing else 'off'}. Try, in this order: {'; '.join(steps)}"
    )
