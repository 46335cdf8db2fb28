"""Batches in an order that neither devices, workers nor a restart change."""

import logging
import math
import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

log = logging.getLogger("avdiffusion")
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")  # that end training in good order


class Draws(Dataset):
    """A dataset asked for (index, position, seed): the position in training keys all chance.

    Datasets with `draw(index, rng)` get a generator of their own for windows and flips; any other
    map-style dataset, or every one with `random=False`, is simply indexed.
    """

    def __init__(self, dataset: Dataset, *, random: bool = True):
        self.dataset, self.random = dataset, random

    def __getitem__(self, request: tuple[int, int, int]) -> dict:
        index, position, seed = request
        if self.random and hasattr(self.dataset, "draw"):
            item = self.dataset.draw(index, np.random.default_rng((seed, position)))
        else:
            item = self.dataset[index]
        return {"index": index, **item, "position": position}


class EndlessBatches:
    """Requests for the micro-batches of one device, from position `start` on, for ever.

    Epoch e walks the dataset in a permutation keyed by (seed, e); every optimiser step takes the
    next B positions of that walk, its micro-batch k on rank r the r-th slice of the k-th share.
    It has no length on purpose: Lightning resumes an endless loader where it is told to start.
    """

    def __init__(
        self,
        size: int,
        *,
        micro_batch: int,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.size, self.micro_batch, self.seed = size, micro_batch, seed
        self.start, self.rank, self.world = start, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        share = self.micro_batch * self.world
        position = self.start + self.rank * self.micro_batch
        while True:
            yield [self.request(position + i) for i in range(self.micro_batch)]
            position += share

    def request(self, position: int) -> tuple[int, int, int]:
        epoch, place = divmod(position, self.size)
        return int(self.order(epoch)[place]), position, self.seed

    def order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            rng = np.random.default_rng((self.seed, epoch, 1))  # `Draws` has (seed, position)
            self._epoch, self._order = epoch, rng.permutation(self.size)
        return self._order


def collate(items: list[dict]) -> dict:
    """`default_collate`, but positions stay plain numbers: keys for chance, needed on the host."""
    positions = [item.pop("position") for item in items]
    return {**default_collate(items), "position": positions}


class DataModule(pl.LightningDataModule):
    """A training and a validation dataset as batches `{video, audio, index, position, ...}`.

    `batch_size` is the global batch of one optimiser step; each device holds `micro_batch` of it
    (all of its share by default) and accumulates the rest. Of the training data the first `limit`
    items are used; with `random=False` each is always the same window, not mirrored. `frames`,
    `fps`, `size`, `samples`, `sample_rate`, `channels`, `root` say what the datasets deliver; they
    are checked once here. Without sound `samples` and `sample_rate` are None, without a picture
    `frames`, `fps` and `size`.
    """

    def __init__(
        self,
        *,
        train: Dataset,
        val: Dataset | None = None,
        fps: float | None,
        frames: int | None,
        size: list[int] | None,
        sample_rate: int | None,
        samples: int | None,
        channels: int = 1,
        root: str | None = None,
        batch_size: int = 16,
        micro_batch: int | None = None,
        limit: int | None = None,
        random: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        counts = {"batch_size": batch_size, "micro_batch": micro_batch, "limit": limit}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name}={value} is below 1")
        if len(train) == 0:
            raise ValueError(f"the training data is empty ({root or type(train).__name__})")
        check_duration(fps=fps, frames=frames, sample_rate=sample_rate, samples=samples)
        self.train, self.val, self.root = train, val, root
        self.fps, self.frames, self.size = fps, frames, size
        self.sample_rate, self.samples, self.channels = sample_rate, samples, channels
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.count, self.random = min(limit or len(train), len(train)), random
        self.num_workers, self.seed = num_workers, seed
        self.since = (0, 0)  # position and optimiser step where this data began

    def split(self, world: int) -> tuple[int, int]:
        """(micro-batch, how many of them an optimiser step takes) of each of `world` devices."""
        if self.batch_size % world:
            raise ValueError(
                f"data.batch_size={self.batch_size} is global and {world} devices do not divide it"
            )
        share = self.batch_size // world
        held = self.micro_batch or share
        if share % held:
            raise ValueError(
                f"data.micro_batch={held} does not divide a device's share of "
                f"{share} (data.batch_size={self.batch_size} over {world} devices)"
            )
        return held, share // held

    @property
    def consumed(self) -> int:
        """How many positions finished optimiser steps have taken; prefetched ones don't count."""
        position, step = self.since
        return position + (self.trainer.global_step - step) * self.batch_size

    def state_dict(self) -> dict:
        epoch, _ = divmod(self.consumed, self.count)
        return {
            "consumed": self.consumed,
            "step": self.trainer.global_step,
            "epoch": epoch,
            "seed": self.seed,
            "size": self.count,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.since = (state_dict["consumed"], state_dict["step"])
        for name, now in (("seed", self.seed), ("size", self.count)):
            if state_dict[name] != now:
                log.warning(
                    "the order of the data is another one from here on: data %s was %d, is %d",
                    name,
                    state_dict[name],
                    now,
                )

    def train_dataloader(self) -> DataLoader:
        batches = EndlessBatches(
            self.count,
            micro_batch=self.split(self.trainer.world_size)[0],
            seed=self.seed,
            start=self.consumed,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )
        return self._loader(Draws(self.train, random=self.random), batch_sampler=batches)

    def val_dataloader(self) -> DataLoader | list:
        if self.val is None:
            return []
        rank, world = self.trainer.global_rank, self.trainer.world_size
        if len(self.val) < world:
            raise ValueError(f"{len(self.val)} validation items don't go round {world} devices")
        mine = Subset(Indexed(self.val), range(rank, len(self.val), world))
        return self._loader(mine, batch_size=self.split(world)[0])

    def _loader(self, dataset: Dataset, **order) -> DataLoader:
        return DataLoader(
            dataset,
            collate_fn=collate,
            worker_init_fn=leave_signals,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **order,
        )


def leave_signals(_: int) -> None:
    """A worker ends when its parent says so; of a signal to all processes it takes no notice.

    The parent acts on that, and still needs its workers for the step that is under way.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        return
    numbers, parent = [getattr(signal, name) for name in SIGNALS], os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def wait():
        while signal.sigwaitinfo(numbers).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Indexed(Dataset):
    """A dataset in its own order, each item with its number as index and position."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return {**self.dataset[index], "index": index, "position": index}


def check_duration(
    *, fps: float | None, frames: int | None, sample_rate: int | None, samples: int | None
) -> None:
    """Raises ValueError unless picture and sound, where both are there, last equally long."""
    if any(rate is not None and rate <= 0 for rate in (fps, sample_rate)):
        raise ValueError(f"fps={fps} and sample_rate={sample_rate} have to be above 0")
    if None in (fps, frames) or None in (sample_rate, samples):
        return
    wanted = round(sample_rate * frames / fps)
    if not math.isclose(samples, wanted, abs_tol=0.5):
        raise ValueError(
            f"picture and sound differ in length: {frames} frames at {fps} fps last "
            f"{frames / fps:.4g} s, {samples} samples at {sample_rate} Hz last "
            f"{samples / sample_rate:.4g} s; set data.samples={wanted}"
        )
