"""From a volume in the scanner's grid to the network's grid and back.

Forth: bring the axes into the plan's order, crop to nonzero, resample, normalise. Back,
``restore``: resample the scores slab by slab, take the best label at once, paste into the crop,
undo the axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from ichseg import resample
from ichseg.errors import InputError
from ichseg.plans import Configuration, Normalisation, Plans
from ichseg.volume import Volume

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class AxisOrder:
    """A lossless change of axes: permute, then flip.

    Attributes:
        permutation: Array axis that becomes each new axis.
        flips: Whether each new axis then runs backwards.
    """

    permutation: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    def apply(self, array: Array) -> Array:
        """The array ``(z, y, x)`` in the new order, as a view."""
        return np.flip(array.transpose(self.permutation), self._flipped())

    def undo(self, array: Array) -> Array:
        """Exact inverse of ``apply``, as a view."""
        return np.flip(array, self._flipped()).transpose(np.argsort(self.permutation))

    def _flipped(self) -> tuple[int, ...]:
        return tuple(axis for axis, flip in enumerate(self.flips) if flip)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a prepared case lies in its volume; all in the plan's axis order.

    Attributes:
        axes: How the volume's axes became the plan's.
        full_shape: The whole volume's size.
        box: Crop, ``(start, stop)`` per axis.
        spacing_mm: The volume's voxel size.
        grid_shape: Size after resampling the crop.
        grid_spacing_mm: Voxel size of that grid.
    """

    axes: AxisOrder
    full_shape: tuple[int, int, int]
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    spacing_mm: tuple[float, float, float]
    grid_shape: tuple[int, int, int]
    grid_spacing_mm: tuple[float, float, float]

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The crop as an index."""
        z, y, x = (slice(*bounds) for bounds in self.box)
        return z, y, x

    @property
    def crop_shape(self) -> tuple[int, int, int]:
        """Size of the crop before resampling."""
        z, y, x = (stop - start for start, stop in self.box)
        return z, y, x


@dataclass(frozen=True, slots=True)
class PreparedCase:
    """What the network sees: ``data`` float32 ``(C, Z, Y, X)``, and how to get back."""

    data: FloatArray
    placement: Placement


def orient_axes(volume: Volume) -> AxisOrder:
    """Permutation and flips that bring the axes nearest to superior, posterior, left (LPS)."""
    matrix = np.array(volume.direction).reshape(3, 3)  # rows: patient axes, columns: array axes
    best = max(
        itertools.permutations(range(3)),
        key=lambda p: sum(abs(matrix[row, p[row]]) for row in range(3)),
    )
    z, y, x = (bool(matrix[row, best[row]] < 0) for row in range(3))
    return AxisOrder((best[0], best[1], best[2]), (z, y, x))


def plan_axes(volume: Volume, plans: Plans) -> AxisOrder:
    """The change of axes that the plan asks for: its orientation, then its transpose."""
    if plans.orientation == "LPS":
        axes = orient_axes(volume)
    else:
        axes = AxisOrder((0, 1, 2), (False, False, False))
    a, b, c = plans.transpose
    p, f = axes.permutation, axes.flips
    return AxisOrder((p[a], p[b], p[c]), (f[a], f[b], f[c]))


def nonzero_box(stack: Sequence[Array]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Bounding box of the voxels nonzero in any channel; the whole volume if there are none."""
    nonzero = _nonzero(stack)
    bounds = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        used = np.flatnonzero(nonzero.any(others))
        bounds.append((int(used[0]), int(used[-1]) + 1) if used.size else (0, nonzero.shape[axis]))
    return bounds[0], bounds[1], bounds[2]


def place(channels: Sequence[Volume], plans: Plans, configuration: Configuration) -> Placement:
    """Where the case will lie in the configuration's grid.

    Raises:
        InputError: The number of channels or their geometry is not as planned.
    """
    if len(channels) != len(plans.channels):
        raise InputError(
            f"{len(channels)} channels given, expected {len(plans.channels)}: {plans.channels}"
        )
    first = channels[0]
    if any(c.voxels.shape != first.voxels.shape for c in channels):
        raise InputError(f"channels differ in shape: {[c.voxels.shape for c in channels]}")
    axes = plan_axes(first, plans)
    stack = [axes.apply(channel.voxels) for channel in channels]
    box = nonzero_box(stack)
    spacing = tuple(first.spacing_mm[axis] for axis in axes.permutation)
    target = configuration.spacing_mm
    if configuration.architecture.dimensions == 2:
        target = (spacing[0], *target[1:])
    z, y, x = stack[0].shape
    return Placement(
        axes=axes,
        full_shape=(z, y, x),
        box=box,
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        grid_shape=resample.resampled_shape([b - a for a, b in box], spacing, target),
        grid_spacing_mm=target,
    )


