"""Changing grids: spline, linear and nearest resampling as one small matrix per axis.

Interpolation along an axis is linear in the data, so it is a matrix: the interpolation applied to
an identity. Three matrix products then resize a volume, which may be a numpy array or a torch
tensor on any device: the operators are the same. An output voxel depends on few input voxels, so
each product is made of narrow blocks; and volumes are resized a slab of slices at a time, so that
beside the result no copy of one is made. Coordinates are pixel-centred (half-pixel), borders are
extended by the edge, as ``skimage.transform.resize(mode="edge", anti_aliasing=False)`` does.

torch itself is not imported: it takes as long to load as five head CTs to resample.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ichseg import ndimage
from ichseg.engine.arrays import (
    FloatArray,
    Grid,
    as_float,
    as_kind_of,
    empty_like,
    multiply_into,
    on_host,
    slabs,
    take,
)
from ichseg.scan.orientation import nonzero_box

_SLAB_VOXELS = 4_000_000  # of the output, resized at once: 16 MB
_VOTE_VOXELS = 500_000  # the same for labels, where several such arrays are needed at once
_BLOCK_ROWS = 32
_NEGLIGIBLE = 1e-7  # weight; a spline's weights fall by a factor of 3.7 a voxel
_EDGE = 12  # voxels by which the border is extended; a spline beyond them hardly reaches it
_TIE = 2e-6  # shares of two labels that differ by less are a tie: float32 errs by some 1e-7


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
        spline = _cubic(size_in, size_out)
        return np.where(abs(spline) < _NEGLIGIBLE, 0, spline).astype(np.float32)
    matrix = np.zeros((size_out, size_in), np.float32)
    rows = np.arange(size_out)
    if order == 0:
        matrix[rows, nearest_indices(size_in, size_out)] = 1
        return matrix
    low, high, share = neighbours(size_in, size_out)
    np.add.at(matrix, (rows, low), 1 - share)
    np.add.at(matrix, (rows, high), share)
    return matrix


def _cubic(size_in: int, size_out: int) -> npt.NDArray[np.float64]:
    """Cubic B-splines through unit vectors, at the centres of the output voxels.

    As ``ndimage.zoom`` does it with ``mode="nearest"`` and ``grid_mode``, along one axis alone.
    """
    unit = np.pad(np.eye(size_in), ((_EDGE, _EDGE), (0, 0)), mode="edge")
    coefficients = ndimage.spline_filter1d(unit, order=3, axis=0, mode="nearest")
    position = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    low = np.floor(position).astype(int)
    t = (position - low)[:, None]  # how far a voxel lies beyond the second of its four
    weights = (1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3
    rows = (coefficients[low + _EDGE - 1 + k] * weight for k, weight in enumerate(weights))
    spline: npt.NDArray[np.float64] = sum(rows) / 6
    return spline


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
    """The axis to resample by nearest slices (separate-z), or None.

    The spacing that counts is the present one if its largest is more than ``anisotropy`` times its
    smallest, else the target if that one's is; there is none where two axes share the largest
    spacing.
    """
    for spacing in (spacing_mm, target_mm):
        if max(spacing) / min(spacing) > anisotropy:
            largest = [axis for axis, value in enumerate(spacing) if value == max(spacing)]
            return largest[0] if len(largest) == 1 else None
    return None


def resize(
    image: npt.NDArray[np.generic],
    out: FloatArray,
    *,
    order: int,
    separate_axis: int | None,
    convert: Callable[[FloatArray], FloatArray] | None = None,
) -> None:
    """Resize ``(z, y, x)`` intensities into ``out``.

    A cubic spline overshoots, so its result is clipped to the range of what is resized at once: the
    volume, or each slice of the separate-z axis. That axis itself takes nearest slices.

    Args:
        image: Intensities of any real type.
        out: The result, of the size wanted; overwritten.
        order: 0, 1 or 3.
        separate_axis: The separate-z axis, or None.
        convert: Applied to the image before it is resized: a function that maps float32 values one
            by one, the larger never to the smaller, and leaves its argument as it was.
    """
    if image.shape == out.shape and convert is None:
        out[...] = image
        return
    limits = None
    if order == 3 and any(image.shape[a] != out.shape[a] for a in range(3) if a != separate_axis):
        limits = _limits(image, out.shape, separate_axis)
        if convert is not None:
            limits = convert(limits[0]), convert(limits[1])
    # a slab is no more than this of either volume: the other may have ten times as many slices
    plane = max(math.prod(out.shape[1:]), math.prod(image.shape) // out.shape[0])
    for rows in slabs((out.shape[0], plane, 1), _SLAB_VOXELS):
        source = source_slices(
            image.shape[0], out.shape[0], 0 if separate_axis == 0 else order, rows
        )
        band = np.ascontiguousarray(image[source], np.float32)
        if convert is not None:
            band = convert(band)
        slab = on_host(
            resize_band(
                band[None],
                source,
                image.shape,
                out.shape,
                rows,
                order=order,
                separate_axis=separate_axis,
            )
        )[0]
        if limits is None:
            out[rows] = slab
        else:
            low, high = (limit[rows] if separate_axis == 0 else limit for limit in limits)
            np.clip(slab, low, high, out=out[rows])


def resize_labels(
    labels: npt.NDArray[np.integer], shape: Sequence[int], *, order: int, separate_axis: int | None
) -> npt.NDArray[np.integer]:
    """Resize a ``(z, y, x)`` label map; no label appears that was not there.

    Order 0 takes the nearest voxel. Order 1 interpolates each label's indicator linearly and takes
    the largest; on a tie the nearest voxel's label, or if that has lost the lowest. The
    separate-z axis takes nearest slices.
    """
    result = labels
    for axis in range(3):
        if result.shape[axis] != shape[axis]:
            result = np.take(result, nearest_indices(result.shape[axis], shape[axis]), axis)
    result = np.ascontiguousarray(result)
    if order == 0 or all(labels.shape[a] == shape[a] for a in range(3) if a != separate_axis):
        return result
    for rows in slabs(shape, _VOTE_VOXELS):
        source = source_slices(labels.shape[0], shape[0], 0 if separate_axis == 0 else order, rows)
        result[rows] = _vote(
            labels, result[rows], source, shape, rows, order=order, separate_axis=separate_axis
        )
    return result


def neighbours(size_in: int, size_out: int) -> tuple[Any, Any, Any]:
    """For each output voxel the input voxels below and above, and the share of the latter."""
    position = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    low = np.floor(position).astype(int)
    return low.clip(0, size_in - 1), (low + 1).clip(0, size_in - 1), position - low


class _Block(NamedTuple):
    """Rows of an axis' matrix and the only columns in which they are not zero."""

    rows: slice
    columns: slice
    weights: npt.NDArray[np.float32]  # (rows, columns)


