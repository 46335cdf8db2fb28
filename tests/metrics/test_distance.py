"""Distances between sets of features, where closed forms or a second formula tell the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.metrics.distance import Frechet, Kernel, frechet, kernel, median_distance
from avdiffusion.metrics.metric import Sets


class Given:
    """An extractor whose numbers are given."""

    name, needs, fields, paired = "given numbers", ("audio",), ("x",), False

    def __call__(self, clips, rates):
        return {"x": clips["audio"]}


def sets(samples, reference, **options):
    places = {"samples": samples, "reference": reference} | options
    for place in ("samples", "reference", "real"):
        if places.get(place) is not None:
            places[place] = {"x": places[place]}
    return Sets(**places)


def normal(n, d, seed=0, scale=1.0, shift=0.0):
    return shift + scale * np.random.default_rng(seed).standard_normal((n, d))


def exact(mean, covariance, n, seed):
    """n points whose mean and unbiased covariance are the given ones."""
    x = normal(n, len(mean), seed)
    x -= x.mean(0)
    x = np.linalg.solve(np.linalg.cholesky(np.cov(x.T)), x.T).T
    return x @ np.linalg.cholesky(covariance).T + mean


def textbook(a, b):
    """The published formula: the root of S_a, then symmetric eigen-decompositions."""
    s_a, s_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(s_a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    both = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ s_b @ root), 0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a) + np.trace(s_b) - 2 * both


def brute(a, b, likeness):
    """Unbiased MMD^2, pair by pair."""

    def within(x):
        pairs = [likeness(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]
        return np.mean(pairs)

    return within(a) + within(b) - 2 * np.mean([likeness(x, y) for x in a for y in b])


def golden():
    n = np.arange(64 * 16)
    x, y = np.sin(0.7 * n), 1.2 * np.sin(1.1 * n + 0.4) + 0.1
    return x.reshape(64, 16), y.reshape(64, 16)


def test_golden_values():
    """Of the published evaluator, whose Frechet distance is of float32 roots; and in float64."""
    assert frechet(*golden()) == pytest.approx(18.484867, abs=2e-4)
    assert frechet(*golden()) == pytest.approx(18.4847308622394, abs=1e-9)
    assert kernel(*golden()) == pytest.approx(1.10653667, abs=2e-8)


def test_frechet_of_exact_moments_is_the_closed_form():
    d, rng = 12, np.random.default_rng(1)
    mean_a, mean_b = rng.standard_normal((2, d))
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    var_a, var_b = rng.uniform(0.1, 3, (2, d))  # of covariances that commute
    a, b = (
        exact(m, basis * v @ basis.T, 100, s)
        for m, v, s in [(mean_a, var_a, 2), (mean_b, var_b, 3)]
    )
    closed = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(var_a) - np.sqrt(var_b)) ** 2).sum()
    assert frechet(a, b) == pytest.approx(closed, rel=1e-10)


def test_frechet_of_two_dimensions_has_a_closed_form():
    """tr (S_a S_b)^(1/2) of 2 x 2 is sqrt(tr S_a S_b + 2 sqrt(det S_a det S_b))."""
    s_a, s_b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.2], [-0.2, 1.5]])
    root = np.sqrt(np.trace(s_a @ s_b) + 2 * np.sqrt(np.linalg.det(s_a) * np.linalg.det(s_b)))
    zero = np.zeros(2)
    found = frechet(exact(zero, s_a, 50, 0), exact(zero, s_b, 70, 1))
    assert found == pytest.approx(np.trace(s_a + s_b) - 2 * root, rel=1e-10)


@given(
    n=st.integers(2, 40),
    m=st.integers(2, 40),
    d=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_is_the_textbook_formula_symmetric_and_free_of_axes(n, m, d, seed):
    a, b = normal(n, d, seed, 1.3, 0.2), normal(m, d, seed + 1)
    value = frechet(a, b)
    assert value == pytest.approx(textbook(a.reshape(n, d), b) if d > 1 else one_d(a, b), abs=1e-5)
    assert value == pytest.approx(frechet(b, a), rel=1e-9, abs=1e-9)
    turn = np.linalg.qr(normal(d, d, seed + 2))[0]
    assert value == pytest.approx(frechet(a @ turn + 5, b @ turn + 5), rel=1e-9, abs=1e-9)
    assert kernel(a, b) == pytest.approx(kernel(a @ turn, b @ turn), rel=1e-9, abs=1e-9)
    assert kernel(a, b) == pytest.approx(kernel(b, a), rel=1e-9, abs=1e-9)


def one_d(a, b):
    return (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2


@pytest.mark.parametrize("n", [70, 500])
def test_equal_sets_have_no_distance(n):
    a = normal(n, 200)
    assert 0 <= frechet(a, a[::-1]) < 1e-9


def test_kernels_are_the_mean_over_pairs(monkeypatch):
    a, b = normal(13, 5, 0), normal(9, 5, 1, 1.5)
    for block in (4, 1024):
        monkeypatch.setattr("avdiffusion.metrics.distance.BLOCK", block)
        expected = brute(a, b, lambda x, y: (x @ y / 5 + 1) ** 3)
        assert kernel(a, b) == pytest.approx(expected, rel=1e-12)
        expected = brute(a, b, lambda x, y: np.exp(-((x - y) ** 2).sum() / (2 * 1.7**2)))
        assert kernel(a, b, bandwidth=1.7) == pytest.approx(expected, rel=1e-12)


def test_kernel_distances_have_no_bias():
    """N(0, 1) and N(1, 1): E exp(-(x - y)^2 / 2) = exp(-d^2 / 6) / sqrt(3), d between the means."""
    found = [
        kernel(normal(8, 1, 2 * k, 1, 1), normal(8, 1, 2 * k + 1), bandwidth=1.0)
        for k in range(4000)
    ]
    expected = 2 * np.sqrt(1 / 3) * (1 - np.exp(-1 / 6))
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / np.sqrt(len(found)))
    same = [kernel(normal(8, 3, 2 * k), normal(8, 3, 2 * k + 1)) for k in range(4000)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0 < max(same)


def test_median_distance():
    x = np.array([0.0, 1, 3, 7])[:, None]
    assert median_distance(x) == np.median([1, 3, 7, 2, 6, 4])


METRICS = [
    Frechet(Given()),
    Kernel(Given()),
    Kernel(Given(), key="kad", kernel="gaussian", scale=100),
]
EACH = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)


@EACH
@pytest.mark.parametrize("d", [8, 150])
def test_intervals_hold_the_expected_distance(metric, d):
    """The distance's mean over fresh clips of the same number, in most draws."""
    spectrum = np.arange(1, d + 1) ** -0.5

    def draw(seed):
        rng = np.random.default_rng(seed)
        a, b = (rng.standard_normal((100, d)) * spectrum for _ in range(2))
        return metric.figures(sets(a * 1.3 + 0.3 * spectrum, b))[0]

    drawn = [draw(seed) for seed in range(150)]
    values = np.array([figure.value for figure in drawn])
    held = [figure.low <= values.mean() <= figure.high for figure in drawn]
    assert np.mean(held) > 0.85
    error = np.mean([figure.high - figure.value for figure in drawn]) / 1.96
    assert 0.85 * values.std() < error < 2 * values.std()


