"""The mean and deviation of every channel of what an encoder makes, as it is trained."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

RECENT = 0.01  # share of a batch in the averages, once there have been many


class Moments(nn.Module):
    """Running averages over batches [B, C, ...] of each channel's mean and mean square.

    A batch is that of all processes together, which hold equal shares of it. With the averages
    values are brought to mean 0 and deviation 1, and back; as long as there has been no batch they
    stay what they are.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("square", torch.ones(channels))
        self.register_buffer("batches", torch.tensor(0))

    @torch.no_grad()
    def update(self, z: Tensor) -> None:
        """Takes a batch into the averages."""
        values = z.float().transpose(0, 1).flatten(1)
        found = torch.stack((values.mean(1), values.square().mean(1)))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(found)
            found /= dist.get_world_size()
        self.batches += 1
        share = (1 / self.batches).clamp(min=RECENT) * found.isfinite().all()
        found = found.nan_to_num(0.0, 0.0, 0.0)  # the share of which is none
        self.mean.lerp_(found[0], share)
        self.square.lerp_(found[1], share)

    @property
    def deviation(self) -> Tensor:
        """Of each channel; a channel that is always the same keeps its scale."""
        variance = self.square - self.mean.square()
        return torch.where(variance > 1e-10, variance, 1.0).sqrt()

    def normalise(self, z: Tensor) -> Tensor:
        mean, deviation = (_wide(v, z) for v in (self.mean, self.deviation))
        return (z - mean) / deviation

    def restore(self, z: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, deviation = (_wide(v, z) for v in (self.mean, self.deviation))
        return z * deviation + mean


def _wide(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.dim() - 2))
