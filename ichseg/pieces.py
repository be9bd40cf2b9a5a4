"""The connected pieces of a mask, found and measured slab by slab.

Pieces are 26-connected: voxels that share a face, an edge or a corner belong together. Numbers of
pieces take four bytes a voxel, so they exist for one slab of slices at a time. A slab has the last
slice of the one before, too: what got a number in both is one piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ichseg import ndimage

Labels = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.integer]
CONNECTED = np.ones((3, 3, 3), bool)  # as scipy.ndimage takes it
_SLAB_VOXELS = 4_000_000  # numbered at once
_MEASURED_VOXELS = 300_000  # of these measured at once: several arrays of 8 bytes a voxel


@dataclass(frozen=True, slots=True)
class Pieces:
    """All pieces of a mask, in the order of their first voxels.

    Attributes:
        voxels: How many voxels each has.
        first: The index of its first voxel, as if the mask had one axis.
        low: The box around each: its first voxels along z, y, x, ``(3, n)``.
        end: One more than its last ones, ``(3, n)``.
        sums: The sums over its voxels, ``(5, n)``: of their indices z, y and x, their HU, and their
            probabilities in steps of 1/255; 0 for what was not given.
        most: The highest of these probabilities, in the same steps.
        numbered: The piece of each number that the slabs have given, one slab after another.
    """

    voxels: Integers
    first: Integers
    low: Integers
    end: Integers
    sums: npt.NDArray[np.float64]
    most: Labels
    numbered: Integers

    def __len__(self) -> int:
        return len(self.voxels)

    @property
    def mean_index(self) -> npt.NDArray[np.float64]:
        """The centre of mass of each piece, in voxels, ``(3, n)``."""
        centre: npt.NDArray[np.float64] = self.sums[:3] / self.voxels
        return centre

    @property
    def mean_hu(self) -> npt.NDArray[np.float64]:
        """The mean of each piece's HU."""
        mean: npt.NDArray[np.float64] = self.sums[3] / self.voxels
        return mean

    @property
    def mean_probability(self) -> npt.NDArray[np.float64]:
        """The mean of each piece's probabilities, 0 to 1."""
        mean: npt.NDArray[np.float64] = self.sums[4] / self.voxels / 255
        return mean


class _Slab(NamedTuple):
    """Some slices of a mask, with a number from 1 on for what is connected within it.

    Numbers of all slabs together are counted from 0, one slab after another.
    """

    rows: slice
    numbers: npt.NDArray[np.int32]
    given: int
    same: Integers  # (2, k): numbers, of all slabs, that are of one piece


def measure(
    labels: Labels,
    label: int,
    hu: npt.NDArray[np.generic] | None = None,
    foreground: Labels | None = None,
) -> Pieces:
    """Find and measure the pieces of a label.

    Args:
        labels: ``(z, y, x)``.
        label: The label; 0 for all that is not background.
        hu: The scan, of the same shape, if mean HU are wanted.
        foreground: The probability of anything but background in steps of 1/255, likewise.
    """
    same, parts = [], []
    for slab in _slabs(labels, label):
        same.append(slab.same)
        parts.append(_measured(slab, hu, foreground))
    numbered = _joined(np.concatenate(same, axis=1), sum(map(len, parts)))
    found = replace(_unseen(int(numbered.max(initial=-1)) + 1), numbered=numbered)
    start = 0
    for part in parts:
        of = numbered[start : start + len(part)]
        start += len(part)
        np.add.at(found.voxels, of, part.voxels)
        np.minimum.at(found.first, of, part.first)
        np.maximum.at(found.most, of, part.most)
        for axis in range(3):
            np.minimum.at(found.low[axis], of, part.low[axis])
            np.maximum.at(found.end[axis], of, part.end[axis])
        for total, more in zip(found.sums, part.sums, strict=True):
            np.add.at(total, of, more)
    return found


def one(labels: Labels, label: int, pieces: Pieces, index: int) -> npt.NDArray[np.bool_]:
    """Where a piece is, in the box around it.

    Args:
        labels: What was measured.
        label: The label that was.
        pieces: What was found.
        index: Which of them is wanted.
    """
    low, end = pieces.low[:, index], pieces.end[:, index]
    box = labels[tuple(slice(*bounds) for bounds in zip(low, end, strict=True))]
    numbers, _ = ndimage.label(box == label if label else box != 0, CONNECTED)
    first = np.array(np.unravel_index(pieces.first[index], labels.shape)) - low
    found: npt.NDArray[np.bool_] = numbers == numbers[tuple(first)]
    return found


def keep(labels: Labels, label: int, pieces: Pieces, kept: npt.NDArray[np.bool_]) -> None:
    """Set the voxels of all other pieces to 0, in place.

    Args:
        labels: What was measured.
        label: The label that was.
        pieces: What was found.
        kept: Which of them stay.
    """
    if kept.all():
        return
    stays, start = kept[pieces.numbered], 0
    for slab in _slabs(labels, label):
        own = np.concatenate(([True], stays[start : start + slab.given]))  # 0 is another label's
        start += slab.given
        labels[slab.rows][~own[slab.numbers]] = 0


