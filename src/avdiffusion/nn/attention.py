"""Attention inside a modality, and between picture and sound through shifted windows.

B batch, T frames, L audio tokens, N tokens of a sequence, P sequences side by side, C channels,
h heads, d channels of a head. Video is [B, T, H, W, C], audio [B, 1, 1, L, C].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avdiffusion.nn.blocks import Pointwise, whole, zeroed
from avdiffusion.nn.norm import GroupNorm

CUDA_AXIS = 65535  # the kernels put the first two axes on the grid, which ends there


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of [B, N, C] or, for every p apart, of [B, N, P, C]."""
    shape = q.shape
    q, k, v = (x.reshape(*x.shape[:2], -1, shape[-1] // heads).transpose(1, 2) for x in (q, k, v))
    return attend_heads(q, k, v).transpose(1, 2).reshape(shape)


def attend_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    for axis in (0, 1):
        if q.is_cuda and q.shape[axis] > CUDA_AXIS:
            parts = zip(*(x.split(CUDA_AXIS, axis) for x in (q, k, v)), strict=True)
            return torch.cat([attend_heads(*part) for part in parts], axis)
    return F.scaled_dot_product_attention(q, k, v)


class SelfAttention(nn.Module):
    """Residual self-attention along axis 1 of [B, N, P, C], for every p apart."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"{channels} channels do not split into {heads} heads: choose num_heads that "
                f"divides channels at every level with self-attention"
            )
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.qkv = Pointwise(channels, 3 * channels)
        self.out = zeroed(Pointwise(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return self.out(attend(q, k, v, self.heads), residual=x)


class CrossAttention(nn.Module):
    """Random-shift multi-modal attention (MM-Diffusion, section 3.3).

    Frame i attends to the sound of the `window` frames from frame i + shift on, and the sound of
    frame i to the picture of those frames, both around the circle. `window=None` means all frames.
    When L is not a multiple of T a frame has L // T audio tokens and the rest asks with the last
    frame.
    """

    def __init__(self, channels: int, *, head_channels: int, window: int | None = None):
        super().__init__()
        self.heads = max(1, channels // head_channels)
        if channels % self.heads:
            raise ValueError(
                f"{channels} channels do not split into {self.heads} cross-attention heads: choose "
                f"head_channels (now {head_channels}) that divides channels at every level with one"
            )
        self.window = window
        self.video_norm, self.audio_norm = GroupNorm(channels), GroupNorm(channels)
        self.video_qkv = Pointwise(channels, 3 * channels)
        self.audio_qkv = Pointwise(channels, 3 * channels)
        self.video_out = zeroed(Pointwise(channels, channels))
        self.audio_out = zeroed(Pointwise(channels, channels))

    def forward(
        self, video: Tensor, audio: Tensor, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`shift` is an integer scalar tensor, None for 0."""
        b, frames, h, w, c = video.shape
        samples = audio.shape[3]
        pixels, tokens = h * w, samples // frames  # of a frame
        video_qkv = self.video_qkv(whole(self.video_norm, video)).view(b, frames * pixels, -1)
        audio_qkv = self.audio_qkv(whole(self.audio_norm, audio)).view(b, samples, -1)
        vq, vk, vv = video_qkv.chunk(3, dim=-1)
        aq, ak, av = audio_qkv.chunk(3, dim=-1)

        window = frames if self.window is None else min(self.window, frames)
        even = tokens * frames == samples
        start = torch.arange(frames, device=video.device)[:, None]
        start = start if shift is None else start + shift

        if window == frames and even:
            to_video = attend(vq, ak, av, self.heads)
        else:
            ak, av = (windows(x, start, window, tokens, tokens if even else 1) for x in (ak, av))
            to_video = attend(vq.view(b * frames, pixels, c), ak, av, self.heads)
        if window == frames:
            to_audio = attend(aq, vk, vv, self.heads)
        else:
            vk, vv = (windows(x, start, window, pixels, pixels) for x in (vk, vv))
            asking = aq[:, : tokens * frames].reshape(b * frames, tokens, c)
            to_audio = attend(asking, vk, vv, self.heads).view(b, tokens * frames, c)
            if not even:
                last = (x.view(b, frames, -1, c)[:, -1] for x in (vk, vv))
                rest = attend(aq[:, tokens * frames :], *last, self.heads)
                to_audio = torch.cat((to_audio, rest), dim=1)

        video = self.video_out(to_video.reshape(video.shape), residual=video)
        return video, self.audio_out(to_audio.reshape(audio.shape), residual=audio)


def windows(x: Tensor, start: Tensor, window: int, tokens: int, unit: int) -> Tensor:
    """The tokens [B T, window * tokens, C] of `window` frames from frame start [T, 1] on, circular.

    A frame has `tokens` tokens of x [B, N, C]; `unit` (a divisor) of them are copied at a time.
    """
    steps = torch.arange(window * tokens // unit, device=x.device)
    rows = (start * (tokens // unit) + steps) % (x.shape[1] // unit)
    picked = x.unflatten(1, (-1, unit)).index_select(1, rows.flatten())
    return picked.view(x.shape[0] * len(rows), -1, x.shape[-1])
