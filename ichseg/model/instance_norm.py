"""Instance normalisation that leaves channels-last tensors channels-last.

torch's own rearranges them there and back at each level, a sixth of a training step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_BLOCK = 1 << 17  # values that are worked on together, so that they stay in a core's cache
_RUN = 128  # voxels whose mean is taken before the mean of such means
_ROW = 1024  # values of a row: long rows suit the processor where there are few channels


class InstanceNorm2d(nn.InstanceNorm2d):
    """Instance normalisation in two dimensions."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the base class' name)
        """Maps ``(B, C, Y, X)`` to the same shape."""
        return _normalise(self, input, torch.channels_last)


class InstanceNorm3d(nn.InstanceNorm3d):
    """Instance normalisation in three dimensions."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the base class' name)
        """Maps ``(B, C, Z, Y, X)`` to the same shape."""
        return _normalise(self, input, torch.channels_last_3d)


def _normalise(
    norm: nn.InstanceNorm2d | nn.InstanceNorm3d, x: Tensor, layout: torch.memory_format
) -> Tensor:
    """Instance normalisation in the layout of its input.

    The batch normalisation of one sample is the same thing, but not as exact. On the CPU it adds up
    a channel's voxels one after another in float32: where many are alike, as air is, every addition
    rounds the same way, and probabilities come out wrong by up to 0.12. On CUDA cuDNN takes sums of
    channels-last tensors by integers of few bits.
    """
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    if x.is_contiguous() or not x.is_contiguous(memory_format=layout):
        return functional.instance_norm(x, weight=weight, bias=bias, eps=eps)
    if torch.compiler.is_compiling():
        return normalise_in_two_steps(x, weight, bias, eps)
    if x.device.type != "cpu" and not torch.is_grad_enabled():
        return normalise_at_once(x, weight, bias, eps)
    by_hand = _ChannelsLastNorm if x.device.type == "cpu" else RunningNorm
    exact: Tensor = by_hand.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return exact


def normalise_in_two_steps(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Instance normalisation of a channels-last tensor, for a compiler to fuse.

    Means are taken of runs of voxels, and then of such means: a compiler adds a channel's voxels up
    one after another in float32, which is wrong where many are alike.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    voxels = x.movedim(1, -1).reshape(x.shape[0], -1, x.shape[1]).to(wide)
    apart = voxels - _mean(voxels)
    inverse = (_mean(apart.square()) + eps).rsqrt()
    normal = (apart * inverse * weight + bias).to(x.dtype)
    return normal.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)


def _mean(voxels: Tensor) -> Tensor:
    """Mean over the voxels of ``(B, V, C)``, as ``(B, 1, C)``."""
    samples, count, channels = voxels.shape
    runs = voxels.view(samples, -1, math.gcd(count, _RUN), channels)
    return runs.mean(2).mean(1, keepdim=True)


def normalise_at_once(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Instance normalisation on CUDA where nobody asks for a gradient: all samples at once.

    So many small tiles take as few kernels as one large one, and do not wait for the host. Sums
    are float32, and variances Welford's; the tensor itself is read and written in its own type.
    """
    axes, samples_by_channels = tuple(range(2, x.ndim)), x.shape[:2]
    if x.dtype in (torch.float16, torch.bfloat16):
        # torch takes both at once only in the type of what it reads: two reads cost less than a
        # copy in float32
        variance = x.new_empty(samples_by_channels, dtype=torch.float32)
        torch.var(x, axes, correction=0, out=variance)
        mean = x.sum(axes, dtype=torch.float32) / math.prod(x.shape[2:])
    else:
        variance, mean = torch.var_mean(x, axes, correction=0)
    # a channel that is one number, as in air, is 0: what its mean was rounded by is not blown up
    variance = functional.threshold(variance, 0, math.inf)
    scale = (variance + eps).rsqrt() * weight
    shift = torch.addcmul(bias, mean, scale, value=-1)
    scale, shift = (each.view(*samples_by_channels, *(1 for _ in axes)) for each in (scale, shift))
    # into a tensor that is there: autocast would make float32 of what it returned
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))


