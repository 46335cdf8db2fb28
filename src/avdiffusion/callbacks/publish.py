"""Clips to a logger, in whatever form it can show."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger

from avdiffusion import io
from avdiffusion.callbacks.loggers import Wandb
from avdiffusion.gallery import Entry, player

BUDGET = 5_000_000  # bytes of one step's clips and strips sent to W&B

STYLE = """<style>:root{color-scheme:light dark}body{margin:0;font:12px system-ui,sans-serif}
main{display:grid;gap:8px;grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
figure{margin:0}video{width:100%;image-rendering:pixelated;background:#000}</style>"""


def publish(
    logger: Logger,
    entries: Sequence[Entry],
    media: Mapping[str, np.ndarray],
    sheet: Path,
    *,
    rates: Mapping[str, float],
    step: int,
) -> None:
    """Sends a step's clips; a logger that shows none (CSV) is left alone.

    `entries` hold the clips as files, `media` the same as arrays (video uint8 [B, 3, T, H, W],
    audio [B, C, L]), `sheet` is the contact sheet.
    """
    if isinstance(logger, Wandb):
        with logger.tolerant("W&B did not take the clips"):
            _wandb(logger, entries, sheet, step)
    elif isinstance(logger, TensorBoardLogger):
        _tensorboard(logger, entries, media, sheet, rates, step)


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


def _wandb(logger, entries, sheet, step):
    import wandb

    strips = sheet.read_bytes() if sheet.is_file() else b""
    page = players(entries, BUDGET - len(strips))
    sent = {"sample/clips": wandb.Html(page, inject=False)}
    if 0 < len(strips) < BUDGET // 2:
        sent["sample/strips"] = wandb.Image(str(sheet))
    logger.log_metrics(sent, step)


def _tensorboard(logger, entries, media, sheet, rates, step):
    from tensorboard.compat.proto.summary_pb2 import Summary

    board = logger.experiment
    if sheet.is_file():
        strips = np.asarray(Image.open(sheet).convert("RGB"))
        board.add_image("sample/strips", strips, step, dataformats="HWC")
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
