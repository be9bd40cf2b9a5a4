"""Folds of the cross-validation: which cases train a network and which validate it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichseg import schema, volume
from ichseg.errors import DatasetError

SCHEMA_VERSION = 1
SPLITS_FILE = "splits.json"
FOLDS = 5
SEED = 12345  # nnU-Net's, so that results are comparable case by case


@dataclass(frozen=True, slots=True)
class Split:
    """Names of the cases of one fold."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _SplitsFile:
    """The layout of splits.json."""

    schema_version: int
    folds: tuple[Split, ...]

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"splits schema {self.schema_version}, this code reads {SCHEMA_VERSION}"
            )


def make_splits(names: Sequence[str], *, folds: int = FOLDS, seed: int = SEED) -> tuple[Split, ...]:
    """Shuffled folds, as scikit-learn's ``KFold(folds, shuffle=True, random_state=seed)``.

    Args:
        names: Names of all cases, in any order: they are sorted first.
        folds: How many; each case validates in exactly one.
        seed: Seed of the shuffle.

    Raises:
        DatasetError: There are fewer cases than folds.
    """
    if folds < 2 or len(names) < folds:
        raise DatasetError(
            f"{len(names)} cases cannot make {folds} folds, expected at least one case a fold"
        )
    ordered = sorted(names)
    shuffled = np.arange(len(ordered))
    np.random.RandomState(seed).shuffle(shuffled)
    splits = []
    for chosen in np.array_split(shuffled, folds):  # the first len % folds parts are one longer
        validation = set(chosen.tolist())
        splits.append(
            Split(
                train=tuple(n for i, n in enumerate(ordered) if i not in validation),
                validation=tuple(n for i, n in enumerate(ordered) if i in validation),
            )
        )
    return tuple(splits)


def load_or_make_splits(workspace: Path, names: Sequence[str]) -> tuple[Split, ...]:
    """The folds of ``WORKSPACE/splits.json``; made and written there if there is no such file.

    A file that is there wins, whoever wrote it, so a user's own folds need only be put there.

    Raises:
        DatasetError: The file names unknown cases, or a fold validates on what it trains on, or
            there are fewer cases than folds.
        PlansError: The file does not have the schema this code reads.
    """
    path = workspace / SPLITS_FILE
    if path.exists():
        splits = schema.load(_SplitsFile, path).folds
        _check(splits, names, path)
        return splits
    splits = make_splits(names)
    with volume.replacing(path) as temporary:
        temporary.write_text(schema.dumps(_SplitsFile(SCHEMA_VERSION, splits)), encoding="utf-8")
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
