"""Group normalisation of channels-last tensors, with modulation and SiLU in one step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def norm_groups(channels: int) -> int:
    """The largest divisor of `channels` that is not above 32."""
    return max(groups for groups in range(1, min(32, channels) + 1) if channels % groups == 0)


class Normalise(torch.autograd.Function):
    """gain (x - mean) / deviation + bias of [B, N, P, C], then SiLU if asked, in float32.

    Moments are over N and each group of channels; gain and bias are [C] or [B, 1, 1, C]. The steps
    are bound by memory: they share one buffer, and only x is kept for the gradient.
    """

    @staticmethod
    def forward(ctx, x, gain, bias, groups, eps, silu):
        values = precise(x)
        mean = group_mean(values.sum(1, keepdim=True), groups, x.shape[1])
        out = values - mean
        deviation = group_mean(out.square_().sum(1, keepdim=True), groups, x.shape[1])
        inverse = deviation.add_(eps).rsqrt_()
        slope = gain * inverse
        torch.addcmul(bias - mean * slope, values, slope, out=out)
        ctx.save_for_backward(x, gain, bias, mean, inverse)
        ctx.groups, ctx.silu = groups, silu
        return (F.silu(out, inplace=True) if silu else out).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, gain, bias, mean, inverse = ctx.saved_tensors
        values, grad = precise(x), precise(grad)
        slope = gain * inverse
        if ctx.silu:
            out = torch.addcmul(bias - mean * slope, values, slope)
            grad = torch.ops.aten.silu_backward.grad_input(grad, out, grad_input=out)
        total = grad.sum(1, keepdim=True)
        product = grad * values
        moment = product.sum(1, keepdim=True).sub_(mean * total).mul_(inverse)
        # x reaches the output directly, through the mean and through the deviation
        through_mean = group_mean(total * gain, ctx.groups, x.shape[1])
        through_deviation = group_mean(moment * gain, ctx.groups, x.shape[1])
        slant = -inverse.square() * through_deviation
        offset = -inverse * through_mean - slant * mean
        grad_x = torch.addcmul(offset, values, slant, out=product).addcmul_(grad, slope)
        grad_gain, grad_bias = moment.sum_to_size(gain.shape), total.sum_to_size(bias.shape)
        return grad_x.to(x.dtype), grad_gain, grad_bias, None, None, None


def precise(x: Tensor) -> Tensor:
    """The tensor in float32, or in its own type if that is finer."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def group_mean(total: Tensor, groups: int, count: int) -> Tensor:
    """Sums over `count` values of each channel [..., C] as the mean of the channel's group."""
    mean = total.unflatten(-1, (groups, -1)).mean(-1, keepdim=True).div_(count)
    return mean.expand(*mean.shape[:-1], total.shape[-1] // groups).flatten(-2)


class GroupNorm(nn.GroupNorm):
    """Group normalisation of [B, N, P, C] over N and the channels of a group, for every p apart.

    `film` [B, 2 C] scales and shifts the result: (1 + scale) norm(x) + shift (FiLM).
    """

    def __init__(self, channels: int, *, silu: bool = False):
        super().__init__(norm_groups(channels), channels, eps=1e-5)
        self.silu = silu

    def forward(self, x: Tensor, film: Tensor | None = None) -> Tensor:
        gain, bias = self.weight, self.bias
        if film is not None:
            scale, shift = film.view(len(film), 1, 1, -1).chunk(2, dim=-1)
            gain, bias = gain + gain * scale, torch.addcmul(bias + shift, bias, scale)
        return Normalise.apply(x, gain, bias, self.num_groups, self.eps, self.silu)