@EACH
def test_figures_do_not_depend_on_the_order_of_clips(metric):
    a, b, real = normal(90, 6, 0, 1.2), normal(101, 6, 1), normal(120, 6, 2)
    rng = np.random.default_rng(3)
    for other in (None, real):
        first = metric.figures(sets(a, b, real=other))
        mixed = [x if x is None else x[rng.permutation(len(x))] for x in (a, b, other)]
        assert metric.figures(sets(*mixed[:2], real=mixed[2])) == first


@EACH
def test_floors_are_of_real_clips_at_the_same_number(metric):
    a, b = normal(80, 6, 0, 1.5), normal(200, 6, 1)
    halves = metric.figures(sets(a, b))[0]
    assert halves.floor_n == 80
    assert (halves.n, halves.n_reference) == (80, 200)
    assert metric.figures(sets(a, b, seed=1))[0].floor != halves.floor
    assert metric.figures(sets(a[:70], b))[0].floor_n == 70
    assert metric.figures(sets(a, b[:100]))[0].floor_n == 50
    given_real = metric.figures(sets(a, b, real=normal(80, 6, 5)))[0]
    as_samples = metric.figures(sets(normal(80, 6, 5), b))[0]
    assert given_real.floor == pytest.approx(as_samples.value, rel=1e-12)
    assert given_real.floor < given_real.low