def _slabs(labels: Labels, label: int) -> Iterator[_Slab]:
    """Number a mask slab by slab; a slab may be changed before the next one is asked for."""
    count = 0
    before: tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32], int] | None = None
    step = max(1, _SLAB_VOXELS // math.prod(labels.shape[1:]))
    for z in range(0, len(labels), step):
        rows = slice(z, min(z + step, len(labels)))
        inside = labels[rows] == label if label else labels[rows] != 0
        if before is None:
            numbers, found = ndimage.label(inside, CONNECTED)
            same = np.empty((2, 0), np.int64)
        else:
            last, own, start = before
            numbers, found = ndimage.label(np.concatenate((last, inside)), CONNECTED)
            same = _pairs(own, numbers[:1]) + np.array([[start - 1], [count - 1]])
            numbers = numbers[1:]
        before = inside[-1:], numbers[-1:], count
        yield _Slab(rows, numbers, found, same)
        count += found


def _pairs(first: npt.NDArray[np.int32], second: npt.NDArray[np.int32]) -> Integers:
    """The different pairs of numbers that the same voxels have, ``(2, k)``; 0 is none."""
    some = first > 0
    both = first[some].astype(np.int64) << 32 | second[some]
    both = np.unique(both[np.flatnonzero(np.diff(both, prepend=-1))])  # few: runs are alike
    return np.stack((both >> 32, both & 0xFFFFFFFF))


def _unseen(count: int) -> Pieces:
    """So many pieces, of which no voxel has been seen yet; each is its number."""
    beyond = np.iinfo(np.int64).max
    return Pieces(
        voxels=np.zeros(count, np.int64),
        first=np.full(count, beyond),
        low=np.full((3, count), beyond),
        end=np.zeros((3, count), np.int64),
        sums=np.zeros((5, count)),
        most=np.zeros(count, np.uint8),
        numbered=np.arange(count),
    )


def _measured(slab: _Slab, hu: npt.NDArray[Any] | None, foreground: Labels | None) -> Pieces:
    """Measure a slab, some slices at a time: beside the numbers that takes little memory."""
    depth, height, width = slab.numbers.shape
    found = _unseen(slab.given)
    step = max(1, _MEASURED_VOXELS // (height * width))
    for z in range(0, depth, step):
        numbers = slab.numbers[z : z + step]
        start = slab.rows.start + z
        rows = slice(start, start + len(numbers))
        _add_runs(
            found,
            numbers,
            start,
            None if hu is None else hu[rows],
            None if foreground is None else foreground[rows],
        )
    return found


def _add_runs(
    found: Pieces,
    numbers: npt.NDArray[np.int32],
    start: int,
    hu: npt.NDArray[Any] | None,
    foreground: Labels | None,
) -> None:
    """Add slices from ``start`` on by their runs: what follows in a row is of one piece."""
    _, height, width = numbers.shape
    begins = np.ones(numbers.shape, np.bool_)
    np.not_equal(numbers[..., 1:], numbers[..., :-1], out=begins[..., 1:])
    runs = np.flatnonzero(begins)
    of = numbers.ravel()[runs]
    inside = of > 0
    lengths = np.diff(runs, append=numbers.size)[inside]
    of, at = of[inside] - 1, runs[inside] + start * height * width
    line, x = np.divmod(at, width)
    z, y = np.divmod(line, height)

    def over_runs(data: npt.NDArray[Any], function: np.ufunc, kind: Any) -> Any:
        return function.reduceat(data.ravel().astype(kind, copy=False), runs)[inside]

    count = len(found)
    weights = [z * lengths, y * lengths, (x + (lengths - 1) / 2) * lengths]
    weights += [] if hu is None else [over_runs(hu, np.add, np.float64)]
    found.voxels[:] += np.bincount(of, lengths, count).astype(np.int64)
    for total, weight in zip(found.sums, weights, strict=False):
        total += np.bincount(of, weight, count)
    if foreground is not None:
        found.sums[4] += np.bincount(of, over_runs(foreground, np.add, np.float64), count)
        np.maximum.at(found.most, of, over_runs(foreground, np.maximum, np.uint8))
    np.minimum.at(found.first, of, at)
    for axis, (lowest, last) in enumerate(((z, z + 1), (y, y + 1), (x, x + lengths))):
        np.minimum.at(found.low[axis], of, lowest)
        np.maximum.at(found.end[axis], of, last)


def _joined(same: Integers, count: int) -> Integers:
    """The piece of each number, in the order of its first one, from pairs ``(2, k)`` of a piece."""
    root = np.arange(count)
    while True:
        first, second = root[same]
        low, high = np.minimum(first, second), np.maximum(first, second)
        if np.array_equal(low, high):
            break
        np.minimum.at(root, high, low)
        while not np.array_equal(root, further := root[root]):
            root = further
    return (np.cumsum(root == np.arange(count)) - 1)[root]
