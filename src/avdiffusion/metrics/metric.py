"""What a metric is: numbers of every clip by itself, then a comparison of sets of clips.

Clips are arrays, never files: `video` uint8 [B, 3, T, H, W], `audio` float32 [B, C, L] in [-1, 1],
with the rates of both (frames and samples a second).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torchmetrics
from torch import Tensor, distributed

Array = np.ndarray | Tensor
Clips = Mapping[str, Array]
Rates = Mapping[str, float]
Found = dict[str, np.ndarray]

SMALL = 64  # clips below which a distance between distributions says nothing


class Extractor(Protocol):
    """Numbers of each clip by itself: what one gives does not depend on which others came along.

    `name` says in words all that the numbers depend on (network, hash of the weights, sizes,
    filters): found numbers are kept under it, and it stands beside every figure. `needs` are the
    modalities that are looked at. Called with clips and rates it returns `fields`, name to
    [B, ...] of one shape for all clips of a length; NaN where a number has no meaning. If `paired`,
    it is called with a third argument, the clips that those of the same place should be.
    """

    name: str
    needs: tuple[str, ...]
    fields: tuple[str, ...]
    paired: bool

    def __call__(self, clips: Clips, rates: Rates) -> Found: ...


@dataclass(frozen=True, kw_only=True)
class Sets:
    """What an extractor found of several sets of clips, name to [N, ...] each; None: not given.

    `samples` are judged; `reference` are real clips that no model was trained on; `real` are other
    real ones, for the figure that real clips get; `train` are those that the model learned from.
    `sources` are the files that clips are of, a place's name to a number [N] for each clip's file.
    """

    samples: Found
    reference: Found | None = None
    real: Found | None = None
    train: Found | None = None
    sources: Mapping[str, np.ndarray] | None = None  # without a place: a file for each clip of it
    seed: int = 0  # of resampling and of shuffled pairs
    resamples: int = 200  # of the bootstrap; 0: no intervals
    allow_small: bool = False  # fewer clips than SMALL are no error

    def source(self, place: str) -> np.ndarray:
        """The number [N] of the file that each clip of a place is of."""
        given = (self.sources or {}).get(place)
        num = len(next(iter(getattr(self, place).values())))
        return np.arange(num) if given is None else np.asarray(given)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a report, with what is needed to judge it; None where there is no such thing.

    `low`, `high`: 95 % interval over clips; `notes` say by what. `floor` is what real clips get
    against real ones, with `floor_n` of them; `chance` what mismatched pairs get; `ceiling` what
    real pairs get; `power` how well the metric tells real pairs from shifted ones on the reference
    (area under the ROC curve). `better` is "lower", "higher" or "" (neither).
    """

    key: str
    label: str
    value: float
    better: str = ""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    n: int = 0
    n_reference: int | None = None
    floor: float | None = None
    floor_n: int | None = None
    chance: float | None = None
    ceiling: float | None = None
    power: float | None = None
    extractor: str = ""
    notes: Sequence[str] = ()
    details: Mapping[str, object] = field(default_factory=dict)  # plain numbers, lists and texts


class Metric(torchmetrics.Metric):
    """Collects what `extractor` finds of samples and of real clips; `figures` compares the two.

    Used as any torchmetrics metric, `update` and `compute` reduce over processes. Called with
    clips, rates and real clips it gives the scores of just these, on this process alone: the form
    that `val_metrics` have. `targets` are the clips that samples should be, for a paired extractor.
    """

    group = "Figures"  # the heading under which a report shows them
    uses: tuple[str, ...] = ("reference",)  # fields of Sets read besides samples, where given
    requires: tuple[str, ...] = ()  # fields of Sets without which there is no figure
    against_real = True  # as one of `val_metrics`: called with real clips too
    full_state_update = False

    def __init__(self, extractor: Extractor):
        super().__init__(dist_sync_fn=_of_every_process)
        self.extractor = extractor
        for place in ("samples", "reference"):
            for name in extractor.fields:
                self.add_state(f"{place}_{name}", default=[], dist_reduce_fx="cat")

    def figures(self, sets: Sets) -> list[Figure]:
        """The figures of a report."""
        raise TypeError(f"{type(self).__name__} has no figures")

    def update(
        self, clips: Clips, rates: Rates, *, real: bool = False, targets: Clips | None = None
    ) -> None:
        """Takes in more samples, or more `real` clips."""
        place = "reference" if real else "samples"
        for name, values in self.find(clips, rates, targets).items():
            getattr(self, f"{place}_{name}").append(torch.as_tensor(values))

    def compute(self) -> dict[str, float]:
        """The value of each figure by its key, over all clips of all processes."""
        places = {place: self._collected(place) for place in ("samples", "reference")}
        if places["samples"] is None:
            raise ValueError(f"{type(self).__name__} was given no samples")
        return self._values(Sets(**places, resamples=0))

    def forward(
        self,
        clips: Clips,
        rates: Rates,
        real: Clips | None = None,
        *,
        targets: Clips | None = None,
    ) -> dict[str, float]:
        """The value of each figure for these clips, few as they may be.

        What `update` collected is left alone.
        """
        reference = None if real is None else self.find(real, rates)
        return self.values(self.find(clips, rates, targets), reference)

    def find(self, clips: Clips, rates: Rates, targets: Clips | None = None) -> Found:
        """What the extractor finds of clips, which should be `targets`, or like nothing at all."""
        if not self.extractor.paired:
            return self.extractor(clips, rates)
        if targets is None:
            raise ValueError(
                f"{type(self.extractor).__name__} compares each clip with the one it should be, "
                "which only a model that makes clips of others has: leave it out, or use "
                "evaluate.py target=DIR"
            )
        return self.extractor(clips, rates, targets)

    def values(self, samples: Found, reference: Found | None = None) -> dict[str, float]:
        """The value of each figure of what was found, of however few clips."""
        return self._values(
            Sets(samples=samples, reference=reference, resamples=0, allow_small=True)
        )

    def _values(self, sets):
        return {figure.key: figure.value for figure in self.figures(sets)}

    def _collected(self, place):
        found = {}
        for name in self.extractor.fields:
            parts = getattr(self, f"{place}_{name}")
            parts = [parts] if isinstance(parts, Tensor) else parts  # once reduced
            if not parts:
                return None
            found[name] = torch.cat(list(parts)).cpu().numpy()
        return found


class Findings:
    """Clips with their rates, and what extractors found of them: each name looks at them once.

    `targets` are the clips that they should be, if there are such.
    """

    def __init__(self, clips: Clips, rates: Rates, targets: Clips | None = None):
        self.clips, self.rates, self.targets, self._found = clips, rates, targets, {}

    def __call__(self, metric: Metric) -> Found:
        """What the extractor of a metric found."""
        name = metric.extractor.name
        if name not in self._found:
            self._found[name] = metric.find(self.clips, self.rates, self.targets)
        return self._found[name]


def _of_every_process(x: Tensor, group: object | None = None) -> list[Tensor]:
    """Torchmetrics' own exchange wants the same axes of all: a process without clips has none."""
    found = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, x.cpu(), group=group)
    return found
