"""Clips of one file are like each other: files stay whole in whatever is drawn, split or summed.

Of N clips `source` [N] holds the number of the file that each is of; what the numbers are means
nothing.
"""

import numpy as np


def groups(source: np.ndarray) -> list[np.ndarray]:
    """Indices of the clips of each file, files in the order of their numbers."""
    order = np.argsort(source, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(source[order])) + 1)


def canonical(x: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order [N] of the rows of [N, D], and the files of rows so ordered, numbered from 0.

    Both depend on content alone, so that what is drawn does not depend on the order of clips, nor
    on how files are numbered.
    """
    order = np.lexsort(x.T[::-1])
    x, source = x[order], source[order]
    rank = np.cumsum(np.append(False, (x[1:] != x[:-1]).any(1)))[: len(x)]  # of equal rows one
    number = np.empty(len(x), dtype=int)
    for k, rows in enumerate(sorted(groups(source), key=lambda rows: tuple(rank[rows]))):
        number[rows] = k
    again = np.lexsort((number, rank))
    return order[again], number[again]


def halves(source: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two sets of clips that have no file in common, as many in both and n at most."""
    sides, files = ([], []), groups(source)
    for k in rng.permutation(len(files)):
        min(sides, key=len).extend(files[k])
    n = min(n, *map(len, sides))
    one, other = (rng.permutation(np.array(side, dtype=int))[:n] for side in sides)
    return one, other


def variance(values: np.ndarray, source: np.ndarray) -> float:
    """Of the mean of [N] numbers, of which those of different files are independent.

    The square of each file's sum about the mean, so that it is var / N if each clip has a file of
    its own; NaN of a single file.
    """
    sums = np.array([(values - values.mean())[rows].sum() for rows in groups(source)])
    return float((sums**2).sum() / len(values) ** 2) if len(sums) > 1 else float("nan")
