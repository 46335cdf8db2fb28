"""Clips to a logger, in whatever form it can show."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.loggers import Logger

from avdiffusion import io
from avdiffusion.callbacks.loggers import TensorBoard
from avdiffusion.callbacks.wandb_run import Wandb
from avdiffusion.gallery import Entry, player
from avdiffusion.writer import png

BUDGET = 5_000_000  # bytes of one step's clips and pictures sent to W&B

STYLE = """<style>:root{color-scheme:light dark}body{margin:0;font:12px system-ui,sans-serif}
main{display:grid;gap:8px;grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
figure{margin:0}video{width:100%;image-rendering:pixelated;background:#000}</style>"""


def publish(
    logger: Logger,
    entries: Sequence[Entry],
    media: Mapping[str, np.ndarray],
    pictures: Mapping[str, Image.Image],
    *,
    rates: Mapping[str, float],
    step: int,
) -> None:
    """Sends a step's clips; a logger that shows none (CSV) is left alone.

    `entries` hold the clips as files, `media` the same as arrays (video uint8 [B, 3, T, H, W],
    audio [B, C, L]); each picture becomes `sample/<name>`.
    """
    if isinstance(logger, Wandb):
        with logger.tolerant("W&B did not take the clips"):
            _wandb(logger, entries, pictures, step)
    elif isinstance(logger, TensorBoard):
        with logger.tolerant():
            _tensorboard(logger, entries, media, pictures, rates, step)


def players(entries: Sequence[Entry], budget: int) -> str:
    """Looping players side by side as HTML of at most `budget` bytes; what is left out is counted.

    W&B's own video widget is mute, and its tables keep media outside the run folder when offline.
    """
    page, shown = STYLE + "<main>", 0
    for entry in entries:
        if entry.clip is None:
            continue
        one = f"<figure>{player(entry.clip)}<figcaption>{escape(entry.name)}</figcaption></figure>"
        if len(page) + len(one) > budget - 200:
            break
        page, shown = page + one, shown + 1
    left = len(entries) - shown
    return page + "</main>" + (f"<p>{left} more in the run folder</p>" if left else "")


def _wandb(logger, entries, pictures, step):
    import wandb

    if logger.gone:
        return
    sent, left = {}, BUDGET
    most = 4 * BUDGET // (5 * max(len(pictures), 2))
    for name, picture in pictures.items():
        picture, size = _within(picture, most)
        sent[f"sample/{name}"], left = wandb.Image(picture, file_type="png"), left - size
    if any(entry.clip is not None for entry in entries):
        sent["sample/clips"] = wandb.Html(players(entries, left), inject=False)
    if sent:
        logger.log_metrics(sent, step)


def _within(picture, limit):
    """(the picture, halved until its PNG has at most so many bytes, their number)"""
    while (size := len(png(picture))) > limit:
        picture = picture.reduce(2)
    return picture, size


def _tensorboard(logger, entries, media, pictures, rates, step):
    from tensorboard.compat.proto.summary_pb2 import Summary

    board = logger.experiment
    for name, picture in pictures.items():
        shown = np.asarray(picture.convert("RGB"))
        board.add_image(f"sample/{name}", shown, step, dataformats="HWC")
    for k, entry in enumerate(entries):
        if "audio" in media:
            wave = torch.from_numpy(media["audio"][k].mean(0))
            board.add_audio(f"sample/{entry.name}", wave, step, sample_rate=int(rates["audio"]))
        if "video" in media:
            with TemporaryDirectory() as folder:
                path = io.write_gif(Path(folder, "clip.gif"), media["video"][k], fps=rates["video"])
                gif = path.read_bytes()
            height, width = media["video"].shape[-2:]
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=gif
            )
            clip = Summary(value=[Summary.Value(tag=f"sample/{entry.name}", image=image)])
            board.file_writer.add_summary(clip, step)
