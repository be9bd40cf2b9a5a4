"""``real-heads``: a training set of real head CT, made from two public downloads.

PHE-SICH-CT-IDS (figshare 23957937): patients with a spontaneous bleed, as pictures and boxes

    FOLDER/images/PPPP_SS.png    FOLDER/boxes.csv    (slice, xmin, ymin, xmax, ymax)

CT-ICH 1.0.0 (physionet.org): trauma scans, brain window, and which slices show a bleed

    FOLDER/brain/PPP_SS.png    FOLDER/hemorrhage_diagnosis.csv

Neither has masks of bleeds. They are made by the rule of ``windowed.mark_bleeds``; what nobody can
tell gets the ignore label. Beside each scan stands a copy as people hand scans in: skull removed,
another window, another field of view.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from ichseg.errors import DatasetError
from training.data import windowed
from training.data.layouts import read_source
from training.data.parallel import each_case, with_progress
from training.data.windowed import Box, Hu
from training.data.workspace import DATASET_FILE, GROUPS_FILE

RECORD_FILE = "record.csv"
LABELS = {"0": "background", "1": "hemorrhage", "2": "ignore"}
IGNORE = 2
SLICE_MM = 5.0  # of both sets; neither stores it
CT_ICH_WINDOW = (-20.0, 100.0)

# PHE-SICH: what was corrected after all scans had been looked at.
DROPPED = {
    "0038": "its bleed is too faint for the rule, and for the eye to draw its border",
}
ADDED_BOXES: dict[str, dict[int, Box]] = {
    "0013": dict.fromkeys(range(11, 18), (205, 150, 280, 225)),  # listed without any box
}

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
    """

    name: str
    group: str
    source: str
    files: tuple[Path, ...]
    boxes: tuple[tuple[Box, ...], ...] = ()
    bleeding: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Labelled:
    """A scan in HU with its labels, both ``(z, y, x)``, and its voxel size in mm, ``(z, y, x)``."""

    hu: Hu
    labels: npt.NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``python -m training real-heads``."""
    parser.add_argument("--phe-sich", type=Path, metavar="FOLDER", help="images/ and boxes.csv")
    parser.add_argument(
        "--ct-ich", type=Path, metavar="FOLDER", help="brain/ and hemorrhage_diagnosis.csv"
    )
    parser.add_argument(
        "--also",
        type=Path,
        metavar="FOLDER",
        nargs="+",
        default=[],
        help="other datasets to add, such as phantoms; groups.csv in one says whose its cases are",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make, in MSD layout")
    parser.add_argument("--seed", type=int, default=1, help="of the copies")
    parser.add_argument(
        "--copies",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="beside each scan one as people hand scans in",
    )
    parser.add_argument("--workers", type=int, default=2)


def main(args: argparse.Namespace) -> int:
    """Make the dataset; 0 if all is well."""
    write_dataset(
        args.out,
        phe_sich=args.phe_sich,
        ct_ich=args.ct_ich,
        also=args.also,
        seed=args.seed,
        copies=args.copies,
        workers=args.workers,
    )
    return 0


def write_dataset(
    out: Path,
    *,
    phe_sich: Path | None = None,
    ct_ich: Path | None = None,
    also: Sequence[Path] = (),
    seed: int = 1,
    copies: bool = True,
    workers: int = 1,
) -> None:
    """Write every scan and its copy, ``dataset.json``, ``groups.csv`` and a record of each case.

    ``dataset.json`` is written last: without it the folder is not a dataset, and the same command
    makes it anew.

    Raises:
        DatasetError: A download is not there, is incomplete, or ``out`` holds a dataset already.
    """
    if (out / DATASET_FILE).exists():
        raise DatasetError(f"{out}: holds a dataset already, expected a new folder")
    scans = [
        *(find_phe_sich(phe_sich) if phe_sich else ()),
        *(find_ct_ich(ct_ich) if ct_ich else ()),
        *(scan for folder in also for scan in find_others(folder)),
    ]
    if not scans:
        raise DatasetError("nothing to make: name --phe-sich, --ct-ich or --also")
    for name in ("imagesTr", "labelsTr"):
        (out / name).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    made = each_case(_make, scans, out, seed, copies, workers=workers)
    for scan, found in with_progress(made, len(scans), "scans"):
        if isinstance(found, Exception):
            raise DatasetError(f"{scan.name}: {found}") from found
        rows += found
    rows.sort(key=lambda row: row["case"])
    _write_table(out / RECORD_FILE, rows)
    _write_table(out / GROUPS_FILE, [{"case": r["case"], "group": r["group"]} for r in rows])
    entries = [
        {"image": f"./imagesTr/{row['case']}.nii.gz", "label": f"./labelsTr/{row['case']}.nii.gz"}
        for row in rows
    ]
    described = {
        "name": "HeadCT",
        "description": "Real head CT (PHE-SICH-CT-IDS, CT-ICH) with derived masks; see record.csv.",
        "licence": "CC BY-NC-SA 4.0, the strictest reading of its sources",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": LABELS,
        "numTraining": len(entries),
        "numTest": 0,
        "training": entries,
        "test": [],
    }
    (out / DATASET_FILE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def find_phe_sich(folder: Path) -> list[Scan]:
    """The patients of PHE-SICH-CT-IDS that are there, less those that were dropped."""
    boxes: dict[str, list[Box]] = collections.defaultdict(list)
    for row in _rows(folder / "boxes.csv", ("slice", "xmin", "ymin", "xmax", "ymax")):
        x0, y0, x1, y1 = (round(float(row[key])) for key in ("xmin", "ymin", "xmax", "ymax"))
        boxes[row["slice"]].append((x0, y0, x1, y1))
    scans = []
    for patient, files in _stacks(folder / "images", r"(\d{4})_(\d+)").items():
        if patient in DROPPED:
            _log.info("%s is left out: %s", patient, DROPPED[patient])
            continue
        added = ADDED_BOXES.get(patient, {})
        in_slices = tuple(
            (*boxes.get(file.stem, ()), *((added[z],) if z in added else ()))
            for z, file in enumerate(files)
        )
        if not any(in_slices):
            raise DatasetError(f"{folder}: no box for any slice of {patient}")
        name = f"phesich_{patient}"
        scans.append(Scan(name, name, "phe-sich", tuple(files), boxes=in_slices))
    return scans


def find_ct_ich(folder: Path) -> list[Scan]:
    """The patients of CT-ICH that are there."""
    table = folder / "hemorrhage_diagnosis.csv"
    bleeds: dict[tuple[int, int], bool] = {}
    for row in _rows(table, ("PatientNumber", "SliceNumber", "No_Hemorrhage")):
        bleeds[int(row["PatientNumber"]), int(row["SliceNumber"])] = row["No_Hemorrhage"] != "1"
    scans = []
    for patient, files in _stacks(folder / "brain", r"(\d{3})_(\d+)").items():
        numbers = [(int(patient), int(file.stem.rpartition("_")[2])) for file in files]
        missing = [number for number in numbers if number not in bleeds]
        if missing:
            raise DatasetError(f"{table}: no row for slice {missing[0][1]} of patient {patient}")
        name = f"ctich_{patient}"
        shown = tuple(bleeds[number] for number in numbers)
        scans.append(Scan(name, name, "ct-ich", tuple(files), bleeding=shown))
    return scans


def find_others(folder: Path) -> list[Scan]:
    """The cases of another dataset of one channel.

    Each is a patient of its own, unless ``groups.csv`` beside them says whose it is.
    """
    source = read_source(folder)
    if len(source.channels) != 1:
        raise DatasetError(f"{folder}: {len(source.channels)} channels, expected 1")
    groups = {case.name: case.name for case in source.cases}
    if (folder / GROUPS_FILE).exists():
        groups |= {r["case"]: r["group"] for r in _rows(folder / GROUPS_FILE, ("case", "group"))}
    return [
        Scan(case.name, groups[case.name], "other", (case.images[0], case.label))
        for case in source.cases
        if case.label is not None
    ]


def load(scan: Scan) -> Labelled:
    """The scan in HU with its labels, in-plane averaged to about 1 mm where it is finer."""
    if scan.source == "other":
        image, label = (sitk.ReadImage(str(path)) for path in scan.files)
        x, y, z = image.GetSpacing()
        hu = sitk.GetArrayFromImage(image).astype(np.float32)
        return Labelled(hu, sitk.GetArrayFromImage(label).astype(np.uint8), (z, y, x))
    grey = np.stack([_read_grey(file) for file in scan.files])
    if scan.source == "ct-ich":
        hu = windowed.hu_of_window(grey, *CT_ICH_WINDOW)
        labels = np.zeros(hu.shape, np.uint8)
        labels[list(scan.bleeding)] = IGNORE  # where in the slice the bleed lies is not known
    else:
        hu = windowed.hu_of_ranks(grey)
        bleed, doubtful = windowed.mark_bleeds(hu, scan.boxes)
        labels = np.where(bleed, 1, np.where(doubtful, IGNORE, 0)).astype(np.uint8)
        # nose up; which side is left is not known
        hu, labels = _halved(hu.transpose(0, 2, 1), labels.transpose(0, 2, 1))
    in_plane = windowed.head_spacing_mm(hu)
    return Labelled(hu, labels, (SLICE_MM, in_plane, in_plane))


def as_handed_in(scan: Labelled, generator: np.random.Generator) -> tuple[Labelled, str]:
    """A copy as people hand scans in, and in words how: most have the skull removed.

    Drawn are the stripper's margin (-2 to 2 pixels), what stands outside (0, -20 or -1000 HU), a
    window whose ends saturate, and a field of view that is larger or is cut to what was kept.
    """
    hu, labels, said = scan.hu, scan.labels, []
    outside = -1000.0
    kept = None
    if generator.random() < 0.85:
        outside = float(generator.choice([0.0, -20.0, -1000.0], p=[0.6, 0.2, 0.2]))
        margin = int(generator.integers(-2, 3))
        stripped, kept = windowed.strip_skull(np.clip(hu, -20, 100), margin, outside)
        if kept.sum() * np.prod(scan.spacing_mm) > 200_000:  # mm3; less is no brain
            hu, labels = stripped, np.where(kept, labels, 0).astype(np.uint8)
            said.append(f"skull removed, margin {margin}, outside {outside:.0f} HU")
        else:
            kept, outside = None, -1000.0
    if generator.random() < 0.3:
        low, high = float(generator.choice([-20, 0])), float(generator.choice([80, 100]))
        hu = np.clip(hu, low, high)
        outside = max(outside, low)
        said.append(f"window {low:.0f} to {high:.0f} HU")
    if kept is not None and generator.random() < 0.5:
        rows, columns = (np.flatnonzero(kept.any(axes)) for axes in ((0, 2), (0, 1)))
        box = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        hu, labels = hu[box], labels[box]
        said.append("cut to the brain")
    elif generator.random() < 0.3:
        more = int(generator.integers(10, 60))
        width = ((0, 0), (more, more), (more, more))
        hu = np.pad(hu, width, constant_values=outside)
        labels = np.pad(labels, width)
        said.append(f"padded by {more}")
    return Labelled(hu.astype(np.float32), labels, scan.spacing_mm), "; ".join(said) or "as it is"


def _make(scan: Scan, out: Path, seed: int, copies: bool) -> list[dict[str, str]]:
    """Write a scan and, if wanted, its copy, and tell of both."""
    labelled = load(scan)
    generator = np.random.default_rng([seed, zlib.crc32(scan.name.encode())])
    copy, how = as_handed_in(labelled, generator)
    rows = []
    made = ((scan.name, labelled, ""), (f"{scan.name}_copy", copy, how))
    for name, each, said in made[: 2 if copies else 1]:
        _write(out / "imagesTr" / f"{name}.nii.gz", np.rint(each.hu).astype(np.int16), each)
        _write(out / "labelsTr" / f"{name}.nii.gz", each.labels, each)
        voxel_ml = float(np.prod(each.spacing_mm)) / 1000
        rows.append(
            {
                "case": name,
                "group": scan.group,
                "source": scan.source,
                "copy": said,
                "spacing_mm": f"{each.spacing_mm[1]:.3f}",
                "bleed_ml": f"{(each.labels == 1).sum() * voxel_ml:.2f}",
                "ignored_ml": f"{(each.labels == IGNORE).sum() * voxel_ml:.2f}",
            }
        )
    return rows


def _write(path: Path, voxels: npt.NDArray[np.generic], scan: Labelled) -> None:
    image = sitk.GetImageFromArray(voxels)
    z, y, x = scan.spacing_mm
    image.SetSpacing((x, y, z))
    sitk.WriteImage(image, str(path), useCompression=True)


def _halved(hu: Hu, labels: npt.NDArray[np.uint8]) -> tuple[Hu, npt.NDArray[np.uint8]]:
    """Both at half the in-plane matrix; where any of four voxels is doubtful, the result is."""
    count, height, width = hu.shape
    blocks = (count, height // 2, 2, width // 2, 2)
    coarse = hu.reshape(blocks).mean((2, 4))
    bleed = (labels == 1).reshape(blocks).mean((2, 4)) >= 0.5
    doubtful = (labels == IGNORE).reshape(blocks).any((2, 4))
    return coarse, np.where(bleed, 1, np.where(doubtful, IGNORE, 0)).astype(np.uint8)


def _read_grey(path: Path) -> npt.NDArray[np.uint8]:
    """A picture as grey levels of 8 bit."""
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    if found.ndim == 3:
        found = found[..., 0]  # grey pictures that were stored in colour
    if found.dtype != np.uint8:
        raise DatasetError(f"{path}: {found.dtype} levels, expected 8 bit")
    return found


def _stacks(folder: Path, pattern: str) -> Mapping[str, Sequence[Path]]:
    """The pictures of each patient, slices in their order."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    found: dict[str, list[tuple[int, Path]]] = collections.defaultdict(list)
    for path in sorted(folder.glob("*.png")):
        match = re.fullmatch(pattern, path.stem)
        if match is None:
            raise DatasetError(f"{path}: expected a name such as PATIENT_SLICE.png")
        found[match[1]].append((int(match[2]), path))
    if not found:
        raise DatasetError(f"{folder}: no .png slices")
    return {patient: [path for _, path in sorted(files)] for patient, files in found.items()}


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of a table that has these columns."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            missing = set(columns) - set(reader.fieldnames or ())
            if missing:
                raise DatasetError(f"{path}: lacks the columns {', '.join(sorted(missing))}")
            yield from reader
    except OSError as error:
        raise DatasetError(f"{path}: cannot read ({error.strerror})") from error


def _write_table(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
