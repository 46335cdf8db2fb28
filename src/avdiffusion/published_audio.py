"""Published weights of Moûsai's layout and those of `UNet1d` and `MagnitudeEncoder`: other names.

What was published (audio-diffusion-pytorch) has the same tensors three times, as `net.`,
`diffusion.net.` and `sampler.net.`, and one layer of the time features twice; canonical are the
names that begin in `net.` and `encoder.`. Our keys begin in `net.` and `encoder.`, too; `null` is
what stands for no text in classifier-free guidance, [tokens, width]. A network that was published
with its text encoder around it (a frozen T5, which is no part of ours) has other names inside.
"""

import itertools
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from avdiffusion.nn.blocks1d import Attention, Item, Level, Resnet
from avdiffusion.nn.magnitude_encoder import MagnitudeEncoder
from avdiffusion.nn.text import ByteEncoder
from avdiffusion.nn.unet1d import UNet1d
from avdiffusion.published import Entry, OtherWeights, Pairs, bare, gathered, renamed

ALIASES = ("sampler.", "diffusion.", "")  # of the network
WRAPPERS = ("ema.ema_model.", "model_ema.", "model.", "")  # averages first
WINDOW = "encoder.stft.window"
T5, WITHIN = "net.blocks.2.blocks.0.transformer.", "net.blocks.2.blocks.1."


class Parts(nn.Module):
    """The network, its encoder and its null embedding as one, whose names are ours here."""

    def __init__(
        self,
        net: UNet1d,
        encoder: MagnitudeEncoder | None = None,
        null: nn.Parameter | None = None,
    ):
        super().__init__()
        self.net, self.encoder, self.null = net, encoder, null


def entries(
    net: UNet1d, encoder: MagnitudeEncoder | None = None, null: nn.Parameter | None = None
) -> Iterator[Entry]:
    """Every canonical tensor of these; the keys of ours are those of `Parts`."""
    pair = Pairs(Parts(net, encoder, null))

    def tensor(name, ours):
        return [Entry(name, tuple(pair.tensors[ours].shape), ours, slice(None))]

    root = "net"
    if net.encode is not None:
        yield from _conv(pair, "net.blocks.0", net.encode)
        yield from _conv(pair, "net.blocks.1", net.decode)
        root = "net.blocks.2"
    yield from tensor(f"{root}.blocks.0.weights", "net.time.frequencies")
    yield from pair(f"{root}.blocks.0.to_out", net.time.start)
    for number in range(2):  # one layer, both names
        yield from pair(f"{root}.blocks.1.blocks.{number}.0", net.time.layer)
    root = f"{root}.blocks.2"
    if null is not None:
        yield from tensor(f"{root}.blocks.0.blocks.0.weight", "null")
        root = f"{root}.blocks.1"
    yield from _levels(pair, f"{root}.net", net)
    if encoder is not None:
        yield from _encoder(pair, encoder)


def _conv(pair, name, module):
    return pair(name, module, module.kernel_size)


def _levels(pair, root, net):
    """Each level but the first is inside the one above, among its blocks."""
    widths, start = net.film_widths(), 0

    def film(name):
        """The next rows of the time projection, in order of the forward pass."""
        nonlocal start
        return pair(name, net.film, rows=slice(start, start := start + next(widths)))

    def attention(name, block: Attention):
        yield from pair(f"{name}.norm", block.norm)
        yield from pair(f"{name}.norm_context", block.norm_context)
        yield from pair(f"{name}.to_q", block.query)
        yield from pair(f"{name}.to_kv", block.key_value)
        yield from pair(f"{name}.attention.blocks.0", block.out)

    def item(names, block: Item):
        name = f"{next(names)}.block.blocks.0.blocks"
        for number, (norm, conv) in enumerate(_halves(block.res)):
            yield from pair(f"{name}.{number}.0", norm)
            yield from _conv(pair, f"{name}.{number}.2", conv)
        yield from film(f"{next(names)}.blocks.0.block.blocks.0.1")
        if block.inject is not None:
            yield from pair(f"{next(names)}.block.blocks.0", block.inject, (1,))
        for part in (block.attention, block.cross):
            if part is not None:
                yield from attention(f"{next(names)}.blocks.0.block", part)

    def level(name, first: Level, *inner: Level):
        names = (f"{name}.block.blocks.{number}" for number in itertools.count())
        yield from _conv(pair, f"{next(names)}.block", first.down)
        for block in first.before:
            yield from item(names, block)
        if inner:
            yield from level(next(names), *inner)
        for block in first.after:
            yield from item(names, block)
        yield from _conv(pair, f"{next(names)}.block.1", first.up)
        yield from film(f"{name}.skip.blocks.0.1")

    return level(root, *net.levels)


