"""What the pretended card computes by itself: what torch has for CUDA only, or does otherwise."""

from __future__ import annotations

from typing import Any

import torch
from helpers.card_streams import CardError
from torch.utils._pytree import tree_map

_to = torch.Tensor.to  # of this file the real one, whatever stands in for it


def check_layouts(lists: Any) -> None:
    """A fused kernel goes through memory as it lies."""
    for tensors in zip(*(given for given in lists if given), strict=True):
        strides = {
            tuple(s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1) for x in tensors
        }
        if len(strides) > 1:
            raise CardError(f"a fused kernel of {tuple(tensors[0].shape)} with strides {strides}")


def _channels_last(x: torch.Tensor) -> bool:
    return x.ndim in (4, 5) and x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()


def _like_cudnn(real: Any, inputs: int) -> Any:
    """A convolution whose results are channels-last if one of its inputs is."""

    def convolved(*args: Any) -> Any:
        tensors = [x for x in args[:inputs] if x is not None]
        dtype = tensors[0].dtype
        wide = [_to(x, torch.float32) if isinstance(x, torch.Tensor) else x for x in args]
        found = real(*wide)
        last = any(map(_channels_last, tensors))
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}

        def laid(x: Any) -> Any:
            if x is None or x.ndim not in layouts:
                return x if x is None else _to(x, dtype)
            layout = layouts[x.ndim] if last else torch.contiguous_format
            return _to(x, dtype).contiguous(memory_format=layout)

        return tree_map(laid, found)

    return convolved


def _stats(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _to(x, torch.float32)
    return wide.mean(0), (wide.var(0, correction=0) + eps).rsqrt()


def _elemt(x: Any, weight: Any, bias: Any, mean: Any, inverse: Any, eps: float, out: Any) -> Any:
    return out.copy_((_to(x, torch.float32) - mean) * inverse * weight + bias)


def _reduce(given: Any, x: Any, mean: Any, inverse: Any, *_: Any) -> Any:
    wide = _to(given, torch.float32)
    apart = wide * (_to(x, torch.float32) - mean)
    return wide.sum(0), apart.sum(0), apart.sum(0) * inverse, wide.sum(0)


def _back(
    given: Any, x: Any, mean: Any, inverse: Any, weight: Any, of_y: Any, of_xy: Any, n: Any
) -> Any:
    assert n.dtype == torch.int32
    apart = _to(x, torch.float32) - mean
    found = _to(given, torch.float32) - of_y / n - apart * inverse**2 * of_xy / n
    return _to(found * inverse * weight, x.dtype)


KERNELS: dict[str, Any] = {
    "aten.convolution": _like_cudnn(torch.ops.aten.convolution.default, 2),
    "aten.convolution_backward": _like_cudnn(torch.ops.aten.convolution_backward.default, 3),
    # the same as they come where no gradient is asked for
    "aten.conv2d": _like_cudnn(torch.ops.aten.conv2d.default, 2),
    "aten.conv3d": _like_cudnn(torch.ops.aten.conv3d.default, 2),
    "aten.conv_transpose2d": _like_cudnn(torch.ops.aten.conv_transpose2d.input, 2),
    "aten.conv_transpose3d": _like_cudnn(torch.ops.aten.conv_transpose3d.input, 2),
    "aten.batch_norm_stats": _stats,
    "aten.batch_norm_elemt": _elemt,
    "aten.batch_norm_backward_reduce": _reduce,
    "aten.batch_norm_backward_elemt": _back,
}
