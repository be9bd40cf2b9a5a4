"""From a fingerprint to plans: voxel size, patch, batch, topology and cascade.

Recipes are tables of constants for one family of functions: ``msd2018`` is the paper as written
(P18), with the constants of the first public nnU-Net code (C19) where the paper is silent;
``nnunetv2`` is nnU-Net v2 (V2), with its presets of a residual encoder. ``plan --explain`` says why
each number is what it is.

Here and in plans, sizes and spacings are ``(z, y, x)`` after LPS orientation and after the
transpose that puts the axis of coarsest spacing first.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ichseg.errors import DatasetError, IchsegError, PlansError
from ichseg.files import replacing
from ichseg.model import plans as plans_module
from ichseg.model import strict_json
from ichseg.model.plans import Configuration, Normalisation, Plans
from ichseg.wording import times
from training.data.dataset import (
    Dataset,
    add_workspace_argument,
    default_workers,
    is_ct,
    load_dataset,
)
from training.data.workspace import plans_file
from training.planning import explain
from training.planning.cascade import plan_cascade
from training.planning.explain import Reasons
from training.planning.fingerprint import Fingerprint, load_or_compute
from training.planning.overrides import Overrides, record
from training.planning.patch import Fit, Grid, fit_patch
from training.planning.recipes import ANISOTROPY, RECIPES, find_recipe
from training.planning.spacing import coarsest_first, target_spacing

_MASKED_BELOW = 0.75  # relative size after the crop below which z-scores keep to the nonzero region

_log = logging.getLogger(__name__)


def plan(
    fingerprint: Fingerprint,
    dataset: Dataset,
    *,
    recipe: str,
    overrides: Overrides,
    preset: str = "plain",
) -> Plans:
    """Decide everything that the data decide; arguments and errors as for ``decide``."""
    return decide(fingerprint, dataset, recipe=recipe, overrides=overrides, preset=preset)[0]


def decide(
    fingerprint: Fingerprint,
    dataset: Dataset,
    *,
    recipe: str,
    overrides: Overrides,
    preset: str = "plain",
) -> tuple[Plans, Reasons]:
    """Plans, and how they came about.

    Args:
        fingerprint: Of the dataset.
        dataset: Its name, channels and labels.
        recipe: A key of ``RECIPES``.
        overrides: What the user chose, in the data's order of axes.
        preset: A key of that recipe.

    Raises:
        PlansError: Recipe or preset are unknown, overrides do not fit each other or the data, or
            no patch fits the memory.
        DatasetError: The foreground of a CT channel has no spread to normalise by.
    """
    constants = find_recipe(recipe, preset, overrides.gpu_memory_gb)
    crop = overrides.crop or "nonzero"
    spacings = np.array(fingerprint.spacings_mm)  # (cases, 3)
    shapes = np.array(_shapes(fingerprint, dataset, crop))  # (cases, 3)
    target = target_spacing(spacings, shapes, constants)
    spacing = overrides.spacing_mm or target.spacing_mm
    transpose = coarsest_first(spacing)
    resampled = spacings / np.array(spacing) * shapes
    if constants.round_shapes:
        median = np.median(np.round(resampled), axis=0)
    else:
        median = np.round(np.median(resampled, axis=0))
    grid = Grid(
        recipe=constants,
        spacing_mm=tuple(spacing[axis] for axis in transpose),
        shape=tuple(float(median[axis]) for axis in transpose),
        case_voxels=float(np.prod(median)),
        cases=len(fingerprint.names),
        channels=len(dataset.channels),
        classes=len(dataset.labels),
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
        normalisations=_normalisations(fingerprint, dataset, overrides.ct_clip),
        resampling=constants.resampling,
        configurations=_configurations(flat, full, cascade.lowres, overrides),
        preset=preset,
        crop=crop,
    )
    if overrides != Overrides():
        chosen = record(
            overrides,
            _automatic(fingerprint, dataset, recipe, preset),
            find_recipe(recipe, preset).gpu_memory_gb,
        )
        plans = replace(plans, overrides=chosen)
    return plans, Reasons(fingerprint, target, flat, full, cascade)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``plan`` command."""
    add_workspace_argument(parser)
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="msd2018", help="[%(default)s]")
    parser.add_argument(
        "--architecture",
        dest="preset",
        choices=plans_module.PRESETS,
        default="plain",
        help="network to plan for; the resenc ones (residual encoder, for GPUs of 8, 24 and 40 GB) "
        "belong to recipe nnunetv2 [%(default)s]",
    )
    parser.add_argument(
        "--explain", action="store_true", help="print why each number is what it is"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=default_workers(),
        help="parallel processes, if the fingerprint has yet to be computed [%(default)s]",
    )
    add_override_arguments(parser)


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of ``Overrides``."""
    chosen = parser.add_argument_group(
        "in place of what the planner finds", "Recorded in the plans, beside what it finds."
    )
    chosen.add_argument(
        "--spacing", type=_numbers(float, 3), metavar="Z,Y,X", help="voxel size in mm"
    )
    chosen.add_argument(
        "--patch", type=_numbers(int, 3), metavar="Z,Y,X", help="voxels of a 3D patch"
    )
    chosen.add_argument("--batch", type=int, metavar="N", help="3D patches per training step")
    chosen.add_argument(
        "--features",
        type=_numbers(int, None),
        metavar="A,B,...",
        help="features of each level of the 3D network; as many levels as numbers",
    )
    chosen.add_argument(
        "--gpu-memory-gb", type=float, metavar="GB", help="memory of the GPU to plan for"
    )
    chosen.add_argument(
        "--ct-clip",
        type=_numbers(float, 2),
        metavar="LOW,HIGH",
        help="limits in HU that CT is clipped to; write --ct-clip=-20,120 where one is negative",
    )
    chosen.add_argument(
        "--batch-dice",
        action=argparse.BooleanOptionalAction,
        help="3D Dice loss over the batch, or over each patch",
    )
    chosen.add_argument(
        "--deep-supervision",
        action=argparse.BooleanOptionalAction,
        help="train the 3D network with a head at every decoder level, or with one",
    )
    chosen.add_argument(
        "--crop",
        choices=plans_module.CROPS,
        help="what is cut away from each case, in training and in inference: borders of zeros, or "
        "also the air around the head",
    )


def overrides_from(args: argparse.Namespace) -> Overrides:
    """What those flags say.

    Raises:
        PlansError: A value is out of range.
    """
    return Overrides(
        spacing_mm=args.spacing,
        patch=args.patch,
        batch=args.batch,
        features=args.features,
        gpu_memory_gb=args.gpu_memory_gb,
        ct_clip=args.ct_clip,
        batch_dice=args.batch_dice,
        deep_supervision=args.deep_supervision,
        crop=args.crop,
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``plan`` command."""
    dataset = load_dataset(args.workspace)
    overrides = overrides_from(args)
    # refuse before the fingerprint takes its minutes
    find_recipe(args.recipe, args.preset)
    heads = overrides.crop == "head"
    if heads:
        _require_ct(dataset)
    fingerprint = load_or_compute(args.workspace, dataset, args.workers, heads=heads)
    plans, reasons = decide(
        fingerprint, dataset, recipe=args.recipe, overrides=overrides, preset=args.preset
    )
    path = plans_file(args.workspace)
    with replacing(path) as temporary:
        temporary.write_text(strict_json.dumps(plans), encoding="utf-8")
    for configuration in plans.configurations:
        sys.stdout.write(_describe(configuration) + "\n")
    for override in plans.overrides:
        automatic = override.automatic or "nothing fits"
        sys.stdout.write(f"chosen: {override.name} {override.chosen} (automatic: {automatic})\n")
    if args.explain:
        sys.stdout.write("\n" + explain.explain(plans, reasons))
    sys.stdout.write(f"-> {path}\n")
    return 0


