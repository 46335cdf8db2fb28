"""What is said of samples while training, beside what is said of clips that they are judged by."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from avdiffusion.callbacks.held_out import Beside
from avdiffusion.callbacks.loggers import Once
from avdiffusion.gallery import score_rows
from avdiffusion.metrics.metric import Clips, Findings, Metric, Rates
from avdiffusion.writer import pixels, sound

# What a metric may fail with without ending the training that it watches.
FAILURES = (ValueError, RuntimeError, ArithmeticError, LookupError, TypeError, AttributeError)

Scorer = Callable[[Clips, Rates], Mapping[str, float]]


class Scores:
    """The scores of samples by `metrics`, and those of others, which are kept.

    Others are the first `real_num` validation clips; where something is `beside` the samples, it is
    the targets and the baseline. See `callbacks.samples.SampleClips` for the names of scores.
    """

    def __init__(self, metrics: Mapping[str, Scorer], *, real_num: int, once: Once):
        for name, metric in metrics.items():
            if not callable(metric):
                raise ValueError(f"val_metrics.{name}={metric!r} cannot be called (clips, rates)")
        self.metrics, self.real_num, self.once = dict(metrics), real_num, once
        self.beside, self.reference = None, None  # real clips and what was found of them
        self.real, self.baseline = None, {}

    def __call__(
        self, clips: Clips, rates: Rates, data: Dataset | None, beside: Beside | None
    ) -> dict[str, float]:
        """Of samples as arrays, where `data` are validation clips."""
        if beside is not self.beside:
            self.beside, self.real = beside, None
        targets = arrays(beside.targets) if beside else None
        first = self.real is None and bool(self.metrics)
        if first:
            real = targets or self._real_clips(data, clips)
            self.reference, self.real = Findings(real, rates) if real else None, {}
        scores = self._scores(self.metrics, Findings(clips, rates, targets))
        if first and self.reference:
            alone = {k: m for k, m in self.metrics.items() if not _compares(m)}
            self.real = self._scores(alone, self.reference)
        if first and beside:
            plain = Findings(arrays(beside.baseline), rates, targets)
            self.baseline = self._scores(self.metrics, plain)
        return scores | _named("real", self.real or {}) | _named("baseline", self.baseline)

    def rows(self, scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Those of the samples that there are others beside, as a table."""
        return score_rows(scores, self.real, self.baseline)

    def _real_clips(self, data, clips):
        with self.once("validation clips cannot be measured", *FAILURES):
            items = [data[i] for i in range(min(len(data or ()), self.real_num))]
            stacked = {k: [torch.as_tensor(i[k]) for i in items] for k in clips}
            return arrays({k: torch.stack(v) for k, v in stacked.items() if v})

    def _scores(self, metrics, found):
        scores = {}
        for name, metric in metrics.items():
            with self.once(f"val_metrics.{name} failed", *FAILURES):
                scores |= {key: float(value) for key, value in self._called(metric, found).items()}
        return scores

    def _called(self, metric, found):
        real = [self.reference] if _against_real(metric) else []
        if isinstance(metric, Metric):
            return metric.values(found(metric), *(each and each(metric) for each in real))
        return metric(found.clips, found.rates, *(each and each.clips for each in real))


def arrays(media: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """What the files hold: video as uint8, audio within [-1, 1]."""
    kinds = {"video": pixels, "audio": sound}
    return {name: kinds[name](value) for name, value in media.items() if name in kinds}


def _named(end, scores):
    kept = {k: v for k, v in scores.items() if not k.endswith("_mismatched")}
    return {f"{key}_{end}": value for key, value in kept.items()}


def _against_real(metric):
    return getattr(metric, "against_real", False)


def _compares(metric):
    """Whether clips by themselves have no such number."""
    return _against_real(metric) or (isinstance(metric, Metric) and metric.extractor.paired)
