"""Arrays that are numpy's or torch's, and the few things that the two do differently.

What runs the networks on the CPU by OpenVINO hands out numpy arrays, torch hands out tensors on its
device. The arithmetic around them is the same. torch itself is not imported here: it takes seconds
to load, and is loaded already wherever there is a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float32]
# In one computation all arrays are of the same kind: numpy's, or tensors on the same device.
Grid: TypeAlias = "npt.NDArray[np.float32] | torch.Tensor"
Mask: TypeAlias = "npt.NDArray[np.bool_] | torch.Tensor"
Kind = TypeVar("Kind", Grid, Mask)


def zeros_like(data: Grid, shape: Sequence[int]) -> Grid:
    """Zeros of another shape, float32, of the kind and on the device of ``data``."""
    if isinstance(data, np.ndarray):
        return np.zeros(shape, np.float32)
    return data.new_zeros(tuple(shape))


def empty_like(data: Grid, shape: Sequence[int]) -> Grid:
    """An array of another shape, float32 and yet to be filled, of the kind of ``data``."""
    if isinstance(data, np.ndarray):
        return np.empty(shape, np.float32)
    return data.new_empty(tuple(shape))


def as_kind_of(data: Grid, values: FloatArray) -> Grid:
    """The values as an array of the kind and on the device of ``data``."""
    return values if isinstance(data, np.ndarray) else data.new_tensor(values)


def as_float(data: Grid) -> Grid:
    """The data as float32, of any real type before; numpy's are contiguous as well."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data, np.float32)
    return data.float()


def flip(data: Grid, axes: tuple[int, ...]) -> Grid:
    """The data with these axes running backwards; numpy's are a view."""
    return np.flip(data, axes) if isinstance(data, np.ndarray) else data.flip(axes)


def take(data: Grid, index: npt.NDArray[np.int64], axis: int) -> Grid:
    """The entries of one axis at these positions."""
    if isinstance(data, np.ndarray):
        return data.take(index, axis)
    return data.index_select(axis, data.new_tensor(index).long())


def stack(parts: Sequence[Kind]) -> Kind:
    """Arrays of one shape as one contiguous array ``(number, *shape)``."""
    same: Any = tuple(parts)
    if isinstance(parts[0], np.ndarray):
        return cast("Kind", np.stack(same))
    import torch

    return cast("Kind", torch.stack(same))


def module_of(data: Grid | Mask) -> Any:
    """Numpy or torch, whichever the data are of: for functions that are the same in both."""
    if isinstance(data, np.ndarray):
        return np
    import torch

    return torch


def all_finite(data: Grid) -> Any:
    """Whether no value is NaN or infinite; a scalar of its kind: no GPU is waited for."""
    return np.isfinite(data).all() if isinstance(data, np.ndarray) else data.isfinite().all()


def copy_into(target: Grid, values: Grid) -> None:
    """Overwrite an array, or a view of it, with values of its shape or repeated to fill it."""
    target[...] = values  # type: ignore[assignment]  # both are of one kind


def multiply_into(target: Grid, left: Grid, right: Grid) -> None:
    """Overwrite an array, or a view of it, with the product of two matrices, or stacks of such."""
    if isinstance(target, np.ndarray):
        np.matmul(left, right, out=target)
    else:
        target[...] = left @ right  # type: ignore[assignment]  # as above


def on_host(data: Grid) -> FloatArray:
    """The data as a numpy array; numpy's are given back as they are."""
    return data if isinstance(data, np.ndarray) else data.cpu().numpy()


def slabs(shape: Sequence[int], voxels: int) -> Iterator[slice]:
    """The first of three axes in pieces of so many voxels, or of one slice if that has more."""
    step = max(1, voxels // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))
