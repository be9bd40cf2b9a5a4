"""Slices of one frame put in their order: where they lie, and what is odd about it in words.

Geometry is that of each slice's own position and orientation, never of the file's name, its
number, or the thickness or tilt that its header mentions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError
from ichseg.scan.dicom.elements import DicomFile
from ichseg.scan.dicom.straighten import Stack, grid_of
from ichseg.scan.stored import MOST_VOXELS
from ichseg.wording import counted, times

_SAME_PLACE_MM = 0.01  # two slices this near lie at the same place
_ROUNDED_MM = 0.1  # by which positions of copies differ: some are rounded
_WIDEST_GAP_MM = 15.0  # a lesion of more than 1 mL could lie in a wider one
_GAP = 1.5  # a step is one if it is so many times what it should be
_PARALLEL = 5e-3  # of direction cosines, some of which are written with two decimals
_LEAST_TILT = 0.1  # degrees; with less, slices do not lie in a line that leans
_ALIKE = 0.8  # the cosine of the angle between two parts of a head, whose gantry may tilt
_LARGEST = 4096  # rows, columns
_LEAST_PART = 3  # slices of an acquisition or kernel; of fewer, in turn, a scan may be made
# What slices of one scan share, or else have one after the other along the patient. Series differ
# in the first two even where whoever took the names away gave all of them one UID.
_OF_ONE_SCAN = ("SeriesNumber", "ConvolutionKernel", "AcquisitionNumber")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Slices of one series with one frame."""

    files: tuple[DicomFile, ...]
    stack: Stack
    warnings: tuple[str, ...]

    @property
    def extent_mm(self) -> float:
        """The distance from the first slice's plane to the last one's."""
        return float(np.ptp(self.stack.places_mm[:, 0]))


def goes_on(one: Candidate, other: Candidate) -> bool:
    """Whether one begins about where the other ends, in the same frame of reference."""
    first, second = one.files[0], other.files[0]
    if first.text("FrameOfReferenceUID") != second.text("FrameOfReferenceUID"):
        return False
    normal = one.stack.axes[:, 0]
    if normal @ other.stack.axes[:, 0] < _ALIKE:
        return False
    low, high = one.stack.places_mm[[0, -1], 0]
    start, end = (other.stack.places_mm[[0, -1]] @ other.stack.axes.T) @ normal
    apart = max(start - high, low - end)
    step = float(max(np.median(one.stack.steps_mm), np.median(other.stack.steps_mm)))
    return bool(-step <= apart <= _WIDEST_GAP_MM)


def refuse_without_frame(file: DicomFile) -> None:
    """Refuse a file that does not say where its slice lies and how large it is.

    Raises:
        InputError: It is such a file.
    """
    orientation = file.numbers("ImageOrientationPatient", 6)
    spacing = file.numbers("PixelSpacing", 2)
    if orientation is None or spacing is None or file.numbers("ImagePositionPatient", 3) is None:
        raise file.fault("without position, orientation or pixel spacing, expected a CT slice's")
    if not all(0.01 <= size <= 20 for size in spacing):
        raise file.fault(f"pixels of {spacing[0]:g} x {spacing[1]:g} mm, expected 0.01 to 20")
    rows, columns = file.integer("Rows"), file.integer("Columns")
    if not (rows and columns and rows <= _LARGEST and columns <= _LARGEST):
        raise file.fault(f"{rows} rows of {columns} pixels, expected 1 to {_LARGEST}")


def group_by_frame(slices: Iterable[DicomFile]) -> list[list[DicomFile]]:
    """Slices of one series, frame of reference, size and orientation together.

    Their numbers may be rounded in whatever way. Positions in two frames of reference have nothing
    to do with each other. Parts of other numbers or kernels that lie within each other are told
    apart, too.
    """
    groups: list[tuple[tuple[object, ...], npt.NDArray[np.float64], list[DicomFile]]] = []
    for file in slices:
        uids = (file.text("SeriesInstanceUID"), file.text("FrameOfReferenceUID"))
        same = (*uids, file.integer("Rows"), file.integer("Columns"))
        spacing = file.numbers("PixelSpacing", 2) or ()
        orientation = file.numbers("ImageOrientationPatient", 6) or ()
        frame = np.array([*orientation, *spacing])
        for other, place, group in groups:
            if other == same and abs(frame - place).max() <= _PARALLEL / 2:
                group.append(file)
                break
        else:
            groups.append((same, frame, [file]))
    scans = [group for _, _, group in groups]
    for keyword in _OF_ONE_SCAN:
        scans = [scan for group in scans for scan in _told_apart(group, keyword)]
    return scans


