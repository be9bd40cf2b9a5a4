"""A folder of DICOM slices as a case: which series it is, where its slices lie, and their HU.

Headers are read first, all of them; pixels only of the slices that are used. Geometry is that of
each slice's own position and orientation, never of the file's name, its number, or the thickness
or tilt that its header mentions. Numbers of attributes are those of the DICOM standard, PS3.6.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError
from ichseg.scan import headers
from ichseg.scan.dicom import decompress, pixels
from ichseg.scan.dicom import files as dicom_file
from ichseg.scan.dicom.files import CT_IMAGE, DicomFile
from ichseg.scan.dicom.straighten import Stack, grid_of, straighten
from ichseg.scan.volume import Volume
from ichseg.wording import counted, times

ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"

_SOP_CLASS, _MODALITY, _IMAGE_TYPE = 0x00080016, 0x00080060, 0x00080008
_SERIES, _SERIES_NUMBER = 0x0020000E, 0x00200011
_POSITION, _ORIENTATION, _SPACING, _THICKNESS = 0x00200032, 0x00200037, 0x00280030, 0x00180050
_ROWS, _COLUMNS = 0x00280010, 0x00280011
_CONTRAST, _BODY_PART, _TILT, _KERNEL = 0x00180010, 0x00180015, 0x00181120, 0x00181210
_LOSSY = 0x00282110

_SAME_PLACE_MM = 0.01  # two slices this near lie at the same place
_WIDEST_GAP_MM = 15.0  # a lesion of more than 1 mL could lie in a wider one
_GAP = 1.5  # a step is one if it is so many times what it should be
_PARALLEL = 1e-3  # of direction cosines
_LARGEST = 4096  # rows, columns
_HEAD = ("HEAD", "BRAIN", "SKULL", "NEURO", "SINUS", "ORBIT", "FACE", "EAR")
_AXIAL = math.cos(math.radians(45))


@dataclass(frozen=True, slots=True)
class Series:
    """Slices that make a volume.

    Attributes:
        folder: Where they were found.
        slices: From below along the normal, one at each place.
        stack: Where they lie, in the same order.
        words: What was chosen, for the log.
        warnings: What was left out or mended, for a reader of the result.
    """

    folder: Path
    slices: tuple[DicomFile, ...]
    stack: Stack
    words: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Slices of one series with one frame."""

    files: tuple[DicomFile, ...]
    stack: Stack
    warnings: tuple[str, ...]

    @property
    def extent_mm(self) -> float:
        return float(np.ptp(self.stack.places_mm[:, 0]))

    @property
    def rank(self) -> tuple[bool, bool, float, int]:
        """Axial before oblique, taken before computed, then by what it covers and how finely."""
        axial = bool(abs(self.stack.axes[0, 0]) > _AXIAL)
        derived = "DERIVED" in self.files[0].text(_IMAGE_TYPE).upper()
        return axial, not derived, round(self.extent_mm), len(self.files)


def find_series(folder: Path) -> Series:
    """Choose the series in a folder, and those below it, that is the head CT.

    Of the CT series the one is taken whose slices are axial, not computed from another's, and
    cover the most; localisers and other modalities are left out, in words.

    Raises:
        InputError: A file is damaged, there is no CT series, its slices make no volume, or slices
            are missing.
    """
    found, others = _headers(folder)
    if not found:
        what = f" of a CT's slices, but {_counted(others)}" if others else ""
        raise InputError(f"{folder}: no DICOM file{what}; expected the slices of a CT series")
    groups: dict[tuple[object, ...], list[DicomFile]] = {}
    for file in found:
        groups.setdefault(_frame_of(file), []).append(file)
    candidates, refusals = [], []
    for files in groups.values():
        try:
            candidates.append(_candidate(files))
        except InputError as error:
            refusals.append((len(files), str(error)))
    if not candidates:
        raise InputError(max(refusals)[1])
    best = max(candidates, key=lambda candidate: candidate.rank)
    larger = max(refusals, default=(0, ""))
    if larger[0] > len(best.files):
        raise InputError(larger[1])
    left_out = [f"left out: {_counted(others)}"] if others else []
    rest = [c for c in candidates if c is not best]
    if rest or refusals:
        left_out.append(
            f"left out: {len(rest) + len(refusals)} other series or parts of one, "
            + ", ".join([_describe(c.files) for c in rest] + [f"{n} slices" for n, _ in refusals])
        )
    return Series(
        folder=folder,
        slices=best.files,
        stack=best.stack,
        words=f"taken was {_describe(best.files)}",
        warnings=(*left_out, *best.warnings, *_about_header(best)),
    )


