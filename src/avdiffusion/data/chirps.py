"""Procedural sounds like those of birds, with captions that are true."""

from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from avdiffusion.data.clips import levelled
from avdiffusion.data.shapes import generator
from avdiffusion.io import pcm16

# What the words mean, [low, high]; between two words of a kind lies a gap, so that none is a guess.
PITCH = {"low": (1500, 2300), "middle": (2700, 3600), "high": (4200, 6000)}  # Hz
PACE = {"slow": (0.5, 1.0), "fast": (1.8, 3.0)}  # notes a second
SWING = {  # Hz from the lowest to the highest of a note, and how often a second it goes there
    "whistling": ((200, 400), (3, 5)),
    "trilling": ((900, 1500), (9, 15)),
}


class Song(NamedTuple):
    """What is sung: frequency(t) = pitch + swing / 2 cos(2 pi rate t + phase), in notes."""

    text: str
    pitch: float  # Hz
    pace: float  # notes a second
    swing: float  # Hz
    rate: float  # Hz
    phase: float
    note: float  # s, the middle of a note
    place: float  # 0 left, 1 right


class Chirps(Dataset):
    """Songs of one bird each, and what is heard in words; a function of (seed, index) alone.

    Items: `audio` int16 [C, L], `text`, one of `captions()`, each as often as any other, and
    `index`. A whistle of `pitch` 1.5 to 6 kHz swings by 200 to 1500 Hz, 3 to 15 times a second, in
    0.5 to 3 notes a second, whose pauses are as long as they are; every clip has part of a note.
    In stereo the bird sits anywhere between left and right.
    `loudness` is the RMS level of a clip in dB of full scale.
    """

    def __init__(
        self,
        *,
        num: int = 10000,
        seed: int = 0,
        sample_rate: int = 48000,
        samples: int = 262144,
        channels: int = 2,
        loudness: float = -20.0,
    ):
        top = PITCH["high"][1] + SWING["trilling"][0][1] / 2
        if sample_rate < 2 * top:
            raise ValueError(
                f"sample_rate={sample_rate} is too low for songs of up to {top:g} Hz: "
                f"{2 * top:g} is enough"
            )
        if channels not in (1, 2):
            raise ValueError(f"channels is 1 or 2, not {channels}")
        self.num, self.seed, self.loudness = num, seed, loudness
        self.sample_rate, self.samples, self.channels = sample_rate, samples, channels

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Tensor | str | int]:
        song = self.song(index)
        audio = pcm16(levelled(self._sound(song), self.loudness))
        return {"audio": torch.from_numpy(audio), "text": song.text, "index": index}

    def captions(self) -> list[str]:
        """All texts there are."""
        return [caption(*words) for words in product(PITCH, PACE, SWING)]

    def song(self, index: int) -> Song:
        """What the clip of this number holds."""
        rng = generator(self.seed, index, self.num)
        pitch, pace, manner = (
            list(words)[rng.integers(len(words))] for words in (PITCH, PACE, SWING)
        )
        return Song(
            text=caption(pitch, pace, manner),
            pitch=rng.uniform(*PITCH[pitch]),
            pace=rng.uniform(*PACE[pace]),
            swing=rng.uniform(*SWING[manner][0]),
            rate=rng.uniform(*SWING[manner][1]),
            phase=rng.uniform(0, 2 * np.pi),
            note=rng.uniform(0, self.samples / self.sample_rate),
            place=rng.uniform(0, 1),
        )

    def _sound(self, song):
        """The song, float32 [C, L]."""
        t = np.arange(self.samples) / self.sample_rate
        turn = 2 * np.pi * song.rate * t + song.phase
        wave = np.sin(2 * np.pi * song.pitch * t + song.swing / (2 * song.rate) * np.sin(turn))
        # a note has soft edges, a tenth of its time long
        gate = np.clip(0.5 + 3 * np.cos(2 * np.pi * song.pace * (t - song.note)), 0, 1)
        wave *= gate * gate * (3 - 2 * gate)
        angle = np.pi / 2 * song.place
        sides = (np.cos(angle), np.sin(angle)) if self.channels == 2 else (1,)
        return np.outer(sides, wave).astype(np.float32)


def caption(pitch: str, pace: str, manner: str) -> str:
    """The sentence of three words."""
    return f"a {pitch} {pace} {manner} bird"
