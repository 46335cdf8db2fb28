"""Published weights of guided-diffusion's layout and those of `UNet`: same numbers, other names.

Published tensors differ from ours as those of `published` do, and in the rows of attention: there
every head has its queries, keys and values beside each other.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from avdiffusion.nn.attention import SelfAttention
from avdiffusion.nn.unet import Resample, ResBlock, Stage, UNet
from avdiffusion.published import (
    Entry,
    OtherWeights,
    Pairs,
    bare,
    differences,
    film_rows,
    gathered,
    renamed,
)


def entries(net: UNet) -> Iterator[Entry]:
    """Every published tensor of this network, in the published order."""
    pair, films = Pairs(net), film_rows(net.blocks())

    def res_block(name, block: ResBlock):
        yield from pair(f"{name}.in_layers.0", block.norm)
        yield from pair(f"{name}.in_layers.2", block.conv, (3, 3))
        yield from pair(f"{name}.emb_layers.1", net.film, rows=films[block])
        yield from pair(f"{name}.out_layers.0", block.film_norm)
        yield from pair(f"{name}.out_layers.3", block.out, (3, 3))
        if not isinstance(block.skip, nn.Identity):
            yield from pair(f"{name}.skip_connection", block.skip, (1, 1))

    def self_attention(name, block: SelfAttention):
        yield from pair(f"{name}.norm", block.norm)
        yield from pair(f"{name}.qkv", block.qkv, (1,), rows=by_heads(block))
        yield from pair(f"{name}.proj_out", block.out, (1,))

    def resample(name, block: Resample):
        yield from pair(f"{name}.{'conv' if block.up else 'op'}", block.conv, (3, 3))

    kinds = {ResBlock: res_block, SelfAttention: self_attention, Resample: resample}

    def stage(name, block: Stage, start=0):
        """The published parts of a stage, numbered from `start`."""
        parts = (part for part in (block.res, block.attention, block.up) if part is not None)
        for number, part in enumerate(parts, start):
            yield from kinds[type(part)](f"{name}.{number}", part)

    yield from pair("time_embed.0", net.time[0])
    yield from pair("time_embed.2", net.time[2])
    yield from pair("input_blocks.0.0", net.start, (3, 3))
    for number, block in enumerate(net.encoder, 1):
        yield from stage(f"input_blocks.{number}", block)
    yield from stage("middle_block", net.middle_in)
    yield from stage("middle_block", net.middle_out, 2)
    for number, block in enumerate(net.decoder):
        yield from stage(f"output_blocks.{number}", block)
    yield from pair("out.0", net.norm)
    yield from pair("out.2", net.out, (3, 3))


def by_heads(block: SelfAttention) -> Tensor:
    """Our rows of queries, keys and values in the published order: head, which of the three."""
    rows = torch.arange(block.qkv.out_features, device="cpu")
    return rows.view(3, block.heads, -1).transpose(0, 1).flatten()


def to_published(net: UNet, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The network's weights, or others of its shapes, under published names in published order."""
    return renamed(entries(net), net.state_dict() if state is None else state)


def from_published(net: UNet, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights as a state dict of `net`; raises `OtherWeights` if they are not its own."""
    if not net.framewise:
        raise OtherWeights("these are weights for single frames, its dims=3 is for clips")
    return gathered(entries(net), published, net.state_dict())


def of_model(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a `Diffusion` under published names."""
    return to_published(model.net)


def for_model(model: nn.Module, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights as what they are of the state dict of a `Diffusion`."""
    found = from_published(model.net, published)
    return {f"net.{key}": value for key, value in found.items()}


def settings(published: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The arguments of the `UNet` of colour pictures that these are weights of; None if of none.

    Those, that is, which shapes tell: not the number of heads.
    """
    published = bare(published)
    try:
        found = _settings(published)
        with torch.device("meta"):
            net = UNet(**found, num_heads=1)
    except (LookupError, ArithmeticError, ValueError, RuntimeError):
        return None
    return None if differences(entries(net), published) else found


def _settings(published):
    """As the decoder tells: its levels end in a part that up-samples, from coarse to fine."""
    channels = published["time_embed.0.weight"].shape[1]
    parts = [key.split(".") for key in published if key.startswith("output_blocks.")]
    stages = len({part[1] for part in parts})
    ups = {part[1] for part in parts if part[2] != "0" and part[3] in ("conv", "in_layers")}
    levels = 1 + len(ups)
    each = stages // levels
    names = [f"output_blocks.{first}" for first in range(0, each * levels, each)]
    widths = [published[f"{name}.0.out_layers.3.bias"].shape[0] for name in names]
    film = published["output_blocks.0.0.emb_layers.1.bias"].shape[0]
    has = [f"{name}.1.qkv.bias" in published for name in reversed(names)]
    return {
        "dims": 2,
        "video_channels": 3,
        "concat_channels": published["input_blocks.0.0.weight"].shape[1] - 3,
        "channels": channels,
        "channel_mult": tuple(width // channels for width in reversed(widths)),
        "num_res_blocks": each - 1,
        "conv": "2d",
        "attention": "spatial",
        "attention_resolutions": tuple(2**k for k, attends in enumerate(has) if attends),
        "scale_shift_norm": film == 2 * widths[0],
        "resblock_updown": not any(part[3] == "conv" for part in parts),
        "out_factor": published["out.2.bias"].shape[0] // 3,
    }
