"""Conditional batch normalisation, with statistics for every part of a noise schedule."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from avdiffusion.nn.norm import precise


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation of [B, N, P, C] over all but channels (Ioffe and Szegedy 2015).

    `film` [B or 1, 2 C] scales and shifts the result: (1 + scale) norm(x) + shift (de Vries et al.
    2017, https://arxiv.org/abs/1707.00683). In training the moments are those of the batch, on all
    processes. Otherwise they are averages kept from training, in `buckets` sets: what a sample
    becomes depends on no other. `share` [B or 1], from 0 to 1, is where in its schedule a sample
    is; one in [k, k + 1) / buckets is of set k.

    One set for all would fit no noise level. An average moves by `momentum` with every batch that
    has samples of its set.
    """

    def __init__(
        self, channels: int, *, silu: bool = False, buckets: int = 8, momentum: float = 0.1
    ):
        super().__init__()
        self.silu, self.momentum, self.eps = silu, momentum, 1e-5
        self.register_buffer("mean", torch.zeros(buckets, channels))
        self.register_buffer("variance", torch.ones(buckets, channels))

    def forward(self, x: Tensor, film: Tensor | None = None, *, share: Tensor) -> Tensor:
        values, buckets = precise(x), len(self.mean)
        bucket = (share * buckets).long().clamp(0, buckets - 1)
        if self.training:
            mean, variance = self.of_batch(values, bucket.expand(len(x)))
        else:
            mean, variance = self.mean[bucket], self.variance[bucket]
        slope = (variance + self.eps).rsqrt()
        offset = -mean * slope
        if film is not None:
            scale, shift = film.chunk(2, dim=-1)
            slope, offset = slope * (1 + scale), torch.addcmul(shift, offset, 1 + scale)
        slope, offset = (v.view(len(v), 1, 1, -1) for v in (slope, offset))
        out = torch.addcmul(offset, values, slope)
        return (F.silu(out) if self.silu else out).to(x.dtype)

    def of_batch(self, values: Tensor, bucket: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [1, C] of the batch, which enter the averages."""
        variances, means = torch.var_mean(values, (1, 2), correction=0)  # of each sample
        size = summed(means.new_full((), len(means)))
        mean = summed(means.sum(0, keepdim=True)) / size
        variance = summed((variances + (means - mean).square()).sum(0, keepdim=True)) / size
        if not recomputing():
            self.update(means, variances, bucket)
        return mean, variance

    @torch.no_grad()
    def update(self, means: Tensor, variances: Tensor, bucket: Tensor) -> None:
        """Takes moments [B, C] of samples into the averages of their sets."""

        def total(rows: Tensor) -> Tensor:
            """Sums over the samples of each set."""
            nothing = rows.new_zeros(len(self.mean), rows.shape[1])
            return summed(nothing.index_add(0, bucket, rows))

        sizes = total(torch.ones_like(means[:, :1]))
        divisor, weight = sizes.clamp(min=1), self.momentum * sizes.clamp(max=1)
        mean = total(means) / divisor
        variance = total(variances + (means - mean[bucket]).square()) / divisor
        self.mean.lerp_(mean, weight)
        self.variance.lerp_(variance, weight)


def summed(x: Tensor) -> Tensor:
    """The sum over all processes, if there are several; gradients flow to each."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x)


def recomputing() -> bool:
    """Whether a backward pass makes again what was not kept (see `blocks.through`)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
