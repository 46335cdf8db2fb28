"""A joint system small enough to train within a test."""

from functools import partial

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import Dataset

from avdiffusion.data.module import DataModule
from avdiffusion.diffusion.diffusion import Diffusion
from avdiffusion.diffusion.path import DiscreteVP
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.systems.average import EMA
from avdiffusion.systems.diffusion import DiffusionSystem

SHAPES = {"video": [3, 4, 4, 4], "audio": [1, 32]}
CLIP = {"fps": 8.0, "frames": 4, "size": [4, 4], "sample_rate": 64, "samples": 32}


class Net(nn.Module):
    """Video and audio through one hidden vector that both read; counts what it is given."""

    def __init__(self, width=64, dropout=0.0):
        super().__init__()
        self.into = nn.ModuleDict({k: nn.Linear(size(v), width) for k, v in SHAPES.items()})
        self.time = nn.Linear(2, width)
        self.hidden = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.ModuleDict({k: nn.Linear(width, size(v)) for k, v in SHAPES.items()})
        self.skip = nn.ParameterDict({k: nn.Parameter(torch.zeros(())) for k in SHAPES})
        self.seen = []

    def shift_ranges(self, frames):
        return [frames - 1, 0, frames]

    def forward(self, video, audio, *, time, shifts=None):
        self.seen.append((time.tolist(), None if shifts is None else shifts.tolist()))
        x = dict(zip(SHAPES, (video, audio), strict=True))
        h = sum(self.into[k](v.flatten(1)) for k, v in x.items())
        h = h + self.time(torch.stack([time / 1000, (time / 1000).square()], 1))
        if shifts is not None:
            h = h + 0.01 * shifts.sum()
        h = self.dropout(torch.relu(self.hidden(torch.relu(h))))
        return tuple(self.skip[k] * v + self.out[k](h).view_as(v) for k, v in x.items())

    def __deepcopy__(self, memo):
        """A copy with a record of its own."""
        new = Net(self.hidden.in_features, self.dropout.p)
        new.load_state_dict(self.state_dict())
        return new


def size(shape):
    return torch.Size(shape).numel()


def system(*, net=None, lr=1e-2, beta=0.9, target="v", seed=0, **options):
    torch.manual_seed(seed)
    return DiffusionSystem(
        **{
            "diffusion": Diffusion(
                net=net or Net(), path=DiscreteVP(betas="cosine"), target=target
            ),
            "shapes": SHAPES,
            "rates": {"video": CLIP["fps"], "audio": CLIP["sample_rate"]},
            "optimizer": partial(torch.optim.AdamW, lr=lr, weight_decay=0.0),
            "ema": partial(EMA, beta=beta, inv_gamma=1.0, power=2 / 3),
            "sampler": DDIM(steps=5),
            "seed": seed,
            **options,
        }
    )


class Clips(Dataset):
    """Clips made from their number, plain or with the chance they are given."""

    def __init__(self, num=20, chance=False):
        self.num = num
        if chance:
            self.draw = self.item

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return self.item(index)

    def item(self, index, rng=None):
        rng_index = torch.Generator().manual_seed(index)
        video = torch.randint(0, 256, SHAPES["video"], generator=rng_index, dtype=torch.uint8)
        audio = torch.rand(SHAPES["audio"], generator=rng_index) * 2 - 1
        item = {"video": video, "audio": audio, "index": index}
        return item if rng is None else {**item, "chance": torch.tensor(rng.random())}


def data(num=20, *, chance=False, val=8, **options):
    """A DataModule of such clips."""
    return DataModule(
        train=Clips(num, chance), val=Clips(val) if val else None, **{**CLIP, **options}
    )


def batch(*numbers, position=0):
    """The clips of these numbers as a batch."""
    items = [Clips()[n] for n in numbers]
    return {
        "video": torch.stack([i["video"] for i in items]),
        "audio": torch.stack([i["audio"] for i in items]),
        "index": torch.tensor(numbers),
        "position": [position + k for k in range(len(numbers))],
    }


def trainer(steps, **options):
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "max_epochs": -1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "val_check_interval": 1000,
            "use_distributed_sampler": False,
            "inference_mode": False,
            **options,
        }
    )


def fit(model, steps, module=None, ckpt=None, **options):
    """Trains for some steps and returns the trainer."""
    run = trainer(steps, **options)
    run.fit(model, module or data(batch_size=4), ckpt_path=ckpt, weights_only=True)
    return run
