"""Weights under Moûsai's published names compute what its own code does; other weights do not.

The numbers are those of the published package (audio-diffusion-pytorch 0.1.3) in float64, with
weights drawn from the order of their names.
"""

import itertools
import math
from collections import Counter

import pytest
import torch
from published_sound import (
    AUTOENCODER,
    ENCODER,
    GENERATOR,
    LATENT,
    LOSS,
    NOISE,
    OTHER_START,
    SOUND,
    START,
    TEXT,
    agree,
    drawn,
)
from torch import nn

from avdiffusion.nn.magnitude_encoder import MagnitudeEncoder
from avdiffusion.nn.unet1d import UNet1d
from avdiffusion.published import OtherWeights, differences
from avdiffusion.published_audio import (
    WINDOW,
    Parts,
    canonical,
    entries,
    expanded,
    from_published,
    to_published,
)

LARGE_GENERATOR = {
    "audio_channels": 32,
    "channels": [128, 256, 512, 512, 1024, 1024],
    "factors": [1, 2, 2, 2, 2, 2],
    "items": [2, 2, 2, 4, 8, 8],
    "attentions": [0, 0, 1, 1, 1, 1],
    "cross_attentions": [1, 1, 1, 1, 1, 1],
}


def filled(net, encoder=None, null=None):
    of_net, of_encoder, of_null = from_published(net, drawn(net, encoder, null), encoder, null)
    net.load_state_dict(of_net)
    if encoder is not None:
        encoder.load_state_dict(of_encoder)
    if null is not None:
        null.data = of_null
    return net, encoder, null


def autoencoder():
    return UNet1d(**AUTOENCODER).double(), MagnitudeEncoder(**ENCODER).double(), None


def generator():
    null = nn.Parameter(torch.zeros(16, 32, dtype=torch.float64))
    return UNet1d(**GENERATOR).double(), None, null


@pytest.fixture(scope="module")
def sounds():
    net, encoder, _ = filled(*autoencoder())
    encoder.window = torch.hann_window(1023, dtype=torch.float64)
    return net, encoder