def _told_apart(group: list[DicomFile], keyword: str) -> list[list[DicomFile]]:
    """Slices of one frame, without those of a part that was made again.

    A scan may be taken in many acquisitions, one after the other along the patient. One that lies
    for the most part within another is a second scan: the head may have moved in between, and their
    slices in turn would be a head that there never was. So would those of two kernels.
    """
    parts: dict[str, list[DicomFile]] = {}
    for file in group:
        parts.setdefault(file.text(keyword), []).append(file)
    if len(parts) < 2:
        return [group]
    orientation = np.array(group[0].numbers("ImageOrientationPatient", 6))
    normal = np.cross(orientation[:3], orientation[3:])
    scans: list[list[tuple[float, float, list[DicomFile]]]] = []
    for value in sorted(parts, key=lambda text: (len(text), text)):
        files = parts[value]
        places = [
            float(normal @ (f.numbers("ImagePositionPatient", 3) or (0, 0, 0))) for f in files
        ]
        part = (min(places), max(places), files)
        for scan in scans:
            if not any(_lies_within(part, other) for other in scan):
                scan.append(part)
                break
        else:
            scans.append([part])
    if len(scans) == 1:
        return [group]
    return [[file for _, _, files in scan for file in files] for scan in scans]


def _lies_within(
    one: tuple[float, float, list[DicomFile]], other: tuple[float, float, list[DicomFile]]
) -> bool:
    """Whether half or more of the shorter of two parts, from, to and slices, is in both."""
    if min(len(one[2]), len(other[2])) < _LEAST_PART:
        return False
    shared = min(one[1], other[1]) - max(one[0], other[0])
    return shared > 0 and shared >= 0.5 * min(one[1] - one[0], other[1] - other[0])


def stack_slices(given: Sequence[DicomFile]) -> Candidate:
    """Put slices of one frame in their order.

    Raises:
        InputError: They are no volume.
    """
    first = given[0]
    folder = first.path.parent
    orientation = np.array([file.numbers("ImageOrientationPatient", 6) for file in given])
    if np.ptp(orientation, axis=0).max() > _PARALLEL:
        raise InputError(f"{folder}: {describe(given)} are not parallel, expected a volume")
    usual = np.median(orientation, axis=0)
    row, column = usual[2::-1], usual[:2:-1]  # (z, y, x)
    lengths = (float(row @ row), float(column @ column), float(row @ column) + 1)
    if max(abs(value - 1) for value in lengths) > 2 * _PARALLEL:
        raise first.fault("its row and column are no unit vectors at right angles")
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    column = column / np.linalg.norm(column)
    normal = -np.cross(row, column)  # the cross product of vectors in (z, y, x) is turned round
    axes = np.stack([normal, column, row], axis=1)
    places = np.array([file.numbers("ImagePositionPatient", 3) for file in given])[:, ::-1] @ axes
    order = np.argsort(places[:, 0], kind="stable")
    files, places = [given[i] for i in order], places[order]
    files, places, warnings = _one_at_each_place(folder, files, places)
    if len(files) < 2:
        raise InputError(f"{folder}: {describe(given)} at one place, expected a volume")
    spacing = first.numbers("PixelSpacing", 2) or (1.0, 1.0)
    shape = (first.integer("Rows") or 0, first.integer("Columns") or 0)
    stack = Stack(shape, (spacing[0], spacing[1]), axes, places)
    warnings += _about_steps(folder, files, stack)
    if math.prod(grid_of(stack).shape) > MOST_VOXELS:
        raise InputError(
            f"{folder}: a grid of {times(grid_of(stack).shape)} voxels, "
            f"expected at most {MOST_VOXELS}"
        )
    return Candidate(tuple(files), stack, tuple(warnings))


