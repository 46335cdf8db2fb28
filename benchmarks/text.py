"""Whether a text decides what is made: samples of captions, heard by a classifier of real sounds.

python benchmarks/text.py ckpt=RUN_FOLDER data=SOUNDS captions=FILE.csv
python benchmarks/text.py ckpt=last data=SOUNDS captions=FILE.csv num=8 "scales=[1,3]" json=out.json

Classes are the captions that at least `files` files have. The classifier takes the nearest mean of
a class, of features in units of their deviation within the classes; it knows real windows, or such
after the codec, whose decoder leaves its mark on all that it makes. A sample is right where that is
the class of its caption. Beside it: the same samples against captions that are shuffled, which is
chance, and what the classifier knows, each window by the means of the other files.
"""

import json
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from machine import processor
from omegaconf import OmegaConf

from avdiffusion import checkpoint
from avdiffusion.callbacks.held_out import conditional, remakes
from avdiffusion.data.captions import Captioned, is_pause
from avdiffusion.data.clips import Clips
from avdiffusion.diffusion.guide import ClassifierFree
from avdiffusion.diffusion.noise import Noise
from avdiffusion.media import Media
from avdiffusion.metrics.tflite import BirdNET, YAMNet
from avdiffusion.weights import MissingWeights
from avdiffusion.writer import write_whole

DEFAULTS = {
    "ckpt": "???",
    "data": "???",
    "captions": None,
    "column": "caption",
    "files": 6,  # that a caption has at least
    "num": 8,  # samples of each caption
    "scales": None,  # of guidance; null: none, and the checkpoint's own
    "features": ["mel", "yamnet"],  # or birdnet
    "shuffles": 1000,
    "micro_batch": 8,
    "seed": 0,
    "device": None,
    "trust": False,
    "json": None,
}
BANDS, RANGE = 40, 80.0  # mel bands, and dB below the loudest at which a band is silent