def read(series: Series) -> Volume:
    """The slices on a straight grid, in HU.

    Raises:
        InputError: A slice's pixels are damaged, or no CT's.
    """
    with decompress.decoder() as decode:
        return straighten(series.stack, lambda i: pixels.hounsfield(series.slices[i], decode))


def voxels(series: Series) -> int:
    """Of the straight grid that the series is brought to."""
    return math.prod(grid_of(series.stack).shape)


def _headers(folder: Path) -> tuple[list[DicomFile], Counter[str]]:
    """Of the CT slices; and how many files of what else there are."""
    found: list[DicomFile] = []
    others: Counter[str] = Counter()
    for path in dicom_file.walk(folder):
        if not dicom_file.is_dicom(path):
            if path.suffix.lower() in (".dcm", ".ima"):
                raise InputError(f"{path}: not a DICOM file, expected DICM at byte 128")
            continue
        file = dicom_file.read_header(path)
        kind, modality = file.text(_SOP_CLASS), file.text(_MODALITY)
        if kind == ENHANCED_CT:
            raise InputError(
                f"{path}: an Enhanced CT image, many slices in one file; expected a file a slice"
            )
        if not kind and not file.pixels_at:  # a medium's directory
            continue
        if kind != CT_IMAGE or modality != "CT":
            others[f"of modality {modality[:16]}" if modality else "without an image"] += 1
        elif "LOCALIZER" in file.text(_IMAGE_TYPE).upper():
            others["of a localiser"] += 1
        else:
            found.append(file)
    return found, others


def _counted(others: Counter[str]) -> str:
    return ", ".join(f"{counted(n, 'file')} {what}" for what, n in sorted(others.items()))


def _frame_of(file: DicomFile) -> tuple[object, ...]:
    """What slices of one volume have in common."""
    orientation = file.numbers(_ORIENTATION, 6)
    spacing = file.numbers(_SPACING, 2)
    if orientation is None or spacing is None or file.numbers(_POSITION, 3) is None:
        raise file.fault("without position, orientation or pixel spacing, expected a CT slice's")
    if not all(0.01 <= size <= 20 for size in spacing):
        raise file.fault(f"pixels of {spacing[0]:g} x {spacing[1]:g} mm, expected 0.01 to 20")
    rows, columns = file.integer(_ROWS), file.integer(_COLUMNS)
    if not (rows and columns and rows <= _LARGEST and columns <= _LARGEST):
        raise file.fault(f"{rows} rows of {columns} pixels, expected 1 to {_LARGEST}")
    turned = tuple(round(value, 2) + 0.0 for value in orientation)
    return file.text(_SERIES), rows, columns, turned, tuple(round(v, 4) for v in spacing)


def _candidate(given: Sequence[DicomFile]) -> _Candidate:
    """Put slices of one frame in their order.

    Raises:
        InputError: They are no volume.
    """
    first = given[0]
    folder = first.path.parent
    orientation = np.array([file.numbers(_ORIENTATION, 6) for file in given])
    if np.ptp(orientation, axis=0).max() > _PARALLEL:
        raise InputError(f"{folder}: {_describe(given)} are not parallel, expected a volume")
    row, column = orientation[0, 2::-1], orientation[0, :2:-1]  # (z, y, x)
    lengths = (float(row @ row), float(column @ column), float(row @ column) + 1)
    if max(abs(value - 1) for value in lengths) > 2 * _PARALLEL:
        raise first.fault("its row and column are no unit vectors at right angles")
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    column = column / np.linalg.norm(column)
    normal = -np.cross(row, column)  # the cross product of vectors in (z, y, x) is turned round
    axes = np.stack([normal, column, row], axis=1)
    places = np.array([file.numbers(_POSITION, 3) for file in given])[:, ::-1] @ axes
    order = np.argsort(places[:, 0], kind="stable")
    files, places = [given[i] for i in order], places[order]
    files, places, warnings = _one_at_each_place(folder, files, places)
    if len(files) < 2:
        raise InputError(f"{folder}: {_describe(given)} at one place, expected a volume")
    spacing = first.numbers(_SPACING, 2) or (1.0, 1.0)
    shape = (first.integer(_ROWS) or 0, first.integer(_COLUMNS) or 0)
    stack = Stack(shape, (spacing[0], spacing[1]), axes, places)
    warnings += _about_steps(folder, files, stack)
    if math.prod(grid_of(stack).shape) > headers.MOST_VOXELS:
        raise InputError(
            f"{folder}: a grid of {times(grid_of(stack).shape)} voxels, "
            f"expected at most {headers.MOST_VOXELS}"
        )
    return _Candidate(tuple(files), stack, tuple(warnings))


