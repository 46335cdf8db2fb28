"""Every config composes, builds, and says what its Python says."""

import inspect
import runpy
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError

from avdiffusion import checkpoint, plan, trust
from avdiffusion.metrics.metric import Metric
from avdiffusion.systems.system import System, empty

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(file.stem for file in (ROOT / "configs" / "exp").glob("*.yaml"))
SPECIAL = {"_target_", "_partial_", "_convert_", "_recursive_"}
GROUPS = {
    str(folder.relative_to(ROOT / "configs")): sorted(
        file.stem for file in folder.glob("*.yaml") if file.stem != "stored"
    )
    for folder in sorted((ROOT / "configs").rglob("*"))
    if folder.is_dir()
}
WHOLE = ("exp", "debug", "hydra", "hydra/launcher", "paths")  # no parts of a model's config
WHOLE += ("metrics", "protocol")  # of evaluations
WHOLE += ("model/shared", "sr_sampler")  # a part of every model; the folder of samplers again
WHOLE += ("model/vae",)  # of model=video_vae alone, which has none of the others' parts
CHOICES = {k: v for k, v in GROUPS.items() if v and k not in WHOLE}
PARAMETERS = {  # millions, of the networks in the README's ladder
    "aist": 133.7,
    "landscape": 133.7,
    "aist_sr": 311.0,
    "landscape_sr": 311.0,
    "video_ddpm": 85.9,
    "dmae": 185.1,
    "diffgen": 562.6,
}
FIRST = {  # stages, whose latents the second ones diffuse
    "diffgen": ["exp=dmae"],
    "diffgen_tiny": ["exp=dmae_tiny"],
    "v2v": ["exp=v2v_vae"],
    "v2v_seed": ["exp=v2v_vae", "model/vae=seed"],
    "v2v_tiny": ["exp=v2v_vae_tiny"],
}


def nodes(config, key="config"):
    """Every node of a plain config that names a class or function of ours."""
    if isinstance(config, dict):
        if str(config.get("_target_", "")).startswith("avdiffusion."):
            yield key, config
        for name, value in config.items():
            yield from nodes(value, f"{key}.{name}")
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from nodes(value, f"{key}.{number}")


def rounds():
    """Overrides that between them choose every option of every group, in few compositions."""
    choices = CHOICES | {"model": [name for name in CHOICES["model"] if name != "video_vae"]}
    for k in range(max(len(options) for options in choices.values())):
        yield ["~exp", *(f"{g}={options[k % len(options)]}" for g, options in choices.items())]
    for option in GROUPS["model/vae"]:
        yield ["~exp", "model=video_vae", f"model/vae={option}"]


@pytest.fixture(scope="module")
def configs():
    """Every option of every group, interpolations as they stand."""
    found = [OmegaConf.to_container(checkpoint.compose(overrides)) for overrides in rounds()]
    metrics = f"metrics=[{','.join(GROUPS['metrics'])}]"
    evaluation = checkpoint.compose([metrics], config="evaluate")
    return [*found, OmegaConf.to_container(evaluation)]


@pytest.fixture(scope="module")
def composed():
    """The config of an experiment, with that of the model whose latents it diffuses."""

    @cache
    def config(name):
        found = checkpoint.compose([f"exp={name}", "data.root=clips", "paths.run=run"])
        if name in FIRST:
            first = checkpoint.compose([*FIRST[name], "data.root=clips", "paths.run=run"])
            with open_dict(found):
                found.model.codec.system = checkpoint.plain(first)["model"]
        return found

    return config


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_compose_and_build_on_the_meta_device(name, composed):
    plain = checkpoint.plain(composed(name))
    assert plain["name"] == name
    assert not list(trust.objections({k: plain[k] for k in ("model", "sampler", "guide")}))
    with torch.device("meta"):
        system = checkpoint.build(plain["model"]).to("meta")
        assert isinstance(system, System)
        assert {p.device.type for p in system.parameters()} == {"meta"}
        count = sum(p.numel() for p in system.model.parameters())
        assert count / 1e6 == pytest.approx(PARAMETERS.get(name, count / 1e6), abs=0.05)
        # The network takes what the data delivers.
        made = system.once({**empty(1, system.shapes, "meta"), **plan.blank(system, 1)})
    diffused = hasattr(system, "codec")
    shapes = system.codec.shapes(system.shapes) if diffused else system.shapes
    factor = 1 + plain["model"].get("diffusion", {}).get("learned_variance", False)
    for (channels, *rest), value in zip(shapes.values(), made, strict=True):
        assert list(value.shape) == [1, factor * channels, *rest]