def _require_ct(dataset: Dataset) -> None:
    """Refuse to look for heads in anything but HU."""
    if not all(is_ct(channel) for channel in dataset.channels):
        raise PlansError(
            f"crop head is found in HU, but not every channel is CT: {', '.join(dataset.channels)}"
        )


def _shapes(
    fingerprint: Fingerprint, dataset: Dataset, crop: str
) -> tuple[tuple[int, int, int], ...]:
    """Of the cases after the crop; refuses one that loses foreground to the cut to the head."""
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


def _automatic(
    fingerprint: Fingerprint, dataset: Dataset, recipe: str, preset: str
) -> Plans | None:
    """The plans without any override, if there are any."""
    try:
        return plan(fingerprint, dataset, recipe=recipe, overrides=Overrides(), preset=preset)
    except IchsegError:  # what was chosen may be what makes the data usable
        return None


def _plan_2d(grid: Grid) -> Fit | None:
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


def _normalisations(
    fingerprint: Fingerprint, dataset: Dataset, ct_clip: tuple[float, float] | None
) -> tuple[Normalisation, ...]:
    """CT by the foreground of all cases, every other modality image by image."""
    if ct_clip is not None and not any(is_ct(channel) for channel in dataset.channels):
        raise PlansError(
            f"CT clip {times(ct_clip)} HU, but no channel is CT: {', '.join(dataset.channels)}"
        )
    found = []
    masked = fingerprint.relative_size < _MASKED_BELOW
    for channel, foreground in zip(dataset.channels, fingerprint.intensities, strict=True):
        low, high = ct_clip or (foreground.percentile_00_5, foreground.percentile_99_5)
        if channel.strip().casefold() == "nonorm":
            found.append(Normalisation("none"))
        elif not is_ct(channel):
            found.append(Normalisation("zscore", masked=masked))
        elif not (foreground.deviation > 0 and low < high):
            raise DatasetError(
                f"channel {channel}: nearly all foreground voxels are {foreground.median:g}, "
                "expected intensities with a spread"
            )
        elif ct_clip is not None and not low < foreground.mean < high:
            raise PlansError(
                f"CT clip {low:g} to {high:g} HU leaves out the foreground of channel {channel}, "
                f"whose mean is {foreground.mean:.1f} HU"
            )
        else:
            found.append(Normalisation("ct", low, high, foreground.mean, foreground.deviation))
    return tuple(found)


def _describe(configuration: Configuration) -> str:
    """A configuration in one line."""
    network = configuration.architecture
    return (
        f"{configuration.name}: spacing {times([round(s, 4) for s in configuration.spacing_mm])} "
        f"mm, median {times(configuration.median_shape)}, patch {times(configuration.patch)}, "
        f"batch {configuration.batch}, {len(network.features)} levels by "
        f"{times(network.total_stride)}, features {','.join(map(str, network.features))}"
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
