"""Gradients: their size, and steps whose gradient is not finite."""

import logging
from copy import deepcopy
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from kept import Kept, straying
from pytorch_lightning.plugins.precision import MixedPrecision
from small_system import SHAPES, data, fit, system

from avdiffusion.callbacks.gradients import Gradients
from avdiffusion.systems.average import PowerEMA
from avdiffusion.systems.schedule import warmup

OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "fused adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "fused sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1, fused=True),
}
EVERY = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


class States(pl.Callback):
    """Weights, moments, average and gradient norms after every step."""

    def __init__(self):
        self.weights, self.moments, self.average, self.norms, self.lr = [], [], [], [], []

    def on_before_optimizer_step(self, trainer, system, optimizer):
        grads = {
            name: p.grad.flatten() if p.grad is not None else torch.zeros(0)
            for name, p in system.model.named_parameters()
        }
        streams = {"": lambda _: True, "_shared": lambda n: not set(SHAPES) & set(n.split("."))}
        for name in SHAPES:
            streams[f"_{name}"] = lambda n, name=name: name in n.split(".")
        self.norms.append(
            {
                stream: float(
                    torch.linalg.vector_norm(torch.cat([g for n, g in grads.items() if has(n)]))
                )
                for stream, has in streams.items()
            }
        )
        self.lr.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, system, *_):
        self.weights.append(deepcopy(system.model.state_dict()))
        self.moments.append(deepcopy(trainer.optimizers[0].state_dict()["state"]))
        self.average.append(deepcopy(system.ema.ema_model.state_dict()))


def train(steps, at=(), *, stop_after=25, clip=None, callbacks=(), **options):
    """Trains with a NaN in the gradients of steps `at`."""
    logger, states, gradients = Kept(), States(), Gradients(stop_after=stop_after)
    trainer_options = {
        name: options.pop(name)
        for name in ("log_every_n_steps", "plugins", "ckpt")
        if name in options
    }
    model = straying(at, **options)
    trainer = fit(
        model,
        steps,
        logger=logger,
        callbacks=[gradients, states, *callbacks],
        gradient_clip_val=clip,
        **{"log_every_n_steps": 2, **trainer_options},
    )
    return logger.steps, states, trainer


def equal(a, b):
    """Whether nested states have the same bits."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@EVERY
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_without_finite_gradient_changes_nothing(optimizer, clip):
    logged, states, trainer = train(6, {4, 6}, optimizer=optimizer, clip=clip)
    for step in (4, 6):
        assert equal(states.weights[step - 1], states.weights[step - 2])
        assert equal(states.moments[step - 1], states.moments[step - 2])
    for step in (2, 3, 5):
        assert not equal(states.weights[step - 1], states.weights[step - 2])
    # The average goes on towards weights that stayed: step 4 is its fourth update.
    decay = 1 - 4 ** (-2 / 3)
    for name, value in states.average[3].items():
        if value.is_floating_point():
            expected = torch.lerp(states.average[2][name], states.weights[2][name], 1 - decay)
            torch.testing.assert_close(value, expected)
    assert logged[2]["train/skipped_steps"] == 0
    assert logged[4]["train/skipped_steps"] == 1
    assert logged[6]["train/skipped_steps"] == 2
    assert trainer.global_step == 6


@EVERY
def test_not_even_a_first_step_leaves_a_trace(optimizer):
    """SGD's fused kernel would keep memory it has never written as momentum."""
    _, astray, _ = train(4, {1}, optimizer=optimizer)
    assert equal(astray.weights[0], system().model.state_dict())
    assert all(v.isfinite().all() for v in astray.weights[-1].values())
    for state in astray.moments[-1].values():
        assert all(v.isfinite().all() for v in state.values() if torch.is_tensor(v))


@EVERY
def test_finite_steps_are_those_of_training_without_it(optimizer):
    _, states, _ = train(4, optimizer=optimizer)
    plain = States()
    fit(system(optimizer=optimizer), 4, callbacks=[plain])
    assert equal(states.weights, plain.weights)
    assert equal(states.moments, plain.moments)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_skips_by_itself_and_is_counted(fused):
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, fused=fused)
    # Lightning makes bfloat16 of 16-mixed on the CPU unless it is told otherwise.
    mixed = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    logged, states, _ = train(8, {5}, optimizer=optimizer, plugins=[mixed])
    stayed = [
        step for step in range(2, 9) if equal(states.weights[step - 1], states.weights[step - 2])
    ]
    assert stayed == [5]
    assert logged[8]["train/skipped_steps"] == 1
    full, _, _ = train(8, {5}, optimizer=optimizer)
    assert logged[2]["train/grad_norm"] == pytest.approx(full[2]["train/grad_norm"], rel=0.02)


def test_what_one_process_meets_all_of_them_skip(tmp_path):
    class Write(pl.Callback):
        def on_train_batch_end(self, trainer, system, *_):
            state = [trainer.callbacks[0].state_dict(), system.model.state_dict()]
            torch.save(state, tmp_path / f"{trainer.global_rank}_{trainer.global_step}.pt")

    model = straying({3}, only=1)
    fit(
        model,
        4,
        data(batch_size=4, val=0),
        callbacks=[Gradients(), Write()],
        devices=2,
        strategy="ddp_fork",
    )
    zero, one = ([torch.load(tmp_path / f"{r}_{k}.pt") for k in (1, 2, 3, 4)] for r in (0, 1))
    assert equal(zero, one)
    assert equal(zero[2][1], zero[1][1])
    assert not equal(zero[3][1], zero[2][1])
    assert zero[3][0] == {"skipped": 1, "streak": 0}


