"""Published MM-Diffusion weights and those of `CoupledUNet`: same numbers, other names.

Published tensors differ from ours in name and in axes of length one; the time projection of every
block is a slice of our `film`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from avdiffusion.nn.attention import CrossAttention, SelfAttention
from avdiffusion.nn.blocks import ResBlock
from avdiffusion.nn.coupled_unet import CoupledUNet, Stage


@dataclass(frozen=True)
class Entry:
    """A published tensor: its key and shape, and the key (and rows) of ours that holds it."""

    published: str
    shape: tuple[int, ...]
    ours: str
    rows: slice | Tensor


class OtherWeights(ValueError):
    """Weights of another network; the message, of several lines, has what differs."""


class Pairs:
    """Entries of the weights and biases of a network's modules."""

    def __init__(self, net: nn.Module):
        self.tensors = dict(net.named_parameters())
        self.names = {module: name for name, module in net.named_modules()}

    def __call__(
        self,
        published: str,
        module: nn.Module,
        weight: tuple[int, ...] = (),
        rows: slice | Tensor = slice(None),
    ) -> Iterator[Entry]:
        """`weight` is the published shape behind the two channel axes."""
        for kind in ("weight", "bias"):
            ours = f"{self.names[module]}.{kind}"
            if ours not in self.tensors:  # it has no bias
                continue
            shape = tuple(self.tensors[ours][rows].shape)
            shape = (*shape[:2], *weight) if kind == "weight" else shape
            yield Entry(f"{published}.{kind}", shape, ours, rows)


def film_rows(blocks: Iterable[nn.Module]) -> dict[nn.Module, slice]:
    """The rows of the time projection that belong to each residual block."""
    found, start = {}, 0
    for block in blocks:
        found[block] = slice(start, start := start + block.film_width)
    return found


def entries(net: CoupledUNet) -> Iterator[Entry]:
    """Every published tensor of this network, in the published order."""
    pair, films = Pairs(net), film_rows(net.res_blocks())

    def norm(published, module):
        return pair(f"{published}.GroupNorm", module)

    def video_conv(published, conv):
        yield from pair(f"{published}_spatial", conv.space, (3, 3))
        yield from pair(f"{published}_temporal", conv.time, (3,))

    def res_block(name, block: ResBlock):
        yield from norm(f"{name}.video_in_layers.0", block.video.norm)
        yield from video_conv(f"{name}.video_in_layers.2.video_conv", block.video.conv)
        yield from norm(f"{name}.audio_in_layers.0", block.audio.norm)
        yield from pair(f"{name}.audio_in_layers.2.audio_conv", block.audio.conv, (3,))
        yield from pair(f"{name}.emb_layers.1", net.film, rows=films[block])
        streams = {"video": (block.video, (1, 1, 1)), "audio": (block.audio, (1,))}
        for stream, (branch, ones) in streams.items():
            yield from norm(f"{name}.{stream}_out_layers.0", branch.film_norm)
            yield from pair(f"{name}.{stream}_out_layers.3.{stream}_conv", branch.out, ones)
        for stream, (branch, ones) in streams.items():
            if not isinstance(branch.skip, nn.Identity):
                yield from pair(f"{name}.{stream}_skip_connection.{stream}_conv", branch.skip, ones)

    def self_attention(name, block: SelfAttention):
        yield from norm(f"{name}.norm", block.norm)
        yield from pair(f"{name}.qkv", block.qkv, (1,))
        yield from pair(f"{name}.proj_out", block.out, (1,))

    def cross_attention(name, block: CrossAttention):
        yield from norm(f"{name}.v_norm", block.video_norm)
        yield from norm(f"{name}.a_norm", block.audio_norm)
        yield from pair(f"{name}.v_qkv", block.video_qkv, (1,))
        yield from pair(f"{name}.a_qkv", block.audio_qkv, (1,))
        yield from pair(f"{name}.video_proj_out.video_conv", block.video_out, (1, 1, 1))
        yield from pair(f"{name}.audio_proj_out.audio_conv", block.audio_out, (1,))

    def stage(name, block: Stage, start=0):
        """The published parts of a stage, numbered from `start`."""
        parts = (part for part in (block.res, block.cross, block.up) if part is not None)
        for number, part in enumerate(parts, start):
            if isinstance(part, CrossAttention):
                yield from cross_attention(f"{name}.{number}", part)
                continue
            yield from res_block(f"{name}.{number}", part)
            if part is block.res:
                for kind in ("spatial", "temporal", "audio"):
                    attention = getattr(block, kind)
                    if attention is not None:
                        yield from self_attention(
                            f"{name}.{number}.{kind}_attention_block", attention
                        )

    yield from pair("time_embed.0", net.time[0])
    yield from pair("time_embed.2", net.time[2])
    yield from video_conv("input_blocks.0.0.video_conv.video_conv", net.video_in)
    yield from pair("input_blocks.0.0.audio_conv.audio_conv", net.audio_in, (3,))
    for number, block in enumerate(net.encoder, 1):
        yield from stage(f"input_blocks.{number}", block)
    yield from stage("middle_blocks", net.middle_in)
    yield from stage("middle_blocks", net.middle_out, 1 + (net.middle_in.cross is not None))
    for number, block in enumerate(net.decoder):
        yield from stage(f"output_blocks.{number}", block)
    yield from norm("audio_out.0", net.audio_norm)
    yield from pair("audio_out.2.audio_conv", net.audio_out, (3,))
    yield from norm("video_out.0", net.video_norm)
    yield from pair("video_out.2.video_conv", net.video_out, (3, 3, 3))


