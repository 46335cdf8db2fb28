"""Group normalisation of channels-last tensors, with modulation and SiLU in one step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def norm_groups(channels: int) -> int:
    """The largest divisor of `channels` that is not above 32."""
    return max(groups for groups in range(1, min(32, channels) + 1) if channels % groups == 0)


class Normalise(torch.autograd.Function):
    """gain (x - mean) / deviation + bias of [B, N, P, C], then scale and shift, then SiLU if asked.

    Moments are over N and each group of channels, in float32. Gain and bias are [C]; scale and
    shift [B or 1, 1, 1, C], or None. The steps are bound by memory: they share one buffer, and only
    x is kept for the gradient.
    """

    @staticmethod
    def forward(ctx, x, gain, bias, scale, shift, groups, eps, silu):
        # the kernel for CPUs takes the channels of a group as one vector
        method = native if x.is_cpu and x.shape[-1] >= 4 * groups else plain
        out, mean, inverse, centre = method(x, gain, bias, scale, shift, groups, eps)
        ctx.save_for_backward(x, gain, bias, scale, shift, mean, inverse, centre)
        ctx.silu = silu
        return (F.silu(out, inplace=True) if silu else out).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, gain, bias, scale, shift, mean, inverse, centre = ctx.saved_tensors
        each = x.shape[-1] // mean.shape[-1]  # channels of a group
        mean = mean if centre is None else mean + centre
        mean, inverse = (v.repeat_interleave(each, -1) for v in (mean, inverse))
        factor, offset = modulated(gain, bias, scale, shift)
        slope = factor * inverse
        values, grad = precise(x), precise(grad)
        if ctx.silu:
            out = torch.addcmul(offset - mean * slope, values, slope)
            grad = torch.ops.aten.silu_backward.grad_input(grad, out, grad_input=out)
        total = grad.sum(1, keepdim=True)
        product = grad * values
        moment = product.sum(1, keepdim=True).sub_(mean * total).mul_(inverse)

        # x reaches the output directly, through the mean and through the deviation
        sums = (torch.stack((total, moment)) * slope).unflatten(-1, (-1, each))
        means = sums.mean(-1).div_(-x.shape[1]).repeat_interleave(each, -1)
        slant = means[1] * inverse
        rest = torch.addcmul(means[0], slant, mean, value=-1)
        grad_x = torch.addcmul(rest, values, slant, out=product).addcmul_(grad, slope).to(x.dtype)
        grads = [moment, total, None, None]  # of gain, bias, scale and shift
        if scale is not None:
            grads = [
                scale * moment,
                scale * total,
                torch.addcmul(gain * moment, bias, total),
                total,
            ]
        grads = (
            g if g is None else g.sum_to_size(v.shape)
            for g, v in zip(grads, (gain, bias, scale, shift), strict=True)
        )
        return grad_x, *grads, None, None, None


def modulated(
    gain: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gain and bias of scale (gain y + bias) + shift."""
    return (gain, bias) if scale is None else (gain * scale, torch.addcmul(shift, bias, scale))


def plain(x, gain, bias, scale, shift, groups, eps):
    """Normalised and modulated x in float32 or finer; mean and 1 / deviation [B, 1, P, groups]."""
    values = precise(x)
    variance, mean = moments(values, groups)
    inverse = variance.add_(eps).rsqrt_()
    wide = [v.repeat_interleave(x.shape[-1] // groups, -1) for v in (mean, inverse)]
    gain, bias = modulated(gain, bias, scale, shift)
    slope = gain * wide[1]
    offset = torch.addcmul(bias, wide[0], slope, value=-1)
    return torch.addcmul(offset, values, slope), mean, inverse, None


def moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Variance and mean [B, 1, P, groups] of x [B, N, P, C] over N and the channels of a group."""
    if not x.is_cpu:
        parts = x.unflatten(-1, (groups, -1))
        found = torch.var_mean(parts, (1, 4), correction=0, keepdim=True)
        return found[0].squeeze(-1), found[1].squeeze(-1)

    # several times as fast there, where sums over N run along memory
    def mean_of(x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True).unflatten(-1, (groups, -1)).mean(-1).div_(x.shape[1])

    mean = mean_of(x)
    return mean_of((x - mean.repeat_interleave(x.shape[-1] // groups, -1)).square_()), mean


def native(x, gain, bias, scale, shift, groups, eps):
    """`plain` by PyTorch's channels-last kernel for CPUs, several times faster there.

    That takes the variance as a difference of moments. In float32 x is centred first, by one of its
    values in each group, and the mean is what remains beside that `centre`; coarser types round
    more than is lost.
    """
    b, n, p, c = x.shape
    if scale is not None and len(scale) == 1:
        gain, bias = (v.flatten() for v in modulated(gain, bias, scale, shift))
        scale = None
    if p > 1:  # every p with channels of its own, in one normalisation
        x, gain, bias = precise(x), gain.repeat(p), bias.repeat(p)
    centre = None
    if x.itemsize >= 4:
        centre = x[:, :1, :, :: c // groups]
        x = x - centre.repeat_interleave(c // groups, -1)
    image = x.view(b, n, 1, p * c).movedim(-1, 1)
    out, mean, inverse = torch.native_group_norm(image, gain, bias, b, p * c, n, p * groups, eps)
    out = out.movedim(1, -1).reshape(b, n, p, c)
    if scale is not None:
        torch.addcmul(shift.to(out.dtype), out, scale.to(out.dtype), out=out)
    return out, *(v.view(b, 1, p, groups) for v in (mean, inverse)), centre


def precise(x: Tensor) -> Tensor:
    """The tensor in float32, or in its own type if that is finer."""
    return x.float() if x.itemsize < 4 else x


class GroupNorm(nn.GroupNorm):
    """Group normalisation of [B, N, P, C] over N and the channels of a group, for every p apart.

    `film` [B or 1, 2 C] scales and shifts the result: (1 + scale) norm(x) + shift (FiLM).
    """

    def __init__(self, channels: int, *, silu: bool = False):
        super().__init__(norm_groups(channels), channels, eps=1e-5)
        self.silu = silu

    def forward(self, x: Tensor, film: Tensor | None = None) -> Tensor:
        scale = shift = None
        if film is not None:
            scale, shift = film.view(len(film), 1, 1, -1).chunk(2, dim=-1)
            scale = 1 + scale
        norm = self.weight, self.bias, scale, shift, self.num_groups, self.eps, self.silu
        return Normalise.apply(x, *norm)
