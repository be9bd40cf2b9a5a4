"""Changing grids: spline, linear and nearest resampling as one small matrix per axis.

Interpolation along an axis is linear in the data, so it is a matrix: the interpolation applied to
an identity. Three matrix products then resize a volume, on whichever device holds it. Coordinates
are pixel-centred (half-pixel), borders are extended by the edge, as
``skimage.transform.resize(mode="edge", anti_aliasing=False)`` does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage


@functools.lru_cache(maxsize=64)
def axis_matrix(size_in: int, size_out: int, order: int) -> npt.NDArray[np.float32]:
    """Interpolation of one axis as a matrix of shape ``(size_out, size_in)``; rows sum to 1.

    Args:
        size_in: Voxels along the axis now.
        size_out: Voxels wanted.
        order: 0 nearest, 1 linear, 3 cubic spline.

    Raises:
        ValueError: Another order, or a size below 1.
    """
    if min(size_in, size_out) < 1 or order not in (0, 1, 3):
        raise ValueError(f"cannot resize {size_in} to {size_out} voxels with order {order}")
    if size_in == 1:
        return np.ones((size_out, 1), np.float32)
    if order == 3:
        zoom = (size_out / size_in, 1)
        spline = ndimage.zoom(np.eye(size_in), zoom, order=3, mode="nearest", grid_mode=True)
        return np.asarray(spline, np.float32)
    matrix = np.zeros((size_out, size_in), np.float32)
    rows = np.arange(size_out)
    if order == 0:
        matrix[rows, nearest_indices(size_in, size_out)] = 1
        return matrix
    position = (rows + 0.5) * (size_in / size_out) - 0.5
    low = np.floor(position).astype(int)
    fraction = position - low
    np.add.at(matrix, (rows, np.clip(low, 0, size_in - 1)), 1 - fraction)
    np.add.at(matrix, (rows, np.clip(low + 1, 0, size_in - 1)), fraction)
    return matrix


def nearest_indices(size_in: int, size_out: int) -> npt.NDArray[np.int64]:
    """For each output voxel of an axis the nearest input voxel, the upper one on a tie."""
    position = np.floor((np.arange(size_out) + 0.5) * (size_in / size_out))
    index: npt.NDArray[np.int64] = np.minimum(position, size_in - 1).astype(np.int64)
    return index


def resampled_shape(
    shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float]
) -> tuple[int, int, int]:
    """Voxels per axis after changing the spacing: ``round(spacing / target * size)``, or 1."""
    z, y, x = (
        max(1, int(np.round(old / new * size)))
        for size, old, new in zip(shape, spacing_mm, target_mm, strict=True)
    )
    return z, y, x


def coarse_axis(
    spacing_mm: Sequence[float], target_mm: Sequence[float], anisotropy: float
) -> int | None:
    """The axis to treat apart (separate-z), or None.

    The spacing that counts is the present one if its largest is more than ``anisotropy`` times its
    smallest, else the target if that one's is; an axis that shares the largest spacing with another
    is not apart.
    """
    for spacing in (spacing_mm, target_mm):
        if max(spacing) / min(spacing) > anisotropy:
            largest = [axis for axis, value in enumerate(spacing) if value == max(spacing)]
            return largest[0] if len(largest) == 1 else None
    return None


def resize_image(
    image: npt.NDArray[np.float32], shape: Sequence[int], *, order: int, apart: int | None
) -> npt.NDArray[np.float32]:
    """Resize ``(z, y, x)`` intensities.

    A cubic spline overshoots, so its result is clipped to the range of what is resized at once: the
    volume, or each slice of the axis ``apart``. That axis itself takes nearest slices.
    """
    data = torch.from_numpy(np.ascontiguousarray(image, np.float32))
    for axis in range(3):
        if axis != apart:
            data = _apply(_matrix(data.shape[axis], shape[axis], order, data), data, axis)
    if order == 3:
        axes = tuple(axis for axis in range(3) if axis != apart)
        source = torch.from_numpy(np.ascontiguousarray(image, np.float32))
        low, high = source.amin(axes, keepdim=True), source.amax(axes, keepdim=True)
        data = torch.minimum(torch.maximum(data, low), high)
    if apart is not None and data.shape[apart] != shape[apart]:
        data = data.index_select(
            apart, torch.from_numpy(nearest_indices(data.shape[apart], shape[apart]))
        )
    return np.ascontiguousarray(data.numpy())


def resize_labels(
    labels: npt.NDArray[np.integer], shape: Sequence[int], *, order: int, apart: int | None
) -> npt.NDArray[np.integer]:
    """Resize a ``(z, y, x)`` label map; no label appears that was not there.

    Order 0 takes the nearest voxel. Order 1 interpolates each label's indicator linearly and takes
    the largest, the nearest voxel's label on a tie. The axis ``apart`` takes nearest slices.
    """
    nearest = labels
    for axis in range(3):
        if nearest.shape[axis] != shape[axis]:
            nearest = np.take(nearest, nearest_indices(nearest.shape[axis], shape[axis]), axis)
    if order == 0 or nearest.shape == labels.shape:
        return np.ascontiguousarray(nearest)
    result, best = nearest.copy(), None
    for value in np.unique(labels):
        share = resize_image((labels == value).astype(np.float32), shape, order=1, apart=apart)
        share += np.where(nearest == value, np.float32(1e-4), np.float32(0))
        if best is None:
            best, result = share, np.full(result.shape, value, labels.dtype)
        else:
            better = share > best
            result[better], best[better] = value, share[better]
    return result


def resize_scores_slab(
    scores: torch.Tensor, shape: Sequence[int], rows: slice, *, order: int, apart: int | None
) -> torch.Tensor:
    """Part of the resized scores: a slab of the first spatial axis.

    Args:
        scores: ``(K, Z, Y, X)`` on any device.
        shape: Full output size ``(z, y, x)``.
        rows: Which output positions of the first axis to compute.
        order: Spline order; the axis ``apart`` has order 0.
        apart: The separate-z axis, or None.

    Returns:
        ``(K, len(rows), y, x)``, float32.
    """
    matrix = _matrix(scores.shape[1], shape[0], 0 if apart == 0 else order, scores)[rows]
    used = torch.nonzero(matrix.abs().sum(0)).flatten()
    first, last = int(used[0]), int(used[-1]) + 1
    slab = _apply(matrix[:, first:last], scores[:, first:last].float(), 1)
    for axis in (2, 3):
        kind = 0 if apart == axis - 1 else order
        slab = _apply(_matrix(scores.shape[axis], shape[axis - 1], kind, scores), slab, axis)
    return slab


def _matrix(size_in: int, size_out: int, order: int, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(axis_matrix(size_in, size_out, order)).to(like.device)


def _apply(matrix: torch.Tensor, data: torch.Tensor, axis: int) -> torch.Tensor:
    """``matrix @ data`` along one axis; the identity costs nothing."""
    if matrix.shape[0] == matrix.shape[1] == data.shape[axis] and bool(
        (matrix.diagonal() == 1).all()
    ):
        return data
    if axis == data.ndim - 1:
        return data @ matrix.T
    moved = data.movedim(axis, -2) if axis != data.ndim - 2 else data
    result = torch.matmul(matrix, moved)
    return result.movedim(-2, axis) if axis != data.ndim - 2 else result
