"""Parallel slices where the scanner put them, and the straight grid that they are resampled onto.

With a tilted gantry each slice lies a little further along its own plane than the one before: put
on each other as they are they make a sheared head. Steps may differ, too. The straight grid keeps
the slices' plane and stacks it along its normal, so that each slice is only moved within itself,
and mixed with a neighbour where the steps differ. Every voxel lies where it was in the patient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ichseg import ndimage
from ichseg.scan.volume import Volume

NOTHING_HU = -1024  # where no slice reaches
_SAME_MM = 0.175  # positions are often written with one decimal, along all three axes
_SAME_STEPS = 0.1  # of a step, where slices are thin
_WHOLE_PIXELS = 0.01  # a shift this near to whole pixels moves them as they are


@dataclass(frozen=True, slots=True)
class Stack:
    """Where parallel slices lie.

    Attributes:
        shape: The shape ``(y, x)`` of each slice.
        spacing_mm: The size of its pixels along ``(y, x)``.
        axes: A 3x3 matrix; its columns are the unit vectors of the slices' normal, of a column
            downwards and of a row rightwards; its rows are ``(z, y, x)``, LPS.
        places_mm: The place of each slice's first pixel along these axes, shape ``(slice, 3)``;
            slices ascend along the normal.
    """

    shape: tuple[int, int]
    spacing_mm: tuple[float, float]
    axes: npt.NDArray[np.float64]
    places_mm: npt.NDArray[np.float64]

    @property
    def steps_mm(self) -> npt.NDArray[np.float64]:
        """The distance from each slice to the next, along the normal."""
        steps: npt.NDArray[np.float64] = np.diff(self.places_mm[:, 0])
        return steps

    @property
    def is_even(self) -> bool:
        """Whether all steps are the same."""
        height = self.places_mm[:, 0]
        even = np.linspace(height[0], height[-1], len(height))
        tolerance = min(_SAME_MM, _SAME_STEPS * float(np.median(self.steps_mm)))
        return bool(abs(height - even).max() <= tolerance)

    @property
    def is_upright(self) -> bool:
        """Whether the slices lie straight above each other."""
        return bool(np.ptp(self.places_mm[:, 1:], axis=0).max() <= _SAME_MM)

    @property
    def tilt_degrees(self) -> float:
        """The angle between the slices' normal and the way from the first slice to the last."""
        height, *across = self.places_mm[-1] - self.places_mm[0]
        return float(np.degrees(np.arctan2(np.hypot(*across), height)))

    @property
    def heights_mm(self) -> npt.NDArray[np.float64]:
        """How much of the patient each slice stands for: halfway to the slices beside it.

        The first and the last slice reach as far outwards as inwards.
        """
        steps = self.steps_mm
        heights: npt.NDArray[np.float64] = (np.r_[steps[0], steps] + np.r_[steps, steps[-1]]) / 2
        return heights


