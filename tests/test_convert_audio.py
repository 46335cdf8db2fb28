"""Published files of sound become checkpoints that compute what the published code does."""

import re
from pathlib import Path

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

import avdiffusion
from avdiffusion import checkpoint, convert, weights
from avdiffusion.diffusion.guide import ClassifierFree
from avdiffusion.media import Media
from avdiffusion.nn.magnitude_encoder import MagnitudeEncoder
from avdiffusion.nn.unet1d import UNet1d
from avdiffusion.published_audio import WINDOW, expanded
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.sampler import last

OWN = ("net.", "encoder.")  # the names that have each tensor once
NEAR = {"rtol": 1e-5, "atol": 2e-6}  # of float32


def overrides(place, values):
    return [f"model.diffusion.{place}.{k}={v}".replace(" ", "") for k, v in values.items()]


DMAE = ["exp=dmae", "data.root=x", "data.samples=8192"]
DMAE += overrides("net", {k: v for k, v in AUTOENCODER.items() if k != "inject_channels"})
DMAE += overrides("conditioner.encoder", ENCODER)
DIFFGEN = ["exp=diffgen", "data.root=x", "data.samples=16384"]
DIFFGEN += overrides("net", {k: v for k, v in GENERATOR.items() if k != "context_width"})
DIFFGEN += overrides("conditioner.encoder", {"width": 32, "max_length": 16})
GRAFTED = [*DIFFGEN, "init.codec.system=dmae.ckpt"]


@pytest.fixture(scope="module")
def files():
    """What the published package would have saved of both models: every tensor three times."""
    autoencoder = UNet1d(**AUTOENCODER), MagnitudeEncoder(**ENCODER), None
    generator = UNet1d(**GENERATOR), None, nn.Parameter(torch.zeros(16, 32))
    return {"dmae": every(autoencoder), "diffgen": every(generator)}


