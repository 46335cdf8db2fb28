"""The mean over clips of numbers that each clip has by itself, with its bootstrap interval."""

import numpy as np

from avdiffusion.metrics.metric import Extractor, Figure, Metric, Sets
from avdiffusion.metrics.power import interval


def mean_interval(values: np.ndarray, sets: Sets) -> tuple[float | None, float | None]:
    """95 % interval of the mean of [N], whatever the order."""
    values = np.sort(values)
    return interval(lambda draw: values[draw].mean(), len(values), sets.resamples, sets.seed)


class Mean(Metric):
    """The mean over clips of each field [N] of the extractor, beside that of the reference.

    What a field is called, its unit and whether "lower" or "higher" is better stands in the
    extractor's `about`, if it has one. Clips without a number (NaN) are left out and counted.
    Figures' keys begin with `prefix`.
    """

    against_real = False

    def __init__(self, extractor: Extractor, *, prefix: str = ""):
        super().__init__(extractor)
        self.prefix = prefix
        self.group = "Against the targets" if extractor.paired else "Clips by themselves"

    def figures(self, sets: Sets) -> list[Figure]:
        return [self._figure(sets, name) for name in self.extractor.fields]

    def _figure(self, sets, name):
        every = np.asarray(sets.samples[name], dtype=np.float64)
        values = every[np.isfinite(every)]
        real = None
        if sets.reference is not None:
            real = np.asarray(sets.reference[name], dtype=np.float64)
            real = real[np.isfinite(real)]
        low, high = mean_interval(values, sets)
        label, unit, better = getattr(self.extractor, "about", {}).get(name, (name, "", ""))
        missing = len(every) - len(values)
        return Figure(
            key=self.prefix + name,
            label=label,
            value=_mean(values),
            better=better,
            unit=unit,
            low=low,
            high=high,
            n=len(values),
            n_reference=None if real is None else len(real),
            ceiling=_mean(real) if real is not None and len(real) else None,
            extractor=self.extractor.name,
            notes=[f"{missing} of {len(every)} clips have no such number"] if missing else [],
        )


def _mean(values):
    return float(np.sort(values).mean()) if len(values) else float("nan")
