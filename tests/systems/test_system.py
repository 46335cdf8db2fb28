"""Training, averaging and sampling of a very small system."""

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from small_system import SHAPES, Net, batch, data, fit, system

from avdiffusion.diffusion.diffusion import Diffusion
from avdiffusion.diffusion.noise import Noise
from avdiffusion.diffusion.path import DiscreteVP
from avdiffusion.media import Media
from avdiffusion.nn.coupled_unet import CoupledUNet
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.ddpm import DDPM
from avdiffusion.systems.average import EMA
from avdiffusion.systems.codec import Patches


def loss_of(model, *args, **kwargs):
    """`training_step` with what it logs, outside a trainer."""
    logged = {}
    model.log_dict = lambda values, **_: logged.update(values)
    return model.training_step(batch(*args, **kwargs), 0)["loss"], logged


# ------------------------------------------------------------------------------- training


def test_a_training_step_gives_the_weighted_sum_of_the_modalities():
    loss, logged = loss_of(system(weights={"audio": 3.0}), 0, 1, 2)
    assert logged.keys() == {"train/loss", "train/loss_video", "train/loss_audio"}
    parts = {name: float(logged[f"train/loss_{name}"]) for name in SHAPES}
    assert float(loss.detach()) == pytest.approx(parts["video"] + 3 * parts["audio"])
    assert loss.requires_grad
    assert not logged["train/loss"].requires_grad


def test_learned_variance_adds_its_bound_with_the_weight_of_its_modality():
    class Doubled(Net):
        def forward(self, *args, **kwargs):
            return tuple(torch.cat([v, v], 1) for v in super().forward(*args, **kwargs))

        def __deepcopy__(self, memo):
            return Doubled()

    diffusion = Diffusion(net=Doubled(), path=DiscreteVP(), learned_variance=True)
    loss, logged = loss_of(system(diffusion=diffusion, weights={"video": 0.5}), 0, 1)
    value = {k.removeprefix("train/loss_"): float(v) for k, v in logged.items()}
    expected = 0.5 * (value["video"] + value["video_vb"]) + value["audio"] + value["audio_vb"]
    assert float(loss.detach()) == pytest.approx(expected)


def test_the_loss_depends_on_positions_and_seed_alone():
    base = loss_of(system(), 0, 1)[0]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    model = system()
    torch.manual_seed(99)
    assert torch.equal(loss_of(model, 0, 1)[0], base)
    assert not torch.equal(loss_of(system(), 0, 1, position=7)[0], base)
    other = system()
    other.seed = 5
    assert not torch.equal(loss_of(other, 0, 1)[0], base)


def test_halves_of_a_batch_see_the_same_times_and_noises():
    """What accumulation and more devices rest on."""
    whole, half = system(), system()
    loss = loss_of(whole, 0, 1, 2, 3)[0]
    parts = [loss_of(half, 0, 1)[0], loss_of(half, 2, 3, position=2)[0]]
    torch.testing.assert_close(sum(parts) / 2, loss)
    (times, shifts), (first, same), (second, _) = whole.model.net.seen + half.model.net.seen
    assert first + second == times
    assert same == shifts


@pytest.mark.parametrize("net", ["small", "unet"])
def test_a_gradient_reaches_every_parameter(net):
    if net == "unet":
        torch.manual_seed(0)
        net = CoupledUNet(
            channels=8,
            channel_mult=(1, 2),
            num_res_blocks=1,
            num_heads=2,
            head_channels=8,
            cross_attention_resolutions=(2,),
            cross_attention_windows=(2,),
            video_attention_resolutions=(2,),
        )
        with torch.no_grad():  # its outputs begin at zero, which stops gradients
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
    else:
        net = Net()
        net.skip["video"].data += 0.1
    model = system(net=net)
    loss_of(model, 0, 1, 2, 3)[0].backward()
    dead = [
        name
        for name, p in model.model.named_parameters()
        if p.grad is None or not bool(p.grad.abs().max() > 0)
    ]
    assert dead == []
    assert all(p.grad is None for p in model.ema.parameters())
    assert {id(p) for p in model.configure_optimizers().param_groups[0]["params"]} == {
        id(p) for p in model.model.parameters()
    }


