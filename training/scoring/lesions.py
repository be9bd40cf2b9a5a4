"""Bleeds one by one: which of the reference's were found, and which found ones are none.

The mean of a case hides them: a large bleed drawn well outweighs a small one missed. A lesion is a
set of voxels that touch, be it by a corner. One of the reference counts as found if the prediction
shares a voxel with it; one of the prediction is a false positive if it shares none with the
reference. So one that covers two finds both, and two that cover one are no false positives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ichseg.pieces import CONNECTED

Mask = npt.NDArray[np.bool_]

# By the volume of one lesion; see size_class for the limits.
SIZE_CLASSES = ("< 1 mL", "1..10 mL", "10..30 mL", "> 30 mL")
ALL_SIZES = "all"


@dataclass(frozen=True, slots=True)
class Lesion:
    """One connected piece of a mask.

    Attributes:
        volume_ml: The volume of the whole piece.
        overlap_ml: The volume that it shares with the other mask.
    """

    volume_ml: float
    overlap_ml: float

    @property
    def overlaps(self) -> bool:
        """Whether it shares a voxel with the other mask."""
        return self.overlap_ml > 0


@dataclass(frozen=True, slots=True)
class LesionCounts:
    """How many lesions of one size there are, were found, and are false.

    Lesions of the reference are sorted by their own volume, false ones by theirs.

    Attributes:
        size: One of ``SIZE_CLASSES``, or ``all``.
        reference: How many lesions the references have.
        found: How many of these the predictions touch.
        false_positives: How many lesions of the predictions share nothing with the reference.
        sensitivity: ``found / reference``; None if the references have none.
        f1: 2 found / (2 found + not found + false positives); None if there is nothing at all.
    """

    size: str
    reference: int
    found: int
    false_positives: int
    sensitivity: float | None
    f1: float | None


def find_lesions(mask: Mask, other: Mask, voxel_ml: float) -> tuple[Lesion, ...]:
    """The lesions of ``mask``, largest first, and what each shares with ``other``.

    Args:
        mask: The mask whose pieces are the lesions, shape ``(z, y, x)``.
        other: The mask that they are held against, of the same shape.
        voxel_ml: The volume of one voxel.
    """
    _, sizes, shared = number_lesions(mask, other)
    return tuple(
        Lesion(int(sizes[i]) * voxel_ml, int(shared[i]) * voxel_ml)
        for i in np.argsort(-sizes, kind="stable")
    )


def number_lesions(
    mask: Mask, other: Mask
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Number the lesions of ``mask`` and count what each shares with ``other``.

    Args:
        mask: The mask whose pieces are the lesions, shape ``(z, y, x)``.
        other: The mask that they are held against, of the same shape.

    Returns:
        The number of each voxel's lesion, from 1, or 0; then, for each lesion, its voxels, and how
        many of these are in the other mask.
    """
    labels, count = ndimage.label(mask, structure=CONNECTED)
    sizes = np.bincount(labels[mask], minlength=count + 1)[1:]
    shared = np.bincount(labels[mask & other], minlength=count + 1)[1:]
    return labels, sizes, shared


def size_class(volume_ml: float) -> str:
    """The one of ``SIZE_CLASSES`` that a volume is of; 1 and 10 mL begin one, 30 mL ends one."""
    if volume_ml < 1:
        return SIZE_CLASSES[0]
    if volume_ml < 10:
        return SIZE_CLASSES[1]
    return SIZE_CLASSES[2] if volume_ml <= 30 else SIZE_CLASSES[3]


def count_lesions(
    cases: Iterable[tuple[Sequence[Lesion], Sequence[Lesion]]],
) -> tuple[LesionCounts, ...]:
    """Count lesions over all cases, for each size and, last, for all sizes together.

    Args:
        cases: For each case the lesions of its reference and those of its prediction.
    """
    sizes = (*SIZE_CLASSES, ALL_SIZES)
    present, found, false = (dict.fromkeys(sizes, 0) for _ in range(3))
    for of_reference, of_prediction in cases:
        for lesion in of_reference:
            for size in (size_class(lesion.volume_ml), ALL_SIZES):
                present[size] += 1
                found[size] += lesion.overlaps
        for lesion in of_prediction:
            for size in (size_class(lesion.volume_ml), ALL_SIZES):
                false[size] += not lesion.overlaps
    return tuple(_counts(size, present[size], found[size], false[size]) for size in sizes)


def _counts(size: str, present: int, found: int, false: int) -> LesionCounts:
    everything = present + found + false  # 2 found + not found + false
    return LesionCounts(
        size=size,
        reference=present,
        found=found,
        false_positives=false,
        sensitivity=found / present if present else None,
        f1=2 * found / everything if everything else None,
    )
