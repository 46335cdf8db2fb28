"""Moûsai's published names and calls: full sizes without memory, small networks with numbers."""

import copy
import itertools
import math
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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

from avdiffusion import text_to_audio, weights
from avdiffusion.diffusion.noise import Noise
from avdiffusion.media import Media
from avdiffusion.nn.magnitude_encoder import MagnitudeEncoder
from avdiffusion.nn.text import T5Encoder
from avdiffusion.nn.unet1d import UNet1d
from avdiffusion.published import OtherWeights
from avdiffusion.text_to_audio import CombinedSampler, DiffAE, DiffGen
from avdiffusion.weights import MissingWeights

NEAR = {"rtol": 1e-6, "atol": 1e-7}  # predictions are float32
ONE_LEVEL = {"channels": [16, 16], "factors": [1, 2], "items": [1, 1], "modulation": 8}


def small_autoencoder(seed=0):
    return DiffAE(net=UNet1d(**AUTOENCODER), encoder=MagnitudeEncoder(**ENCODER), seed=seed)


def small_generator(name="nowhere", seed=0):
    encoder = T5Encoder(name, width=32, max_length=16)
    return DiffGen(net=UNet1d(**GENERATOR), encoder=encoder, seed=seed)


def parts(model):
    conditioner = model.model.conditioner
    if isinstance(model, DiffGen):
        return model.model.net, None, conditioner.empty
    return model.model.net, conditioner.encoder, None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The two small models as published files."""
    folder = tmp_path_factory.mktemp("published")
    for name, model in (("diffae", small_autoencoder()), ("diffgen", small_generator())):
        content = {f"model.{key}": value for key, value in drawn(*parts(model)).items()}
        torch.save(content, folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def diffae(files):
    model = small_autoencoder().double()
    model.load(files / "diffae.pt")
    model.model.conditioner.encoder.window = torch.hann_window(1023, dtype=torch.float64)
    return model


@pytest.fixture(scope="module")
def diffgen(files):
    model = small_generator().double()
    model.load(files / "diffgen.pt")
    return model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# the published sizes


def test_the_default_models_have_the_published_sizes():
    with torch.device("meta"):
        diffae, diffgen = text_to_audio.get_default_diffae(), text_to_audio.get_default_diffgen()
        audio, latent = torch.empty(1, 2, 2**18), torch.empty(1, 32, 256)
        embedding = torch.empty(1, 128, 768)
    assert sum(value.numel() for value in diffae.parameters()) == 185_107_872
    assert sum(value.numel() for value in diffgen.parameters()) == 562_606_400
    assert diffae(audio).shape == ()
    assert diffae.encode(audio).shape == latent.shape
    assert diffae.decode(latent, num_steps=1).shape == audio.shape
    assert diffgen(latent, embedding=embedding, embedding_mask_proba=0.1).shape == ()
    assert diffgen(latent, text=["a robin"]).shape == ()
    made = diffgen.sample(latent, embedding=embedding, embedding_scale=5.0, num_steps=1)
    assert made.shape == latent.shape


# what they compute


@torch.no_grad()
def test_the_autoencoder_computes_the_published_numbers(diffae):
    latent = diffae.encode(SOUND)
    agree(latent, "encoded", **NEAR)
    agree(diffae.model.net(SOUND, time=torch.tensor([0.37]), concat=latent), "denoised", **NEAR)
    agree(diffae.sampled(START, {"concat": latent}, 3), "decoded in 3", **NEAR)


@torch.no_grad()
def test_the_generator_computes_the_published_numbers(diffgen, monkeypatch):
    made = diffgen.sample(OTHER_START, embedding=TEXT, embedding_scale=3, num_steps=4)
    agree(made, "made in 4 at scale 3", **NEAR)
    monkeypatch.setattr(Noise, "uniform", lambda self: torch.full((1,), 0.25, dtype=torch.float64))
    monkeypatch.setattr(Noise, "like", lambda self, x: Media(audio=NOISE))
    loss = diffgen(LATENT, embedding=TEXT, embedding_mask_proba=0)
    assert loss.item() == pytest.approx(LOSS, rel=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("scale", [0, 1, 2.5])
def test_guidance_goes_away_from_no_text(diffgen, scale):
    """One step from time 1, where nothing of the noise is left: minus the guided v."""
    net, time = diffgen.model.net, torch.ones(1)
    told = net(NOISE, time=time, context=TEXT)
    free = net(NOISE, time=time, context=diffgen.model.conditioner.empty[None])
    made = diffgen.sample(NOISE, embedding=TEXT, embedding_scale=scale, num_steps=1)
    torch.testing.assert_close(made, -(free + scale * (told - free)), rtol=1e-5, atol=1e-6)


def test_the_loss_is_that_of_v_at_times_of_the_seed():
    """By hand, of the second call: its noise is that of the samples after the first one's."""
    for made, x, kwargs in (
        (partial(small_autoencoder, seed=4), SOUND, {}),
        (partial(small_generator, seed=4), LATENT, {"embedding": TEXT.float()}),
    ):
        model, x = made().eval(), x.float().repeat(2, 1, 1)
        kwargs = {k: v.repeat(2, 1, 1) for k, v in kwargs.items()}
        first, found = model(x, **kwargs), model(x, **kwargs)
        assert first != found
        noise = Noise(4, [2, 3], type(model).__name__)
        t = noise.uniform()
        if kwargs:
            dropped = noise.fork("condition").uniform() < 0.1
            assert dropped.tolist() == [False, True]
            cond = {"context": torch.stack([TEXT[0].float(), model.model.conditioner.empty])}
        else:
            cond = {"concat": model.encode(x)}
        eps = noise.like(Media(audio=x))["audio"]
        alpha, sigma = (f(math.pi / 2 * t).float()[:, None, None] for f in (torch.cos, torch.sin))
        v = model.model.net(alpha * x + sigma * eps, time=t.float(), **cond)
        torch.testing.assert_close(found, (v - (alpha * eps - sigma * x)).square().mean())
        found.backward()
        assert all(p.grad is not None for p in model.parameters())


