"""From a run's step checkpoints to an average of another width, to clips; and what is refused."""

import os

import pytest
import torch
from entry import Project
from test_checkpoint import SMALL

from avdiffusion import checkpoint, posthoc
from avdiffusion.checkpoint import CheckpointError
from avdiffusion.systems.average import PowerEMA

STEPS, EVERY = 48, 3
SMALLEST = [
    *SMALL,
    "model.diffusion.net.channel_mult=[1]",
    "model.diffusion.net.num_res_blocks=1",
    "model.diffusion.net.cross_attention_resolutions=[1]",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose weights wander, and a third average that was kept all along."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    torch.manual_seed(0)
    config = checkpoint.plain(checkpoint.compose([*SMALLEST, "model/ema=power"]))
    system = checkpoint.build(config["model"])
    third = PowerEMA(system.model, sigma_rels=[0.15])
    start = [p.detach().clone() for p in system.model.parameters()]
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for p, s in zip(system.model.parameters(), start, strict=True):
                p.add_(0.1 * (s + 0.1 - p) + 0.01 * torch.randn_like(p))
        system.ema.update()
        third.update()
        if step % EVERY == 0:
            content = {
                "state_dict": system.state_dict(),
                "hyper_parameters": config,
                "global_step": step,
                "optimizer_states": [{"state": {}}],
            }
            system.on_save_checkpoint(content)
            torch.save(content, folder / "checkpoints" / f"step{step:07d}.ckpt")
    (folder / "checkpoints" / "last.ckpt").hardlink_to(
        folder / "checkpoints" / f"step{STEPS:07d}.ckpt"
    )
    return folder, system, third


@pytest.fixture
def run(trained, tmp_path):
    """The run in a folder of its own, to take files from."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for file in (trained[0] / "checkpoints").iterdir():
        (tmp_path / "run" / "checkpoints" / file.name).hardlink_to(file)
    return tmp_path / "run"


def leave(run, *steps):
    for file in (run / "checkpoints").glob("step*.ckpt"):
        if int(file.stem.removeprefix("step")) not in steps:
            file.unlink()


def distance(file, third):
    """Between the average of a file and the one that was kept, relative to what is averaged out."""
    found = checkpoint.load(file, device="cpu").ema.ema_model
    pairs = list(zip(found.parameters(), third.ema_model.parameters(), strict=True))
    gap = max(float((a - b).detach().abs().max()) for a, b in pairs)
    pairs = zip(third.online[0].parameters(), third.ema_model.parameters(), strict=True)
    return gap / max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_a_third_width_is_that_of_the_average_kept_all_along(trained, run):
    third = trained[2]
    made = posthoc.reconstruct(run, 0.15)
    assert made["file"] == run / "checkpoints" / f"ema0.15_step{STEPS:07d}.ckpt"
    assert made["steps"] == list(range(EVERY, STEPS + 1, EVERY))
    errors = [distance(made["file"], third)]
    leave(run, *range(3 * EVERY, STEPS + 1, 3 * EVERY), STEPS)
    errors.append(distance(posthoc.reconstruct(run, 0.15)["file"], third))
    assert errors[0] < 0.02
    assert errors[1] > 2 * errors[0]


def test_what_is_written_is_a_checkpoint(trained, run, tmp_path):
    system, out = trained[1], tmp_path / "wide.ckpt"
    made = posthoc.reconstruct(run, 0.2, out=out)
    assert made["file"] == out
    loaded = checkpoint.load(out, device="cpu")
    assert loaded.config["model"]["ema"]["sigma_rels"] == [0.2]
    assert loaded.config["name"] == "small"
    assert loaded.ema.count == STEPS
    for (name, ours), theirs in zip(
        loaded.model.state_dict().items(), system.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert ours.dtype == loaded.ema.ema_model.state_dict()[name].dtype
    # Further from the trained weights than both that were kept, as it is wider.
    models = [system.model, system.ema.ema_model, system.ema.others[0], loaded.ema.ema_model]
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models]
    gaps = [float((f - flat[0]).norm()) for f in flat]
    assert gaps == sorted(gaps)
    assert all(bool(v.isfinite().all()) for v in loaded.sample(2).values())
    content = checkpoint.read(out)
    assert content["posthoc"]["steps"] == made["steps"]
    assert set(content) == {
        *("avdiffusion", "hyper_parameters", "global_step"),
        *("state_dict", "posthoc"),
    }


def test_a_track_comes_out_as_it_was_kept(trained, run):
    """And an average of an earlier step knows nothing of later ones."""
    state = checkpoint.read(posthoc.reconstruct(run, 0.1)["file"])["state_dict"]
    for key, value in trained[1].ema.others[0].state_dict().items():
        torch.testing.assert_close(state[f"ema.ema_model.{key}"], value, rtol=1e-5, atol=1e-6)
    early = posthoc.reconstruct(run, 0.12, step=STEPS // 2)
    whole = checkpoint.read(early["file"])["state_dict"]
    assert early["steps"] == list(range(EVERY, STEPS // 2 + 1, EVERY))
    leave(run, *early["steps"])
    again = checkpoint.read(posthoc.reconstruct(run, 0.12)["file"])["state_dict"]
    assert all(torch.equal(whole[key], value) for key, value in again.items())


# ---------------------------------------------------------------------------------- refusals


def test_what_cannot_be_made_is_named(run, tmp_path):
    before = sorted(run.rglob("*"))
    for sigma_rel, step, words in (
        (0.5, None, "sigma_rel=0.5 is not within 0 and 0.289"),
        (0.15, 50, "no checkpoint of step 50, but of 3, 6, 9, ..., 42, 45, 48"),
        (0.2, 3, "steps 3 make sigma_rel=0.2 at step 3 only to within 60 %.*checkpoint.every"),
    ):
        with pytest.raises(ValueError, match=words):
            posthoc.reconstruct(run, sigma_rel, step=step)
    with pytest.raises(CheckpointError, match="no run folder at"):
        posthoc.reconstruct(tmp_path / "none", 0.1)
    with pytest.raises(CheckpointError, match="holds no step checkpoints"):
        posthoc.reconstruct(tmp_path, 0.1)
    assert sorted(run.rglob("*")) == before


def spoilt(run, step, change):
    """Writes a step file anew, changed."""
    file = run / "checkpoints" / f"step{step:07d}.ckpt"
    content = checkpoint.read(file)
    change(content)
    file.unlink()
    torch.save(content, file)


def test_files_that_do_not_belong_together_are_named(run):
    def other_average(content):
        content["hyper_parameters"]["model"]["ema"] = {"_target_": "ema_pytorch.EMA"}

    def other_widths(content):
        content["hyper_parameters"]["model"]["ema"]["sigma_rels"] = [0.05, 0.2]

    def other_network(content):
        content["state_dict"] = {
            key: value[:1] if key.endswith("video_out.weight") else value
            for key, value in content["state_dict"].items()
        }

    for change, words in (
        (other_network, r"step0000006\.ckpt holds another network"),
        (other_widths, r"holds averages of \[0\.05, 0\.2\], .* of \[0\.05, 0\.1\]"),
        (other_average, r"step0000006\.ckpt holds no averages.*model/ema=power"),
    ):
        spoilt(run, 6, change)
        with pytest.raises(CheckpointError, match=words):
            posthoc.reconstruct(run, 0.15)


def test_a_full_disk_leaves_the_old_file(run):
    """In the place of which stands a limit on the size of files."""
    resource = pytest.importorskip("resource")
    leave(run, STEPS)
    file = posthoc.reconstruct(run, 0.05)["file"]
    before, names = file.read_bytes(), sorted(run.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            posthoc.reconstruct(run, 0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert sorted(run.rglob("*")) == names


def test_files_are_read_one_after_the_other(run, monkeypatch):
    """However many there are, at most three are open: the last, which is made over, and two."""
    alive, most, read = [], [], checkpoint.read

    class State(dict):
        def __init__(self, *args):
            super().__init__(*args)
            alive.append(1)
            most.append(len(alive))

        def __del__(self):
            alive.pop()

    def watched(*args, **kwargs):
        content = read(*args, **kwargs)
        return {**content, "state_dict": State(content["state_dict"])}

    monkeypatch.setattr(checkpoint, "read", watched)
    posthoc.reconstruct(run, 0.15)
    assert len(most) >= STEPS / EVERY
    assert max(most) <= 3


def test_the_command_line(run, tmp_path, capsys):
    leave(run, *range(EVERY, 25, EVERY))
    posthoc.main([str(run), "--sigma-rel", "0.075", "--step", "24"])
    text = capsys.readouterr().out
    assert "ema0.075_step0000024.ckpt: sigma_rel 0.075 at step 24, from 8 step files" in text
    posthoc.main([str(run), "--sigma-rel", "0.1", "--out", str(tmp_path / "x.ckpt")])
    assert (tmp_path / "x.ckpt").is_file()
    for words in ([str(tmp_path), "--sigma-rel", "0.1"], [str(run), "--sigma-rel", "7"]):
        with pytest.raises(SystemExit, match=r"^error: [^\n]+$"):
            posthoc.main(words)


# -------------------------------------------------------------------------------- autoguidance


def guide(weak, *overrides):
    """What `guide=[auto]` asks for on the command line."""
    words = ["ckpt=x", "guide=[auto]", f"guide.auto.weak.ckpt={weak}", *overrides]
    return {"guide": checkpoint.compose(words, config="sample").guide}


def test_a_checkpoint_is_guided_by_another(run):
    strong, weak = (run / "checkpoints" / f"step{k:07d}.ckpt" for k in (STEPS, EVERY))

    def clips(file, replace):
        system = checkpoint.load(file, device="cpu", replace=replace)
        return system.sample(2, seed=1)

    plain, worse = (clips(file, {"guide": {}}) for file in (strong, weak))
    for scale, expected in ((1, plain), (0, worse)):
        found = clips(strong, guide(weak, f"guide.auto.scale={scale}"))
        assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert not torch.equal(clips(strong, guide(weak))["video"], plain["video"])
    with pytest.raises(CheckpointError, match=r"no checkpoint at nowhere\.ckpt"):
        clips(strong, guide("nowhere.ckpt"))


def test_a_file_may_not_name_its_own_weak_model(run):
    """It would make whoever loads it load others, itself among them."""
    file = run / "checkpoints" / f"step{STEPS:07d}.ckpt"

    def hostile(content):
        content["hyper_parameters"]["guide"] = checkpoint.plain(guide(file)["guide"])

    spoilt(run, STEPS, hostile)
    with pytest.raises(CheckpointError, match=r"would call 'avdiffusion\.checkpoint\.load'"):
        checkpoint.load(file, device="cpu")
    with pytest.raises(CheckpointError, match=r"would call 'avdiffusion\.checkpoint\.load'"):
        checkpoint.load(file, device="cpu", trust=True)  # of this file, not of what it names


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")
def test_train_reconstruct_and_sample(tmp_path_factory, monkeypatch):
    """A run of twelve steps, another width of it, and clips led away from its beginning."""
    folder = tmp_path_factory.mktemp("project")
    project = Project(folder)
    try:
        train = "python train.py model/ema=power logger=csv debug=fast trainer.max_steps=12"
        result = project(f"{train} callbacks.checkpoint.every=1")
        assert result.status == 0, result.err
        (run,) = folder.glob("runs/quickstart/*")
        made = posthoc.reconstruct(run, 0.15)
        assert made["steps"] == list(range(1, 13))
        options = "num=1 'save=[wav]' sampler.steps=2 cpu_threads=1 device=cpu"
        files = {"plain": run / "checkpoints" / "last.ckpt", "wide": made["file"]}
        for name, file in files.items():
            result = project(f"python sample.py ckpt={file} out={name} {options}")
            assert result.status == 0, result.err
        guide = "'guide=[auto,clamp_wide]'"
        weak = f"guide.auto.weak.ckpt={run}/checkpoints/step0000002.ckpt"
        sample = f"python sample.py ckpt={files['wide']} {options} {guide}"
        for scale in (1, 3):
            command = f"{sample} {weak} guide.auto.scale={scale} out=auto{scale}"
            result = project(command)
            assert result.status == 0, result.err
        names = ("plain", "wide", "auto1", "auto3")
        sounds = {name: next((folder / name).glob("*.wav")).read_bytes() for name in names}
        assert sounds["wide"] == sounds["auto1"]
        assert len(set(sounds.values())) == 3
        missing = project(f"{sample} out=none")
        assert missing.status == 1
        assert "weak.ckpt" in missing.error
        nowhere = project(f"{sample} guide.auto.weak.ckpt=nowhere.ckpt out=none")
        assert "no checkpoint at nowhere.ckpt" in nowhere.error
    finally:
        project.close()
