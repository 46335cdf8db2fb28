"""Convolutions and attention of clips [B, T, H, W, C]: over each frame by itself, or over time too.

B batch, T frames, H, W height and width, C channels, N tokens of a sequence, P sequences side by
side, h heads, d channels of a head.
"""

from functools import partial

import torch
from torch import Tensor, nn

from avdiffusion.nn.attention import SelfAttention, attend
from avdiffusion.nn.blocks import Conv, UpConv, VideoConv, through, whole, zeroed


class SpaceConv(Conv):
    """A 3x3 convolution of every frame, plus an optional residual."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1):
        super().__init__(inputs, outputs, (3, 3), stride=stride)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        residual = None if residual is None else residual.flatten(0, 1)
        return super().forward(x.flatten(0, 1), residual).unflatten(0, x.shape[:2])


class SpaceUp(UpConv):
    """A 3x3 convolution of every frame at twice its size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class SpaceTimeConv(VideoConv):
    """A `VideoConv` that begins as one of frames: over time it is the identity at first."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        nn.init.dirac_(self.time.weight)
        nn.init.zeros_(self.time.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = super().forward(x)
        return out if residual is None else out.add_(residual)


class CubeConv(nn.Conv3d):
    """A 3x3x3 convolution of clips, plus an optional residual."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = super().forward(x.movedim(-1, 1)).movedim(1, -1).contiguous()
        return out if residual is None else out.add_(residual)


ATTENTIONS = ("spatial", "temporal", "factorised", "full3d")
CONVOLUTIONS = {"2d": SpaceConv, "2plus1d": SpaceTimeConv, "3d": CubeConv}


def silenced(conv: nn.Module) -> nn.Module:
    """The convolution with an output of zero, which the first gradient changes."""
    # were both factors of a factorised one zero, neither would get a gradient
    zeroed(conv.space if isinstance(conv, VideoConv) else conv)
    return conv


class TimeAttention(SelfAttention):
    """Residual self-attention over the frames of clips: of each place apart, or of all at once.

    Queries and keys are turned by angles that grow with the number of the frame (Su et al. 2021,
    https://arxiv.org/abs/2104.09864): what one frame is to another depends on how far apart they
    are, and clips may be of any length. `everywhere` compares every place of every frame with all
    others, if these are no more than `max_tokens`.
    """

    def __init__(self, channels: int, heads: int, *, everywhere: bool, max_tokens: int):
        super().__init__(channels, heads)
        if channels // heads % 2:
            raise ValueError(
                f"{channels} channels in {heads} heads make heads of {channels // heads}, which "
                "cannot be turned in pairs: choose num_heads for an even number"
            )
        self.everywhere, self.max_tokens = everywhere, max_tokens

    def forward(self, x: Tensor) -> Tensor:
        b, t, h, w, _ = x.shape
        tokens, beside = (t * h * w, 1) if self.everywhere else (t, h * w)
        if self.everywhere and tokens > self.max_tokens:
            raise ValueError(
                f"attention=full3d would compare all {tokens} places of {t} frames of {h}x{w}, "
                f"more than max_tokens={self.max_tokens}: use attention=factorised, or leave the "
                "finest of attention_resolutions out"
            )
        qkv = through(partial(whole, self.norm), self.qkv, x)
        q, k, v = qkv.view(b, tokens, beside, -1).chunk(3, dim=-1)
        q, k = (self.turned(each, t) for each in (q, k))
        return self.out(attend(q, k, v, self.heads).reshape(x.shape), residual=x)

    def turned(self, x: Tensor, frames: int) -> Tensor:
        """[B, N, P, C] with the halves of every head turned by the frame that each token is of."""
        angles = rotation(frames, x.shape[-1] // self.heads, x.device)
        angles = angles.repeat_interleave(x.shape[1] // frames, 0)[:, None, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.unflatten(-1, (self.heads, -1)).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def rotation(frames: int, width: int, device: torch.device) -> Tensor:
    """Angles of frames 0 to T - 1 at the frequencies 10000^(-2k / d): float32 [T, d / 2]."""
    steps = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    return torch.outer(torch.arange(frames, device=device, dtype=torch.float32), 10000**-steps)


def attentions(kind: str, channels: int, heads: int, max_tokens: int) -> dict[str, nn.Module]:
    """What attends at a place: `attention` within frames, `time` over them, or both in this order.

    `kind`: spatial, temporal, factorised (the one, then the other), or full3d, `time` everywhere.
    """
    if kind not in ATTENTIONS:
        raise ValueError(f"attention={kind!r} is not one of {', '.join(ATTENTIONS)}")
    made: dict[str, nn.Module] = {}
    if kind in ("spatial", "factorised"):
        made["attention"] = SelfAttention(channels, heads)
    if kind != "spatial":
        everywhere = kind == "full3d"
        made["time"] = TimeAttention(channels, heads, everywhere=everywhere, max_tokens=max_tokens)
    return made
