"""Clips of a model that makes them of held-out ones: against the truth, beside bicubic ones."""

import csv
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_sr import sr_system
from small_system import trainer
from torch.utils.data import Dataset

from avdiffusion import checkpoint
from avdiffusion.callbacks.loggers import Csv, TensorBoard
from avdiffusion.callbacks.samples import SampleClips
from avdiffusion.data.degrade import Degrade, Degraded
from avdiffusion.data.module import DataModule
from avdiffusion.data.toy import Toy
from avdiffusion.metrics.distance import Kernel
from avdiffusion.metrics.mean import Mean
from avdiffusion.metrics.quality import Flicker, Perceptual, Restoration
from avdiffusion.metrics.thumbnail import Thumbnail
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.writer import pixels

av = pytest.importorskip("av")
SIZE, FRAMES, FPS = 32, 4, 10


class First(Dataset):
    """The first frames of toy clips."""

    def __init__(self, num, seed, frames):
        self.toy, self.frames = Toy(num=num, seed=seed, size=(SIZE, SIZE)), frames

    def __len__(self):
        return len(self.toy)

    def __getitem__(self, i):
        return {"video": self.toy[i]["video"][:, : self.frames], "index": i}


def degraded(num, seed, frames=FRAMES):
    return Degraded(First(num, seed, frames), degrade=Degrade(scale=4))


def data(val=3, frames=FRAMES):
    return DataModule(
        train=degraded(20, 0, frames),
        val=degraded(val, 1, frames) if val else None,
        fps=FPS,
        frames=frames,
        size=[SIZE, SIZE],
        sample_rate=None,
        samples=None,
        batch_size=2,
    )


def metrics():
    return {"restoration": Mean(Restoration()), "flicker": Mean(Flicker())}


def clips(folder, **options):
    default = {"every": 2, "num": 3, "micro_batch": 2, "metrics": metrics()}
    return SampleClips(out=folder / "samples", **{**default, **options})


def run(*callbacks, steps=2, module=None, **options):
    made = trainer(steps, callbacks=list(callbacks), **options)
    system = sr_system(size=SIZE, frames=FRAMES, sampler=DDIM(steps=2), val_times=1)
    made.fit(system, module or data(), weights_only=True)
    return made, system


def of(found, name):
    return {k.removeprefix("sample/"): float(v) for k, v in found.items() if k.startswith(name)}


def order(count):
    """In which items are taken, neighbours of one file apart."""
    return np.random.default_rng(0).permutation(count)


def test_samples_are_made_of_held_out_clips_and_compared_with_them(tmp_path, caplog):
    """Also where more samples are asked for than there are clips: their noise is another."""
    with caplog.at_level(logging.INFO, "avdiffusion"):
        made, system = run(clips(tmp_path, num=5, seed=7))
    logged, val = of(made.callback_metrics, "sample/"), degraded(3, 1)
    items = [val[order(3)[i % 3]] for i in range(5)]
    low = torch.stack([item["low_res"] for item in items])
    target = np.stack([item["video"].numpy() for item in items])
    parts = [
        system.conditioned({"low_res": low[k : k + 2]}, range(k, min(k + 2, 5)), seed=7)
        for k in (0, 2, 4)
    ]
    video = pixels(torch.cat([part.clips["video"] for part in parts]))
    assert (video[0] != video[3]).any()

    def expected(video):
        found = Mean(Restoration())({"video": video}, {"video": FPS}, targets={"video": target})
        return found | Mean(Flicker())({"video": video}, {"video": FPS})

    plain = system.remakes.baseline({"low_res": low})["video"]
    names = {"psnr", "psnr_pooled", "psnr_identical", "ssim", "flicker_error", "flicker"}
    for end, clip in (("", video), ("_baseline", pixels(plain))):
        found = expected(clip)
        assert found.keys() == names
        assert {name: logged[name + end] for name in names} == pytest.approx(found), end
    assert logged["flicker_real"] == pytest.approx(expected(target)["flicker"])
    assert logged.keys() == names | {f"{n}_baseline" for n in names} | {"flicker_real", "nonfinite"}

    record = json.loads((tmp_path / "samples" / "final" / "samples.json").read_text())
    assert record["scores"]["psnr"].keys() == {"generated", "baseline"}
    assert record["scores"]["flicker"].keys() == {"generated", "baseline", "real"}
    assert record["settings"]["baseline"] == "bicubic"
    told = caplog.messages[-1].splitlines()
    assert told[0].startswith("5 clips: ")
    assert told[1].split() == ["generated", "baseline", "real"]
    row = next(line for line in told if line.startswith("PSNR in dB"))
    assert f"{logged['psnr_baseline']:.3f}" in row


