"""What ``default_weights.py`` scores: each case is segmented once, and what was found is kept."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ichseg.engine import openvino_engine
from ichseg.engine.choose import choose_engine
from ichseg.errors import DatasetError, InputError, WeightsError
from ichseg.files import replacing, sha256
from ichseg.model import bundle
from ichseg.predict.dice import dice_of_masks
from ichseg.predict.ensemble import Ensemble
from ichseg.report import pictures
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.data import dataset, splits, windowed
from training.data.dataset import Case
from training.data.splits import digest_names
from training.data.workspace import groups_file
from training.scoring.ignored import leave_out

PATIENT, TRAUMA = "phesich_", "ctich_"
MADE = re.compile(r"_(copy|bled)\d*$")  # how scans are called that were made of a patient's own
LEAST_BRAIN_MM3 = 200_000  # less is left where a slice's ring of bone is open


@dataclass(frozen=True, slots=True)
class Wanted:
    """A scan to segment.

    Attributes:
        group: The rows that it counts for.
        name: Its name.
        image: Its file.
        label: The file of its reference; None where there is none.
        fold: The fold whose network alone segments it; None for the whole ensemble.
        stripped: Whether its skull is removed first.
        ignore_label: The value of the reference's voxels that nobody could tell.
        kind: What bleeds it shows, if that is known.
    """

    group: str
    name: str
    image: Path
    label: Path | None
    fold: str | None = None
    stripped: bool = False
    ignore_label: int | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in a scan; a line of ``cases.csv``.

    Attributes:
        group: The rows that it counts for.
        name: Its name.
        kind: What bleeds it shows, if that is known.
        fold: The fold of the network that segmented it; empty for the whole ensemble.
        reference_ml: The volume of the reference; None where there is none.
        found_ml: The volume found.
        dice: None without a reference, and where neither it nor the mask has a voxel.
        case_score: See ``components.case_score``.
        seconds: How long it took.
        refused: Why it was not segmented, which counts as nothing found.
    """

    group: str
    name: str
    kind: str
    fold: str
    reference_ml: float | None
    found_ml: float
    dice: float | None
    case_score: float
    seconds: float
    refused: str = ""


def load(folder: Path, device: str, threads: int) -> Ensemble:
    """Open a bundle; on the CPU with so many threads, or with all for 0."""
    model = bundle.load_model(folder)
    if threads:
        return Ensemble(model, folder, openvino_engine.engine(threads))
    return Ensemble(model, folder, choose_engine(device))


def of_fold(ensemble: Ensemble, fold: str, trained_on: Iterable[str]) -> Ensemble | None:
    """The networks of one fold; None if the bundle has none.

    Raises:
        WeightsError: They were trained on other cases than these.
    """
    members = tuple(m for m in ensemble.model.members if m.fold == fold)
    if not members:
        return None
    expected, said = digest_names(trained_on), ensemble.model.provenance.get("folds", {})
    for member in members:
        key = f"{member.configuration} fold {fold}"
        if said.get(key, {}).get("trained_on") != expected:
            raise WeightsError(
                f"{ensemble.folder}: {key} was not trained on that fold's cases of the workspace, "
                "expected the bundle that `export` made of it"
            )
    model = dataclasses.replace(ensemble.model, members=members)
    return Ensemble(model, ensemble.folder, ensemble.engine)


def out_of_fold(workspace: Path) -> dict[str, tuple[Case, str]]:
    """Each labelled case of a workspace, and the fold that validates on it.

    Raises:
        DatasetError: A fold trains on another scan of a patient that it validates on.
    """
    data = dataset.load_dataset(workspace)
    names = [case.name for case in data.labelled]
    table = groups_file(workspace)
    groups = splits.read_groups(table, names) if table.exists() else {n: n for n in names}
    fold_of = {}
    for fold, split in enumerate(splits.find_splits(workspace, names)):
        torn = {groups[n] for n in split.train} & {groups[n] for n in split.validation}
        if torn:
            raise DatasetError(f"{workspace}: fold {fold} trains on what it validates: {min(torn)}")
        fold_of |= dict.fromkeys(split.validation, str(fold))
    return {case.name: (case, fold_of[case.name]) for case in data.labelled if case.name in fold_of}


def bleeding_patients(table: Path) -> dict[str, bool]:
    """Whether each patient of CT-ICH has a bleed, by the name that ``real-heads`` gives it.

    Raises:
        DatasetError: The table cannot be read, or lacks a column.
    """
    try:
        with table.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        found: dict[str, bool] = {}
        for row in rows:
            name = f"{TRAUMA}{int(row['PatientNumber']):03}"
            found[name] = found.get(name, False) or row["No_Hemorrhage"] != "1"
    except (OSError, KeyError, ValueError) as error:
        raise DatasetError(
            f"{table}: {error!r}, expected CT-ICH's hemorrhage_diagnosis.csv"
        ) from error
    return found


def wanted_of(
    group: str, name: str, cases: dict[str, tuple[Case, str]], ignore_label: int | None
) -> Wanted:
    """A workspace's case, to be segmented by the fold that validates on it."""
    case, fold = cases[name]
    return Wanted(group, name, case.images[0], case.label, fold, ignore_label=ignore_label)


