"""Shape and course, against the truth that moving shapes come with, and what is not so."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.data.shapes import MovingShapes
from avdiffusion.metrics.mean import Mean
from avdiffusion.metrics.metric import Sets
from avdiffusion.metrics.motion import Motion, course_error, overlaps

RATES = {"video": 10.0}
CLIP = {"frames": 8, "size": (32, 32), "background": "plain"}


def clips(num=32, **options):
    data = MovingShapes(**{**CLIP, **options})
    return np.stack([data[i]["video"].numpy() for i in range(num)])


def found(video):
    return Motion()({"video": video}, RATES)


def rng(seed=0):
    return np.random.default_rng(seed)


# the course


def bounced(start, step, low, high, frames):
    """Frame by frame, so that it owes nothing to any formula."""
    places = [start]
    for _ in range(frames - 1):
        start += step
        if start > high or start < low:
            start, step = 2 * (high if start > high else low) - start, -step
        places.append(start)
    return np.array(places)


@settings(max_examples=50, deadline=None)
@given(
    start=st.floats(4, 28),
    step=st.floats(0.5, 3),
    sign=st.sampled_from((-1, 1)),
    frames=st.integers(5, 24),
)
def test_a_bouncing_course_has_no_error(start, step, sign, frames):
    x = bounced(start, sign * step, 4, 28, frames)
    assert course_error(np.stack([x, np.full(frames, 7.0)], 1)) < 0.05


def test_error_of_a_course_is_the_share_of_what_is_not_uniform():
    time, shake = np.arange(8.0), np.array([1, -1, -1, 1, 1, -1, -1, 1.0])
    shake -= np.polyval(np.polyfit(time, shake, 1), time)
    place = np.stack([2 * time + 0.5 * shake, np.zeros(8)], 1)
    straight = np.sqrt((0.25 * shake**2).sum() / ((place[:, 0] - place[:, 0].mean()) ** 2).sum())
    assert 0.3 * straight < course_error(place) <= straight + 1e-9  # a turn may take some of it
    accelerated = np.stack([np.zeros(8), time**2], 1)
    assert course_error(accelerated) > 0.15
    assert course_error(rng().uniform(0, 32, (8, 2))) > 0.4


def test_a_course_may_be_hidden_for_frames_but_has_to_be_one():
    place = np.stack([np.arange(8.0), np.arange(8.0)], 1)
    place[3] = np.nan
    assert course_error(place) < 1e-6
    place[:4] = np.nan
    assert np.isnan(course_error(place))
    assert np.isnan(course_error(np.full((8, 2), 3.0)))
    long = np.concatenate([place[4:], rng().uniform(0, 32, (20, 2))])
    assert course_error(long) > 0.4


# the shape


def soft(centres, radius=4.0, size=24):
    y, x = np.mgrid[:size, :size] + 0.5
    off = [np.hypot(x - cx, y - cy) for cx, cy in centres]
    return np.clip(np.broadcast_to(radius, len(centres))[:, None, None] - off + 0.5, 0, 1)


def test_a_disc_that_moves_by_parts_of_pixels_overlaps_with_itself():
    centres = rng().uniform(8, 16, (10, 2))
    overlap, change = overlaps(soft(centres), centres)
    assert overlap > 0.93
    assert change < 0.01


def test_overlap_of_a_disc_that_grows_is_that_of_areas():
    """Of two areas with half of each frame's: the mean is in between."""
    centres = np.full((8, 2), 12.0)
    radius = np.where(np.arange(8) % 2, 4.0, 6.0)
    overlap, change = overlaps(soft(centres, radius), centres)
    small, large = np.pi * 16, np.pi * 36
    mean = (small + large) / 2
    assert overlap == pytest.approx((small / mean + mean / large) / 2, abs=0.03)
    assert change == pytest.approx((large - mean) / mean, abs=0.02)


def test_a_disc_that_is_there_for_few_frames_changes_by_as_much_as_can_be():
    centres = np.full((8, 2), 12.0)
    _, change = overlaps(soft(centres, np.where(np.arange(8) < 2, 4.0, -1.0)), centres)
    assert change == pytest.approx(1)


# clips


def test_real_shapes_keep_shape_speed_and_number():
    data = MovingShapes(**CLIP, shapes=(1, 1))
    made = found(clips(shapes=(1, 1)))
    assert (made["shapes"] == 1).all()
    assert made["shape_overlap"].min() > 0.75
    assert made["area_change"].max() < 0.06
    assert made["course_error"].max() < 0.15
    step = [np.linalg.norm(np.diff(data.scene(i).position[0], axis=0), axis=1) for i in range(32)]
    assert made["speed"] == pytest.approx(np.mean(step, 1), abs=0.25)


def test_several_shapes_are_counted_where_they_are_seen():
    data = MovingShapes(**CLIP, shapes=(2, 3))
    truth = [len(data.scene(i).kind) for i in range(32)]
    assert np.mean(found(clips(shapes=(2, 3)))["shapes"] == truth) > 0.9


def test_what_is_wrong_shows_in_the_number_that_is_for_it():
    video = clips(shapes=(1, 1))
    real = {name: np.nanmean(values) for name, values in found(video).items()}

    order = np.array([rng(k).permutation(8) for k in range(32)])
    shuffled = np.stack([clip[:, o] for clip, o in zip(video, order, strict=True)])
    made = {name: np.nanmean(values) for name, values in found(shuffled).items()}
    assert made["course_error"] > 0.5 > 10 * real["course_error"]
    assert made["shape_overlap"] == pytest.approx(real["shape_overlap"])

    kinds = [clips(shapes=(1, 1), kinds=[kind]) for kind in ("square", "triangle")]
    morphing = np.where((np.arange(8) % 2)[:, None, None], *kinds)  # the same places, nearly
    made = {name: np.nanmean(values) for name, values in found(morphing).items()}
    assert made["shape_overlap"] < real["shape_overlap"] - 0.1

    still = {
        n: np.nanmean(v) for n, v in found(video[:, :, :1].repeat(8, 2)).items() if n == "speed"
    }
    assert still["speed"] == 0


def test_noise_has_no_shapes():
    noise = rng().integers(0, 256, (8, 3, 8, 32, 32), dtype=np.uint8)
    made = found(noise)
    assert not made["shapes"].any()
    assert not made["shape_overlap"].any()
    assert (made["course_error"] == 1).all()
    assert np.isnan(made["speed"]).all()
    assert not found(np.full((2, 3, 8, 32, 32), 80, dtype=np.uint8))["shapes"].any()


def test_clips_do_not_depend_on_one_another():
    video = clips(6)
    together, alone = found(video), [found(video[k : k + 1]) for k in range(6)]
    for name in Motion.fields:
        np.testing.assert_array_equal(together[name], [each[name][0] for each in alone])


def test_a_report_shows_them_beside_real_ones():
    metric = Mean(Motion())
    sets = Sets(samples=found(clips(16)), reference=found(clips(16, seed=1)), resamples=0)
    figures = {figure.key: figure for figure in metric.figures(sets)}
    assert figures.keys() == set(Motion.fields)
    assert figures["course_error"].better == "lower"
    assert figures["shape_overlap"].ceiling > 0.8
    assert metric(*({"video": clips(4)}, RATES))["course_error"] < 0.1
