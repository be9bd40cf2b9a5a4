"""Surfaces of masks as elements with areas, and how far two surfaces lie apart.

A surface element sits at each corner that eight voxels share when some of them are inside and some
are not; its area is that of the surface which marching cubes lays between them. Nikolov et al. 2018
(arXiv:1809.04430) define the surface Dice on these elements, and INSTANCE 2022 scores with it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import KDTree

Mask = npt.NDArray[np.bool_]
_Triple = tuple[int, int, int]

# Normals of the surface's triangles, signs left out: 1/2, 1/4 or 1/8 in each direction that they
# have. Their length is the area for voxels of size 1. (1, 0, 0) is half of the square between two
# slices, (0, 1, 1) half of a slope's rectangle, (1, 1, 1) cuts off a voxel.
_KINDS = tuple(kind for kind in itertools.product((0, 1), repeat=3) if any(kind))
_NORMALS = np.array([[side / 2 ** sum(kind) for side in kind] for kind in _KINDS])

# What marching cubes lays between the 2x2x2 voxels around a corner: which are inside, as (z, y, x),
# and how many triangles of each kind there are. One arrangement stands for all that are turned,
# mirrored, or have inside and outside exchanged; together they are all 254 that have a surface.
_ARRANGEMENTS: tuple[tuple[tuple[_Triple, ...], dict[_Triple, int]], ...] = (
    (((0, 0, 0),), {(1, 1, 1): 1}),
    (((0, 0, 0), (0, 0, 1)), {(1, 1, 0): 2}),
    (((0, 0, 0), (0, 1, 1)), {(1, 1, 1): 2}),
    (((0, 0, 0), (1, 1, 1)), {(1, 1, 1): 2}),
    (((0, 0, 0), (0, 0, 1), (0, 1, 0)), {(1, 0, 0): 1, (1, 1, 1): 3}),
    (((0, 0, 0), (0, 0, 1), (1, 1, 0)), {(1, 1, 0): 2, (1, 1, 1): 1}),
    (((0, 0, 0), (0, 1, 1), (1, 0, 1)), {(1, 1, 1): 3}),
    (((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)), {(1, 0, 0): 2}),
    (((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)), {(1, 1, 1): 6}),
    (((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 1)), {(0, 1, 1): 1, (1, 0, 1): 1, (1, 1, 1): 4}),
    (((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 1, 1)), {(1, 0, 0): 1, (1, 1, 1): 4}),
    (((0, 0, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1)), {(1, 1, 0): 4}),
    (((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)), {(1, 1, 1): 4}),
)
_OUTSIDE, _INSIDE = 0, 255  # the codes without a surface


@dataclass(frozen=True, slots=True)
class SurfaceDistances:
    """The elements of two surfaces, in no particular order; empty arrays where a mask is empty.

    Attributes:
        prediction_mm: Distance of each element of the prediction to the nearest of the reference;
            infinite where there is none.
        prediction_mm2: Area of each of these elements.
        reference_mm: Distance of each element of the reference to the nearest of the prediction.
        reference_mm2: Area of each of these.
    """

    prediction_mm: npt.NDArray[np.float64]
    prediction_mm2: npt.NDArray[np.float64]
    reference_mm: npt.NDArray[np.float64]
    reference_mm2: npt.NDArray[np.float64]


def surface_distances(
    prediction: Mask, reference: Mask, spacing_mm: tuple[float, float, float]
) -> SurfaceDistances:
    """The distance of each surface element of either mask to the nearest one of the other.

    All that is not in the arrays is background, so masks may be cropped to their common box, which
    is quicker.

    Args:
        prediction: One mask, shape ``(z, y, x)``.
        reference: The other mask, of the same shape.
        spacing_mm: The voxel size, ``(z, y, x)``.

    Raises:
        ValueError: The shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"masks of shapes {prediction.shape} and {reference.shape}")
    areas = element_areas(spacing_mm)
    ours, theirs = neighbour_codes(prediction), neighbour_codes(reference)
    on_ours, on_theirs = _has_surface(ours), _has_surface(theirs)
    return SurfaceDistances(
        prediction_mm=_nearest_mm(on_ours, on_theirs, spacing_mm),
        prediction_mm2=areas[ours[on_ours]],
        reference_mm=_nearest_mm(on_theirs, on_ours, spacing_mm),
        reference_mm2=areas[theirs[on_theirs]],
    )


def surface_dice(distances: SurfaceDistances, tolerance_mm: float) -> float:
    """The share of both surfaces, by area, that lies within the tolerance of the other.

    Returns:
        0 to 1; NaN when both masks are empty, 0 when one is.
    """
    near = (
        distances.prediction_mm2[distances.prediction_mm <= tolerance_mm].sum()
        + distances.reference_mm2[distances.reference_mm <= tolerance_mm].sum()
    )
    total = distances.prediction_mm2.sum() + distances.reference_mm2.sum()
    return float(near / total) if total else math.nan


