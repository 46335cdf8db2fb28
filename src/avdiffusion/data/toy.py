"""Procedural clips whose picture and sound are bound by a known rule; nothing is read from disk."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

KINDS = ("bounce", "flash", "pitch", "loudness")
PALETTE = np.array(  # saturated and 60 degrees of hue apart, so that hue alone tells discs apart
    [[255, 40, 40], [255, 235, 40], [50, 240, 60], [40, 230, 255], [70, 80, 255], [255, 60, 235]],
    dtype=np.float32,
)
CANDIDATES = 48  # start states tried per clip
MAX_EVENTS = 16  # length of the padded "events" of an item


class Scene(NamedTuple):
    """What a clip shows: discs over time, in pixels; and when which sound starts."""

    centre: np.ndarray  # [K, T, 2] as (x, y)
    light: np.ndarray  # [K, T] opacity in [0, 1]
    radius: np.ndarray  # [K]
    colour: np.ndarray  # [K] rows of PALETTE
    events: np.ndarray  # [N] seconds, ascending
    pitch: np.ndarray  # [N] in [0, 1], low to high


class Toy(Dataset):
    """Clips of coloured discs with the sound they make, a function of (seed, index) alone.

    `bounce`: discs run straight and bounce off the walls, each impact clicks (pitch by disc
    colour or by wall); `flash`: a disc flashes and beeps; `pitch`: a tone's pitch follows the
    disc's height; `loudness`: a tone's loudness follows the disc's speed. Items hold `video`
    uint8 [3, T, H, W], `audio` float32 [C, L] in [-1, 1], `events` float32 [16] (seconds, padded
    with NaN) and `index`. Frame k shows the instant k / fps.

    `rate` is the mean number of events a second (at least one a clip); None is 0.07 fps, where
    a mismatched pair agrees within one frame in about one event of six. `radius` is a share of
    the shorter side, `speed` multiplies a pace at which the wanted number of impacts is common,
    `colours` is how many of the six hues are used, `click` the length of a click in seconds.
    """

    def __init__(
        self,
        *,
        num: int = 10000,
        seed: int = 0,
        kind: str = "bounce",
        fps: float = 10,
        frames: int = 16,
        size: Sequence[int] = (32, 32),
        sample_rate: int = 16000,
        samples: int = 25600,
        channels: int = 1,
        discs: int = 1,
        pitch: str = "disc",
        rate: float | None = None,
        radius: Sequence[float] = (0.14, 0.18),
        speed: Sequence[float] = (0.8, 1.3),
        colours: int = 6,
        background: str = "varied",
        click: float = 0.08,
        noise: float = 0.0,
    ):
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is unknown: choose one of {', '.join(KINDS)}")
        if len(size) != 2 or any(n < 1 or n != int(n) for n in size):
            raise ValueError(f"size {list(size)} must be [height, width], two positive integers")
        for name, value, least in (
            ("num", num, 1),
            ("frames", frames, 2),
            ("channels", channels, 1),
        ):
            if value < least:
                raise ValueError(f"{name} {value} must be at least {least}")
        if fps <= 0 or sample_rate <= 0:
            raise ValueError(f"fps {fps} and sample_rate {sample_rate} must be positive")
        if samples != round(sample_rate * frames / fps):
            raise ValueError(
                f"samples {samples} at {sample_rate} Hz last {samples / sample_rate:.4f} s but "
                f"{frames} frames at {fps} fps last {frames / fps:.4f} s: "
                f"set samples to {round(sample_rate * frames / fps)}"
            )
        if pitch not in ("disc", "wall"):
            raise ValueError(f"pitch {pitch!r} is unknown: choose disc or wall")
        if background not in ("plain", "varied"):
            raise ValueError(f"background {background!r} is unknown: choose plain or varied")
        if not 1 <= colours <= len(PALETTE):
            raise ValueError(f"colours {colours} must be 1 to {len(PALETTE)}")
        if not 1 <= discs <= colours:
            raise ValueError(f"discs {discs} must be 1 to colours ({colours}): hues are distinct")
        if len(radius) != 2 or not 0 < radius[0] <= radius[1] < 0.5:
            raise ValueError(f"radius {list(radius)} must be [low, high] between 0 and 0.5")
        if len(speed) != 2 or not 0 < speed[0] <= speed[1]:
            raise ValueError(f"speed {list(speed)} must be [low, high], both positive")
        if rate is not None and rate <= 0:
            raise ValueError(f"rate {rate} must be positive, or null for 0.07 fps")
        if click <= 0 or noise < 0:
            raise ValueError(f"click {click} must be positive and noise {noise} not negative")
        self.num, self.seed, self.kind = num, seed, kind
        self.fps, self.frames, self.size = fps, frames, tuple(int(n) for n in size)
        self.sample_rate, self.samples, self.channels = sample_rate, samples, channels
        self.discs, self.pitch, self.colours, self.background = discs, pitch, colours, background
        self.rate = 0.07 * fps if rate is None else rate
        self.radius, self.speed, self.click, self.noise = tuple(radius), tuple(speed), click, noise
        self.duration = frames / fps
        # To be seen, an impact needs frames on both sides; the last frame shows T - 1.
        margin = min(1.4, 0.25 * (frames - 1)) / fps
        self.window = (margin, (frames - 1) / fps - margin)
        top = min(900.0, sample_rate / 4.5)
        self.band = (top / 3, top)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        rng = self._rng(index)
        scene = self._scene(rng)
        events = np.full(MAX_EVENTS, np.nan, dtype=np.float32)
        events[: len(scene.events)] = scene.events[:MAX_EVENTS]
        return {
            "video": torch.from_numpy(self._render(scene, rng)),
            "audio": torch.from_numpy(self._sound(scene, rng)),
            "events": torch.from_numpy(events),
            "index": index,
        }

    def events(self, index: int) -> np.ndarray:
        """Exact times of the clip's events in seconds, float64 [N], ascending."""
        return self._scene(self._rng(index)).events

    def centres(self, index: int) -> np.ndarray:
        """Disc centres (x, y) in pixels at the frame times, float64 [discs, T, 2]."""
        return self._scene(self._rng(index)).centre

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.num:
            raise IndexError(f"index {index} is outside 0 to {self.num - 1}")
        key = np.array([self.seed % 2**64, index], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def _scene(self, rng: np.random.Generator) -> Scene:
        radius = rng.uniform(*self.radius, self.discs) * min(self.size)
        colour = rng.permutation(self.colours)[: self.discs]
        low = radius[:, None]
        free = np.array(self.size[::-1]) - 2 * low  # [K, 2], room for a centre in x and y
        time = np.arange(self.frames) / self.fps
        light = np.ones((self.discs, self.frames))
        events = pitch = np.empty(0)
        tone = colour / (len(PALETTE) - 1)
        if self.kind == "bounce":
            phase, pace, events, disc, wall = self._impacts(rng, free)
            unfolded = phase[:, None] + pace[:, None] * time[:, None]
            place = 1 - np.abs(1 - unfolded % 2)
            pitch = tone[disc] if self.pitch == "disc" else wall / 3
        elif self.kind == "flash":
            events = self._times(rng)
            disc = rng.integers(self.discs, size=len(events))
            pitch = tone[disc]
            place = np.broadcast_to(rng.random((self.discs, 1, 2)), (self.discs, self.frames, 2))
            # Lit for 0.15 s, at least one frame; the edges are the share of a centred exposure.
            since = (time - events[:, None]) * self.fps
            lit = max(0.15 * self.fps, 1.0)
            flash = np.clip(since + 0.5, 0, 1) * np.clip(lit + 0.5 - since, 0, 1)
            light = np.array([flash[disc == k].max(axis=0, initial=0) for k in range(self.discs)])
        else:
            swing = rng.uniform(0.6, 1.0, (self.discs, 1, 2)) / 2
            cycles = rng.uniform(0.5, 1.0, (self.discs, 1, 1)) * np.array([0.5, 1.0])
            angle = 2 * np.pi * (cycles * time[:, None] + rng.random((self.discs, 1, 2)))
            place = 0.5 + swing * np.sin(angle)
        return Scene(low[:, None] + place * free[:, None], light, radius, colour, events, pitch)

    def _count(self, rng: np.random.Generator) -> int:
        return 1 + rng.poisson(max(self.rate * self.duration - 1, 0))

    def _times(self, rng: np.random.Generator) -> np.ndarray:
        """Event times with gaps of at least 2.5 frames: sorted uniforms spread apart."""
        count, room = self._count(rng), self.window[1] - self.window[0]
        gap = min(2.5 / self.fps, 0.5 * room / count)
        start = np.sort(rng.uniform(0, room - gap * (count - 1), count))
        return self.window[0] + start + gap * np.arange(count)

    def _impacts(self, rng: np.random.Generator, free: np.ndarray) -> tuple[np.ndarray, ...]:
        """Start phases and paces [K, 2] in box lengths, and the (time, disc, wall) of impacts.

        A disc's coordinate is the triangle wave of phase + pace t, so impacts are where that is
        whole. One impact is placed uniformly in the clip; of several such start states the one
        is taken whose impacts are nearest to the wanted number, apart, and away from both ends.
        """
        shape = (CANDIDATES, self.discs)
        count = self._count(rng)
        angle = rng.uniform(np.pi * 0.14, np.pi * 0.36, shape)
        step = (0.35 + 0.55 * count / self.discs) * rng.uniform(*self.speed, shape) / self.duration
        pace = step[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
        pace = pace * free.min() / free
        phase = rng.uniform(0, 2, (*shape, 2))
        anchor = rng.uniform(*self.window, CANDIDATES)
        disc, axis, side = rng.integers([[self.discs], [2], [2]], size=(3, CANDIDATES))
        at = (np.arange(CANDIDATES), disc, axis)
        phase[at] = (side - pace[at] * anchor) % 2

        first = np.floor(phase) + 1
        steps = np.arange(int(np.ceil(pace.max() * self.duration)) + 1)
        whole = first[..., None] + steps
        times = (whole - phase[..., None]) / pace[..., None]  # [C, K, 2, M]
        inside = times < self.duration
        flat = np.sort(np.where(inside, times, np.inf).reshape(CANDIDATES, -1), axis=1)
        ends = (flat < self.window[0] - 1e-9) | (flat > self.window[1] + 1e-9)
        bad = (ends & np.isfinite(flat)).sum(1)
        if flat.shape[1] > 1:
            gaps = np.diff(np.where(np.isfinite(flat), flat, 1e9 * np.arange(1, flat.shape[1] + 1)))
            bad = bad + (gaps < 2.5 / self.fps).sum(1)
        best = np.argmin(4 * bad + np.abs(np.isfinite(flat).sum(1) - count))

        disc, axis, _ = np.nonzero(inside[best])
        events, wall = times[best][inside[best]], 2 * axis + whole[best][inside[best]] % 2
        order = np.argsort(events, kind="stable")
        return phase[best], pace[best], events[order], disc[order], wall[order]

    def _render(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """Discs with an edge one pixel soft, over a dim background: uint8 [3, T, H, W]."""
        height, width = self.size
        base, slope = np.full((3, 1, 1, 1), 25.0), np.zeros((2, 3, 1, 1, 1))
        if self.background == "varied":
            base = rng.uniform(15, 65) + rng.uniform(-8, 8, (3, 1, 1, 1))
            slope = rng.uniform(-22, 22, (2, 1, 1, 1, 1)) + rng.uniform(-5, 5, (2, 3, 1, 1, 1))
        ramp = [np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in self.size]
        ground = base + slope[0] * ramp[0][:, None] + slope[1] * ramp[1]
        video = np.clip(ground, 0, 255).astype(np.float32)  # [3, 1, H, W]
        centre = scene.centre.astype(np.float32)
        x = np.arange(width, dtype=np.float32) + 0.5 - centre[..., :1]  # [K, T, W]
        y = np.arange(height, dtype=np.float32) + 0.5 - centre[..., 1:]
        distance = np.sqrt((x * x)[:, :, None] + (y * y)[..., None])
        reach = scene.radius.astype(np.float32)[:, None, None, None] + np.float32(0.5)
        cover = np.clip(reach - distance, 0, 1)  # [K, T, H, W]
        cover *= scene.light.astype(np.float32)[..., None, None]
        for one, colour in zip(cover, scene.colour, strict=True):
            video = video + one * (PALETTE[colour][:, None, None, None] - video)
        return (video + np.float32(0.5)).astype(np.uint8)

    def _sound(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """Clicks at the events, or a tone that follows the first disc: float32 [C, L]."""
        low, high = self.band
        if self.kind in ("bounce", "flash"):
            wave = self._clicks(scene.events, low * (high / low) ** scene.pitch)
        else:
            time, at = np.arange(self.frames) / self.fps, np.arange(self.samples) / self.sample_rate
            if self.kind == "pitch":
                height = 1 - scene.centre[0, :, 1] / self.size[0]
                hertz = low * (high / low) ** np.interp(at, time, height)
                gain = 0.5
            else:
                speed = np.linalg.norm(np.gradient(scene.centre[0], axis=0), axis=-1)
                gain = 0.9 * np.interp(at, time, speed / max(speed.max(), 1e-9))
                hertz = np.full(self.samples, np.sqrt(low * high))
            wave = gain * np.sin(2 * np.pi * np.cumsum(hertz) / self.sample_rate)
        if self.noise:
            wave = wave + self.noise * rng.standard_normal(self.samples)
        wave = np.clip(wave, -1, 1).astype(np.float32)
        return np.repeat(wave[None], self.channels, axis=0)

    def _clicks(self, times: np.ndarray, hertz: np.ndarray) -> np.ndarray:
        """Sinusoids with a 2 ms attack that decay by 35 dB over `click` seconds, peak near 0.9."""
        start = np.ceil(times * self.sample_rate).astype(int)
        index = start[:, None] + np.arange(max(round(self.click * self.sample_rate), 1))  # [N, M]
        since = index / self.sample_rate - times[:, None]
        wave = np.sin(2 * np.pi * hertz[:, None] * since) * (1 - np.exp(-since / 0.001))
        wave *= 1.1 * np.exp(-4 * since / self.click)
        audio = np.zeros(self.samples + index.shape[1])
        np.add.at(audio, index, wave)
        return audio[: self.samples]
