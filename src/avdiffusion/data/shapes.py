"""Procedural clips whose truth is known: shapes that bounce, and noise that no one can predict."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from avdiffusion.data.toy import PALETTE

# Of each shape, for an area of pi: outward normals (x, y) of its sides, their distance from the
# centre, and how far it reaches to the left, right, top and bottom of that. A disc has no sides.
SQUARE, TRIANGLE = np.pi**0.5 / 2, (np.pi / 27**0.5) ** 0.5
SHAPES = {
    "disc": ((), 1.0, (1.0, 1.0, 1.0, 1.0)),
    "square": (((-1, 0), (1, 0), (0, -1), (0, 1)), SQUARE, (SQUARE,) * 4),
    "triangle": (
        ((0, 1), (-(3**0.5) / 2, -0.5), (3**0.5 / 2, -0.5)),
        TRIANGLE,
        (3**0.5 * TRIANGLE, 3**0.5 * TRIANGLE, 2 * TRIANGLE, TRIANGLE),
    ),
}
KINDS = tuple(SHAPES)


class Scene(NamedTuple):
    """What a clip shows, in pixels and frames; K shapes, later ones in front."""

    kind: np.ndarray  # [K] rows of KINDS
    position: np.ndarray  # [K, T, 2] centres as (x, y)
    velocity: np.ndarray  # [K, T, 2] pixels a frame
    radius: np.ndarray  # [K] of the disc of the same area
    colour: np.ndarray  # [K] rows of PALETTE
    ground: np.ndarray  # [3, 3] colour in the middle, change from left to right, from top to bottom


class MovingShapes(Dataset):
    """Clips of shapes that run straight and bounce off walls, a function of (seed, index) alone.

    Items hold `video` uint8 [3, T, H, W] and the truth in pixels and frames: `position` and
    `velocity` float32 [K, T, 2] as (x, y), NaN for shapes that are not there, and `kind` int64 [K],
    rows of KINDS, -1 likewise, K the most there can be. Frame k shows the instant k / fps.

    `shapes` is the least and the most of a clip, each of a hue of its own, the first `colours` of
    six; `kinds` those there are. `radius`, of the disc of the same area, is a share of the shorter
    side, `speed` such sides a second. `background` is plain, the same grey for all clips, or a
    `gradient` of every clip's own.
    """

    def __init__(
        self,
        *,
        num: int = 10000,
        seed: int = 0,
        fps: float = 10,
        frames: int = 16,
        size: Sequence[int] = (64, 64),
        shapes: Sequence[int] = (1, 3),
        kinds: Sequence[str] = KINDS,
        radius: Sequence[float] = (0.1, 0.16),
        speed: Sequence[float] = (0.3, 0.8),
        colours: int = 6,
        background: str = "gradient",
    ):
        if not set(kinds) <= set(KINDS) or not kinds:
            raise ValueError(f"kinds {list(kinds)}: choose of {', '.join(KINDS)}")
        if background not in ("plain", "gradient"):
            raise ValueError(f"background {background!r} is unknown: choose plain or gradient")
        if not 1 <= shapes[0] <= shapes[1] <= colours <= len(PALETTE):
            raise ValueError(
                f"shapes {list(shapes)} must be [least, most], at least 1 and at most colours "
                f"({colours}, of {len(PALETTE)}): every shape has a hue of its own"
            )
        if not 0 < radius[0] <= radius[1] <= 0.3:
            raise ValueError(f"radius {list(radius)} must be [low, high] between 0 and 0.3")
        if not 0 < speed[0] <= speed[1]:
            raise ValueError(f"speed {list(speed)} must be [low, high], both positive")
        self.num, self.seed, self.fps, self.frames = num, seed, fps, frames
        self.size, self.shapes, self.kinds = tuple(size), tuple(shapes), tuple(kinds)
        self.radius, self.speed = tuple(radius), tuple(speed)
        self.colours, self.background = colours, background

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        scene = self.scene(index)
        absent = self.shapes[1] - len(scene.kind)

        def padded(values: np.ndarray) -> Tensor:
            values = np.pad(values, ((0, absent), (0, 0), (0, 0)), constant_values=np.nan)
            return torch.from_numpy(values.astype(np.float32))

        return {
            "video": torch.from_numpy(self._render(scene)),
            "position": padded(scene.position),
            "velocity": padded(scene.velocity),
            "kind": torch.from_numpy(np.pad(scene.kind, (0, absent), constant_values=-1)),
            "index": index,
        }

    def scene(self, index: int) -> Scene:
        """What the clip of this number shows."""
        rng = generator(self.seed, index, self.num)
        short, count = min(self.size), int(rng.integers(self.shapes[0], self.shapes[1] + 1))
        kind = rng.choice([KINDS.index(name) for name in self.kinds], count)
        radius = short * rng.uniform(*self.radius, count)
        reach = radius[:, None] * np.array([SHAPES[KINDS[k]][2] for k in kind])  # [K, 4]
        low, high = reach[:, ::2], np.array(self.size[::-1]) - reach[:, 1::2]  # [K, 2]
        angle = rng.uniform(0, 2 * np.pi, count)
        pace = short * rng.uniform(*self.speed, count) / self.fps
        step = pace[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)  # [K, 2]
        start = rng.uniform(low, high)

        # unfolded at the walls the way is straight: its triangle wave is the bouncing one
        free = (high - low)[:, None]
        way = (start - low)[:, None] + step[:, None] * np.arange(self.frames)[:, None]
        phase = way / free % 2
        position = low[:, None] + free * (1 - np.abs(1 - phase))
        velocity = step[:, None] * np.where(phase < 1, 1.0, -1.0)
        colour = rng.permutation(self.colours)[:count]
        ground = np.zeros((3, 3)) + np.array([25.0, 0.0, 0.0])[:, None]
        if self.background == "gradient":
            ground[0] = rng.uniform(15, 65) + rng.uniform(-8, 8, 3)
            ground[1:] = rng.uniform(-22, 22, (2, 1)) + rng.uniform(-5, 5, (2, 3))
        return Scene(kind, position, velocity, radius, colour, ground)

    def _render(self, scene: Scene) -> np.ndarray:
        """Shapes with an edge one pixel soft over the background: uint8 [3, T, H, W]."""
        ramp = [np.linspace(-0.5, 0.5, n) for n in self.size]
        middle, across, down = scene.ground[..., None, None, None]
        ground = middle + across * ramp[1] + down * ramp[0][:, None]
        video = np.repeat(np.clip(ground, 0, 255), self.frames, axis=1)
        place = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in self.size[::-1])), -1)
        for kind, centre, radius, colour in zip(
            scene.kind, scene.position, scene.radius, scene.colour, strict=True
        ):
            off = place - centre[:, None, None]  # [T, H, W, 2]
            normals, distance, _ = SHAPES[KINDS[kind]]
            outward = (off @ np.array(normals).T).max(-1) if normals else np.hypot(*off.T).T
            cover = np.clip(radius * distance - outward + 0.5, 0, 1)
            video += cover * (PALETTE[colour][:, None, None, None] - video)
        return (video + 0.5).astype(np.uint8)


class GaussianNoise(Dataset):
    """Clips of independent N(0, 1), `video` float32 [3, T, H, W]: nothing can be learned of them.

    Of x_t = alpha x0 + sigma eps the best guess at eps is sigma x_t, and its mean squared error
    alpha^2: a network trained on eps ends at the mean of alpha^2 over its times, 0.2755 for a
    linear schedule of 1000 steps and 0.4956 for a cosine.
    """

    def __init__(
        self,
        *,
        num: int = 10000,
        seed: int = 0,
        frames: int = 8,
        size: Sequence[int] = (32, 32),
    ):
        self.num, self.seed, self.shape = num, seed, (3, frames, *size)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        rng = generator(self.seed, index, self.num)
        video = rng.standard_normal(self.shape, dtype=np.float32)
        return {"video": torch.from_numpy(video), "index": index}


def generator(seed: int, index: int, num: int) -> np.random.Generator:
    """All chance of item `index` of `num`."""
    if not 0 <= index < num:
        raise IndexError(f"index {index} is outside 0 to {num - 1}")
    return np.random.default_rng((seed, index))
