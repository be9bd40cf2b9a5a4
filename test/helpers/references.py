"""Measures of google-deepmind's surface-distance, which INSTANCE 2022 scored with, and masks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import surface_distance
from scipy import ndimage

Mask = npt.NDArray[np.bool_]


def reference_scores(prediction: Mask, reference: Mask, spacing_mm: Any) -> dict[str, float]:
    """The measures of ``training.scoring.measures.Scores``, of masks that are not empty."""
    with warnings.catch_warnings():  # it uses SciPy by names of old
        warnings.simplefilter("ignore", DeprecationWarning)
        distances = surface_distance.compute_surface_distances(reference, prediction, spacing_mm)
    predicted, present = int(prediction.sum()), int(reference.sum())
    dice = surface_distance.compute_dice_coefficient(reference, prediction)
    return {
        # with 1e-5 added above and below, which the package leaves out
        "dice": (dice * (predicted + present) + 1e-5) / (predicted + present + 1e-5),
        "relative_volume_difference": abs(predicted / present - 1),
        "surface_dice": surface_distance.compute_surface_dice_at_tolerance(distances, 0.42),
        "hausdorff_mm": surface_distance.compute_robust_hausdorff(distances, 100),
        "hausdorff_95_mm": surface_distance.compute_robust_hausdorff(distances, 95),
    }


def random_pair(random: np.random.Generator, shape: tuple[int, ...]) -> tuple[Mask, Mask]:
    """Two masks that are not empty: blobs of some size with something in common, at times noise."""
    while True:
        smoothing = random.uniform(0, 2.5)
        common, *own = (
            ndimage.gaussian_filter(random.normal(size=shape), smoothing) for _ in range(3)
        )
        likeness = random.uniform(0, 3)
        first, second = (
            field > np.quantile(field, random.uniform(0.4, 0.995))
            for field in (common * likeness + other for other in own)
        )
        if first.any() and second.any():
            return first, second