def test_latents_of_the_second_stage_are_of_the_first(composed):
    """The shapes of both seeds; each experiment that needs a first stage has one here."""
    needing = {n for n in EXPERIMENTS if "system" in (composed(n).model.get("codec") or {})}
    assert needing == FIRST.keys()
    for name, shape in (
        ("diffgen", [32, 256]),
        ("v2v", [4, 16, 32, 32]),
        ("v2v_seed", [4, 16, 32, 32]),
    ):
        with torch.device("meta"):
            system = checkpoint.build(composed(name).model)
        assert list(system.codec.shapes(system.shapes).values()) == [shape]


def test_text_to_audio_is_as_large_as_published(composed):
    """Spec of text to audio, section 9: to the parameter."""

    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        decoder, generator = (checkpoint.build(composed(n).model) for n in ("dmae", "diffgen"))
    assert count(decoder.model) == 185_107_872
    # with the embedding of no text; the text's encoder is T5
    assert count(generator.model) == 562_606_400
    assert count(generator.model) - count(generator.model.net) == 128 * 768


def test_published_experiments_follow_the_published_recipe():
    """Spec 1.1 and 2.5."""
    for name in ("landscape", "aist"):
        config = checkpoint.compose([f"exp={name}", "paths.run=run"])
        assert config.data.batch_size == 128
        assert config.trainer.max_steps == 100000
        assert config.trainer.gradient_clip_val is None
        assert config.model.optimizer.lr == 1e-4
        assert config.model.optimizer.weight_decay == 0
        assert list(config.model.optimizer.betas) == [0.9, 0.999]
        assert config.model.lr_schedule.decay == "constant"
        assert config.model.lr_schedule.warmup_steps == 0
        assert config.model.ema.beta == config.model.ema.min_value == 0.9999
        assert config.model.diffusion.net.dropout == 0.1
        assert config.model.diffusion.target == "eps"
        assert config.model.diffusion.path == {
            "_target_": "avdiffusion.diffusion.path.DiscreteVP",
            "betas": "linear",
            "steps": 1000,
        }
        assert config.model.diffusion.density.steps == 1000
        assert config.model.shapes == {"video": [3, 16, 64, 64], "audio": [1, 25600]}
        assert config.model.rates == {"video": 10, "audio": 16000}
        assert config.sampler.variance == "large"
        assert config.data.train.fit == config.data.val.fit == "letterbox"
        assert config.data.val.flip == 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_takes_every_average(name):
    """Its decay has a key of its own, which the power functions do not read."""
    kept = {}
    for option in CHOICES["model/ema"]:
        words = [f"exp={name}", f"model/ema={option}", "data.root=clips", "ema_beta=0.5"]
        node = checkpoint.compose(words).model.ema
        checkpoint.build(node)(torch.nn.Linear(1, 1))
        kept[option] = (node.get("beta"), node.get("min_value"))
    assert kept == {"warmup": (0.5, 0.0), "constant": (0.5, 0.5), "power": (None, None)}


@pytest.mark.parametrize("group", CHOICES)
def test_choices_are_files_that_say_something(group):
    for option in CHOICES[group]:
        text = (ROOT / "configs" / group / f"{option}.yaml").read_text()
        assert text.strip(), (group, option)


def test_every_argument_stands_in_its_yaml(configs):
    """A key that is absent could not be overridden; one that is unknown could not be built."""
    count = 0
    for config in configs:
        for key, node in nodes(config):
            target = get_object(node["_target_"])
            parameters = set(inspect.signature(target).parameters)
            if isinstance(target, type) and target.__init__ is torch.nn.Module.__init__:
                parameters = set()
            if node.get("_partial_"):
                parameters -= {"optimizer", "model"}  # handed over when it is called
            assert node.keys() - SPECIAL == parameters, key
            count += 1
    assert count > 30


