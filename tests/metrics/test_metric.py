"""What every metric inherits: collecting over batches and processes, and scores of one call."""

import pickle

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from avdiffusion.metrics.distance import Frechet
from avdiffusion.metrics.mean import Mean
from avdiffusion.metrics.metric import Figure, Findings, Metric, Sets
from avdiffusion.metrics.quality import Restoration

RATES = {"video": 10.0, "audio": 4000.0}


class Powers:
    """The power of each channel, and of all."""

    name, needs, fields, paired = "powers", ("audio",), ("each", "all"), False

    def __call__(self, clips, rates):
        power = (torch.as_tensor(clips["audio"]) ** 2).mean(-1).numpy()
        return {"each": power, "all": power.mean(1)}


def clips(n, seed, level=1.0):
    rng = np.random.default_rng(seed)
    return {"audio": level * rng.standard_normal((n, 4, 50)).astype(np.float32)}


def part(all_of_them, rows):
    return {"audio": all_of_them["audio"][rows]}


class Loud(Powers):
    fields = ("all",)

    def __call__(self, clips, rates):
        return {"all": super().__call__(clips, rates)["all"]}


def mean():
    return Mean(Loud())


def collected(metric, samples, real, step=50):
    for start in range(0, 1000, step):
        for several, place in ((samples, False), (real, True)):
            if start < len(several["audio"]):
                metric.update(part(several, slice(start, start + step)), RATES, real=place)
    return metric


def test_batches_add_up_to_the_whole():
    samples, real = clips(130, 0, 1.2), clips(110, 1)
    expected = Frechet(Powers())(samples, RATES, real)
    for step in (17, 64, 1000):
        found = collected(Frechet(Powers()), samples, real, step).compute()
        assert found == pytest.approx(expected, rel=1e-6)
    assert list(found) == ["fvd"]


def test_one_call_leaves_what_was_collected_alone():
    samples, real = clips(130, 0, 1.2), clips(110, 1)
    metric = collected(Frechet(Powers()), samples, real)
    before = metric.compute()
    other = metric(clips(70, 5, 3.0), RATES, clips(80, 6))
    assert other["fvd"] > 2 * before["fvd"]
    assert metric.compute() == before
    metric.update(clips(10, 7), RATES)
    assert metric.compute() != before
    metric.reset()
    with (
        pytest.warns(UserWarning, match="called before the ``update`` method"),
        pytest.raises(ValueError, match="Frechet was given no samples"),
    ):
        metric.compute()


def test_a_metric_of_samples_alone_needs_no_real_clips():
    samples = clips(30, 0)
    expected = {"all": pytest.approx((samples["audio"] ** 2).mean())}
    assert mean()(samples, RATES) == expected
    metric = mean()
    metric.update(samples, RATES)
    assert metric.compute() == expected
    with pytest.raises(ValueError, match="no reference clips"):
        Frechet(Powers())(clips(70, 0), RATES)


def test_metrics_can_be_sent_to_other_processes():
    metric = collected(Frechet(Powers()), clips(70, 0), clips(70, 1))
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()


def test_a_metric_without_figures_says_so():
    class Nothing(Metric):
        pass

    metric = Nothing(Loud())
    metric.update(clips(3, 0), RATES)
    with pytest.raises(TypeError, match="Nothing has no figures"):
        metric.compute()


def test_metrics_against_a_target_are_told_of_it():
    rng = np.random.default_rng(0)
    made, target = ({"video": rng.integers(0, 256, (5, 3, 2, 12, 12), np.uint8)} for _ in range(2))
    each = Restoration()(made, RATES, target)
    expected = {name: pytest.approx(values.mean()) for name, values in each.items()}
    metric = Mean(Restoration())
    assert metric(made, RATES, targets=target) == expected
    assert metric.values(Findings(made, RATES, target)(metric)) == expected
    for rows in (slice(0, 3), slice(3, 5)):
        ours, theirs = ({"video": x["video"][rows]} for x in (made, target))
        metric.update(ours, RATES, targets=theirs)
    assert metric.compute() == expected


