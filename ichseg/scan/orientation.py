"""Axis orders and crops of a volume: what happens to its grid before any voxel changes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ichseg.scan.volume import Volume

Array = npt.NDArray[np.generic]
Scalar = TypeVar("Scalar", bound=np.generic)
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # (start, stop) per axis


@dataclass(frozen=True, slots=True)
class AxisOrder:
    """A lossless change of axes: permute, then flip.

    Attributes:
        permutation: Array axis that becomes each new axis.
        flips: Whether each new axis then runs backwards.
    """

    permutation: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    def apply(self, array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """The array ``(z, y, x)`` in the new order, as a view."""
        return np.flip(array.transpose(self.permutation), self._flipped())

    def undo(self, array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """Exact inverse of ``apply``, as a view."""
        return np.flip(array, self._flipped()).transpose(np.argsort(self.permutation))

    def _flipped(self) -> tuple[int, ...]:
        return tuple(axis for axis, flip in enumerate(self.flips) if flip)


def orient_axes(volume: Volume) -> AxisOrder:
    """Permutation and flips that bring the axes nearest to superior, posterior, left (LPS)."""
    matrix = np.array(volume.direction).reshape(3, 3)  # rows: patient axes, columns: array axes
    best = max(
        itertools.permutations(range(3)),
        key=lambda p: sum(abs(matrix[row, p[row]]) for row in range(3)),
    )
    z, y, x = (bool(matrix[row, best[row]] < 0) for row in range(3))
    return AxisOrder((best[0], best[1], best[2]), (z, y, x))


def nonzero_box(stack: Sequence[Array]) -> Box:
    """Bounding box of the voxels nonzero in any channel; the whole volume if there are none.

    A CT costs its six faces, which are not zero. Where one is, slices are looked at from the first
    and the last inwards, and what lies between them is looked at once, from above.
    """
    z, y, x = stack[0].shape
    start, stop = 0, z
    while start < stop and not any(channel[start].any() for channel in stack):
        start += 1
    if start == stop:  # nothing but zeros
        return (0, z), (0, y), (0, x)
    while not any(channel[stop - 1].any() for channel in stack):
        stop -= 1
    faces = [
        [channel[:, 0], channel[:, -1], channel[..., 0], channel[..., -1]] for channel in stack
    ]
    if all(any(face.any() for face in same) for same in zip(*faces, strict=True)):
        return (start, stop), (0, y), (0, x)
    shadow = np.logical_or.reduce([channel[start:stop].any(axis=0) for channel in stack])
    rows, columns = (np.flatnonzero(shadow.any(axis)) for axis in (1, 0))
    return (
        (start, stop),
        (int(rows[0]), int(rows[-1]) + 1),
        (int(columns[0]), int(columns[-1]) + 1),
    )