def test_one_batch_is_overfitted():
    model = system(lr=2e-3, beta=0.98, target="x0", net=Net(width=128))
    optimizer = model.configure_optimizers()
    losses = []
    for k in range(300):
        loss = loss_of(model, 0, 1, 2, 3, position=4 * k)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.ema.update()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.3 * np.mean(losses[:5])
    # From noise the average finds the clips again, with the sound that belongs to the picture.
    clips, known = model.sample(8, sampler=DDIM(steps=10)), model.encode(batch(0, 1, 2, 3))
    nearest = []
    for name in SHAPES:
        gaps = torch.cdist(clips[name].flatten(1), known[name].flatten(1))
        assert float(gaps.min(1).values.median() / known[name].flatten(1).norm(dim=1).mean()) < 0.5
        nearest.append(gaps.argmin(1))
    assert torch.equal(*nearest)


def test_validation_is_at_fixed_times_and_noises_with_the_average():
    model = system(val_times=3)
    logged = {}
    model.log = lambda name, value, **_: logged.update({name: value})
    model.log_dict = lambda values, **_: logged.update(values)
    model.validation_step(batch(0, 1), 0)
    first = dict(logged)
    times = {f"val/loss_{m}_t{k}" for m in SHAPES for k in range(3)}
    assert first.keys() == times | {"val/loss", "val/loss_video", "val/loss_audio"}
    for m in SHAPES:
        mean = sum(float(first[f"val/loss_{m}_t{k}"]) for k in range(3)) / 3
        assert float(first[f"val/loss_{m}"]) == pytest.approx(mean)
    with torch.no_grad():  # the trained weights do not count, nor does the batch's order
        for p in model.model.parameters():
            p.add_(1.0)
    model.validation_step(batch(1, 0), 0)
    assert {k: float(v) for k, v in logged.items()} == pytest.approx(
        {k: float(v) for k, v in first.items()}, rel=1e-5
    )


# -------------------------------------------------------------------------------- average


@pytest.mark.parametrize("min_value", [0.0, 0.7], ids=["warmup", "none"])
def test_the_average_follows_its_formula(min_value):
    """As configured: min(beta, (1 + n) / (10 + n)) from the second step on, or beta at once."""
    ema = partial(EMA, beta=0.7, min_value=min_value)
    model, record = system(ema=ema), []
    update = model.ema.update

    def updated():
        record.append([p.detach().clone() for p in model.model.parameters()])
        update()

    model.ema.update = updated
    fit(model, 30, data(batch_size=4, val=0))
    assert len(record) == 30
    average = record[0]
    for n, weights in enumerate(record[1:]):
        decay = max(min_value, min(0.7, (1 + n) / (10 + n)))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    for ours, expected in zip(model.ema.ema_model.parameters(), average, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    trained, averaged = (
        torch.cat([p.detach().flatten() for p in m.parameters()])
        for m in (model.model, model.ema.ema_model)
    )
    assert float((trained - averaged).abs().max()) > 1e-3
    assert not any(p.requires_grad for p in model.ema.parameters())


def test_accumulation_steps_and_averages_once_a_step():
    model = system()
    run = fit(model, 3, data(batch_size=4, micro_batch=2, val=0), accumulate_grad_batches=2)
    assert run.global_step == 3
    assert int(model.ema.step) == 3
    whole = system()
    fit(whole, 3, data(batch_size=4, val=0))
    for a, b in zip(model.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


def test_bf16_with_a_fused_optimiser_and_clipping_trains_alike():
    """Weights, moments and average stay float32; what is learnt differs by bfloat16's rounding."""
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        model = system(optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True))
        options = {"precision": precision, "gradient_clip_val": 0.1}
        run = fit(model, 20, data(batch_size=4, val=0), **options)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        moments = [s["exp_avg"] for s in run.optimizers[0].state.values()]
        assert {m.dtype for m in moments} == {torch.float32}
        losses = model.model.loss(
            model.encode(batch(0, 1)),
            {},
            t=torch.tensor([0.2, 0.7], dtype=torch.float64),
            noise=Noise(0, [0, 1]).like(model.latent(2)),
        )
        found[precision] = torch.stack(list(losses.values())).detach()
    exact, rounded = found.values()
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)


