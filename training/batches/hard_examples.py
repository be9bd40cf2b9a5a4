"""Where a network errs on the cases that it trains on: whole lesions, missed or made up.

``python -m training hard-examples`` writes the table; ``train --hard-fraction`` draws patches from
it (hard example mining, after arXiv:1604.03540). nnU-Net has nothing of the kind.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichseg import files
from ichseg.errors import TrainingError
from ichseg.wording import times

KINDS = ("false", "missed")
_COLUMNS = ["case", "kind", "z", "y", "x", "size_z", "size_y", "size_x", "volume_ml"]


@dataclass(frozen=True, slots=True)
class HardExample:
    """A lesion that the network missed, or that it found where there is none.

    Attributes:
        case: The case's name.
        kind: ``false`` or ``missed``.
        voxel: One of its voxels ``(z, y, x)`` in the stored case, near its middle.
        size: The voxels ``(z, y, x)`` of that case, by which one in another grid is known.
        volume_ml: The lesion's volume.
    """

    case: str
    kind: str
    voxel: tuple[int, int, int]
    size: tuple[int, int, int]
    volume_ml: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, expected one of {', '.join(KINDS)}")


def write(path: Path, examples: Sequence[HardExample]) -> None:
    """Write the table, in whole or not at all."""
    with (
        files.replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        table.writerow(_COLUMNS)
        for each in examples:
            table.writerow([each.case, each.kind, *each.voxel, *each.size, f"{each.volume_ml:.3f}"])


@functools.lru_cache(maxsize=4)
def read(path: Path) -> dict[str, tuple[HardExample, ...]]:
    """The examples of each case that has any; each process reads the file once.

    Raises:
        TrainingError: The file is missing or damaged.
    """
    found: dict[str, list[HardExample]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if table.fieldnames != _COLUMNS:
                raise TrainingError(f"{path}: columns {table.fieldnames}, expected {_COLUMNS}")
            for row in table:
                z, y, x, *size = (int(row[column]) for column in _COLUMNS[2:8])
                example = HardExample(
                    row["case"], row["kind"], (z, y, x), (size[0], size[1], size[2]),
                    float(row["volume_ml"]),
                )  # fmt: skip
                found.setdefault(example.case, []).append(example)
    except FileNotFoundError as error:
        raise TrainingError(
            f"{path}: missing; train the fold without --hard-fraction first, then run "
            "`hard-examples`"
        ) from error
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise TrainingError(
            f"{path}: damaged, expected a table of hard examples: {error}"
        ) from error
    return {case: tuple(examples) for case, examples in found.items()}


def require(
    path: Path, cases: Collection[str], size_of: Callable[[str], tuple[int, int, int]]
) -> None:
    """Refuse a table that is missing, or made for other cases than these, or in another grid.

    Args:
        path: The table.
        cases: The names of the fold's training cases.
        size_of: Gives the size ``(z, y, x)`` of a stored case.

    Raises:
        TrainingError: Says which case it is.
    """
    for case, examples in sorted(read(path).items()):
        if case not in cases:
            reason = f"lists case {case}, which the fold does not train on"
        elif any(each.size != size_of(case) for each in examples):
            sizes = times(examples[0].size), times(size_of(case))
            reason = f"made of case {case} of {sizes[0]} voxels, which is stored with {sizes[1]}"
        else:
            continue
        raise TrainingError(f"{path}: {reason}; run `hard-examples` again")


def draw(rng: np.random.Generator, path: Path) -> HardExample:
    """One example of the file: first a case is drawn, then one of its examples."""
    examples = read(path)
    cases = sorted(examples)
    of_case = examples[cases[int(rng.integers(len(cases)))]]
    return of_case[int(rng.integers(len(of_case)))]
