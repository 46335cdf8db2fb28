"""Published files become checkpoints that sample as the weights in them do; other files do not."""

import os
import subprocess
import sys

import golden_network
import pytest
import torch
from entry import Project
from golden_media import close, load, z
from golden_network import frames_first, recording, relative
from hypothesis import given, settings
from hypothesis import strategies as st

import avdiffusion
from avdiffusion import checkpoint, convert, published, published_unet
from avdiffusion.nn.coupled_unet import CoupledUNet
from avdiffusion.nn.unet import UNet
from avdiffusion.samplers.ddim import DDIM

CASE, META = recording("noshift")
NET = "model.diffusion.net"
SMALL = [
    "exp=landscape",
    f"{NET}.channels=32",
    f"{NET}.num_res_blocks=1",
    f"{NET}.head_channels=32",
]
SMALL += ["data.frames=8", "data.size=[16,16]", "data.samples=2560"]  # of the recorded network
ARGUMENTS = {
    "channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "head_channels": 8,
    "cross_attention_resolutions": [1],
    "cross_attention_windows": [2],
    "video_attention_resolutions": [2],
}
CHANGES = [f"{NET}.{key}={value}".replace(" ", "") for key, value in ARGUMENTS.items()]
CHANGES += ["data.frames=4", "data.size=[8,8]", "data.samples=640"]
TINY = ["exp=landscape", *CHANGES]