def hausdorff_mm(distances: SurfaceDistances, percent: float) -> float:
    """The robust Hausdorff distance, which ``percent`` of either surface, by area, does not exceed.

    Of the two surfaces the further one counts. 100 is the Hausdorff distance itself.

    Returns:
        Millimetres; infinity when a mask is empty.
    """
    return max(
        _percentile(distances.prediction_mm, distances.prediction_mm2, percent),
        _percentile(distances.reference_mm, distances.reference_mm2, percent),
    )


def bounding_box(mask: Mask) -> tuple[slice, slice, slice]:
    """The smallest box ``(z, y, x)`` around all voxels of a mask; empty for an empty mask."""
    shadow: Any = mask.any(axis=0)  # first, as this axis is the quickest to go along
    y, x = _extent(shadow.any(axis=1)), _extent(shadow.any(axis=0))
    return _extent(mask[:, y, x].any(axis=(1, 2))), y, x


def neighbour_codes(mask: Mask) -> npt.NDArray[np.uint8]:
    """Which of the eight voxels around each voxel corner are inside, one bit each.

    Args:
        mask: The mask, shape ``(z, y, x)``.

    Returns:
        One code for each voxel corner, so one more than voxels along each axis. Bit
        ``4 * dz + 2 * dy + dx`` of corner ``c`` is voxel ``c - 1 + (dz, dy, dx)``.
    """
    codes = np.pad(mask.astype(np.uint8), 1)
    codes = codes[:, :, :-1] | codes[:, :, 1:] << np.uint8(1)
    codes = codes[:, :-1] | codes[:, 1:] << np.uint8(2)
    return codes[:-1] | codes[1:] << np.uint8(4)


def element_areas(spacing_mm: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """The area in mm2 of the surface element of each neighbour code, shape ``(256,)``."""
    z, y, x = spacing_mm
    faces = np.array([y * x, z * x, z * y])  # a normal's side goes with the face it stands on
    areas: npt.NDArray[np.float64] = _triangles() @ np.linalg.norm(_NORMALS * faces, axis=1)
    return areas


@functools.cache
def _triangles() -> npt.NDArray[np.float64]:
    """How many triangles of each kind the surface of each neighbour code has, ``(256, 7)``."""
    counts = np.zeros((256, len(_KINDS)))
    for voxels, triangles in _ARRANGEMENTS:
        for order in itertools.permutations(range(3)):
            kinds = {tuple(kind[axis] for axis in order): n for kind, n in triangles.items()}
            turned = [tuple(voxel[axis] for axis in order) for voxel in voxels]
            row = [kinds.get(kind, 0) for kind in _KINDS]
            for mirror in itertools.product((0, 1), repeat=3):
                code = _code((z ^ mirror[0], y ^ mirror[1], x ^ mirror[2]) for z, y, x in turned)
                counts[code] = counts[_INSIDE - code] = row
    return counts


def _extent(occupied: Any) -> slice:
    inside = np.flatnonzero(occupied)
    return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)


def _code(voxels: Iterable[_Triple]) -> int:
    return sum(1 << (4 * z + 2 * y + x) for z, y, x in voxels)


def _has_surface(codes: npt.NDArray[np.uint8]) -> Mask:
    found: Mask = (codes != _OUTSIDE) & (codes != _INSIDE)
    return found


def _nearest_mm(
    elements: Mask, others: Mask, spacing_mm: tuple[float, float, float]
) -> npt.NDArray[np.float64]:
    """Distance from each element to the nearest other, in the order of the array.

    By a tree of points: quicker than distance maps, which take their time from the box, not from
    the surface, and without their memory.
    """
    positions, targets = np.argwhere(elements), np.argwhere(others)
    if not len(targets):
        return np.full(len(positions), np.inf)
    found = np.zeros(len(positions))
    apart = ~others[elements]  # the others lie on the other surface
    tree = KDTree(targets * spacing_mm, leafsize=30, balanced_tree=False)
    _, nearest = tree.query(positions[apart] * spacing_mm)
    # Anew from whole steps: a difference of two positions is not exactly one voxel's size, which
    # the tolerance may be.
    steps = (positions[apart] - targets[nearest]) * spacing_mm
    found[apart] = np.sqrt((steps**2).sum(axis=1))
    return found


def _percentile(
    distances_mm: npt.NDArray[np.float64], areas: npt.NDArray[np.float64], percent: float
) -> float:
    if not len(distances_mm):
        return math.inf
    order = np.argsort(distances_mm)
    covered = np.cumsum(areas[order])
    first = int(np.searchsorted(covered / covered[-1], percent / 100.0))
    return float(distances_mm[order[min(first, len(order) - 1)]])
