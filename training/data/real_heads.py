"""``real-heads``: a training set of real head CT, made from two public downloads.

PHE-SICH-CT-IDS (figshare 23957937): patients with a spontaneous bleed, as pictures and boxes

    FOLDER/images/PPPP_SS.png    FOLDER/boxes.csv    (slice, xmin, ymin, xmax, ymax)

CT-ICH 1.0.0 (physionet.org): trauma scans, brain window, and which slices show a bleed

    FOLDER/brain/PPP_SS.png    FOLDER/hemorrhage_diagnosis.csv

Neither has masks of bleeds. Rules make them: ``windowed.mark_bleeds`` in the boxes of the first,
``windowed.mark_in_regions`` where bleeds were seen in the second, by no radiologist. What nobody
can tell gets the ignore label. Beside each scan stands a copy as people hand scans in: skull
removed, another window, another field of view.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ichseg.errors import DatasetError
from ichseg.files import make_folder, replacing
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from ichseg.wording import repeated, times
from training.data import windowed
from training.data.downloads import IGNORE_LABEL, Scan, find_ct_ich, find_others, find_phe_sich
from training.data.parallel import each_case, with_progress
from training.data.windowed import Hu
from training.data.workspace import DATASET_FILE, GROUPS_FILE

RECORD_FILE = "record.csv"
LABELS = {"0": "background", "1": "hemorrhage", str(IGNORE_LABEL): "ignore"}
SLICE_MM = 5.0  # of both sets; neither stores it
CT_ICH_WINDOW = (-20.0, 100.0)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A scan in HU with its labels, both ``(z, y, x)``, and its voxel size in mm, ``(z, y, x)``."""

    hu: Hu
    labels: npt.NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``python -m training real-heads``."""
    parser.add_argument(
        "--phe-sich", type=Path, metavar="FOLDER", help="PHE-SICH-CT-IDS: images/ and boxes.csv"
    )
    parser.add_argument(
        "--ct-ich",
        type=Path,
        metavar="FOLDER",
        help="CT-ICH 1.0.0: brain/ and hemorrhage_diagnosis.csv",
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
    parser.add_argument("--seed", type=int, default=1, help="of the copies [%(default)s]")
    parser.add_argument(
        "--copies",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="beside each scan one as people hand scans in [yes]",
    )
    parser.add_argument(
        "--negative-copies",
        type=int,
        default=1,
        metavar="N",
        help="how many copies of a scan that shows no bleed, each made another way [1]",
    )
    parser.add_argument("--workers", type=int, default=2, help="parallel processes [%(default)s]")


def main(args: argparse.Namespace) -> int:
    """Make the dataset; 0 if all is well."""
    write_dataset(
        args.out,
        phe_sich=args.phe_sich,
        ct_ich=args.ct_ich,
        also=args.also,
        seed=args.seed,
        copies=args.copies,
        negative_copies=args.negative_copies,
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
    negative_copies: int = 1,
    workers: int = 1,
) -> None:
    """Write every scan and its copies, ``dataset.json``, ``groups.csv`` and a record of each case.

    ``dataset.json`` is written last: without it the folder is not a dataset, and the same command
    makes it anew.

    A scan without a bleed has ``negative_copies`` copies, since such scans are rarer than bleeds in
    public sets and commoner in clinics; any other has one.

    Raises:
        DatasetError: A download is not there, is incomplete or damaged, two cases have one name,
            ``out`` holds a dataset already, or ``negative_copies`` is below 1.
        OutputError: A table cannot be written.
    """
    if negative_copies < 1:
        raise DatasetError(f"--negative-copies is {negative_copies}, expected at least 1")
    if (out / DATASET_FILE).exists():
        raise DatasetError(f"{out}: holds a dataset already, expected a new folder")
    scans = [
        *(find_phe_sich(phe_sich) if phe_sich else ()),
        *(find_ct_ich(ct_ich) if ct_ich else ()),
        *(scan for folder in also for scan in find_others(folder)),
    ]
    if not scans:
        raise DatasetError("nothing to make: name --phe-sich, --ct-ich or --also")
    most = negative_copies if copies else 0
    names = [name for s in scans for name in (s.name, *(_copy_name(s, n) for n in range(most)))]
    if twice := repeated(names):
        folders = sorted({str(s.files[0].parent) for s in scans if twice[0].startswith(s.name)})
        raise DatasetError(f"{', '.join(folders)}: two cases would be called {twice[0]}")
    for name in ("imagesTr", "labelsTr"):
        make_folder(out / name)
    rows: list[dict[str, str]] = []
    made = each_case(_make, scans, out, seed, most, workers=workers)
    for scan, found in with_progress(made, len(scans), "scans"):
        if isinstance(found, Exception):
            reason = str(found)
            if str(scan.files[0].parent) not in reason:
                reason = (
                    f"{scan.files[0]}: {type(found).__name__}: {' '.join(reason.split())[:300]}"
                )
            raise DatasetError(f"{scan.name}: {reason}") from found
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
    with replacing(out / DATASET_FILE) as temporary:
        temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def load(scan: Scan) -> Labelled:
    """The scan in HU with its labels, in-plane averaged to about 1 mm where it is finer."""
    if scan.source == "other":
        return _load_finished(*scan.files)
    planes = [_read_grey(file) for file in scan.files]
    for file, plane in zip(scan.files, planes, strict=True):
        if plane.shape != planes[0].shape:
            raise DatasetError(
                f"{file}: {times(plane.shape)} pixels, expected {times(planes[0].shape)} as in the "
                "first slice"
            )
    grey = np.stack(planes)
    if scan.source == "ct-ich":
        hu = windowed.hu_of_window(grey, *CT_ICH_WINDOW)
        if windowed.head_spacing_mm(hu) < 0.5:
            hu, _ = _halved(hu, np.zeros(hu.shape, np.uint8))
        marked = windowed.mark_in_regions(hu, scan.regions, windowed.head_spacing_mm(hu))
        labels = _labels_of(*marked)
        labels[_unseen(scan)] = IGNORE_LABEL  # where in the slice the bleed lies is not known
    else:
        hu = windowed.hu_of_ranks(grey)
        labels = _labels_of(*windowed.mark_bleeds(hu, scan.boxes))
        # nose up; which side is left is not known
        hu, labels = _halved(hu.transpose(0, 2, 1), labels.transpose(0, 2, 1))
    in_plane = windowed.head_spacing_mm(hu)
    return Labelled(hu, labels, (SLICE_MM, in_plane, in_plane))


def _load_finished(image: Path, label: Path) -> Labelled:
    """A scan of another dataset with its labels, of which 1 is a bleed and 2 is to be ignored."""
    scan, labels = volume.read(image), volume.read(label).voxels
    if labels.shape != scan.voxels.shape:
        raise DatasetError(
            f"{label}: {times(labels.shape)} voxels, expected {times(scan.voxels.shape)} as in "
            f"{image}"
        )
    if other := sorted(set(np.unique(labels).tolist()) - {0, 1, IGNORE_LABEL}):
        raise DatasetError(f"{label}: label {other[0]:g}, expected 0, 1 or {IGNORE_LABEL}")
    hu = scan.voxels.astype(np.float32)
    if not np.isfinite(hu).all() or np.abs(hu).max() > np.iinfo(np.int16).max:
        raise DatasetError(f"{image}: values that are no number or beyond 16 bits, expected HU")
    return Labelled(hu, labels.astype(np.uint8), scan.spacing_mm)


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


def _copy_name(scan: Scan, number: int) -> str:
    """What a copy is called, the first being number 0."""
    return f"{scan.name}_copy{number + 1 if number else ''}"


def _make(scan: Scan, out: Path, seed: int, most_copies: int) -> list[dict[str, str]]:
    """Write a scan and its copies, as many as it gets, and tell of each."""
    labelled = load(scan)
    generator = np.random.default_rng([seed, zlib.crc32(scan.name.encode())])
    copies = min(most_copies, 1) if labelled.labels.any() else most_copies
    made = [(scan.name, labelled, "")]
    for number in range(copies):
        made.append((_copy_name(scan, number), *as_handed_in(labelled, generator)))
    rows = []
    for name, each, said in made:
        for part, voxels in (
            ("imagesTr", np.rint(each.hu).astype(np.int16)),
            ("labelsTr", each.labels),
        ):
            volume.write(Volume(voxels, each.spacing_mm), out / part / f"{name}.nii.gz", level=1)
        voxel_ml = float(np.prod(each.spacing_mm)) / 1000
        rows.append(
            {
                "case": name,
                "group": scan.group,
                "source": scan.source,
                "copy": said,
                "mask": _how_marked(scan),
                "missing_slices": " ".join(map(str, scan.missing)),
                "spacing_mm": f"{each.spacing_mm[1]:.3f}",
                "bleed_ml": f"{(each.labels == 1).sum() * voxel_ml:.2f}",
                "ignored_ml": f"{(each.labels == IGNORE_LABEL).sum() * voxel_ml:.2f}",
            }
        )
    return rows


def _halved(hu: Hu, labels: npt.NDArray[np.uint8]) -> tuple[Hu, npt.NDArray[np.uint8]]:
    """Both at half the in-plane matrix; where any of four voxels is doubtful, the result is."""
    count, height, width = hu.shape
    if height % 2 or width % 2:
        raise DatasetError(f"{height} x {width} pixels a slice, expected even numbers")
    blocks = (count, height // 2, 2, width // 2, 2)
    coarse = hu.reshape(blocks).mean((2, 4))
    bleed = (labels == 1).reshape(blocks).mean((2, 4)) >= 0.5
    doubtful = (labels == IGNORE_LABEL).reshape(blocks).any((2, 4))
    return coarse, _labels_of(bleed, doubtful)


def _labels_of(bleed: windowed.Mask, doubtful: windowed.Mask) -> npt.NDArray[np.uint8]:
    return np.where(bleed, 1, np.where(doubtful, IGNORE_LABEL, 0)).astype(np.uint8)


def _unseen(scan: Scan) -> list[int]:
    """Slices that are said to hold a bleed which nobody has seen, from 0 on."""
    pairs = zip(scan.bleeding, scan.regions, strict=True)
    return [z for z, (bleeding, regions) in enumerate(pairs) if bleeding and not regions]


def _how_marked(scan: Scan) -> str:
    """In words where the labels of a scan are from."""
    if scan.source == "other":
        return "of its dataset"
    if scan.source == "phe-sich":
        return "derived by a rule in the authors' boxes"
    if not any(scan.bleeding):
        return "no bleed by the authors' table"
    ways = []
    if any(scan.regions):
        ways.append("derived by a rule in regions that no radiologist drew")
    if unseen := _unseen(scan):
        numbers = " ".join(scan.files[z].stem.rpartition("_")[2] for z in unseen)
        ways.append(f"ignored: slices {numbers}")
    return "; ".join(ways)


def _read_grey(path: Path) -> npt.NDArray[np.uint8]:
    """A picture as grey levels of 8 bit."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            found = np.asarray(picture.convert("RGB") if picture.mode == "P" else picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: not a picture ({str(error)[:160]})") from error
    if found.ndim == 3:
        found = found[..., 0]  # grey pictures that were stored in colour
    if found.ndim != 2 or found.dtype != np.uint8:
        raise DatasetError(f"{path}: {found.dtype} levels, expected 8 bit")
    return found


def _write_table(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
