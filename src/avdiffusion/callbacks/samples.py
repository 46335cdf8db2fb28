"""Clips of the averaged model while it trains, on disk and in the loggers."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from avdiffusion.callbacks.evolution import evolution
from avdiffusion.callbacks.held_out import HeldOut, conditional, remakes
from avdiffusion.callbacks.loggers import Once
from avdiffusion.callbacks.publish import publish
from avdiffusion.callbacks.scores import Scorer, Scores, arrays
from avdiffusion.callbacks.speed import Speed
from avdiffusion.callbacks.stop import Stop
from avdiffusion.gallery import LABELS, columns
from avdiffusion.spread import gathered, share
from avdiffusion.strip import contact_sheet
from avdiffusion.writer import ClipWriter, png, write_whole

log = logging.getLogger("avdiffusion")
FILES = "clips cannot be written"


class SampleClips(pl.Callback):
    """Samples 0 to num - 1 of `seed` every so many optimiser steps, and once more at the end.

    Several processes share the work. Clips go to `out/step<7 digits>` and `out/final` (`final_num`
    of them, `num` if null, 0: none), each with its strip and a page, and to the loggers;
    `out/evolution` shows the first `evolution` of them at all steps (if png is among `save`).

    `metrics` are called with the clips as arrays (video uint8 [B, 3, T, H, W], audio float32
    [B, C, L]) and the rates of both; what they return is logged as `sample/<key>`, and what they
    say of the first `real_num` validation clips, once, as `sample/<key>_real`. Those with
    `against_real`, such as distances, get these clips as a third argument, and are called for
    samples alone. Metrics of reports that share an extractor share what it finds, and that of real
    clips is kept. `sample/nonfinite` counts the clips that hold NaN or infinity. A metric that
    fails, or a disk that takes no clips, is said once.

    A system that makes clips of others is given the first validation clips. Then metrics of reports
    may be paired, which compare with what the samples should be; these are the real clips as well.
    `sample/<key>_baseline` is what all say, once, of what was given, without the model, and
    `compare.png` shows the first of both beside what they are made of and should be.
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
        metrics: Mapping[str, Scorer] | None = None,
        real_num: int = 64,
        evolution: int = 4,
    ):
        if every < 0 or num < 1 or micro_batch < 1:
            raise ValueError(
                f"every={every}, num={num}, micro_batch={micro_batch}: 0, 1, 1 or more"
            )
        self.out, self.every, self.num, self.seed = Path(out), every, num, seed
        self.micro_batch, self.save = micro_batch, list(save)
        self.final_num = num if final_num is None else final_num
        self.evolution, self.last, self.once = evolution, 0, Once()
        self.scores = Scores(metrics or {}, real_num=real_num, once=self.once)
        self.held_out: HeldOut | None = None  # for a conditioned system

    def on_train_start(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        self.last = trainer.global_step
        if conditional(system):
            self.held_out = HeldOut(getattr(trainer.datamodule, "val", None) or (), system)
            if trainer.is_global_zero and not self.held_out.data:
                log.warning("no clips are sampled: there is no validation clip to make them of")
        # of a run that goes on in its folder, and was ended before or while it sampled
        place = self.out / self._name(trainer)
        own = Path(trainer.ckpt_path or ".").absolute().is_relative_to(self.out.parent.absolute())
        missed = own and self._due(trainer) and not (place / "gallery.html").is_file()
        if trainer.strategy.broadcast(missed):
            self._show(trainer, system, place.name, self.num)

    def on_train_batch_end(
        self, trainer: pl.Trainer, system: pl.LightningModule, *_: object
    ) -> None:
        if trainer.global_step != self.last:
            self.last = trainer.global_step
            if self._due(trainer):
                self._show(trainer, system, self._name(trainer), self.num)

    def on_train_end(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        if self.final_num:
            page, rows = self._show(trainer, system, "final", self.final_num)
            if page:
                sound = " with sound" if "audio" in system.rates else ""
                log.info("%s", summary(f"{self.final_num} clips{sound}: {page}", rows))

    def _due(self, trainer):
        step = trainer.global_step
        if not step or not self.every or step % self.every:
            return False
        return step != trainer.max_steps or not self.final_num

    def _name(self, trainer):
        return f"step{trainer.global_step:07d}"

    def _show(self, trainer, system, name, num):
        """Samples, writes, scores and logs; (page, rows of scores), of the first process alone."""
        if self.held_out and not self.held_out.data:
            return None, {}
        writer, found, page, rows, logged = None, {}, None, {}, {}
        if trainer.is_global_zero:
            with self.once(FILES):
                writer = ClipWriter(
                    self.out / name,
                    rates=system.rates,
                    settings=self._settings(trainer, system),
                    save=self.save,
                    overwrite=True,
                )
        for index, clips in self._sampled(trainer, system, num):
            if trainer.is_global_zero:
                found |= {i: {k: v[j] for k, v in clips.items()} for j, i in enumerate(index)}
                with self.once(FILES):
                    if writer:
                        texts = self.held_out and self.held_out.texts(index)
                        writer.add(index, clips, texts=texts)
        if trainer.is_global_zero:
            media = {k: torch.stack([found[i][k] for i in range(num)]) for k in found[0]}
            clips, data = arrays(media), getattr(trainer.datamodule, "val", None)
            beside = self.held_out and self.held_out.beside(num)
            scores = self.scores(clips, system.rates, data, beside)
            scores["nonfinite"] = _nonfinite(media, trainer.global_step)
            logged = {f"sample/{key}": value for key, value in scores.items()}
            rows = self.scores.rows(scores)
            pictures = {"compare": beside.comparison(clips)} if beside else {}
            if writer:
                with self.once(FILES):
                    for kind, picture in pictures.items():
                        write_whole(writer.out / f"{kind}.png", png(picture))
                    title = f"{self.out.parent.name}, step {trainer.global_step}"
                    page = writer.finish(scores=rows, title=title)
            self._log(trainer, system.rates, writer, clips, logged, pictures)
        logged = trainer.strategy.broadcast(logged)
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in logged.items()})
        for callback in trainer.callbacks:
            if isinstance(callback, Speed):
                callback.restart()
        return page, rows

    def _settings(self, trainer, system):
        """What the clips depend on."""
        source = remakes(system)
        return {
            "step": trainer.global_step,
            "sampler": repr(system.sampler),
            "guides": [repr(guide) for guide in system.guides],
            "seed": self.seed,
            "micro_batch": self.micro_batch,
            **({"baseline": source.baseline_name} if source else {}),
        }

    def _sampled(self, trainer, system, num) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Samples 0 to num - 1 as they come: each process makes some batches, all get all."""
        world, together = trainer.world_size, getattr(system.sampler, "together", True)
        size = self.micro_batch if together else 1
        own = share(range(num), size, trainer.global_rank, world)
        stops = [callback for callback in trainer.callbacks if isinstance(callback, Stop)]
        total = -(-len(own) // size) * getattr(system.sampler, "steps", 0) or None
        with tqdm(
            desc="sampling",
            total=total,
            disable=None if trainer.is_global_zero else True,
            leave=False,
        ) as bar:

            def progress():
                bar.update()
                for stop in stops:
                    stop.check(trainer)

            options = {"seed": self.seed, "micro_batch": size, "progress": progress}
            source = self.held_out or system
            for index, clips, _ in gathered(source.samples(own, **options), world):
                yield index, clips

    def _log(self, trainer, rates, writer, media, logged, pictures):
        """Scores and the first `num` clips with their pictures to every logger."""
        entries = []
        with self.once(FILES):
            if writer:
                entries = writer.entries()[: self.num]
            strips = {e.name: Image.open(BytesIO(e.strip)) for e in entries if e.strip}
            if strips:
                pictures["strips"] = contact_sheet(list(strips.values()), list(strips))
            numbers = range(min(self.evolution, self.num))
            if numbers and (sheet := evolution(self.out, numbers)):
                pictures["evolution"] = sheet
        shown = {key: value[: len(entries)] for key, value in media.items()}
        for logger in trainer.loggers:
            logger.log_metrics(logged, trainer.global_step)
            with self.once(FILES):
                publish(logger, entries, shown, pictures, rates=rates, step=trainer.global_step)


def summary(head: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table of scores for the terminal, under where the clips are."""
    shown, lines = columns(rows), [head]
    if rows:
        lines.append(f"{'':40s}" + "".join(f"{name:>12s}" for name in shown))
    for key, row in rows.items():
        cells = (f"{row[name]:12.3f}" if name in row else f"{'-':>12s}" for name in shown)
        lines.append(f"{LABELS.get(key, key):40s}" + "".join(cells))
    return "\n".join(lines)


def _nonfinite(media, step):
    """How many clips hold a value that is not finite."""
    broken = torch.stack([~v.isfinite().flatten(1).all(1) for v in media.values()]).any(0)
    if count := int(broken.sum()):
        log.warning("step %d: %d of %d clips hold NaN or infinity", step, count, len(broken))
    return count
