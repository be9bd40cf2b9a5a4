"""From a fingerprint to plans: voxel size, patch, batch and topology.

Recipes are tables of constants for one family of functions: ``msd2018`` is the paper as written,
with the constants of the first public nnU-Net code where the paper is silent; ``nnunetv2`` is
nnU-Net v2.

Here and in plans, sizes and spacings are ``(z, y, x)`` after LPS orientation and after the
transpose that puts the axis of coarsest spacing first.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ichseg import plans as plans_module
from ichseg import schema, volume
from ichseg.errors import DatasetError, PlansError
from ichseg.plans import Architecture, Configuration, Normalisation, Plans
from training.dataset import (
    Dataset,
    add_workspace_argument,
    default_workers,
    is_ct,
    load_dataset,
)
from training.fingerprint import Fingerprint, load_or_compute
from training.recipes import ANISOTROPY, RECIPES, Recipe
from training.topology import MEMORIES, POOLINGS, SMALLEST_EDGE, Topology, padded

PLANS_FILE = "plans.json"
_SMALLEST_BATCH = 2
_DATASET_SHARE = 0.05  # of all voxels of the dataset that one batch may cover
_MASKED_BELOW = 0.75  # relative size after the crop below which z-scores keep to the nonzero region
_START_MM = 512  # msd2018: edge of the first patch along the coarsest axis, in voxels of that axis

_log = logging.getLogger(__name__)
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the user chose in place of the planner.

    Attributes:
        spacing_mm: Target voxel size ``(z, y, x)``, for all configurations.
        patch: Voxels ``(z, y, x)``, for 3D configurations.
        batch: Patches per training step, for 3D configurations.
        features: Features per level, for 3D configurations; their number is the number of levels.
    """

    spacing_mm: tuple[float, float, float] | None = None
    patch: tuple[int, int, int] | None = None
    batch: int | None = None
    features: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and not all(0 < s < math.inf for s in self.spacing_mm):
            raise PlansError(f"spacing {self.spacing_mm} mm, expected three positive numbers")
        if self.patch is not None and min(self.patch) < 1:
            raise PlansError(f"patch {self.patch}, expected three positive sizes")
        if self.batch is not None and self.batch < 1:
            raise PlansError(f"batch {self.batch}, expected at least 1")
        if self.features is not None and (len(self.features) < 2 or min(self.features) < 1):
            raise PlansError(f"features {self.features}, expected two or more positive numbers")


@dataclass(frozen=True, slots=True)
class _Grid:
    """What a configuration is planned for, in plan order.

    Attributes:
        recipe: Its constants.
        spacing_mm: Target voxel size.
        shape: Median shape of the cases at that spacing, unrounded.
        cases, channels, classes: How many; classes include the background.
    """

    recipe: Recipe
    spacing_mm: FloatArray
    shape: FloatArray
    cases: int
    channels: int
    classes: int

    @property
    def voxels(self) -> float:
        """Of the whole dataset, were each case of median shape."""
        return float(np.prod(self.shape)) * self.cases


def plan(fingerprint: Fingerprint, dataset: Dataset, *, recipe: str, overrides: Overrides) -> Plans:
    """Decide everything that the data decide.

    Raises:
        PlansError: The recipe is unknown, or overrides do not fit each other.
        DatasetError: The foreground of a CT channel has no spread to normalise by.
    """
    if recipe not in RECIPES:
        raise PlansError(f"recipe {recipe!r}, expected one of {', '.join(RECIPES)}")
    constants = RECIPES[recipe]
    spacings = np.array(fingerprint.spacings_mm)  # (cases, 3)
    shapes = np.array(fingerprint.shapes)  # (cases, 3)
    target = target_spacing(spacings, shapes, constants)
    if overrides.spacing_mm is not None:
        target = np.array(overrides.spacing_mm)
    transpose = coarsest_first(target)
    resampled = spacings / target * shapes
    median = np.median(np.round(resampled) if constants.round_shapes else resampled, axis=0)
    order = list(transpose)
    grid = _Grid(
        recipe=constants,
        spacing_mm=target[order],
        shape=median[order] if constants.round_shapes else np.round(median[order]),
        cases=len(fingerprint.names),
        channels=len(dataset.channels),
        classes=len(dataset.labels),
    )
    if overrides.patch is not None:
        z, y, x = (overrides.patch[axis] for axis in transpose)
        overrides = replace(overrides, patch=(z, y, x))
    return Plans(
        schema_version=plans_module.SCHEMA_VERSION,
        recipe=recipe,
        dataset=dataset.name,
        channels=dataset.channels,
        labels=dataset.labels,
        orientation="LPS",
        transpose=transpose,
        normalise_first=constants.normalise_first,
        normalisations=_normalisations(fingerprint, dataset),
        resampling=constants.resampling,
        configurations=(*_plan_2d(grid), _plan_3d("3d_fullres", grid, overrides)),
    )


