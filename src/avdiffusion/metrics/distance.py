"""How far apart two sets of clips are, by their features: Fréchet and kernel distances."""

from collections.abc import Iterator

import numpy as np

from avdiffusion.metrics.features import enough, in_order, real_clips
from avdiffusion.metrics.metric import Extractor, Figure, Metric, Sets
from avdiffusion.metrics.sources import variance

BLOCK = 1024  # rows of a matrix of pairs that are in memory at once
ENOUGH = 2048  # clips of published Fréchet distances

Compared = tuple[float, np.ndarray, np.ndarray]  # a distance and each clip's influence on it


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of [N, D] and [M, D] (1812.01717, eq. 1).

    Covariances are unbiased and everything is float64. With the centred clips A (over sqrt(N - 1))
    and B as rows, the singular values of A B^T are the roots of the eigenvalues of
    S_a^(1/2) S_b S_a^(1/2), so that fewer clips than features need no more than an N x M matrix,
    and no root is taken of a rounding error.
    """
    return _frechet(a, b)[0]


def _frechet(a: np.ndarray, b: np.ndarray) -> Compared:
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    shift = a.mean(0) - b.mean(0)
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    (rows_a, root_a), (rows_b, root_b) = np.linalg.qr(a), np.linalg.qr(b)
    left, values, right = np.linalg.svd(root_a @ root_b.T, full_matrices=False)
    shared_a, shared_b = (rows_a @ left) ** 2 @ values, (rows_b @ right.T) ** 2 @ values
    own_a, own_b = (a**2).sum(1), (b**2).sum(1)
    distance = shift @ shift + own_a.sum() + own_b.sum() - 2 * values.sum()
    influence_a = 2 * np.sqrt(len(a) - 1) * a @ shift + len(a) * (own_a - shared_a)
    influence_b = -2 * np.sqrt(len(b) - 1) * b @ shift + len(b) * (own_b - shared_b)
    return max(float(distance), 0.0), influence_a, influence_b


def kernel(
    a: np.ndarray, b: np.ndarray, *, degree: int = 3, bandwidth: float | None = None
) -> float:
    """Unbiased squared maximum mean discrepancy of [N, D] and [M, D] (Gretton et al. 2012, eq. 3).

    All pairs count, but for a clip with itself. The kernel is (x.y / D + 1)^degree or, given a
    bandwidth s, exp(-|x - y|^2 / (2 s^2)).
    """
    return _kernel(a, b, degree, bandwidth)[0]


def _kernel(a: np.ndarray, b: np.ndarray, degree: int, bandwidth: float | None) -> Compared:
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    n, m = len(a), len(b)

    def likeness(x, y):
        if bandwidth is None:
            return (x @ y.T / x.shape[1] + 1) ** degree
        return np.exp(squared_distances(x, y) / (-2 * bandwidth**2))

    within_a, within_b, across_a, across_b = np.zeros(n), np.zeros(m), np.zeros(n), np.zeros(m)
    for rows in blocks(n):
        within_a[rows] = _without_self(likeness(a[rows], a), rows).sum(1)
        pairs = likeness(a[rows], b)
        across_a[rows] = pairs.sum(1)
        across_b += pairs.sum(0)
    for rows in blocks(m):
        within_b[rows] = _without_self(likeness(b[rows], b), rows).sum(1)
    influence_a = 2 * (within_a / (n - 1) - across_a / m)
    influence_b = 2 * (within_b / (m - 1) - across_b / n)
    return float(influence_a.mean() + influence_b.mean()) / 2, influence_a, influence_b


def blocks(n: int) -> Iterator[slice]:
    """Slices of up to BLOCK rows."""
    return (slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def _without_self(pairs: np.ndarray, rows: slice) -> np.ndarray:
    pairs[np.arange(len(pairs)), np.arange(rows.start, rows.stop)] = 0
    return pairs


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a_i - b_j|^2 of [N, D] and [M, D]: float64 [N, M]."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.maximum(squares, 0)


def median_distance(x: np.ndarray) -> float:
    """The median distance of two of the rows, of at most 2 048 that are spread over all."""
    x = x[:: -(-len(x) // ENOUGH)]
    return float(np.median(np.sqrt(squared_distances(x, x)[np.triu_indices(len(x), 1)])))


class Distance(Metric):
    """A distance between the features of samples and of reference clips, times `scale`.

    Its interval is 1.96 standard errors on either side, those of the bootstrap over the clips of
    both sets to first order in their weights (the infinitesimal jackknife, Efron 1982): clips that
    are drawn twice, as in plain resampling, raise a Fréchet distance and its spread, the latter to
    1.4 to 2 times that of fresh clips. Clips of one file are drawn together. The floor is the
    distance of real clips (`real_clips`).
    """

    group = "Distances"
    uses = ("reference", "real")
    requires = ("reference",)

    def __init__(self, extractor: Extractor, *, key: str, label: str | None, scale: float):
        super().__init__(extractor)
        self.key, self.label, self.scale = key, label or key.upper(), scale

    def figures(self, sets: Sets) -> list[Figure]:
        a, of_a = in_order(sets, "samples", self.extractor)
        b, of_b = in_order(sets, "reference", self.extractor)
        enough(sets, self.key, a, b)
        value, by_a, by_b = self._compare(a, b, b)
        low, high, *notes = self._interval(value, variance(by_a, of_a) + variance(by_b, of_b), sets)
        pair, how = real_clips(sets, self.extractor, len(a))
        floor = pair and self.scale * self._compare(*pair, b)[0]
        scaled = [] if self.scale == 1 else [f"times {self.scale:g}"]
        figure = Figure(
            key=self.key,
            label=self.label,
            value=self.scale * value,
            better="lower",
            low=low,
            high=high,
            n=len(a),
            n_reference=len(b),
            floor=floor,
            floor_n=pair and len(pair[0]),
            extractor=self.extractor.name,
            notes=[*self._notes(a, b), *scaled, how, *notes],
        )
        return [figure]

    def _interval(self, value, variance, sets):
        """Both ends and what they are by; none where a side is of one file."""
        if not sets.resamples or np.isnan(variance):
            return None, None
        reach = 1.96 * np.sqrt(variance)
        low, high = self._bounded(value - reach), value + reach
        return self.scale * low, self.scale * high, "interval: jackknife"

    def _compare(self, a: np.ndarray, b: np.ndarray, reference: np.ndarray) -> Compared:
        raise TypeError(f"{type(self).__name__} compares nothing")

    def _bounded(self, value: float) -> float:
        return value

    def _notes(self, a: np.ndarray, b: np.ndarray) -> list[str]:
        return []


class Frechet(Distance):
    """`frechet` of the extractor's first field: FVD with I3D's logits, FAD with sound features."""

    def __init__(
        self,
        extractor: Extractor,
        *,
        key: str = "fvd",
        label: str | None = None,
        scale: float = 1.0,
    ):
        super().__init__(extractor, key=key, label=label, scale=scale)

    def _compare(self, a, b, reference):
        return _frechet(a, b)

    def _bounded(self, value):
        return max(value, 0.0)

    def _notes(self, a, b):
        notes = ["shrinks as the number of clips grows: only figures of the same numbers compare"]
        if min(len(a), len(b)) < ENOUGH:
            notes.append(f"below {ENOUGH} clips the kernel distance is the main figure")
        return notes


class Kernel(Distance):
    """`kernel` of the extractor's first field, whatever the number of clips without bias.

    `polynomial` is KVD's (1812.01717, section 3), of `degree` 3 if None. `gaussian` is KAD's
    (2502.15602), whose authors' kadtk multiplies by 100 (give scale=100) and takes as bandwidth the
    median distance of 1 000 random pairs of the judged clips; here it is that of all pairs of the
    reference, so that every model is judged by the same kernel.
    """

    def __init__(
        self,
        extractor: Extractor,
        *,
        key: str = "kvd",
        label: str | None = None,
        scale: float = 1.0,
        kernel: str = "polynomial",
        degree: int | None = None,
    ):
        super().__init__(extractor, key=key, label=label, scale=scale)
        if kernel not in ("polynomial", "gaussian"):
            raise ValueError(f"kernel {kernel!r} is unknown: choose polynomial or gaussian")
        if kernel == "gaussian" and degree is not None:
            raise ValueError(f"a gaussian kernel has no degree={degree}: leave it at null")
        self.kernel, self.degree = kernel, degree or 3

    def _compare(self, a, b, reference):
        return _kernel(a, b, self.degree, self._bandwidth(reference))

    def _bandwidth(self, reference):
        if self.kernel == "polynomial":
            return None
        bandwidth = median_distance(reference)
        if bandwidth == 0:
            raise ValueError(f"{self.key}: most of the reference clips have the same features")
        return bandwidth

    def _notes(self, a, b):
        if self.kernel == "polynomial":
            return []
        return [f"bandwidth {self._bandwidth(b):.4g}, the reference's median distance"]
