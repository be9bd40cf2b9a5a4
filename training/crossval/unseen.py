"""What configurations, alone or together, found in the cases that their networks had not seen.

The validation of each fold has left a mask and the probabilities of each of its cases. A mean of
several configurations is decided from their probabilities as an ensemble decides, in the case's own
grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.engine.arrays import Grid
from ichseg.errors import TrainingError
from ichseg.model.plans import Plans
from ichseg.model.rules import ComponentRule
from ichseg.predict import components
from ichseg.predict.dice import dice_of_masks
from ichseg.predict.prepare import Placement, place
from ichseg.predict.restore import restore
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.crossval import merge, probabilities
from training.data import dataset
from training.data.dataset import Case
from training.data.workspace import (
    VALIDATION_FILE,
    fold_of,
    probabilities_file,
    probabilities_folder,
    run_folder,
)
from training.planning.planned import what_is_averaged
from training.scoring.ignored import leave_out
from training.scoring.measures import SMOOTHING

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class UnseenCase:
    """One case with what was found in it.

    Attributes:
        case: The case.
        fold: The fold that validated it.
        masks: The file of its mask for each configuration.
        ignore_label: The value of the reference's voxels that do not count; None without any.
    """

    case: Case
    fold: str
    masks: dict[str, Path]
    ignore_label: int | None = None


def unseen_cases(workspace: Path, configurations: Sequence[str]) -> list[UnseenCase]:
    """The labelled cases that the folds validate, with what each configuration found in them.

    Raises:
        TrainingError: See ``merge.validated_masks``.
    """
    masks = {name: merge.validated_masks(workspace, name) for name in configurations}
    first = masks[configurations[0]]
    data = dataset.load_dataset(workspace)
    return [
        UnseenCase(
            case,
            fold_of(first[case.name].parent.parent),
            {name: found[case.name] for name, found in masks.items()},
            data.ignore_label,
        )
        for case in data.labelled
        if case.name in first
    ]


def without_probabilities(
    workspace: Path,
    cases: Sequence[UnseenCase],
    configurations: Sequence[str],
    *,
    regions: bool,
) -> dict[str, str]:
    """The configurations of which some probabilities are missing, each with one such fold."""
    missing: dict[str, str] = {}
    for name in configurations:
        folds = {
            unseen.fold
            for unseen in cases
            if not probabilities.are_stored(
                probabilities_file(run_folder(workspace, name, unseen.fold), unseen.case.name),
                regions=regions,
            )
        }
        if folds:
            missing[name] = min(folds)
    return missing


def require_probabilities(
    workspace: Path,
    cases: Sequence[UnseenCase],
    configurations: Sequence[str],
    *,
    regions: bool,
) -> None:
    """See that the probabilities of all cases are there.

    Raises:
        TrainingError: Some are missing; names a fold that has to make them again, and how.
    """
    for name, fold in without_probabilities(
        workspace, cases, configurations, regions=regions
    ).items():
        folder = run_folder(workspace, name, fold)
        raise TrainingError(
            f"{probabilities_folder(folder)}: no probabilities of all its cases, which pairs "
            f"are judged by (`select --drop-probabilities` removes them); delete "
            f"{folder / VALIDATION_FILE} and "
            f"run `train {name} --fold {fold}`, which then only validates"
        )


def compare_case(
    unseen: UnseenCase, workspace: Path, planned: Plans, combinations: Sequence[tuple[str, ...]]
) -> tuple[tuple[float, ...], ...]:
    """INSTANCE's Dice of each foreground label or region by each combination of configurations."""
    reference = volume.read(unseen.case.reference)
    channels = _channels(unseen)
    return tuple(
        _dice(
            *leave_out(
                found_labels(unseen, channels, workspace, planned, names),
                reference.voxels,
                unseen.ignore_label,
            ),
            planned,
        )
        for names in combinations
    )


def try_rules(
    unseen: UnseenCase,
    workspace: Path,
    planned: Plans,
    names: tuple[str, ...],
    tried: Sequence[ComponentRule],
) -> tuple[tuple[float, ...], ...]:
    """INSTANCE's Dice of each foreground label with each component rule by itself."""
    reference = volume.read(unseen.case.reference)
    channels = _channels(unseen)
    labels = found_labels(unseen, channels, workspace, planned, names)
    foreground = None
    if any(rule.drop_below_probability for rule in tried):
        foreground = np.zeros_like(labels)
        parts = _parts(unseen, channels, workspace, planned, names)
        restore(parts, planned, average=what_is_averaged(planned), foreground=foreground)
    return tuple(
        _dice(
            *leave_out(
                components.apply_rules(labels, [rule], channels[0].voxel_ml, foreground),
                reference.voxels,
                unseen.ignore_label,
            ),
            planned,
        )
        for rule in tried
    )


def found_labels(
    unseen: UnseenCase,
    channels: Sequence[Volume],
    workspace: Path,
    planned: Plans,
    names: Sequence[str],
) -> Labels:
    """The labels ``(z, y, x)`` that these configurations found together in a case."""
    if len(names) == 1:
        return np.asarray(volume.read(unseen.masks[names[0]]).voxels, np.uint8)
    parts = _parts(unseen, channels, workspace, planned, names)
    return restore(parts, planned, average=what_is_averaged(planned))


def _channels(unseen: UnseenCase) -> list[Volume]:
    return [volume.read(path) for path in unseen.case.images]


def _parts(
    unseen: UnseenCase,
    channels: Sequence[Volume],
    workspace: Path,
    planned: Plans,
    names: Sequence[str],
) -> list[tuple[Grid, Placement]]:
    """The stored probabilities of each configuration, and where they lie in the case."""
    parts: list[tuple[Grid, Placement]] = []
    for name in names:
        path = probabilities_file(run_folder(workspace, name, unseen.fold), unseen.case.name)
        placement = place(channels, planned, planned.configuration(name))
        scores = probabilities.load(path, regions=bool(planned.regions))
        parts.append((scores, placement))
    return parts


def _dice(
    found: npt.NDArray[np.generic], reference: npt.NDArray[np.generic], planned: Plans
) -> tuple[float, ...]:
    """INSTANCE's Dice of each foreground label or region; 1 where neither mask has it."""
    return tuple(
        dice_of_masks(region.mask(found), region.mask(reference), smoothing=SMOOTHING)
        for region in planned.foreground
    )
