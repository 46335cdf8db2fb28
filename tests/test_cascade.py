"""Two checkpoints in one command, and existing clips at a higher resolution."""

import hashlib
import json
import os
import runpy
import shlex
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from entry import ROOT, Project
from media_files import make_media
from test_sample_command import FPS, FRAMES, RATE, SAMPLES, SMALL, packets, pictures, sound, write

from avdiffusion import checkpoint
from avdiffusion.media import Media
from avdiffusion.systems.diffusion import Samples
from avdiffusion.systems.step import Step

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked"),
    pytest.mark.timeout(600),
]
SR = [
    "exp=pouring_sr_cpu",
    "name=sr",
    "data.root=clips",
    "data.size=[32,32]",
    "data.train.degrade.scale=2",
    "model.diffusion.net.channels=8",
    "model.diffusion.net.channel_mult=[1,2]",
    "model.diffusion.net.attention_resolutions=[2]",
    "sampler.steps=2",
    "paths.run=run",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        project = Project(tmp_path_factory.mktemp("project"))
        for name, words in (("base", SMALL), ("sr", SR)):
            write(project.folder / "runs" / f"{name}.ckpt", words)
        yield project
        project.close()


@pytest.fixture
def sample(project, tmp_path):
    """Runs sample.py with these words and returns where it wrote, and what it said."""

    def run(out, *words):
        line = f"python sample.py cpu_threads=1 seed=7 out={tmp_path / out} "
        result = project(line + " ".join(map(shlex.quote, words)))
        assert result.status == 0, result.err
        return tmp_path / out, result.out + result.err

    return run


BOTH, LARGER = "ckpt=[runs/base.ckpt,runs/sr.ckpt]", "ckpt=runs/sr.ckpt"


def picture(path):
    """(height, width, frames, rate) of a clip."""
    with av.open(str(path)) as file:
        video = file.streams.video[0]
        count = sum(1 for _ in file.decode(video))
        return video.height, video.width, count, float(video.average_rate)


def test_a_cascade_makes_larger_pictures_with_the_same_sound(sample):
    small, _ = sample("small", "ckpt=runs/base.ckpt", "num=3", "save=[mp4,wav,gif]")
    large, said = sample("large", BOTH, "num=3", "save=[mp4,wav,gif]", "sr_sampler.steps=3")
    assert "7 evaluations each" in said  # 4 of the first, 3 of the second
    for i in range(3):
        name = f"{i:06d}"
        assert picture(large / f"{name}.mp4") == (32, 32, FRAMES, FPS)
        assert (large / f"{name}.wav").read_bytes() == (small / f"{name}.wav").read_bytes()
        assert packets(large / f"{name}.mp4", "audio") == packets(small / f"{name}.mp4", "audio")
        one, two = pictures(small / f"{name}.gif"), pictures(large / f"{name}.gif")
        assert one.shape == (FRAMES, 16, 16, 3)
        assert two.shape == (FRAMES, 32, 32, 3)
    record = json.loads((large / "samples.json").read_text())
    assert record["settings"]["second_stage"][0]["sampler"]["steps"] == 3


def test_a_sample_of_a_cascade_does_not_depend_on_others(sample):
    every, _ = sample("every", BOTH, "num=4", "save=[gif]", "micro_batch=3")
    one, _ = sample("one", BOTH, "index=[2]", "save=[gif]", "micro_batch=3")
    name = "000002.gif"
    assert (one / name).read_bytes() == (every / name).read_bytes()
    other, _ = sample("other", BOTH, "index=[2]", "save=[gif]", "sr_sampler=ddim")
    assert (other / name).read_bytes() != (every / name).read_bytes()


def test_every_model_of_a_cascade_has_noise_of_its_own():
    """16 frames of 64x64 have as many values as one of 256x256, and would have the same."""
    refined, seeds = runpy.run_path(str(ROOT / "sample.py"))["refined"], []

    class Larger:
        remakes = SimpleNamespace(batch=dict)

        def conditioned(self, batch, index, *, seed, step, progress):
            seeds.append(seed)
            return Samples(index, Media(batch), 1)

    made = [Samples([0], Media(video=torch.zeros(1, 3, 1, 2, 2)), 1)]
    options = {"seed": 7, "step": Step(), "progress": lambda: None}
    ((group, _, calls), _) = next(refined(made, [Larger(), Larger()], **options))
    assert (group, calls, len({7, *seeds})) == ([0], 3, 3)


def test_a_cascade_has_a_folder_of_its_own(project):
    """Beside what the first checkpoint makes by itself."""
    for ckpt, name in (("ckpt=runs/base.ckpt", "base"), (BOTH, "base_sr")):
        done = project(f'python sample.py cpu_threads=1 seed=3 num=1 "{ckpt}" "save=[png]"')
        assert done.status == 0, done.err
        assert (project.folder / f"runs/samples/{name}_cpu_threads-1_seed-3").is_dir()
    refused = project(f'python evaluate.py "{BOTH}" target=clips').error
    assert "which sample.py alone takes" in refused


def test_the_layout_of_the_seed(sample):
    out, _ = sample("tree", BOTH, "num=2", "layout=seed")
    found = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    pages = {"base/samples.json", "base/gallery.html", "base/contact.png"}
    assert found - pages == {
        file
        for i in range(2)
        for file in (
            f"base/original/{i:06d}.mp4",
            f"base/sr_mp4/{i:06d}.mp4",
            f"base/audios/{i:06d}.wav",
            *(f"base/img/{i:06d}/{k:08d}.png" for k in range(FRAMES)),
        )
    }
    assert picture(out / "base/original/000000.mp4")[:3] == (16, 16, FRAMES)
    assert picture(out / "base/sr_mp4/000000.mp4")[:3] == (32, 32, FRAMES)
    assert sound(out / "base/audios/000001.wav")[0].shape == (SAMPLES, 1)
    assert sound(out / "base/audios/000001.wav")[1] == RATE


def test_sound_given_and_the_picture_made_and_enlarged(project, sample, tmp_path):
    make_media(tmp_path / "clip.mp4", seconds=1.2, sample_rate=16000)
    given = [f"given={tmp_path}/clip.mp4", "known=[audio]", "guide=[stored,replace]"]
    out, _ = sample("given", BOTH, *given, "num=2", "save=[mp4]")
    assert picture(out / "000001.mp4") == (32, 32, FRAMES, FPS)
    own, copied = packets(tmp_path / "clip.mp4", "audio"), packets(out / "000001.mp4", "audio")
    assert copied
    assert copied == own[: len(copied)]
    words = f'python sample.py "{BOTH}" {given[0]} known=[video] "{given[2]}" out={tmp_path}/kept'
    assert "the video of given clips is kept as it is" in project(words).error
    assert not (tmp_path / "kept").exists()


def facts(path):
    """Times of all pictures, and the packets and decoded samples of the sound."""
    with av.open(str(path)) as file:
        times = [float(frame.pts * frame.time_base) for frame in file.decode(video=0)]
    with av.open(str(path)) as file:
        samples = np.concatenate([f.to_ndarray() for f in file.decode(audio=0)], axis=-1)
    return times, packets(path, "audio"), hashlib.sha256(samples.tobytes()).hexdigest()


def test_existing_clips_keep_names_times_and_sound(project, sample, tmp_path):
    folder = tmp_path / "clips"
    (folder / "below").mkdir(parents=True)
    make_media(folder / "a.mp4", seconds=1.2, sample_rate=16000)
    make_media(folder / "below" / "b.mp4", seconds=0.6, sample_rate=16000)
    out, said = sample("larger", LARGER, f"given={folder}")
    assert "2 clips in" in said
    for name in ("a.mp4", "below/b.mp4"):
        before, after = facts(folder / name), facts(out / name)
        assert after == before
        height, width = pictures(folder / name).shape[1:3]
        assert pictures(out / name).shape == (len(before[0]), 2 * height, 2 * width, 3)
    made = (out / "a.mp4").stat().st_mtime_ns
    _, said = sample("larger", LARGER, f"given={folder}")
    assert "2 of 2 clips are already in" in said
    assert (out / "a.mp4").stat().st_mtime_ns == made
    # in parts of another length it is the same but for rounding
    parts, _ = sample("parts", LARGER, f"given={folder}/a.mp4", "frames_at_once=5")
    difference = pictures(parts / "a.mp4").astype(int) - pictures(out / "a.mp4")
    assert np.abs(difference).mean() < 0.1

    def refused(*words):
        line = f"python sample.py out={tmp_path / 'larger'} " + " ".join(words)
        return project(line).error

    assert "clips of other settings (seed: 7 there, 0 here)" in refused(LARGER, f"given={folder}")
    assert "makes clips of others: give them with given=DIR" in refused(LARGER)
    for interval in (2, 3):  # what came to nothing is in nobody's way
        line = f"python sample.py {LARGER} given={folder} out={tmp_path / 'nothing'}"
        assert "keeps no deep features" in project(f"{line} reuse.interval={interval}").error
    assert "leave out known=" in refused(LARGER, f"given={folder}", "known=[audio]")
    assert "leave out fit=" in refused(LARGER, f"given={folder}", "fit=letterbox")
    assert "of sr.ckpt alone it is sampler=" in refused(
        LARGER, f"given={folder}", "sr_sampler.steps=3"
    )
    assert "results need another folder" in refused(
        LARGER, f"given={tmp_path / 'larger'}", "overwrite=true"
    )
    assert "results need another folder" in refused(LARGER, f"given={tmp_path}")
    first = '"ckpt=[runs/sr.ckpt,runs/sr.ckpt]"'
    assert "it cannot be the first of several" in refused(first, f"given={folder}")
    assert "base.ckpt makes clips of its own" in refused('"ckpt=[runs/base.ckpt,runs/base.ckpt]"')
    (tmp_path / "larger" / "restored.json").unlink()
    assert "clips of unknown settings" in refused(LARGER, f"given={folder}")
    (folder / "broken.mp4").write_bytes(b"no clip")
    assert "broken.mp4" in refused(LARGER, f"given={folder}")


def test_training_begins_with_the_weights_of_another_checkpoint(project, tmp_path):
    for name in "abc":
        make_media(tmp_path / f"{name}.mp4", seconds=0.6, sample_rate=16000)
    words = [word for word in SR if not word.startswith(("data.root", "paths", "sampler", "name"))]
    line = " ".join(["python train.py", *words, f"data.root={tmp_path} name=begun logger=none"])
    line += " debug=fast trainer.max_steps=1 model.optimizer.lr=0 data.train.clips.val_fraction=0.4"
    done = project(f"{line} init.diffusion=runs/sr.ckpt")
    assert done.status == 0, done.err
    assert "a new run, with the weights of runs/sr.ckpt" in done.out + done.err
    (run,) = project.folder.glob("runs/begun/*")
    assert (run / "samples" / "final" / "compare.png").is_file()
    begun = checkpoint.read(run)["state_dict"]
    given = checkpoint.read(project.folder / "runs" / "sr.ckpt")["state_dict"]
    weights = [key for key in given if key.startswith("ema.ema_model.net.")]
    assert len(weights) > 50
    for key in weights:
        for place in ("ema.ema_model.", "model."):
            assert torch.equal(begun[key.replace("ema.ema_model.", place)], given[key]), key
    refused = project(f"{line} init.diffusion=runs/base.ckpt").error
    assert "base.ckpt holds the weights of another model than this config's" in refused
    assert "no checkpoint at nowhere.ckpt" in project(f"{line} init.diffusion=nowhere.ckpt").error
    both = f"{line} init.diffusion=runs/sr.ckpt ckpt=runs/sr.ckpt"
    assert "ckpt= and init.diffusion= both" in project(both).error


def test_a_source_that_was_replaced_is_made_again(sample, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    make_media(folder / "a.mp4", seconds=0.6, sample_rate=16000)
    out, _ = sample("again", LARGER, f"given={folder}")
    before = (out / "a.mp4").read_bytes()
    # another clip beside it changes nothing of it
    make_media(folder / "0.mp4", seconds=0.4, sample_rate=16000)
    both, _ = sample("both", LARGER, f"given={folder}")
    np.testing.assert_array_equal(pictures(both / "a.mp4"), pictures(out / "a.mp4"))
    make_media(folder / "a.mp4", seconds=0.8, sample_rate=16000)
    _, said = sample("again", LARGER, f"given={folder}")
    assert "already in" not in said
    assert (out / "a.mp4").read_bytes() != before
    assert len(pictures(out / "a.mp4")) == len(pictures(folder / "a.mp4"))
