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

    Looks from each face inwards as far as it is zero, so a CT costs six slices.
    """
    shape = stack[0].shape
    bounds = []
    for axis in range(3):
        slices = [np.moveaxis(channel, axis, 0) for channel in stack]
        start, stop = 0, shape[axis]
        while start < stop and not any(channel[start].any() for channel in slices):
            start += 1
        if start == stop:  # nothing but zeros
            return (0, shape[0]), (0, shape[1]), (0, shape[2])
        while not any(channel[stop - 1].any() for channel in slices):
            stop -= 1
        bounds.append((start, stop))
    return bounds[0], bounds[1], bounds[2]
