"""The Dice coefficient, which networks, masks and counts of voxels are all compared by."""

from __future__ import annotations

import math

from ichseg.engine.arrays import Mask


def dice_of_counts(
    shared: int, total: int, *, smoothing: float = 0.0, empty: float = math.nan
) -> float:
    """The Dice coefficient of two masks A and B, from counts of their voxels.

    That is ``(2 |A and B| + smoothing) / (|A| + |B| + smoothing)``.

    Args:
        shared: Voxels that are in both masks, ``|A and B|``.
        total: Voxels of one mask and of the other, ``|A| + |B|``.
        smoothing: What is added above and below, so that two empty masks agree fully.
        empty: What two empty masks give where there is no smoothing.
    """
    if total + smoothing == 0:
        return empty
    return (2 * shared + smoothing) / (total + smoothing)


def dice_of_masks(
    first: Mask, second: Mask, *, smoothing: float = 0.0, empty: float = math.nan
) -> float:
    """The Dice coefficient of two boolean masks of one shape, see ``dice_of_counts``.

    Raises:
        ValueError: The shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"masks of shapes {tuple(first.shape)} and {tuple(second.shape)}")
    total = int(first.sum()) + int(second.sum())
    return dice_of_counts(int((first & second).sum()), total, smoothing=smoothing, empty=empty)
