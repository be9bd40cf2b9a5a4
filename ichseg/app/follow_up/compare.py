"""``ichseg compare-scans A B``: how the bleeds of a patient changed from one scan to the next."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ichseg import __version__
from ichseg.app import results, weights
from ichseg.app.console import say
from ichseg.app.follow_up import growth, page
from ichseg.app.follow_up.growth import Change, compare_lesions
from ichseg.app.follow_up.page import FIRST, SECOND, FollowUp
from ichseg.app.one_case import optional
from ichseg.errors import InputError, OutputError
from ichseg.files import (
    WRITTEN_SUFFIXES,
    remove_if_there,
    replacing,
    require_writable,
    suffix_of,
)
from ichseg.model import strict_json
from ichseg.report import PAGE_FILE, REPORT_FOLDER, case_files
from ichseg.scan import reader, register, volume
from ichseg.scan.dicom.elements import DicomFile
from ichseg.scan.reader import Scan
from ichseg.scan.volume import Volume

if TYPE_CHECKING:  # engines take long to import, and masks may be given
    from ichseg.predict.ensemble import Ensemble

FILE = "follow_up.json"
_LAID, _LAID_MASK = (f"{SECOND}_{what}on_{FIRST}.nii.gz" for what in ("", "mask_"))
_LEAST_AGREEMENT = 0.87  # of one head; two have about 0.6, see docs/follow_up.md


@dataclass(frozen=True, slots=True)
class Study:
    """One of the two scans.

    Attributes:
        path: Where it came from.
        scan: The CT in HU.
        mask: What was found in it, or given; in the scan's grid.
        warnings: What a reader of the result should know.
    """

    path: Path
    scan: Scan
    mask: Volume
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of its file or folder, of ``.`` and ``..`` too."""
        return self.path.name if self.path.name.strip(".") else self.path.resolve().name

    @property
    def volume_ml(self) -> float:
        """The volume of all that is in the mask."""
        return int(np.count_nonzero(self.mask.voxels)) * self.mask.voxel_ml


def run(arguments: argparse.Namespace) -> int:
    """Compare the scans and write what was found.

    Raises:
        InputError: A scan or mask is missing, damaged, or does not fit; or the scans cannot be
            brought onto each other.
        OutputError: The folder cannot be written.
    """
    paths = (arguments.before, arguments.after)
    for path in paths:  # before anything that takes long
        if not path.exists():
            raise InputError(f"{path}: no such file or folder, expected a scan")
    _check_output(arguments.output)
    if arguments.masks:
        studies = [
            _with_mask(path, mask) for path, mask in zip(paths, arguments.masks, strict=True)
        ]
    else:
        ensemble = _load(arguments)
        studies = [_segmented(path, ensemble, arguments.preset) for path in paths]
    before, after = studies
    say("bringing the second scan onto the first")
    alignment = register.register(before.scan, after.scan)
    found = _compare(before, after, alignment)
    with results.claimed(arguments.output):
        _remove_earlier(arguments.output, given={*paths, *(arguments.masks or ())})
        found = _write(arguments.output, before, after, found)
    _say(found)
    return 0


def _check_output(output: Path) -> None:
    """Refuse a folder that could not be written in the end, or that others' results are in."""
    require_writable(output)
    if (output / results.FILE).exists():
        raise OutputError(
            f"{output / results.FILE}: what was found in other scans, whose page this one would "
            "replace; expected another --output"
        )


def _load(arguments: argparse.Namespace) -> Ensemble:
    from ichseg.predict.ensemble import Ensemble

    ensemble = Ensemble.load(weights.choose(arguments.weights), arguments.device)
    if not ensemble.model.expects_hu:
        raise InputError(
            f"{ensemble.folder}: a bundle for images that are not in HU, expected one for CT"
        )
    return ensemble


def _read(path: Path) -> tuple[Scan, tuple[str, ...]]:
    scan = reader.read_scan(path)
    if scan.series is not None:
        say(f"{path}: {scan.series.words}")
    checked = reader.in_hu(scan, path)
    return checked, checked.warnings


