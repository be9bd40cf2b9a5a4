"""The largest patch that fits the memory, with its network and its batch.

Every patch that the search tries is kept, so that ``plan --explain`` can show the way.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ichseg.errors import PlansError
from ichseg.model.architecture import Architecture
from ichseg.wording import times
from training.planning.overrides import Overrides
from training.planning.recipes import Limits, Recipe
from training.planning.topology import MEMORIES, POOLINGS, SMALLEST_EDGE, Topology, padded

SMALLEST_BATCH = 2
_FIRST_EDGE = 512  # voxels along the coarsest axis


@dataclass(frozen=True, slots=True)
class Grid:
    """What is planned for; axes in plan order, two of them for a 2D configuration.

    Attributes:
        recipe: The constants to plan by.
        spacing_mm: Target voxel size.
        shape: Median shape of the cases at that spacing.
        case_voxels: Voxels of the median case in 3D; not rounded, where ``shape`` is.
        cases, channels, classes: How many there are of each; classes include the background.
    """

    recipe: Recipe
    spacing_mm: tuple[float, ...]
    shape: tuple[float, ...]
    case_voxels: float
    cases: int
    channels: int
    classes: int

    @property
    def limits(self) -> Limits:
        """The constants for as many axes as the grid has."""
        return self.recipe.limits_2d if len(self.shape) == 2 else self.recipe.limits_3d

    @property
    def in_plane(self) -> Grid:
        """The grid of one slice."""
        return replace(self, spacing_mm=self.spacing_mm[1:], shape=self.shape[1:])


@dataclass(frozen=True, slots=True)
class Attempt:
    """A patch that was tried.

    Attributes:
        patch: Size in voxels.
        network: The network that such a patch gets.
        elements: Feature-map elements of one patch.
        shortened: The axis along which it is shorter than the one tried before.
    """

    patch: tuple[int, ...]
    network: Architecture
    elements: float
    shortened: int | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """A patch that fits, and why.

    Attributes:
        grid: What it was planned for.
        first: Where the search started, before that was clipped to the median case; None if the
            patch was chosen.
        attempts: The patches that were tried; the last is taken.
        limit: Elements that one patch may have; nothing is compared with it if it was chosen.
        affordable: Patches that the memory holds.
        covered: Patches that cover the recipe's share of the dataset.
        batch: Patches per training step.
    """

    grid: Grid
    first: tuple[int, ...] | None
    attempts: tuple[Attempt, ...]
    limit: float
    affordable: float
    covered: int
    batch: int

    @property
    def patch(self) -> tuple[int, ...]:
        """Size in voxels of the patch that was taken."""
        return self.attempts[-1].patch

    @property
    def network(self) -> Architecture:
        """The network of that patch."""
        return self.attempts[-1].network


def fit_patch(grid: Grid, overrides: Overrides) -> Fit:
    """Patch, network and batch of one configuration.

    Args:
        grid: What to plan for, with two axes or three.
        overrides: What the user chose, the patch in plan order.

    Raises:
        PlansError: No patch fits the memory, or what was chosen does not fit together.
    """
    limits = grid.limits
    # the smallest batch has to fit the memory, not only the one that the budget is for
    limit = limits.budget * limits.batch / limits.room
    if overrides.patch is None:
        first = first_patch(grid)
        attempts = _search(grid, first, limit, overrides.features)
    else:
        first = None
        attempts = (_try(grid, overrides.patch, overrides.features),)
        _check_multiple(overrides.patch, attempts[0].patch, attempts[0].network)
    found = attempts[-1]
    levels = len(found.network.features)
    if overrides.features is not None and len(overrides.features) != levels:
        raise PlansError(
            f"features {overrides.features} name {len(overrides.features)} levels, but a patch of "
            f"{times(found.patch)} pools to {levels}: give {levels} numbers, or a larger patch"
        )
    affordable = limits.budget / found.elements * limits.batch
    if overrides.patch is None and affordable < SMALLEST_BATCH:
        raise PlansError(
            f"two patches of {times(found.patch)} exceed {grid.recipe.gpu_memory_gb:g} GB, and "
            f"recipe {grid.recipe.name} has none smaller"
        )
    share = grid.recipe.dataset_share * grid.case_voxels * grid.cases
    covered = round(share / math.prod(found.patch))
    whole = round(affordable) if grid.recipe.round_batch else math.floor(affordable)
    batch = overrides.batch or max(min(whole, covered), SMALLEST_BATCH)
    return Fit(grid, first, attempts, limit, affordable, covered, batch)


def first_patch(grid: Grid) -> tuple[int, ...]:
    """Where the search starts, before it is clipped to the cases; rules as in ``Limits``."""
    if grid.limits.first_patch == "case":
        return tuple(round(size) for size in grid.shape)
    density = 1 / np.array(grid.spacing_mm)
    if grid.limits.first_patch == "edge":
        scale = _FIRST_EDGE / float(density.min())
    else:
        axes = len(density)
        voxels = 256**3 if axes == 3 else 2048**2
        scale = (voxels / float(np.prod(density))) ** (1 / axes)
    return tuple(round(float(value)) for value in density * scale)


def _search(
    grid: Grid, first: Sequence[int], limit: float, features: tuple[int, ...] | None
) -> tuple[Attempt, ...]:
    """From the first patch, clipped to the median case, shrink until the limit is kept."""
    clipped = [min(a, b) for a, b in zip(first, grid.shape, strict=True)]
    attempts = [_try(grid, clipped, features)]
    while attempts[-1].elements > limit and grid.limits.first_patch != "case":
        last = attempts[-1]
        axis, smaller = _shrink(grid, last, features)
        try:
            following = _try(grid, smaller, features, axis)
        except PlansError as error:
            raise PlansError(
                f"no patch fits {grid.recipe.gpu_memory_gb:g} GB of GPU memory: {error}"
            ) from error
        met = following.patch in [one.patch for one in attempts if one.network == following.network]
        if met or min(following.patch) < 1:
            raise PlansError(
                f"no patch fits {grid.recipe.gpu_memory_gb:g} GB of GPU memory: stuck at "
                f"{times(last.patch)}"
            )
        attempts.append(following)
    return tuple(attempts)


def _try(
    grid: Grid, size: Sequence[float], features: tuple[int, ...] | None, axis: int | None = None
) -> Attempt:
    """The network for a size, and that size padded to what the network pools by."""
    topology = _topology(grid, size, features)
    levels = len(topology.strides)
    if levels < 2:
        raise PlansError(
            f"patch {times(size)} is too small to pool, expected an edge of at least "
            f"{2 * SMALLEST_EDGE}"
        )
    recipe = grid.recipe
    deepest = recipe.encoder_convs[-1]
    doubled = (recipe.base_features * 2**level for level in range(levels))
    network = Architecture(
        features=(features or tuple(min(f, grid.limits.most_features) for f in doubled))[:levels],
        kernels=topology.kernels,
        strides=topology.strides,
        encoder_convs=(*recipe.encoder_convs, *(deepest,) * levels)[:levels],
        decoder_convs=(recipe.decoder_convs,) * (levels - 1),
        upsampling_bias=recipe.biases,
        head_bias=recipe.biases,
        deep_supervision=recipe.deep_supervision,
        block=recipe.block,
    )
    patch = padded(size, network.total_stride)
    elements = MEMORIES[recipe.memory](patch, network, grid.channels, grid.classes)
    return Attempt(patch, network, elements, axis)


def _shrink(
    grid: Grid, attempt: Attempt, features: tuple[int, ...] | None
) -> tuple[int, list[int]]:
    """One step off the axis that covers most of the median case, the last of equals."""
    patch = attempt.patch
    cover = [p / s for p, s in zip(patch, grid.shape, strict=True)]
    axis = max(range(len(cover)), key=lambda a: (cover[a], a))
    smaller = list(patch)
    step = attempt.network.total_stride[axis]
    if grid.recipe.shrinking == "halve":
        # an axis whose bottleneck edge is at its smallest is cut by half of what it pools by
        if patch[axis] // step <= SMALLEST_EDGE:
            step = max(1, step // 2)
    else:  # by what the smaller patch has to be a multiple of
        tentative = [p - step * (a == axis) for a, p in enumerate(patch)]
        step = _topology(grid, tentative, features).divisor[axis]
    smaller[axis] -= step
    return axis, smaller


def _topology(grid: Grid, size: Sequence[float], features: tuple[int, ...] | None) -> Topology:
    most = len(features) - 1 if features else sys.maxsize
    return POOLINGS[grid.limits.pooling](size, grid.spacing_mm, most)


def _check_multiple(chosen: Sequence[int], above: Sequence[int], network: Architecture) -> None:
    """Refuse a patch that its network cannot divide."""
    if tuple(chosen) != tuple(above):
        divisor = network.total_stride
        below = [max(d, p // d * d) for p, d in zip(chosen, divisor, strict=True)]
        raise PlansError(
            f"patch {times(chosen)} is not a multiple of {times(divisor)}, which its network "
            f"pools by; {times(below)} or {times(above)} would fit"
        )