def test_texts_are_masked_by_chance(diffgen):
    """With probability 1 a text makes no difference, and what stands for none is trained."""
    empty = diffgen.model.conditioner.empty
    for proba, same in ((1.0, True), (0.0, False)):
        losses = []
        for embedding in (TEXT, -TEXT):
            twin = copy.deepcopy(diffgen)
            losses.append(twin(LATENT, embedding=embedding, embedding_mask_proba=proba).item())
        assert (losses[0] == losses[1]) is same
    diffgen(LATENT, embedding=TEXT, embedding_mask_proba=1.0).backward()
    assert empty.grad.any()
    empty.grad = None


# lengths and chance


@settings(max_examples=8, deadline=None)
@given(length=st.integers(1, 20), count=st.integers(1, 2))
def test_latents_of_any_length_are_decoded(length, count):
    net = UNet1d(**ONE_LEVEL, audio_channels=1, inject_depth=1, inject_channels=3, filters=2)
    encoder = MagnitudeEncoder(
        in_channels=1, channels=8, multipliers=[1], factors=[], num_blocks=[],
        stft_num_fft=63, stft_hop_length=128, out_channels=3,
    )  # fmt: skip
    model = DiffAE(net=net, encoder=encoder)
    latent = model.encode(0.1 * torch.ones(count, 1, 128 * length))
    assert latent.shape == (count, 3, length)
    made = model.decode(latent, num_steps=2)
    assert made.shape == (count, 1, 128 * length)
    assert made.isfinite().all()
    assert not made.requires_grad


def test_a_latent_of_length_12_is_decoded(diffae):
    latent = LATENT[..., :12]
    found = diffae.decode(latent, 2, generator())
    assert found.shape == (1, 2, 12 * 1024)
    drawn = Noise(int(torch.randint(2**62, (), generator=generator())), [0])
    expected = diffae.sampled(drawn.like(found), {"concat": latent}, 2)
    assert torch.equal(found, expected)


