"""Features of sets of clips as distances and manifolds take them: checked and ordered."""

import numpy as np

from avdiffusion.metrics.metric import SMALL, Extractor, Sets
from avdiffusion.metrics.sources import canonical, halves

WHAT = {"samples": "sample", "train": "training"}  # clips are of a place, for people


def features(sets: Sets, place: str, extractor: Extractor) -> np.ndarray:
    """The extractor's first field of the clips of a place, finite: float64 [N, D]."""
    found, what = getattr(sets, place), WHAT.get(place, place)
    if found is None:
        raise ValueError(f"no {what} clips were given to compare by {extractor.name}")
    x = np.asarray(found[extractor.fields[0]], dtype=np.float64)
    x = x.reshape(len(x), -1)
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        first = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise ValueError(
            f"{len(bad)} of {len(x)} {what} clips gave NaN or infinity ({extractor.name}): "
            f"look at clips {first} and leave broken ones out"
        )
    return x


def in_order(sets: Sets, place: str, extractor: Extractor) -> tuple[np.ndarray, np.ndarray]:
    """The features of a place and the file of each clip, both ordered by content alone."""
    x = features(sets, place, extractor)
    order, source = canonical(x, sets.source(place))
    return x[order], source


def enough(sets: Sets, key: str, samples: np.ndarray, reference: np.ndarray) -> None:
    """Refuses sets so small that a distance between them says nothing."""
    least = 2 if sets.allow_small else SMALL
    if min(len(samples), len(reference)) < least:
        remedy = "give more" if sets.allow_small else "give more, or say allow_small=true"
        raise ValueError(
            f"{key} of {len(samples)} samples against {len(reference)} reference clips says "
            f"nothing: below {least} on either side it is mostly noise; {remedy}"
        )


def real_clips(
    sets: Sets, extractor: Extractor, n: int, least: int = 2
) -> tuple[tuple[np.ndarray, np.ndarray] | None, str]:
    """Two sets of real clips, None if one has fewer than `least`; and how they were made.

    They are n of `real` and the reference, else halves of the latter, of up to n clips, that have
    no file in common: clips of one file are so alike that they would say little of the floor.
    """
    reference, source = in_order(sets, "reference", extractor)
    rng = np.random.default_rng(sets.seed)
    if sets.real is not None:
        real, _ = in_order(sets, "real", extractor)
        pair = real[rng.permutation(len(real))[:n]], reference
        note = f"floor: {len(pair[0])} other real clips"
    else:
        one, other = halves(source, n, rng)
        pair = reference[one], reference[other]
        note = "floor: halves of the reference, files apart"
    if min(map(len, pair)) < least:
        return None, "no floor: real clips are too few, or all of one file"
    return pair, note
