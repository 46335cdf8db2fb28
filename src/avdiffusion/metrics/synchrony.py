"""Synchrony as figures of a report: with chance, ceiling, interval and the score's own power."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from avdiffusion.metrics.alignment import (
    LEAST,
    ONSET_F1,
    SCORES,
    Score,
    curves,
    mean_curve,
    moved,
)
from avdiffusion.metrics.events import Events, Onsets
from avdiffusion.metrics.metric import Extractor, Figure, Found, Metric, Sets
from avdiffusion.metrics.power import NEEDED, SHARES, auroc, bootstrapped, interval, pairings
from avdiffusion.metrics.sources import canonical

KEYS = tuple(score.key for score in SCORES)
DRAWS = 4  # shifts of each real clip of which its power is judged
SHIFTS = (0.1, 0.2, 0.5)  # s, for which it is told apart


class Synchrony(Metric):
    """Do picture and sound happen together? The figures are `alignment.SCORES`, or `keys` of them.

    Clips in which a score finds nothing to compare (NaN) are left out and counted. `chance` is
    what the samples get with each other's sound, `ceiling` what the reference gets, `power` how
    well its pairs are told from ones with the sound moved by 25 to 75 % of the clip.
    """

    group = "Synchrony"
    against_real = False

    def __init__(self, extractor: Extractor | None = None, *, keys: Sequence[str] = KEYS):
        super().__init__(extractor or Events())
        unknown = [key for key in keys if key not in KEYS]
        if unknown:
            raise ValueError(f"keys {unknown} are unknown: choose of {', '.join(KEYS)}")
        self.scores = [self._named(score) for score in SCORES if score.key in keys]

    def figures(self, sets: Sets) -> list[Figure]:
        samples, order = _in_order(sets.samples, sets.source("samples"))
        back, real = np.argsort(order), self._real(sets)
        shares = self._shares(samples)
        figures = []
        for score in self.scores:
            figure = _figure(score, samples, real, sets, back)
            details = {**figure.details, **shares}
            if score.measure is curves:
                details |= _lag_curve(samples, sets.seed)
            figures.append(replace(figure, details=details, extractor=self.extractor.name))
        return figures

    def _real(self, sets) -> Found | None:
        """Pairs of picture and sound that belong together."""
        return sets.reference and _in_order(sets.reference, sets.source("reference"))[0]

    def _named(self, score):
        """The score, named after the flow that it looks at."""
        if not score.flow:
            return score
        onsets = "" if score.key == "av_level" else ", own onsets (published with librosa's)"
        label = f"{score.label}: flow by {self.extractor.flow}{onsets}"
        key = score.key if self.extractor.flow == "farneback" else f"{score.key}_difference"
        return replace(score, key=key, label=label)

    def _shares(self, found):
        seen, heard = found["flow"].max(1) >= LEAST, np.isfinite(found["onsets"]).any(1)
        return {
            "share_with_onsets": float(heard.mean()),
            "share_with_motion": float(seen.mean()),
            "share_with_both": float((seen & heard).mean()),
        }


class OnsetF1(Synchrony):
    """Do sounds start when those of the target clips do? For clips that have such a target.

    One to one within 0.1 s, counted over all clips. `chance` is with the targets of other clips,
    `power` how well the targets are told from themselves moved.
    """

    uses = ()

    def __init__(self, extractor: Extractor | None = None):
        Metric.__init__(self, extractor or Onsets())
        self.scores = [ONSET_F1]

    def _real(self, sets):
        pairs = dict(sets.samples, onsets=sets.samples["target"])
        return _in_order(pairs, sets.source("samples"))[0]

    def figures(self, sets: Sets) -> list[Figure]:
        return [replace(figure, ceiling=None, n_reference=None) for figure in super().figures(sets)]

    def _shares(self, found):
        heard, target = (np.isfinite(found[key]).sum(1) for key in ("onsets", "target"))
        both = ONSET_F1.measure(found, found)[:, 0].sum()
        return {
            "share_with_onsets": float((heard > 0).mean()),
            "precision": float(both / max(heard.sum(), 1)),
            "recall": float(both / max(target.sum(), 1)),
            "same_count": float((heard == target).mean()),
        }


def _figure(score: Score, samples: Found, real: Found | None, sets: Sets, back) -> Figure:
    measured = score.measure(samples, samples)
    single = score.singly(measured)
    known = np.flatnonzero(np.isfinite(single))
    value = score.whole(measured)
    low, high = interval(
        lambda draw: score.whole(measured[known[draw]]),
        len(known),
        sets.resamples,
        sets.seed,
        source=samples["source"][known],
    )
    notes, details = [], {"clips": plain(single[back])}
    if len(known) < len(single):
        left = len(single) - len(known)
        notes.append(f"{left} of {len(single)} clips have nothing to compare and are left out")
    notes += bootstrapped(low, sets.resamples)
    chance = ceiling = power = None
    if score.better:
        others = _mismatched(score, samples, sets.seed)
        chance = float(np.nanmean(others)) if np.isfinite(others).any() else None
    if real is None:
        notes.append("no reference: whether it says anything on such data is unknown")
    else:
        ceiling = score.whole(score.measure(real, real))
        told = power_of(score, real, sets)
        power, details = told["power"], details | told
        if not np.isfinite(power):
            notes.append("no real clip has such a number: nothing is known of its power")
        elif power < NEEDED:
            notes.append(
                f"real pairs are told from shifted ones with an AUROC of {power:.2f} only "
                f"({NEEDED:g} is needed): this metric says nothing on this data"
            )
        if chance is not None and ceiling != chance:
            details["lift"] = (value - chance) / (ceiling - chance)
    return Figure(
        key=score.key,
        label=score.label,
        value=value,
        better=score.better,
        unit=score.unit,
        low=low,
        high=high,
        n=len(known),
        n_reference=None if real is None else len(real["seconds"]),
        chance=chance,
        ceiling=ceiling,
        power=power,
        notes=notes,
        details=details,
    )


def power_of(score: Score, real: Found, sets: Sets) -> dict[str, float | None]:
    """How well a score tells real pairs from moved ones, with its interval and by shift."""
    rng = np.random.default_rng(sets.seed)
    num = len(real["seconds"])
    shares = rng.uniform(*SHARES, (DRAWS, num))
    right = score.agreement(real, real)
    wrong = np.stack(
        [score.agreement(real, moved(real, share * real["seconds"])) for share in shares], axis=1
    )
    low, high = interval(
        lambda draw: auroc(right[draw], wrong[draw]),
        num,
        sets.resamples,
        sets.seed,
        source=real["source"],
    )
    told = {"power": auroc(right, wrong), "power_low": low, "power_high": high}
    for seconds in SHIFTS:
        told[f"power_{seconds:g}s"] = auroc(right, score.agreement(real, moved(real, seconds)))
    return told


def _mismatched(score, found, seed):
    orders = pairings(len(found["seconds"]), np.random.default_rng(seed))
    return np.array([score.whole(score.measure(found, _taken(found, order))) for order in orders])


def _lag_curve(found, seed):
    """AVCorr by lag, and the band in which the curves of mismatched sets lie."""
    num, fps = len(found["seconds"]), found["fps"][0]
    curve = mean_curve(curves(found, found))
    orders = pairings(num, np.random.default_rng(seed))
    others = np.array([mean_curve(curves(found, _taken(found, order))) for order in orders])
    lags = (np.arange(len(curve)) - len(curve) // 2) / fps
    drawn = {"lags": plain(lags), "curve": plain(curve)}
    if len(others):
        low, high = np.percentile(others, (2.5, 97.5), axis=0)
        drawn |= {"curve_low": plain(low), "curve_high": plain(high)}
    return drawn


def _in_order(found, source):
    """Clips ordered by content alone, with the file of each as `source`, and that order."""
    columns = np.concatenate([values.reshape(len(values), -1) for values in found.values()], 1)
    order, source = canonical(np.where(np.isnan(columns), np.inf, columns), source)
    return dict(_taken(found, order), source=source), order


def _taken(found, order):
    return {name: values[order] for name, values in found.items()}


def plain(values: np.ndarray) -> list[float | None]:
    """As JSON has it: None for NaN."""
    return [float(value) if np.isfinite(value) else None for value in values]