def segment(wanted: Wanted, ensemble: Ensemble, preset: str, folder: Path) -> Found:
    """Segment and score a scan, unless an earlier run has kept what the same networks found."""
    made_from = _digest(wanted, ensemble, preset)
    kept = folder / "found" / wanted.group / f"{wanted.name}.json"
    if kept.exists():
        raw = json.loads(kept.read_text(encoding="utf-8"))
        if raw.pop("made_from") == made_from:
            return Found(**raw)
    image, reference = _read(wanted)
    mask, found_ml, score, seconds, refused = None, 0.0, 0.0, 0.0, ""
    try:
        result = ensemble.segment(image, preset)
    except InputError as error:
        refused = str(error)
        mask = image.with_voxels(np.zeros(image.voxels.shape, np.uint8))
    else:
        mask, found_ml, seconds = result.mask, result.volume_ml, result.seconds["total"]
        score = result.case_score or 0.0
    dice, reference_ml = None, None
    if reference is not None:
        labels, told = leave_out(mask.voxels, reference.voxels, wanted.ignore_label)
        reference_ml = float((told != 0).sum() * image.voxel_ml)
        if (labels != 0).any() or reference_ml:
            dice = dice_of_masks(labels != 0, told != 0)
    found = Found(
        wanted.group, wanted.name, wanted.kind, wanted.fold or "", reference_ml, found_ml, dice,
        score, seconds, refused,
    )  # fmt: skip
    volume.write(mask, _mask_file(folder, wanted))
    with replacing(kept) as temporary:
        temporary.write_text(json.dumps({"made_from": made_from} | asdict(found)), encoding="utf-8")
    _say(found)
    return found


def write_table(found: Sequence[Found], path: Path) -> None:
    """Write a line for each scan."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, [f.name for f in dataclasses.fields(Found)])
        table.writeheader()
        table.writerows(asdict(each) for each in found)


def draw(wanted: Sequence[Wanted], found: Sequence[Found], folder: Path) -> None:
    """Draw every scan with what was found and its reference, each group's worst first by name."""
    ranks: dict[str, int] = {}
    for one, result in sorted(zip(wanted, found, strict=True), key=lambda pair: _badness(pair[1])):
        ranks[one.group] = rank = ranks.get(one.group, 0) + 1
        image, reference = _read(one)
        title = f"{one.name}: {result.found_ml:.2f} mL found, case score {result.case_score:.2f}"
        if result.dice is not None:
            title += f", reference {result.reference_ml:.2f} mL, Dice {result.dice:.3f}"
        path = folder / "pictures" / one.group / f"{rank:03}_{one.name}.png"
        mask = volume.read(_mask_file(folder, one))
        pictures.write_overlay(image, mask, path, title=title, reference=reference)


def _badness(found: Found) -> tuple[float, float]:
    """Lowest Dice first; of scans without a bleed the largest volume first."""
    return (1.0 if found.dice is None else found.dice, -found.found_ml)


def _read(wanted: Wanted) -> tuple[Volume, Volume | None]:
    """The scan and its reference, without their skull if that is wanted."""
    image = volume.read(wanted.image)
    reference = None if wanted.label is None else volume.read(wanted.label)
    if not wanted.stripped:
        return image, reference
    generator = np.random.default_rng(zlib.crc32(wanted.name.encode()))
    margin, outside = int(generator.integers(-2, 3)), float(generator.choice([0, -20, -1000]))
    hu = np.clip(image.voxels.astype(np.float32), -20, 100)
    stripped, kept = windowed.strip_skull(hu, margin, outside)
    if kept.sum() * np.prod(image.spacing_mm) < LEAST_BRAIN_MM3:
        raise DatasetError(f"{wanted.image}: no brain is left without the skull")
    image = image.with_voxels(stripped.round().astype(np.int16))
    if reference is not None:
        reference = reference.with_voxels(np.where(kept, reference.voxels, 0).astype(np.uint8))
    return image, reference


def _digest(wanted: Wanted, ensemble: Ensemble, preset: str) -> str:
    """From what a scan's result is made."""
    model = ensemble.model
    made_from = [
        preset, str(wanted.stripped), str(wanted.ignore_label), sha256(wanted.image),
        "" if wanted.label is None else sha256(wanted.label),
        *(member.sha256 for member in model.members), repr(model.rules), repr(model.plans),
    ]  # fmt: skip
    return hashlib.sha256("\n".join(made_from).encode()).hexdigest()


def _mask_file(folder: Path, wanted: Wanted) -> Path:
    return folder / "found" / wanted.group / f"{wanted.name}.nii.gz"


def _say(found: Found) -> None:
    reference = "" if found.reference_ml is None else f" of {found.reference_ml:.2f}"
    dice = "" if found.dice is None else f", Dice {found.dice:.3f}"
    print(
        f"{found.group:16} {found.name:26} {found.kind:18} {found.found_ml:7.2f}{reference} mL"
        f"{dice}, score {found.case_score:.3f}, {found.seconds:.0f} s {found.refused}".rstrip(),
        file=sys.stderr,
        flush=True,
    )