def test_metrics_against_a_target_are_not_without():
    metric = Mean(Restoration())
    told = "Restoration compares each clip with the one it should be.*evaluate.py target=DIR"
    with pytest.raises(ValueError, match=told):
        metric(clips(3, 0), RATES)
    with pytest.raises(ValueError, match=told):
        metric.update(clips(3, 0), RATES)
    with pytest.raises(ValueError, match=told):
        Findings(clips(3, 0), RATES)(metric)


def test_an_extractor_is_asked_once_of_the_same_clips():
    calls = []

    class Counted(Powers):
        def __call__(self, clips, rates):
            calls.append(self.name)
            return super().__call__(clips, rates)

    class Other(Counted):
        name = "other powers"

    found = Findings(clips(70, 0), RATES)
    metrics = [Frechet(Counted(), key=key) for key in "ab"] + [Frechet(Other())]
    first, second, _ = (found(metric) for metric in metrics)
    assert first is second
    assert calls == ["powers", "other powers"]
    real = Findings(clips(70, 1), RATES)
    expected = Frechet(Powers())(clips(70, 0), RATES, clips(70, 1))["fvd"]
    assert metrics[0].values(first, real(metrics[0])) == {"a": expected}


def test_a_clip_has_a_file_of_its_own_where_none_is_given():
    sets = Sets(
        samples={"x": np.zeros((4, 2))},
        reference={"x": np.zeros((3, 2))},
        sources={"reference": [5, 5, 1]},
    )
    assert sets.source("samples").tolist() == [0, 1, 2, 3]
    assert sets.source("reference").tolist() == [5, 5, 1]


def test_values_are_those_of_the_figures():
    class Two(Metric):
        def figures(self, sets: Sets):
            assert sets.resamples == 0
            total = float(sets.samples["all"].sum())
            return [
                Figure(key="sum", label="", value=total),
                Figure(key="n", label="", value=float(len(sets.samples["each"]))),
            ]

    assert Two(Powers())(clips(3, 0), RATES)["n"] == 3


SHARES = [(65, 55), (100, 21), (130, 60)]  # of the first process; then the other has no samples


def process(rank, start, folder):
    distributed.init_process_group("gloo", init_method=start, rank=rank, world_size=2)
    torch.set_num_threads(1)
    samples, real = clips(130, 0, 1.2), clips(110, 1)
    found = []
    for shares in SHARES:
        metric, one = Frechet(Powers()), mean()
        for several, place, cut in ((samples, False, shares[0]), (real, True, shares[1])):
            mine = part(several, slice(0, cut) if rank == 0 else slice(cut, None))
            if len(mine["audio"]):
                for rows in np.array_split(np.arange(len(mine["audio"])), 2):
                    metric.update(part(mine, rows), RATES, real=place)
                if not place:
                    one.update(mine, RATES)
        before = metric.compute() | one.compute()
        alone = metric(clips(70, 5, 3.0 + rank), RATES, clips(80, 6))
        found.append((before, alone, metric.compute() | one.compute()))
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """Also with unequal shares, and where one process has no samples at all."""
    context = multiprocessing.get_context("spawn")
    start = f"file://{tmp_path}/meet"
    ranks = [context.Process(target=process, args=(rank, start, tmp_path)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(200)
        assert rank.exitcode == 0
    samples, real = clips(130, 0, 1.2), clips(110, 1)
    expected = Frechet(Powers())(samples, RATES, real) | mean()(samples, RATES)
    for rank in (0, 1):
        by_itself = Frechet(Powers())(clips(70, 5, 3.0 + rank), RATES, clips(80, 6))
        for found, alone, again in torch.load(tmp_path / f"{rank}.pt"):
            assert found == pytest.approx(expected, rel=1e-6)
            assert again == found
            assert alone == pytest.approx(by_itself, rel=1e-9)