def _one_at_each_place(
    folder: Path, files: Sequence[DicomFile], places: npt.NDArray[np.float64]
) -> tuple[list[DicomFile], npt.NDArray[np.float64], list[str]]:
    """Without copies of a slice.

    Raises:
        InputError: Two different slices lie at the same place.
    """
    kept: list[int] = []
    for i, file in enumerate(files):
        apart_mm = abs(places[i] - places[kept[-1]]) if kept else np.full(3, np.inf)
        if apart_mm[0] > _ROUNDED_MM:
            kept.append(i)
        elif _is_copy(files[kept[-1]], file, apart_mm):
            continue
        elif apart_mm[0] > _SAME_PLACE_MM:
            kept.append(i)
        else:
            raise InputError(
                f"{folder}: {files[kept[-1]].path.name} and {file.path.name} lie at the same "
                "place and differ, expected one slice at each place: the slices of one acquisition"
            )
    copies = len(files) - len(kept)
    warnings = [f"{_slices(copies)} there twice, one of each was taken"] if copies else []
    return [files[i] for i in kept], places[kept], warnings


def _is_copy(first: DicomFile, second: DicomFile, apart_mm: npt.NDArray[np.float64]) -> bool:
    """Whether two slices show the same HU in the same place, along all three axes."""

    def scale(file: DicomFile) -> tuple[object, ...]:
        keys = ("RescaleSlope", "RescaleIntercept")
        return (*(file.numbers(key, 1) for key in keys), file.integer("PixelRepresentation"))

    same_place = bool(np.all(apart_mm <= _ROUNDED_MM))
    same_pixels = first.pixel_bytes() == second.pixel_bytes()
    return same_place and scale(first) == scale(second) and same_pixels


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
        thickness = [v[0] for f in (file, following) if (v := f.numbers("SliceThickness", 1))]
        expected = max([usual, *(mm for mm in thickness if 0 < mm < _WIDEST_GAP_MM)])
        if step > _GAP * expected + 0.05:
            gaps, widest = gaps + 1, max(widest, float(step))
            if step > _WIDEST_GAP_MM:
                raise InputError(
                    f"{folder}: {step:.4g} mm between {file.path.name} and "
                    f"{following.path.name}, expected about {expected:.3g}: slices are missing"
                )
    words = []
    thicknesses = [v[0] for file in files if (v := file.numbers("SliceThickness", 1)) and v[0] > 0]
    thick = float(np.median(thicknesses)) if thicknesses else usual
    if usual > _GAP * thick + 0.05:
        words.append(
            f"slices {thick:.3g} mm thick lie {usual:.3g} mm apart: what lies between was not "
            "scanned, or every other slice is missing"
        )
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
        aside_mm = float(np.ptp(stack.places_mm[:, 1:], axis=0).max())
        odd = f"gantry tilted by {stack.tilt_degrees:.1f} degrees"
        if stack.tilt_degrees < _LEAST_TILT:
            odd = f"slices lie up to {aside_mm:.2g} mm out of line"
        words.append(
            f"{odd}: slices were moved within their planes to where they lie in the patient"
        )
    tilt = files[0].numbers("GantryDetectorTilt", 1)
    if tilt and abs(tilt[0]) > 1 and stack.is_upright:
        words.append(
            f"the header speaks of a gantry tilt of {tilt[0]:g} degrees, the slices' positions of "
            "none; they are taken as they say"
        )
    return words


def describe(files: Iterable[DicomFile]) -> str:
    """A series in words for the log, with nothing that names the patient."""
    files = list(files)
    first = files[0]
    known = [
        f"series {number}" if (number := first.text("SeriesNumber")[:12]) else "a series",
        f"of {counted(len(files), 'slice')}",
    ]
    acquired = {file.text("AcquisitionNumber")[:12] for file in files}
    if len(acquired) == 1 and (number := acquired.pop()) not in ("", "0", "1"):
        known.append(f"acquisition {number}")
    if thickness := first.text("SliceThickness")[:12]:
        known.append(f"{thickness} mm thick")
    if kernel := first.text("ConvolutionKernel").replace("\\", " ")[:24]:
        known.append(f"kernel {kernel}")
    return ", ".join([" ".join(known[:2]), *known[2:]])
