"""From a fingerprint to plans: voxel size, patch, batch, topology and cascade.

Recipes are tables of constants for one family of functions: ``msd2018`` is the paper as written
(P18), with the constants of the first public nnU-Net code (C19) where the paper is silent;
``nnunetv2`` is nnU-Net v2 (V2), with its residual encoders. ``plan --explain`` says why each number
is what it is.

Here and in plans, sizes and spacings are ``(z, y, x)`` after LPS orientation and after the
transpose that puts the axis of coarsest spacing first.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from ichseg.errors import IchsegError, PlansError
from ichseg.files import replacing
from ichseg.model import plans as plans_module
from ichseg.model import strict_json
from ichseg.model.plans import Configuration, Plans
from ichseg.wording import times
from training.data.dataset import (
    Dataset,
    add_workspace_argument,
    is_ct,
    load_dataset,
)
from training.data.workspace import plans_file, trained_runs
from training.planning import explain
from training.planning.cascade import plan_cascade
from training.planning.explain import Reasons
from training.planning.fingerprint import Fingerprint, load_or_compute
from training.planning.intensities import plan_normalisations
from training.planning.overrides import (
    Overrides,
    add_architecture_argument,
    add_override_arguments,
    overrides_from,
    record,
)
from training.planning.patch import Fit, Grid, fit_patch
from training.planning.recipes import ANISOTROPY, RECIPES, Recipe, find_recipe
from training.planning.spacing import FloatArray, coarsest_first, target_spacing

_MOST_FINER = 100.0  # voxels of a case in its plan, for each in its file

_log = logging.getLogger(__name__)


def decide(
    fingerprint: Fingerprint,
    dataset: Dataset,
    *,
    recipe: str,
    overrides: Overrides,
    architecture: str = "plain",
) -> tuple[Plans, Reasons]:
    """Plans, in which is everything that the data decide, and how they came about.

    Args:
        fingerprint: What the dataset looks like.
        dataset: The dataset: its name, channels and labels.
        recipe: A key of ``RECIPES``.
        overrides: What the user chose, with axes in the data's order.
        architecture: A key of that recipe, such as ``plain``.

    Raises:
        PlansError: Recipe or architecture is unknown, overrides do not fit each other or the data,
            or no patch fits the memory.
        DatasetError: The foreground of a CT channel has no spread to normalise by.
    """
    constants = find_recipe(recipe, architecture, overrides.gpu_memory_gb)
    crop = overrides.crop or "nonzero"
    spacings = np.array(fingerprint.spacings_mm)  # (cases, 3)
    shapes = np.array(_shapes(fingerprint, dataset, crop))  # (cases, 3)
    target = target_spacing(spacings, shapes, constants)
    spacing = overrides.spacing_mm or target.spacing_mm
    transpose = coarsest_first(spacing)
    median = _median_shape(spacings / np.array(spacing) * shapes, constants)
    _refuse_far_finer(spacing, median, shapes)
    grid = Grid(
        recipe=constants,
        spacing_mm=tuple(spacing[axis] for axis in transpose),
        shape=tuple(float(median[axis]) for axis in transpose),
        case_voxels=float(np.prod(median)),
        cases=len(fingerprint.names),
        channels=len(dataset.channels),
        # nnU-Net counts a label to ignore, too, for which there is no score
        classes=1 + (len(dataset.regions) or len(dataset.labels) - 1),
    )
    ordered = overrides
    if overrides.patch is not None:
        z, y, x = (overrides.patch[axis] for axis in transpose)
        ordered = replace(overrides, patch=(z, y, x))
    full = fit_patch(grid, ordered)
    _warn_of_memory(full)
    cascade = plan_cascade(grid, ordered)
    flat = _plan_2d(grid)
    plans = Plans(
        schema_version=plans_module.SCHEMA_VERSION,
        recipe=recipe,
        dataset=dataset.name,
        channels=dataset.channels,
        labels=dataset.labels,
        orientation="LPS",
        transpose=transpose,
        normalise_first=constants.normalise_first,
        normalisations=plan_normalisations(fingerprint, dataset, overrides.ct_clip),
        resampling=constants.resampling,
        configurations=_configurations(flat, full, cascade.lowres, overrides),
        architecture=architecture,
        crop=crop,
        padding=overrides.padding or "zero",
        sources=fingerprint.sources,
        regions=dataset.regions,
        region_labels=dataset.region_labels,
    )
    if overrides != Overrides():
        chosen = record(
            overrides,
            _automatic(fingerprint, dataset, recipe, architecture),
            find_recipe(recipe, architecture).gpu_memory_gb,
        )
        plans = replace(plans, overrides=chosen)
    return plans, Reasons(fingerprint, target, flat, full, cascade)


def _refuse_far_finer(
    spacing_mm: tuple[float, ...], median: FloatArray, shapes: FloatArray
) -> None:
    """Refuse voxels so small that nobody can mean them: no case would fit into memory.

    Raises:
        PlansError: The median case would have many times the voxels of its file.
    """
    finer = float(np.prod(median) / np.median(np.prod(shapes, axis=1)))
    if finer > _MOST_FINER:
        raise PlansError(
            f"spacing {times(spacing_mm)} mm makes the median case {times(np.rint(median))} "
            f"voxels, {finer:.0f} times those of its file; expected the sizes of voxels in mm"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``plan`` command."""
    add_workspace_argument(parser)
    parser.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default="msd2018",
        help="whose rules decide: those of the paper that this project implements, or those of "
        "nnU-Net v2 [%(default)s]",
    )
    add_architecture_argument(parser, "plain")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="print what would be planned, and why each number is what it is; nothing is written",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="replace the plans although networks have been trained by them",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="parallel processes, if the fingerprint has yet to be computed [one a core, as far as "
        "memory suffices]",
    )
    add_override_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run the ``plan`` command."""
    dataset = load_dataset(args.workspace)
    overrides = overrides_from(args)
    # refuse before the fingerprint takes its minutes
    find_recipe(args.recipe, args.architecture)
    heads = overrides.crop == "head"
    if heads:
        _require_ct(dataset)
    fingerprint = load_or_compute(
        args.workspace, dataset, args.workers, heads=heads, keep=not args.explain
    )
    plans, reasons = decide(
        fingerprint,
        dataset,
        recipe=args.recipe,
        overrides=overrides,
        architecture=args.architecture,
    )
    path = plans_file(args.workspace)
    if not args.explain:
        if not args.restart:
            refuse_trained(args.workspace, plans)
        with replacing(path) as temporary:
            temporary.write_text(strict_json.dumps(plans), encoding="utf-8")
    for configuration in plans.configurations:
        sys.stdout.write(_describe(configuration) + "\n")
    for override in plans.overrides:
        automatic = override.automatic or "nothing fits"
        sys.stdout.write(f"chosen: {override.name} {override.chosen} (automatic: {automatic})\n")
    if args.explain:
        sys.stdout.write("\n" + explain.explain(plans, reasons))
        sys.stdout.write("\nnothing was written; without --explain, these become the plans\n")
    else:
        sys.stdout.write(f"-> {path}\n")
    return 0


def refuse_trained(workspace: Path, plans: Plans) -> None:
    """Refuse to replace plans by others while there are networks that were trained by them.

    Raises:
        PlansError: The workspace has trained runs, and its plans are not these.
    """
    path = plans_file(workspace)
    trained = trained_runs(workspace)
    if not trained or not path.exists():
        return
    if replace(plans_module.load(path), sources=plans.sources) != plans:
        raise PlansError(
            f"{path}: {trained[0]} was trained by these plans, and the new ones are different; "
            "plan in another workspace, or give --restart to replace them"
        )


def _require_ct(dataset: Dataset) -> None:
    """Refuse to look for heads in anything but HU."""
    if not all(is_ct(channel) for channel in dataset.channels):
        raise PlansError(
            f"crop head is found in HU, but not every channel is CT: {', '.join(dataset.channels)}"
        )


def _shapes(
    fingerprint: Fingerprint, dataset: Dataset, crop: str
) -> tuple[tuple[int, int, int], ...]:
    """Shapes of the cases after the crop; a cut to the head must not lose foreground."""
    if crop == "nonzero":
        return fingerprint.shapes
    _require_ct(dataset)
    if not fingerprint.head_shapes:
        raise PlansError("crop head: the fingerprint does not say where heads are; compute it anew")
    lost = [
        f"{name} ({voxels} voxels)"
        for name, voxels in zip(fingerprint.names, fingerprint.beyond_head, strict=True)
        if voxels
    ]
    if lost:
        raise PlansError(
            f"crop head: {len(lost)} of {len(fingerprint.names)} cases have foreground outside of "
            f"the head that is found, which no network would see: {', '.join(lost[:5])}"
        )
    return fingerprint.head_shapes


def _median_shape(shapes: FloatArray, recipe: Recipe) -> FloatArray:
    """The median of the cases' shapes ``(cases, 3)``, in whole voxels."""
    if recipe.round_shapes:
        return np.asarray(np.median(np.round(shapes), axis=0))
    return np.asarray(np.round(np.median(shapes, axis=0)))


