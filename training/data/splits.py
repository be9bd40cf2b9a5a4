"""Folds of the cross-validation: which cases train a network and which validate it.

WORKSPACE/splits.json   the folds, and what they were made from; a file that a user wrote wins
WORKSPACE/groups.csv    optional: cases that stay together, such as scans of one patient
"""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichseg.errors import DatasetError
from ichseg.files import replacing
from ichseg.model import strict_json
from ichseg.wording import repeated
from training.data.workspace import ALL_FOLD, fold_of, groups_file, splits_file, trained_runs

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
class _Origin:
    """What folds were made from.

    Attributes:
        cases: Digest of the names of the cases.
        groups: Digest of the group of each case; empty without a table of groups.
        folds: Digest of the folds, by which one sees whether a user has altered them.
    """

    cases: str
    groups: str
    folds: str


@dataclass(frozen=True, slots=True)
class _SplitsFile:
    """The layout of splits.json; ``made_from`` is absent where a user wrote it."""

    schema_version: int
    folds: tuple[Split, ...]
    made_from: _Origin | None = strict_json.optional(None)  # noqa: RUF009 - it is a field

    def __post_init__(self) -> None:
        strict_json.check_schema("splits", self.schema_version, SCHEMA_VERSION)


def make_splits(names: Sequence[str], groups: Mapping[str, str] | None = None) -> tuple[Split, ...]:
    """Shuffled folds, as scikit-learn's ``KFold(FOLDS, shuffle=True, random_state=SEED)``.

    With groups they are as its ``GroupKFold(FOLDS, shuffle=True, random_state=SEED)``, the groups
    numbered in the order of their first cases: folds hold equally many groups, not cases, and if
    each case is a group of its own they are those without groups.

    Args:
        names: Names of all cases, in any order: they are sorted first.
        groups: The group of each case; cases of one group go into the same fold.

    Raises:
        DatasetError: There are fewer cases, or groups, than folds.
    """
    ordered = sorted(names)
    group_of = {name: name for name in ordered} if groups is None else groups
    distinct = list(dict.fromkeys(group_of[name] for name in ordered))
    if len(distinct) < FOLDS:
        what = "cases" if groups is None else f"groups of {len(ordered)} cases"
        raise DatasetError(
            f"{len(distinct)} {what} cannot make {FOLDS} folds, expected at least one a fold"
        )
    shuffled = np.arange(len(distinct))
    np.random.RandomState(SEED).shuffle(shuffled)
    splits = []
    for chosen in np.array_split(shuffled, FOLDS):  # the first len % FOLDS parts are one longer
        validation = {distinct[i] for i in chosen}
        splits.append(
            Split(
                train=tuple(n for n in ordered if group_of[n] not in validation),
                validation=tuple(n for n in ordered if group_of[n] in validation),
            )
        )
    return tuple(splits)