def test_norms_by_stream_are_means_over_the_finite_steps():
    logged, states, _ = train(6, {4}, clip=0.1)
    for last, steps in {2: (1, 2), 4: (3,), 6: (5, 6)}.items():
        for stream in ("", "_video", "_audio", "_shared"):
            expected = sum(states.norms[step - 1][stream] for step in steps) / len(steps)
            assert logged[last][f"train/grad_norm{stream}"] == pytest.approx(expected, rel=1e-5)
    assert logged[2]["train/grad_norm"] > 0.1  # not what clipping left


def test_streams_of_the_coupled_network():
    """Self-attention over places and frames is the picture's, whatever its name says."""
    from avdiffusion.nn.coupled_unet import CoupledUNet

    net = CoupledUNet(
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        num_heads=2,
        head_channels=32,
        cross_attention_resolutions=(2,),
        cross_attention_windows=(1,),
        video_attention_resolutions=(2,),
        audio_attention_resolutions=(2,),
    )
    gradients, model = Gradients(), system()
    model.model.net = net
    gradients.on_train_start(type("Trainer", (), {"global_step": 0}), model)
    found = {}
    for (stream, parameter), (name, same) in zip(
        gradients.parameters, model.model.named_parameters(), strict=True
    ):
        assert parameter is same
        found[name.removeprefix("net.")] = stream
    assert found["encoder.0.res.video.conv.space.weight"] == "video"
    assert found["encoder.0.res.audio.norm.weight"] == "audio"
    assert found["middle_in.spatial.qkv.weight"] == "video"
    assert found["middle_in.audio.qkv.weight"] == "audio"
    assert found["middle_in.cross.audio_qkv.weight"] == "cross"
    assert found["video_in.time.weight"] == "video"
    assert {name.split(".")[0] for name, stream in found.items() if stream == "shared"} == {
        "time",
        "film",
    }


def test_rate_and_decay_are_those_of_the_step():
    logged, states, _ = train(4, lr_schedule=partial(warmup, warmup_steps=10, total_steps=20))
    for step in (2, 4):
        assert logged[step]["train/lr"] == states.lr[step - 1]
        assert logged[step]["train/ema_decay"] == pytest.approx(1 - step ** (-2 / 3))
    assert logged[2]["train/lr"] < logged[4]["train/lr"]
    power, _, _ = train(4, ema=partial(PowerEMA, sigma_rels=[0.1]))
    assert 0 < power[4]["train/ema_decay"] < 1


def test_skipped_steps_are_said_once_in_a_window(caplog):
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        train(12, {2, 5, 6, 7, 8, 9, 10}, log_every_n_steps=4)
    said = [r.getMessage() for r in caplog.records if r.name == "avdiffusion"]
    assert said == [
        "1 step skipped: the gradient is not finite (step 2)",
        "4 steps skipped: the gradient is not finite (steps 5, 6, 7, 8)",
        "2 steps skipped: the gradient is not finite (steps 9, 10)",
    ]


def test_a_run_that_only_skips_is_ended():
    seen = States()
    with pytest.raises(ValueError, match=r"3 steps in a row, up to step 4: .*model\.optimizer\.lr"):
        train(10, range(2, 11), stop_after=3, callbacks=[seen])
    assert len(seen.weights) in (3, 4)
    assert equal(seen.weights[0], seen.weights[-1])


def test_single_skipped_steps_do_not_end_a_run():
    logged, _, _ = train(8, {2, 3, 5, 6, 8}, stop_after=3)
    assert logged[8]["train/skipped_steps"] == 5
    logged, _, _ = train(8, range(2, 9), stop_after=0)
    assert logged[8]["train/skipped_steps"] == 7
    assert "train/grad_norm" not in logged[4]
    with pytest.raises(ValueError, match="stop_after=-1"):
        Gradients(stop_after=-1)


def test_the_count_survives_a_resume_from_within_a_window(tmp_path):
    bad = {1, 5, 6, 7, 8}
    _, _, trainer = train(7, bad, log_every_n_steps=4)
    callback = trainer.callbacks[0]
    assert callback.state_dict() == {"skipped": 4, "streak": 3}

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "six.ckpt")

    train(7, bad, log_every_n_steps=4, callbacks=[Save()])
    with pytest.raises(ValueError, match="4 steps in a row, up to step 8"):
        train(12, bad, stop_after=4, ckpt=tmp_path / "six.ckpt", log_every_n_steps=4)
    logged, _, _ = train(12, bad, ckpt=tmp_path / "six.ckpt", log_every_n_steps=4)
    assert logged[8]["train/skipped_steps"] == 5
    assert logged[12]["train/skipped_steps"] == 5


def test_windows_end_where_nothing_is_logged():
    _, _, trainer = train(3, {2}, log_every_n_steps=0)
    gradients = trainer.callbacks[0]
    assert gradients.skipped == 1
    assert gradients.window == []


def test_the_data_of_a_skipped_step_is_not_repeated():
    """Positions are a function of the step: what comes after is what would have come."""
    from recorder import Recorder

    ids = {}
    for at in ((), (2,)):
        seen = []

        class See(Recorder):
            def __init__(self, seen=seen):
                self.seen = seen

            def on_train_batch_end(self, trainer, system, outputs, batch, _):
                self.seen.append(batch["position"])

        fit(straying(at), 4, data(batch_size=4), callbacks=[Gradients(), See()])
        ids[at] = seen
    assert ids[()] == ids[(2,)]
