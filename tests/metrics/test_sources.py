"""Files stay whole in splits, and neither the order of clips nor the numbers of files matter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avdiffusion.metrics.sources import canonical, groups, halves, variance

numbers = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=14)


@settings(max_examples=300, deadline=None)
@given(numbers, st.randoms(use_true_random=False))
def test_the_order_is_of_content_alone_also_where_clips_are_equal(clips, random):
    """Rows and files are the same whatever came first and however files are numbered."""
    x = np.array([[0.0, value] for _, value in clips])
    source = np.array([file for file, _ in clips])
    order, first = canonical(x, source)
    assert sorted(order) == list(range(len(x)))
    assert (np.diff(x[order, 1]) >= 0).all()
    assert sorted(set(first)) == list(range(len(set(source))))
    assert len(set(zip(source[order], first, strict=True))) == len(set(source))

    mixed, names = list(range(len(x))), list(range(5))
    random.shuffle(mixed)
    random.shuffle(names)
    again, second = canonical(x[mixed], 7 * np.array(names)[source[mixed]] - 3)
    np.testing.assert_array_equal(x[mixed][again], x[order])
    np.testing.assert_array_equal(second, first)


def test_no_clips_have_no_order():
    order, source = canonical(np.zeros((0, 1)), np.zeros(0, dtype=int))
    assert len(order) == len(source) == 0


def test_groups_are_the_files():
    found = [rows.tolist() for rows in groups(np.array([5, 2, 5, -1, 2, 5]))]
    assert found == [[3], [1, 4], [0, 2, 5]]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.integers(1, 30), st.integers(0, 9))
def test_halves_have_no_file_in_common(source, n, seed):
    source = np.array(source)
    one, other = halves(source, n, np.random.default_rng(seed))
    assert len(one) == len(other) <= n
    assert len(set(one)) == len(set(other)) == len(one)
    assert not set(source[one]) & set(source[other])
    sizes = np.bincount(source)
    assert len(one) >= min(n, (len(source) - sizes.max()) // 2)
    assert (len(one) == 0) == (len(set(source)) == 1)


def test_clips_of_one_file_are_no_more_than_one():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(50)
    assert variance(x, np.arange(50)) == pytest.approx(x.var() / 50, rel=1e-12)
    mixed = rng.permutation(150)
    copies, files = np.repeat(x, 3)[mixed], np.repeat(rng.permutation(50), 3)[mixed]
    assert variance(copies, files) == pytest.approx(x.var() / 50, rel=1e-12)
    assert np.isnan(variance(x, np.zeros(50)))


def test_the_variance_is_that_of_means_of_fresh_files():
    """Clips share their file's level: its variance is over the number of files, not of clips."""
    rng = np.random.default_rng(0)
    files = np.repeat(np.arange(60), rng.integers(1, 8, 60))
    drawn = rng.standard_normal((2000, 60))[:, files] + rng.standard_normal((2000, len(files)))
    told = np.mean([variance(x, files) for x in drawn])
    assert told == pytest.approx(drawn.mean(1).var(), rel=0.12)
    assert np.mean([x.var() / len(x) for x in drawn]) < 0.6 * told