def read_table(path: Path, header: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV table that somebody wrote, each with its number, the header's being 1.

    Spaces around a cell are dropped; rows without any text are passed over.

    Raises:
        DatasetError: No such table, another header, or a row with another number of cells or an
            empty one.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark
            rows = [
                [cell.strip() for cell in row] for row in csv.reader(file, skipinitialspace=True)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{path}: cannot read as a table ({reason})") from error
    if not rows or rows[0] != list(header):
        raise DatasetError(
            f"{path}: begins with {','.join(rows[0]) if rows else 'nothing'!r}, expected the "
            f"header {','.join(header)!r}"
        )
    for number, row in enumerate(rows[1:], start=2):
        if not any(row):
            continue
        if len(row) != len(header) or not all(row):
            raise DatasetError(
                f"{path}: row {number} is {','.join(row)!r}, expected {','.join(header)}"
            )
        yield number, row


def read_groups(path: Path, names: Sequence[str]) -> dict[str, str]:
    """The group of each of these cases, from a CSV table with the header ``case,group``.

    Rows of other cases are passed over, so one table may serve several datasets.

    Raises:
        DatasetError: No such table, another header, a case in two groups or in none.
    """
    groups: dict[str, str] = {}
    for number, (case, group) in read_table(path, GROUPS_HEADER):
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

    A file that a user wrote wins, so a user's own folds need only be put there; if one tears apart
    a group of ``WORKSPACE/groups.csv``, that is logged. Folds that were made here are made anew
    when cases or groups have changed, but never once a network has been trained by them.

    Args:
        workspace: Where splits, groups and runs lie.
        names: Names of all labelled cases.

    Raises:
        DatasetError: A file names unknown cases, a fold validates on what it trains on, a case has
            no group, there are fewer cases or groups than folds, or networks have been trained by
            folds that are gone or that no longer fit the groups.
        PlansError: The file does not have the schema this code reads.
    """
    found = _find(workspace, names)
    path = splits_file(workspace)
    if not path.exists() or strict_json.load(_SplitsFile, path) != found:
        with replacing(path) as temporary:
            temporary.write_text(strict_json.dumps(found), encoding="utf-8")
    return found.folds


def find_splits(workspace: Path, names: Sequence[str]) -> tuple[Split, ...]:
    """The folds as ``load_or_make_splits`` gives them, but nothing is written."""
    return _find(workspace, names).folds


def digest_names(names: Iterable[str]) -> str:
    """A digest of the names of some cases, by which they are known without being named."""
    return _digest(sorted(names))


def fold_key(configuration: str, fold: str) -> str:
    """Where a bundle's provenance says of a network on which cases it was trained."""
    return f"{configuration} fold {fold}"


def _find(workspace: Path, names: Sequence[str]) -> _SplitsFile:
    path, table = splits_file(workspace), groups_file(workspace)
    groups = read_groups(table, names) if table.exists() else None
    trained = _trained(workspace)
    if not path.exists():
        if trained is not None:
            raise DatasetError(
                f"{path}: missing, but {trained} was trained by its folds, and new ones would "
                "validate networks on cases that they were trained on; put the file back, or "
                "begin anew in another workspace"
            )
        return _make(names, groups)
    found = strict_json.load(_SplitsFile, path)
    by_user = found.made_from is None or found.made_from.folds != _digest_folds(found.folds)
    outdated = not by_user and found.made_from != _origin(names, groups, found.folds)
    if outdated and trained is None:
        _log.warning("%s: cases or groups have changed since; the folds are made anew", path)
        return _make(names, groups)
    _check(found.folds, names, path)
    torn = [] if groups is None else _torn(found.folds, groups)
    if outdated and torn:
        raise DatasetError(
            f"{path}: made without the groups that {table} has now, and {trained} was trained by "
            f"it: {torn[0]}; take the table away, or begin anew in another workspace"
        )
    for text in torn:
        _log.warning("%s: %s", path, text)
    if several := repeated(name for split in found.folds for name in split.validation):
        _log.warning(
            "%s: several folds validate on %d cases, such as %s; `cross-validate` will refuse "
            "them, as it scores each case once",
            path,
            len(several),
            several[0],
        )
    missing = set(names).difference(*(split.validation for split in found.folds))
    if outdated and missing:
        _log.warning(
            "%s: %d cases came after the folds were made, such as %s; none trains or validates "
            "on them",
            path,
            len(missing),
            min(missing),
        )
    return found


def _make(names: Sequence[str], groups: Mapping[str, str] | None) -> _SplitsFile:
    folds = make_splits(names, groups)
    return _SplitsFile(SCHEMA_VERSION, folds, _origin(names, groups, folds))


def _origin(
    names: Sequence[str], groups: Mapping[str, str] | None, folds: Sequence[Split]
) -> _Origin:
    ordered = sorted(names)
    grouped = "" if groups is None else _digest(f"{name},{groups[name]}" for name in ordered)
    return _Origin(digest_names(names), grouped, _digest_folds(folds))


def _digest_folds(folds: Sequence[Split]) -> str:
    return _digest(strict_json.dumps(split) for split in folds)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _trained(workspace: Path) -> Path | None:
    """The run of a fold that has been trained, if there is any."""
    return next((run for run in trained_runs(workspace) if fold_of(run) != ALL_FOLD), None)


def _torn(folds: Sequence[Split], groups: Mapping[str, str]) -> list[str]:
    """The folds that train and validate on cases of one group, in words."""
    found = []
    for fold, split in enumerate(folds):
        torn = {groups[n] for n in split.train} & {groups[n] for n in split.validation}
        if torn:
            listed = ", ".join(sorted(torn))
            found.append(f"fold {fold} trains and validates on cases of {listed}")
    return found


def _check(splits: tuple[Split, ...], names: Sequence[str], path: Path) -> None:
    if not splits:
        raise DatasetError(f"{path}: no folds")
    known = set(names)
    for fold, split in enumerate(splits):
        for part, cases in (("trains", split.train), ("validates", split.validation)):
            if twice := repeated(cases):
                raise DatasetError(f"{path}: fold {fold} {part} on {twice} more than once")
        unknown = sorted({*split.train, *split.validation} - known)
        shared = sorted(set(split.train) & set(split.validation))
        if unknown:
            raise DatasetError(f"{path}: fold {fold} names cases the dataset lacks: {unknown}")
        if shared:
            raise DatasetError(f"{path}: fold {fold} trains on its own validation cases {shared}")
        if not split.train or not split.validation:
            raise DatasetError(f"{path}: fold {fold} has no cases to train or to validate on")
