"""The scans of ``real-heads``: which there are in the downloads, by their tables and pictures."""

from __future__ import annotations

import collections
import csv
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg.errors import DatasetError
from ichseg.wording import counted
from training.data.layouts import read_source
from training.data.splits import read_groups
from training.data.windowed import Box, Region
from training.data.workspace import GROUPS_FILE

# PHE-SICH: what was corrected after all scans had been looked at.
DROPPED = {
    "0038": "its bleed is too faint for the rule, and for the eye to draw its border",
}
ADDED_BOXES: dict[str, dict[int, Box]] = {
    "0013": dict.fromkeys(range(11, 18), (205, 150, 280, 225)),  # listed without any box
}

# CT-ICH: where its bleeds were seen, slice by slice; no radiologist drew it.
REGIONS = Path(__file__).with_name("ct_ich_regions.csv")

IGNORE_LABEL = 2  # the label of voxels that nobody could tell

_SIDES = ("xmin", "ymin", "xmax", "ymax")
_PHE_SICH = r"(\d{4})_(\d{1,4})"  # patient and slice
_CT_ICH = r"(\d{3})_(\d{1,4})"
_LARGEST = 1e6  # of a patient's number, a slice's or a pixel's
_MOST_NAMED = 20  # scans that lack slices, in one line

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scan:
    """One scan to make, and what of it to mark.

    Attributes:
        name: The name of the case.
        group: The patient's name; scans of one patient stay in one fold.
        source: ``phe-sich``, ``ct-ich`` or ``other``.
        files: Pictures of its slices from the feet up, or image and label of a finished scan.
        boxes: For each slice the boxes around its bleeds (PHE-SICH).
        bleeding: For each slice whether it shows a bleed (CT-ICH).
        regions: For each slice where in it bleeds were seen (CT-ICH).
        missing: Numbers of slices of which there is no picture.
    """

    name: str
    group: str
    source: str
    files: tuple[Path, ...]
    boxes: tuple[tuple[Box, ...], ...] = ()
    bleeding: tuple[bool, ...] = ()
    regions: tuple[tuple[Region, ...], ...] = ()
    missing: tuple[int, ...] = ()


def find_phe_sich(folder: Path) -> list[Scan]:
    """The patients of PHE-SICH-CT-IDS that are there, less those that were dropped.

    Raises:
        DatasetError: There are none, or the table does not fit their pictures.
    """
    table = folder / "boxes.csv"
    boxes: dict[str, dict[int, list[Box]]] = {}
    for row in _rows(table, ("slice", *_SIDES)):
        x0, y0, x1, y1 = (round(_number(table, row, side)) for side in _SIDES)
        if not (0 <= x0 <= x1 and 0 <= y0 <= y1):
            raise DatasetError(
                f"{table}: box {x0}, {y0}, {x1}, {y1} in slice {row['slice'][:40]!r}, expected "
                "xmin, ymin, xmax, ymax in pixels, from 0 on"
            )
        name = re.fullmatch(_PHE_SICH, row["slice"])
        if name is None:
            raise DatasetError(
                f"{table}: slice is {row['slice'][:40]!r}, expected PATIENT_SLICE such as 0001_02"
            )
        boxes.setdefault(name[1], {}).setdefault(int(name[2]), []).append((x0, y0, x1, y1))
    stacks = _stacks(folder / "images", _PHE_SICH)
    scans = []
    for patient, pictures in stacks.items():
        if patient in DROPPED:
            _log.info("%s is left out: %s", patient, DROPPED[patient])
            continue
        listed, added = boxes.get(patient, {}), ADDED_BOXES.get(patient, {})
        in_slices = tuple(
            (*listed.get(number, ()), *((added[number],) if number in added else ()))
            for number in pictures
        )
        if not any(in_slices):
            raise DatasetError(f"{folder}: no box for any slice of {patient}")
        case = f"phesich_{patient}"
        scans.append(
            Scan(
                case,
                case,
                "phe-sich",
                tuple(pictures.values()),
                boxes=in_slices,
                missing=_missing(pictures, listed),
            )
        )
    _tell_of_missing(folder / "images", scans)
    return scans


def find_ct_ich(folder: Path) -> list[Scan]:
    """The patients of CT-ICH that are there.

    Raises:
        DatasetError: There are none, or the table does not fit their pictures.
    """
    table = folder / "hemorrhage_diagnosis.csv"
    if not table.exists() and (folder / "ct_scans").is_dir():
        raise DatasetError(
            f"{folder}: version 1.3 of CT-ICH, whose volumes and masks `convert` takes as they "
            f"are; expected version 1.0.0, with brain and {table.name}"
        )
    bleeds: dict[int, dict[int, bool]] = collections.defaultdict(dict)
    for row in _rows(table, ("PatientNumber", "SliceNumber", "No_Hemorrhage")):
        patient, number, none = (
            int(_number(table, row, key))
            for key in ("PatientNumber", "SliceNumber", "No_Hemorrhage")
        )
        if none not in (0, 1):
            raise DatasetError(
                f"{table}: No_Hemorrhage is {none} for slice {number} of patient {patient}, "
                "expected 0 or 1"
            )
        bleeds[patient][number] = not none
    seen = read_regions(REGIONS)
    scans = []
    for name, pictures in _stacks(folder / "brain", _CT_ICH).items():
        listed = bleeds[int(name)]
        if unlisted := [number for number in pictures if number not in listed]:
            raise DatasetError(f"{table}: no row for slice {unlisted[0]} of patient {name}")
        case = f"ctich_{name}"
        scans.append(
            Scan(
                case,
                case,
                "ct-ich",
                tuple(pictures.values()),
                bleeding=tuple(listed[number] for number in pictures),
                regions=tuple(
                    seen.get((int(name), number), ()) if listed[number] else ()
                    for number in pictures
                ),
                missing=_missing(pictures, listed),
            )
        )
    _tell_of_missing(folder / "brain", scans)
    return scans