def _automatic(
    fingerprint: Fingerprint, dataset: Dataset, recipe: str, architecture: str
) -> Plans | None:
    """The plans without any override, if there are any."""
    try:
        return decide(
            fingerprint, dataset, recipe=recipe, overrides=Overrides(), architecture=architecture
        )[0]
    except IchsegError:  # what was chosen may be what makes the data usable
        return None


def _plan_2d(grid: Grid) -> Fit | None:
    """The 2D configuration, if there is a patch for one."""
    try:
        return fit_patch(grid.in_plane, Overrides())
    except PlansError as error:
        _log.warning("no 2d configuration: %s", error)
        return None


def _warn_of_memory(fit: Fit) -> None:
    """Say so if what was chosen exceeds the memory that was planned for."""
    if fit.batch > round(fit.affordable):
        _log.warning(
            "batch %d of patch %s needs %.1f times the %g GB that the recipe plans for",
            fit.batch,
            times(fit.patch),
            fit.batch / fit.affordable,
            fit.grid.recipe.gpu_memory_gb,
        )


def _configurations(
    flat: Fit | None, full: Fit, lowres: Fit | None, overrides: Overrides
) -> tuple[Configuration, ...]:
    """All configurations; where there is a cascade, its second stage is 3d_fullres once more."""
    found = []
    if flat is not None:
        # a slice has no spacing of its own along z: that of 3d_fullres stays unused
        found.append(_configuration("2d", flat, full.grid, batch_dice=True))
    chosen = overrides.batch_dice
    over_batch = chosen if chosen is not None else lowres is not None
    volumes = [_configuration("3d_fullres", full, full.grid, batch_dice=over_batch)]
    if lowres is not None:
        volumes.append(_configuration("3d_lowres", lowres, lowres.grid, batch_dice=bool(chosen)))
        volumes.append(replace(volumes[0], name="3d_cascade_fullres", previous_stage="3d_lowres"))
    if (heads := overrides.deep_supervision) is not None:
        volumes = [
            replace(c, architecture=replace(c.architecture, deep_supervision=heads))
            for c in volumes
        ]
    return (*found, *volumes)


def _configuration(name: str, fit: Fit, grid: Grid, *, batch_dice: bool) -> Configuration:
    sz, sy, sx = grid.spacing_mm
    mz, my, mx = (round(size) for size in grid.shape)
    return Configuration(
        name=name,
        spacing_mm=(sz, sy, sx),
        median_shape=(mz, my, mx),
        patch=fit.patch,
        batch=fit.batch,
        batch_dice=batch_dice,
        dummy_2d=len(fit.patch) == 3 and max(fit.patch) / fit.patch[0] > ANISOTROPY,
        previous_stage=None,
        architecture=fit.network,
    )


def _describe(configuration: Configuration) -> str:
    """A configuration in one line."""
    network = configuration.architecture
    return (
        f"{configuration.name}: spacing {times([round(s, 4) for s in configuration.spacing_mm])} "
        f"mm, median {times(configuration.median_shape)}, patch {times(configuration.patch)}, "
        f"batch {configuration.batch}, {len(network.features)} levels by "
        f"{times(network.total_stride)}, features {','.join(map(str, network.features))}"
    )