def test_bicubic_enlargement_is_that_of_another_library():
    """Of frames of their own: cubic kernels with a = -0.75, edges held."""
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    low = rng.uniform(-1.1, 1.1, (2, 3, 3, 9, 7)).astype(np.float32)
    baseline = sr_system(scale=3).remakes.baseline({"low_res": torch.from_numpy(low)})
    assert baseline["video"].shape == (2, 3, 3, 27, 21)
    for b, t in ((0, 0), (1, 2)):
        one = cv2.resize(low[b, :, t].transpose(1, 2, 0), (21, 27), interpolation=cv2.INTER_CUBIC)
        found = baseline["video"][b, :, t].permute(1, 2, 0)
        np.testing.assert_allclose(found, one.clip(-1, 1), atol=1e-5)


def test_a_picture_shows_what_was_given_and_what_should_have_come_of_it(tmp_path):
    run(clips(tmp_path, num=2, metrics={}))
    picture = np.asarray(Image.open(tmp_path / "samples" / "final" / "compare.png"))
    cell, pad, head = 256, 16, 18  # of a contact sheet
    assert picture.shape == (2 * (cell + head + pad) + pad, 4 * (cell + pad) + pad, 3)
    item = degraded(3, 1)[order(3)[1]]
    for column, clip in ((0, pixels(item["low_res"])), (3, item["video"].numpy())):
        x, y = pad + column * (cell + pad), pad + (cell + head + pad) + head
        shown = picture[y : y + cell, x : x + cell]
        frame = clip[:, FRAMES // 2].transpose(1, 2, 0)
        times = cell // frame.shape[0]
        np.testing.assert_array_equal(shown, frame.repeat(times, 0).repeat(times, 1))


def test_others_are_measured_once_for_each_number_of_samples(tmp_path):
    seen = []

    def counted(clips, rates):
        seen.append(len(clips["video"]))
        return {"x": 0.0}

    callback = clips(tmp_path, num=2, final_num=1, metrics={"x": counted})
    run(callback, steps=5)
    # step 2 with targets and baseline, step 4 without; the end is of one sample
    assert seen == [2, 2, 2, 2, 1, 1, 1]


def test_distances_are_from_the_targets(tmp_path):
    seen = []

    class Distance:
        against_real = True

        def __call__(self, clips, rates, real):
            seen.append(real["video"])
            return {"apart": float(clips["video"].mean()) - real["video"].mean()}

    kernel = Kernel(Thumbnail(needs=["video"]), key="kvd")
    chosen = {"distance": Distance(), "kvd": kernel}
    made, _ = run(clips(tmp_path, num=3, metrics=chosen), module=data(val=12))
    logged, val = of(made.callback_metrics, "sample/"), degraded(12, 1)
    expected = np.stack([val[i]["video"].numpy() for i in order(12)[:3]])
    assert all((real == expected).all() for real in seen)
    assert len(seen) == 2  # of the samples and of the baseline
    assert logged.keys() == {*["apart", "kvd", "apart_baseline", "kvd_baseline", "nonfinite"]}


def test_without_held_out_clips_there_are_none_and_training_goes_on(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        made, _ = run(clips(tmp_path), steps=4, module=data(val=0), limit_val_batches=0)
    assert made.global_step == 4
    assert caplog.messages == ["no clips are sampled: there is no validation clip to make them of"]
    assert not (tmp_path / "samples").exists()


def test_missing_weights_cost_one_message(tmp_path, caplog, monkeypatch):
    for name in ("XDG_CACHE_HOME", "AVDIFFUSION_WEIGHTS", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    chosen = {"lpips": Mean(Perceptual()), **metrics()}
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        made, _ = run(clips(tmp_path, metrics=chosen), steps=4)
    (told,) = caplog.messages
    assert told.startswith("val_metrics.lpips failed (training goes on): lpips-alex")
    assert "avdiffusion.weights get lpips-alex" in told
    assert {"psnr", "psnr_baseline"} <= of(made.callback_metrics, "sample/").keys()


def test_single_frames_have_no_flicker(tmp_path):
    system = sr_system(size=SIZE, frames=1)
    made = trainer(2, callbacks=[clips(tmp_path, save=["mp4", "png", "gif"])])
    made.fit(system, data(frames=1), weights_only=True)
    logged = of(made.callback_metrics, "sample/")
    assert np.isnan(logged["flicker_error"])
    assert logged["psnr"] > 0
    page = (tmp_path / "samples" / "final" / "gallery.html").read_text()
    assert "baseline: what was given" in page
    assert "mismatched" not in page


def test_all_default_callbacks_and_loggers_take_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["~exp", f"paths.run={tmp_path}/run", "logger=[csv,tensorboard]"]
    words += ["val_metrics=[restoration,flicker]", "callbacks.samples.every=1"]
    words += ["callbacks.samples.num=2", "callbacks.checkpoint.every=1", "data=toy"]
    config = checkpoint.compose(words)
    callbacks = [each for each in checkpoint.build(config.callbacks).values() if each]
    loggers = [Csv(save_dir=tmp_path / "run")]
    if pytest.importorskip("tensorboard"):
        loggers.append(TensorBoard(save_dir=tmp_path / "run"))
    made, _ = run(
        *callbacks,
        steps=3,
        logger=loggers,
        val_check_interval=1,
        log_every_n_steps=1,
        enable_checkpointing=True,
        enable_progress_bar=True,
    )
    assert made.global_step == 3
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = {k: v for row in rows if row["step"] == "3" for k, v in row.items() if v}
    names = ("train/loss_video_vb", "val/loss", "train/grad_norm_shared")
    names += ("sample/psnr", "sample/psnr_baseline", "sample/ssim", "sample/flicker_error")
    assert set(names) <= last.keys()
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    assert status["status"] == "finished"
    assert status["metrics"]["sample/psnr_baseline"] > 0
    assert (tmp_path / "run" / "samples" / "step0000002" / "compare.png").is_file()


def spread(folder, devices):
    strategy = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
    callback = clips(folder, num=5, final_num=1)
    run(callback, steps=3, logger=[Csv(save_dir=folder)], **strategy)
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["sample/psnr"]]
    scores = [{k: float(v) for k, v in row.items() if k.startswith("sample/")} for row in rows]
    found = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.png")}
    return found, scores


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="an average cannot be sent to a process")
def test_two_processes_make_the_clips_of_one_of_held_out_ones(tmp_path, monkeypatch):
    """Training is that of one process but for rounding."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a forked process has no other threads
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    folders = [tmp_path / "one" / "run", tmp_path / "two" / "run"]
    (alone, scores), (both, others) = (spread(f, n) for n, f in enumerate(folders, 1))
    assert alone.keys() == both.keys()
    assert "samples/step0000002/compare.png" in alone
    assert len(scores) == 2
    for one, two in zip(scores, others, strict=True):
        assert one == pytest.approx(two, abs=0.02)
        same = [k for k in one if k.endswith(("_baseline", "_real"))]
        assert [one[k] for k in same] == [two[k] for k in same]
    for name in alone:
        if Path(name).parent.name == "step0000002":
            pictures = [np.asarray(Image.open(f / name)).astype(int) for f in folders]
            assert abs(pictures[0] - pictures[1]).max() < 3