def _segmented(path: Path, ensemble: Ensemble, preset: str) -> Study:
    scan, warnings = _read(path)
    say(f"{path}: segmenting, preset {preset}, {ensemble.engine.name}")
    found = ensemble.segment(scan, preset)
    # the scan was checked already, and its warnings are known
    more = [warning for warning in found.warnings if warning not in warnings]
    return Study(path, scan, found.mask, (*warnings, *more))


def _with_mask(path: Path, mask_path: Path) -> Study:
    scan, warnings = _read(path)
    mask = volume.read(mask_path)
    if mask.voxels.shape != scan.voxels.shape or not np.allclose(
        [*mask.origin_mm, *mask.spacing_mm, *mask.direction],
        [*scan.origin_mm, *scan.spacing_mm, *scan.direction],
        atol=1e-2,
    ):
        raise InputError(
            f"{mask_path}: lies in another grid, expected that of {path}: "
            f"{scan.voxels.shape} voxels (z, y, x) of {scan.spacing_mm} mm"
        )
    values = np.unique(mask.voxels).astype(np.float64)
    if values.min() < 0 or values.max() > 255 or (values != np.rint(values)).any():
        raise InputError(
            f"{mask_path}: holds {values.min():g} to {values.max():g}, expected labels from 0 to "
            "255"
        )
    return Study(path, scan, scan.with_voxels(mask.voxels.astype(np.uint8)), warnings)


def _compare(before: Study, after: Study, alignment: register.Alignment) -> FollowUp:
    warnings = [
        f"{study.name}: {warning}" for study in (before, after) for warning in study.warnings
    ]
    if np.array_equal(before.scan.voxels, after.scan.voxels):
        warnings.append("both scans have the same voxels: they are one scan, given twice")
    elif alignment.agreement < _LEAST_AGREEMENT:
        warnings.append(
            f"the scans agree by {alignment.agreement:.2f} only, where two of one patient have "
            f"{_LEAST_AGREEMENT:g} and more: look whether they are of one patient, left and right "
            "are the same in both, and they lie on each other; else no lesion belongs to another"
        )
    elif (mirrored := _agreement_mirrored(before.scan, after.scan)) > alignment.agreement:
        warnings.append(
            f"the scans agree by {alignment.agreement:.2f} as they are, and by {mirrored:.2f} with "
            "the sides of the second exchanged: look whether left and right are the same in both"
        )
    warnings += about_headers(before.scan, after.scan)
    changes = compare_lesions(before.mask, after.mask, (before.scan, after.scan), alignment)
    if not all(lesion.in_both for lesion in changes):
        warnings.append(
            "one of the scans ends where the other has a lesion (state: not covered), so that the "
            "volumes of all lesions together say nothing of growth"
        )
    change = Change(before.volume_ml, after.volume_ml)
    names = (before.name, after.name)
    return FollowUp(names, change, changes, alignment, warnings)


def _agreement_mirrored(before: Scan, after: Scan) -> float:
    """How well the scans agree if left and right are exchanged in the second."""
    try:
        return register.register(before, register.mirrored(after)).agreement
    except InputError:  # they cannot be brought onto each other so
        return 0.0


def about_headers(before: Scan, after: Scan) -> list[str]:
    """What the headers of two DICOM scans have against their comparison; nothing of the patient."""
    if before.series is None or after.series is None:
        return []
    first, second = before.series.slices[0], after.series.slices[0]
    warnings = []
    patients = first.text("PatientID"), second.text("PatientID")
    if all(patients) and patients[0] != patients[1]:
        warnings.append("the scans are of two patients, by the numbers in their headers")
    if _is_later(first, second):
        warnings.append(
            "the first scan was taken after the second, by the dates in their headers; are they in "
            "their order?"
        )
    return warnings


def _is_later(first: DicomFile, second: DicomFile) -> bool:
    """Whether the first was taken after the second, by as many digits of the time as both have."""
    days = first.text("StudyDate"), second.text("StudyDate")
    if not all(days) or days[0] != days[1]:
        return all(days) and days[0] > days[1]
    times = first.text("StudyTime"), second.text("StudyTime")
    digits = min(map(len, times))
    return times[0][:digits] > times[1][:digits]


