"""The benchmark of text to sound: its classifier against a closed form, its features and chance."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from entry import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    file = ROOT / "benchmarks" / "text.py"
    spec = importlib.util.spec_from_file_location("benchmark_text", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def classes(count=4000, apart=2.0):
    """Two normal classes, `apart` deviations from each other in the first of two features.

    The second feature is a thousand times as large and says nothing.
    """
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b"]).repeat(count)
    features = rng.normal(size=(2 * count, 2)) * [1, 1000]
    features[count:, 0] += apart
    return features, labels


def test_the_nearest_mean_is_right_as_often_as_two_normal_classes_allow(bench):
    features, labels = classes()
    share = (bench.Nearest(features[::2], labels[::2])(features[1::2]) == labels[1::2]).mean()
    best = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # half of the two deviations on either side
    assert share == pytest.approx(best, abs=0.015)  # 4000 of them: 0.006 each way


def test_a_file_is_told_by_the_others_alone(bench):
    rng = np.random.default_rng(1)
    sources = np.arange(8).repeat(25)
    labels = np.array(["a", "b"])[sources % 2]
    own = rng.normal(size=(8, 50))[sources]  # says which file it is, nothing of its class
    features = own + 0.01 * rng.normal(size=(200, 50))
    assert (bench.Nearest(features, labels)(features) == labels).mean() == 1
    assert bench.left_out(features, labels, sources) < 0.8


def test_shuffled_captions_are_right_by_chance(bench):
    labels = np.array(["a", "b", "c", "d"]).repeat(50)
    mean, most = bench.shuffled(labels, labels, times=300, seed=0)
    assert mean == pytest.approx(1 / 4, abs=0.01)
    deviation = math.sqrt(1 / 4 * 3 / 4 / 200)
    assert most == pytest.approx(1 / 4 + 2.33 * deviation, abs=0.03)


def test_mel_statistics_know_a_tone_and_not_its_loudness(bench):
    time = torch.arange(16000) / 16000
    tones = torch.stack([torch.sin(2 * math.pi * f * time) for f in (500, 500, 4000)])
    tones = (tones * torch.tensor([0.5, 0.05, 0.5])[:, None])[:, None]
    low, quiet, high = bench.mel_statistics({"audio": tones}, {"audio": 16000})
    np.testing.assert_allclose(quiet, low, atol=1e-2)
    centres = [2595 * math.log10(1 + f / 700) for f in (500, 4000, 8000)]
    expected = [round(bench.BANDS * c / centres[2]) for c in centres[:2]]
    found = [int(x[: bench.BANDS].argmax()) for x in (low, high)]
    np.testing.assert_allclose(found, expected, atol=1)
