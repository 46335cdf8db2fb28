"""Planted copies are found, fresh clips are not blamed; manifolds against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.metrics.memorisation import Memorisation, PrecisionRecall, kth_nearest, nearest
from avdiffusion.metrics.metric import Sets


class Given:
    """An extractor whose numbers are given."""

    name, needs, fields, paired = "given numbers", ("audio",), ("x",), False

    def __call__(self, clips, rates):
        return {"x": clips["audio"]}


def sets(**places):
    return Sets(**{k: {"x": v} if isinstance(v, np.ndarray) else v for k, v in places.items()})


def normal(n, d=16, seed=0, scale=1.0, shift=0.0):
    return shift + scale * np.random.default_rng(seed).standard_normal((n, d))


def memorised(samples, reference, train, **options):
    found = Memorisation(Given()).figures(
        sets(samples=samples, reference=reference, train=train, **options)
    )
    return {figure.key: figure for figure in found}


@given(n=st.integers(2, 40), m=st.integers(1, 40), d=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_neighbours_are_those_of_all_pairs(n, m, d, seed):
    a, b = normal(n, d, seed), normal(m, d, seed + 100)
    every = np.linalg.norm(a[:, None] - b, axis=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("avdiffusion.metrics.distance.BLOCK", 7)
        index, distance = nearest(a, b)
        assert distance == pytest.approx(every.min(1), rel=1e-9)
        assert every[np.arange(n), index] == pytest.approx(every.min(1), rel=1e-9)
        k = min(3, n - 1)
        within = np.sort(np.linalg.norm(a[:, None] - a, axis=-1), axis=1)[:, k]
        assert kth_nearest(a, k) == pytest.approx(within, rel=1e-6)
        source = np.arange(n) // 2
        others = np.linalg.norm(a[:, None] - a, axis=-1)
        others[source[:, None] == source] = np.inf
        assert kth_nearest(a, k, source) == pytest.approx(np.sort(others, axis=1)[:, k - 1])


def test_planted_copies_are_found_and_shown_first():
    train, samples = normal(300, seed=0), normal(100, seed=1)
    copies = {5: 17, 40: 200, 41: 201, 99: 0}
    for sample, source in copies.items():
        samples[sample] = train[source] + 0.01 * normal(1, seed=sample)
    found = memorised(samples, normal(200, seed=2), train)
    figure, ratio = found["memorisation"], found["memorisation_ratio"]
    first = {figure.details["sample"][k]: figure.details["train"][k] for k in range(4)}
    assert first == copies
    assert all(figure.details["suspect"][:4])
    assert max(figure.details["ratio"][:4]) < 0.05 < figure.details["ratio"][4]
    assert 0.04 <= figure.value <= 0.09
    assert figure.low <= figure.value <= figure.high
    assert "training clips" in figure.notes[0]
    assert ratio.value == pytest.approx(np.median(figure.details["ratio"]))
    held_out = np.linalg.norm(samples[:, None] - normal(200, seed=2), axis=-1)
    nearest_one = held_out.argmin(1)[figure.details["sample"]]
    assert figure.details["held_out"] == nearest_one.tolist()


def test_exact_copies_have_no_distance():
    train = normal(300, shift=50)
    found = memorised(train[:100], normal(200, seed=2, shift=50), train)["memorisation"]
    assert found.value == 1
    assert found.details["train"] == found.details["sample"]
    assert max(found.details["distance"]) == 0


def test_fresh_clips_are_not_blamed():
    shares = []
    for seed in range(0, 60, 3):
        samples, reference, train = (normal(200, seed=seed + k) for k in range(3))
        found = memorised(samples, reference, train)
        shares.append(found["memorisation"].value)
        assert found["memorisation"].floor <= 0.05
        assert found["memorisation_ratio"].value == pytest.approx(1, abs=0.1)
    assert np.mean(shares) < 0.05


def test_average_clips_are_not_blamed_though_near_to_everything():
    """Their distances to training clips are the least of all, but so are those to held-out ones."""
    train, reference = normal(400, seed=0), normal(400, seed=1)
    average = normal(200, seed=2, scale=0.3)
    assert np.mean(nearest(average, train)[1]) < np.quantile(nearest(reference, train)[1], 0.05)
    assert memorised(average, reference, train)["memorisation"].value < 0.12


def test_a_reference_of_near_duplicates_blames_nobody():
    """Windows of one file are near each other: the ratios of real clips are then large."""
    files = np.repeat(normal(40, seed=1), 5, axis=0)
    reference = files + 0.1 * normal(200, seed=2)
    found = memorised(normal(200, seed=3), reference, normal(200, seed=0))
    assert found["memorisation"].value < 0.12
    assert found["memorisation_ratio"].floor > 2


def test_held_out_clips_are_compared_with_those_of_other_files():
    """As a sample is, which has no siblings among them: then their ratio is that of fresh clips."""
    files = np.repeat(np.arange(40), 5)
    reference = normal(40, seed=1)[files] + 0.1 * normal(200, seed=2)
    train = normal(40, seed=0)[files] + 0.1 * normal(200, seed=5)
    samples = normal(200, seed=3)
    clips = memorised(samples, reference, train)["memorisation_ratio"]
    found = memorised(samples, reference, train, sources={"reference": files})
    assert clips.floor > 5
    assert found["memorisation_ratio"].floor == pytest.approx(1, abs=0.15)
    assert found["memorisation_ratio"].value == clips.value
    assert found["memorisation"].notes[-1] == "interval: bootstrap, 200 resamples"
    order, names = np.random.default_rng(0).permutation(200), np.random.default_rng(1)
    again = memorised(
        samples, reference[order], train, sources={"reference": names.permutation(40)[files[order]]}
    )
    for key, figure in found.items():
        assert again[key].value == pytest.approx(figure.value, abs=1e-12)
        assert again[key].floor == pytest.approx(figure.floor, abs=1e-12)


def test_samples_of_one_file_are_drawn_together():
    train, samples, files = normal(300, seed=0), normal(100, seed=1), np.repeat(np.arange(20), 5)
    samples[:15] = train[:15] + 0.01
    found = [
        memorised(samples, normal(200, seed=2), train, sources=sources)["memorisation"]
        for sources in (None, {"samples": files})
    ]
    alone, together = (figure.high - figure.low for figure in found)
    assert together > 1.5 * alone


def test_the_share_does_not_depend_on_the_order_of_clips():
    samples, reference, train = (normal(150, seed=k) for k in range(3))
    samples[:30] = train[:30] + 0.1
    first = memorised(samples, reference, train)["memorisation"]
    again = memorised(samples[::-1], reference[::-1], train[::-1])["memorisation"]
    assert (again.value, again.low, again.high, again.floor) == (
        first.value, first.low, first.high, first.floor,
    )  # fmt: skip
    assert again.details["ratio"] == pytest.approx(first.details["ratio"], rel=1e-9)
    assert again.details["train"] == [149 - k for k in first.details["train"]]


def test_what_is_missing_or_wrong_is_said():
    clips = normal(100)
    with pytest.raises(ValueError, match="no training clips"):
        memorised(clips, clips, None)
    with pytest.raises(ValueError, match="100 of 100 reference clips are training clips"):
        memorised(clips, clips, clips)
    with pytest.raises(ValueError, match="allow_small=true"):
        memorised(clips[:20], clips, clips)
    with pytest.raises(ValueError, match=r"reference clips are of one file.* give more files"):
        memorised(clips, clips, clips, sources={"reference": np.zeros(100)})


def shares(samples, reference, k=3, **options):
    found = PrecisionRecall(Given(), k=k).figures(
        sets(samples=samples, reference=reference, **options)
    )
    return {figure.key: figure for figure in found}


def brute(samples, reference, k):
    def reach(x):
        return [sorted(np.linalg.norm(x - y, axis=1))[k] for y in x]

    real, ours = reach(reference), reach(samples)
    every = np.linalg.norm(samples[:, None] - reference, axis=-1)
    inside = every <= np.array(real)
    return {
        "precision": np.mean([row.any() for row in inside]),
        "recall": np.mean([(every[:, j] <= ours).any() for j in range(len(reference))]),
        "density": inside.sum() / (k * len(samples)),
        "coverage": np.mean([inside[:, j].any() for j in range(len(reference))]),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_those_of_all_pairs(monkeypatch, k):
    samples, reference = normal(70, 4, 0, 0.8, 0.3), normal(90, 4, 1)
    expected = brute(samples, reference, k)
    for block in (16, 1024):
        monkeypatch.setattr("avdiffusion.metrics.distance.BLOCK", block)
        found = shares(samples, reference, k)
        assert {key: figure.value for key, figure in found.items()} == pytest.approx(expected)


def test_a_collapsed_model_is_precise_and_a_scattered_one_covers():
    reference = normal(400, 4, 1)
    collapsed, wide = (
        shares(normal(400, 4, 0, 0.2), reference),
        shares(normal(400, 4, 0, 3), reference),
    )
    assert collapsed["precision"].value > 0.95
    assert collapsed["recall"].value < 0.2
    assert collapsed["coverage"].value < 0.5
    assert wide["precision"].value < 0.7
    assert wide["recall"].value > 0.9
    same = shares(normal(400, 4, 0), reference)
    for figure in same.values():
        assert figure.floor == pytest.approx(figure.value, abs=0.1)
        assert figure.low <= figure.value <= figure.high
        assert figure.floor_n == 200
    assert same["density"].value == pytest.approx(1, abs=0.15)


def test_manifolds_do_not_depend_on_the_order_of_clips():
    samples, reference, rng = normal(80, 4), normal(90, 4, 1), np.random.default_rng(2)
    assert shares(samples, reference) == shares(
        samples[rng.permutation(80)], reference[rng.permutation(90)]
    )


def test_manifolds_need_more_clips_than_neighbours():
    with pytest.raises(ValueError, match="more than 3 clips"):
        shares(normal(3), normal(6), allow_small=True)
    for figure in shares(normal(5), normal(6), allow_small=True).values():
        assert figure.floor is figure.floor_n is None
        assert "no floor" in figure.notes[1]


def test_floors_of_manifolds_are_of_files_apart():
    files = np.repeat(np.arange(30), 6)
    reference = normal(30, 4)[files] + 0.02 * normal(180, 4, 1)
    samples = reference[:90] + 0.02 * normal(90, 4, 2)  # of half of the files
    clips = shares(samples, reference)
    found = shares(samples, reference, sources={"reference": files})
    assert clips["precision"].floor > 0.9
    assert found["precision"].floor < 0.5
    assert found["precision"].value == clips["precision"].value
    assert found["precision"].notes[1:] == [
        "floor: halves of the reference, files apart", "interval: bootstrap, 200 resamples",
    ]  # fmt: skip
    alone, together = (one["coverage"].high - one["coverage"].low for one in (clips, found))
    assert together > 1.5 * alone
    mixed = np.random.default_rng(0).permutation(180)
    assert found == shares(samples, reference[mixed], sources={"reference": -files[mixed]})
