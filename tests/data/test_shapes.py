"""Moving shapes: the truth they come with is that of their pixels; and plain noise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.data.shapes import KINDS, SHAPES, GaussianNoise, MovingShapes
from avdiffusion.data.toy import PALETTE

ONE = {"shapes": (1, 1), "background": "plain", "frames": 24, "size": (48, 64)}


def alike(a, b):
    return all(np.array_equal(a[k], b[k], equal_nan=k not in ("kind", "index")) for k in a)


def test_a_clip_is_a_function_of_seed_and_number():
    data = MovingShapes(num=8)
    assert alike(data[3], MovingShapes(num=100)[3])
    assert not alike(data[3], data[4])
    assert not alike(data[3], MovingShapes(seed=1)[3])
    with pytest.raises(IndexError, match="index 8 is outside 0 to 7"):
        data[8]


@settings(max_examples=20, deadline=None)
@given(
    frames=st.integers(1, 9),
    height=st.integers(16, 40),
    width=st.integers(16, 40),
    most=st.integers(1, 4),
    index=st.integers(0, 500),
)
def test_shapes_of_an_item(frames, height, width, most, index):
    data = MovingShapes(frames=frames, size=(height, width), shapes=(1, most))
    item = data[index]
    there = item["kind"] >= 0
    assert item["video"].shape == (3, frames, height, width)
    assert item["video"].dtype == torch.uint8
    assert item["position"].shape == item["velocity"].shape == (most, frames, 2)
    assert 1 <= there.sum() <= most
    for name in ("position", "velocity"):
        assert item[name][there].isfinite().all()
        assert item[name][~there].isnan().all()
    assert set(item["kind"][there].tolist()) <= set(range(len(KINDS)))


def test_batches_are_formed_of_clips_with_different_numbers_of_shapes():
    data = MovingShapes(size=(16, 16), frames=2)
    batch = torch.utils.data.default_collate([data[i] for i in range(8)])
    assert len(set((batch["kind"] >= 0).sum(1).tolist())) > 1


def cover(video, colour):
    """The share of each pixel [T, H, W] that a shape covers, from the mixture of two colours."""
    ground, ink = np.full(3, 25.0), PALETTE[colour].astype(np.float64)
    mixed = np.moveaxis(video.astype(np.float64), 0, -1) - ground
    return mixed @ (ink - ground) / ((ink - ground) ** 2).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_show_the_true_place_area_and_kind(kind):
    data = MovingShapes(**ONE, kinds=[kind], radius=(0.2, 0.2))
    for index in range(4):
        item, scene = data[index], data.scene(index)
        share = cover(item["video"].numpy(), scene.colour[0])
        area = share.sum((1, 2))
        assert area == pytest.approx(np.pi * scene.radius[0] ** 2, rel=0.04)
        y, x = np.mgrid[:48, :64] + 0.5
        centre = np.stack([(share * x).sum((1, 2)), (share * y).sum((1, 2))], -1) / area[:, None]
        assert np.abs(centre - item["position"][0].numpy()).max() < 0.15
        # the share of the box around it that a shape fills
        box = [np.ptp(np.flatnonzero(s.max(k) > 0.5)) + 1 for s in share for k in (0, 1)]
        filled = np.mean(area / np.prod(np.reshape(box, (-1, 2)), 1))
        assert filled == pytest.approx(
            {"disc": np.pi / 4, "square": 1, "triangle": 0.5}[kind], abs=0.06
        )


def test_shapes_run_straight_between_walls_which_they_touch():
    data = MovingShapes(**ONE, speed=(1.5, 1.5))
    for index in range(20):
        scene, item = data.scene(index), data[index]
        place, pace = scene.position[0], scene.velocity[0]
        assert np.linalg.norm(pace, axis=1) == pytest.approx(1.5 * 48 / 10)
        step, turns = np.diff(place, axis=0), np.diff(np.sign(pace), axis=0) != 0
        np.testing.assert_allclose(step[~turns], pace[1:][~turns], atol=1e-9)
        assert (np.abs(step) <= np.abs(pace[1:]) + 1e-9).all()
        left, right, top, bottom = scene.radius[0] * np.array(SHAPES[KINDS[scene.kind[0]]][2])
        low, high = np.array([left, top]), np.array([64 - right, 48 - bottom])
        assert (low - 1e-9 <= place).all()
        assert (place <= high + 1e-9).all()
        # it turned at a wall: what is missing of a step is the way there and back
        for k, axis in np.argwhere(turns):
            wall = high[axis] if pace[k, axis] > 0 else low[axis]
            back = abs(wall - place[k, axis]) + abs(wall - place[k + 1, axis])
            assert back == pytest.approx(abs(pace[k, axis]))
        assert item["velocity"][0].numpy() == pytest.approx(pace)


def test_frames_per_second_change_when_is_looked_not_what_happens():
    slow = MovingShapes(**{**ONE, "frames": 12, "fps": 10})
    fast = MovingShapes(**{**ONE, "frames": 23, "fps": 20})
    for index in range(5):
        assert torch.equal(slow[index]["video"], fast[index]["video"][:, ::2])


def test_settings_that_make_no_clip_are_refused():
    for settings_, message in (
        ({"kinds": ["star"]}, "choose of disc, square, triangle"),
        ({"kinds": []}, "choose of"),
        ({"background": "photo"}, "plain or gradient"),
        ({"shapes": (1, 7)}, r"at most colours \(6, of 6\)"),
        ({"shapes": (2, 1)}, r"\[least, most\]"),
        ({"radius": (0.1, 0.4)}, "between 0 and 0.3"),
        ({"speed": (0, 1)}, "both positive"),
    ):
        with pytest.raises(ValueError, match=message):
            MovingShapes(**settings_)


def test_noise_is_normal_independent_and_its_own():
    data = GaussianNoise(frames=8, size=(32, 32))
    item = data[5]["video"]
    assert item.shape == (3, 8, 32, 32)
    assert item.dtype == torch.float32
    edges = torch.linspace(-3, 3, 13)
    below = (item.flatten() <= edges[:, None]).float().mean(1)
    assert (below - torch.special.ndtr(edges)).abs().max() < 0.01
    assert torch.equal(item, GaussianNoise(num=6, frames=8, size=(32, 32))[5]["video"])
    others = torch.stack([data[k]["video"].flatten() for k in range(4)])
    assert (torch.corrcoef(others) - torch.eye(4)).abs().max() < 0.03
