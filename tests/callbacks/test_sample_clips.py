"""Clips while training: in the run folder and in every logger."""

import csv
import json
import logging
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_system import TinySystem, fit

from avdiffusion import io
from avdiffusion.callbacks.evolution import sampled_steps, thinned
from avdiffusion.callbacks.loggers import Csv, TensorBoard
from avdiffusion.callbacks.publish import BUDGET, players
from avdiffusion.callbacks.samples import SampleClips
from avdiffusion.callbacks.scores import arrays
from avdiffusion.callbacks.wandb_run import wandb_logger
from avdiffusion.gallery import Entry
from avdiffusion.metrics.distance import Kernel
from avdiffusion.metrics.mean import Mean
from avdiffusion.metrics.metric import Figure
from avdiffusion.metrics.quality import Restoration
from avdiffusion.metrics.sync import Sync, ToyF1

av = pytest.importorskip("av")


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without a W&B account."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def clips(tmp_path, **options):
    default = {"every": 2, "num": 2, "metrics": {"sync": Sync(), "toy_f1": ToyF1()}}
    return SampleClips(out=tmp_path / "samples", **{**default, **options})


def has_sound(data):
    with av.open(BytesIO(data)) as file:
        assert file.streams.video[0].frames == 16
        wave = np.concatenate([f.to_ndarray() for f in file.decode(audio=0)], 1)
    return np.abs(wave).max() > 0.1


def test_clips_scalars_and_summary(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "avdiffusion"):
        trainer, system = fit(
            clips(tmp_path, final_num=10, seed=5), logger=[Csv(save_dir=tmp_path)], steps=5
        )
    assert system.asked == [(2, [0, 1], 5), (4, [0, 1], 5), (5, list(range(10)), 5)]
    names = {f.name for f in (tmp_path / "samples").iterdir()}
    assert names == {"step0000002", "step0000004", "final", "evolution"}
    files = {f.name for f in (tmp_path / "samples" / "step0000004").iterdir()}
    assert {"000001.mp4", "000001.wav", "000001.png", "contact.png", "gallery.html"} < files
    record = json.loads((tmp_path / "samples" / "final" / "samples.json").read_text())
    assert record["settings"]["seed"] == 5
    assert record["settings"]["step"] == 5
    assert record["scores"]["toy_f1"]["generated"] > 0.8
    assert record["scores"]["toy_f1"]["mismatched"] < 0.5
    assert record["scores"]["toy_f1"]["real"] > 0.8

    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows = {int(r["step"]): r for r in rows if r.get("sample/avcorr")}
    assert sorted(rows) == [2, 4, 5]
    for name in ("avcorr", "avcorr_mismatched", "avcorr_real", "toy_f1", "toy_f1_real"):
        assert rows[5][f"sample/{name}"]
    assert float(trainer.callback_metrics["sample/toy_f1"]) > 0.8

    told = caplog.messages[-1]
    assert told.startswith("10 clips with sound: ")
    assert str(tmp_path / "samples" / "final" / "gallery.html") in told
    assert re.search(r"AVCorr.* 0\.\d{3} +-?0\.\d{3} +0\.\d{3}", told)
    assert max(map(len, told.splitlines()[1:])) < 100


def test_a_metric_of_ones_own_is_a_call(tmp_path):
    seen = []

    def loudness(clips, rates):
        seen.append({name: (value.dtype.name, value.shape[0]) for name, value in clips.items()})
        assert rates == {"video": 10, "audio": 8000}
        return {"rms": np.float32(np.sqrt(np.square(clips["audio"]).mean())), "peak_mismatched": 1}

    trainer, _ = fit(clips(tmp_path, metrics={"loudness": loudness}, real_num=3), steps=4)
    kinds = [{"video": ("uint8", n), "audio": ("float32", n)} for n in (2, 3, 2)]
    assert seen == kinds  # step 2, real clips once, the end
    logged = {k for k in trainer.callback_metrics if k.startswith("sample/")}
    names = ("rms", "rms_real", "peak_mismatched", "nonfinite")
    assert logged == {f"sample/{name}" for name in names}
    assert 0 < float(trainer.callback_metrics["sample/rms"]) < 1
    with pytest.raises(ValueError, match=r"val_metrics\.x='rms' cannot be called"):
        clips(tmp_path, metrics={"x": "rms"})


def test_a_distance_is_told_the_real_clips(tmp_path):
    seen = []

    class Distance:
        against_real = True

        def __call__(self, clips, rates, real):
            seen.append((len(clips["audio"]), len(real["audio"])))
            assert np.abs(real["audio"]).max() <= 1
            return {"apart": np.abs(clips["audio"].std() - real["audio"].std())}

    trainer, _ = fit(clips(tmp_path, metrics={"distance": Distance()}, real_num=3), steps=4)
    assert seen == [(2, 3), (2, 3)]  # step 2 and the end, never of real clips alone
    assert {"sample/apart"} == {k for k in trainer.callback_metrics if "apart" in k}


