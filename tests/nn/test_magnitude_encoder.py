"""The encoder of sound: magnitudes of its spectrum, latents a step for every so many samples."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_network import relative
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.nn.magnitude_encoder import MagnitudeEncoder

SMALL = {"channels": 16, "num_blocks": (1, 2), "out_channels": 4}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return MagnitudeEncoder(**SMALL)


def noise(length, batch=2, channels=2):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, channels, length, generator=generator)


@torch.no_grad()
def test_magnitudes_are_those_of_numpy(encoder):
    audio = noise(2048).double()
    found = encoder.magnitudes(audio).unflatten(1, (2, 512))
    assert found.shape == (2, 2, 512, 8)
    edges = np.pad(audio.numpy(), [(0, 0), (0, 0), (511, 511)], mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1023) / 1023)
    for frame in range(8):
        part = edges[..., 256 * frame : 256 * frame + 1023]
        expected = np.abs(np.fft.rfft(part * window)) / np.sqrt(1023)
        assert relative(found[..., frame], expected) < 1e-6


@given(length=st.integers(1, 5000))
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_a_sound_of_any_length_is_filled_up_with_zeros(encoder, length):
    audio = noise(length)
    found = encoder(audio)
    assert found.shape == (2, 4, -(-length // 1024))
    assert torch.equal(found, encoder(F.pad(audio, (0, -length % 1024))))
    assert found.abs().max() < 1


@torch.no_grad()
def test_each_sound_of_a_batch_is_by_itself(encoder):
    audio = noise(4096)
    each = torch.cat([encoder(audio[:1]), encoder(audio[1:])])
    assert relative(encoder(audio), each) < 1e-5
    assert relative(encoder(-audio), each) < 1e-5  # it sees magnitudes alone
    assert relative(encoder(audio.flip(1)), each) > 1e-3


def test_stages_are_as_wide_and_as_short_as_asked():
    stages = {"multipliers": (1, 2, 3), "factors": (3, 2), "num_blocks": (1, 0), "groups": 4}
    encoder = MagnitudeEncoder(**{**SMALL, **stages, "in_channels": 1, "stft_hop_length": 128})
    assert encoder.factor == 768
    assert [stage[0].out_channels for stage in encoder.stages] == [32, 48]
    assert encoder(noise(768 * 5, channels=1)).shape == (2, 4, 5)


@pytest.mark.parametrize(
    "changes", [{"num_blocks": (1,)}, {"multipliers": (1, 1)}, {"factors": (2, 2, 2)}]
)
def test_stages_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="factors are of as many num_blocks"):
        MagnitudeEncoder(**{**SMALL, **changes})


def test_a_sound_that_does_not_fit_is_one_clear_error(encoder):
    with pytest.raises(ValueError, match="2 channels and more than 511 samples, this is 1 of 2048"):
        encoder(noise(2000, channels=1))
    short = MagnitudeEncoder(channels=8, factors=(), multipliers=(1,), num_blocks=())
    assert short(noise(600)).shape == (2, 32, 3)
    with pytest.raises(ValueError, match="more than 511 samples, this is 2 of 256"):
        short(noise(200))


def test_the_gradient_reaches_all_parameters_and_the_sound(encoder):
    audio = noise(2048).requires_grad_()
    encoder.zero_grad()
    encoder(audio).square().sum().backward()
    assert [n for n, p in encoder.named_parameters() if not p.grad.any()] == []
    assert audio.grad.any()


def test_silence_has_a_finite_gradient(encoder):
    audio = torch.zeros(2, 2, 2048, requires_grad=True)
    encoder.zero_grad()
    found = encoder(audio)
    found.sum().backward()
    assert found.isfinite().all()
    assert audio.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_mixed_precision_transforms_in_full_precision(encoder):
    audio = noise(4096)
    full = encoder.magnitudes(audio)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.magnitudes(audio), full)
        assert encoder.magnitudes(audio.bfloat16()).dtype == torch.float32
        found = encoder(audio)
    assert relative(found.float(), encoder(audio)) < 0.1


def test_copies_are_other_encoders_and_files_hold_weights_alone(encoder):
    audio = noise(2048)
    before, twin = encoder(audio), copy.deepcopy(encoder)
    for parameter in twin.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(encoder(audio), before)
    assert not twin(audio).any()
    assert torch.equal(pickle.loads(pickle.dumps(encoder))(audio), before)
    assert "window" not in encoder.state_dict()


def test_shapes_and_sizes_are_known_without_values():
    with torch.device("meta"):
        encoder = MagnitudeEncoder()
        assert encoder(torch.empty(1, 2, 2**18)).shape == (1, 32, 256)
    assert sum(value.numel() for value in encoder.parameters()) == 24_438_304
    assert (encoder.factor, encoder.out_channels) == (1024, 32)