def _one_at_each_place(
    folder: Path, files: Sequence[DicomFile], places: npt.NDArray[np.float64]
) -> tuple[list[DicomFile], npt.NDArray[np.float64], list[str]]:
    """Without copies of a slice.

    Raises:
        InputError: Two different slices lie at the same place.
    """
    kept: list[int] = []
    for i, file in enumerate(files):
        if not kept or places[i, 0] - places[kept[-1], 0] > _SAME_PLACE_MM:
            kept.append(i)
        elif pixels.pixel_bytes(files[kept[-1]]) != pixels.pixel_bytes(file):
            raise InputError(
                f"{folder}: {files[kept[-1]].path.name} and {file.path.name} lie at the same "
                "place and differ, expected one slice at each place: the slices of one acquisition"
            )
    copies = len(files) - len(kept)
    warnings = [f"{_slices(copies)} there twice, one of each was taken"] if copies else []
    return [files[i] for i in kept], places[kept], warnings


def _slices(count: int) -> str:
    return "1 slice is" if count == 1 else f"{count} slices are"


def _about_steps(folder: Path, files: Sequence[DicomFile], stack: Stack) -> list[str]:
    """Tilt, uneven steps and missing slices in words.

    Raises:
        InputError: So much is missing that a lesion may be.
    """
    steps = stack.steps_mm
    usual = float(np.median(steps))
    gaps, widest = 0, 0.0
    for step, file, following in zip(steps, files, files[1:], strict=False):
        thickness = [v[0] for f in (file, following) if (v := f.numbers(_THICKNESS, 1))]
        expected = max([usual, *(mm for mm in thickness if 0 < mm < _WIDEST_GAP_MM)])
        if step > _GAP * expected + 0.05:
            gaps, widest = gaps + 1, max(widest, float(step))
            if step > _WIDEST_GAP_MM:
                raise InputError(
                    f"{folder}: {step:.4g} mm between {file.path.name} and "
                    f"{following.path.name}, expected about {expected:.3g}: slices are missing"
                )
    words = []
    if gaps:
        words.append(
            f"slices are missing in {counted(gaps, 'place')}: up to {widest:.3g} mm from "
            f"one to the next, where {usual:.3g} are usual; what lies between was interpolated"
        )
    if not stack.is_even:
        words.append(
            f"slices {steps.min():.3g} to {steps.max():.3g} mm apart, brought to an even "
            f"{grid_of(stack).spacing_mm[0]:.3g} mm"
        )
    if not stack.is_upright:
        words.append(
            f"gantry tilted by {stack.tilt_degrees:.1f} degrees: slices were moved within their "
            "planes to where they lie in the patient"
        )
    tilt = files[0].numbers(_TILT, 1)
    if tilt and abs(tilt[0]) > 1 and stack.is_upright:
        words.append(
            f"the header speaks of a gantry tilt of {tilt[0]:g} degrees, the slices' positions of "
            "none; they are taken as they say"
        )
    return words


def _about_header(chosen: _Candidate) -> list[str]:
    """What else a reader should know."""
    first = chosen.files[0]
    words = []
    if not chosen.rank[0]:
        words.append("the slices are not axial")
    if contrast := first.text(_CONTRAST)[:40]:
        words.append(f"taken with contrast agent ({contrast}); the networks know scans without")
    part = first.text(_BODY_PART).upper()
    if part and not any(word in part for word in _HEAD):
        words.append(f"the header says body part {part[:20]}, expected a head")
    if first.text(_LOSSY) == "01":
        words.append("its pixels have been compressed with loss")
    return words


def _describe(files: Iterable[DicomFile]) -> str:
    """Of a series, for the log: nothing that names the patient."""
    files = list(files)
    first = files[0]
    known = [
        f"series {number}" if (number := first.text(_SERIES_NUMBER)[:12]) else "a series",
        f"of {counted(len(files), 'slice')}",
    ]
    if thickness := first.text(_THICKNESS)[:12]:
        known.append(f"{thickness} mm thick")
    if kernel := first.text(_KERNEL).replace("\\", " ")[:24]:
        known.append(f"kernel {kernel}")
    return ", ".join([" ".join(known[:2]), *known[2:]])