@functools.lru_cache(maxsize=256)
def _blocks(
    size_in: int, size_out: int, order: int, start: int, stop: int, first: int
) -> tuple[_Block, ...]:
    """Rows ``start`` to ``stop`` of the matrix, of data that begin at input voxel ``first``."""
    matrix = axis_matrix(size_in, size_out, order)
    blocks = []
    for top in range(start, stop, _BLOCK_ROWS):
        rows = slice(top, min(top + _BLOCK_ROWS, stop))
        used = np.flatnonzero(matrix[rows].any(0))
        low, high = int(used[0]), int(used[-1]) + 1
        weights = np.ascontiguousarray(matrix[rows, low:high])
        blocks.append(
            _Block(slice(top - start, rows.stop - start), slice(low - first, high - first), weights)
        )
    return tuple(blocks)


def source_slices(size_in: int, size_out: int, order: int, rows: slice) -> slice:
    """The input slices that these output slices depend on."""
    if size_in == size_out:
        return rows
    if order == 0:
        index = nearest_indices(size_in, size_out)[rows]
        return slice(int(index[0]), int(index[-1]) + 1)
    used = np.flatnonzero(axis_matrix(size_in, size_out, order)[rows].any(0))
    return slice(int(used[0]), int(used[-1]) + 1)


def rows_reached(size_in: int, size_out: int, order: int, start: int, stop: int) -> slice:
    """The output voxels of an axis that depend on any of the input voxels ``start`` to ``stop``."""
    if size_in == size_out:
        return slice(start, stop)
    if order == 0:
        index = nearest_indices(size_in, size_out)
        return slice(*map(int, np.searchsorted(index, [start, stop])))
    used = np.flatnonzero(axis_matrix(size_in, size_out, order)[:, start:stop].any(1))
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)