@pytest.fixture(scope="module")
def latents():
    net, _, null = filled(*generator())
    return net, null


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def ddim(velocity, x, steps):
    """v-diffusion from time 1 to 0, alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for now, then in itertools.pairwise(grid):
        alpha, sigma = torch.cos(math.pi / 2 * now), torch.sin(math.pi / 2 * now)
        v = velocity(x, now[None])
        clean, noise = alpha * x - sigma * v, sigma * x + alpha * v
        x = torch.cos(math.pi / 2 * then) * clean + torch.sin(math.pi / 2 * then) * noise
    return x


# what the networks compute


@torch.no_grad()
def test_the_autoencoder_computes_the_published_numbers(sounds):
    net, encoder = sounds
    latent = encoder(SOUND)
    assert latent.shape == (1, 4, 8)
    agree(latent, "encoded")
    agree(net(SOUND, time=times(0.37), concat=latent), "denoised")
    agree(ddim(lambda x, t: net(x, time=t, concat=latent), START, 3), "decoded in 3")


@torch.no_grad()
def test_the_generator_computes_the_published_numbers(latents):
    net, null = latents

    def guided(x, time, scale):
        told, free = net(x, time=time, context=TEXT), net(x, time=time, context=null[None])
        return free + scale * (told - free)

    for scale in (1, 5, 0):
        agree(guided(LATENT, times(0.6), scale), f"scale {scale}")
    made = ddim(lambda x, t: guided(x, t, 3), OTHER_START, 4)
    agree(made, "made in 4 at scale 3")
    alpha, sigma = math.cos(math.pi / 8), math.sin(math.pi / 8)
    found = net(alpha * LATENT + sigma * NOISE, time=times(0.25), context=TEXT)
    loss = ((found - (alpha * NOISE - sigma * LATENT)) ** 2).mean()
    assert loss.item() == pytest.approx(LOSS, abs=6e-11)


# names and sizes


def test_small_networks_have_the_published_names():
    parts = autoencoder()
    assert sum(value.numel() for value in parts[0].parameters()) == 116_192
    assert sum(value.numel() for value in parts[1].parameters()) == 75_988
    assert (len(to_published(*parts)), len(expanded(*parts))) == (255, 686)
    parts = generator()
    assert sum(value.numel() for value in Parts(*parts).parameters()) == 100_824
    assert (len(to_published(*parts)), len(expanded(*parts))) == (190, 570)


def depths(root, first_blocks, *parts):
    """Numbers of each level, of the published rule where in a level the next one is."""
    names = [root]
    for blocks in first_blocks:
        names.append(f"{names[-1]}.block.blocks.{1 + blocks}")
    found = Counter()
    for entry in entries(*parts):
        found[sum(entry.published.startswith(f"{name}.") for name in names)] += math.prod(
            entry.shape
        )
    return [found[depth] for depth in range(len(names) + 1)]


def test_the_full_autoencoder_has_the_published_sizes():
    with torch.device("meta"):
        net, encoder = UNet1d(filters=128, inject_depth=4), MagnitudeEncoder()
    assert sum(value.numel() for value in net.parameters()) == 160_669_568
    assert sum(value.numel() for value in encoder.parameters()) == 24_438_304
    assert sum(value.numel() for value in Parts(net, encoder).parameters()) == 185_107_872
    names = Counter(key.partition(".")[0] for key in expanded(net, encoder))
    assert names == {"net": 319, "diffusion": 319, "sampler": 319, "encoder": 113}
    others, *levels = depths("net.blocks.2.blocks.2.net", [2, 4, 4, 4, 6, 4], net)
    assert others == 1_313_920 + 1024 * 1025 + 65_536  # a layer twice
    assert levels == [2_364_160, 11_420_672, *[12_338_688] * 2, 41_064_448, *[39_881_728] * 2]


def test_the_full_generator_has_the_published_sizes():
    with torch.device("meta"):
        net, null = UNet1d(**LARGE_GENERATOR), nn.Parameter(torch.empty(128, 768))
    assert sum(value.numel() for value in Parts(net, None, null).parameters()) == 562_606_400
    names = Counter(key.partition(".")[0] for key in expanded(net, None, null))
    assert names == {"net": 1236, "diffusion": 1236, "sampler": 1236}
    parts = net, None, null
    others, *levels = depths("net.blocks.2.blocks.1.net", [6, 6, 8, 16, 32], *parts)
    assert others == 1_313_920 + 1024 * 1025 + 98_304
    upper = [7_007_424, 10_273_280, 25_594_880, 51_189_248]
    assert levels == [*upper, 231_991_296, 235_138_048]


def test_names_follow_the_published_grammar():
    names = to_published(*autoencoder()).keys() | to_published(*generator()).keys()
    names |= to_published(UNet1d(channels=[8], factors=[1], items=[1], modulation=8)).keys()
    for name in (
        "net.blocks.0.weight",
        "net.blocks.2.blocks.0.to_out.bias",
        "net.blocks.2.blocks.1.blocks.1.0.bias",
        "net.blocks.2.blocks.2.net.skip.blocks.0.1.weight",
        "net.blocks.2.blocks.0.blocks.0.weight",
        "net.blocks.2.blocks.1.net.block.blocks.3.blocks.0.block.attention.blocks.0.weight",
        "net.blocks.2.net.block.blocks.1.block.blocks.0.blocks.1.2.bias",
        "net.blocks.2.net.block.blocks.5.block.1.bias",
        "encoder.to_in.block.to_out.weight",
        "encoder.downsamples.1.blocks.1.block2.groupnorm.bias",
    ):
        assert name in names
    assert WINDOW not in names


# files


def wrapped(weights, wrapper):
    return {f"{wrapper}{key}": value for key, value in weights.items()}


def same(found, module):
    state = module.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("wrapper", ["", "model.", "ema.ema_model.", "model_ema.", "module.model."])
@pytest.mark.parametrize("alias", ["all", "", "diffusion.", "sampler."])
def test_weights_are_found_under_every_name(sounds, latents, wrapper, alias):
    net, encoder = sounds
    for parts in ((net, encoder, None), (latents[0], None, latents[1])):
        every = expanded(*parts)
        if alias != "all":
            kept = f"{alias}net.", "encoder."
            every = {key: value for key, value in every.items() if key.startswith(kept)}
        found, of_encoder, null = from_published(parts[0], wrapped(every, wrapper), *parts[1:])
        same(found, parts[0])
        if parts[1] is None:
            assert of_encoder == {}
            assert torch.equal(null, parts[2])
        else:
            assert null is None
            same(of_encoder, parts[1])


def test_a_generator_with_its_text_encoder_around_it_is_the_same(latents):
    """As published with use_text_conditioning=True."""
    net, null = latents
    weights, inside = to_published(net, None, null), "net.blocks.2."
    around = {
        key.replace(inside, f"{inside}blocks.1.") if key.startswith(inside) else key: value
        for key, value in weights.items()
    }
    assert f"{inside}blocks.1.blocks.0.blocks.0.weight" in around
    assert any(key.startswith(f"{inside}blocks.1.blocks.1.net.block.") for key in around)
    around[f"{inside}blocks.0.transformer.shared.weight"] = torch.zeros(3, 3)
    found, _, of_null = from_published(net, wrapped(around, "model."), None, null)
    same(found, net)
    assert torch.equal(of_null, null)


@pytest.mark.parametrize("average", ["ema.ema_model.", "model_ema."])
def test_the_average_is_preferred(sounds, average):
    net, encoder = sounds
    weights = expanded(net, encoder)
    other = {key: value + 1 for key, value in weights.items()}
    file = wrapped(other, "model.") | wrapped(other, "ema.online_model.")
    file |= {"ema.initted": torch.tensor([True]), "ema.step": torch.tensor([7])}
    found, of_encoder, _ = from_published(net, file | wrapped(weights, average), encoder)
    same(found, net)
    same(of_encoder, encoder)
    found, _, _ = from_published(net, file, encoder)
    assert not any(torch.equal(found[key], value) for key, value in net.state_dict().items())


def test_the_second_name_of_the_shared_layer_counts(sounds):
    net, encoder = sounds
    weights = to_published(net, encoder)
    second = "net.blocks.2.blocks.1.blocks.1.0.bias"
    weights[second] = weights[second] + 1
    found, _, _ = from_published(net, weights, encoder)
    assert torch.equal(found["time.layer.bias"], net.time.layer.bias + 1)


def test_other_weights_are_refused_with_what_differs(sounds, latents):
    net, encoder = sounds
    weights = expanded(net, encoder)
    del weights["encoder.to_out.bias"]
    with pytest.raises(OtherWeights, match=r"1 missing.*\n  encoder.to_out.bias: 4"):
        from_published(net, weights, encoder)
    with pytest.raises(OtherWeights, match=r"extra.*encoder"):
        from_published(net, expanded(net, encoder))
    longer = nn.Parameter(torch.zeros(20, 32))
    with pytest.raises(OtherWeights, match=r"net\.blocks.*: 16x32, not 20x32"):
        from_published(latents[0], expanded(latents[0], None, latents[1]), None, longer)
    with pytest.raises(OtherWeights, match="190 missing"):
        from_published(latents[0], {"something": torch.zeros(3)}, None, latents[1])


def test_weights_are_of_the_type_of_the_network(latents):
    net, null = latents
    half = {key: value.half() for key, value in to_published(net, None, null).items()}
    found, _, of_null = from_published(UNet1d(**GENERATOR), half, None, nn.Parameter(null.float()))
    assert {value.dtype for value in (*found.values(), of_null)} == {torch.float32}
    assert differences(entries(net, None, null), canonical(half)) == ""