def every(parts):
    found = {key: value.float() for key, value in drawn(*parts).items()}
    for key in found:  # of the layer with two names
        found[key] = found[
            re.sub(r"^(net\.blocks\.(2\.blocks\.)?1\.blocks\.)0\.0", r"\g<1>1.0", key)
        ]
    net = {key: value for key, value in found.items() if key.startswith("net.")}
    found |= {f"{alias}.{k}": v for alias in ("diffusion", "sampler") for k, v in net.items()}
    found |= {} if parts[1] is None else {WINDOW: parts[1].window}
    assert found.keys() == expanded(*parts).keys()
    return found


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Runs the command on some content; returns what it says."""
    monkeypatch.chdir(tmp_path)

    def run(content, *words, layout="audio_diffusion", source="theirs.bin", target="ours.ckpt"):
        if content is not None:
            torch.save(content, source)
        convert.main([layout, source, target, *words])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(command):
    def run(*given, **options):
        with pytest.raises(SystemExit, match=r"^error: ") as error:
            command(*given, **options)
        return str(error.value).removeprefix("error: ")

    return run


def wrapped(weights, wrapper):
    return {f"{wrapper}{key}": value for key, value in weights.items()}


def equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# ---------------------------------------------------------------------------------- what it makes


@torch.no_grad()
def test_the_autoencoder_is_the_published_one(files, command):
    assert command(files["dmae"], *DMAE).splitlines() == [
        "ours.ckpt: 0.2 M parameters, the 686 tensors of theirs.bin",
        "to sample: python sample.py ckpt=ours.ckpt given=DIR",
    ]
    system = avdiffusion.load("ours.ckpt", device="cpu")
    sound = SOUND.float()
    for model in (system.model, system.ema.ema_model):
        told = model.condition({"audio": sound})
        agree(told["concat"], "encoded", **NEAR)
        agree(model.net(sound, time=torch.tensor([0.37]), **told), "denoised", **NEAR)
    denoise = system.denoise(system.task._replace(cond=told))
    made = last(DDIM(steps=3)(denoise, Media(audio=START.float()), system.model.path))
    agree(made["audio"], "decoded in 3", **NEAR)

    stored = checkpoint.read("ours.ckpt")
    assert stored["converted"] == {"layout": "audio_diffusion", "file": "theirs.bin"}
    state = stored["state_dict"]
    for key in ("net.film.weight", "conditioner.encoder.start.conv1.bias"):
        pair = [state[f"{place}.{key}"] for place in ("model", "ema.ema_model")]
        assert pair[0].data_ptr() == pair[1].data_ptr()  # in the file once
    assert not state["model.conditioner.moments.batches"]
    clips = system.conditioned({"audio": sound}, [0], sampler=DDIM(steps=2)).clips["audio"]
    assert clips.shape == (1, 2, 8192)
    assert clips.isfinite().all()


@torch.no_grad()
def test_the_generator_is_the_published_one_with_its_autoencoder(files, command):
    command(files["dmae"], *DMAE, target="dmae.ckpt")
    assert command(files["diffgen"], *GRAFTED).splitlines() == [
        "ours.ckpt: 0.1 M parameters, the 570 tensors of theirs.bin",
        'to sample: python sample.py ckpt=ours.ckpt text="a dog barking"',
    ]
    system, before = (avdiffusion.load(f, device="cpu") for f in ("ours.ckpt", "dmae.ckpt"))
    equal(system.codec.model.state_dict(), before.ema.ema_model.state_dict())
    text, task = TEXT.float(), system.task
    for model in (system.model, system.ema.ema_model):
        told = model.condition({"embedding": text})
        loss = model.loss(
            Media(audio=LATENT.float()),
            told,
            t=torch.tensor([0.25], dtype=torch.float64),
            noise=Media(audio=NOISE.float()),
        )
        assert loss["audio"].item() == pytest.approx(LOSS, rel=1e-5)
    free = system.denoise(task._replace(cond=model.conditioner.null(told)))
    denoise = system.denoise(task._replace(cond=told))

    def guided(scale):
        return ClassifierFree(scale=scale)(denoise, task._replace(free=free))

    t = torch.tensor(0.6, dtype=torch.float64)
    for scale in (1, 5, 0):
        found = guided(scale)(Media(audio=LATENT.float()), t)
        v = task.path.alpha(t) * found.eps - task.path.sigma(t) * found.x0
        agree(v["audio"], f"scale {scale}", **NEAR)
    made = last(DDIM(steps=4)(guided(3), Media(audio=OTHER_START.float()), task.path))
    agree(made["audio"], "made in 4 at scale 3", **NEAR)

    # what it diffuses are the latents as they are, and it decodes them with the other
    sound = {"audio": SOUND.float().repeat(1, 1, 2)}
    latent = before.ema.ema_model.condition(sound)["concat"]
    assert torch.equal(system.encode(sound)["audio"], latent)
    clips = system.sample(
        1, told=lambda numbers: {"embedding": text}, sampler=DDIM(steps=2), micro_batch=1
    )
    assert clips["audio"].shape == (1, 2, 16384)
    assert clips["audio"].std() > 0.1


def test_every_form_of_a_file_gives_the_same_checkpoint(files, command, tmp_path):
    once = {k: v for k, v in files["dmae"].items() if k.startswith(OWN) and k != WINDOW}
    other = wrapped({key: value + 1 for key, value in once.items()}, "model.")
    lightning = other | {"ema.initted": torch.tensor([True])} | wrapped(other, "ema.online_")
    forms = {
        "hub": wrapped(files["dmae"], "model."),
        "once": once,
        "devices": wrapped(once, "module."),
        "lightning": {"state_dict": lightning | wrapped(files["dmae"], "ema.ema_model.")},
        "older": {"state_dict": other | wrapped(once, "model_ema.")},
        "no average": {"state_dict": wrapped(once, "model."), "epoch": 3},
    }
    for form, content in forms.items():
        (tmp_path / form).mkdir()
        command(content, *DMAE, target=f"{form}/ours.ckpt")
    assert len({(tmp_path / form / "ours.ckpt").read_bytes() for form in forms}) == 1


# -------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_averages_go_back_to_the_published_layout(suffix, files, command):
    pytest.importorskip("safetensors")
    command(files["dmae"], *DMAE, target="dmae.ckpt")
    command(files["diffgen"], *GRAFTED)
    for ours, name, number in (("dmae.ckpt", "dmae", 255), ("ours.ckpt", "diffgen", 190)):
        stored = checkpoint.read(ours)
        for key, value in stored["state_dict"].items():
            if key.startswith("model.") and value.is_floating_point():
                stored["state_dict"][key] = value + 1  # what is trained, not its average
        checkpoint.write(stored, ours_file := Path(f"trained_{ours}"))
        out = f"{name}{suffix}"
        said = command(None, "--export", source=str(ours_file), target=out)
        assert said == f"{out}: {number} tensors, the average of {ours_file}\n"
        once = {k: v for k, v in files[name].items() if k.startswith(OWN) and k != WINDOW}
        equal(weights.read(out), once)
    command(None, *DMAE, source=f"dmae{suffix}", target="again.ckpt")
    equal(*(checkpoint.read(f)["state_dict"] for f in ("again.ckpt", "dmae.ckpt")))


def test_exporting_that_cannot_work(files, command, refused):
    command(files["dmae"], *DMAE)
    said = refused(None, "--export", source="ours.ckpt", target="out.pt", layout="mm_diffusion")
    assert "is a UNet1d, the weights are of a CoupledUNet: give exp=landscape" in said
    said = refused(None, "--export", *DMAE, source="ours.ckpt", target="out.pt")
    assert said == "a checkpoint has its config: leave out exp=dmae"
    assert "is there already" in refused(None, "--export", source="ours.ckpt", target="theirs.bin")
    assert "carries no format version" in refused(
        None, "--export", source="theirs.bin", target="out.pt"
    )


def test_normalised_latents_are_not_those_of_published_generators(files, command, refused):
    """Neither into a checkpoint nor out of one: the published layout does not know of them."""
    command(files["dmae"], *DMAE, target="dmae.ckpt")
    command(files["diffgen"], *GRAFTED)

    def trained(name):
        stored = checkpoint.read(name)
        for key, value in stored["state_dict"].items():
            if key.endswith("moments.mean"):
                stored["state_dict"][key] = value + 1
        checkpoint.write(stored, Path(f"trained_{name}"))

    trained("dmae.ckpt")
    trained("ours.ckpt")
    words = [*DIFFGEN, "init.codec.system=trained_dmae.ckpt"]
    text = refused(files["diffgen"], *words, target="other.ckpt")
    assert text.startswith("trained_dmae.ckpt was trained here and normalises its latents")
    text = refused(None, "--export", source="trained_ours.ckpt", target="out.pt")
    assert "no place in the published layout" in text
    assert not {Path("other.ckpt"), Path("out.pt")} & {*Path().iterdir()}
    said = command(None, "--export", source="trained_dmae.ckpt", target="out.pt")
    assert said.startswith("out.pt: 255 tensors")  # an autoencoder's own are as they are


# -------------------------------------------------------------------------------------- wrong files


def test_files_and_configs_of_other_kinds_are_named(files, command, refused):
    command(files["dmae"], *DMAE, target="dmae.ckpt")
    for content, words, said in (
        (files["dmae"], GRAFTED, "these are weights of an autoencoder: give exp=dmae"),
        (files["diffgen"], DMAE, "these are weights of a generator: give exp=diffgen"),
        (files["diffgen"], DIFFGEN, "give its checkpoint as init.codec.system=CKPT"),
        (files["dmae"], ["exp=landscape"], "a CoupledUNet, the weights are of a UNet1d"),
        (files["diffgen"], [*GRAFTED, "model/conditioner=text"], "give model/conditioner=text_t5"),
    ):
        text = refused(content, *words)
        assert text.endswith(said) or said in text, text
    missing = {k: v for k, v in files["dmae"].items() if "encoder.to_out" not in k}
    assert "2 missing (encoder 2)\n  encoder.to_out.weight: 4x16x1" in refused(missing, *DMAE)
    nan = files["dmae"] | {"encoder.to_out.bias": torch.full((4,), torch.nan)}
    assert "NaN or infinity in 1 tensors" in refused(nan, *DMAE)
    for wrapper in ("", "model.", "ema.ema_model.", "module."):
        content = wrapped(files["dmae"], wrapper)
        text = refused(content, "exp=landscape", layout="mm_diffusion")
        assert text.endswith("holds a network of sound: convert it as audio_diffusion")
    picture = {"input_blocks.0.0.video_conv.video_conv_spatial.weight": torch.zeros(1)}
    assert refused(picture, *DMAE).endswith("sound together: convert it as mm_diffusion")
