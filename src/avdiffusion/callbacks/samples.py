"""Clips of the averaged model while it trains, on disk and in the loggers."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from tqdm import tqdm

from avdiffusion.callbacks.publish import publish
from avdiffusion.callbacks.speed import Speed
from avdiffusion.gallery import COLUMNS, LABELS, score_rows
from avdiffusion.metrics.sync import sync_scores
from avdiffusion.writer import ClipWriter, pixels, sound

log = logging.getLogger("avdiffusion")


class SampleClips(pl.Callback):
    """Samples 0 to num - 1 of `seed` every so many optimiser steps, and once more at the end.

    Clips go to `out/step<7 digits>` and `out/final` (`final_num` of them, `num` if null, 0: none),
    each with its strip and a page, and to the loggers. `sync` measures synchrony, with F1 on `toy`
    data: of the clips, of mismatched pairs among them, and once of up to `real_num` validation
    clips; logged as `sample/avcorr`, `sample/avcorr_mismatched`, `sample/avcorr_real` and so on.
    """

    def __init__(
        self,
        *,
        out: str | Path,
        every: int = 1000,
        num: int = 8,
        seed: int = 0,
        micro_batch: int = 8,
        save: Sequence[str] = ("mp4", "wav", "png"),
        final_num: int | None = None,
        sync: bool = True,
        toy: bool = False,
        real_num: int = 64,
    ):
        if every < 0 or num < 1 or micro_batch < 1:
            raise ValueError(
                f"every={every}, num={num}, micro_batch={micro_batch}: 0, 1, 1 or more"
            )
        self.out, self.every, self.num, self.seed = Path(out), every, num, seed
        self.micro_batch, self.save = micro_batch, list(save)
        self.final_num = num if final_num is None else final_num
        self.sync, self.toy, self.real_num = sync, toy, real_num
        self.last, self.real = 0, None

    def on_train_batch_end(
        self, trainer: pl.Trainer, system: pl.LightningModule, *_: object
    ) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or not self.every or step % self.every or step == self.last:
            return
        self.last = step
        if step == trainer.max_steps and self.final_num:
            return
        self._show(trainer, system, f"step{step:07d}", self.num)

    def on_train_end(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        if trainer.is_global_zero and self.final_num:
            page, rows = self._show(trainer, system, "final", self.final_num)
            log.info("%s", summary(page, self.final_num, rows))

    def _show(self, trainer, system, name, num):
        step, rates = trainer.global_step, system.rates
        settings = {
            "step": step,
            "sampler": repr(system.sampler),
            "guides": [repr(guide) for guide in system.guides],
            "seed": self.seed,
            "micro_batch": self.micro_batch,
        }
        writer = ClipWriter(
            self.out / name, rates=rates, settings=settings, save=self.save, overwrite=True
        )
        parts = []
        total = -(-num // self.micro_batch) * getattr(system.sampler, "steps", 0) or None
        with tqdm(desc="sampling", total=total, disable=None, leave=False) as bar:
            options = {"seed": self.seed, "micro_batch": self.micro_batch, "progress": bar.update}
            for index, clips in system.samples(range(num), **options):
                writer.add(index, clips)
                parts.append(clips)
        media = _arrays({k: torch.cat([p[k] for p in parts]) for k in parts[0]})
        scores = self._scores(media, rates)
        if scores and self.real is None:
            self.real = self._real(trainer, rates)
        rows = score_rows(scores, self.real)
        title = f"{self.out.parent.name}, step {step}"
        page = writer.finish(scores=rows, title=title)

        logged = {f"sample/{key}": value for key, value in scores.items()}
        logged |= {f"sample/{key}_real": row["real"] for key, row in rows.items() if "real" in row}
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in logged.items()})
        shown = {key: value[: self.num] for key, value in media.items()}
        entries = writer.entries()[: self.num]
        for logger in trainer.loggers:
            if logged:
                logger.log_metrics(logged, step)
            publish(logger, entries, shown, writer.out / "contact.png", rates=rates, step=step)
        for callback in trainer.callbacks:
            if isinstance(callback, Speed):
                callback.restart()
        return page, rows

    def _real(self, trainer, rates):
        """Scores of the first validation clips; none if there are none."""
        data = getattr(trainer.datamodule, "val", None)
        if data is None or self.real_num < 1:
            return {}
        items = [data[i] for i in range(min(len(data), self.real_num))]
        media = {k: torch.stack([torch.as_tensor(i[k]) for i in items]) for k in ("video", "audio")}
        return self._scores({k: v.numpy() for k, v in media.items()}, rates)

    def _scores(self, media, rates):
        if not self.sync or not {"video", "audio"} <= media.keys():
            return {}
        scores = sync_scores(
            media["video"], media["audio"], rates["video"], int(rates["audio"]), toy=self.toy
        )
        return {key: float(value) for key, value in scores.items() if np.ndim(value) == 0}


def summary(page: Path, num: int, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Where the clips are, and their synchrony beside that of mismatched and real ones."""
    lines = [f"{num} clips with sound: {page}"]
    if rows:
        lines.append(f"{'':40s}" + "".join(f"{name:>12s}" for name in COLUMNS))
    for key, row in rows.items():
        cells = (f"{row[name]:12.3f}" if name in row else f"{'-':>12s}" for name in COLUMNS)
        lines.append(f"{LABELS.get(key, key):40s}" + "".join(cells))
    return "\n".join(lines)


def _arrays(media):
    """What the files hold: video as uint8, audio within [-1, 1]."""
    kinds = {"video": pixels, "audio": sound}
    return {name: kinds[name](value) for name, value in media.items() if name in kinds}
