"""The order of training data: the same whatever the devices, the workers or a restart."""

import math
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_system import CLIP, SHAPES, Clips, data, fit, system

from avdiffusion.data.module import DataModule, Draws, EndlessBatches, check_duration


def requests(size, steps, *, batch_size, start=0, **options):
    """What one device asks for in each of the optimiser steps from `start` on."""
    batches = EndlessBatches(size, start=start * batch_size, **options)
    world = options.get("world", 1)
    shares = batch_size // (options["micro_batch"] * world)
    asked = iter(batches)
    return [[next(asked) for _ in range(shares)] for _ in range(steps)]


def global_batches(size, steps, *, batch_size, micro_batch, world, **options):
    """Every optimiser step's requests, put together from all devices in order of position."""
    devices = [
        requests(
            size,
            steps,
            batch_size=batch_size,
            micro_batch=micro_batch,
            rank=rank,
            world=world,
            **options,
        )
        for rank in range(world)
    ]
    return [
        sorted(
            (r for device in devices for share in device[step] for r in share), key=lambda r: r[1]
        )
        for step in range(steps)
    ]


@settings(deadline=None, max_examples=80)
@given(
    size=st.integers(1, 40),
    micro_batch=st.integers(1, 4),
    world=st.integers(1, 4),
    shares=st.integers(1, 3),
    start=st.integers(0, 30),
    seed=st.integers(0, 5),
)
def test_global_batches_are_the_same_on_any_machine(size, micro_batch, world, shares, start, seed):
    batch_size = micro_batch * world * shares
    plain = global_batches(
        size, start + 3, batch_size=batch_size, micro_batch=batch_size, world=1, seed=seed
    )
    spread = global_batches(
        size,
        3,
        batch_size=batch_size,
        micro_batch=micro_batch,
        world=world,
        seed=seed,
        start=start,
    )
    assert spread == plain[start:]
    positions = [position for step in plain for _, position, _ in step]
    assert positions == list(range(len(positions)))


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 30), batch_size=st.integers(1, 12), seed=st.integers(0, 3))
def test_every_epoch_is_a_permutation(size, batch_size, seed):
    steps = math.ceil(4 * size / batch_size)
    asked = global_batches(
        size, steps, batch_size=batch_size, micro_batch=batch_size, world=1, seed=seed
    )
    indices = [index for step in asked for index, _, _ in step]
    epochs = [indices[e * size : (e + 1) * size] for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    if size > 8:
        assert len({tuple(epoch) for epoch in epochs}) > 1
        other = global_batches(
            size, steps, batch_size=batch_size, micro_batch=batch_size, world=1, seed=seed + 1
        )
        assert other != asked


def test_a_batch_larger_than_the_data_repeats_it():
    ((asked,),) = requests(3, 1, batch_size=8, micro_batch=8)
    assert sorted(index for index, _, _ in asked[:3]) == [0, 1, 2]
    assert sorted(index for index, _, _ in asked[3:6]) == [0, 1, 2]


def test_indices_are_plain_numbers_and_there_is_no_length():
    batches = EndlessBatches(5, micro_batch=2)
    assert all(type(part) is int for request in next(iter(batches)) for part in request)
    assert not hasattr(batches, "__len__")
    assert len(list(islice(batches, 100))) == 100
    first, again = next(iter(batches)), next(iter(batches))
    assert first == again


def test_chance_is_keyed_by_position():
    draws = Draws(Clips(chance=True))
    one, same = draws[3, 17, 0], draws[3, 17, 0]
    assert one["index"] == 3
    assert one["position"] == 17
    assert torch.equal(one["chance"], same["chance"])
    assert torch.equal(one["video"], Clips()[3]["video"])
    others = [draws[3, 18, 0], draws[3, 17, 1]]
    assert len({float(item["chance"]) for item in [one, *others]}) == 3
    assert torch.equal(draws[4, 17, 0]["chance"], one["chance"])
    assert "chance" not in Draws(Clips())[3, 17, 0]


def test_the_order_and_the_draws_do_not_share_random_numbers():
    """Epoch 3's order and position 3's window would otherwise come from one stream."""
    order = EndlessBatches(50, micro_batch=1).order(3)
    assert not np.array_equal(order, np.random.default_rng((0, 3)).permutation(50))


def loader(module, step=0, rank=0, world=1):
    module.trainer = SimpleNamespace(global_step=step, global_rank=rank, world_size=world)
    return module.train_dataloader()


def take(module, count, **where):
    return list(islice(loader(module, **where), count))


def assert_same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        assert one["position"] == other["position"]
        for name in one.keys() - {"position"}:
            assert torch.equal(one[name], other[name])


def test_workers_change_nothing():
    alone = take(data(10, chance=True, batch_size=4), 6)
    helped = take(data(10, chance=True, batch_size=4, num_workers=2), 6)
    assert_same(helped, alone)
    assert alone[0]["video"].shape == (4, *SHAPES["video"])
    assert alone[0]["position"] == [0, 1, 2, 3]


def test_a_resumed_start_goes_on_where_it_was():
    whole = take(data(10, chance=True, batch_size=4, seed=2), 9)
    assert_same(take(data(10, chance=True, batch_size=4, seed=2), 4, step=5), whole[5:])
    halves = [
        take(data(10, chance=True, batch_size=4, seed=2), 4, step=5, rank=r, world=2)
        for r in (0, 1)
    ]
    for both, one in zip(zip(*halves, strict=True), whole[5:], strict=True):
        for name in ("video", "chance", "index"):
            assert torch.equal(torch.cat([b[name] for b in both]), one[name])


def test_resumed_training_is_training_that_went_on(tmp_path):
    """Positions, weights and average after 3 + 3 steps equal those after 6."""

    def run(model, steps, ckpt=None, **options):
        seen, encode = [], model.encode
        model.encode = lambda batch: seen.append(batch["position"]) or encode(batch)
        module = data(7, chance=True, batch_size=4, micro_batch=2, val=0, **options)
        trainer = fit(model, steps, module, ckpt, accumulate_grad_batches=2)
        return trainer, seen

    whole = system()
    _, expected = run(whole, 6)
    first = system()
    trainer, before = run(first, 3)
    trainer.save_checkpoint(tmp_path / "step.ckpt")
    for workers in (0, 2):
        second = system()
        _, after = run(second, 6, str(tmp_path / "step.ckpt"), num_workers=workers)
        assert before + after == expected
        state = second.state_dict()
        assert all(torch.equal(state[k], v) for k, v in whole.state_dict().items())


def test_split():
    assert data(batch_size=16).split(1) == (16, 1)
    module = data(batch_size=16)
    assert module.split(4) == (4, 1)
    assert module.split(2) == (8, 1)
    assert data(batch_size=16, micro_batch=2).split(1) == (2, 8)
    assert data(batch_size=16, micro_batch=2).split(4) == (2, 2)
    with pytest.raises(ValueError, match=r"batch_size=16 is global and 3 devices do not divide it"):
        data(batch_size=16).split(3)
    with pytest.raises(ValueError, match=r"micro_batch=3 does not divide .* 8 .*over 2 devices"):
        data(batch_size=16, micro_batch=3).split(2)
    for wrong in ({"batch_size": 0}, {"micro_batch": 0}, {"micro_batch": -2}):
        with pytest.raises(ValueError, match="below 1"):
            data(**{"batch_size": 16, **wrong})


def test_validation_is_in_order_and_split_over_devices():
    module = data(val=7, batch_size=6)
    seen = []
    for rank in (0, 1):
        module.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        for batch in module.val_dataloader():
            seen += batch["index"].tolist()
            assert batch["position"] == batch["index"].tolist()
            for row, index in enumerate(batch["index"].tolist()):
                assert torch.equal(batch["audio"][row], Clips()[index]["audio"])
    assert seen == [0, 2, 4, 6, 1, 3, 5]
    module = data(val=0)
    module.trainer = SimpleNamespace(global_rank=0, world_size=1)
    assert module.val_dataloader() == []


def test_wrong_data_is_named():
    with pytest.raises(ValueError, match="training data is empty"):
        data(0)
    with pytest.raises(ValueError, match=r"empty \(clips/here\)"):
        DataModule(train=Clips(0), root="clips/here", **CLIP)
    with pytest.raises(ValueError, match=r"picture and sound differ in length"):
        data(samples=31)


def test_durations():
    check_duration(fps=10, frames=16, sample_rate=16000, samples=25600)
    check_duration(fps=29.97, frames=10, sample_rate=16000, samples=5339)
    check_duration(fps=30000 / 1001, frames=16, sample_rate=44100, samples=23544)
    with pytest.raises(
        ValueError,
        match=r"16 frames at 10 fps last 1\.6 s, 25000 samples at 16000 Hz last 1\.562 s; set "
        r"data\.samples=25600",
    ):
        check_duration(fps=10, frames=16, sample_rate=16000, samples=25000)
    for off in (-1, 1):
        with pytest.raises(ValueError, match=r"set data\.samples=5339"):
            check_duration(fps=29.97, frames=10, sample_rate=16000, samples=5339 + off)
    with pytest.raises(ValueError, match="fps=0"):
        check_duration(fps=0, frames=10, sample_rate=16000, samples=5339)


def test_what_is_absent_has_no_duration():
    silent = {"sample_rate": None, "samples": None}
    blind = {"fps": None, "frames": None}
    check_duration(fps=10, frames=1, **silent)
    check_duration(sample_rate=16000, samples=5339, **blind)
    for missing in ({**silent, "fps": 0, "frames": 1}, {**blind, "sample_rate": -1, "samples": 1}):
        with pytest.raises(ValueError, match="have to be above 0"):
            check_duration(**missing)
    module = DataModule(train=Clips(), **CLIP | silent)
    assert (module.samples, module.fps) == (None, CLIP["fps"])
    DataModule(train=Clips(), **CLIP | blind | {"size": None})


def test_the_first_items_only_and_without_chance():
    batches = take(data(10, chance=True, batch_size=4, limit=4, random=False), 3)
    for batch in batches:
        assert sorted(batch["index"].tolist()) == [0, 1, 2, 3]
        assert "chance" not in batch
    whole = take(data(4, batch_size=4), 3)
    assert [b["index"].tolist() for b in batches] == [b["index"].tolist() for b in whole]
    assert "chance" in take(data(10, chance=True, batch_size=4, limit=4), 1)[0]
    assert data(10, limit=50).count == 10
    with pytest.raises(ValueError, match=r"data\.limit=0 is below 1"):
        data(10, limit=0)
