"""A scan as people look at it: seen from the feet, cut to the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError
from ichseg.predict.crop import head_box
from ichseg.scan.orientation import AxisOrder, nonzero_box, orient_axes
from ichseg.scan.volume import Volume

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Framed:
    """The part of a scan that is shown, its axes nearest to superior, posterior, left.

    Attributes:
        image: Intensities, shape ``(z, y, x)``, a view of the scan's; HU for CT.
        masks: Labels by the names of their masks, each of the same shape.
        spacing_mm: Size of a voxel, ``(z, y, x)``.
        first_slice: Number of the lowest slice in the whole scan, whose own lowest is 0.
        slices: How many slices the whole scan has.
        affine: 4x4 matrix from an index ``(x, y, z, 1)`` to a position in mm, RAS as in NIfTI.
    """

    image: npt.NDArray[np.generic]
    masks: Mapping[str, Labels]
    spacing_mm: tuple[float, float, float]
    first_slice: int
    slices: int
    affine: npt.NDArray[np.float64]


def frame(
    image: Volume,
    masks: Mapping[str, Volume],
    *,
    is_ct: bool = True,
    beside: tuple[Volume, Volume] | None = None,
) -> Framed:
    """Turn a scan and its masks by the nearest quarter turns, and cut them to the head.

    Args:
        image: The scan.
        masks: Its masks by their names, in its grid.
        is_ct: Whether the scan is in HU, by which the head is found; else nothing is cut off.
        beside: Another scan in the same grid, and its mask, which are shown beside: both are cut to
            the same part.

    Raises:
        InputError: A mask has another shape.
    """
    for mask in (*masks.values(), *(beside or ())):
        if mask.voxels.shape != image.voxels.shape:
            raise InputError(f"image has shape {image.voxels.shape}, its mask {mask.voxels.shape}")
    axes = orient_axes(image)
    z, y, x = (image.spacing_mm[axis] for axis in axes.permutation)
    spacing_mm = (z, y, x)
    voxels = axes.apply(image.voxels)
    labels = {
        name: np.asarray(axes.apply(mask.voxels)).astype(np.uint8, copy=False)
        for name, mask in masks.items()
    }
    heads = [voxels]
    shown: list[npt.NDArray[np.generic]] = [*labels.values()]
    if beside is not None:
        heads.append(axes.apply(beside[0].voxels))
        shown.append(axes.apply(beside[1].voxels))
    box = (slice(0, voxels.shape[0]), slice(0, voxels.shape[1]), slice(0, voxels.shape[2]))
    if is_ct:
        box = _head_and_masks(heads, shown, spacing_mm)
    return Framed(
        image=voxels[box],
        masks={name: mask_voxels[box] for name, mask_voxels in labels.items()},
        spacing_mm=spacing_mm,
        first_slice=box[0].start,
        slices=voxels.shape[0],
        affine=_affine(image, axes, np.array([part.start for part in box])),
    )


def _affine(
    image: Volume, axes: AxisOrder, start: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """The affine of the part that begins at index ``start``, ``(z, y, x)``, of the turned scan."""
    step = np.reshape(image.direction, (3, 3)) * image.spacing_mm  # column j: along axis j
    origin = np.array(image.origin_mm)
    turned = np.empty((3, 3))
    for new, (old, flipped) in enumerate(zip(axes.permutation, axes.flips, strict=True)):
        turned[:, new] = -step[:, old] if flipped else step[:, old]
        if flipped:
            origin = origin + step[:, old] * (image.voxels.shape[old] - 1)
    origin = origin + turned @ start
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turned[::-1, ::-1], origin[::-1]  # x, y, z, LPS
    affine[:2] *= -1  # RAS
    return affine


def _head_and_masks(
    heads: Sequence[npt.NDArray[np.generic]],
    masks: Sequence[npt.NDArray[np.generic]],
    spacing_mm: Sequence[float],
) -> tuple[slice, slice, slice]:
    """A box around the heads without their rest and all masks; the whole if none is found."""
    boxes = np.array(
        [head_box([hu], spacing_mm) or [(0, size) for size in hu.shape] for hu in heads]
    )
    box = np.column_stack([boxes[:, :, 0].min(axis=0), boxes[:, :, 1].max(axis=0)])
    if any(mask.any() for mask in masks):
        of_masks = np.array(nonzero_box(masks))
        box = np.column_stack([np.minimum(box, of_masks)[:, 0], np.maximum(box, of_masks)[:, 1]])
    z, y, x = (slice(int(start), int(stop)) for start, stop in box)
    return z, y, x