def test_chance_is_that_of_a_seed_or_a_generator(diffae):
    latent, before = LATENT[..., :4].repeat(2, 1, 1), torch.get_rng_state()

    def decoded(seed=0, **options):
        twin = small_autoencoder(seed).double()
        twin.model.load_state_dict(diffae.model.state_dict())
        return [twin.decode(latent, 1, **options) for _ in range(2)]

    first, second = decoded()
    every = [*first, *second, *decoded(seed=1)[0]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(every, 2))
    assert all(map(torch.equal, decoded(), (first, second)))
    drawn = decoded(generator=generator(3))
    assert not torch.equal(drawn[0], drawn[1])
    assert all(map(torch.equal, decoded(seed=1, generator=generator(3)), drawn))
    torch.set_rng_state(before)
    diffae.decode(latent, 1)
    assert torch.equal(torch.get_rng_state(), before)


# weights


def test_models_are_copied_and_pickled(diffgen):
    twin = pickle.loads(pickle.dumps(diffgen))
    made = [m.sample(NOISE, embedding=TEXT, num_steps=1) for m in (diffgen, twin)]
    assert torch.equal(*made)
    with torch.no_grad():
        twin.model.net.film.weight.zero_()
    assert not torch.equal(twin.sample(NOISE, embedding=TEXT, num_steps=1), made[0])


def test_other_files_are_refused(files):
    with pytest.raises(OtherWeights, match=r"diffgen\.pt does not hold.*\nthese .* generator"):
        small_autoencoder().load(files / "diffgen.pt")
    with pytest.raises(ValueError, match=r"there is no file nowhere\.pt"):
        small_autoencoder().load("nowhere.pt")


