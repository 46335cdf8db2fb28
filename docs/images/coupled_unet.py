"""Draws coupled_unet.svg from the network itself: python docs/images/coupled_unet.py"""

from itertools import groupby
from pathlib import Path

import torch

from avdiffusion.checkpoint import build, compose

OVERRIDES = ["exp=landscape", "data.root=clips", "paths.run=run"]
BLUE, ORANGE, INK, GREY = "#3b6fb6", "#c8702a", "#222222", "#777777"
ROW, BOX, LEFT, RIGHT = 112, 74, 16, 456  # heights; where the two halves begin
STREAM = 148  # width of a stream's box


def levels(stages):
    """Stages between one change of resolution and the next, without those that only resample."""
    groups = groupby(stages, key=lambda stage: stage.res.video.resample)
    return [list(group) for resample, group in groups if resample is None]


def facts(stages):
    """Lines for the video box, the audio box, and the label between them."""
    stage, width = stages[-1], stages[-1].res.video.out.weight.shape[0]
    blocks = f"{len(stages)} blocks, {width} ch"
    video = [blocks, *["attention: frame, time"] * (stage.spatial is not None)]
    audio = [blocks, *["attention"] * (stage.audio is not None)]
    cross = next((s.cross for s in stages if s.cross is not None), None)
    if cross is None:
        return video, audio, None
    return video, audio, f"window {cross.window}" if cross.window else "everything"


def text(x, y, line, *, size=12, fill=INK, anchor="middle", weight="normal"):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{line}</text>'
    )


def box(x, y, colour, lines, shape):
    parts = [
        f'<rect x="{x}" y="{y}" width="{STREAM}" height="{BOX}" rx="6" fill="{colour}" '
        f'fill-opacity="0.14" stroke="{colour}"/>'
    ]
    parts += [text(x + STREAM / 2, y + 18 + 16 * k, line) for k, line in enumerate(lines)]
    return [*parts, text(x + STREAM / 2, y + BOX - 8, shape, size=11, fill=GREY)]


def half(x, y, stages, video_shape, audio_shape):
    """The two streams of some stages side by side, and the attention between them."""
    video, audio, cross = facts(stages)
    gap = 96
    parts = box(x, y, BLUE, video, video_shape)
    parts += box(x + STREAM + gap, y, ORANGE, audio, audio_shape)
    if cross:
        start, middle = x + STREAM + 4, x + STREAM + gap / 2
        parts.append(
            f'<path d="M{start} {y + 37}h{gap - 8}" stroke="{INK}" '
            'marker-start="url(#tip)" marker-end="url(#tip)"/>'
        )
        parts += [text(middle, y + 30, "RS-MMA", size=11), text(middle, y + 52, cross, size=11)]
    return parts


def draw() -> str:
    """The drawing as SVG."""
    config = compose(OVERRIDES)
    with torch.device("meta"):
        net = build(config.model.diffusion.net)
    frames, (height, width), samples = config.data.frames, config.data.size, config.data.samples
    down = levels(net.encoder)
    repeats = len(net.decoder) // net.levels
    up = [list(net.decoder)[k * repeats : (k + 1) * repeats] for k in range(net.levels)][::-1]
    parts = [
        text(LEFT + STREAM / 2, 22, "video", fill=BLUE, weight="bold"),
        text(LEFT + STREAM * 1.5 + 96, 22, "audio", fill=ORANGE, weight="bold"),
        text(RIGHT + STREAM / 2, 22, "video", fill=BLUE, weight="bold"),
        text(RIGHT + STREAM * 1.5 + 96, 22, "audio", fill=ORANGE, weight="bold"),
    ]
    for level in range(net.levels):
        y = 34 + ROW * level
        scale, rate = 2**level, net.audio_rate**level
        shapes = f"{frames} x {height // scale} x {width // scale}", f"{samples // rate}"
        parts += half(LEFT, y, down[level], *shapes) + half(RIGHT, y, up[level], *shapes)
        parts.append(
            f'<path d="M{RIGHT - 42} {y + 37}h36" stroke="{GREY}" stroke-dasharray="3 3" '
            'marker-end="url(#tip)"/>'
        )
        if level < net.levels - 1:
            arrow, low = f"v{ROW - BOX - 10}", y + BOX + 5
            for x in (LEFT + STREAM / 2, LEFT + STREAM * 1.5 + 96):
                parts.append(f'<path d="M{x} {low}{arrow}" stroke="{INK}" marker-end="url(#tip)"/>')
            for x in (RIGHT + STREAM / 2, RIGHT + STREAM * 1.5 + 96):
                parts.append(
                    f'<path d="M{x} {low + ROW - BOX - 10}v-{ROW - BOX - 10}" stroke="{INK}" '
                    'marker-end="url(#tip)"/>'
                )
            mean = f"mean of 2 x 2 pixels, {net.audio_rate} samples"
            parts.append(text(LEFT + STREAM + 48, low + 18, mean, size=11, fill=GREY))
            parts.append(text(RIGHT + STREAM + 48, low + 18, "nearest", size=11, fill=GREY))
    y = 34 + ROW * net.levels
    parts += half((LEFT + RIGHT) / 2, y, [net.middle_in, net.middle_out], *shapes)
    end_x = (LEFT + RIGHT) / 2
    parts.append(
        f'<path d="M{LEFT + 60} {y - ROW + BOX + 5}V{y + 37}H{end_x - 6}" fill="none" '
        f'stroke="{INK}" marker-end="url(#tip)"/>'
    )
    right = RIGHT + STREAM * 2 + 96 - 60
    parts.append(
        f'<path d="M{end_x + STREAM * 2 + 100} {y + 37}H{right}V{y - ROW + BOX + 8}" '
        f'fill="none" stroke="{INK}" marker-end="url(#tip)"/>'
    )
    total = sum(p.numel() for p in net.parameters()) / 1e6
    note = f"{total:.1f} million parameters; every block also hears the time; dashes: skips"
    parts.append(text((LEFT + RIGHT + 392) / 2, y + BOX + 24, note, fill=GREY))
    w, h = RIGHT + STREAM * 2 + 96 + LEFT, y + BOX + 38
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" '
            'font-family="system-ui, sans-serif">',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto-start-reverse">'
            '<path d="M0 0L8 4L0 8z"/></marker></defs>',
            f'<rect width="{w}" height="{h}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw())
