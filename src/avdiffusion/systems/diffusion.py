"""The Lightning module of every diffusion model here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from avdiffusion.diffusion.diffusion import Diffusion, Prediction
from avdiffusion.diffusion.guide import Denoise, Guide, Task
from avdiffusion.diffusion.noise import Noise, key
from avdiffusion.diffusion.path import sent
from avdiffusion.media import Media
from avdiffusion.samplers.sampler import Sampler
from avdiffusion.systems.average import EMA, PowerEMA
from avdiffusion.systems.codec import Caller, Identity
from avdiffusion.systems.condition import Remakes
from avdiffusion.systems.step import Step
from avdiffusion.systems.system import Samples, System, empty, finite, unit
from avdiffusion.systems.timeline import Blank, Part, Timeline

SHIFTS = ("none", "fixed", "seeded")
Told = Callable[[Sequence[int]], Mapping[str, Any]]


class DiffusionSystem(System):
    """A `Diffusion`, its moving average, and how the two are trained, validated and sampled.

    `shapes` are in the order of the network's inputs.
    `codec`: between clips and what is diffused; the data itself without one.
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
        if shift not in SHIFTS:
            raise ValueError(f"shift={shift!r} is not one of {', '.join(SHIFTS)}")
        unknown = set(weights or {}) - set(shapes)
        if unknown:
            raise ValueError(f"weights for {sorted(unknown)}, but only {list(shapes)} is diffused")
        super().__init__(
            diffusion,
            shapes=shapes,
            rates=rates,
            optimizer=optimizer,
            ema=ema,
            lr_schedule=lr_schedule,
            weights=weights,
            seed=seed,
        )
        self.codec = codec or Identity()
        self.sampler, self.guides = sampler, list((guides or {}).values())
        self.shift, self.val_times = shift, val_times
        if unencoded := shapes.keys() - self.codec.shapes(shapes).keys():
            raise ValueError(f"the codec knows no {', '.join(unencoded)}, which is to be diffused")
        taken = getattr(diffusion.net, "takes", None)
        given = [shape[0] for shape in self.codec.shapes(shapes).values()]
        if taken not in (None, given):
            raise ValueError(
                f"the network takes {taken} channels, and {list(shapes)} as they are diffused have "
                f"{given}: set model.diffusion.net's channels, or another codec"
            )

    @property
    def remakes(self) -> Remakes | None:
        told = self.model.conditioner
        return told if hasattr(told, "baseline") else None

    # ---------------------------------------------------------------- training

    def training_loss(self, batch: dict) -> dict:
        x0 = self.encode(batch)
        noise = Noise(self.seed, batch["position"], "train", device=str(self.device))
        t = self.model.density(noise.uniform(), self.model.path)
        told = self.told(self.model, batch, noise.fork("condition").uniform())
        cond = told | self.shifts("train", self.global_step)
        losses = self.model.loss(x0, cond, t=t, noise=noise.like(x0))
        loss = finite(self.total({name: value.mean() for name, value in losses.items()}))
        return {"loss": loss, "losses": {k: v.detach() for k, v in losses.items()}, "t": t}

    def once(self, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        count = len(next(iter(batch.values())))
        time = torch.zeros(count, device=self.device)
        x = self.latent(count).map(torch.zeros_like)
        out = self.model.net(*x.values(), time=time, **self.told(self.model, batch))
        return out if isinstance(out, tuple) else (out,)

    def validation_step(self, batch: dict, _: int) -> None:
        """The averaged model's loss at fixed times and noises: comparable from step to step."""
        x0, path, model = self.encode(batch), self.model.path, self.ema.ema_model
        index, times, told = batch["index"].tolist(), [], self.told(model, batch)
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

    def encode(self, batch: Mapping[str, Any]) -> Media:
        """What is diffused of a batch: integers are pixels or PCM samples, floats in [-1, 1]."""
        with torch.no_grad():
            return self.codec.checked(self.codec.encode(self.clips(batch)))

    def told(
        self, model: Diffusion, batch: Mapping[str, Any], u: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What a model (online or averaged) is told of a batch; see `Diffusion.condition`."""

        def encode(clips: Media) -> Media:
            with torch.no_grad():
                return self.codec.encode(clips)

        return model.condition({name: unit(value) for name, value in batch.items()}, encode, u)

    def latent(self, count: int, shapes: Mapping[str, Sequence[int]] | None = None) -> Media:
        """An empty batch in the shapes that are diffused: of the system's clips, or of others."""
        shapes = self.codec.shapes(self.shapes if shapes is None else shapes)
        return empty(count, shapes, self.device)

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
        def decode(x: Media) -> Media:
            return self.codec.decode(x, Noise(0, range(len(next(iter(x.values()))))))

        return Task(self.model.path, decode=decode)

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
        told: Told | None = None,
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
        missing; of latents, as a whole. `told(numbers)` is what a model with a condition is told of
        these samples, as a batch has it. `step` says how the network is called, `progress` is
        called after every state of the sampler.
        """
        if micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch} is below 1")
        if self.remakes:
            raise ValueError(
                f"this model makes clips of others, of {self.remakes.takes}: it has to be given "
                "them (given=DIR), or another checkpoint that makes them (ckpt=[A,B])"
            )
        if (told is None) != (self.model.conditioner is None):
            raise ValueError(
                "this model makes clips of nothing: leave out text="
                if told
                else 'this model makes what a text says: give it one, text="a dog barking"'
            )
        guides = self.guides if guides is None else guides
        if given is not None and seconds is not None:
            raise ValueError(
                "seconds is of clips of which nothing is given: given ones have theirs"
            )
        if given is not None and not self.codec.holds:
            raise ValueError(
                "what is known of a clip is not known of its latents, in which this model works: "
                "leave out given= and known="
            )
        blank = Blank(self.shapes, self.rates, seconds)
        window = {name: shape[1] for name, shape in self.shapes.items()}
        if not self.codec.holds:  # nor is the end of the window before
            window = {name: len(mask) for name, mask in blank.mask.items()}
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
        trial = task._replace(known=nothing, mask=nothing, noise=nothing)
        self._guided(guides, self._freed(trial) if told else trial)

        def clip(i: int) -> Timeline:
            part = blank if given is None else given[i]
            return Timeline(part, window=window, overlap=overlap)

        sampler = sampler or self.sampler
        size = micro_batch if sampler.together else 1
        window_of = partial(self._window, sampler, guides, not plain, progress)

        def draw(keys: list, values: Media, mask: Media) -> tuple[Media, Media, int]:
            numbers = [k[0] if isinstance(k, tuple) else k for k in keys]
            given = self._told(task, told(numbers)) if told else task
            return window_of(given, keys, values, mask)

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
        task = self.task._replace(seeds=(self.seed, seed), call=step or Step(capture=False))
        keys = [(int(i), start) if start else int(i) for i in index]
        task = self._told(task, batch)
        values = empty(len(keys), self.model.conditioner.shapes(batch, self.shapes), "meta")
        guides, sampler = self.guides if guides is None else guides, sampler or self.sampler
        made, _, calls = self._window(sampler, guides, False, progress, task, keys, values, None)
        return Samples(list(index), made, calls)

    def _told(self, task: Task, batch: Mapping[str, Any]) -> Task:
        """The task with what the averaged model is told of a batch, and of none."""
        here = {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        return self._freed(task._replace(cond=self.told(self.ema.ema_model.eval(), here)))

    def _freed(self, task: Task) -> Task:
        """The task with the prediction under no condition, if the model knows such."""
        conditioner, denoise = self.ema.ema_model.conditioner, None
        if not getattr(conditioner, "drop", 0.0):
            return task

        def free(x: Media, t: Tensor) -> Prediction:
            nonlocal denoise
            denoise = denoise or self.denoise(task._replace(cond=conditioner.null(task.cond)))
            return denoise(x, t)

        return task._replace(free=free)

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
        sampler: Sampler,
        guides: Sequence[Guide],
        known: bool,
        progress: Callable[[], object] | None,
        task: Task,
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

        def counted(denoise: Denoise, x: Media, t: Tensor) -> Prediction:
            nonlocal calls
            calls += 1
            # A guide's strides differ from a sampler's, and kernels round by strides.
            return denoise(x.map(torch.Tensor.contiguous), t)

        def told(x: Media, t: Tensor) -> Prediction:
            nonlocal own
            found = counted(model, x, t)
            own = found.x0
            return found

        if task.free is not None:
            task = task._replace(free=partial(counted, task.free))
        denoise = self._guided(guides, task, told)
        x = path.sigma(torch.tensor(path.t_max)) * start
        for state in sampler(denoise, x, path, noise=noise.fork("step")):  # noqa: B007
            if progress is not None:
                progress()
        clips = partial(self._clips, noise=noise, call=task.call, like=values)
        made = clips(state)
        return made, clips(own) if known else made, calls

    def _clips(self, x: Media, *, noise: Noise, call: Caller, like: Media) -> Media:
        """What is diffused as clips on the CPU, of the shapes of `like`."""

        def cut(clip: Tensor, like: Tensor) -> Tensor:
            return clip[tuple(map(slice, like.shape))].float().cpu()

        return self.codec.decode(x.map(torch.detach), noise, call).map(cut, like)


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
