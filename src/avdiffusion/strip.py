"""A clip as one picture: frames over waveform over spectrogram, on one time axis.

video uint8 [3, T, H, W], audio float [C, L] in [-1, 1]; either may be missing.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

WIDTH = 1024  # pixels that a strip fills at most
FRAMES = 16  # frames that are shown at most
WAVE, SPECTRUM, AXIS, GAP = 56, 88, 18, 4  # heights of the panels and the space between them
GROUND, PANEL, INK, LINE, WAVE_INK = "#101216", "#171a20", "#c3c8d2", "#2b303a", "#6cb6ff"
FLOOR = -72  # dB below the loudest bin where the spectrogram is black
HEAT = np.array(  # black, violet, red, orange, pale yellow: even steps of lightness
    [
        *[(8, 8, 14), (44, 18, 78), (106, 30, 120), (172, 50, 104)],
        *[(228, 88, 74), (250, 158, 88), (253, 230, 160)],
    ],
    dtype=np.float64,
)


def strip(
    video: np.ndarray | None = None,
    audio: np.ndarray | None = None,
    *,
    fps: float | None = None,
    sample_rate: int | None = None,
) -> Image.Image:
    """Frames in a row over the waveform over the spectrogram (mel-spaced, in dB).

    Small frames are enlarged by a whole factor. Of long clips at most 16 frames are shown, each
    at the place where it begins. Rates label the axis; with one of them missing the other serves.
    """
    if video is None and audio is None:
        raise ValueError("a strip needs video or audio, got neither")
    if (video is None or not fps) and (audio is None or not sample_rate):
        raise ValueError("a strip needs the rate of what it shows: fps or sample_rate")
    seconds = audio.shape[-1] / sample_rate if video is None or not fps else video.shape[1] / fps
    panels = []
    if video is not None:
        panels.append(_frames(np.asarray(video)))
    width = panels[0].width if panels else WIDTH
    if audio is not None:
        audio = np.asarray(audio, np.float64)
        panels += [_wave(audio, width), _spectrogram(audio, sample_rate or 16000, width)]

    height = sum(p.height + GAP for p in panels) + AXIS
    sheet = Image.new("RGB", (width, height), GROUND)
    top = 0
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height + GAP
    _axis(sheet, top - GAP, seconds)
    return sheet


def contact_sheet(
    strips: Sequence[Image.Image], labels: Sequence[str] = (), *, columns: int | None = None
) -> Image.Image:
    """Strips below one another, from seven on in two columns, each under its label."""
    if not strips:
        raise ValueError("a contact sheet needs at least one strip")
    columns = columns or (1 if len(strips) < 7 else 2)
    rows = -(-len(strips) // columns)
    head, pad = (18 if labels else 0), 16
    width, height = max(s.width for s in strips), max(s.height for s in strips) + head
    sheet = Image.new("RGB", (columns * (width + pad) + pad, rows * (height + pad) + pad), GROUND)
    draw = ImageDraw.Draw(sheet)
    for k, one in enumerate(strips):
        x, y = pad + (k // rows) * (width + pad), pad + (k % rows) * (height + pad)
        if k < len(labels):
            draw.text((x, y - 1), labels[k], INK, _font(13))
        sheet.paste(one, (x, y + head))
    return sheet


def _frames(video):
    """Frames side by side, the cell of each as wide as the time it stands for."""
    frames, height, width = video.shape[1:]
    count = min(frames, FRAMES)
    cell = WIDTH // count
    shown = video[:, [k * frames // count for k in range(count)]]
    if width <= cell:
        scale = max(min(cell // width, 256 // height), 1)
        row = shown.repeat(scale, axis=2).repeat(scale, axis=3)
        row[:, :, :, -1] = row[:, :, :, -1] // 2  # a thin seam, so that still scenes show frames
        return Image.fromarray(rearrange(row, "c t h w -> h (t w) c"))
    row = Image.fromarray(rearrange(shown, "c t h w -> h (t w) c"))
    return row.resize((cell * count, max(round(height * cell / width), 1)), Image.Resampling.BOX)


def _wave(audio, width):
    """Lowest to highest sample of each pixel column, a lane per channel."""
    lane, fine = WAVE // len(audio), 4
    sheet = Image.new("RGB", (width, lane * len(audio) * fine), PANEL)
    draw = ImageDraw.Draw(sheet)
    edges = np.linspace(0, audio.shape[1], width + 1).astype(int)
    for c, wave in enumerate(audio):
        middle, reach = (c + 0.5) * lane * fine, (0.5 * lane - 2) * fine
        draw.line([(0, middle), (width, middle)], LINE, fine)
        for x, (a, b) in enumerate(pairwise(edges)):
            part = np.clip(wave[a : max(a, b) + 1], -1, 1)
            if len(part) and (high := part.max()) - (low := part.min()) > 0:
                draw.line([(x, middle - high * reach), (x, middle - low * reach)], WAVE_INK)
    return sheet.resize((width, lane * len(audio)), Image.Resampling.BOX)


def _spectrogram(audio, sample_rate, width):
    """Power of 32 ms Hann windows around each pixel column, mel-spaced rows, in dB.

    Where a column lasts longer than its window has weight, the loudest of several fills it.
    """
    size = 2 ** round(np.log2(0.032 * sample_rate))
    several = max(1, -(-audio.shape[1] // (width * size // 2)))
    centre = (np.arange(width * several) + 0.5) / (width * several) * audio.shape[1]
    wave = np.pad(audio.mean(0), (size // 2, size))
    window = wave[centre.astype(int)[:, None] + np.arange(size)] * np.hanning(size)
    power = np.abs(np.fft.rfft(window)) ** 2
    power = rearrange(power, "(w n) f -> w n f", n=several).max(1)  # [width, size / 2 + 1]

    top = 2595 * np.log10(1 + 0.5 * sample_rate / 700)
    row = 700 * (10 ** (np.linspace(top, 0, SPECTRUM) / 2595) - 1) * size / sample_rate
    low = np.clip(row.astype(int), 0, size // 2 - 1)
    share = np.clip(row - low, 0, 1)
    power = (1 - share) * power[:, low] + share * power[:, low + 1]
    loud = 10 * np.log10(power.T / max(power.max(), 1e-6) + 1e-12)
    level = np.clip(1 - loud / FLOOR, 0, 1) * (len(HEAT) - 1)
    colour = np.stack([np.interp(level, np.arange(len(HEAT)), HEAT[:, c]) for c in range(3)], -1)
    sheet = Image.fromarray((colour + 0.5).astype(np.uint8))
    label = f"{sample_rate / 2000:g} kHz"
    ImageDraw.Draw(sheet).text((4, 2), label, INK, _font(10), stroke_width=1, stroke_fill=GROUND)
    return sheet


def _axis(sheet, top, seconds):
    draw = ImageDraw.Draw(sheet)
    step = next((s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60) if seconds / s <= 10), seconds)
    for k in range(int(seconds / step + 1e-6) + 1):
        x, text = k * step / seconds * (sheet.width - 1), f"{k * step:g} s"
        draw.line([(x, top), (x, top + 4)], INK)
        length = draw.textlength(text, _font(11))
        x = min(max(x - length / 2, 1), sheet.width - length - 1)
        draw.text((x, top + 4), text, INK, _font(11))


def _font(size):
    return ImageFont.load_default(size)