def families(n, each, d, seed=0, spread=0.05):
    """n files of so many clips that are nearly the same, and the file of each clip."""
    files = np.repeat(np.arange(n), each)
    return normal(n, d, seed)[files] + normal(n * each, d, seed + 1, spread), files


@EACH
def test_floors_are_of_files_apart(metric):
    """Halves that have files in common are nearer to each other than real clips are."""
    b, files = families(40, 5, 6)
    a = normal(100, 6, 9)
    by_clip, by_file = [], []
    for seed in range(8):
        (windows,) = metric.figures(sets(a, b, seed=seed))
        (whole,) = metric.figures(sets(a, b, seed=seed, sources={"reference": files}))
        assert (windows.floor_n, whole.floor_n) == (100, 100)
        assert whole.value == windows.value
        by_clip.append(windows.floor)
        by_file.append(whole.floor)
    assert np.mean(by_file) > np.mean(by_clip) + 2 * np.std(by_clip)
    assert "floor: halves of the reference, files apart" in whole.notes
    (figure,) = metric.figures(sets(a[:70], b, sources={"reference": files}))
    assert figure.floor_n == 70
    real = metric.figures(sets(a, b, real=normal(90, 6, 5), sources={"reference": files}))[0]
    assert real.floor_n == 90
    assert "floor: 90 other real clips" in real.notes


@EACH
def test_one_file_has_neither_floor_nor_interval(metric):
    a, b = normal(80, 6, 0, 1.5), normal(90, 6, 1)
    (figure,) = metric.figures(sets(a, b, sources={"reference": np.full(90, 3)}))
    assert figure.floor is figure.floor_n is figure.low is figure.high is None
    assert "no floor: real clips are too few, or all of one file" in figure.notes
    assert not any("interval" in note for note in figure.notes)
    (figure,) = metric.figures(sets(a, b, sources={"samples": np.zeros(80)}))
    assert figure.low is None
    assert figure.floor is not None


@EACH
def test_figures_depend_neither_on_the_order_of_clips_nor_on_the_numbers_of_files(metric):
    (a, of_a), (b, of_b) = families(30, 3, 6, 0), families(25, 4, 6, 1)
    b[[3, 50]] = b[[9, 70]]  # clips that are in two files
    (first,) = metric.figures(sets(a, b, sources={"samples": of_a, "reference": of_b}))
    rng = np.random.default_rng(5)
    for _ in range(3):
        i, j = rng.permutation(90), rng.permutation(100)
        named = {"samples": rng.permutation(30)[of_a[i]], "reference": 9 - 2 * of_b[j]}
        (again,) = metric.figures(sets(a[i], b[j], sources=named))
        for name in ("value", "low", "high", "floor"):
            assert getattr(again, name) == pytest.approx(getattr(first, name), abs=1e-12), name
        assert again.floor_n == first.floor_n