SR_CASE, SR_META = load("sr_unet.npz")
SR = {"channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2]}
SMALL_SR = ["exp=landscape_sr", *(f"{NET}.{k}={v}".replace(" ", "") for k, v in SR.items())]
SMALL_SR += ["data.size=[32,32]"]  # of the recorded network


@pytest.fixture(scope="module")
def weights():
    """What the authors' training would have saved of a tiny network."""
    with torch.device("meta"):
        net = CoupledUNet(**ARGUMENTS)
    return {
        key: golden_network.weight(key, tuple(value.shape))
        for key, value in published.to_published(net).items()
    }


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Runs the command on some content, in a folder; returns what it says."""

    def run(
        content,
        *words,
        layout="mm_diffusion",
        source="theirs.pt",
        target="ours.ckpt",
        folder=".",
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        if isinstance(content, bytes):
            (tmp_path / folder / source).write_bytes(content)
        elif content is not None:
            torch.save(content, source)
        convert.main([layout, source, target, *words])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(command, tmp_path):
    """Runs it where it has to fail and to write nothing; returns why it does."""

    def run(content, *words, **options):
        with pytest.raises(SystemExit, match=r"^error: ") as error:
            command(content, *words, **options)
        assert files(tmp_path) <= {"theirs.pt"}
        return str(error.value).removeprefix("error: ")

    return run


def files(folder):
    return {file.name for file in folder.iterdir() if file.is_file()}


def one_line(text):
    assert "\n" not in text
    return text


# ---------------------------------------------------------------------------------- what it makes


def test_the_command_gives_the_published_network(tmp_path):
    weights = golden_network.weights(META)
    torch.save(weights, tmp_path / "theirs.pt")
    words = ["mm_diffusion", "theirs.pt", "ours.ckpt", *SMALL]
    line = [sys.executable, "-m", "avdiffusion.convert", *words]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "ours.ckpt: 5.9 M parameters, the 726 tensors of theirs.pt",
        "to sample: python sample.py ckpt=ours.ckpt",
    ]
    assert done.stderr == ""
    assert files(tmp_path) == {"theirs.pt", "ours.ckpt"}

    system = avdiffusion.load(tmp_path / "ours.ckpt", device="cpu")
    video, audio, time = golden_network.inputs(META)
    for model in (system.model, system.ema.ema_model):
        with torch.no_grad():
            video_out, audio_out = model.net(video, audio, time=time)
        assert relative(frames_first(video_out), CASE["video"]) <= 1e-4
        assert relative(audio_out, CASE["audio"]) <= 1e-4

    direct = checkpoint.build(checkpoint.compose([*SMALL, "paths.run=run"]).model).eval()
    state = published.from_published(direct.model.net, weights)
    direct.ema.ema_model.net.load_state_dict(state)
    options = {"seed": 3, "sampler": DDIM(steps=3), "micro_batch": 2}
    clips, expected = (each.sample(2, **options) for each in (system, direct))
    assert {name: tuple(value.shape) for name, value in clips.items()} == {
        "video": (2, 3, 8, 16, 16),
        "audio": (2, 1, 2560),
    }
    for name, value in clips.items():
        assert value.isfinite().all()
        assert value.std() > 0.1
        assert torch.equal(value, expected[name])


def test_the_checkpoint_holds_what_one_of_training_does(weights, command, tmp_path):
    command(weights, *TINY)
    stored = checkpoint.read(tmp_path / "ours.ckpt")
    config = stored["hyper_parameters"]
    assert config == checkpoint.plain(checkpoint.compose(["paths.run=runs/landscape", *TINY]))
    assert (config["name"], config["data"]["frames"]) == ("landscape", 4)
    assert (stored["epoch"], stored["global_step"]) == (0, 0)
    assert stored["avdiffusion"]["format"] >= 1
    assert stored["converted"] == {"layout": "mm_diffusion", "file": "theirs.pt"}
    system = checkpoint.build(config["model"])
    assert stored["state_dict"].keys() == system.state_dict().keys()
    for key, value in system.model.state_dict().items():
        assert value.shape == stored["state_dict"][f"model.{key}"].shape
        pair = [stored["state_dict"][f"{place}.{key}"] for place in ("model", "ema.ema_model")]
        assert pair[0].data_ptr() == pair[1].data_ptr()  # in the file once


def test_every_form_of_a_file_gives_the_same_checkpoint(weights, command, tmp_path):
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    other = {key: value + 1 for key, value in weights.items()}
    parameters = {key: torch.nn.Parameter(value) for key, value in weights.items()}
    half = {key: value.half() for key, value in weights.items()}
    forms = {
        "raw": weights,
        "module": wrapped,
        "parameters": parameters,
        "state": {"state_dict": weights, "step": 100_000},
        "model": {"model": wrapped, "opt": {"state": {}}, "args": None},
        "average": {"model": other, "ema": weights},
        "shuffled": dict(reversed(weights.items())),
    }
    said = {form: command(content, *TINY, folder=form) for form, content in forms.items()}
    assert said["average"].startswith("ours.ckpt: 0.1 M parameters, the 358 tensors of theirs.pt")
    assert "under 'ema'" in said["average"]
    assert "under 'model'" in said["model"]
    assert "under" not in said["raw"]
    files = {(tmp_path / form / "ours.ckpt").read_bytes() for form in forms}
    assert len(files) == 1
    command(half, *TINY, folder="half")
    state = checkpoint.read(tmp_path / "half" / "ours.ckpt")["state_dict"]
    assert state["model.net.film.weight"].dtype == torch.float32


def test_aist_is_landscape_with_another_name(weights, command, tmp_path):
    plain = [
        checkpoint.plain(checkpoint.compose([f"exp={name}", "paths.run=run"]))
        for name in ("landscape", "aist")
    ]
    assert all(plain[0][part] == plain[1][part] for part in ("model", "sampler", "guide"))
    assert plain[0]["data"]["root"] != plain[1]["data"]["root"]
    words = ["exp=aist", *CHANGES]
    for name, overrides in (("aist", words), ("landscape", TINY)):
        command(weights, *overrides, target=f"{name}.ckpt")
    states = [
        checkpoint.read(tmp_path / f"{name}.ckpt")["state_dict"] for name in ("aist", "landscape")
    ]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert avdiffusion.load(tmp_path / "aist.ckpt", device="cpu").config["name"] == "aist"


def test_two_averages_are_both_the_published_one(weights, command, tmp_path):
    command(weights, *TINY, "model/ema=power")
    system = checkpoint.load(tmp_path / "ours.ckpt", device="cpu")
    expected = published.from_published(system.model.net, weights)
    for model in (system.ema.ema_model, *system.ema.others):
        assert all(torch.equal(v, expected[k]) for k, v in model.net.state_dict().items())


def test_files_are_not_written_over_unless_told(weights, command, tmp_path):
    (tmp_path / "ours.ckpt").write_text("precious")
    with pytest.raises(SystemExit, match=r"ours\.ckpt is there already: .*--overwrite$"):
        command(weights, *TINY)
    assert (tmp_path / "ours.ckpt").read_text() == "precious"
    command(weights, "--overwrite", *TINY)
    checkpoint.read(tmp_path / "ours.ckpt")
    with pytest.raises(SystemExit, match=r"theirs\.pt is the file to read"):
        command(weights, *TINY, "--overwrite", target="theirs.pt")
    assert torch.load(tmp_path / "theirs.pt", weights_only=True).keys() == weights.keys()


def test_a_name_that_has_to_be_quoted(weights, command):
    said = command(weights, *TINY, target="step=0 of theirs.ckpt")
    assert said.splitlines()[1] == "to sample: python sample.py \"ckpt='step=0 of theirs.ckpt'\""


# --------------------------------------------------------------------------------- super-resolution


def test_super_resolution_is_the_published_network(command, tmp_path):
    """In each of the forms that are published: bare, and with the classes of guided-diffusion."""
    weights = golden_network.weights(SR_META)
    classes = {"label_emb.weight": torch.zeros(1000, 128)}
    forms = {
        "bare": weights,
        "classes": {**weights, **classes},
        "module": {f"module.{key}": value for key, value in weights.items()},
        "wrapped": {"state_dict": {f"module.{k}": v for k, v in {**weights, **classes}.items()}},
    }
    said = {
        form: command(content, *SMALL_SR, layout="guided_diffusion", folder=form)
        for form, content in forms.items()
    }
    assert said["bare"].splitlines() == [
        "ours.ckpt: 0.8 M parameters, the 144 tensors of theirs.pt",
        "to sample: python sample.py ckpt=ours.ckpt given=DIR",
    ]
    assert said["classes"].splitlines()[0].endswith("theirs.pt; label_emb.weight is left out")
    assert said["wrapped"].splitlines()[0].endswith("'state_dict'; label_emb.weight is left out")
    assert len({(tmp_path / form / "ours.ckpt").read_bytes() for form in forms}) == 1

    stored = checkpoint.read(tmp_path / "bare" / "ours.ckpt")
    assert stored["converted"] == {"layout": "guided_diffusion", "file": "theirs.pt"}
    system = avdiffusion.load(tmp_path / "bare" / "ours.ckpt", device="cpu")
    x, low = z("r.in.x", (2, 3, 32, 32)), z("r.in.low_res", (2, 3, 8, 8), 0.5).clamp(-1, 1)
    time = torch.tensor(SR_META["timesteps"]).float()
    for model in (system.model, system.ema.ema_model):
        cond = model.condition({"low_res": low[:, :, None]})
        with torch.no_grad():
            out = model.net(x[:, :, None], time=time, **cond)
        close(out[:, :, 0], SR_CASE["output"])


def test_a_checkpoint_goes_back_to_the_published_layout(weights, command):
    for layout, content, words in (
        ("mm_diffusion", weights, TINY),
        ("guided_diffusion", golden_network.weights(SR_META), SMALL_SR),
    ):
        command(content, *words, "--overwrite", layout=layout)
        said = command(
            None, "--export", "--overwrite", layout=layout, source="ours.ckpt", target="out.pt"
        )
        assert said == f"out.pt: {len(content)} tensors, the average of ours.ckpt\n"
        found = torch.load("out.pt", weights_only=True)
        assert found.keys() == content.keys()
        assert all(torch.equal(found[key], value) for key, value in content.items())


# -------------------------------------------------------------------------------------- wrong files


def test_what_differs_is_listed(weights, refused):
    gone = ("time_embed.0.bias", "output_blocks.1.0.emb_layers.1.weight")
    content = {key: value for key, value in weights.items() if key not in gone}
    content["label_emb.weight"] = torch.zeros(10, 8)
    content["video_out.2.video_conv.weight"] = torch.zeros(6, 8, 3, 3, 3)
    content["audio_out.0.GroupNorm.bias"] = torch.zeros(8, dtype=torch.int64)
    assert refused(content, *TINY).splitlines() == [
        "theirs.pt does not hold the network of this config",
        "2 missing (time_embed 1, output_blocks 1)",
        "  time_embed.0.bias: 8",
        "  output_blocks.1.0.emb_layers.1.weight: 32x8",
        "1 extra (label_emb 1)",
        "  label_emb.weight: 10x8",
        "2 of another shape (audio_out 1, video_out 1)",
        "  audio_out.0.GroupNorm.bias: 8 torch.int64 torch.strided cpu, not 8",
        "  video_out.2.video_conv.weight: 6x8x3x3x3, not 3x8x3x3x3",
    ]


def test_long_lists_are_cut_and_counted(weights, refused):
    lines = refused(weights, *SMALL).splitlines()
    heads = [line for line in lines if not line.startswith("  ")]
    with torch.device("meta"):
        other = published.to_published(CoupledUNet(channels=32, num_res_blocks=1, head_channels=32))
    common = other.keys() & weights.keys()
    expected = {
        "missing": len(other) - len(common),
        "extra": len(weights) - len(common),
        "of another shape": sum(other[key].shape != weights[key].shape for key in common),
    }
    assert min(expected.values()) >= 12
    counts = [line.split(" (")[0].split(" ", 1) for line in heads[1:-1]]
    assert {name: int(count) for count, name in counts} == expected
    for (count, _), line in zip(counts, heads[1:-1], strict=True):
        assert line.endswith("such as") == (int(count) > 12)
    assert len(lines) - len(heads) == 36
    shown = {line.strip().partition(".")[0] for line in lines if ", not " in line}
    assert shown == {key.partition(".")[0] for key in other}


OTHERS = {
    "deeper": {"channels": 16, "num_res_blocks": 2},
    "learned variance": {"out_factor": 2, "scale_shift_norm": False},
    "stereo": {"audio_channels": 2},
    "levels": {
        "channel_mult": (1, 3, 2),
        "cross_attention_resolutions": (1, 4),
        "cross_attention_windows": (2, 4),
        "video_attention_resolutions": (1,),
        "audio_attention_resolutions": (2,),
        "middle_cross_attention": False,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_advice_is_right(name, weights, command, refused, tmp_path):
    """What the error names, and what shapes cannot tell, makes the file convert."""
    torch.manual_seed(0)
    net = CoupledUNet(**{**ARGUMENTS, **OTHERS[name]})
    content = published.to_published(net)
    advice = refused(content, *TINY).splitlines()[-1]
    assert advice.startswith("its shapes fit with ")
    words = [word.strip("',") for word in advice.removeprefix("its shapes fit with ").split()]
    words = [word for word in words if "=" in word]
    if "cross_attention_windows" in OTHERS[name]:
        assert advice.endswith(f", and 2 {NET}.cross_attention_windows")
        words.append(f"{NET}.cross_attention_windows=[2,4]")
    command(content, *TINY, *words)
    system = checkpoint.load(tmp_path / "ours.ckpt", device="cpu")
    expected = net.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in system.model.net.state_dict().items())
    clips = system.sample(1, sampler=DDIM(steps=1), micro_batch=1)
    assert all(value.isfinite().all() for value in clips.values())


def test_the_published_network_asks_for_its_experiment(refused):
    """Its tensors here are one number each, repeated."""
    with torch.device("meta"):
        full = CoupledUNet()
    tensors = {key: torch.zeros(1).expand(value.shape) for key, value in full.state_dict().items()}
    content = {
        entry.published: tensors[entry.ours][entry.rows] for entry in published.entries(full)
    }
    content = {e.published: content[e.published].reshape(e.shape) for e in published.entries(full)}
    for words in ([], ["exp=folder", "data.root=x"], TINY):
        text = refused(content, *words)
        assert text.splitlines()[-1].startswith("it is the published network: give exp=landscape")


def test_networks_of_the_other_layout_are_named(weights, refused):
    for channels, what in ((6, "a super-resolution network"), (3, "an image network")):
        content = {
            "time_embed.0.weight": torch.zeros(768, 192),
            "input_blocks.0.0.weight": torch.zeros(192, channels, 3, 3),
            "input_blocks.1.0.in_layers.0.weight": torch.zeros(192),
            "out.2.weight": torch.zeros(6, 192, 3, 3),
        }
        for key in ("", "module."):
            text = refused({key + name: value for name, value in content.items()}, "exp=landscape")
            assert f"holds {what} ({channels} channels in, 192 wide)" in one_line(text)
            assert text.endswith(": convert it as guided_diffusion")
    text = one_line(refused(weights, *SMALL_SR, layout="guided_diffusion"))
    assert text.endswith("a network of video and sound together: convert it as mm_diffusion")


OTHER_SR = {
    "deeper": {"channels": 16, "num_res_blocks": 2},
    "no variance": {"out_factor": 1, "scale_shift_norm": False},
    "levels": {"channel_mult": (1, 1, 2), "attention_resolutions": (1, 4)},
    "convolutions": {"resblock_updown": False},
}


@pytest.mark.parametrize("name", OTHER_SR)
def test_the_advice_for_super_resolution_is_right(name, command, refused, tmp_path):
    torch.manual_seed(0)
    net = UNet(**{**SR, **OTHER_SR[name]})
    content = published_unet.to_published(net)
    advice = refused(content, *SMALL_SR, layout="guided_diffusion").splitlines()[-1]
    assert advice.startswith("its shapes fit with ")
    words = [word.strip("'") for word in advice.removeprefix("its shapes fit with ").split()]
    command(content, *SMALL_SR, *words, layout="guided_diffusion")
    system = checkpoint.load(tmp_path / "ours.ckpt", device="cpu")
    expected = net.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in system.model.net.state_dict().items())


def test_weights_of_frames_are_not_those_of_clips(refused):
    content = golden_network.weights(SR_META)
    text = refused(content, *SMALL_SR, f"{NET}.dims=3", layout="guided_diffusion")
    assert "these are weights for single frames, its dims=3 is for clips" in text
    assert text.splitlines()[-1] == f"its shapes fit with {NET}.dims=2"
    word = f"{NET}.attention=factorised"
    text = refused(content, *SMALL_SR, word, layout="guided_diffusion")
    assert "of its tensors are in no file, such as decoder.0.time." in text
    assert text.splitlines()[-1] == f"its shapes fit with {NET}.attention=spatial"


def test_published_super_resolution_asks_for_its_experiment(refused):
    with torch.device("meta"):
        full = UNet()
    one = torch.zeros(1)
    content = {e.published: one.expand(e.shape) for e in published_unet.entries(full)}
    assert len(content) == 566
    options = {"layout": "guided_diffusion"}
    text = refused(content, *SMALL_SR, **options)
    assert "it is the published network: give exp=landscape_sr or exp=aist_sr" in text
    text = one_line(refused(content, "exp=landscape", **options))
    assert f"{NET} is a CoupledUNet, the weights are of a UNet: give exp=landscape_sr" in text


def test_three_dimensional_convolutions_are_named(weights, refused):
    content = {key.replace("video_conv_spatial", "video_conv"): v for key, v in weights.items()}
    assert "video_type=3d" in refused(content, *TINY).splitlines()[-1]


class Hostile:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_what_would_run_does_not(weights, refused, tmp_path):
    for content in (Hostile(tmp_path / "ran"), {**weights, "extra": Hostile(tmp_path / "ran")}):
        text = one_line(refused(content, *TINY))
        assert "is refused: it holds more than tensors and plain values" in text
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_weights(weights, refused, tmp_path):
    torch.save(weights, tmp_path / "theirs.pt")
    whole = (tmp_path / "theirs.pt").read_bytes()
    for content, words in {
        b"": "is no checkpoint, or only the beginning of one",
        b"Landscape\n" * 500: "is no checkpoint, or only the beginning of one",
        whole[: len(whole) // 2]: "is no checkpoint, or only the beginning of one",
        whole[: len(whole) // 4] + whole[len(whole) // 2 :]: "theirs.pt",
    }.items():
        assert words in one_line(refused(content, *TINY))
    for content, words in (
        ({}, "holds no weights"),
        ([torch.zeros(2)], "holds no weights"),
        ({"state_dict": {}}, "'state_dict' in it is a dict"),
        ({**weights, "step": 7}, "'step' in it is a int"),
        ({"state": {}, "param_groups": []}, "holds the state of an optimiser.*ema_0.9999"),
        ({**weights, "time_embed.0.bias": torch.full((8,), torch.nan)}, "NaN or infinity in 1 "),
        ({"avdiffusion": {"format": 1}}, "is an avdiffusion checkpoint already"),
    ):
        text = one_line(refused(content, *TINY))
        assert all(part in text for part in words.split(".*")), text


def test_commands_that_cannot_work(weights, refused, tmp_path):
    assert one_line(refused(None, *TINY)) == "there is no file theirs.pt"
    for words, said in {
        ("exp=folder",): "data.root is needed: give it as data.root=...",
        ("exp=nowhere",): "Could not find 'exp/nowhere'",
        ("exp=landscape,aist",): "Ambiguous value",
        ("name=a=b",): "'name=a=b' cannot be parsed",
        (*TINY, "data.size=[9,8]"): "9x8 pixels do not divide by 2",
        (*TINY, "model/codec=patches"): "as they are diffused have [48, 16]",
        (*TINY, "data.channels=2"): "takes [3, 1] channels, and ['video', 'audio'] as they are "
        "diffused have [3, 2]",
    }.items():
        assert said in one_line(refused(weights, *words))
    assert "there is no folder nowhere" in one_line(
        refused(weights, *TINY, target="nowhere/ours.ckpt")
    )
    assert "is a folder" in one_line(refused(weights, *TINY, target=str(tmp_path)))


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as end:
        convert.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "mm_diffusion Landscape.pt landscape.ckpt exp=landscape\n" in text
    assert "mm_diffusion AIST++.pt aist.ckpt exp=aist\n" in text
    assert "guided_diffusion Landscape_SR.pt landscape_sr.ckpt exp=landscape_sr\n" in text


# ------------------------------------------------------------------------------------- the settings


@settings(max_examples=25, deadline=None)
@given(
    levels=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    blocks=st.integers(1, 3),
    cross=st.sets(st.sampled_from((1, 2, 4, 8))),
    video=st.sets(st.sampled_from((1, 2, 4, 8))),
    audio=st.sets(st.sampled_from((1, 2, 4, 8))),
    middle=st.booleans(),
    film=st.booleans(),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2)),
)
def test_shapes_tell_the_settings(levels, blocks, cross, video, audio, middle, film, channels):
    scales = {2**k for k in range(len(levels))}
    expected = {
        "video_channels": channels[0],
        "audio_channels": channels[1],
        "channels": 4,
        "channel_mult": tuple(levels),
        "num_res_blocks": blocks,
        "cross_attention_resolutions": tuple(sorted(cross & scales)),
        "video_attention_resolutions": tuple(sorted(video & scales)),
        "audio_attention_resolutions": tuple(sorted(audio & scales)),
        "middle_cross_attention": middle,
        "scale_shift_norm": film,
        "out_factor": channels[2],
    }
    windows = (1,) * len(cross & scales)
    net = CoupledUNet(**expected, cross_attention_windows=windows, num_heads=2, head_channels=2)
    tensors = published.to_published(net)
    assert published.settings(tensors) == expected
    tensors.popitem()
    assert published.settings(tensors) is None


@settings(max_examples=25, deadline=None)
@given(
    levels=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    blocks=st.integers(1, 3),
    attention=st.sets(st.sampled_from((1, 2, 4, 8))),
    film=st.booleans(),
    updown=st.booleans(),
    told=st.integers(0, 4),
    factor=st.integers(1, 2),
)
def test_shapes_tell_the_settings_of_super_resolution(
    levels, blocks, attention, film, updown, told, factor
):
    scales = {2**k for k in range(len(levels))}
    expected = {
        "dims": 2,
        "video_channels": 3,
        "concat_channels": told,
        "channels": 4,
        "channel_mult": tuple(levels),
        "num_res_blocks": blocks,
        "conv": "2d",
        "attention": "spatial",
        "attention_resolutions": tuple(sorted(attention & scales)),
        "scale_shift_norm": film,
        "resblock_updown": updown or len(levels) == 1,
        "out_factor": factor,
    }
    tensors = published_unet.to_published(UNet(**expected, num_heads=2))
    assert published_unet.settings(tensors) == expected
    tensors.popitem()
    assert published_unet.settings(tensors) is None


# --------------------------------------------------------------------------------- entry points


@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")
def test_it_is_sampled_and_trained_from(weights, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("project")
    monkeypatch.chdir(folder)
    torch.save(weights, "theirs.pt")
    own = ["exp=folder", "data=toy", "model/net=base", *CHANGES, "data.sample_rate=1600"]
    own += ["data.size=[16,16]"]
    convert.main(["mm_diffusion", "theirs.pt", "ours.ckpt", *own])
    project = Project(folder)
    try:
        sampler = "sampler=dpm_solver sampler.steps=2 'guide=[integer_times]'"
        done = project(f"python sample.py ckpt=ours.ckpt {sampler} num=1 'save=[wav]' out=o")
        assert done.status == 0, done.err
        assert (folder / "o" / "000000.wav").is_file()

        train = (
            "python train.py logger=none debug=fast trainer.max_steps=1 callbacks.samples.every=0"
        )
        train += " callbacks.samples.final_num=0 model.optimizer.lr=0 ckpt=ours.ckpt"
        done = project(" ".join([train, *own]))
        assert done.status == 0, done.err
        assert "a new run, with the weights of ours.ckpt" in done.out + done.err
        (last,) = folder.glob("runs/folder/*/checkpoints/last.ckpt")
        trained = checkpoint.read(last)
        assert trained["global_step"] == 1
        for key, value in checkpoint.read(folder / "ours.ckpt")["state_dict"].items():
            if "net" in key:
                assert torch.equal(trained["state_dict"][key], value), key

        files = project.files()
        done = project(" ".join([train, *own, f"{NET}.channels=64"]))
        assert "ours.ckpt holds the weights of another model than this config's" in done.error
        assert project.files() == files
    finally:
        project.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_published_size(command, tmp_path):
    with torch.device("meta"):
        net = CoupledUNet()
    shapes = {key: tuple(value.shape) for key, value in published.to_published(net).items()}
    weights = {key: golden_network.weight(key, shape) for key, shape in shapes.items()}
    said = command(weights, "exp=landscape", source="Landscape.pt", target="landscape.ckpt")
    assert said.startswith("landscape.ckpt: 133.7 M parameters, the 1046 tensors of Landscape.pt")
    sizes = [(tmp_path / name).stat().st_size for name in ("Landscape.pt", "landscape.ckpt")]
    assert sizes[1] < 1.01 * sizes[0]
    system = avdiffusion.load(tmp_path / "landscape.ckpt", device="cpu")
    for model in (system.model, system.ema.ema_model):
        back = published.to_published(model.net)
        assert len(back) == 1046
        assert all(torch.equal(value, weights[key]) for key, value in back.items())
    clips = system.sample(1, micro_batch=1, sampler=DDIM(steps=1))
    assert clips["video"].shape == (1, 3, 16, 64, 64)
    assert clips["audio"].shape == (1, 1, 25600)
    assert all(value.isfinite().all() for value in clips.values())