def _remove_earlier(output: Path, given: Collection[Path]) -> None:
    """Remove what an earlier comparison has written, which may be of another patient."""
    written = [output / FILE, output / REPORT_FOLDER / PAGE_FILE]
    for name in (FIRST, SECOND):
        written += [output / f"{name}_mask{suffix}" for suffix in WRITTEN_SUFFIXES]
    written += [output / name for name in (_LAID, _LAID_MASK)]
    kept = {path.resolve() for path in given}
    for path in written:
        if path.resolve() not in kept:
            remove_if_there(path)


def _write(output: Path, before: Study, after: Study, found: FollowUp) -> FollowUp:
    """The masks first, then what is made of them, and last the file that tells of all.

    Returns:
        What was found, with a warning where the page could not be made.
    """
    for name, study in ((FIRST, before), (SECOND, after)):
        suffix = suffix_of(study.path)
        suffix = suffix if suffix in WRITTEN_SUFFIXES else WRITTEN_SUFFIXES[0]
        volume.write(study.mask, output / f"{name}_mask{suffix}")
    laid = register.onto(before.scan, after.scan, found.alignment)
    laid_mask = register.onto(before.scan, after.mask, found.alignment, labels=True)
    volume.write(laid, output / _LAID)
    volume.write(laid_mask, output / _LAID_MASK)
    warnings: list[str] = []
    with optional("no page", warnings):
        report = output / REPORT_FOLDER
        first, second = (before.scan, before.mask), (laid, laid_mask)
        for name, (scan, mask), other in ((FIRST, first, second), (SECOND, second, first)):
            case_files.write_case(report, name, scan, {"prediction": mask}, beside=other)
        say(f"a page to open in a browser: {page.write(report, found)}")
    found = dataclasses.replace(found, warnings=(*found.warnings, *warnings))
    with replacing(output / FILE, suffix=".json") as temporary:
        temporary.write_text(strict_json.dumps(_facts(found)), encoding="utf-8")
    return found


def _facts(found: FollowUp) -> dict[str, Any]:
    """What ``follow_up.json`` holds."""
    judged = found.expansion is not None and not found.change.is_new
    return {
        "schema_version": 1,
        "version": __version__,
        "before": found.scans[0],
        "after": found.scans[1],
        **_numbers(found.change),
        "expansion": {
            "is_expansion": bool(found.expansion) if judged else None,
            "limits_passed": list(found.expansion or ()),
            "definition": growth.DEFINITION,
        },
        "registration": {
            "rotation_deg": round(found.alignment.rotation_deg, 2),
            "shift_mm": round(found.alignment.shift_mm, 2),
            "agreement": round(found.alignment.agreement, 3),
        },
        "lesions": [
            {
                "before": list(lesion.before),
                "after": list(lesion.after),
                "state": lesion.state,
                **_numbers(lesion.change),
                "centroid_mm": [round(value, 1) for value in lesion.centroid_mm],
            }
            for lesion in found.lesions
        ],
        "warnings": list(found.warnings),
    }


def _numbers(change: Change) -> dict[str, float | None]:
    values = dataclasses.asdict(change) | {
        "growth_ml": change.growth_ml,
        "growth_percent": change.growth_percent,
    }
    return {key: None if value is None else round(value, 3) for key, value in values.items()}


def _say(found: FollowUp) -> None:
    change = found.change
    for warning in found.warnings:
        say(f"warning: {warning}")
    percent = "" if change.growth_percent is None else f", {change.growth_percent:+.0f} %"
    expansion = "no haematoma expansion"
    if found.expansion is None:
        expansion = "haematoma expansion cannot be told"
    elif found.change.is_new:
        expansion = "a new bleed, not judged as haematoma expansion"
    elif found.expansion:
        expansion = f"haematoma expansion: {'; '.join(found.expansion)}"
    say(
        f"{change.before_ml:.2f} mL before, {change.after_ml:.2f} mL after: "
        f"{change.growth_ml:+.2f} mL{percent}; {expansion} ({growth.SOURCE})"
    )
