"""The voxel size that all cases are brought to, and the order of axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.planning.recipes import ANISOTROPY, Recipe

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Target:
    """Target voxel size and what it was decided by, in the data's order of axes.

    Attributes:
        spacing_mm: The voxel size that the planner takes.
        coarsest: Axis along which the cases' median is largest.
        thickness: That median over the larger of the other two.
        thick: Whether that is beyond the anisotropy at which the axis is treated as separate.
        few: Whether the median case has so much fewer voxels along that axis, too.
        finer: Whether the 10th percentile was taken along that axis.
    """

    spacing_mm: tuple[float, ...]
    coarsest: int
    thickness: float
    thick: bool
    few: bool
    finer: bool


def target_spacing(spacings_mm: FloatArray, shapes: npt.NDArray[np.int_], recipe: Recipe) -> Target:
    """Median voxel size of the cases ``(z, y, x)``.

    Recipes with ``finer_slices`` do not let very anisotropic data lose slices: they take the 10th
    percentile along the coarsest axis, but stay coarser than the other two.

    Args:
        spacings_mm: Voxel size of each case, ``(cases, 3)``.
        shapes: Shape of each case after the crop, ``(cases, 3)``.
        recipe: Says whether that rule applies.
    """
    median = np.median(spacings_mm, axis=0)
    coarsest = int(np.argmax(median))
    others = [axis for axis in range(3) if axis != coarsest]
    widest = float(median[others].max())
    median_shape = np.median(shapes, axis=0)
    thick = bool(median[coarsest] > ANISOTROPY * widest)
    few = bool(ANISOTROPY * median_shape[coarsest] < median_shape[others].min())
    taken = median.copy()
    finer = recipe.finer_slices and thick and few
    if finer:
        tenth = float(np.percentile(spacings_mm[:, coarsest], 10))
        taken[coarsest] = tenth if tenth >= widest else widest + 1e-5
    return Target(
        spacing_mm=tuple(taken.tolist()),
        coarsest=coarsest,
        thickness=float(median[coarsest]) / widest,
        thick=thick,
        few=few,
        finer=finer,
    )


def coarsest_first(spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """The order of axes that puts the coarsest first and keeps the other two in order."""
    coarsest = int(np.argmax(spacing_mm))
    first, second = (axis for axis in range(3) if axis != coarsest)
    return coarsest, first, second