# What a named option is there to set otherwise than Python does.
VARIANTS = {
    "avdiffusion.nn.coupled_unet.CoupledUNet": {
        "channels",
        "channel_mult",
        "num_res_blocks",
        "num_heads",
        "head_channels",
    },
    "avdiffusion.nn.unet.UNet": {
        "video_channels",
        "channels",
        "channel_mult",
        "num_res_blocks",
        "num_heads",
        "attention_resolutions",
        "dims",
        "concat_channels",
        "conv",
        "attention",
        "resblock_updown",
        "out_factor",
    },
    "avdiffusion.nn.unet1d.UNet1d": {
        "audio_channels",
        "channels",
        "factors",
        "items",
        "attentions",
        "cross_attentions",
        "inject_depth",
        "attention_heads",
        "attention_features",
        "modulation",
        "window_length",
        "stride",
        "filters",
    },
    "avdiffusion.nn.vae.VideoVAE": {
        "channels",
        "channel_mult",
        "num_res_blocks",
        "conv",
        "patch",
        "latent_channels",
    },
    "avdiffusion.diffusion.diffusion.Diffusion": {"learned_variance", "target"},
    "avdiffusion.diffusion.guide.Clamp": {"low", "high"},
    "avdiffusion.checkpoint.load": {"device"},  # of a weak model
    "avdiffusion.diffusion.path.DiscreteVP": {"betas"},
    "avdiffusion.diffusion.path.CosineVP": {"scale"},
    "avdiffusion.samplers.dpm_solver.DPMSolver": {"steps", "grid", "form", "method", "order"},
    "avdiffusion.samplers.unipc.UniPC": {"grid", "order"},
    "avdiffusion.samplers.sde_dpm_solver.SDEDPMSolver": {"grid"},
    "avdiffusion.samplers.euler.Euler": {"grid", "shift"},  # on a flow
    "avdiffusion.data.module.DataModule": {"num_workers", "root", "batch_size", "channels"},
    "avdiffusion.data.clips.Clips": {
        "split",
        "flip",
        "modalities",
        "fit",
    },  # of the validation part
    "avdiffusion.data.images.Images": {"split", "flip"},
    "avdiffusion.data.shapes.MovingShapes": {"num", "seed"},
    "avdiffusion.data.shapes.GaussianNoise": {"num", "seed"},
    "avdiffusion.data.degrade.Degraded": {"num", "entry"},
    "avdiffusion.data.degrade.Degrade": {"kernel", "noise", "jpeg"},
    "avdiffusion.data.windows.Windows": {"split", "flip"},
    "avdiffusion.data.pairs.Pairs": {"split", "flip"},
    "avdiffusion.data.spoil.Spoil": {"blur", "noise"},
    "avdiffusion.data.chirps.Chirps": {"num", "seed"},
    "avdiffusion.data.toy.Toy": {"num", "seed"},
    "avdiffusion.metrics.distance.Frechet": {"key", "label", "scale"},
    "avdiffusion.metrics.distance.Kernel": {"key", "label", "scale", "kernel"},
}


def test_yaml_and_python_state_the_same_defaults(configs):
    differing = {}
    for config in configs:
        for _, node in nodes(config):
            for name, parameter in inspect.signature(
                get_object(node["_target_"])
            ).parameters.items():
                default, value = parameter.default, node.get(name)
                if default is parameter.empty or isinstance(value, dict):
                    continue
                if isinstance(value, str) and "${" in value:
                    continue
                if value != (list(default) if isinstance(default, tuple) else default):
                    differing.setdefault(node["_target_"], set()).add(name)
    for target, names in differing.items():
        assert names <= VARIANTS.get(target, set()), target


def test_dpm_solvers_are_set_as_in_mm_diffusion():
    """Spec 3.4, the base model's."""

    def settings(name):
        node = checkpoint.compose(["~exp", f"sampler={name}"]).sampler
        return [node[k] for k in ("form", "method", "order", "steps", "grid")]

    assert settings("dpm_solver") == ["noise", "singlestep", 3, 20, "log_snr"]
    assert settings("dpm_solver_pp")[:3] == ["data", "adaptive", 2]


