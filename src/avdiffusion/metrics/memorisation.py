"""Does a model repeat what it was trained on, and how much of what is real does it show?"""

import numpy as np

from avdiffusion.metrics.distance import blocks, squared_distances
from avdiffusion.metrics.features import enough, features, in_order, real_clips
from avdiffusion.metrics.mean import mean_interval
from avdiffusion.metrics.metric import Extractor, Figure, Metric, Sets
from avdiffusion.metrics.power import bootstrapped

QUANTILE = 0.05


def nearest(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of [N, D] the nearest row of [M, D], and how far it is."""
    index, distance = np.zeros(len(a), dtype=int), np.zeros(len(a))
    for rows in blocks(len(a)):
        index[rows] = squared_distances(a[rows], b).argmin(1)
        # Subtracted anew: the difference of squares has no digits left for a copy.
        distance[rows] = np.linalg.norm(a[rows] - b[index[rows]], axis=1)
    return index, distance


def kth_nearest(x: np.ndarray, k: int, source: np.ndarray | None = None) -> np.ndarray:
    """How far the k-th nearest other row of [N, D] is, with `source` [N] of another file: [N]."""
    radius, source = np.zeros(len(x)), np.arange(len(x)) if source is None else source
    for rows in blocks(len(x)):
        squares = squared_distances(x[rows], x)
        squares[source[rows, None] == source] = np.inf
        radius[rows] = np.sqrt(np.partition(squares, k - 1, axis=1)[:, k - 1])
    return radius


class Memorisation(Metric):
    """The share of samples that are suspiciously near to a clip of the training set.

    A sample is suspect if its distance to the nearest training clip is below what 95 % of the
    reference (clips held out from training) show, and the ratio of that distance to the one to
    the nearest reference clip is below the same quantile of the reference's own ratios (each
    reference clip among those of other files). The first alone would blame models that make
    average clips, the second alone those with a reference of near duplicates. `floor` is the share
    of the reference itself, at most 5 %. `details` has every sample's nearest clips, the most
    suspicious first: indices into the sets, distance and ratio.
    """

    group = "Memorisation"
    requires = ("reference", "train")

    def __init__(self, extractor: Extractor, *, key: str = "memorisation"):
        super().__init__(extractor)
        self.key = key

    def figures(self, sets: Sets) -> list[Figure]:
        samples = features(sets, "samples", self.extractor)
        held_out = features(sets, "reference", self.extractor)
        train = features(sets, "train", self.extractor)
        enough(sets, self.key, samples, held_out)
        files = sets.source("reference")
        if len(np.unique(files)) < 2:
            raise ValueError(
                f"{self.key}: all reference clips are of one file, which says nothing of how near "
                "clips come to each other: give more files"
            )

        source, distance = nearest(samples, train)
        neighbour, other = nearest(samples, held_out)
        _, real_distance = nearest(held_out, train)
        ratio = _ratio(distance, other)
        real_ratio = _ratio(real_distance, kth_nearest(held_out, 1, files))

        near, close = (np.quantile(real, QUANTILE) for real in (real_distance, real_ratio))
        if near == 0:
            raise ValueError(
                f"{(real_distance == 0).sum()} of {len(held_out)} reference clips are "
                "training clips: give a reference that is held out"
            )
        suspect = (distance < near) & (ratio < close)
        low, high = mean_interval(suspect, sets.source("samples"), sets)
        first = np.lexsort((distance, ratio))
        common = {
            "better": "lower",
            "n": len(samples),
            "n_reference": len(held_out),
            "extractor": self.extractor.name,
        }
        return [
            Figure(
                key=self.key,
                label="samples suspiciously near to a training clip",
                unit="share",
                value=float(suspect.mean()),
                low=low,
                high=high,
                floor=float(((real_distance < near) & (real_ratio < close)).mean()),
                floor_n=len(held_out),
                notes=[
                    f"{suspect.sum()} of {len(samples)} samples, against {len(train)} training "
                    f"clips; suspect: distance below {near:.4g} and ratio below {close:.4g}",
                    *bootstrapped(low, sets.resamples),
                ],
                details={
                    "sample": first.tolist(),
                    "train": source[first].tolist(),
                    "held_out": neighbour[first].tolist(),
                    "distance": distance[first].tolist(),
                    "ratio": ratio[first].tolist(),
                    "suspect": suspect[first].tolist(),
                },
                **common,
            ),
            Figure(
                key=f"{self.key}_ratio",
                label="distance to the nearest training clip over that to the nearest held-out one",
                value=float(np.median(ratio)),
                floor=float(np.median(real_ratio)),
                floor_n=len(held_out),
                notes=[f"median; {len(train)} training clips, {len(held_out)} held out"],
                **(common | {"better": "higher"}),
            ),
        ]


def _ratio(distance: np.ndarray, other: np.ndarray) -> np.ndarray:
    """One where both are zero: a clip that is in both sets says nothing."""
    tiny = np.finfo(float).tiny
    return (distance + tiny) / (other + tiny)


class PrecisionRecall(Metric):
    """How many samples look real, and how much of what is real the samples cover.

    A set's manifold is the balls around its clips that reach their `k`-th nearest neighbour.
    `precision` is the share of samples on the reference's, `recall` of the reference on the
    samples' (Kynkäänniemi et al. 2019, eq. 2 and 3); `density` counts the reference balls around a
    sample, over k, and `coverage` is the share of them that hold a sample (Naeem et al. 2020, eq. 3
    and 5), which one odd clip with a wide ball cannot raise as it does the former two. Floors are
    what real clips get (`real_clips`).
    """

    group = "Precision and recall"
    uses = ("reference", "real")
    requires = ("reference",)

    def __init__(self, extractor: Extractor, *, k: int = 3, prefix: str = ""):
        super().__init__(extractor)
        self.k, self.prefix = k, prefix

    def figures(self, sets: Sets) -> list[Figure]:
        samples, ours = in_order(sets, "samples", self.extractor)
        reference, theirs = in_order(sets, "reference", self.extractor)
        enough(sets, self.prefix + "precision", samples, reference)
        if min(len(samples), len(reference)) <= self.k:
            raise ValueError(f"precision and recall need more than {self.k} clips of each set")
        pair, how = real_clips(sets, self.extractor, len(samples), self.k + 1)
        floors = pair and self._shares(*pair)
        labels = {
            "precision": "samples among the real clips",
            "recall": "real clips among the samples",
            "density": "real clips around a sample, of those expected",
            "coverage": "real clips with a sample next to them",
        }
        figures = []
        for name, values in self._shares(samples, reference).items():
            source = ours if name in ("precision", "density") else theirs
            low, high = mean_interval(values, source, sets)
            figure = Figure(
                key=self.prefix + name,
                label=labels[name],
                unit="" if name == "density" else "share",
                value=float(values.mean()),
                better="higher",
                low=low,
                high=high,
                n=len(samples),
                n_reference=len(reference),
                floor=floors and float(floors[name].mean()),
                floor_n=pair and len(pair[0]),
                extractor=self.extractor.name,
                notes=[
                    f"k = {self.k}; only figures of the same numbers of clips compare",
                    how,
                    *bootstrapped(low, sets.resamples),
                ],
            )
            figures.append(figure)
        return figures

    def _shares(self, samples, reference):
        """By name, what each sample (precision, density) or reference clip adds to the mean."""
        reach, reach_real = kth_nearest(samples, self.k) ** 2, kth_nearest(reference, self.k) ** 2
        within = np.zeros(len(samples))
        recalled, covered = np.zeros((2, len(reference)), dtype=bool)
        for rows in blocks(len(samples)):
            squares = squared_distances(samples[rows], reference)
            inside = squares <= reach_real
            within[rows] = inside.sum(1)
            covered |= inside.any(0)
            recalled |= (squares <= reach[rows, None]).any(0)
        return {
            "precision": within > 0,
            "recall": recalled,
            "density": within / self.k,
            "coverage": covered,
        }
