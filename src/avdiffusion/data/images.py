"""Clips of one frame from a folder of pictures."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from avdiffusion.data.files import FromFiles, one_of, scaling
from avdiffusion.data.index import files_below
from avdiffusion.io import MediaError

PICTURES = re.compile(r"\.(bmp|jpe?g|png|webp)$", re.IGNORECASE)
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # of Pillow
ORIENTATION = 0x0112  # in EXIF
UPRIGHT = {  # what undoes each; the last four exchange height and width
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MIDDLE = (0.5, 0.5)
log = logging.getLogger(__name__)


class Images(FromFiles):
    """Pictures, each a clip of one frame: `video` uint8 [3, 1, H, W] and `index`.

    `fit`: "crop" scales a picture until it covers `size` [H, W] and cuts off what is outside,
    "letterbox" until it fits in and adds black bars, "cut" takes a window of it as it is, of one
    that is too small as for "crop". `[i]` is picture i, windows being the middle ones;
    `draw(i, rng)` may take another window and mirrors with probability `flip`.

    Folders are searched recursively for png, jpg, webp and bmp; pictures are upright, whatever is
    transparent in them black. `split`, `val_fraction` and `on_bad` are those of `Clips`. Only
    headers are read at first: what breaks further on is found when it is.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        val_fraction: float = 0.1,
        size: Sequence[int] = (256, 256),
        fit: str = "crop",
        flip: float = 0.5,
        on_bad: str = "error",
        index_workers: int | None = None,
    ):
        one_of("fit", fit, ("crop", "letterbox", "cut"))
        one_of("on_bad", on_bad, ("error", "skip"))
        self.root, self.on_bad = Path(root).expanduser(), on_bad
        self.size, self.fit, self.flip = tuple(size), fit, flip
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.root is no folder: {self.root}")
        paths, ignored = files_below(self.root, PICTURES)
        if not paths:
            others = f" ({len(ignored)} other files)" if ignored else ""
            raise FileNotFoundError(f"no png, jpg, webp or bmp files in {self.root}{others}")
        shown, problems = {}, {}
        with (
            ThreadPoolExecutor(index_workers or os.cpu_count()) as pool,
            tqdm(total=len(paths), desc=f"reading {root}", unit="file", disable=None) as bar,
        ):
            for path, found in zip(paths, pool.map(self._examined, paths), strict=True):
                shown[path], problems[path] = found
                bar.update()
        chosen = self._chosen(problems, ignored, split, val_fraction)
        self.files = [path for path in paths if path in chosen]
        self.windows = [(number, MIDDLE) for number in range(len(self.files))]
        self._begin([shown[path] for path in self.files], size, fit)

    def _examined(self, path):
        """Height and width as shown, and what is wrong with the file."""
        try:
            with opened(self.root / path) as picture:
                header = picture.getexif() if "exif" in picture.info else {}
                turned = header.get(ORIENTATION) in (5, 6, 7, 8)
                return picture.size if turned else picture.size[::-1], None
        except MediaError as error:
            return None, error.reason

    def _random(self, i, rng):
        down, right, coin = rng.random(3)
        return (down, right) if self.fit == "cut" else MIDDLE, coin < self.flip

    def _window(self, path, place):
        with opened(self.root / path) as picture:
            if self.fit != "cut":
                picture.draft(None, (2 * self.size[1], 2 * self.size[0]))  # of JPEG, a part is read
            pixels = framed(upright(picture), self.size, self.fit, place)
        return {"video": rearrange(pixels, "h w c -> c 1 h w")}


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture whose header is read; all that is wrong with its file is a MediaError."""
    try:
        with Image.open(path) as picture:
            yield picture
    except BROKEN as error:
        reason = getattr(error, "strerror", None) or str(error).replace(repr(str(path)), "it")
        raise MediaError(f"unreadable: {reason}", str(path)) from error


def upright(picture: Image.Image) -> Image.Image:
    """As it is meant to be seen, in RGB, on black; of 16 bits of grey the upper eight."""
    turn = UPRIGHT.get(picture.getexif().get(ORIENTATION))
    picture = picture if turn is None else picture.transpose(turn)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) // 257).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture).convert(
            "RGB"
        )
    return picture.convert("RGB")


def framed(
    picture: Image.Image, size: Sequence[int], fit: str, place: Sequence[float]
) -> np.ndarray:
    """uint8 [H, W, 3] of a picture scaled to fit, at a `place` of 0 (top, left) to 1."""
    scale = scaling((picture.height, picture.width), size, fit)
    if fit == "cut":
        scale = max(scale, 1)
    scaled = [max(1, round(n * scale)) for n in picture.size]
    canvas = Image.new("RGB", (size[1], size[0]))
    room = size[1] - scaled[0], size[0] - scaled[1]
    corner = int(room[0] * place[1]), int(room[1] * place[0])
    canvas.paste(picture.resize(scaled, Image.Resampling.BICUBIC), corner)
    return np.asarray(canvas)