def test_the_pretrained_autoencoder_is_looked_for_and_not_fetched(files, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a download"))
    monkeypatch.setattr(text_to_audio, "MagnitudeEncoder", partial(MagnitudeEncoder, **ENCODER))
    monkeypatch.setattr(text_to_audio, "UNet1d", lambda **given: UNet1d(**{**given, **AUTOENCODER}))
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MissingWeights) as caught:
        text_to_audio.get_pretrained_diffae_from_huggingface()
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "dmae1d-ATC64-v2.bin is missing",
        "archinetai/dmae1d-ATC64-v2/tree/3ffeea68d4c069777055fce9ac77bbb67eec1d68",
        "pytorch_model.bin (741 MB)",
        "python -m avdiffusion.weights get dmae1d-ATC64-v2 FILE",
        str(weights.folders()[0]),
    ):
        assert part in text

    def found():
        return text_to_audio.get_pretrained_diffae_from_huggingface().encode(SOUND.float())

    snapshot = (
        "models--archinetai--dmae1d-ATC64-v2/snapshots/3ffeea68d4c069777055fce9ac77bbb67eec1d68"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    place = tmp_path / "hf" / "hub" / snapshot / "pytorch_model.bin"
    place.parent.mkdir(parents=True)
    place.write_bytes((files / "diffae.pt").read_bytes())
    agree(found(), "encoded", rtol=1e-5, atol=1e-6)
    place.unlink()
    weights.get("dmae1d-ATC64-v2", files / "diffae.pt")
    agree(found(), "encoded", rtol=1e-5, atol=1e-6)


# errors


def test_what_does_not_fit_is_told(diffgen):
    with pytest.raises(ValueError, match=r"told a step for every 64 samples, .* makes one of 1024"):
        DiffAE(net=UNet1d(filters=8, inject_depth=0), encoder=MagnitudeEncoder(**ENCODER))
    for given_ in ({}, {"text": ["a"], "embedding": TEXT}):
        with pytest.raises(ValueError, match=r"a text or its embedding: give one of the two"):
            diffgen(LATENT, **given_)
    with pytest.raises(ValueError, match=r"embedding has 17 tokens, .* told 16 at most"):
        diffgen.sample(LATENT, embedding=torch.zeros(1, 17, 32))


# texts


@pytest.fixture
def t5(tmp_path, monkeypatch):
    """The folder of a random T5 with one token for each byte."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2
    )
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "t5")
    return str(tmp_path / "t5")


def test_texts_become_sound(t5, files):
    def model(seed=0):
        diffae, diffgen = small_autoencoder(seed), small_generator(t5, seed)
        diffae.load(files / "diffae.pt")
        diffgen.load(files / "diffgen.pt")
        return CombinedSampler(
            diffae=diffae,
            diffgen=diffgen,
            text_encoder_name=t5,
            text_encoder_max_length=16,
            device="cpu",
        )

    texts = ["a robin", "rain"]
    options = {"sampling_steps": 2, "decoding_steps": 2, "latent_length": 12}
    made = model().sample(texts, **options)
    assert made.shape == (2, 2, 12 * 1024)
    torch.testing.assert_close(model().sample("a robin", **options), made[:1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(model(1).sample("a robin", **options), made[:1])

    # by hand, with text where there was an embedding
    whole = model()
    embedding, _ = whole.text_encoder(texts, "cpu")
    noise = Noise(0, [0, 1], "DiffGen").like(torch.empty(2, 4, 12))
    latents = [
        whole.diffgen.sample(noise, **told, embedding_scale=5.0, num_steps=2)
        for told in ({"embedding": embedding}, {"text": texts})
    ]
    assert torch.equal(*latents)
    start = Noise(0, [0, 1], "DiffAE").like(made)
    assert torch.equal(whole.diffae.sampled(start, {"concat": latents[0]}, 2), made)
    assert not torch.equal(start[..., :12], noise[:, :2])

    drawn = [model(seed).sample(texts, **options, generator=generator(7)) for seed in (0, 1)]
    assert torch.equal(*drawn)
    longer = CombinedSampler(
        whole.diffae, whole.diffgen, text_encoder_name=t5, text_encoder_max_length=17, device="cpu"
    )
    with pytest.raises(ValueError, match="17 tokens"):
        longer.sample("a", **options)


def test_the_published_calls_work_as_they_are_printed(t5, files, monkeypatch):
    """Those of the README, at small sizes."""
    monkeypatch.setattr(text_to_audio, "MagnitudeEncoder", partial(MagnitudeEncoder, **ENCODER))
    monkeypatch.setattr(
        text_to_audio,
        "UNet1d",
        lambda **given: UNet1d(**{**given, **(AUTOENCODER if "filters" in given else GENERATOR)}),
    )
    monkeypatch.setattr(
        text_to_audio, "T5Encoder", lambda *_, **__: T5Encoder(t5, width=32, max_length=16)
    )
    main = text_to_audio
    diffae = main.get_default_diffae(state_dict_file=None)
    audio = torch.randn(1, 2, 2**13)
    loss = diffae(audio)
    assert loss.shape == ()
    latent = diffae.encode(audio)
    assert latent.shape == (1, 4, 8)
    sample = diffae.decode(latent, num_steps=2)
    assert sample.shape == audio.shape

    diffgen = main.get_default_diffgen(state_dict_file=files / "diffgen.pt")
    embedding = torch.randn(1, 16, 32)
    latent = torch.randn(1, 4, 16)
    loss = diffgen(latent, embedding=embedding, embedding_mask_proba=0.1)
    assert loss.shape == ()
    noise_latent = torch.randn(1, 4, 16)
    sample = diffgen.sample(noise_latent, embedding=embedding, embedding_scale=5.0, num_steps=2)
    assert sample.shape == noise_latent.shape

    model = main.CombinedSampler(
        diffae=diffae,
        diffgen=diffgen,
        text_encoder_name="t5-base",
        text_encoder_max_length=128,
        device="cpu",
    )
    made = model.sample(
        "Description of the Audio you want to generate",
        sampling_steps=2,
        decoding_steps=2,
        embedding_scale=5.0,
        latent_length=8,
    )
    assert made.shape == (1, 2, 8192)
    model = main.get_default_combined_sampler(
        diffae_state_dict_file=files / "diffae.pt", diffgen_state_dict_file=None
    )
    agree(model.diffae.encode(SOUND.float().to(model.device)), "encoded", rtol=1e-5, atol=1e-6)


def test_the_models_alone_import_no_heavy_package():
    code = """
import sys
import avdiffusion.text_to_audio
heavy = {"pytorch_lightning", "hydra", "omegaconf", "transformers", "av", "safetensors"}
heavy &= sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
