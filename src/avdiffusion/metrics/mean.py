"""The mean over clips of numbers that each clip has by itself, with its bootstrap interval."""

import numpy as np

from avdiffusion.metrics.metric import Extractor, Figure, Metric, Sets
from avdiffusion.metrics.power import bootstrapped, interval
from avdiffusion.metrics.sources import canonical


def mean_interval(
    values: np.ndarray, source: np.ndarray, sets: Sets
) -> tuple[float | None, float | None]:
    """95 % interval of the mean of [N] numbers of clips of the files [N], whatever the order."""
    order, source = canonical(values[:, None], source)
    values = values[order]
    return interval(
        lambda draw: values[draw].mean(), len(values), sets.resamples, sets.seed, source=source
    )


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
        self.uses = () if extractor.paired else Metric.uses

    def figures(self, sets: Sets) -> list[Figure]:
        return [self._figure(sets, name) for name in self.extractor.fields]

    def _figure(self, sets, name):
        every = np.asarray(sets.samples[name], dtype=np.float64)
        known = np.isfinite(every)
        values = every[known]
        real = None
        if sets.reference is not None:
            real = np.asarray(sets.reference[name], dtype=np.float64)
            real = real[np.isfinite(real)]
        low, high = mean_interval(values, sets.source("samples")[known], sets)
        label, unit, better = getattr(self.extractor, "about", {}).get(name, (name, "", ""))
        missing = len(every) - len(values)
        notes = [f"{missing} of {len(every)} clips have no such number"] if missing else []
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
            notes=notes + bootstrapped(low, sets.resamples),
        )


def _mean(values):
    return float(np.sort(values).mean()) if len(values) else float("nan")