def to_published(net: CoupledUNet, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The network's weights, or others of its shapes, under published names in published order."""
    return renamed(entries(net), net.state_dict() if state is None else state)


def from_published(net: CoupledUNet, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights as a state dict of `net`; raises `OtherWeights` if they are not its own."""
    return gathered(entries(net), published, net.state_dict())


def of_model(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a `Diffusion` under published names."""
    return to_published(model.net)


def for_model(model: nn.Module, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights as what they are of the state dict of a `Diffusion`."""
    found = from_published(model.net, published)
    return {f"net.{key}": value for key, value in found.items()}


def renamed(table: Iterable[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours under published names."""
    return {entry.published: state[entry.ours][entry.rows].reshape(entry.shape) for entry in table}


def gathered(
    table: Iterable[Entry], published: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Published weights as a state dict like another; raises `OtherWeights` where they differ."""
    published, table = bare(published), list(table)
    if found := differences(table, published):
        raise OtherWeights(found)
    if unnamed := like.keys() - {entry.ours for entry in table}:
        raise OtherWeights(f"{len(unnamed)} of its tensors are in no file, such as {min(unnamed)}")
    state = {key: value.new_empty(value.shape) for key, value in like.items()}
    for entry in table:
        target = state[entry.ours]
        value = published[entry.published].detach().reshape(target[entry.rows].shape)
        target[entry.rows] = value.to(target.dtype)
    return state


def bare(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the `module.` that training on several devices puts before every key."""
    wrapped = all(key.startswith("module.") for key in published)
    return {key.removeprefix("module.") if wrapped else key: v for key, v in published.items()}


def differences(table: Iterable[Entry], published: Mapping[str, Tensor]) -> str:
    """What is missing, extra or of another shape, to be read; empty if nothing is."""
    expected = {entry.published: entry.shape for entry in table}
    missing = {k: size(shape) for k, shape in expected.items() if k not in published}
    extra = {k: kind(value) for k, value in published.items() if k not in expected}
    other = {
        key: f"{kind(published[key])}, not {size(shape)}"
        for key, shape in expected.items()
        if key in published and kind(published[key]) != size(shape)
    }
    parts = {"missing": missing, "extra": extra, "of another shape": other}
    return "\n".join(listed(name, part) for name, part in parts.items() if part)


def listed(name: str, tensors: Mapping[str, str], most: int = 12) -> str:
    """How many there are in each part of the network, and `most` of them, spread over the parts."""
    parts = Counter(key.partition(".")[0] for key in tensors)
    each = max(1, most // len(parts))
    seen, shown = Counter(), []
    for key, text in tensors.items():
        part = key.partition(".")[0]
        seen[part] += 1
        if seen[part] <= each or len(tensors) <= most:
            shown.append(f"  {key}: {text}")
    counts = ", ".join(f"{part} {count}" for part, count in parts.most_common(most))
    such = f"{name} ({counts})" if len(tensors) <= most else f"{name} ({counts}), such as"
    return "\n".join([f"{len(tensors)} {such}", *shown[:most]])


def kind(value: Tensor) -> str:
    """A tensor's shape, and what it is if not plain numbers."""
    if value.is_floating_point() and value.layout == torch.strided and not value.is_meta:
        return size(value.shape)
    return f"{size(value.shape)} {value.dtype} {value.layout} {value.device}"


def size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def settings(published: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The arguments of the `CoupledUNet` that these are weights of; None if there is none.

    Those, that is, which shapes tell: not heads, windows and `audio_rate`.
    """
    published = bare(published)
    try:
        found = _settings(published)
        windows = (1,) * len(found["cross_attention_resolutions"])
        free = {"num_heads": 1, "head_channels": found["channels"]}
        with torch.device("meta"):
            net = CoupledUNet(**found, **free, cross_attention_windows=windows)
    except (LookupError, ArithmeticError, ValueError, RuntimeError):
        return None
    return None if differences(entries(net), published) else found


def _settings(published):
    """As the decoder tells: its levels end in a block that up-samples, from coarse to fine."""
    channels = published["time_embed.0.weight"].shape[0]
    parts = [key.split(".") for key in published if key.startswith("output_blocks.")]
    stages = len({part[1] for part in parts})
    levels = 1 + len({part[1] for part in parts if part[2] != "0" and part[3] == "emb_layers"})
    each = stages // levels
    firsts = range(0, each * levels, each)
    names = [f"output_blocks.{first}" for first in firsts]
    widths = [published[f"{n}.0.video_out_layers.3.video_conv.bias"].shape[0] for n in names]
    film = published["output_blocks.0.0.emb_layers.1.bias"].shape[0]
    video = published["input_blocks.0.0.video_conv.video_conv_spatial.weight"].shape[1]
    audio = published["input_blocks.0.0.audio_conv.audio_conv.weight"].shape[1]

    def scales(part):
        """At which scales a level has that part."""
        has = [2**k for k, name in enumerate(reversed(names)) if f"{name}.{part}" in published]
        return tuple(has)

    return {
        "video_channels": video,
        "audio_channels": audio,
        "channels": channels,
        "channel_mult": tuple(width // channels for width in reversed(widths)),
        "num_res_blocks": each - 1,
        "cross_attention_resolutions": scales("1.v_norm.GroupNorm.bias"),
        "video_attention_resolutions": scales("0.spatial_attention_block.qkv.bias"),
        "audio_attention_resolutions": scales("0.audio_attention_block.qkv.bias"),
        "middle_cross_attention": "middle_blocks.1.v_norm.GroupNorm.bias" in published,
        "scale_shift_norm": film == 2 * widths[0],
        "out_factor": published["video_out.2.video_conv.bias"].shape[0] // video,
    }