def test_no_key_of_an_experiment_is_unknown():
    """Compose is strict, so that a misspelt key is an error and not a setting without effect."""
    with pytest.raises(Exception, match="btch_size"):
        checkpoint.compose(["data.btch_size=3"])
    config = checkpoint.compose(["paths.run=run"])
    with pytest.raises(ConfigAttributeError):
        config.data.btch_size = 3


def test_the_stored_sampler_takes_every_setting_of_every_sampler(configs):
    stored = checkpoint.compose(["ckpt=x"], config="sample").sampler
    known = {"stored"}
    for option in GROUPS["sampler"]:
        node = checkpoint.compose(["~exp", f"sampler={option}"]).sampler
        assert callable(get_object(node["_target_"]))
        known |= node.keys() - SPECIAL
    assert set(stored) == known
    assert all(value is None for name, value in stored.items() if name != "stored")


def test_guides_can_be_chosen_and_left_out():
    assert list(checkpoint.compose([]).guide) == ["clamp"]
    for config in ("train", "sample"):
        needed = ["ckpt=x"] if config == "sample" else ["exp=folder"]
        assert checkpoint.compose([*needed, "guide=[]"], config=config).guide == {}
        assert list(checkpoint.compose([*needed, "guide=[clamp]"], config=config).guide) == [
            "clamp"
        ]
    assert checkpoint.compose(["exp=folder", "guide=[]"]).model.guides == {}


@pytest.mark.parametrize("protocol", GROUPS["protocol"])
def test_every_metric_is_built_under_every_protocol(protocol):
    """Without weights, which are read when they are needed."""
    words = [f"metrics=[{','.join(GROUPS['metrics'])}]", f"protocol={protocol}"]
    config = checkpoint.compose(words, config="evaluate")
    assert config.protocol.name == protocol
    built = {name: checkpoint.build(node) for name, node in config.metrics.items()}
    assert all(isinstance(metric, Metric) for metric in built.values())
    assert {built[k].extractor.resize for k in ("fvd", "kvd")} == {config.protocol.resize}
    assert config.held_out == (protocol == "default")
    assert {f"{m.key}" for m in built.values() if hasattr(m, "key")} <= set(built)


def test_multirun_folders_are_short_and_distinct():
    name = checkpoint.folder_name
    assert name("model.lr-0.1_seed-0") == "model.lr-0.1_seed-0"
    assert name("") == "default"
    assert "/" not in name("path-/a b/c=d~[1]")
    long = [name("x" * 200 + str(k)) for k in range(3)]
    assert len(set(long)) == 3
    assert all(len(n) <= 120 for n in long)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs an entry point on a command line in this process; gives what it prints."""

    def run(name, *words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr("sys.argv", [f"{name}.py", *words])
        checkpoint.GlobalHydra.instance().clear()
        try:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            if end.code != 0:
                raise
        return capsys.readouterr().out

    return run


def test_cfg_job_prints_the_config(command, tmp_path):
    printed = OmegaConf.create(command("train", "--cfg", "job", "data.batch_size=3"))
    assert printed.data.batch_size == 3
    assert printed.name == "quickstart"
    assert OmegaConf.create(command("sample", "--cfg", "job", "ckpt=x", "num=3")).num == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train", "sample", "evaluate"])
def test_help_lists_the_choices(name, command, tmp_path):
    text = command(name, "--help")
    assert "sampler" in text
    assert "ddim" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exp=nope"], "exp/nope"),
        (["sampler=euler2"], "sampler/euler2"),
        (["data.bath_size=3"], "bath_size"),
        (["ckpt=a=b.ckpt"], "ckpt='a=b.ckpt'"),
    ],
)
def test_wrong_words_end_in_one_line(words, message, command):
    with pytest.raises(SystemExit) as error:
        command("train", *words)
    text = str(error.value)
    assert text.startswith("error: ")
    assert message in text
    assert "\n" not in text.strip()


def test_a_quoted_path_with_signs_is_taken(command):
    printed = command("train", "--cfg", "job", "ckpt='runs of [a, b]=c ~/last.ckpt'")
    assert OmegaConf.create(printed).ckpt == "runs of [a, b]=c ~/last.ckpt"
