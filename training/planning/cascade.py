"""Whether a network at low resolution comes first, and at which.

Where a patch sees little of a case, a first network segments the case at a coarser voxel size, and
a second one refines its segmentation at the full one.

- ``capacity`` (msd2018): the median case has more than 4 times the voxels of the patch that fitted
  the GPUs of 2018 at batch 2, whatever patch is planned. Voxels are doubled until that is no longer
  so; along the fine axes only, until these match the coarsest. Why the patch is fixed:
  docs/decisions/0015-cascade-threshold.md.
- ``patch`` (nnunetv2): the same with the planned patch, in steps of 3 %, planning the patch anew at
  each; not kept if it saves less than half of the voxels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ichseg.errors import PlansError
from training.planning.overrides import Overrides
from training.planning.patch import Fit, Grid, fit_patch

CAPACITY = 64 * 192 * 160  # 1 966 080 voxels (C19)
TIMES = 4  # the voxels of a patch, beyond which a case is too large for it
LEAST_SAVING = 2.0  # nnunetv2: voxels at full over those at low resolution
_STEP = 1.03
_SAME = 1.001  # headers hold 32-bit floats: 2 x 2.4999999 mm is no coarser than 5 mm


@dataclass(frozen=True, slots=True)
class Resolution:
    """A voxel size that was considered.

    Attributes:
        spacing_mm: The voxel size.
        shape: Shape of the median case in such voxels.
        voxels: How many such voxels the median case has.
        capacity: How many voxels the patch has that it is compared with.
    """

    spacing_mm: tuple[float, ...]
    shape: tuple[float, ...]
    voxels: float
    capacity: float

    @property
    def too_large(self) -> bool:
        """Whether a patch sees too little of a case."""
        return self.voxels > TIMES * self.capacity


@dataclass(frozen=True, slots=True)
class Cascade:
    """Whether there is a stage at low resolution.

    Attributes:
        considered: Voxel sizes; the first is full resolution, the last is no longer too large.
        lowres: What was planned for the last; None if the first was not too large, or if the last
            saves too little.
    """

    considered: tuple[Resolution, ...]
    lowres: Fit | None


def plan_cascade(grid: Grid, overrides: Overrides) -> Cascade:
    """Decide about the cascade of a 3D grid at full resolution.

    Raises:
        PlansError: What was chosen does not fit the low resolution.
    """
    considered = [_resolution(grid, overrides)]
    coarse = grid
    while considered[-1].too_large:
        coarse = _at(grid, _coarser(coarse))
        considered.append(_resolution(coarse, overrides))
    saving = considered[0].voxels / considered[-1].voxels
    dropped = grid.recipe.cascade == "patch" and saving < LEAST_SAVING
    kept = len(considered) > 1 and not dropped
    return Cascade(tuple(considered), _fit_lowres(coarse, overrides) if kept else None)


def _fit_lowres(grid: Grid, overrides: Overrides) -> Fit:
    try:
        return fit_patch(grid, overrides)
    except PlansError as error:
        raise PlansError(f"3d_lowres: {error}") from error


def _resolution(grid: Grid, overrides: Overrides) -> Resolution:
    if grid.recipe.cascade == "capacity":
        capacity = CAPACITY
    else:
        capacity = math.prod(overrides.patch or fit_patch(grid, overrides).patch)
    return Resolution(grid.spacing_mm, grid.shape, grid.case_voxels, capacity)


def _coarser(grid: Grid) -> tuple[float, ...]:
    """The next voxel size to consider."""
    spacing, coarsest = grid.spacing_mm, max(grid.spacing_mm)
    if grid.recipe.cascade == "capacity":
        step = 2.0
        fine = [step * s <= coarsest * _SAME for s in spacing]
    else:
        step = _STEP
        fine = [coarsest / s > 2 for s in spacing]
    return tuple(s * step if f or not any(fine) else s for s, f in zip(spacing, fine, strict=True))


def _at(grid: Grid, spacing_mm: tuple[float, ...]) -> Grid:
    """The grid with another voxel size."""
    sizes = [
        old / new * size
        for old, new, size in zip(grid.spacing_mm, spacing_mm, grid.shape, strict=True)
    ]
    shape = tuple(float(max(1, round(size))) for size in sizes)
    # nnunetv2 counts the voxels before it rounds
    voxels = math.prod(shape if grid.recipe.cascade == "capacity" else sizes)
    return replace(grid, spacing_mm=spacing_mm, shape=shape, case_voxels=voxels)
