"""Models of latents from the command line: two stages, of which the second needs the first no more.

What the tiny experiments are tuned to is pinned here: networks of a few channels, a few steps.
"""

import csv
import json
import os
import shutil
import wave

import av
import numpy as np
import pytest
import torch
from entry import Project
from media_files import make_media
from test_sample_command import packets

from avdiffusion import checkpoint
from avdiffusion.data.chirps import Chirps
from avdiffusion.io import write_wav

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked"),
    pytest.mark.timeout(600),
]
RATE, SAMPLES, PITCHES = 16000, 2048, ("low", "high")
STEPS = (
    "trainer.max_steps=4 trainer.val_check_interval=2 trainer.log_every_n_steps=1 logger=csv "
    "trainer.limit_val_batches=1 data.batch_size=2 data.num_workers=0 callbacks.checkpoint.every=2 "
    "callbacks.samples.num=2 callbacks.samples.every=0"
)
VIDEO = f"{STEPS} data.frames=4 'data.size=[16,16]'"
VAE = (
    f"exp=v2v_vae_tiny {VIDEO} data.val.num=3 model.net.channels=8 'model.net.channel_mult=[1,2]' "
    "model.net.num_res_blocks=1 model.net.latent_channels=4 model.net.patch=2"
)
V2V = (
    f"exp=v2v_tiny {VIDEO} data.val.clips.num=3 sampler.steps=2 "
    "model.diffusion.net.channels=8 'model.diffusion.net.channel_mult=[1,2]' "
    "model.diffusion.net.num_res_blocks=1 model.diffusion.net.video_channels=4 "
    "model.diffusion.net.concat_channels=4 model.diffusion.conditioner.drop=0.0"
)
SOUND = (
    f"{STEPS} data.root=sounds data.sample_rate={RATE} data.samples={SAMPLES} data.channels=1 "
    "sampler.steps=2 "
)
NET = (
    "'model.diffusion.net.channels=[8,8]' 'model.diffusion.net.factors=[1,2]' "
    "'model.diffusion.net.items=[1,1]' model.diffusion.net.modulation=16 "
    "model.diffusion.net.groups=4 model.diffusion.net.filters=null "
)
DMAE = (
    f"exp=dmae_tiny {SOUND} {NET} data.train.keep=false data.train.val_fraction=0.25 "
    "++model.codec._target_=avdiffusion.systems.codec.Patches "
    "'++model.codec.patch={audio:[16]}' '++model.codec.scale={audio:4.0}' "
    "model.diffusion.net.audio_channels=16 model.diffusion.net.inject_depth=1 "
    + " ".join(
        f"'model.diffusion.conditioner.encoder.{setting}'"
        for setting in (
            *("channels=8", "multipliers=[1,1]", "factors=[2]", "num_blocks=[1]", "groups=4"),
            *("stft_num_fft=63", "stft_hop_length=16", "out_channels=4"),
        )
    )
)
DIFFGEN = (
    f"exp=diffgen_tiny {SOUND} {NET} data.train.clips.keep=false "
    "data.train.clips.val_fraction=0.25 model.diffusion.net.audio_channels=4 "
    "'model.diffusion.net.attentions=[0,1]' 'model.diffusion.net.cross_attentions=[1,1]' "
    "model.diffusion.net.attention_heads=2 model.diffusion.net.attention_features=8 "
    "model.diffusion.conditioner.encoder.width=16 model.diffusion.conditioner.encoder.layers=1 "
    "model.diffusion.conditioner.encoder.max_length=32"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        project = Project(tmp_path_factory.mktemp("project"))
        songs = project.folder / "sounds"
        songs.mkdir()
        for k in range(8):
            item = Chirps(num=8, seed=3, sample_rate=RATE, samples=2 * RATE, channels=1)[k]
            write_wav(songs / f"{k}.wav", item["audio"].numpy() / 32768, sample_rate=RATE)
            (songs / f"{k}.txt").write_text(item["text"])
        yield project
        project.close()


def ran(project, line):
    result = project(line)
    assert result.status == 0, result.err
    return result.out + result.err


def run_of(project, name):
    return max((project.folder / "runs" / name).iterdir())


def gone(project, name):
    """The run of the first stage, moved to where nobody finds it."""
    shutil.move(run_of(project, name), project.folder.with_name(f"gone_{name}"))


def losses(run):
    """Step to every loss that was logged for it."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        kept = {k: v for k, v in row.items() if v and k.startswith(("train/loss", "val/loss"))}
        found.setdefault(int(row["step"]), {}).update(kept)
    return found


def interrupted(run):
    """Makes a finished run one that was killed after its second step."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    for file in (run / "checkpoints").iterdir():
        if torch.load(file, weights_only=True)["global_step"] > 2:
            file.unlink()
    shutil.rmtree(run / "samples" / "final")


def weights(run):
    return checkpoint.read(run)["state_dict"]


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def facts(path):
    """Size, times of frames, and the sound as it is packed."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        times = [frame.pts * stream.time_base for frame in file.decode(stream)]
        size = stream.height, stream.width
    return size, times, packets(path, "audio")


def test_video_to_video_goes_on_and_works_when_the_first_stage_is_gone(project, tmp_path):
    ran(project, f"python train.py {VAE}")
    vae = run_of(project, "v2v_vae_tiny")
    assert (vae / "samples" / "final" / "compare.png").is_file()
    line = f"python train.py {V2V}"
    assert "give its checkpoint as init.codec.system=CKPT" in project(line).error
    line += f" init.codec.system={vae}"
    ran(project, line)
    whole = run_of(project, "v2v_tiny")
    expected, state, first = losses(whole), weights(whole), weights(vae)
    begin = "ema.ema_model."
    inside = {k.removeprefix(begin): v for k, v in first.items() if k.startswith(begin)}
    assert len(inside) > 20
    same({k: state[f"codec.model.{k}"] for k in inside}, inside)

    gone(project, "v2v_vae_tiny")
    interrupted(whole)
    said = ran(project, f"{line} ckpt=auto")
    assert f"going on from {whole}/checkpoints/" in said
    assert losses(whole) == expected
    assert {3, 4} <= expected.keys()
    same(weights(whole), state)
    # a new run, which is told of the codec by its checkpoint alone
    middle = next((whole / "checkpoints").glob("*2.ckpt"))
    assert "leave out init.codec.system=" in project(f"{line} ckpt={middle}").error
    new = line.partition(" init.")[0] + " name=again callbacks.samples.final_num=0"
    ran(project, f"{new} ckpt={middle}")
    again = losses(run_of(project, "again"))
    assert {k: again[k] for k in (3, 4)} == {k: expected[k] for k in (3, 4)}

    clip = tmp_path / "clips" / "clip.mp4"
    clip.parent.mkdir()
    make_media(clip, seconds=0.6, fps=10, sample_rate=16000, size=(26, 34))  # 6 frames, parts of 4
    ran(project, f"python sample.py ckpt={whole} given={clip} out={tmp_path}/restored seed=1")
    restored = tmp_path / "restored" / "clip.mp4"
    assert facts(restored) == facts(clip)
    assert len(facts(restored)[1]) == 6
    assert "leave out text=" in project(f"python sample.py ckpt={whole} text=rain").error
    steps = f"python sample.py ckpt={whole} given={clip} decoding_steps=3 out={tmp_path}/none"
    assert "this model's clips are not decoded by steps" in project(steps).error
    assert not (tmp_path / "none").exists()
    judged = f"samples={tmp_path}/restored target={clip.parent} out={tmp_path}/report"
    ran(project, f'python evaluate.py {judged} "metrics=[restoration]" resamples=0')
    (report,) = (tmp_path / "report").glob("*.json")
    figures = {f["key"] for g in json.loads(report.read_text())["groups"] for f in g["figures"]}
    assert {"psnr", "ssim"} <= figures


def test_text_to_audio_works_when_the_first_stage_is_gone(project, tmp_path):
    ran(project, f"python train.py {DMAE}")
    dmae = run_of(project, "dmae_tiny")
    assert (dmae / "samples" / "final" / "compare.png").is_file()
    # existing sounds, each as long as it is
    out = tmp_path / "back"
    ran(project, f"python sample.py ckpt={dmae} given=sounds/3.wav out={out}")
    with wave.open(str(out / "3.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, 2 * RATE)
    assert "give them with given=DIR" in project(f"python sample.py ckpt={dmae}").error
    assert "leave out text=" in project(f"python sample.py ckpt={dmae} text=rain").error

    line = f"python train.py {DIFFGEN} init.codec.system={dmae}"
    refused = project(line.replace(f"sample_rate={RATE}", "sample_rate=8000")).error
    assert "trained with data.sample_rate=16000, this is data.sample_rate=8000" in refused
    ran(project, line)
    diffgen = run_of(project, "diffgen_tiny")
    assert not (diffgen / "samples" / "final" / "compare.png").exists()
    gone(project, "dmae_tiny")
    said = ran(
        project,
        f"python sample.py ckpt={diffgen} num=4 micro_batch=2 save=[wav] out={tmp_path}/songs "
        "\"text=[a low bird, 'a high, fast one']\"",
    )
    assert "4 evaluations each" in said  # with a text and without one
    record = json.loads((tmp_path / "songs" / "samples.json").read_text())
    assert [each["text"] for each in record["samples"]] == ["a low bird", "a high, fast one"] * 2
    sounds = []
    for k in range(4):
        with wave.open(str(tmp_path / "songs" / f"{k:06d}.wav")) as file:
            assert (file.getframerate(), file.getnframes()) == (RATE, SAMPLES)
            sounds.append(np.frombuffer(file.readframes(SAMPLES), np.int16))
    assert len({each.tobytes() for each in sounds}) == 4
    # a decoder's steps are one thing that samples depend on
    line = f"python sample.py ckpt={diffgen} text=rain num=1 save=[wav] seed=2"
    ran(project, f"{line} decoding_steps=3 out={tmp_path}/three")
    ran(project, f"{line} out={tmp_path}/two")
    three, two = ((tmp_path / name / "000000.wav").read_bytes() for name in ("three", "two"))
    assert three != two
    refused = project(f"{line} decoding_steps=4 out={tmp_path}/three").error
    assert "decoding_steps" in refused
    assert 'text="a dog barking"' in project(f"python sample.py ckpt={diffgen}").error
    refused = project(f"python evaluate.py ckpt={diffgen}").error
    assert "makes what texts say, and is judged by what it makes of some" in refused