def test_metrics_of_reports_share_what_an_extractor_finds(tmp_path):
    calls = []

    class Sound:
        needs, fields, paired = ("audio",), ("x",), False

        def __init__(self, name):
            self.name = name

        def __call__(self, clips, rates):
            calls.append((self.name, len(clips["audio"])))
            return {"x": clips["audio"].reshape(len(clips["audio"]), -1)[:, :9]}

    class Mean(Kernel):
        against_real = False

        def figures(self, sets):
            return [Figure(key="mean", label="", value=float(sets.samples["x"].mean()))]

    metrics = {key: Kernel(Sound("one"), key=key, scale=s) for key, s in (("kvd", 1), ("kad", 10))}
    metrics |= {"other": Kernel(Sound("two"), key="other"), "mean": Mean(Sound("one"))}
    trainer, _ = fit(clips(tmp_path, metrics=metrics, real_num=3), steps=6)
    assert sorted(calls[:4]) == [("one", 2), ("one", 3), ("two", 2), ("two", 3)]
    assert calls[4:] == [("one", 2), ("two", 2)] * 2  # steps 4 and 6; real clips once
    found = {k.removeprefix("sample/"): float(v) for k, v in trainer.callback_metrics.items()}
    assert {"kvd", "kad", "other", "mean", "mean_real"} <= found.keys()
    assert found["kad"] == pytest.approx(10 * found["kvd"])
    assert "kvd_real" not in found


def test_integers_of_a_dataset_are_pixels_and_16_bit_samples():
    video = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 4, 4)
    audio = torch.tensor([[[-32768, -1, 0, 16384]]], dtype=torch.int16)
    found = arrays({"video": video, "audio": audio})
    assert (found["video"] == video.numpy()).all()
    assert found["audio"].tolist() == [[[-1.0, -(2.0**-15), 0.0, 0.5]]]


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, ZeroDivisionError])
def test_a_metric_that_fails_costs_one_warning(tmp_path, caplog, error):
    def broken(clips, rates):
        raise error("no such thing")

    metrics = {"broken": broken, "toy_f1": ToyF1()}
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        trainer, _ = fit(clips(tmp_path, metrics=metrics), steps=6)
    assert trainer.global_step == 6
    assert "sample/toy_f1" in trainer.callback_metrics
    (told,) = [m for m in caplog.messages if "broken" in m]
    assert "val_metrics.broken failed (training goes on)" in told
    assert "no such thing" in told