def mel_statistics(clips, rates):
    """Mean, deviation and mean change over time of each band's level: [N, 3 BANDS], in dB."""
    wave, rate = clips["audio"].double().mean(1), rates["audio"]
    size = 2 ** round(np.log2(0.064 * rate))
    window = torch.hann_window(size, dtype=wave.dtype)
    power = torch.stft(wave, size, size // 4, window=window, return_complex=True).abs().square()
    level = 10 * torch.einsum("bf,nft->nbt", mel_bands(size, rate), power).clamp(min=1e-12).log10()
    level = level.clamp(min=level.amax((1, 2), keepdim=True) - RANGE)
    level = level - level.mean((1, 2), keepdim=True)  # loudness says nothing of a kind of sound
    found = level.mean(2), level.std(2), level.diff(dim=2).abs().mean(2)
    return torch.cat(found, dim=1).numpy()


def mel_bands(size, rate):
    """Triangular weights [BANDS, size / 2 + 1] that are evenly spaced on the mel scale."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    knots = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    frequency = np.fft.rfftfreq(size, 1 / rate)
    rise = (frequency - knots[:-2, None]) / np.diff(knots)[:-1, None]
    fall = (knots[2:, None] - frequency) / np.diff(knots)[1:, None]
    return torch.from_numpy(np.minimum(rise, fall).clip(0))


def embedded(extractor, clips, rates):
    return extractor(clips, rates)["embedding"]


FEATURES = {
    "mel": mel_statistics,
    "yamnet": partial(embedded, YAMNet()),
    "birdnet": partial(embedded, BirdNET()),
}


class Nearest:
    """The nearest mean of a class, features [N, D] being in units of their deviation within."""

    def __init__(self, features, labels):
        self.classes = np.unique(labels)
        means = np.stack([features[labels == k].mean(0) for k in self.classes])
        within = features - means[np.searchsorted(self.classes, labels)]
        spread = within.std(0)
        self.deviation = np.maximum(spread, 1e-3 * spread.mean())  # one may be dead
        self.means = means / self.deviation

    def __call__(self, features):
        """The class of each: [N]."""
        apart = (features / self.deviation)[:, None] - self.means
        return self.classes[np.square(apart).sum(2).argmin(1)]


def left_out(features, labels, sources):
    """The share of real windows that are told right by what is known of the other files."""
    right = np.zeros(len(labels), dtype=bool)
    for source in np.unique(sources):
        own = sources == source
        right[own] = Nearest(features[~own], labels[~own])(features[own]) == labels[own]
    return float(right.mean())


def shuffled(found, labels, times, seed):
    """Mean and 99th percentile of the share that is right by chance."""
    rng = np.random.default_rng(seed)
    shares = [(found == rng.permutation(labels)).mean() for _ in range(times)]
    return float(np.mean(shares)), float(np.quantile(shares, 0.99))


def real_windows(system, config):
    """Windows as the model learns from, of captions with enough files: clips, texts, files."""
    trained = system.config["data"]
    clips = Clips(
        config.data,
        val_fraction=0,
        modalities=["audio"],
        on_bad="skip",
        loudness=trained["train"]["clips"].get("loudness"),
        **{name: trained[name] for name in ("sample_rate", "samples", "channels")},
    )
    data = Captioned(clips, captions=config.captions, column=config.column, on_missing="skip")
    first = {file: texts[0] for file, texts in data.texts.items()}
    often = {text for text, count in Counter(first.values()).items() if count >= config.files}
    if len(often) < 2:
        raise ValueError(
            f"{len(often)} captions of {config.data} have {config.files} files, and a choice is "
            "between two at least: set files="
        )
    found = []
    for k, (number, _) in enumerate(clips.windows):
        text = first.get(clips.files[number])
        if text in often and not is_pause(clips[k]):
            found.append((clips[k]["audio"], text, number))
    audio, texts, files = zip(*found, strict=True)
    return {"audio": torch.stack(audio).float() / 32768}, np.array(texts), np.array(files)


def made(system, texts, config, scale):
    """Samples of the texts in turn."""
    guides = [g for g in system.guides if not isinstance(g, ClassifierFree)]
    parts = system.samples(
        range(len(texts)),
        seed=config.seed,
        micro_batch=config.micro_batch,
        guides=[*guides, ClassifierFree(scale=scale)],
        told=lambda numbers: {"text": [texts[i] for i in numbers]},
    )
    return {"audio": torch.cat([part.clips["audio"] for part in parts])}


@torch.no_grad()
def decoded(system, clips, config):
    """The clips after they were encoded and decoded."""
    audio, made = clips["audio"].to(system.device), []
    for places in torch.arange(len(audio)).split(config.micro_batch):
        latent = system.codec.encode(Media({"audio": audio[places]}))
        noise = Noise(config.seed, places.tolist())
        made.append(system.codec.decode(latent, noise)["audio"].cpu())
    return {"audio": torch.cat(made)[..., : audio.shape[-1]]}


def measure(system, config):
    """A row for each scale and kind of feature."""
    real, labels, files = real_windows(system, config)
    captions = np.unique(labels)
    texts = np.tile(captions, config.num)
    own = [g.scale for g in system.guides if isinstance(g, ClassifierFree)]
    heard = {}
    for kind, clips in {"real": real, "decoded": decoded(system, real, config)}.items():
        for name in config.features:
            features = FEATURES[name](clips, system.rates)
            known = left_out(features, labels, files)
            heard[name, kind] = Nearest(features, labels), known
    rows = []
    for scale in config.scales or sorted({1.0, *own}):
        start = time.perf_counter()
        clips = made(system, texts.tolist(), config, scale)
        seconds = (time.perf_counter() - start) / len(texts)
        features = {name: FEATURES[name](clips, system.rates) for name in config.features}
        for (name, kind), (nearest, known) in heard.items():
            found = nearest(features[name])
            chance, most = shuffled(found, texts, config.shuffles, config.seed)
            right = found == texts
            row = {"features": name, "knows": kind, "scale": scale, "right": float(right.mean())}
            row |= {"shuffled": chance, "shuffled_99": most, "held_out": known, "seconds": seconds}
            row["each"] = {text: float(right[texts == text].mean()) for text in captions.tolist()}
            rows.append(row)
    return {"windows": len(labels), "captions": captions.tolist(), "rows": rows}


def table(rows):
    """As Markdown: shares of samples, or of real windows, that are told right."""
    names = [name for name in rows[0] if name != "each"]
    lines = [names, ["---"] * len(names)]
    lines += [[v if isinstance(v := row[n], str) else f"{v:.3g}" for n in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(words=None):
    config = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli(sys.argv[1:] if words is None else words))
    path = checkpoint.find(config.ckpt)
    system = checkpoint.load(path, trust=config.trust, device=config.device)
    if remakes(system) or not conditional(system):
        raise SystemExit(f"error: {path} is told no text")
    try:
        found = measure(system, config)
    except (MissingWeights, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(table(found["rows"]))
    if config.json:
        about = {"machine": f"{processor()}, {torch.get_num_threads()} threads", "ckpt": str(path)}
        text = json.dumps({**about, **OmegaConf.to_container(config), **found}, indent=1)
        write_whole(Path(config.json), text.encode())


if __name__ == "__main__":
    main()
