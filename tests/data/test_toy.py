"""The toy clips against what they claim: motion, sound and event times, each by another way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.data.toy import KINDS, MAX_EVENTS, PALETTE, Toy

SMALL = {"size": [16, 16], "sample_rate": 4000, "samples": 6400}


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_has_the_promised_form(kind):
    toy = Toy(num=3, kind=kind, size=[24, 40], sample_rate=8000, samples=12800, channels=2)
    item = toy[2]
    assert item["video"].dtype == torch.uint8
    assert item["video"].shape == (3, 16, 24, 40)
    assert item["audio"].dtype == torch.float32
    assert item["audio"].shape == (2, 12800)
    assert item["events"].dtype == torch.float32
    assert item["events"].shape == (MAX_EVENTS,)
    assert item["index"] == 2
    assert len(toy) == 3
    assert 0.3 < item["audio"].abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_is_a_function_of_seed_and_index(kind):
    first, again = Toy(kind=kind, noise=0.01, **SMALL), Toy(kind=kind, noise=0.01, num=9, **SMALL)
    for index in (7, 0, 3):
        one, two = first[index], again[index]
        assert all(
            torch.equal(one[k].nan_to_num(), two[k].nan_to_num()) for k in one if k != "index"
        )
    other = Toy(kind=kind, noise=0.01, seed=1, **SMALL)
    assert not torch.equal(first[0]["video"], first[1]["video"])
    assert not torch.equal(first[0]["video"], other[0]["video"])
    assert not torch.equal(first[0]["audio"], other[0]["audio"])


def test_events_of_the_item_are_those_of_the_method():
    toy = Toy(rate=2.0, **SMALL)
    for index in range(20):
        events, padded = toy.events(index), toy[index]["events"].numpy()
        assert events.dtype == np.float64
        assert np.array_equal(padded[: len(events)], events.astype(np.float32))
        assert np.isnan(padded[len(events) :]).all()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    fps=st.sampled_from([4, 8, 10, 12.5, 25, 29.97]),
    frames=st.integers(2, 40),
    sample_rate=st.sampled_from([2000, 4000, 11025, 16000]),
    discs=st.integers(1, 3),
    pitch=st.sampled_from(["disc", "wall"]),
    rate=st.sampled_from([None, 0.5, 4.0]),
    index=st.integers(0, 99),
)
def test_any_size_rate_and_length(
    kind, height, width, fps, frames, sample_rate, discs, pitch, rate, index
):
    samples = round(sample_rate * frames / fps)
    toy = Toy(
        num=100, kind=kind, size=[height, width], fps=fps, frames=frames, sample_rate=sample_rate,
        samples=samples, discs=discs, pitch=pitch, rate=rate,
    )  # fmt: skip
    item, events = toy[index], toy.events(index)
    assert item["video"].shape == (3, frames, height, width)
    assert item["audio"].shape == (1, samples)
    assert item["audio"].isfinite().all()
    assert item["audio"].abs().max() <= 1
    assert (np.diff(events) >= 0).all()
    assert ((events >= 0) & (events < frames / fps)).all()
    assert (len(events) > 0) == (kind in ("bounce", "flash"))


def simulated(place, velocity, radius, sides, duration, steps=20000):
    """Impact times and the path of a disc moved in small steps and turned back at the walls."""
    place, velocity, hits, path = place.copy(), velocity.copy(), [], [place.copy()]
    for step in range(steps):
        place += velocity * duration / steps
        for axis, side in enumerate(sides):
            outside = place[axis] < radius or place[axis] > side - radius
            if outside and velocity[axis] * (place[axis] - side / 2) > 0:
                velocity[axis] *= -1
                hits.append((step + 0.5) * duration / steps)
        path.append(place.copy())
    return hits, np.array(path)


@pytest.mark.parametrize(("discs", "size"), [(1, [16, 16]), (2, [32, 20])])
def test_events_are_the_reflections_of_a_simulation(discs, size):
    toy = Toy(size=size, sample_rate=4000, samples=6400, discs=discs, rate=1.5)
    for index in range(6):
        scene = toy._scene(toy._rng(index))
        if toy.events(index)[0] < 1 / toy.fps:
            continue  # the velocity below is read off the first two frames
        hits = []
        for centre, radius in zip(scene.centre, scene.radius, strict=True):
            velocity = (centre[1] - centre[0]) * toy.fps
            times, path = simulated(centre[0], velocity, radius, size[::-1], toy.duration)
            hits += times
            at = np.linspace(0, len(path) - 1, toy.frames + 1).round().astype(int)[:-1]
            np.testing.assert_allclose(path[at], centre, atol=0.01)
        np.testing.assert_allclose(np.sort(hits), toy.events(index), atol=2e-4)


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_discs_are_drawn_where_they_are(side):
    toy = Toy(size=[side, side], sample_rate=4000, samples=6400, background="plain")
    for index in range(5):
        video = toy[index]["video"].numpy().astype(float)
        chroma = video.max(0) - video.min(0)  # [T, H, W]; the plain background is grey
        grid = np.arange(side) + 0.5
        total = chroma.sum((1, 2))
        centre = np.stack([chroma.sum(1) @ grid, chroma.sum(2) @ grid], -1) / total[:, None]
        np.testing.assert_allclose(centre, toy.centres(index)[0], atol=0.07)
        area = np.pi * toy._scene(toy._rng(index)).radius[0] ** 2
        np.testing.assert_allclose(total / chroma.max() / area, 1, atol=0.15)


def test_clicks_start_at_the_events_and_nothing_sounds_between():
    toy = Toy(**SMALL)
    for index in range(40):
        audio, quiet = toy[index]["audio"][0].numpy(), np.ones(6400, dtype=bool)
        for time in toy.events(index):
            start, end = int(np.ceil(time * 4000)), int(np.ceil((time + 0.08) * 4000))
            quiet[start:end] = False
            assert np.abs(audio[start : start + 20]).max() > 0.5
        assert not audio[quiet].any()


def test_the_pitch_of_each_click_is_its_own():
    toy = Toy(size=[16, 16], sample_rate=8000, samples=12800, discs=2, rate=1.5)
    heard = {}
    for index in range(60):
        scene, audio = toy._scene(toy._rng(index)), toy[index]["audio"][0].numpy()
        for time, pitch in zip(scene.events, scene.pitch, strict=True):
            others = np.abs(scene.events - time)
            if np.sum(others < 0.09) == 1:
                start = int(time * 8000)
                spectrum = np.abs(np.fft.rfft(audio[start : start + 640], 8000))
                heard.setdefault(round(5 * pitch), []).append(int(spectrum.argmax()))
    assert len(heard) == len(PALETTE)
    assert all(np.ptp(values) <= 8 for values in heard.values())
    means = [np.mean(heard[k]) for k in range(len(PALETTE))]
    np.testing.assert_allclose(means, 300 * 3 ** (np.arange(6) / 5), rtol=0.02)


@pytest.mark.parametrize("pitch", ["disc", "wall"])
def test_each_impact_sounds_as_what_meets_there(pitch):
    toy = Toy(pitch=pitch, discs=2, rate=2.0, **SMALL)
    heard, expected = [], []
    for index in range(60):
        scene = toy._scene(toy._rng(index))
        for time, sound in zip(scene.events, scene.pitch, strict=True):
            frame = min(round(time * toy.fps), toy.frames - 1)
            centre, radius = scene.centre[:, frame], scene.radius[:, None]
            gap = np.stack([centre - radius, 16 - radius - centre], -1)  # [disc, axis, side]
            disc, axis, side = np.unravel_index(gap.argmin(), gap.shape)
            heard.append(sound)
            expected.append(scene.colour[disc] / 5 if pitch == "disc" else (2 * axis + side) / 3)
    assert len(np.unique(heard)) == (6 if pitch == "disc" else 4)
    assert np.isclose(heard, expected).mean() > 0.9  # another disc may be as near a wall


def test_events_are_rare_apart_and_inside():
    for discs in (1, 2, 3):
        toy = Toy(discs=discs, **SMALL)
        events = [toy.events(index) for index in range(400)]
        assert 1 <= np.mean([len(e) for e in events]) <= 1.2 * toy.duration * 0.75
        inside = [(e > 0.13) & (e < 1.37) for e in events]
        assert np.concatenate(inside).mean() > 0.98
        gaps = np.concatenate([np.diff(e) for e in events])
        assert (gaps > 0.24).mean() > 0.9


def test_a_flash_is_lit_when_it_beeps():
    toy = Toy(kind="flash", background="plain", **SMALL)
    for index in range(20):
        light = toy[index]["video"].float().amax((0, 2, 3))
        lit = light > 110
        frames = toy.events(index) * toy.fps
        assert all(lit[int(np.ceil(f))] for f in frames)
        far = np.abs(np.arange(16)[:, None] - frames).min(1) > 2.6
        assert not lit[far].any()


def test_pitch_follows_height():
    toy = Toy(kind="pitch", size=[32, 32], sample_rate=8000, samples=12800)
    for index in range(4):
        audio, centre = toy[index]["audio"][0].numpy(), toy.centres(index)[0]
        rising = np.flatnonzero((audio[:-1] < 0) & (audio[1:] >= 0)) / 8000
        hertz, when = 1 / np.diff(rising), (rising[1:] + rising[:-1]) / 2
        height = 1 - np.interp(when, np.arange(16) / 10, centre[:, 1]) / 32
        smooth = np.convolve(hertz, np.ones(15) / 15, "same")[15:-15]
        assert np.corrcoef(np.log(smooth), height[15:-15])[0, 1] > 0.98
        assert hertz.min() * 1.1 > 290
        assert hertz.max() < 1050


def test_loudness_follows_speed():
    toy = Toy(kind="loudness", size=[32, 32], sample_rate=8000, samples=12800)
    for index in range(4):
        audio = toy[index]["audio"][0].numpy().reshape(16, 800)
        loudness = np.sqrt((audio**2).mean(1))
        centre = toy.centres(index)[0]
        speed = np.linalg.norm(np.diff(centre, axis=0), axis=1)
        assert np.corrcoef(loudness[:-1], speed)[0, 1] > 0.8


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kind": "fall"}, "fall.*bounce, flash"),
        ({"size": [32]}, r"\[32\].*height, width"),
        ({"size": [0, 32]}, r"\[0, 32\].*positive"),
        ({"samples": 6401}, "6401.*1.6002 s.*1.6000 s.*6400"),
        ({"frames": 1}, "frames 1"),
        ({"num": 0}, "num 0"),
        ({"channels": 0}, "channels 0"),
        ({"fps": 0}, "fps 0"),
        ({"pitch": "sky"}, "sky.*disc or wall"),
        ({"background": "sea"}, "sea.*plain or varied"),
        ({"discs": 7}, "discs 7"),
        ({"colours": 9}, "colours 9"),
        ({"radius": [0.3, 0.2]}, "radius"),
        ({"speed": [0, 1]}, "speed"),
        ({"rate": 0}, "rate 0"),
        ({"click": 0}, "click 0"),
    ],
)
def test_wrong_settings_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        Toy(**{**SMALL, **wrong})


def test_an_index_outside_ends_iteration():
    toy = Toy(num=2, **SMALL)
    assert [item["index"] for item in toy] == [0, 1]
    with pytest.raises(IndexError, match="-1"):
        toy[-1]