def read_regions(path: Path) -> dict[tuple[int, int], tuple[Region, ...]]:
    """Where bleeds were seen, by patient and slice: polygons in fractions of the picture's sides.

    Raises:
        DatasetError: The table is damaged.
    """
    found: dict[tuple[int, int], tuple[Region, ...]] = {}
    for row in _rows(path, ("slice", "kind", "sure", "outline")):
        name = re.fullmatch(_CT_ICH, row["slice"])
        try:
            sides = [float(side) for side in row["outline"].split()]
        except ValueError:
            sides = []
        if (
            name is None
            or row["sure"] not in ("0", "1")
            or len(sides) < 6
            or len(sides) % 2
            or not all(0 <= side <= 1 for side in sides)
        ):
            raise DatasetError(
                f"{path}: region {row['outline'][:40]!r} of slice {row['slice'][:40]!r}, sure "
                f"{row['sure'][:10]!r}, expected x y of three corners or more in fractions, such "
                "as 0.25 0.3, of a slice such as 051_14, and 0 or 1"
            )
        outline = tuple(zip(sides[::2], sides[1::2], strict=True))
        key = (int(name[1]), int(name[2]))
        found[key] = (*found.get(key, ()), Region(outline, sure=row["sure"] == "1"))
    return found


def find_others(folder: Path) -> list[Scan]:
    """The cases of another dataset of one channel.

    Each is a patient of its own, unless ``groups.csv`` beside them says whose it is.

    Raises:
        DatasetError: It has other channels, or labels other than one and what is to be ignored, or
            the table lacks a case or puts one into two groups.
    """
    source = read_source(folder)
    if len(source.channels) != 1:
        raise DatasetError(f"{folder}: {len(source.channels)} channels, expected 1")
    declared = source.declared
    if (
        len(declared.labels) != 2
        or declared.regions
        or declared.ignore_label not in (None, IGNORE_LABEL)
    ):
        ignored = "" if declared.ignore_label is None else f", ignore {declared.ignore_label}"
        raise DatasetError(
            f"{folder}: labels {', '.join(declared.labels)}{ignored}; expected background and one "
            f"other, and {IGNORE_LABEL} for what is to be ignored, if anything is"
        )
    labelled = [(case.name, case.images[0], case.label) for case in source.cases if case.label]
    table = folder / GROUPS_FILE
    names = [name for name, _, _ in labelled]
    groups = read_groups(table, names) if table.exists() else {name: name for name in names}
    return [Scan(name, groups[name], "other", (image, label)) for name, image, label in labelled]


def _stacks(folder: Path, pattern: str) -> dict[str, dict[int, Path]]:
    """The pictures of each patient by the numbers of their slices, in order."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    found: dict[str, dict[int, Path]] = collections.defaultdict(dict)
    for path in sorted(folder.glob("*.png")):
        match = re.fullmatch(pattern, path.stem)
        if match is None:
            raise DatasetError(f"{path}: expected a name such as PATIENT_SLICE.png")
        patient, number = match[1], int(match[2])
        if number in found[patient]:
            raise DatasetError(
                f"{path}: slice {number} of {patient} is there twice, the other is "
                f"{found[patient][number].name}"
            )
        found[patient][number] = path
    if not found:
        raise DatasetError(f"{folder}: no .png slices")
    return {patient: dict(sorted(pictures.items())) for patient, pictures in found.items()}


def _missing(pictures: Mapping[int, Path], listed: Collection[int]) -> tuple[int, ...]:
    """Numbers of slices without a picture: between those that there are, and of the table."""
    between = range(min(pictures), max(pictures))
    return tuple(sorted({*between, *listed} - pictures.keys()))


def _tell_of_missing(folder: Path, scans: Sequence[Scan]) -> None:
    """Say which slices of the patients that are there have no picture."""
    lacking = [scan for scan in scans if scan.missing]
    if lacking:
        named = [f"{s.name} {' '.join(map(str, s.missing))}" for s in lacking[:_MOST_NAMED]]
        more = len(lacking) - len(named)
        _log.warning(
            "%s: no picture of %s: %s%s; their scans are made of those that there are, as if "
            "nothing lay between, and the record names them",
            folder,
            counted(sum(len(scan.missing) for scan in lacking), "slice"),
            ", ".join(named),
            f" and of {counted(more, 'more scan')}" if more else "",
        )


def _number(table: Path, row: Mapping[str, str], column: str) -> float:
    """A number of a table."""
    try:
        found = float(row[column])
    except (TypeError, ValueError):  # a row that is too short has None
        found = math.nan
    if not -_LARGEST < found < _LARGEST:
        raise DatasetError(f"{table}: {column} is {str(row[column])[:40]!r}, expected a number")
    return found


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of a table that has these columns."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            missing = set(columns) - set(reader.fieldnames or ())
            if missing:
                raise DatasetError(f"{path}: lacks the columns {', '.join(sorted(missing))}")
            for row in reader:
                if any(row[column] is None for column in columns):
                    raise DatasetError(
                        f"{path}: line {reader.line_num} is too short, expected "
                        f"{', '.join(columns)}"
                    )
                yield row
    except OSError as error:
        raise DatasetError(f"{path}: cannot read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: not a table in UTF-8 ({str(error)[:160]})") from error
