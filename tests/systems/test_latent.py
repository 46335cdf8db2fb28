"""Codecs that are models trained before, and the systems that diffuse what they encode."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_latent import (
    EVERY,
    TEXTS,
    batch,
    decoder,
    dmae,
    latent,
    made,
    noise,
    sounds,
    source,
    step,
    text,
    vae,
    videos,
)

from avdiffusion.diffusion.known import Reconstruct
from avdiffusion.diffusion.noise import Noise
from avdiffusion.media import Media
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.systems.latent import Decoder, Latent
from avdiffusion.systems.step import Step
from avdiffusion.systems.system import unit
from avdiffusion.systems.timeline import Blank

NEAR = {"rtol": 1e-4, "atol": 1e-4}
CODECS = {"latent": (latent, "video", videos), "decoder": (decoder, "audio", sounds)}
ON_BOTH = pytest.mark.parametrize(("codec", "name", "clips"), CODECS.values(), ids=CODECS)
SECOND = pytest.mark.parametrize("stage", ["text on latents", "source on latents"])


def lengths(name):
    sizes = (3, 5, 8, 9) if name == "video" else (16, 17, 31, 32, 50)
    axes = 3 if name == "video" else 1
    return st.tuples(*[st.sampled_from(sizes)] * axes)


@ON_BOTH
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_shapes_are_those_of_what_is_encoded(codec, name, clips, data):
    """Of clips of any length and size, with what was made of them as long or longer."""
    codec = codec(gate=False)
    shape = [3 if name == "video" else 1, *data.draw(lengths(name))]
    x = Media({name: unit(clips(2, shape))})
    z = codec.encode(x)
    assert codec.shapes({name: shape}) == {name: list(z[name].shape[1:])}
    longer = codec.decode(z, noise(2))[name].shape
    assert longer[:2] == (2, shape[0])
    assert all(n >= wanted for n, wanted in zip(longer[2:], shape[1:], strict=True))


@ON_BOTH
def test_latents_have_mean_0_and_deviation_1_in_every_channel(codec, name, clips):
    z = codec().encode(Media({name: unit(clips(64))}))[name].transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(2), rtol=0, atol=1e-4)


def test_decoding_undoes_encoding_as_the_autoencoder_does():
    first = vae()
    codec, net, x = latent(first), first.ema.ema_model.net, unit(videos(3))
    online = first.model.net
    with torch.no_grad():
        back = codec.decode(codec.encode(Media(video=x)), noise(3))["video"]
        torch.testing.assert_close(back, net.decode(net.encode(x).mean), **NEAR)
        # with the averaged weights, not those that were trained
        assert float((back - online.decode(online.encode(x).mean)).abs().max()) > 1e-3


class AsSampling(Noise):
    """Noise that names its parts as the sampling of clips by themselves does."""

    def fork(self, purpose):
        return super().fork({"decoded": "start", "decoding": "step"}.get(purpose, purpose))


@pytest.mark.parametrize("sampler", [None, DDPM(steps=3, variance="small")])
def test_decoding_is_sampling_of_the_first_system(sampler):
    first = dmae() if sampler is None else dmae(sampler=sampler)
    codec, x = decoder(first), unit(sounds(3))
    told = first.ema.ema_model.conditioner.encoder(x).detach()
    own = first.conditioned({"audio": x, "latent": told}, range(3), seed=5).clips["audio"]
    z = codec.encode(Media(audio=x))
    found = codec.decode(z, AsSampling(5, range(3), "sample"))["audio"]
    torch.testing.assert_close(found, own, **NEAR)
    again = first.conditioned({"audio": x}, range(3), seed=5).clips["audio"]
    torch.testing.assert_close(again, own, **NEAR)
    assert float((codec.decode(z, noise(3))["audio"] - own).abs().max()) > 0.1


def test_a_decoded_clip_depends_on_its_own_latent_and_number_alone():
    codec = decoder(dmae(sampler=DDPM(steps=3, variance="small")))
    z = codec.encode(Media(audio=unit(sounds(3))))
    whole = codec.decode(z, noise(3))["audio"]
    alone = codec.decode(z.map(lambda v: v[2:]), Noise(0, [2], "sample"))["audio"]
    torch.testing.assert_close(alone[0], whole[2], **NEAR)
    assert float((whole[0] - whole[1]).abs().max()) > 0.1


def test_latents_are_held_within_what_an_encoder_makes_before_they_are_decoded():
    codec = decoder()
    far = Media(audio=torch.full((1, 2, 4), 1e3))
    model, ends = codec.model.conditioner, Media(audio=torch.ones(1, 2, 4))
    at_the_end = Media(audio=model.moments.normalise(ends["audio"]))
    found, expected = (codec.decode(z, noise(1))["audio"] for z in (far, at_the_end))
    torch.testing.assert_close(found, expected, **NEAR)


def test_a_model_of_another_kind_is_refused():
    for codec, wrong in ((Latent, dmae()), (Decoder, vae()), (Decoder, text()), (Latent, source())):
        with pytest.raises(
            ValueError, match=f"{codec.__name__} makes latents by an? .*another kind"
        ):
            codec(wrong)


def test_a_diffusion_autoencoder_measures_its_latents_while_it_is_trained():
    """Those of each of its own networks, as they are at the time; nothing in evaluation."""
    system, parts = dmae().train(), [batch(4), batch(4, position=4)]
    for part in parts:
        system.training_loss(part)
    moments, encoder = system.model.conditioner.moments, system.model.conditioner.encoder
    with torch.no_grad():
        z = encoder(torch.cat([unit(part["audio"]) for part in parts]))
    values = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(moments.mean, values.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.deviation, values.std(1, correction=0), rtol=1e-3, atol=1e-5)
    kept = system.ema.ema_model.conditioner.moments
    assert int(kept.batches) == 0
    system.ema.update()
    assert torch.equal(kept.mean, moments.mean)
    system.eval()
    made(system)
    system.told(system.model, batch(4, position=8))
    assert int(moments.batches) == 2
    assert torch.equal(kept.mean, moments.mean)


# ------------------------------------------------------------------------ frozen within a system


@SECOND
def test_only_what_diffuses_learns(stage):
    system = EVERY[stage]()
    system.train()
    before = {k: v.clone() for k, v in system.codec.state_dict().items()}
    assert len(before) > 20
    assert not any(module.training for module in system.codec.model.modules())
    for k in range(2):
        step(system, position=4 * k)
    assert all(p.grad is None and not p.requires_grad for p in system.codec.parameters())
    for name, value in system.codec.state_dict().items():
        assert torch.equal(value, before[name]), name
    trained = {id(p) for p in system.configure_optimizers().param_groups[0]["params"]}
    assert not trained & {id(p) for p in system.codec.parameters()}
    system.eval()
    assert not any(module.training for module in system.modules())


@SECOND
def test_the_state_of_a_system_holds_its_codec_once(stage):
    """So a checkpoint works when that of the first stage is gone; there is no second average."""
    system, other = EVERY[stage](), EVERY[stage]()
    state = system.state_dict()
    inside = [name for name in state if name.startswith("codec.")]
    assert inside
    assert all(name.startswith("codec.model.") for name in inside)
    for value in other.codec.state_dict().values():
        value.zero_()
    other.load_state_dict(state)
    for name, clip in made(other).items():
        torch.testing.assert_close(clip, made(system)[name])


@pytest.mark.parametrize("name", EVERY)
def test_a_gradient_reaches_every_parameter(name):
    """Of encoders that learn with the network, and of what stands for no text."""
    system = EVERY[name]() if "text" not in name else text(drop=0.5)
    system.train()
    system.training_loss(batch(8))["loss"].backward()
    dead = {
        name
        for name, p in system.model.named_parameters()
        if p.grad is None or not bool(p.grad.abs().max() > 0)
    }
    assert dead == set()


@pytest.mark.parametrize("name", EVERY)
def test_clips_are_of_the_averaged_weights(name):
    """Which are others than the online ones after a step or two, in every system."""
    system = EVERY[name]()
    for k in range(3):
        step(system, position=4 * k)
    online = dict(system.model.named_parameters())
    averaged = dict(system.ema.ema_model.named_parameters())
    assert online.keys() == averaged.keys()
    moved = [k for k in online if not torch.equal(online[k], averaged[k])]
    assert len(moved) == len(online)
    clips = made(system, seed=3)
    for parameter in online.values():
        parameter.data.zero_()
    for kind, clip in made(system, seed=3).items():
        assert torch.equal(clip, clips[kind])
    for parameter in averaged.values():
        parameter.data.zero_()
    for kind, clip in made(system, seed=3).items():
        assert float((clip - clips[kind]).abs().max()) > 1e-2


# -------------------------------------------------------------------------------------- the gate


def encoded(codec, name, clips, scale=1.0, parts=8):
    """Encodes 128 clips, a part at a time; how many had been when there was an error."""
    x = unit(clips(128)) * scale
    for k, part in enumerate(x.chunk(parts)):
        try:
            codec.checked(codec.encode(Media({name: part})))
        except ValueError as error:
            return (k + 1) * len(part), str(error)
    return None, ""


@ON_BOTH
def test_latents_that_are_not_normalised_end_training_early(codec, name, clips):
    good = codec().train()
    assert encoded(good, name, clips) == (None, "")
    bad = codec()
    moments = bad.model.moments if name == "video" else bad.model.conditioner.moments
    moments.square += 4 * (moments.square - moments.mean.square())
    count, told = encoded(bad.train(), name, clips)
    assert count == 128
    assert told.startswith("the latents of the first 128 clips are not normalised (by channel: ")
    assert "0.45" in told  # the root of 5 too small
    assert "init.codec.system=CKPT" in told
    assert "model.codec.gate=false" in told


@pytest.mark.parametrize(("shift", "wrong"), [(0.15, False), (0.25, True), (-0.25, True)])
def test_a_mean_may_be_a_little_off(shift, wrong):
    codec = latent().train()
    moments = codec.model.moments
    deviation, mean = moments.deviation.clone(), moments.mean.clone()
    moments.mean += torch.tensor([0.0, shift]) * deviation
    moments.square += moments.mean.square() - mean.square()
    assert bool(encoded(codec, "video", videos)[0]) == wrong


@pytest.mark.parametrize(
    ("factor", "wrong"), [(0.85, False), (0.75, True), (1.2, False), (1.3, True)]
)
def test_a_deviation_may_be_a_little_off(factor, wrong):
    codec = latent().train()
    moments = codec.model.moments
    variance = moments.square - moments.mean.square()
    moments.square += variance * (factor**-2 - 1)
    assert bool(encoded(codec, "video", videos)[0]) == wrong


@ON_BOTH
def test_latents_are_judged_in_training_and_where_they_are_to_be(codec, name, clips):
    for chosen in (codec(gate=False).train(), codec().eval()):
        moments = chosen.model.moments if name == "video" else chosen.model.conditioner.moments
        moments.square.mul_(100)
        assert encoded(chosen, name, clips) == (None, "")
    # what was seen in evaluation is not counted
    assert encoded(chosen.train(), name, clips, parts=2)[0] == 128


def test_the_gate_ends_the_training_of_a_system():
    system = source(latent())
    system.codec.model.moments.square.mul_(9)
    step(system, count=127)  # their sources do not count
    with pytest.raises(ValueError, match=r"not normalised \(by channel: .* \+- .*gate=false"):
        step(system, count=1, position=127)


# -------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(("frames", "height", "width"), [(3, 8, 8), (1, 9, 6), (5, 13, 10)])
def test_clips_of_others_have_their_size(frames, height, width):
    given = {"source": videos(2, [3, frames, height, width])}
    for system in (vae(), source(latent())):
        entry = {system.remakes.takes: given["source"]}
        clip = system.conditioned(entry, [0, 1]).clips["video"]
        assert clip.shape == (2, 3, frames, height, width)
        assert clip.dtype == torch.float32


@pytest.mark.parametrize("length", [64, 50, 49])
def test_a_length_that_the_encoder_does_not_divide_is_cut_to(length):
    system = text(decoder())
    system.shapes = {"audio": [1, length]}
    assert made(system)["audio"].shape == (2, 1, length)
    first = dmae()
    made_of = first.conditioned({"audio": sounds(2, [1, length])}, [0, 1])
    assert made_of.clips["audio"].shape == (2, 1, length)


def test_a_source_decides_what_is_made():
    """Also its size; a neighbour's does not."""
    system, given = source(latent()), {"source": videos(2)}
    clip = system.conditioned(given, [3, 4]).clips["video"]
    other = {"source": torch.stack([given["source"][0].flip(-1), given["source"][1]])}
    changed = system.conditioned(other, [3, 4]).clips["video"]
    torch.testing.assert_close(changed[1], clip[1], **NEAR)
    assert float((changed[0] - clip[0]).abs().max()) > 0.02
    alone = system.conditioned({"source": given["source"][1:]}, [4]).clips["video"]
    torch.testing.assert_close(alone[0], clip[1], **NEAR)


def test_longer_clips_of_latents_are_made_as_a_whole():
    """Without guides: what is known of a clip, as of the window before, is not of its latents."""
    system = text(decoder())
    clip = made(system, seconds=0.2, micro_batch=2)["audio"]
    assert clip.shape == (2, 1, 200)
    said = {"told": lambda numbers: {"text": [TEXTS[i] for i in numbers]}}
    (alone,) = system.samples([1], seconds=0.2, micro_batch=2, **said)
    torch.testing.assert_close(alone.clips["audio"][0], clip[1], **NEAR)
    assert alone.evaluations == 3
    part = Blank(system.shapes, system.rates)
    with pytest.raises(ValueError, match="what is known of a clip is not known of its latents"):
        made(system, given=[part, part], guides=[Reconstruct()])


def test_decoding_calls_networks_as_it_is_told():
    """In bfloat16 both the generator's and the decoder's network."""
    system, seen = text(decoder()), []
    nets = system.ema.ema_model.net, system.codec.model.net
    for net in nets:
        net.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    told = {"told": lambda numbers: {"text": ["a"] * len(numbers)}}
    list(system.samples([0], micro_batch=1, step=Step(precision="bf16-mixed"), **told))
    assert seen
    assert all(seen)
