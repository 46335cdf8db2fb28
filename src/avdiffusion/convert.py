"""Key map between published MM-Diffusion weights and `CoupledUNet`: same numbers, other names.

Published tensors differ from ours in name and in axes of length one; the time projection of every
block is a slice of our `film`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
    rows: slice


def entries(net: CoupledUNet) -> Iterator[Entry]:
    """Every published tensor of this network, in the published order."""
    tensors = dict(net.named_parameters())
    names = {module: name for name, module in net.named_modules()}

    def pair(published, module, weight=(), rows=None):
        """Weight and bias; `weight` is the published shape behind the two channel axes."""
        rows = rows or slice(None)
        for kind in ("weight", "bias"):
            ours = f"{names[module]}.{kind}"
            shape = tuple(tensors[ours][rows].shape)
            shape = (*shape[:2], *weight) if kind == "weight" else shape
            yield Entry(f"{published}.{kind}", shape, ours, rows)

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
        yield from pair(f"{name}.emb_layers.1", net.film, rows=film_rows[block])
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

    film_rows, start = {}, 0
    for block in net.res_blocks():
        film_rows[block] = slice(start, start := start + block.film_width)

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
    state = net.state_dict() if state is None else state
    return {
        entry.published: state[entry.ours][entry.rows].reshape(entry.shape)
        for entry in entries(net)
    }


def from_published(net: CoupledUNet, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights as a state dict of `net`; a leading `module.` is dropped."""
    published = {key.removeprefix("module."): value for key, value in published.items()}
    table = list(entries(net))
    expected = {entry.published: entry.shape for entry in table}
    missing, unknown = expected.keys() - published.keys(), published.keys() - expected.keys()
    if missing or unknown:
        raise ValueError(
            f"weights of another network: {len(missing)} tensors missing (such as "
            f"{sample(missing)}), {len(unknown)} unknown (such as {sample(unknown)})"
        )
    state = {key: value.new_empty(value.shape) for key, value in net.state_dict().items()}
    for entry in table:
        value = published[entry.published]
        if tuple(value.shape) != entry.shape:
            raise ValueError(f"{entry.published} is {tuple(value.shape)}, not {entry.shape}")
        target = state[entry.ours][entry.rows]
        target.copy_(value.reshape(target.shape))
    return state


def sample(keys: set[str]) -> str:
    return min(keys, default="none")
