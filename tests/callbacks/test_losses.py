"""Training losses: means over everything since the last log."""

import csv

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from kept import Kept
from small_system import SHAPES, data, fit, system

from avdiffusion.callbacks.loggers import Csv
from avdiffusion.callbacks.losses import Losses
from avdiffusion.systems.diffusion import DiffusionSystem


class Outputs(pl.Callback):
    """What training steps gave, as numpy."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, system, outputs, batch, _):
        losses = {name: value.numpy().copy() for name, value in outputs["losses"].items()}
        self.seen.append((trainer.global_step, outputs["t"].numpy(), losses))


def train(steps, *, model=None, bins=4, batch_size=4, **options):
    logger, outputs = Kept(), Outputs()
    trainer = fit(
        model or system(weights={"audio": 3.0}),
        steps,
        data(batch_size=batch_size),
        logger=logger,
        callbacks=[Losses(bins=bins), outputs],
        **options,
    )
    return logger.steps, outputs.seen, trainer


def recomputed(seen, first, last, bins, path):
    """Means of steps first to last, by numpy."""
    seen = [each for each in seen if first <= each[0] <= last]
    t = np.concatenate([t for _, t, _ in seen])
    edges = np.linspace(path.t_min, path.t_max, bins + 1)
    values = {}
    for name in SHAPES:
        loss = np.concatenate([losses[name] for *_, losses in seen]).astype(float)
        values[f"train/loss_{name}"] = loss.mean()
        sums, counts = (np.histogram(t, edges, weights=w)[0] for w in (loss, None))
        for k in np.flatnonzero(counts):
            values[f"train/loss_{name}_t{k}"] = sums[k] / counts[k]
    values["train/loss"] = values["train/loss_video"] + 3 * values["train/loss_audio"]
    return values


def test_means_of_windows_and_of_parts_of_time():
    logged, seen, trainer = train(14, log_every_n_steps=5)
    assert list(logged) == [5, 10, 14]
    path = trainer.lightning_module.model.path
    for (first, last), values in zip([(1, 5), (6, 10), (11, 14)], logged.values(), strict=True):
        assert values == pytest.approx(recomputed(seen, first, last, 4, path), rel=1e-6)
    assert {f"train/loss_{name}_t{k}" for name in SHAPES for k in range(4)} < logged[5].keys()


def test_parts_without_samples_are_left_out():
    logged, seen, trainer = train(6, bins=3, batch_size=1, log_every_n_steps=1)
    path = trainer.lightning_module.model.path
    for step, values in logged.items():
        assert len(values) == 1 + 2 * len(SHAPES)
        assert values == pytest.approx(recomputed(seen, step, step, 3, path), rel=1e-6)


def test_accumulated_batches_belong_to_one_step():
    """Twice as many half batches have the same losses: they differ in rounding."""
    whole, _, _ = train(4, log_every_n_steps=2)
    model = system(weights={"audio": 3.0})
    logger = Kept()
    fit(
        model,
        4,
        data(batch_size=4, micro_batch=2),
        logger=logger,
        callbacks=[Losses()],
        log_every_n_steps=2,
        accumulate_grad_batches=2,
    )
    assert list(logger.steps) == [2, 4]
    for step, values in logger.steps.items():
        assert values == pytest.approx(whole[step], rel=1e-4)


def test_samples_that_are_not_finite_are_left_out():
    model = system()

    def step(batch, batch_idx):
        out = DiffusionSystem.training_step(model, batch, batch_idx)
        if model.global_step == 1:
            out["losses"]["video"][2] = torch.nan
        if model.global_step == 3:
            out["losses"]["audio"].fill_(torch.inf)
        return out

    model.training_step = step
    logged, seen, _ = train(4, model=model, log_every_n_steps=2)
    video = np.concatenate([losses["video"] for *_, losses in seen[:2]])
    assert np.isnan(video).sum() == 1
    assert logged[2]["train/loss_video"] == pytest.approx(np.nanmean(video))
    assert logged[4]["train/loss_audio"] == pytest.approx(seen[2][2]["audio"].mean())


def test_without_any_finite_sample_nothing_is_said_of_it():
    model = system()

    def step(batch, batch_idx):
        out = DiffusionSystem.training_step(model, batch, batch_idx)
        out["losses"]["audio"].fill_(torch.nan)
        return out

    model.training_step = step
    logged, _, _ = train(2, model=model, log_every_n_steps=2)
    assert "train/loss_video" in logged[2]
    assert not {"train/loss", "train/loss_audio", "train/loss_audio_t0"} & logged[2].keys()


def test_the_bar_sees_the_last_batch_and_loggers_the_mean():
    logged, seen, trainer = train(4, log_every_n_steps=4)
    last = seen[-1][2]
    shown = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert shown["train/loss_video"] == pytest.approx(last["video"].mean())
    assert shown["train/loss_video"] != pytest.approx(logged[4]["train/loss_video"])
    assert shown.keys() == {"train/loss", "train/loss_video", "train/loss_audio"}
    assert trainer.progress_bar_metrics == {}


def test_no_parts_is_refused():
    with pytest.raises(ValueError, match="bins=0"):
        Losses(bins=0)


def test_two_processes_log_the_mean_over_both(tmp_path):
    rows = {}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        fit(
            system(weights={"audio": 3.0}),
            4,
            data(batch_size=4, val=0),
            logger=[Csv(save_dir=folder)],
            callbacks=[Losses()],
            log_every_n_steps=2,
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
        )
        with (folder / "metrics.csv").open() as file:
            rows[devices] = list(csv.DictReader(file))
    assert len(rows[1]) == len(rows[2]) == 2
    for one, two in zip(rows[1], rows[2], strict=True):
        one, two = ({k: float(v) for k, v in row.items() if v} for row in (one, two))
        assert len(one) > 5
        assert two == pytest.approx(one, rel=1e-5)