def resize_band(
    band: Grid,
    source: slice,
    size_in: Sequence[int],
    size_out: Sequence[int],
    rows: slice,
    *,
    order: int,
    separate_axis: int | None,
) -> Grid:
    """Output slices ``rows`` of all K from their input slices ``source``: ``(K, n, Y, X)``."""
    for axis in range(3):
        wanted, first = (rows, source.start) if axis == 0 else (slice(0, size_out[axis]), 0)
        if size_in[axis] != size_out[axis]:
            kind = 0 if axis == separate_axis else order
            band = resize_axis(band, axis + 1, size_in[axis], size_out[axis], kind, wanted, first)
    return band


def resize_axis(
    data: Grid, axis: int, size_in: int, size_out: int, order: int, rows: slice, first: int
) -> Grid:
    """Positions ``rows`` along an axis of contiguous data that begin at input voxel ``first``."""
    if order == 0:
        return take(data, nearest_indices(size_in, size_out)[rows] - first, axis)
    count = rows.stop - rows.start
    before, after = math.prod(data.shape[:axis]), math.prod(data.shape[axis + 1 :])
    flat = data.reshape(before, data.shape[axis], after)
    result = empty_like(data, (before, count, after))
    for block in _blocks(size_in, size_out, order, rows.start, rows.stop, first):
        weights, columns = as_kind_of(data, block.weights), block.columns
        if after == 1:
            multiply_into(result[:, block.rows, 0], flat[:, columns, 0], weights.T)
        else:
            multiply_into(result[:, block.rows], weights, flat[:, columns])
    return result.reshape(*data.shape[:axis], count, *data.shape[axis + 1 :])


def _limits(
    image: npt.NDArray[np.generic], shape: Sequence[int], separate_axis: int | None
) -> tuple[FloatArray, FloatArray]:
    """Lowest and highest value of the volume, or of each output slice of the separate-z axis."""
    axes = tuple(axis for axis in range(3) if axis != separate_axis)
    low = image.min(axes, keepdims=True).astype(np.float32)
    high = image.max(axes, keepdims=True).astype(np.float32)
    if separate_axis is None:
        return low, high
    index = nearest_indices(image.shape[separate_axis], shape[separate_axis])
    return low.take(index, separate_axis), high.take(index, separate_axis)


def _vote(
    labels: npt.NDArray[np.integer],
    nearest: npt.NDArray[np.integer],
    source: slice,
    shape: Sequence[int],
    rows: slice,
    *,
    order: int,
    separate_axis: int | None,
) -> npt.NDArray[np.integer]:
    """Output slices ``rows``: for each voxel the label with the largest interpolated share.

    Most of a label map is one label. Only what the others reach is interpolated.
    """
    band = labels[source]
    others = band != band.flat[0]
    if not others.any():
        return nearest
    kinds = [0 if axis == separate_axis else order for axis in range(3)]
    wanted, sources = [rows], [source]
    for axis, (start, stop) in enumerate(nonzero_box([others])):
        if axis > 0:
            reached = rows_reached(labels.shape[axis], shape[axis], kinds[axis], start, stop)
            if reached.start == reached.stop:  # skipped over where the grid becomes coarser
                return nearest
            wanted.append(reached)
            sources.append(source_slices(labels.shape[axis], shape[axis], kinds[axis], reached))
    part = labels[tuple(sources)]
    inside = (slice(None), wanted[1], wanted[2])
    result = nearest.copy()
    result[inside] = _vote_within(
        part, nearest[inside], labels.shape, shape, wanted, sources, kinds
    )
    return result


def _vote_within(
    part: npt.NDArray[np.integer],
    nearest: npt.NDArray[np.integer],
    size_in: Sequence[int],
    size_out: Sequence[int],
    rows: Sequence[slice],
    sources: Sequence[slice],
    kinds: Sequence[int],
) -> npt.NDArray[np.integer]:
    """The vote on output voxels ``rows``, from the input voxels ``sources`` that they depend on."""
    lowest, *others = np.unique(part)
    winner = np.full(nearest.shape, lowest, part.dtype)
    best = np.full(nearest.shape, -1, np.float32)
    rest = np.ones(nearest.shape, np.float32)  # shares sum to 1
    for value in others:
        share = as_float(part == value)
        for axis in range(3):
            if size_in[axis] != size_out[axis]:
                share = resize_axis(
                    share, axis, size_in[axis], size_out[axis], kinds[axis], rows[axis],
                    sources[axis].start,
                )  # fmt: skip
        rest -= share
        share += _TIE * (nearest == value)
        winner[share > best] = value
        np.maximum(best, share, out=best)
    rest += _TIE * (nearest == lowest)
    winner[rest >= best] = lowest
    return winner
