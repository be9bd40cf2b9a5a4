"""Measures of agreement between two masks."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def dice(segmentation: npt.NDArray[np.bool_], reference: npt.NDArray[np.bool_]) -> float:
    """Dice coefficient of two masks of one shape: 2 |A and B| / (|A| + |B|).

    Returns:
        0 to 1; NaN when both masks are empty, 0 when one is.

    Raises:
        ValueError: The shapes differ.
    """
    if segmentation.shape != reference.shape:
        raise ValueError(f"masks of shapes {segmentation.shape} and {reference.shape}")
    first, second = segmentation.astype(bool), reference.astype(bool)
    total = int(first.sum()) + int(second.sum())
    return 2 * int((first & second).sum()) / total if total else math.nan
