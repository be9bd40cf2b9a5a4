"""What the validation of a fold has found so far: its ``validation.json``.

Where several processes validate together, each has a record of its own cases beside it, which the
leading one takes in at the end, or when the same command goes on.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ichseg.errors import PlansError
from ichseg.files import replacing
from ichseg.model import strict_json
from training.data.workspace import (
    VALIDATION_FILE,
    masks_folder,
    probabilities_folder,
    validation_part,
)
from training.fit.fold_run import FoldRun

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Validation:
    """The layout of ``validation.json``.

    Attributes:
        schema_version: The version of this layout.
        weights: The sha256 of the network's tensors.
        mirrored: Whether mirrorings were averaged.
        padding: What the network saw beyond small cases, see ``Plans.padding``.
        complete: Whether all of the fold's cases have been segmented.
        mean_dice: The mean Dice of each label over the cases so far that have it; None where no
            case has it.
        dice: The Dice of each label in each case; None where neither mask has the label.
    """

    schema_version: int
    weights: str
    mirrored: bool
    complete: bool
    mean_dice: Mapping[str, float | None]
    dice: Mapping[str, Mapping[str, float | None]]
    padding: str = strict_json.optional("zero")

    @property
    def made_by(self) -> tuple[str, bool, str]:
        """What the masks depend on beside the cases."""
        return self.weights, self.mirrored, self.padding

    def __post_init__(self) -> None:
        strict_json.check_schema("validation", self.schema_version, SCHEMA_VERSION)


def continued(run: FoldRun, weights: str) -> Validation:
    """The record of what these weights have done so far, in whichever process.

    Where there is another one, masks of other weights are removed.

    Args:
        run: The fold.
        weights: The sha256 of the network's tensors.
    """
    fresh = Validation(
        SCHEMA_VERSION,
        weights,
        bool(run.validation_mirror_axes),
        complete=False,
        mean_dice={},
        dice={},
        padding=run.plans.padding,
    )
    dice: dict[str, Mapping[str, float | None]] = {}
    for path, found in _records(run):
        if found.made_by == fresh.made_by:
            dice |= found.dice
        elif run.group.leads:
            path.unlink()
    if dice:
        return extended(run, fresh, dice)
    if run.group.leads:
        for path in _files(run):  # of an earlier version, or damaged
            path.unlink(missing_ok=True)
        for mask in (masks_folder(run.folder)).glob("*.nii.gz"):
            mask.unlink()
        shutil.rmtree(probabilities_folder(run.folder), ignore_errors=True)
    return fresh


def extended(
    run: FoldRun, record: Validation, scores: Mapping[str, Mapping[str, float | None]]
) -> Validation:
    """The record with the scores of more cases, in the order of the fold's."""
    known = {**record.dice, **scores}
    cases = {name: known[name] for name in run.spec.validation if name in known}
    names = [region.name for region in run.plans.foreground]
    means = {name: _mean([s[name] for s in cases.values()]) for name in names}
    return dataclasses.replace(
        record, complete=len(cases) == len(run.spec.validation), mean_dice=means, dice=cases
    )


def write(run: FoldRun, record: Validation) -> None:
    """Write the record of this process."""
    name = VALIDATION_FILE if run.group.leads else validation_part(run.group.rank)
    with replacing(run.folder / name) as temporary:
        temporary.write_text(strict_json.dumps(record), encoding="utf-8")


def join(run: FoldRun, record: Validation) -> Validation:
    """Take in what all processes have recorded, which are done; only the leading one does that."""
    for _, found in _records(run):
        if found.made_by == record.made_by:
            record = extended(run, record, found.dice)
    write(run, record)
    for path in _files(run):
        if path.name != VALIDATION_FILE:
            path.unlink()
    return record


def _files(run: FoldRun) -> list[Path]:
    """The records of all processes, of however many there were."""
    return sorted({run.folder / VALIDATION_FILE, *run.folder.glob(validation_part("*"))})


def _records(run: FoldRun) -> Iterator[tuple[Path, Validation]]:
    """Those that can be read."""
    for path in _files(run):
        try:
            yield path, strict_json.load(Validation, path)
        except PlansError:  # none yet, or of another version
            continue


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None