@pytest.mark.parametrize("metric", [METRICS[0], METRICS[2]], ids=["fvd", "kad"])
def test_clips_that_stand_twice_in_a_file_narrow_no_interval(metric):
    a, b = normal(200, 4, 0, 1.5), normal(200, 4, 1)
    twice = [np.repeat(x, 2, axis=0) for x in (a, b)]
    (once,) = metric.figures(sets(a, b))
    files = np.repeat(np.arange(200), 2)
    (whole,) = metric.figures(sets(*twice, sources={"samples": files, "reference": files}))
    (clips,) = metric.figures(sets(*twice))
    width = once.high - once.value
    assert whole.high - whole.value == pytest.approx(width, rel=0.05)
    assert clips.high - clips.value == pytest.approx(width / 2**0.5, rel=0.05)
    single = sets(a, b, sources={"samples": np.arange(200), "reference": np.arange(200)[::-1]})
    assert metric.figures(single)[0] == once


@EACH
def test_bad_sets_are_refused_with_a_remedy(metric):
    a, b = normal(63, 6), normal(100, 6)
    with pytest.raises(ValueError, match=r"63 samples against 100 .*allow_small=true"):
        metric.figures(sets(a, b))
    with pytest.raises(ValueError, match="100 samples against 63"):
        metric.figures(sets(b, a))
    assert metric.figures(sets(a, b, allow_small=True))[0].n == 63
    with pytest.raises(ValueError, match="1 samples"):
        metric.figures(sets(a[:1], b, allow_small=True))
    with pytest.raises(ValueError, match="no reference clips"):
        metric.figures(sets(b, None))
    b[[3, 7], 2] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"2 of 100 sample clips .*clips 3, 7"):
        metric.figures(sets(b, normal(100, 6)))


def test_scales_notes_and_names():
    a, b = normal(80, 6, 0, 1.5), normal(80, 6, 1)
    plain, scaled = (Frechet(Given(), key="fad", scale=s).figures(sets(a, b))[0] for s in (1, 1e4))
    for name in ("value", "low", "high", "floor"):
        assert getattr(scaled, name) == pytest.approx(1e4 * getattr(plain, name))
    assert "times 10000" in scaled.notes
    assert (plain.label, plain.extractor, plain.better) == ("FAD", "given numbers", "lower")
    assert any("kernel distance is the main figure" in note for note in plain.notes)
    assert any("same numbers" in note for note in plain.notes)
    large = Frechet(Given()).figures(sets(normal(2048, 2, 0), normal(2048, 2, 1)))[0]
    assert not any("main figure" in note for note in large.notes)
    assert plain.notes[-1] == "interval: jackknife"
    bare = Frechet(Given()).figures(sets(a, b, resamples=0))[0]
    assert bare.low is None
    assert not any("interval" in note for note in bare.notes)


def test_kad_is_judged_by_the_bandwidth_of_the_reference():
    a, b = normal(80, 6, 0, 1.5), normal(90, 6, 1)
    figure = Kernel(Given(), key="kad", kernel="gaussian", scale=100).figures(sets(a, b))[0]
    assert figure.value == pytest.approx(100 * kernel(a, b, bandwidth=median_distance(b)))
    with pytest.raises(ValueError, match="the same features"):
        Kernel(Given(), kernel="gaussian").figures(sets(a, np.ones((90, 6))))
    with pytest.raises(ValueError, match="choose polynomial or gaussian"):
        Kernel(Given(), kernel="linear")
    with pytest.raises(ValueError, match=r"gaussian kernel has no degree=2"):
        Kernel(Given(), kernel="gaussian", degree=2)


def test_the_degree_is_three_unless_it_is_given():
    a, b = normal(80, 6, 0, 1.5), normal(90, 6, 1)
    for degree, expected in ((None, 3), (3, 3), (2, 2)):
        (figure,) = Kernel(Given(), degree=degree).figures(sets(a, b))
        assert figure.value == pytest.approx(kernel(a, b, degree=expected))
