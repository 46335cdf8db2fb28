"""Attention inside a modality, and between picture and sound through shifted windows.

B batch, T frames, L audio tokens, N tokens of a sequence, P sequences side by side, C channels,
h heads, d channels of a head. Video is [B, T, H, W, C], audio [B, 1, 1, L, C].
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from avdiffusion.nn.blocks import Pointwise, through, whole, zeroed
from avdiffusion.nn.norm import GroupNorm

CUDA_AXIS = 65535  # the kernels put the first two axes on the grid, which ends there
LOGITS = 2**23  # how many a CPU holds at once, where it holds them


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of [B, N, C] or, for every p apart, of [B, N, P, C]."""
    shape = q.shape
    if q.dim() == 4 and len(q) == 1:  # p as the batch: no copies
        return attend(*(x[0].transpose(0, 1) for x in (q, k, v)), heads).transpose(0, 1)[None]
    # p beside the heads
    q, k, v = (x.reshape(*x.shape[:2], -1, shape[-1] // heads).transpose(1, 2) for x in (q, k, v))
    return attend_heads(q, k, v).reshape(shape)


def attend_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same of [B, h, N, d]; the result is [B, N, h, d]."""
    size = parallel(q, k)
    for axis in (0, 1):
        if q.shape[axis] > size[axis]:
            parts = zip(*(x.split(size[axis], axis) for x in (q, k, v)), strict=True)
            return torch.cat([attend_heads(*part) for part in parts], 2 * axis)
    if q.is_cpu and q.dtype == torch.bfloat16:
        if torch.is_grad_enabled():  # the weights are large, and soon computed again
            found = recompute(explicit, q, k, v, use_reentrant=False, preserve_rng_state=False)
        else:
            found = explicit(q, k, v)
    else:
        found = F.scaled_dot_product_attention(q, k, v)
    return found.transpose(1, 2)


def parallel(q: Tensor, k: Tensor) -> tuple[int, int]:
    """How many of the first two axes one call may take."""
    if q.is_cuda:
        return CUDA_AXIS, CUDA_AXIS
    if q.dtype != torch.bfloat16:
        return q.shape[:2]
    rows = max(1, LOGITS // (q.shape[2] * k.shape[2]))
    return max(1, rows // q.shape[1]), rows


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with all its weights at once: CPUs multiply bfloat16 fast, but not in blocks."""
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # a matmul would copy k^T, across memory
    logits = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=shape[-1] ** -0.5)
    return (logits.softmax(-1).to(v.dtype) @ v).view(shape)


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
        q, k, v = through(self.norm, self.qkv, x).chunk(3, dim=-1)
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
        video_qkv = through(partial(whole, self.video_norm), self.video_qkv, video)
        audio_qkv = through(partial(whole, self.audio_norm), self.audio_qkv, audio)
        vq, vkv = video_qkv.view(b, frames * pixels, -1).split((c, 2 * c), dim=-1)
        aq, akv = audio_qkv.view(b, samples, -1).split((c, 2 * c), dim=-1)

        window = frames if self.window is None else min(self.window, frames)
        even = tokens * frames == samples
        if window < frames or not even:
            start = torch.arange(frames, device=video.device)[:, None]
            start = start if shift is None else start + shift
            rows = (start + torch.arange(window, device=video.device)) % frames

        if window == frames and even:
            to_video = attend(vq, *akv.chunk(2, dim=-1), self.heads)
        else:
            if even:
                heard = windows(akv.view(b, frames, tokens, -1), rows)
            else:
                steps = torch.arange(window * tokens, device=video.device)
                heard = windows(akv[:, :, None], (start * tokens + steps) % samples)
            to_video = attend(vq.view(b * frames, pixels, c), *heard, self.heads)
        if window == frames:
            to_audio = attend(aq, *vkv.chunk(2, dim=-1), self.heads)
        else:
            seen = windows(vkv.view(b, frames, pixels, -1), rows)
            asking = aq[:, : tokens * frames].reshape(b * frames, tokens, c)
            to_audio = attend(asking, *seen, self.heads).view(b, tokens * frames, c)
            if not even:
                last = (x.view(b, frames, -1, c)[:, -1] for x in seen)
                rest = attend(aq[:, tokens * frames :], *last, self.heads)
                to_audio = torch.cat((to_audio, rest), dim=1)

        return (
            self.video_out(to_video.reshape(video.shape), residual=video),
            self.audio_out(to_audio.reshape(audio.shape), residual=audio),
        )


def windows(kv: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the units `rows` [T, U] of kv [B, units, N, 2 C]: [B T, U N, C] each."""
    picked = kv.index_select(1, rows.flatten())
    return picked.view(len(kv) * len(rows), -1, kv.shape[-1]).chunk(2, dim=-1)
