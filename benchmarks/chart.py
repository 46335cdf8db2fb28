"""Curves on logarithmic axes, panel beside panel, as a PNG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # drawn larger, then reduced: lines without steps
WIDTH, HEIGHT = 560, 400  # of a panel's field
LEFT, RIGHT, TOP, BOTTOM = 74, 18, 34, 46  # around it
LEGEND, ROW = 62, 21  # beside its names, and from one to the next
GROUND, INK, FRAME, LINE = "#ffffff", "#22262c", "#8a919c", "#e3e6ea"
COLOURS = ["#7a7f87", "#111111", "#e69f00", "#0a9370", "#0b6fc2", "#8d4bc4", "#d4401f", "#a1795a"]
COLOURS += ["#e2579a", "#17a8bd", "#7c9a16", "#5b6bd6"]


@dataclass(frozen=True)
class Style:
    """A curve's colour, the marker at its points (a number), and whether its line is broken."""

    colour: str
    marker: int
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves (name to points) over x; `floor`: below it y says nothing, and is drawn at it."""

    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[tuple[float, float]]]
    ticks: Sequence[float] = ()
    floor: float | None = None


def draw(path: Path, rows: Sequence[Sequence[Panel]], styles: Mapping[str, Style], head: str):
    """Writes the panels, row below row, and to their right a legend of all `styles`."""
    fields = len(rows[0]) * (LEFT + WIDTH + RIGHT)
    width = fields + LEGEND + round(max(_font(13).getlength(name) for name in styles) / SCALE)
    height = 34 + len(rows) * (TOP + HEIGHT + BOTTOM)
    sheet = Image.new("RGB", (width * SCALE, height * SCALE), GROUND)
    pen = Pen(ImageDraw.Draw(sheet))
    pen.text((LEFT, 10), head, 15)
    for i, row in enumerate(rows):
        for k, panel in enumerate(row):
            left = k * (LEFT + WIDTH + RIGHT) + LEFT
            _panel(pen, panel, left, 34 + i * (TOP + HEIGHT + BOTTOM) + TOP, styles)
    for k, (name, style) in enumerate(styles.items()):
        x, y = fields + 8, 34 + TOP + 10 + k * ROW
        pen.curve([(x, y), (x + 34, y)], style)
        pen.marker(x + 17, y, style)
        pen.text((x + 44, y - 8), name, 13)
    small = sheet.resize((width, height), Image.Resampling.LANCZOS)
    small.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path)


def _panel(pen, panel, left, top, styles):
    points = [point for curve in panel.curves.values() for point in curve]
    xs, ys = ([v for v in values if v > 0] for values in zip(*points, strict=True))
    low, high = min(xs) / 1.1, max(xs) * 1.1
    bottom = max(panel.floor or 0, min(ys)) / 1.5
    peak = max(*ys, 2 * bottom) * 1.5

    def place(x, y):
        y = max(y, panel.floor or bottom)
        across = math.log(x / low) / math.log(high / low)
        return left + WIDTH * across, top + HEIGHT * math.log(peak / y) / math.log(peak / bottom)

    ticks = panel.ticks or _ticks(low, high)
    for x in ticks:
        at = place(x, peak)[0]
        pen.line([(at, top), (at, top + HEIGHT)], LINE, 1)
        pen.text((at, top + HEIGHT + 5), f"{x:g}", 12, "ma")
    for y in _ticks(bottom, peak):
        at = place(low, y)[1]
        pen.line([(left, at), (left + WIDTH, at)], LINE, 1)
        pen.text((left - 7, at), f"{y:.6f}".rstrip("0").rstrip("."), 12, "rm")
    if panel.floor:
        at = place(low, panel.floor)[1]
        pen.line([(left, at), (left + WIDTH, at)], FRAME, 1.5)
        pen.text((left + 6, at + 3), "floor", 11)
    pen.box((left, top, left + WIDTH, top + HEIGHT), FRAME)
    pen.text((left, top - 22), panel.title, 14)
    pen.text((left + WIDTH, top - 20), panel.y, 12, "ra")
    pen.text((left + WIDTH / 2, top + HEIGHT + 23), panel.x, 12, "ma")
    for name, curve in panel.curves.items():
        places = [place(x, y) for x, y in sorted(curve) if math.isfinite(y)]
        pen.curve(places, styles[name])
        for x, y in places:
            pen.marker(x, y, styles[name])


def _ticks(low, high):
    """1, 2 and 5 times powers of ten, or these alone where they are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 3.5 else (1,)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _font(size):
    return ImageFont.load_default(size * SCALE)


class Pen:
    """Draws in units of the finished picture."""

    def __init__(self, draw):
        self.draw = draw

    def text(self, at, words, size, anchor="la"):
        self.draw.text([v * SCALE for v in at], words, INK, _font(size), anchor=anchor)

    def box(self, corners, colour):
        self.draw.rectangle([v * SCALE for v in corners], outline=colour, width=SCALE)

    def line(self, places, colour, width):
        flat = [v * SCALE for place in places for v in place]
        self.draw.line(flat, colour, round(width * SCALE), joint="curve")

    def curve(self, places, style):
        if not style.dashed:
            self.line(places, style.colour, 1.6)
            return
        for (x, y), (u, v) in pairwise(places):
            count = max(round(math.hypot(u - x, v - y) / 8), 1)
            for k in range(count):
                a, b = k / count, (k + 0.55) / count
                ends = [(x + s * (u - x), y + s * (v - y)) for s in (a, b)]
                self.line(ends, style.colour, 1.6)

    def marker(self, x, y, style):
        """Discs, squares, triangles, diamonds and crosses, filled, then hollow."""
        kind, hollow = style.marker % 5, style.marker // 5 % 2
        turns = [(), (45, 135, 225, 315), (90, 210, 330), (0, 90, 180, 270), ()][kind]
        size = 4.2 if kind < 2 else 5.2
        fill = GROUND if hollow else style.colour
        if kind == 4:
            for a in (-3.6, 3.6):
                self.line([(x - 3.6, y - a), (x + 3.6, y + a)], style.colour, 1.8 + hollow)
        elif kind == 0:
            ends = [(v + d) * SCALE for d in (-size, size) for v in (x, y)]
            self.draw.ellipse(ends, fill, style.colour, 2 * SCALE)
        else:
            angles = [math.radians(turn) for turn in turns]
            ends = [(x + size * math.cos(a), y - size * math.sin(a)) for a in angles]
            flat = [v * SCALE for end in ends for v in end]
            self.draw.polygon(flat, fill, style.colour, 2 * SCALE)