def _encoder(pair, encoder):
    def resnet(name, block: Resnet):
        for number, (norm, conv) in enumerate(_halves(block), 1):
            yield from pair(f"{name}.block{number}.groupnorm", norm)
            yield from _conv(pair, f"{name}.block{number}.project", conv)
        if not isinstance(block.skip, nn.Identity):
            yield from _conv(pair, f"{name}.to_out", block.skip)

    yield from resnet("encoder.to_in.block", encoder.start)
    for number, (down, *blocks) in enumerate(encoder.stages):
        yield from _conv(pair, f"encoder.downsamples.{number}.downsample", down)
        for each, block in enumerate(blocks):
            yield from resnet(f"encoder.downsamples.{number}.blocks.{each}", block)
    yield from _conv(pair, "encoder.to_out", encoder.out)


def _halves(block):
    return (block.norm1, block.conv1), (block.norm2, block.conv2)


def to_published(
    net: UNet1d, encoder: MagnitudeEncoder | None = None, null: nn.Parameter | None = None
) -> dict[str, Tensor]:
    """Their weights under canonical names."""
    return renamed(entries(net, encoder, null), Parts(net, encoder, null).state_dict())


def expanded(
    net: UNet1d, encoder: MagnitudeEncoder | None = None, null: nn.Parameter | None = None
) -> dict[str, Tensor]:
    """Their weights under every name, as the published package loads and saves them."""
    weights = to_published(net, encoder, null)
    of_net = {key: value for key, value in weights.items() if key.startswith("net.")}
    found = {f"{alias}{key}": v for alias in ALIASES for key, v in of_net.items()}
    return found | weights if encoder is None else found | weights | {WINDOW: encoder.window}


def from_published(
    net: UNet1d,
    published: Mapping[str, Tensor],
    encoder: MagnitudeEncoder | None = None,
    null: nn.Parameter | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """Published weights as state dicts of `net` and `encoder`, and the values of `null`.

    Raises `OtherWeights` if they are not of these.
    """
    like = Parts(net, encoder, null).state_dict()
    state = gathered(entries(net, encoder, null), canonical(published), like)
    return _under("net.", state), _under("encoder.", state), state.get("null")


def of_model(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a `Diffusion` of sound, or of its latents, under canonical names."""
    return to_published(model.net, *_others(model))


def for_model(model: nn.Module, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights as what they are of the state dict of such a `Diffusion`."""
    encoder, null = _others(model)
    if isinstance(getattr(model.conditioner, "encoder", None), ByteEncoder):
        raise OtherWeights(
            "these are weights of a network that is told what a T5 makes of texts: give "
            "model/conditioner=text_t5"
        )
    weights = canonical(published)
    encodes = any(key.startswith("encoder.") for key in weights)
    if weights and encodes != (encoder is not None):
        what = "an autoencoder: give exp=dmae" if encodes else "a generator: give exp=diffgen"
        raise OtherWeights(f"these are weights of {what}")
    net, of_encoder, empty = from_published(model.net, published, encoder, null)
    found = {f"net.{key}": value for key, value in net.items()}
    found |= {f"conditioner.encoder.{key}": value for key, value in of_encoder.items()}
    return found if empty is None else found | {"conditioner.empty": empty}


def _others(model):
    """The encoder of its own sound and what stands for no text, if any, of a conditioner."""
    encoder = getattr(model.conditioner, "encoder", None)
    null = getattr(model.conditioner, "empty", None)
    return encoder if isinstance(encoder, MagnitudeEncoder) else None, null


def canonical(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file has of the network and its encoder, under canonical names, the average if any."""
    published = bare(published)
    for wrapper in WRAPPERS:
        held = _under(wrapper, published)
        found = {}
        for alias in ALIASES:
            found |= {f"net.{key}": value for key, value in _under(f"{alias}net.", held).items()}
        if found:
            break
    if any(key.startswith(T5) for key in found):
        found = {f"net.blocks.2.{key}": value for key, value in _under(WITHIN, found).items()} | {
            key: value for key, value in found.items() if not key.startswith("net.blocks.2.")
        }
    of_encoder = {f"encoder.{key}": value for key, value in _under("encoder.", held).items()}
    of_encoder.pop(WINDOW, None)
    return found | of_encoder


def _under(prefix, tensors):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