def test_sampling_uses_the_average_without_dropout():
    model = system(net=Net(dropout=0.5))
    model.train()
    before = model.sample(2)
    with torch.no_grad():
        for p in model.model.parameters():
            p.add_(1.0)
    again = model.train().sample(2)
    assert all(torch.equal(before[k], again[k]) for k in before)
    with torch.no_grad():
        for p in model.ema.ema_model.parameters():
            p.add_(0.1)
    other = model.sample(2)
    assert not any(torch.equal(before[k], other[k]) for k in before)


# ------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("sampler", [DDIM(steps=4), DDPM(steps=4), DDIM(steps=4, eta=0.5)])
def test_a_sample_is_the_same_whichever_others_are_asked_for(sampler):
    model = system()
    options = {"sampler": sampler, "micro_batch": 4, "seed": 3}
    whole = model.sample(7, **options)
    assert {k: list(v.shape[1:]) for k, v in whole.items()} == SHAPES
    assert len(whole["video"]) == 7
    for index in ([5], [6, 0], [3, 5, 1, 2, 4, 0], [2, 2]):
        part = model.sample(index=index, **options)
        for k in whole:
            assert torch.equal(part[k], whole[k][index])
    for micro_batch in (1, 3):
        near = model.sample(7, **{**options, "micro_batch": micro_batch})
        for k in whole:
            torch.testing.assert_close(near[k], whole[k], rtol=1e-4, atol=1e-4)


def test_samples_differ_among_themselves_and_between_seeds():
    model = system()
    a, b = model.sample(4, seed=0), model.sample(4, seed=1)
    for k in a:
        assert not torch.equal(a[k], b[k])
        assert len(a[k].flatten(1).unique(dim=0)) == 4
    torch.manual_seed(5)
    assert torch.equal(model.sample(4, seed=0)["audio"], a["audio"])


def test_sampling_yields_groups_and_reports_every_state():
    model, calls = system(), []
    groups = list(model.samples([9, 4, 7], micro_batch=2, progress=lambda: calls.append(1), seed=1))
    assert [part.index for part in groups] == [[9, 4], [7]]
    assert [len(part.clips["audio"]) for part in groups] == [2, 1]
    assert [part.evaluations for part in groups] == [5, 5]
    first = groups[0].clips
    assert all(v.device.type == "cpu" and v.dtype == torch.float32 for v in first.values())
    assert len(calls) == 2 * 5
    assert not first["video"].requires_grad
    assert list(model.samples([])) == []


def test_guides_are_applied_in_order():
    def shift(by):
        def guide(denoise, task):
            return lambda x, t: denoise(x, t)._replace(x0=x.map(torch.zeros_like) + by)

        return guide

    model = system(guides={"first": shift(1.0), "second": shift(2.0)})
    assert float(model.sample(1)["video"].mean()) == 2.0
    assert float(model.sample(1, guides=[shift(3.0)])["video"].mean()) == 3.0
    assert float(model.sample(1, guides=[])["video"].std()) > 0


def test_a_codec_lies_between_clips_and_what_is_diffused():
    class Folded(Net):
        def forward(self, video, audio, *, time, shifts=None):
            assert video.shape[1:] == (12, 4, 2, 2)
            assert audio.shape[1:] == (8, 4)
            return video * 0, audio * 0

        def __deepcopy__(self, memo):
            return Folded()

    codec = Patches(patch={"video": [1, 2, 2], "audio": [8]}, scale={"audio": 2.0})
    model = system(net=Folded(), codec=codec)
    assert {k: list(v.shape[1:]) for k, v in model.sample(3).items()} == SHAPES
    assert loss_of(model, 0, 1)[0].isfinite()