class RunningNorm(torch.autograd.Function):
    """Instance normalisation on CUDA with gradients, by what torch has for split batches.

    It goes sample by sample, of which training has few.

    A thread takes the mean and the squared deviations of its voxels as they come, in float32 and
    after Welford, and those of threads are joined in the same way. So voxels that are alike have
    the mean that they are, and no deviation. The tensor is read twice and written once, in its own
    precision and layout.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Maps ``(B, C, *size)`` to the same shape."""
        normal = torch.empty_like(x)
        moments = []
        for voxels, out in zip(_voxels(x), _voxels(normal), strict=True):
            mean, inverse = torch.batch_norm_stats(voxels, eps)
            torch.batch_norm_elemt(voxels, weight, bias, mean, inverse, eps, out=out)
            moments.append(torch.stack((mean, inverse)))
        ctx.save_for_backward(x, weight, torch.stack(moments))
        return normal

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the input, the weight and the bias."""
        x, weight, moments = ctx.saved_tensors
        of_input = torch.empty_like(x)
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        gradient = gradient.to(x.dtype).contiguous(memory_format=layout)
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        count = torch.full((1,), x[0, 0].numel(), dtype=torch.int32, device=x.device)
        for given, voxels, out, (mean, inverse) in zip(
            _voxels(gradient), _voxels(x), _voxels(of_input), moments, strict=True
        ):
            sums = torch.batch_norm_backward_reduce(
                given, voxels, mean, inverse, weight, True, True, True
            )
            of_sample = torch.batch_norm_backward_elemt(
                given, voxels, mean, inverse, weight, sums[0], sums[1], count
            )
            out.copy_(of_sample)
            of_weight += sums[2]
            of_bias += sums[3]
        return of_input, of_weight, of_bias, None


def _voxels(x: Tensor) -> list[Tensor]:
    """For each sample a view ``(V, C)`` of a channels-last tensor."""
    return [sample.movedim(0, -1).reshape(-1, x.shape[1]) for sample in x]


class _ChannelsLastNorm(torch.autograd.Function):
    """Instance normalisation on the CPU, block by block, with sums of blocks in float32 or wider.

    A block is read, widened and used up while it is in the cache, so the whole tensor is read twice
    and written once. Kept for the gradient is the input as it came.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Maps ``(B, C, *size)`` to the same shape."""
        wide = torch.promote_types(x.dtype, torch.float32)
        channels = x.shape[1]
        normal = torch.empty_like(x)
        moments = []
        for rows, out in zip(_rows(x), _rows(normal), strict=True):
            times = rows.shape[1] // channels
            # Close to the mean, or at least equal to what a constant channel is.
            origin = _by_channel(rows[:1].to(wide), channels) / times
            sums = torch.zeros(2, channels, dtype=wide)
            for block in torch.split(rows, _height(rows)):
                apart = block.to(wide) - origin.repeat(times)
                sums[0] += _by_channel(apart, channels)
                sums[1] += _by_channel(apart.square_(), channels)
            first, second = sums / (rows.numel() // channels)
            inverse = ((second - first.square()).clamp_(min=0) + eps).rsqrt()
            mean = first + origin
            scale = inverse * weight
            shift = (bias - mean * scale).repeat(times)
            scale = scale.repeat(times)
            for block, into in zip(
                torch.split(rows, _height(rows)), torch.split(out, _height(rows)), strict=True
            ):
                into.copy_(torch.addcmul(shift, block.to(wide), scale))
            moments.append(torch.stack((mean, inverse)))
        ctx.save_for_backward(x, weight, torch.stack(moments))
        return normal

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the input, the weight and the bias."""
        x, weight, moments = ctx.saved_tensors
        wide, channels = moments.dtype, x.shape[1]
        of_input = torch.empty_like(x)
        gradient = torch.empty_like(x).copy_(gradient)  # in the layout of the input
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        for given, rows, out, (mean, inverse) in zip(
            _rows(gradient), _rows(x), _rows(of_input), moments, strict=True
        ):
            times, height = rows.shape[1] // channels, _height(rows)
            count = rows.numel() // channels
            sums = torch.zeros(2, channels, dtype=wide)
            for block, values in zip(
                torch.split(given, height), torch.split(rows, height), strict=True
            ):
                wider = block.to(wide)
                apart = values.to(wide) - mean.repeat(times)
                sums[0] += _by_channel(wider, channels)
                sums[1] += _by_channel(apart.mul_(wider), channels)
            sums[1] *= inverse
            of_bias += sums[0]
            of_weight += sums[1]
            # weight / deviation * (gradient - its mean - normal * mean of gradient * normal)
            scale = weight * inverse
            slope = -scale * inverse * sums[1] / count
            shift = (-scale * sums[0] / count - slope * mean).repeat(times)
            scale, slope = scale.repeat(times), slope.repeat(times)
            for block, values, into in zip(
                torch.split(given, height),
                torch.split(rows, height),
                torch.split(out, height),
                strict=True,
            ):
                of_block = torch.addcmul(shift, block.to(wide), scale)
                into.copy_(of_block.addcmul_(values.to(wide), slope))
        return of_input, of_weight, of_bias, None


def _rows(x: Tensor) -> list[Tensor]:
    """For each sample a view of a channels-last tensor: rows of some voxels with their channels."""
    channels, voxels = x.shape[1], x[0, 0].numel()
    length = channels * math.gcd(voxels, max(_ROW // channels, 1))
    return [sample.movedim(0, -1).reshape(-1, length) for sample in x]


def _height(rows: Tensor) -> int:
    """Rows of a block."""
    return max(_BLOCK // rows.shape[1], 1)


def _by_channel(rows: Tensor, channels: int) -> Tensor:
    """Sums over all voxels of some rows, one for each channel."""
    return rows.sum(0).view(-1, channels).sum(0)