def target_spacing(
    spacings_mm: FloatArray, shapes: npt.NDArray[np.int_], recipe: Recipe
) -> FloatArray:
    """Median voxel size of the cases ``(z, y, x)``.

    Recipes with ``finer_slices`` do not let very anisotropic data lose slices: they take the 10th
    percentile along the coarsest axis, but stay coarser than the other two.
    """
    target = np.percentile(spacings_mm, 50, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    widest = float(target[others].max())
    median_shape = np.median(shapes, axis=0)
    thick = target[worst] > ANISOTROPY * widest
    few = ANISOTROPY * median_shape[worst] < median_shape[others].min()
    if recipe.finer_slices and thick and few:
        tenth = float(np.percentile(spacings_mm[:, worst], 10))
        target[worst] = tenth if tenth >= widest else widest + 1e-5
    return target


def coarsest_first(spacing_mm: Sequence[float] | FloatArray) -> tuple[int, int, int]:
    """The order of axes that puts the coarsest first and keeps the other two in order."""
    worst = int(np.argmax(spacing_mm))
    first, second = (axis for axis in range(3) if axis != worst)
    return worst, first, second


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``plan`` command."""
    add_workspace_argument(parser)
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="msd2018", help="[%(default)s]")
    parser.add_argument(
        "--spacing",
        type=_numbers(float, 3),
        metavar="Z,Y,X",
        help="voxel size in mm, in place of the median's",
    )
    parser.add_argument(
        "--patch", type=_numbers(int, 3), metavar="Z,Y,X", help="voxels of a 3D patch"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="3D patches per training step")
    parser.add_argument(
        "--features",
        type=_numbers(int, None),
        metavar="A,B,...",
        help="features of each level of the 3D network; as many levels as numbers",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=default_workers(),
        help="parallel processes, if the fingerprint has yet to be computed [%(default)s]",
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``plan`` command."""
    dataset = load_dataset(args.workspace)
    overrides = Overrides(args.spacing, args.patch, args.batch, args.features)
    fingerprint = load_or_compute(args.workspace, dataset, args.workers)
    plans = plan(fingerprint, dataset, recipe=args.recipe, overrides=overrides)
    path = args.workspace / PLANS_FILE
    with volume.replacing(path) as temporary:
        temporary.write_text(schema.dumps(plans), encoding="utf-8")
    for configuration in plans.configurations:
        sys.stdout.write(_describe(configuration) + "\n")
    sys.stdout.write(f"-> {path}\n")
    return 0


def _plan_3d(name: str, grid: _Grid, overrides: Overrides) -> Configuration:
    recipe = grid.recipe
    spacing, shape = grid.spacing_mm.tolist(), grid.shape.tolist()
    most = len(overrides.features) - 1 if overrides.features else sys.maxsize
    planner = _PatchPlanner(
        grid, recipe.pooling_3d, recipe.most_features_3d, spacing, shape, most, overrides.features
    )
    patch: tuple[int, ...]
    if overrides.patch is not None:
        patch, topology = overrides.patch, planner.topology(overrides.patch)
    else:
        patch, topology = planner.largest(recipe.budget_3d, recipe.batch_3d)
    _check_patch(patch, topology)
    levels = len(topology.strides)
    if overrides.features is not None and len(overrides.features) != levels:
        raise PlansError(
            f"features {overrides.features} name {len(overrides.features)} levels, but a patch of "
            f"{_times(patch)} pools to {levels}: give {levels} numbers, or a larger patch"
        )
    elements = planner.elements(patch, topology)
    batch = overrides.batch or _batch(
        recipe.budget_3d / elements * recipe.batch_3d, patch, grid, at_least=recipe.batch_3d
    )
    return _configuration(
        name,
        grid,
        patch=patch,
        batch=batch,
        batch_dice=False,  # True for 3d_fullres once it stands beside a cascade
        topology=topology,
        features=planner.features(topology),
    )


def _plan_2d(grid: _Grid) -> tuple[Configuration, ...]:
    """The 2D configuration; none, with a warning, where a batch of slices exceeds the memory."""
    recipe = grid.recipe
    spacing, shape = grid.spacing_mm.tolist()[1:], grid.shape.tolist()[1:]
    planner = _PatchPlanner(
        grid, recipe.pooling_2d, recipe.most_features_2d, spacing, shape, sys.maxsize, None
    )
    if recipe.shrinking == "halve":  # C19 has no smaller patch than the slice
        topology = planner.topology([round(s) for s in shape])
        patch = padded([round(s) for s in shape], topology.divisor)
    else:
        patch, topology = planner.largest(recipe.budget_2d, recipe.batch_2d)
    if len(topology.strides) < 2:
        _log.warning("no 2d configuration: slices of %s are too small to pool", _times(patch))
        return ()
    elements = planner.elements(patch, topology)
    affordable = recipe.budget_2d / elements * recipe.batch_2d
    if affordable < _SMALLEST_BATCH:
        _log.warning("no 2d configuration: slices of %s exceed the memory", _times(patch))
        return ()
    return (
        _configuration(
            "2d",
            grid,
            patch=patch,
            batch=_batch(affordable, patch, grid, at_least=_SMALLEST_BATCH),
            batch_dice=True,
            topology=topology,
            features=planner.features(topology),
        ),
    )


@dataclass(frozen=True, slots=True)
class _PatchPlanner:
    """The search for the largest patch that fits the memory, over two or three axes."""

    grid: _Grid
    pooling: str
    most_features: int
    spacing_mm: Sequence[float]
    shape: Sequence[float]
    most_pools: int
    chosen_features: tuple[int, ...] | None

    def topology(self, patch: Sequence[float]) -> Topology:
        return POOLINGS[self.pooling](patch, self.spacing_mm, self.most_pools)

    def features(self, topology: Topology) -> tuple[int, ...]:
        levels = len(topology.strides)
        if self.chosen_features is not None:
            return self.chosen_features[:levels]
        base = self.grid.recipe.base_features
        return tuple(min(base * 2**level, self.most_features) for level in range(levels))

    def elements(self, patch: Sequence[int], topology: Topology) -> float:
        memory = MEMORIES[self.grid.recipe.memory]
        features = self.features(topology)
        return memory(patch, topology, features, self.grid.channels, self.grid.classes)

    def largest(self, budget: float, budget_batch: int) -> tuple[tuple[int, ...], Topology]:
        """Start isotropic in mm, clip to the median case, shrink until two patches fit."""
        start = first_patch(self.spacing_mm, self.grid.recipe.first_patch)
        clipped = [min(a, b) for a, b in zip(start, self.shape, strict=True)]
        topology = self.topology(clipped)
        patch = padded(clipped, topology.divisor)
        # the budget is for the reference batch, and the smallest batch has to fit in it
        limit = budget * budget_batch / _SMALLEST_BATCH
        while self.elements(patch, topology) > limit:
            smaller = self._shrink(patch, topology)
            topology = self.topology(smaller)
            following = padded(smaller, topology.divisor)
            if math.prod(following) >= math.prod(patch):
                raise PlansError(f"no patch fits the memory: stuck at {_times(patch)}")
            patch = following
        return patch, topology

    def _shrink(self, patch: Sequence[int], topology: Topology) -> list[int]:
        """One step off the axis that covers most of the median case, the last of equals."""
        cover = [p / s for p, s in zip(patch, self.shape, strict=True)]
        axis = max(range(len(cover)), key=lambda a: (cover[a], a))
        smaller = list(patch)
        step = topology.divisor[axis]
        if self.grid.recipe.shrinking == "halve":
            # an axis whose bottleneck edge is at its smallest is cut by half a divisor
            if patch[axis] // step <= SMALLEST_EDGE:
                step = max(1, step // 2)
        else:  # by what the smaller patch has to be a multiple of
            tentative = [p - step * (a == axis) for a, p in enumerate(patch)]
            step = self.topology(tentative).divisor[axis]
        smaller[axis] -= step
        return smaller


def first_patch(spacing_mm: Sequence[float], rule: str) -> list[int]:
    """Patch that is isotropic in mm, before it is clipped to the cases; rules as in ``Recipe``."""
    density = 1 / np.array(spacing_mm)
    if rule == "edge":
        scale = _START_MM / density.min()
    else:
        axes = len(spacing_mm)
        voxels = 256**3 if axes == 3 else 2048**2
        scale = (voxels / float(np.prod(density))) ** (1 / axes)
    return [round(float(value)) for value in density * scale]


def _batch(affordable: float, patch: Sequence[int], grid: _Grid, *, at_least: int) -> int:
    """Whole patches that fit the memory and do not cover too much of the dataset at once."""
    whole = round(affordable) if grid.recipe.round_batch else math.floor(affordable)
    covered = round(_DATASET_SHARE * grid.voxels / math.prod(patch))
    return max(min(max(whole, at_least), covered), _SMALLEST_BATCH)


def _configuration(
    name: str,
    grid: _Grid,
    *,
    patch: Sequence[int],
    batch: int,
    batch_dice: bool,
    topology: Topology,
    features: tuple[int, ...],
) -> Configuration:
    levels = len(features)
    recipe = grid.recipe
    sz, sy, sx = (float(value) for value in grid.spacing_mm)
    mz, my, mx = (round(float(value)) for value in grid.shape)
    return Configuration(
        name=name,
        spacing_mm=(sz, sy, sx),
        median_shape=(mz, my, mx),
        patch=tuple(int(size) for size in patch),
        batch=int(batch),
        batch_dice=batch_dice,
        dummy_2d=len(patch) == 3 and max(patch) / patch[0] > ANISOTROPY,
        previous_stage=None,
        architecture=Architecture(
            features=features,
            kernels=topology.kernels,
            strides=topology.strides,
            encoder_convs=(2,) * levels,
            decoder_convs=(2,) * (levels - 1),
            upsampling_bias=recipe.biases,
            head_bias=recipe.biases,
            deep_supervision=recipe.deep_supervision,
        ),
    )


def _normalisations(fingerprint: Fingerprint, dataset: Dataset) -> tuple[Normalisation, ...]:
    """CT by the foreground of all cases, every other modality image by image."""
    found = []
    masked = fingerprint.relative_size < _MASKED_BELOW
    for channel, foreground in zip(dataset.channels, fingerprint.intensities, strict=True):
        if channel.strip().casefold() == "nonorm":
            found.append(Normalisation("none"))
        elif not is_ct(channel):
            found.append(Normalisation("zscore", masked=masked))
        elif foreground.deviation > 0 and foreground.percentile_00_5 < foreground.percentile_99_5:
            found.append(
                Normalisation(
                    "ct",
                    clip_low=foreground.percentile_00_5,
                    clip_high=foreground.percentile_99_5,
                    mean=foreground.mean,
                    deviation=foreground.deviation,
                )
            )
        else:
            raise DatasetError(
                f"channel {channel}: nearly all foreground voxels are {foreground.median:g}, "
                "expected intensities with a spread"
            )
    return tuple(found)


def _check_patch(patch: Sequence[int], topology: Topology) -> None:
    """Refuse a patch that is too small to pool, or that the topology cannot divide."""
    if len(topology.strides) < 2:
        raise PlansError(
            f"patch {_times(patch)} is too small to pool, expected an edge of at least "
            f"{2 * SMALLEST_EDGE}"
        )
    divisor = topology.divisor
    if any(p % d for p, d in zip(patch, divisor, strict=True)):
        below = [max(d, p // d * d) for p, d in zip(patch, divisor, strict=True)]
        above = padded(patch, divisor)
        raise PlansError(
            f"patch {_times(patch)} is not a multiple of {_times(divisor)}, which its network "
            f"pools by; {_times(below)} or {_times(above)} would fit"
        )


def _times(sizes: Sequence[float]) -> str:
    return "x".join(f"{size:g}" for size in sizes)


def _describe(configuration: Configuration) -> str:
    """A configuration in one line."""
    network = configuration.architecture
    return (
        f"{configuration.name}: spacing {_times([round(s, 4) for s in configuration.spacing_mm])} "
        f"mm, median {_times(configuration.median_shape)}, patch {_times(configuration.patch)}, "
        f"batch {configuration.batch}, {len(network.features)} levels by "
        f"{_times(network.total_stride)}, features {','.join(map(str, network.features))}"
    )


def _numbers(kind: Callable[[str], float], count: int | None) -> Callable[[str], tuple[float, ...]]:
    """An argparse type: numbers separated by commas."""

    def parse(text: str) -> tuple[float, ...]:
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError:
            values = ()
        if not values or (count is not None and len(values) != count):
            what = "numbers" if kind is float else "whole numbers"
            wanted = f"{count} {what}" if count else what
            raise argparse.ArgumentTypeError(f"{text!r}, expected {wanted} separated by commas")
        return values

    return parse