def test_nothing_to_sample_is_named():
    with pytest.raises(ValueError, match="num=0"):
        system().sample(0)
    with pytest.raises(ValueError, match="micro_batch=0"):
        system().sample(1, micro_batch=0)


# --------------------------------------------------------------------------------- shifts


def shifts_of(model, moments):
    return [model.shifts(*m).get("shifts") for m in moments]


def test_window_shifts():
    moments = [("train", 0), ("train", 1), ("sample", 0, 0.5)]
    assert system(shift="none").shifts("train", 0) == {}
    fixed = shifts_of(system(shift="fixed"), moments)
    assert all(torch.equal(fixed[0], other) for other in fixed)
    model, again = system(shift="seeded"), system(shift="seeded")
    drawn = [model.shifts("train", k)["shifts"].tolist() for k in range(100)]
    limits = Net().shift_ranges(4)
    for place, limit in enumerate(limits):
        assert {d[place] for d in drawn} == set(range(limit + 1))
    assert [again.shifts("train", k)["shifts"].tolist() for k in range(100)] == drawn
    other = system(shift="seeded", seed=1)
    assert [other.shifts("train", k)["shifts"].tolist() for k in range(100)] != drawn
    with pytest.raises(ValueError, match="shift='random' is not one of none, fixed, seeded"):
        system(shift="random")


def test_shifts_while_sampling_depend_on_seed_and_time_alone():
    def told(index, **options):
        model = system(shift="seeded")
        model.sample(index=index, micro_batch=2, **options)
        seen = model.ema.ema_model.net.seen
        return [(time[0], shifts) for time, shifts in seen]

    one = told([0])
    assert told([5, 2]) == one
    assert told([0, 1, 2]) == one * 2
    assert told([0], seed=4) != one
    assert len({tuple(shifts) for _, shifts in one}) > 1


def test_networks_without_shifts_are_told_none():
    class Plain(Net):
        shift_ranges = None

        def forward(self, video, audio, *, time):
            return super().forward(video, audio, time=time)

        def __deepcopy__(self, memo):
            return Plain()

    model = system(net=Plain(), shift="seeded")
    model.sample(1)
    loss_of(model, 0, 1)


# ----------------------------------------------------------------------------------- data


def test_integers_are_pixels_and_pcm_samples():
    model = system()
    pixels = torch.tensor([0, 255, 128], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 4, 4, 4)
    sound = torch.tensor([-32768, 16384] * 16, dtype=torch.int16).view(1, 32)
    x = model.encode({"video": pixels[None], "audio": sound[None]})
    assert type(x) is Media
    assert x["video"][0, :, 0, 0, 0].tolist() == pytest.approx([-1, 1, 1 / 255], abs=1e-6)
    assert x["audio"][0, 0, :2].tolist() == [-1.0, 0.5]
    same = model.encode({"video": x["video"].double(), "audio": x["audio"], "index": None})
    assert all(torch.equal(same[k], x[k]) and same[k].dtype == torch.float32 for k in x)


def test_wrong_data_is_named():
    model = system()
    with pytest.raises(
        ValueError, match=r"the data has no \['audio'\].*\['index', 'position', 'vid"
    ):
        model.encode({k: v for k, v in batch(0).items() if k != "audio"})
    wrong = {**batch(0), "video": torch.zeros(1, 3, 8, 4, 4)}
    with pytest.raises(ValueError, match=r"video comes as \[3, 8, 4, 4\].*expects \[3, 4, 4, 4\]"):
        model.encode(wrong)


def test_weights_of_unknown_modalities_are_named():
    with pytest.raises(ValueError, match=r"weights for \['depth'\]"):
        system(weights={"depth": 1.0})


def test_a_checkpoint_says_its_format():
    checkpoint = {}
    system().on_save_checkpoint(checkpoint)
    assert checkpoint["avdiffusion"]["format"] >= 1
    assert math.isfinite(checkpoint["avdiffusion"]["format"])