def test_what_compares_with_a_target_has_none_here(tmp_path, caplog):
    metrics = {"restoration": Mean(Restoration()), "toy_f1": ToyF1()}
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        trainer, _ = fit(clips(tmp_path, metrics=metrics), steps=4)
    (told,) = caplog.messages
    assert told.startswith(
        "val_metrics.restoration failed (training goes on): Restoration compares"
    )
    assert told.endswith("leave it out, or use evaluate.py target=DIR")
    assert {"sample/toy_f1", "sample/toy_f1_real"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize("place", ["write_mp4", "write_wav", "mkdir"])
def test_a_full_disk_costs_one_warning(tmp_path, monkeypatch, caplog, place):
    """Scores are logged all the same."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if place == "mkdir":
        (tmp_path / "samples").write_text("a file where the folder should be")
    else:
        monkeypatch.setattr(io, place, full)
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        trainer, _ = fit(clips(tmp_path), logger=[Csv(save_dir=tmp_path)], steps=6)
    assert trainer.global_step == 6
    (told,) = [m for m in caplog.messages if "clips cannot be written (training goes on)" in m]
    assert place == "mkdir" or "No space left on device" in told
    assert float(trainer.callback_metrics["sample/toy_f1"]) > 0.8
    assert "sample/toy_f1" in (tmp_path / "metrics.csv").read_text()


def test_broken_clips_are_counted_and_said(tmp_path, caplog):
    class Breaks(TinySystem):
        def samples(self, index, **options):
            for part in super().samples(index, **options):
                part.clips["audio"][1:, 0, 5] = float("nan")
                yield part

    with caplog.at_level(logging.WARNING, "avdiffusion"):
        trainer, _ = fit(clips(tmp_path, num=3), steps=2, system=Breaks())
    assert float(trainer.callback_metrics["sample/nonfinite"]) == 2
    assert "step 2: 2 of 3 clips hold NaN or infinity" in caplog.messages
    assert np.isfinite(float(trainer.callback_metrics["sample/avcorr"]))


def test_the_evolution_of_a_seed_goes_on_after_a_stop(tmp_path):
    def picture(number=1):
        return np.asarray(Image.open(tmp_path / "samples" / "evolution" / f"{number:06d}.png"))

    fit(clips(tmp_path, evolution=2, num=3, final_num=0), steps=4)
    assert [step for step, _ in sampled_steps(tmp_path / "samples")] == [2, 4]
    before = picture()
    fit(clips(tmp_path, evolution=2, num=3, every=100), steps=5)
    folders = [folder.name for _, folder in sampled_steps(tmp_path / "samples")]
    assert folders == ["step0000002", "step0000004", "final"]
    row = (picture().shape[0] - 16) // 3
    assert picture().shape[0] - before.shape[0] == row
    np.testing.assert_array_equal(picture()[: 2 * row], before[: 2 * row])
    strip = np.asarray(Image.open(tmp_path / "samples" / "final" / "000001.png"))
    np.testing.assert_array_equal(picture()[-16 - len(strip) : -16, 16:-16], strip)
    names = {f.name for f in (tmp_path / "samples" / "evolution").iterdir()}
    assert names == {"000000.png", "000001.png"}


def test_no_evolution_without_strips_or_wish(tmp_path):
    fit(clips(tmp_path, save=["mp4"]), steps=2)
    fit(clips(tmp_path, evolution=0), steps=2)
    assert not list((tmp_path / "samples").glob("evolution/*.png"))


def test_long_evolutions_are_thinned():
    assert thinned([]) == []
    assert thinned([7]) == [7]
    assert thinned(range(10)) == list(range(10))
    assert thinned(range(28)) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    for count in range(11, 60):
        chosen = thinned(range(count))
        assert (len(set(chosen)), chosen[0], chosen[-1]) == (10, 0, count - 1)
        assert set(np.diff(chosen)) <= {(count - 1) // 9, -(-(count - 1) // 9)}


def test_the_last_step_is_sampled_once(tmp_path):
    _, system = fit(clips(tmp_path, metrics={}), steps=4)
    assert [step for step, *_ in system.asked] == [2, 4]
    assert not (tmp_path / "samples" / "step0000004").exists()
    _, system = fit(clips(tmp_path, metrics={}, final_num=0), steps=4)
    assert [step for step, *_ in system.asked] == [2, 4]
    assert (tmp_path / "samples" / "step0000004").exists()


def test_wandb_offline_keeps_clips_that_play_with_sound(tmp_path, nobody, caplog):
    with caplog.at_level(logging.INFO, "avdiffusion"):
        logger = wandb_logger(save_dir=tmp_path)
        fit(clips(tmp_path), logger=[logger], steps=4)
    pages = list(tmp_path.glob("wandb/offline-run-*/files/media/html/**/*.html"))
    assert len(pages) == 2
    found = re.findall(r'src="data:video/mp4;base64,([^"]+)"', pages[0].read_text())
    assert len(found) == 2
    assert all(has_sound(b64decode(mp4)) for mp4 in found)
    for name in ("strips", "evolution"):
        images = tmp_path.glob(f"wandb/offline-run-*/files/media/images/sample/{name}_*.png")
        assert len(list(images)) == 2
    assert sum("wandb sync" in message for message in caplog.messages) == 1
    import wandb

    assert wandb.run is None


def test_tensorboard_shows_strips_clips_and_sound(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoard(save_dir=tmp_path)
    fit(clips(tmp_path), logger=[logger], steps=2)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    images = {"sample/strips", "sample/evolution", "sample/000000", "sample/000001"}
    assert images <= set(events.Tags()["images"])
    assert events.Images("sample/000000")[0].encoded_image_string[:6] == b"GIF89a"
    assert "sample/000001" in events.Tags()["audio"]
    assert "sample/avcorr" in events.Tags()["scalars"]


def test_a_page_for_wandb_stays_within_its_budget():
    entries = [Entry(f"{i:06d}", "", b"x" * 400_000) for i in range(20)]
    page = players(entries, BUDGET)
    assert len(page) <= BUDGET
    assert "11 more" in page


def shared(folder, devices, **options):
    """All files of a run on so many processes, and its row of scores."""
    strategy = {"strategy": "ddp_spawn", "devices": 2} if devices == 2 else {}
    options = {"num": 5, "micro_batch": 2, "final_num": 1, **options}
    logger = Csv(save_dir=folder)
    fit(clips(folder, **options), logger=[logger], steps=3, **strategy)
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["sample/avcorr"]]
    del files["metrics.csv"]
    scores = {k: float(v) for k, v in rows[0].items() if k.startswith("sample/")}
    return files, scores


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num": 8, "micro_batch": 3}])
def test_two_processes_make_the_clips_of_one(tmp_path, options):
    """Five clips on two processes, and one at the end, which the second has no part of."""
    folders = [tmp_path / "one" / "run", tmp_path / "two" / "run"]
    (alone, scores), (both, others) = (shared(f, n, **options) for n, f in enumerate(folders, 1))
    assert alone.keys() == both.keys()
    assert "samples/step0000002/000004.mp4" in alone
    assert "samples/final/000000.wav" in alone
    # FFmpeg may write other bytes for the same pictures, and pages hold the clips
    differing = {name for name in alone if alone[name] != both[name]}
    assert {Path(name).suffix for name in differing} <= {".mp4", ".html"}
    assert scores == others