@dataclass(frozen=True, slots=True)
class Grid:
    """A straight grid in a stack's axes.

    Attributes:
        shape: The number of voxels along ``(z, y, x)``.
        spacing_mm: Their size along ``(z, y, x)``.
        start_mm: The place of the first voxel along the stack's axes.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    start_mm: tuple[float, float, float]


def grid_of(stack: Stack) -> Grid:
    """The grid that holds every pixel of the stack; of a straight stack, the stack itself.

    Its step is the median one, stretched so that the last slice ends it.
    """
    places = stack.places_mm
    extent = float(places[-1, 0] - places[0, 0])
    if stack.is_even:
        count = len(places)
    else:
        count = 1 + max(1, round(extent / float(np.median(stack.steps_mm))))
    start = places.min(axis=0)
    more = (0, 0)
    if stack.is_upright:
        start = places[0]
    else:
        drift = np.ptp(places[:, 1:], axis=0) / stack.spacing_mm
        rows, columns = np.ceil(drift - _WHOLE_PIXELS)
        more = (int(rows), int(columns))
    return Grid(
        shape=(count, stack.shape[0] + more[0], stack.shape[1] + more[1]),
        spacing_mm=(extent / (count - 1), *stack.spacing_mm),
        start_mm=(float(start[0]), float(start[1]), float(start[2])),
    )


def straighten(stack: Stack, pixels: Callable[[int], npt.NDArray[np.int16]]) -> Volume:
    """Put slices onto the straight grid.

    Within a slice by a cubic spline, where the shift is not of whole pixels; across slices
    linearly. A straight stack is only filled in. Two slices are held beside the result.

    Args:
        stack: Where the slices lie.
        pixels: Gives slice ``i`` in HU, ``(y, x)``; each is asked for once, in order.
    """
    grid = grid_of(stack)
    voxels = np.empty(grid.shape, np.int16)
    moved: dict[int, npt.NDArray[np.int16]] = {}

    def slice_of(i: int) -> npt.NDArray[np.int16]:
        if i not in moved:
            moved.pop(i - 2, None)
            moved[i] = _moved(pixels(i), stack, i, grid)
        return moved[i]

    if stack.is_even:
        for i in range(len(voxels)):
            voxels[i] = slice_of(i)
    else:
        height = stack.places_mm[:, 0]
        for i, at in enumerate(np.linspace(height[0], height[-1], len(voxels))):
            below = min(int(np.searchsorted(height, at, side="right")) - 1, len(height) - 2)
            for asked in range(max(moved, default=-1) + 1, below):
                slice_of(asked)  # between two slices of the grid: left out, but read and checked
            part = np.float32((at - height[below]) / (height[below + 1] - height[below]))
            mixed = slice_of(below) * (1 - part) + slice_of(below + 1) * part
            voxels[i] = np.rint(mixed)
    origin = stack.axes @ grid.start_mm
    return Volume(
        voxels=voxels,
        spacing_mm=grid.spacing_mm,
        origin_mm=(float(origin[0]), float(origin[1]), float(origin[2])),
        direction=tuple(float(value) for value in stack.axes.ravel()),
    )


def _moved(
    pixels: npt.NDArray[np.int16], stack: Stack, i: int, grid: Grid
) -> npt.NDArray[np.int16]:
    """A slice moved within its plane to where the straight grid has it."""
    if stack.is_upright:
        return pixels
    shift = (stack.places_mm[i, 1:] - grid.start_mm[1:]) / stack.spacing_mm
    whole = np.rint(shift).astype(int)
    moved = np.full(grid.shape[1:], NOTHING_HU, np.int16)
    if abs(shift - whole).max() <= _WHOLE_PIXELS:
        y, x = whole
        moved[y : y + stack.shape[0], x : x + stack.shape[1]] = pixels
        return moved
    spline = ndimage.affine_transform(
        pixels.astype(np.float32),
        np.ones(2),
        offset=-shift,
        output_shape=grid.shape[1:],
        order=3,
        cval=NOTHING_HU,
    )
    # a spline swings beyond what it goes through
    np.clip(np.rint(spline), min(int(pixels.min()), NOTHING_HU), pixels.max(), out=spline)
    moved[:] = spline
    return moved


def volume_ml(stack: Stack, labels: npt.NDArray[np.uint8]) -> float:
    """The volume of all labels ``(slice, y, x)``, each slice as high as its ``heights_mm``."""
    counts = np.count_nonzero(labels, axis=(1, 2))
    return float(counts @ stack.heights_mm) * stack.spacing_mm[0] * stack.spacing_mm[1] / 1000


def onto_slices(stack: Stack, labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Labels on the straight grid brought to the slices, by the nearest voxel.

    Args:
        stack: Where the slices lie.
        labels: ``(z, y, x)``, on ``grid_of(stack)``.

    Returns:
        ``(slice, y, x)``.
    """
    grid = grid_of(stack)
    if labels.shape != grid.shape:
        raise ValueError(f"labels have shape {labels.shape}, the stack's grid {grid.shape}")
    back = np.empty((len(stack.places_mm), *stack.shape), np.uint8)
    if stack.is_even and stack.is_upright:
        back[:] = labels
        return back
    at = (stack.places_mm - grid.start_mm) / grid.spacing_mm
    for i, (z, y, x) in enumerate(np.rint(at).astype(int)):
        y, x = (0, 0) if stack.is_upright else (y, x)
        back[i] = labels[z, y : y + stack.shape[0], x : x + stack.shape[1]]
    return back
