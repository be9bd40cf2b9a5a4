"""Folds of the cross-validation: which cases train a network and which validate it.

WORKSPACE/splits.json   the folds; a file that is there wins, whoever wrote it
WORKSPACE/groups.csv    optional: cases that stay together, such as scans of one patient
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichseg.errors import DatasetError
from ichseg.files import replacing
from ichseg.model import strict_json
from training.data.workspace import groups_file, splits_file

SCHEMA_VERSION = 1
GROUPS_HEADER = ["case", "group"]
FOLDS = 5
SEED = 12345  # nnU-Net's, so that results are comparable case by case

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Split:
    """One fold: the names of the cases that train, and of those that validate."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _SplitsFile:
    """The layout of splits.json."""

    schema_version: int
    folds: tuple[Split, ...]

    def __post_init__(self) -> None:
        strict_json.check_schema("splits", self.schema_version, SCHEMA_VERSION)


def make_splits(
    names: Sequence[str],
    groups: Mapping[str, str] | None = None,
    *,
    folds: int = FOLDS,
    seed: int = SEED,
) -> tuple[Split, ...]:
    """Shuffled folds, as scikit-learn's ``KFold(folds, shuffle=True, random_state=seed)``.

    With groups they are as its ``GroupKFold(folds, shuffle=True, random_state=seed)``, the groups
    numbered in the order of their first cases: folds hold equally many groups, not cases, and if
    each case is a group of its own they are those without groups.

    Args:
        names: Names of all cases, in any order: they are sorted first.
        groups: The group of each case; cases of one group go into the same fold.
        folds: How many folds to make; each case validates in exactly one of them.
        seed: Seed of the shuffle.

    Raises:
        DatasetError: There are fewer cases, or groups, than folds.
    """
    ordered = sorted(names)
    group_of = {name: name for name in ordered} if groups is None else groups
    distinct = list(dict.fromkeys(group_of[name] for name in ordered))
    if folds < 2 or len(distinct) < folds:
        what = "cases" if groups is None else f"groups of {len(ordered)} cases"
        raise DatasetError(
            f"{len(distinct)} {what} cannot make {folds} folds, expected at least one a fold"
        )
    shuffled = np.arange(len(distinct))
    np.random.RandomState(seed).shuffle(shuffled)
    splits = []
    for chosen in np.array_split(shuffled, folds):  # the first len % folds parts are one longer
        validation = {distinct[i] for i in chosen}
        splits.append(
            Split(
                train=tuple(n for n in ordered if group_of[n] not in validation),
                validation=tuple(n for n in ordered if group_of[n] in validation),
            )
        )
    return tuple(splits)


def read_groups(path: Path, names: Sequence[str]) -> dict[str, str]:
    """The group of each of these cases, from a CSV table with the header ``case,group``.

    Rows of other cases are passed over, so one table may serve several datasets.

    Raises:
        DatasetError: No such table, another header, a case in two groups or in none.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark
            rows = [
                [cell.strip() for cell in row] for row in csv.reader(file, skipinitialspace=True)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: cannot read as a table ({error})") from error
    if not rows or rows[0] != GROUPS_HEADER:
        raise DatasetError(
            f"{path}: begins with {','.join(rows[0]) if rows else 'nothing'!r}, expected the "
            f"header {','.join(GROUPS_HEADER)!r}"
        )
    groups: dict[str, str] = {}
    for number, row in enumerate(rows[1:], start=2):
        if not any(row):
            continue
        if len(row) != len(GROUPS_HEADER) or not all(row):
            raise DatasetError(f"{path}: row {number} is {','.join(row)!r}, expected case,group")
        case, group = row
        if groups.setdefault(case, group) != group:
            raise DatasetError(
                f"{path}: row {number} puts case {case} into {group}, an earlier one into "
                f"{groups[case]}; expected one group a case"
            )
    missing = sorted(set(names) - groups.keys())
    if missing:
        raise DatasetError(
            f"{path}: {len(missing)} of {len(names)} cases have no group: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    return {name: groups[name] for name in names}


def load_or_make_splits(workspace: Path, names: Sequence[str]) -> tuple[Split, ...]:
    """The folds of ``WORKSPACE/splits.json``; made and written there if there is no such file.

    A file that is there wins, whoever wrote it, so a user's own folds need only be put there; if
    one tears apart a group of ``WORKSPACE/groups.csv``, that is logged.

    Raises:
        DatasetError: A file names unknown cases, a fold validates on what it trains on, a case has
            no group, or there are fewer cases or groups than folds.
        PlansError: The file does not have the schema this code reads.
    """
    splits = find_splits(workspace, names)
    path = splits_file(workspace)
    if not path.exists():
        with replacing(path) as temporary:
            content = strict_json.dumps(_SplitsFile(SCHEMA_VERSION, splits))
            temporary.write_text(content, encoding="utf-8")
    return splits


def find_splits(workspace: Path, names: Sequence[str]) -> tuple[Split, ...]:
    """The folds as ``load_or_make_splits`` gives them, but nothing is written."""
    path, table = splits_file(workspace), groups_file(workspace)
    groups = read_groups(table, names) if table.exists() else None
    if not path.exists():
        return make_splits(names, groups)
    splits = strict_json.load(_SplitsFile, path).folds
    _check(splits, names, path)
    for fold, split in enumerate(splits):
        if groups is None:
            break
        torn = {groups[n] for n in split.train} & {groups[n] for n in split.validation}
        if torn:
            listed = ", ".join(sorted(torn))
            _log.warning("%s: fold %d trains and validates on cases of %s", path, fold, listed)
    return splits


def _check(splits: tuple[Split, ...], names: Sequence[str], path: Path) -> None:
    if not splits:
        raise DatasetError(f"{path}: no folds")
    known = set(names)
    for fold, split in enumerate(splits):
        unknown = sorted({*split.train, *split.validation} - known)
        shared = sorted(set(split.train) & set(split.validation))
        if unknown:
            raise DatasetError(f"{path}: fold {fold} names cases the dataset lacks: {unknown}")
        if shared:
            raise DatasetError(f"{path}: fold {fold} trains on its own validation cases {shared}")
        if not split.train or not split.validation:
            raise DatasetError(f"{path}: fold {fold} has no cases to train or to validate on")
