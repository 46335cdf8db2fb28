"""Codecs give back what they were given."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.diffusion.noise import Noise
from avdiffusion.media import Media
from avdiffusion.systems.codec import Identity, Patches

NOISE = Noise(0, [0, 1])


def media(video=(2, 3, 4, 8, 8), audio=(2, 1, 64)):
    rng = torch.Generator().manual_seed(0)
    return Media(
        video=torch.rand(video, generator=rng) * 2 - 1, audio=torch.rand(audio, generator=rng)
    )


def test_identity():
    x = media()
    assert Identity().encode(x) is x
    assert Identity().decode(x, NOISE) is x


def test_shapes_and_order_of_patches():
    z = Patches(patch={"video": [1, 4, 4], "audio": [16]}).encode(media())
    assert z["video"].shape == (2, 48, 4, 2, 2)
    assert z["audio"].shape == (2, 16, 4)
    # A token holds neighbours.
    assert torch.equal(z["audio"][0, :, 1], media()["audio"][0, 0, 16:32])
    block = media()["video"][1, :, 2, 4:8, 0:4].reshape(48)
    assert torch.equal(z["video"][1, :, 2, 1, 0], block)


@settings(deadline=None, max_examples=40)
@given(
    patch=st.tuples(*[st.sampled_from([1, 2, 4])] * 3),
    block=st.sampled_from([1, 3, 8]),
    count=st.integers(1, 3),
    channels=st.integers(1, 3),
)
def test_decode_undoes_encode(patch, block, count, channels):
    x = media((count, channels, *(2 * p for p in patch)), (count, channels, 5 * block))
    codec = Patches(patch={"video": list(patch), "audio": [block]})
    z = codec.encode(x)
    back = codec.decode(z, NOISE)
    for name in x:
        assert torch.equal(back[name], x[name])
        assert z[name].numel() == x[name].numel()
        assert len(z[name]) == count


def test_scale_is_a_factor_of_one_modality():
    codec = Patches(patch={"audio": [16]}, scale={"audio": 4.0})
    x = media()
    z = codec.encode(x)
    assert torch.equal(z["video"], x["video"])  # no patch given: as it is
    torch.testing.assert_close(float(z["audio"].std()), float(4 * x["audio"].std()))
    torch.testing.assert_close(codec.decode(z, NOISE)["audio"], x["audio"])


def test_shapes_are_those_of_what_is_encoded():
    x, codec = media(), Patches(patch={"video": [2, 2, 2]})
    shapes = codec.shapes({name: list(value.shape[1:]) for name, value in x.items()})
    assert shapes == {name: list(value.shape[1:]) for name, value in codec.encode(x).items()}
    assert shapes["video"] == [24, 2, 4, 4]


def test_sizes_that_do_not_divide_are_named():
    codec = Patches(patch={"video": [1, 3, 4]})
    with pytest.raises(
        ValueError, match=r"video \[3, 4, 8, 8\] does not divide into .*\[1, 3, 4\]"
    ):
        codec.encode(media())
    codec = Patches(patch={"audio": [48]})
    with pytest.raises(ValueError, match=r"audio \[1, 64\] does not divide into blocks of \[48\]"):
        codec.encode(media())


def test_a_patch_of_the_wrong_rank_is_named():
    with pytest.raises(ValueError, match=r"patch\.video=\[4, 4\] has to name 3 block sizes"):
        Patches(patch={"video": [4, 4]}).encode(media())
