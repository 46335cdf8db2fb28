"""The Lightning module of every diffusion model here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from importlib.metadata import version
from itertools import groupby
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import Precision
from torch import Tensor, nn

from avdiffusion.diffusion.diffusion import Diffusion, Prediction
from avdiffusion.diffusion.guide import Denoise, Guide, Task
from avdiffusion.diffusion.noise import Noise, key
from avdiffusion.diffusion.path import sent
from avdiffusion.media import Media
from avdiffusion.samplers.sampler import Sampler
from avdiffusion.systems.average import EMA, PowerEMA
from avdiffusion.systems.codec import Identity
from avdiffusion.systems.resume import rewind, settle
from avdiffusion.systems.step import Step
from avdiffusion.systems.timeline import Blank, Part, Timeline

FORMAT = 1  # of a checkpoint; raised when an older one can no longer be read as it is
SHIFTS = ("none", "fixed", "seeded")


class Samples(NamedTuple):
    """Samples by their numbers, and how often the network was asked for them."""

    index: list[int]
    clips: Media
    evaluations: int


class DiffusionSystem(pl.LightningModule):
    """A `Diffusion`, its moving average, and how the two are trained, validated and sampled.

    `shapes`: what is generated, name to shape without batch, in the order of the network's inputs.
    `rates`: steps a second of each modality (frames, samples), for who writes files.
    `optimizer`, `ema`, `lr_schedule`: called with parameters, model, optimiser.
    `codec`: between that and what is diffused; the data itself without one.
    `weights`: factor of each modality's loss; 1 where none is given.
    `sampler`, `guides`: what sampling uses unless told otherwise.
    `shift`: of cross-modal attention windows; "none" leaves them where they are, "fixed" moves each
    block's by a fixed amount, "seeded" draws one per step (Ruan et al. 2023, section 3.2.2).
    """

    def __init__(
        self,
        *,
        diffusion: Diffusion,
        shapes: dict[str, list[int]],
        rates: dict[str, float],
        optimizer: Callable,
        ema: Callable[..., EMA | PowerEMA],
        sampler: Sampler,
        guides: dict[str, Guide] | None = None,
        codec: nn.Module | None = None,
        lr_schedule: Callable | None = None,
        weights: dict[str, float] | None = None,
        shift: str = "seeded",
        val_times: int = 4,
        seed: int = 0,
    ):
        super().__init__()
        if shift not in SHIFTS:
            raise ValueError(f"shift={shift!r} is not one of {', '.join(SHIFTS)}")
        unknown = set(weights or {}) - set(shapes)
        if unknown:
            raise ValueError(f"weights for {sorted(unknown)}, but only {list(shapes)} is diffused")
        self.model = diffusion
        self.ema = ema(diffusion)
        self.codec = codec or Identity()
        self.shapes, self.rates, self.weights = shapes, rates, weights or {}
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.sampler, self.guides = sampler, list((guides or {}).values())
        self.shift, self.val_times, self.seed = shift, val_times, seed
        self.validated = 0  # the optimiser step of the last validation that was completed

    # ---------------------------------------------------------------- training

    def training_step(self, batch: dict, _: int) -> dict:
        """The loss, with `losses` (of each modality and sample [B]) and times `t` [B] beside it."""
        found = self.training_loss(batch)
        self.log_losses("train", found["losses"], len(found["t"]))
        return found

    def training_loss(self, batch: dict) -> dict:
        """What `training_step` returns, without a trainer that is told of it."""
        # Dropout is the one thing that draws from torch's own generator; with this it, too, is a
        # function of the position in training.
        torch.manual_seed(key(self.seed, "layers", batch["position"][0]))
        x0 = self.encode(batch)
        noise = Noise(self.seed, batch["position"], "train", device=str(self.device))
        t = self.model.density(noise.uniform(), self.model.path)
        cond = self.model.condition(batch) | self.shifts("train", self.global_step)
        losses = self.model.loss(x0, cond, t=t, noise=noise.like(x0))
        loss = self.total({name: value.mean() for name, value in losses.items()})
        # A loss that is not finite has no finite gradient on any device.
        loss = loss * torch.where(loss.isfinite(), 1.0, torch.nan)
        return {"loss": loss, "losses": {k: v.detach() for k, v in losses.items()}, "t": t}

    def validation_step(self, batch: dict, _: int) -> None:
        """The averaged model's loss at fixed times and noises: comparable from step to step."""
        x0, path, model = self.encode(batch), self.model.path, self.ema.ema_model
        index, times, told = batch["index"].tolist(), [], model.condition(batch)
        for k in range(self.val_times):
            t = path.t_min + (path.t_max - path.t_min) * (k + 0.5) / self.val_times
            t = torch.full((len(index),), t, dtype=torch.float64)
            noise = Noise(self.seed, index, f"val/{k}", device=str(self.device)).like(x0)
            times.append(model.loss(x0, told | self.shifts("val", k), t=t, noise=noise))
            for name, value in times[-1].items():
                name = f"val/loss_{name}_t{k}"
                self.log(name, value.mean(), batch_size=len(index), logger=False, sync_dist=True)
        mean = {name: torch.stack([each[name] for each in times]).mean(0) for name in times[0]}
        self.log_losses("val", mean, len(index), sync_dist=True)

    def log_losses(self, stage: str, losses: dict, count: int, **options) -> Tensor:
        """Logs each modality's mean; returns (and logs) their weighted sum.

        Loggers get means over all processes from the callback `Losses`, the bar reads these.
        """
        means = {name: value.mean() for name, value in losses.items()}
        total = self.total(means)
        logged = {f"{stage}/loss_{name}": value.detach() for name, value in means.items()}
        logged[f"{stage}/loss"] = total.detach()
        self.log_dict(logged, batch_size=count, logger=False, **options)
        return total

    def total(self, losses: dict) -> Tensor:
        """The weighted sum of the modalities' mean losses."""
        return sum(self.weights.get(n.removesuffix("_vb"), 1.0) * v for n, v in losses.items())

    def encode(self, batch: dict) -> Media:
        """What is diffused of a batch: integers are pixels or PCM samples, floats in [-1, 1]."""
        missing = [name for name in self.shapes if name not in batch]
        if missing:
            raise ValueError(f"the data has no {missing}: a batch holds {sorted(batch)}")
        for name, shape in self.shapes.items():
            if list(batch[name].shape[1:]) != list(shape):
                raise ValueError(
                    f"{name} comes as {list(batch[name].shape[1:])}, the model expects "
                    f"{list(shape)}: give data and model the same frames, size and samples"
                )
        with torch.no_grad():
            return self.codec.encode(Media({name: _unit(batch[name]) for name in self.shapes}))

    def latent(self, count: int, shapes: Mapping[str, Sequence[int]] | None = None) -> Media:
        """An empty batch in the shapes that are diffused: of the system's clips, or of others."""
        clip = self._empty(count, self.shapes if shapes is None else shapes)
        return self.codec.encode(clip).map(lambda v: torch.empty_like(v, device=self.device))

    def _empty(self, count: int, shapes: Mapping[str, Sequence[int]]) -> Media:
        return Media({k: torch.empty(count, *n, device="meta") for k, n in shapes.items()})

    def shifts(self, *moment: object, seed: int | None = None) -> dict[str, Tensor]:
        """Condition entry with one window shift per cross-modal block, a function of `moment`.

        `seed`: instead of the system's own.
        """
        ranges = getattr(self.model.net, "shift_ranges", None)
        if ranges is None or self.shift == "none":
            return {}
        moment = moment if self.shift == "seeded" else ("fixed",)
        # windows are counted in steps of the first modality's time axis
        limits = ranges(next(iter(self.latent(1).values())).shape[2])
        drawn = [
            key(self.seed if seed is None else seed, "shift", *moment, block) % (limit + 1)
            for block, limit in enumerate(limits)
        ]
        return {"shifts": sent(torch.tensor(drawn), self.device)}

    def configure_optimizers(self):
        optimizer = self.optimizer(self.model.parameters())
        if self.lr_schedule is None:
            return optimizer
        schedule = {"scheduler": self.lr_schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        self.ema.update()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning, which refuses it for fused optimisers even where no gradient is scaled."""
        plugin = self.trainer.precision_plugin
        if plugin.precision == "bf16-mixed":
            how = gradient_clip_algorithm or "norm"
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, how)
        else:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def on_train_start(self) -> None:
        schedules = [each.scheduler for each in self.trainer.lr_scheduler_configs] or [None]
        settle(self.trainer.optimizers[0], schedules[0])

    def on_validation_end(self) -> None:
        self.validated = self.global_step

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["avdiffusion"] = {
            "format": FORMAT,
            "version": version("avdiffusion"),
            "validated": self.validated,
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.validated = checkpoint["avdiffusion"].get("validated", 0)
        if self.trainer.state.fn == "fit":
            step = checkpoint["global_step"]
            rewind(checkpoint["loops"], self.trainer, step=step, validated=self.validated)

    # ---------------------------------------------------------------- sampling

    def sample(
        self, num: int = 4, *, seed: int = 0, index: Sequence[int] | None = None, **options
    ) -> Media:
        """Samples 0..num-1 (or those of `index`) as one Media on the CPU; see `samples`."""
        index = range(num) if index is None else index
        parts = [part.clips for part in self.samples(index, seed=seed, **options)]
        if not parts:
            raise ValueError(f"num={num} and index={index} ask for no sample")
        if len({tuple(v.shape[1:] for v in part.values()) for part in parts}) > 1:
            raise ValueError(
                "clips of different lengths are no one batch: take them from `samples`"
            )
        return reduce(lambda a, b: a.map(lambda v, w: torch.cat([v, w]), b), parts)

    @property
    def task(self) -> Task:
        return Task(self.model.path, decode=self.codec.decode)

    def denoise(self, task: Task) -> Denoise:
        """The averaged model's prediction, with the window shifts of the task's seeds at each t."""
        model, (root, seed) = self.ema.ema_model.eval(), task.seeds
        net, told = task.call(model.net), dict(task.cond or {})

        def predict(x: Media, t: Tensor) -> Prediction:
            cond = told | self.shifts("sample", seed, float(t), seed=root)
            return model.predict(x, t, cond, net)

        return predict

    def samples(
        self,
        index: Sequence[int],
        *,
        seed: int = 0,
        sampler: Sampler | None = None,
        guides: Sequence[Guide] | None = None,
        given: Sequence[Part] | None = None,
        seconds: float | None = None,
        overlap: int | None = None,
        micro_batch: int = 8,
        step: Step | None = None,
        progress: Callable[[], object] | None = None,
    ) -> Iterator[Samples]:
        """Samples in about [-1, 1] on the CPU, `micro_batch` at a time.

        Sample i of a seed is the same whichever others are asked for. Kernels round differently at
        another batch size and, near the end of their work, at another place in the batch. So every
        batch is filled up to `micro_batch`, and sample i has place i mod micro_batch in it: numbers
        that are neighbours share batches.

        `given[i]` is what is known of sample i, which stays as it is; the guides have to hold it.
        Clips of more `seconds` than the model's, or given ones, are made window by window, each
        from `overlap` steps (of the slowest modality; half a window unless told) before what is
        missing. `step` says how the network is called, `progress` is called after every state of
        the sampler.
        """
        if micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch} is below 1")
        if self.model.conditioner is not None:
            raise ValueError(
                f"this model makes clips of others, of {self.model.conditioner.takes}: it has to "
                "be given them (given=DIR), or another checkpoint that makes them (ckpt=[A,B])"
            )
        guides = self.guides if guides is None else guides
        if given is not None and seconds is not None:
            raise ValueError(
                "seconds is of clips of which nothing is given: given ones have theirs"
            )
        blank = Blank(self.shapes, self.rates, seconds)
        window = {name: shape[1] for name, shape in self.shapes.items()}
        overlap = min(window.values()) // 2 if overlap is None else overlap
        Timeline(blank, window=window, overlap=overlap)  # an error comes before any work
        plain = given is None and all(len(blank.mask[name]) == window[name] for name in window)
        if not plain and not any(getattr(guide, "holds", False) for guide in guides):
            raise ValueError(
                "no guide holds what is given, or the end of the window before: add one, such as "
                '"guide=[stored,reconstruct]"'
            )
        if step and step.interval > 1 and any(getattr(g, "gradient", False) for g in guides):
            raise ValueError(
                "a guide here follows the gradient of the whole network, of which reuse.interval="
                f"{step.interval} leaves out parts: use reuse.interval=1, or guide=[stored,replace]"
            )
        task = self.task._replace(seeds=(self.seed, seed))
        task = task._replace(call=step) if step else task
        nothing = None if plain else Media()
        self._guided(guides, task._replace(known=nothing, mask=nothing, noise=nothing))

        def clip(i: int) -> Timeline:
            part = blank if given is None else given[i]
            return Timeline(part, window=window, overlap=overlap)

        sampler = sampler or self.sampler
        size = micro_batch if sampler.together else 1
        draw = partial(self._window, task, sampler, guides, not plain, progress)
        # An int of another type would be another key of the noise.
        return self._samples([int(i) for i in index], size, clip, draw)

    @torch.no_grad()  # not inference_mode: gradient guides enable gradients inside
    def conditioned(
        self,
        batch: Mapping[str, Any],
        index: Sequence[int],
        *,
        seed: int = 0,
        start: int = 0,
        sampler: Sampler | None = None,
        guides: Sequence[Guide] | None = None,
        step: Step | None = None,
        progress: Callable[[], object] | None = None,
    ) -> Samples:
        """What is made of a batch of the conditioner's, which sets its size and length.

        Row k becomes sample `index[k]` of the seed, in about [-1, 1] on the CPU. A sample may be
        made in parts: each then has a `start` of its own, the first 0.
        """
        model = self.ema.ema_model.eval()
        batch = {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        cond = model.condition(batch)
        call = step or Step(capture=False)
        task = self.task._replace(seeds=(self.seed, seed), cond=cond, call=call)
        keys = [(int(i), start) if start else int(i) for i in index]
        values = self._empty(len(keys), model.conditioner.shapes(batch, self.shapes))
        guides = self.guides if guides is None else guides
        made, _, calls = self._window(
            task, sampler or self.sampler, guides, False, progress, keys, values, None
        )
        return Samples(list(index), made, calls)

    def _guided(
        self, guides: Sequence[Guide], task: Task, denoise: Denoise | None = None
    ) -> Denoise:
        """The prediction (the model's own) as the guides in turn change it."""
        denoise = denoise or self.denoise(task)
        for guide in guides:
            denoise = guide(denoise, task)
        return denoise

    @torch.no_grad()  # not inference_mode: gradient guides enable gradients inside
    def _samples(
        self,
        index: list[int],
        size: int,
        clip: Callable[[int], Timeline],
        window: Callable[..., tuple[Media, Media, int]],
    ) -> Iterator[Samples]:
        """Fills the clips of `size` samples at a time, window by window."""
        for group in _batches(index, size):
            clips, count = {i: clip(i) for i in group}, 0
            places = {i % size: i for i in group}
            names = [places.get(place, group[-1]) for place in range(size)]
            rows = [clips[i] for i in names]
            while any(each.next() is not None for each in clips.values()):
                # A clip that is complete is made once more, so that the batch keeps its size.
                starts = [each.next() or 0 for each in rows]
                keys = [(i, s) if s else i for i, s in zip(names, starts, strict=True)]
                parts = [each.read(s) for each, s in zip(rows, starts, strict=True)]
                made, own, calls = window(keys, *_stack(parts))
                count += calls
                for k, i in places.items():
                    if clips[i].next() is not None:
                        clips[i].write(
                            starts[k], *(x.map(lambda v, k=k: v[k]) for x in (made, own))
                        )
            yield from _by_length(group, list(clips.values()), count)

    def _window(
        self,
        task: Task,
        sampler: Sampler,
        guides: Sequence[Guide],
        known: bool,
        progress: Callable[[], object] | None,
        index: list,
        values: Media,
        mask: Media | None,
    ) -> tuple[Media, Media, int]:
        """One batch shaped like `values`; `known` says whether what they and the mask hold matters.

        Also what the model by itself made of it at last, and how often it was asked.
        """
        noise = self.codec.noise(Noise(task.seeds[1], index, "sample"))
        shapes = {name: value.shape[1:] for name, value in values.items()}
        start = noise.fork("start").like(self.latent(len(index), shapes))
        path = self.model.path
        if known:
            task = task._replace(
                known=self.codec.encode(values.to(self.device)),
                mask=self.codec.mask(mask.to(self.device)),
                noise=start,
            )
        model, own, calls = self.denoise(task), None, 0

        def counted(x: Media, t: Tensor) -> Prediction:
            nonlocal own, calls
            # A guide's strides differ from a sampler's, and kernels round by strides.
            found = model(x.map(torch.Tensor.contiguous), t)
            own, calls = found.x0, calls + 1
            return found

        denoise = self._guided(guides, task, counted)
        x = path.sigma(torch.tensor(path.t_max)) * start
        for state in sampler(denoise, x, path, noise=noise.fork("step")):  # noqa: B007
            if progress is not None:
                progress()
        made = self._clips(state)
        return made, self._clips(own) if known else made, calls

    def _clips(self, x: Media) -> Media:
        return self.codec.decode(x.map(torch.detach)).map(lambda v: v.float().cpu())


def _unit(value: Tensor) -> Tensor:
    if value.dtype == torch.uint8:
        return value.float() / 127.5 - 1
    if value.dtype == torch.int16:
        return value.float() / 32768
    return value.float()


def _stack(windows: Sequence[tuple[Media, Media]]) -> tuple[Media, Media]:
    """Values and masks of single windows as two batches."""
    values, masks = zip(*windows, strict=True)

    def joined(parts: Sequence[Media]) -> Media:
        return Media({name: torch.stack([part[name] for part in parts]) for name in parts[0]})

    return joined(values), joined(masks)


def _batches(index: list[int], size: int) -> Iterator[list[int]]:
    """In their order, as many as have different places in a batch."""
    batch: dict[int, int] = {}
    for i in index:
        if i % size in batch:
            yield list(batch.values())
            batch = {}
        batch[i % size] = i
    if batch:
        yield list(batch.values())


def _by_length(index: list[int], clips: list[Timeline], evaluations: int) -> Iterator[Samples]:
    """Neighbours of one length as one batch."""
    pairs = zip(index, clips, strict=True)
    for _, same in groupby(pairs, key=lambda pair: pair[1].lengths):
        numbers, lines = zip(*same, strict=True)
        media = {name: torch.stack([c.values[name] for c in lines]) for name in lines[0].values}
        yield Samples(list(numbers), Media(media), evaluations)
