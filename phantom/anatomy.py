"""What a bleed must know of a head: given by the phantom, or estimated from a real scan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_SOFT_HU = (-20, 90)  # brain, fluid and blood; a voxel over it holds bone
_REACH_MM = 6.0  # from where thresholds on a blurred grid end, 4 mm off bone, to the inner table
_GAP_MM = 3.0


@dataclass(frozen=True)
class Anatomy:
    """What a bleed must know of the head, on a coarse grid.

    Attributes:
        spacing_mm: Voxel size of the grid, ``(z, y, x)``.
        inside: True within the inner table of the skull.
        fluid: Fraction of cerebrospinal fluid in the voxel, 0 to 1.
        ventricles: Fraction of ventricle in the voxel, 0 to 1.
        middle_mm: Signed distance to the midsagittal plane, positive to the left.
        fine_inside: The same as ``inside`` on the grid of the real scan that it was found in; None
            for a phantom's.
    """

    spacing_mm: tuple[float, float, float]
    inside: Mask
    fluid: Array
    ventricles: Array
    middle_mm: Array
    fine_inside: Mask | None = None

    def depth_mm(self) -> Array:
        """Distance to the inner table in mm, 0 outside."""
        return ndimage.distance_transform_edt(self.inside, sampling=self.spacing_mm).astype(
            np.float32
        )

    def axes_mm(self) -> tuple[Array, Array, Array]:
        """Coordinates in mm from the first voxel, one array an axis, which broadcast."""
        return tuple(  # type: ignore[return-value]
            (np.arange(n, dtype=np.float32) * s).reshape([-1 if a == k else 1 for k in range(3)])
            for a, (n, s) in enumerate(zip(self.inside.shape, self.spacing_mm, strict=True))
        )


def estimate_anatomy(hu: Array, spacing_mm: tuple[float, float, float]) -> Anatomy:
    """Brain, fluid, ventricles and midline of a real head CT by thresholds and morphology.

    The grid has voxels of about 2 mm and covers the scan's box.

    Raises:
        ValueError: Nothing of the size of a brain lies within bone.
    """
    step = max(round(1.9 / spacing_mm[1]), 1)
    parts = max(round(spacing_mm[0] / 2.5), 1)
    shape = (hu.shape[0] * parts, -(-hu.shape[1] // step), -(-hu.shape[2] // step))
    grid_mm = tuple(s * n / m for s, n, m in zip(spacing_mm, hu.shape, shape, strict=True))
    smooth = ndimage.gaussian_filter(hu, (0, step / 2.2, step / 2.2))
    small = enlarge(smooth, shape)
    peak = enlarge(ndimage.maximum_filter(hu, (1, step, step)), shape)
    soft = (small > -15) & (small < 100) & (peak < 250)
    skull = _filled(small > 180)
    rough = _find_inside(small, soft, skull & (small <= 180), grid_mm)
    fine_inside = _to_inner_table(hu, rough, skull, spacing_mm)
    inside = enlarge(fine_inside, shape) > 0.5
    fluid = np.where(inside, np.clip((22 - small) / 14, 0, 1), 0).astype(np.float32)
    ventricles = _find_ventricles(fluid, inside, grid_mm)
    x = np.arange(shape[2]) * grid_mm[2]
    columns = inside.sum(axis=(0, 1))
    middle = float((columns * x).sum() / columns.sum())
    return Anatomy(
        spacing_mm=grid_mm,  # type: ignore[arg-type]
        inside=inside,
        fluid=fluid,
        ventricles=ventricles.astype(np.float32),
        middle_mm=np.broadcast_to((x - middle).astype(np.float32), shape),
        fine_inside=fine_inside,
    )


def _find_inside(small: Array, soft: Mask, enclosed: Mask, grid_mm: tuple[float, ...]) -> Mask:
    """The largest soft part that bone encloses; it ends some millimetres before the inner table.

    Raises:
        ValueError: Nothing of the size of a brain lies within bone.
    """
    core = ndimage.binary_erosion(soft, iterations=2)
    labels, count = ndimage.label(core)
    if count == 0:
        raise ValueError("no brain found within bone")
    sizes = np.bincount(labels[enclosed], minlength=count + 1)
    sizes[0] = 0
    largest = int(np.argmax(sizes))
    if sizes[largest] * np.prod(grid_mm) < 2e5:
        raise ValueError("no brain found within bone: less than 200 mL of soft tissue is enclosed")
    inside = ndimage.binary_dilation(labels == largest, iterations=2) & (small < 110) & enclosed
    inside = ndimage.binary_closing(inside, iterations=2)
    return inside & (small < 130)


def _to_inner_table(
    hu: Array, rough: Mask, skull: Mask, spacing_mm: tuple[float, float, float]
) -> Mask:
    """The inside on the scan's own grid, grown slice by slice to the voxels that hold bone.

    It goes no further than ``_REACH_MM`` and not beyond the skull's outline, and into no gap that
    is narrower than ``_GAP_MM``, such as a fracture or a foramen.

    Args:
        hu: The scan.
        rough: What is surely inside, on a coarse grid of the same box.
        skull: The skull and all that it surrounds, on that grid.
        spacing_mm: The scan's voxel size.
    """
    plane = ndimage.generate_binary_structure(3, 1) & np.array([0, 1, 0], bool)[:, None, None]
    begin = enlarge(rough, hu.shape) > 0.5  # type: ignore[arg-type]
    free = (hu > _SOFT_HU[0]) & (hu < _SOFT_HU[1]) & (enlarge(skull, hu.shape) > 0.5)  # type: ignore[arg-type]
    steps = max(round(_REACH_MM / spacing_mm[1]), 1)
    grown = ndimage.binary_dilation(begin, plane, iterations=steps, mask=free | begin)
    gap = max(round(_GAP_MM / 2 / spacing_mm[1]), 1)
    inside = begin | ndimage.binary_opening(grown, plane, iterations=gap)
    closed: Mask = ndimage.binary_closing(inside, plane, iterations=gap)
    return inside | (closed & free)


def _find_ventricles(fluid: Array, inside: Mask, grid_mm: tuple[float, ...]) -> Mask:
    """Large spaces of fluid deep inside."""
    depth = ndimage.distance_transform_edt(inside, sampling=grid_mm)
    wet = ndimage.binary_opening((fluid > 0.55) & (depth > 22))
    wet_labels, wet_count = ndimage.label(wet)
    wet_sizes = np.bincount(wet_labels.ravel(), minlength=wet_count + 1) * float(np.prod(grid_mm))
    large = np.flatnonzero(wet_sizes > 600)
    ventricles: Mask = ndimage.binary_dilation(np.isin(wet_labels, large[large > 0])) & (
        fluid > 0.35
    )
    return ventricles


def _filled(bone: Mask) -> Mask:
    """Slice by slice, bone and what it surrounds (gaps of the skull base closed)."""
    filled = np.empty_like(bone)
    for index, plane in enumerate(bone):
        closed = ndimage.binary_closing(np.pad(plane, 6), iterations=5)[6:-6, 6:-6]
        filled[index] = ndimage.binary_fill_holes(closed)
    return filled


def enlarge(coarse: npt.NDArray[np.generic], shape: tuple[int, int, int]) -> Array:
    """Linear interpolation onto another grid of the same box: voxel edges coincide, not centres."""
    tensor = torch.from_numpy(np.ascontiguousarray(coarse, dtype=np.float32))[None, None]
    return torch.nn.functional.interpolate(tensor, shape, mode="trilinear", align_corners=False)[
        0, 0
    ].numpy()
