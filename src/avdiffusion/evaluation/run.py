"""An evaluation: sets of clips measured once, then compared by every metric."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import distributed
from tqdm import tqdm

from avdiffusion.evaluation.features import Features
from avdiffusion.evaluation.form import Form
from avdiffusion.evaluation.sets import ClipSet, Files
from avdiffusion.metrics.metric import Figure, Found, Metric, Rates, Sets

# The sets an evaluation may have, besides the target of paired metrics.
PLACES = ("samples", "reference", "real", "train")
SAID = {
    "reference": "real clips to compare with: reference=DIR",
    "train": "the clips the model has learned from: train=DIR",
}


def checked(
    metrics: Mapping[str, Metric], sets: Mapping[str, ClipSet], target: ClipSet | None, rates: Rates
) -> None:
    """Raises ValueError for a metric that cannot be had of these sets, with the remedy."""
    for name, metric in metrics.items():
        lacking = [need for need in metric.extractor.needs if need not in rates]
        if lacking:
            raise ValueError(
                f"metrics.{name} looks at {' and '.join(metric.extractor.needs)}, and these clips "
                f"have no {lacking[0]}: leave it out"
            )
        if metric.extractor.paired and target is None:
            raise ValueError(
                f"metrics.{name} compares each sample with the clip it should be: give a folder of "
                "clips of the same names with target=DIR, or leave it out"
            )
        for place in metric.requires:
            if place not in sets:
                raise ValueError(f"metrics.{name} needs {SAID[place]}")


def measured(
    metrics: Mapping[str, Metric],
    sets: Mapping[str, ClipSet],
    rates: Rates,
    folder: Path,
    *,
    target: ClipSet | None = None,
    rank: int = 0,
    world: int = 1,
) -> dict[str, dict[str, Found]]:
    """What the metrics' extractors find of each set: place to extractor's name to numbers.

    Processes share the batches and all wait for the last; what is in `folder` is taken from there.
    """
    features = {}
    for place, clips in sets.items():
        extractors = [metric.extractor for metric in metrics.values() if looks(metric, place)]
        if place != "samples":
            extractors = [each for each in extractors if not each.paired]
        if extractors:
            against = target if place == "samples" else None
            features[place] = Features(clips, extractors, rates, folder, target=against)
    missing = {place: each.missing() for place, each in features.items()}
    if world > 1:
        distributed.barrier()  # none has begun before all have looked
    total = sum(len(features[place].batches[k]) for place, each in missing.items() for k in each)
    with tqdm(total=total, unit="clip", disable=None if total and not rank else True) as bar:

        def progress(count: int) -> None:
            bar.update(min(count * world, total - bar.n))

        for place, each in missing.items():
            bar.set_description(f"measuring {place}")
            features[place].find(each[rank::world], progress)
    if world > 1:
        distributed.barrier()
    return {place: each.all() for place, each in features.items()}


def looks(metric: Metric, place: str) -> bool:
    """Whether a metric reads a set."""
    return place == "samples" or place in (*metric.uses, *metric.requires)


def figures(
    metrics: Mapping[str, Metric],
    found: Mapping[str, Mapping[str, Found]],
    sets: Mapping[str, ClipSet],
    **options: object,
) -> list[tuple[str, list[Figure]]]:
    """Each heading with the figures under it, in the order in which metrics first name it."""
    groups: dict[str, list[Figure]] = {}
    sources = {place: labels(clips) for place, clips in sets.items()}
    for name, metric in tqdm(metrics.items(), desc="comparing", unit="metric", disable=None):
        own = {
            place: found[place][metric.extractor.name]
            for place in PLACES
            if looks(metric, place) and metric.extractor.name in found.get(place, {})
        }
        try:
            rows = metric.figures(Sets(**own, sources=sources, **options))
        except ValueError as error:
            raise ValueError(f"metrics.{name}: {error}") from error
        groups.setdefault(metric.group, []).extend(rows)
    return list(groups.items())


def labels(clips: ClipSet) -> np.ndarray:
    """A number for every clip, the same for those of one source."""
    return np.unique(clips.sources, return_inverse=True)[1]


def targets(root: str | Path, form: Form, samples: ClipSet, **options: object) -> Files:
    """Of each sample the same stretch of the file of its name, whatever that file's suffix."""
    if not form.modalities:
        raise ValueError(
            "these metrics look at nothing that the samples have: of sounds, "
            '"metrics=[stft]" compares with a target, of videos "metrics=[restoration,lpips]"'
        )
    every = Files(root, form, silent=True, **options)
    files = {place: path for path, (place, _) in zip(every.sources, every.places, strict=True)}
    lost = [
        name
        for name, (place, _) in zip(samples.names, samples.places, strict=True)
        if place not in files
    ]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(samples.names)} samples have no clip of their name in {root}, "
            f"such as {lost[0]}"
        )
    windows = [(files[place], every.begin(files[place]) + late) for place, late in samples.places]
    return Files(root, form, windows=windows, silent=True, **options)