def prepare(channels: Sequence[Volume], plans: Plans, configuration: Configuration) -> PreparedCase:
    """Bring a case's volumes (one per channel) into the network's grid and intensities.

    Raises:
        InputError: The number of channels or their geometry is not as planned.
    """
    placement = place(channels, plans, configuration)
    cropped = [placement.axes.apply(channel.voxels)[placement.slices] for channel in channels]
    inside = None
    if any(normalisation.masked for normalisation in plans.normalisations):
        inside = ndimage.binary_fill_holes(_nonzero(cropped))
    apart = _apart(placement, plans, "image")
    data = np.empty((len(channels), *placement.grid_shape), np.float32)
    for index, (image, scheme) in enumerate(zip(cropped, plans.normalisations, strict=True)):
        values = image.astype(np.float32)
        if plans.normalise_first:
            values = normalise(values, scheme, inside)
        values = resample.resize_image(
            values, placement.grid_shape, order=plans.resampling.image_order, apart=apart
        )
        if not plans.normalise_first:
            grid_inside = None
            if inside is not None:
                grid_inside = resample.resize_labels(
                    inside.astype(np.uint8), placement.grid_shape, order=0, apart=apart
                ).astype(bool)
            values = normalise(values, scheme, grid_inside)
        data[index] = values
    return PreparedCase(data, placement)


def outside_nonzero(channels: Sequence[Volume], placement: Placement) -> npt.NDArray[np.bool_]:
    """Voxels of the crop outside the filled nonzero region, in the plan's axis order."""
    cropped = [placement.axes.apply(channel.voxels)[placement.slices] for channel in channels]
    outside: npt.NDArray[np.bool_] = ~ndimage.binary_fill_holes(_nonzero(cropped))
    return outside


def prepare_labels(
    label: Volume, placement: Placement, plans: Plans, outside: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.int8]:
    """Bring a label map into the same grid as its case.

    Args:
        label: Labels in the case's own grid.
        placement: From ``place`` or ``prepare``.
        plans: For the interpolation order.
        outside: From ``outside_nonzero``; background there becomes -1.

    Returns:
        int8 ``(Z, Y, X)``.
    """
    labels = placement.axes.apply(label.voxels)[placement.slices].astype(np.int8)
    if outside is not None:
        labels[outside & (labels == 0)] = -1
    return resample.resize_labels(
        labels,
        placement.grid_shape,
        order=plans.resampling.label_order,
        apart=_apart(placement, plans, "label"),
    ).astype(np.int8)


def normalise(
    values: FloatArray, scheme: Normalisation, inside: npt.NDArray[np.bool_] | None = None
) -> FloatArray:
    """Normalise one channel; ``inside`` is the nonzero region of a masked z-score."""
    if scheme.scheme == "ct":
        clipped = np.clip(values, scheme.clip_low, scheme.clip_high)
        return ((clipped - scheme.mean) / max(scheme.deviation, 1e-8)).astype(np.float32)
    if scheme.scheme == "zscore":
        region = values[inside] if scheme.masked and inside is not None and inside.any() else values
        mean = float(region.mean(dtype=np.float64))
        deviation = float(region.std(dtype=np.float64))
        result = ((values - mean) / max(deviation, 1e-8)).astype(np.float32)
        if scheme.masked and inside is not None:
            result[~inside] = 0
        return result
    return values.astype(np.float32)


def restore(
    parts: Sequence[tuple[torch.Tensor, Placement]], plans: Plans, *, slab_voxels: int = 4_000_000
) -> npt.NDArray[np.uint8]:
    """Labels in the volume's own grid and axis order from scores in the networks' grids.

    Works in slabs of slices and takes the best label of each at once, so no array of classes times
    volume ever exists.

    Args:
        parts: Scores ``(K, Z, Y, X)`` with their placement, one for each configuration of an
            ensemble; their mean decides, the lower label on a tie.
        plans: For the interpolation order.
        slab_voxels: Output voxels per class computed at once.

    Returns:
        uint8, shape of the volume that ``prepare`` was given.
    """
    placement = parts[0][1]
    crop = placement.crop_shape
    step = max(1, slab_voxels // (crop[1] * crop[2]))
    labels = np.zeros(placement.full_shape, np.uint8)
    inner = labels[placement.slices]
    for start in range(0, crop[0], step):
        rows = slice(start, min(start + step, crop[0]))
        total: torch.Tensor | None = None
        for scores, own in parts:
            apart = None
            if "score" in plans.resampling.separate_z:
                apart = resample.coarse_axis(
                    own.grid_spacing_mm, own.spacing_mm, plans.resampling.anisotropy
                )
            slab = resample.resize_scores_slab(
                scores, crop, rows, order=plans.resampling.score_order, apart=apart
            )
            total = slab if total is None else total + slab
        assert total is not None
        inner[rows] = total.argmax(0).to(torch.uint8).cpu().numpy()
    return np.ascontiguousarray(placement.axes.undo(labels))


def _nonzero(stack: Sequence[Array]) -> npt.NDArray[np.bool_]:
    nonzero: npt.NDArray[np.bool_] = stack[0] != 0
    for channel in stack[1:]:
        nonzero = nonzero | (channel != 0)
    return nonzero


def _apart(placement: Placement, plans: Plans, kind: str) -> int | None:
    if kind not in plans.resampling.separate_z:
        return None
    return resample.coarse_axis(
        placement.spacing_mm, placement.grid_spacing_mm, plans.resampling.anisotropy
    )
