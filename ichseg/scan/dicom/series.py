"""A folder of DICOM slices as a case: which series it is, where its slices lie, and their HU.

Headers are read first, all of them; pixels only of the slices that are used, and of three in each
series where there are several to choose from. Geometry is that of each slice's own position and
orientation, never of the file's name, its number, or the thickness or tilt that its header
mentions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg.errors import InputError
from ichseg.scan.dicom import decompress, pixels
from ichseg.scan.dicom.choosing import choose, is_axial, is_plain, says_head
from ichseg.scan.dicom.elements import DicomFile
from ichseg.scan.dicom.sorting import Sorted, sort_folder
from ichseg.scan.dicom.stacking import (
    Candidate,
    describe,
    goes_on,
    group_by_frame,
    stack_slices,
)
from ichseg.scan.dicom.straighten import Stack, grid_of, straighten
from ichseg.scan.volume import Volume
from ichseg.wording import counted

_LEAST_HEAD_MM = 80.0  # a part of a series that is shorter does not stand for one


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


def find_series(folder: Path, study: str = "", *, follow_links: bool = False) -> Series:
    """Choose the series in a folder, and those below it, that is the head CT.

    What is no CT slice, other series and files that cannot be read are left out, in words.

    Args:
        folder: Where to look.
        study: The UID of the study, where the folder holds several.
        follow_links: See ``files.walk``.

    Raises:
        InputError: There is no CT series, slices of several studies or patients lie there, the
            slices make no volume, or too many are missing.
    """
    found = sort_folder(folder, study, follow_links=follow_links)
    if not found.slices:
        raise _nothing_found(folder, found)
    _refuse_several(folder, found.slices)
    candidates, refusals = [], []
    for group in group_by_frame(found.slices):
        try:
            candidates.append(stack_slices(group))
        except InputError as error:
            refusals.append((len(group), str(error)))
    if not candidates:
        raise InputError(max(refusals)[1])
    with decompress.decoder() as decode:
        choice = choose(candidates, decode)
    best = choice.taken
    larger = max(refusals, default=(0, ""))
    if larger[0] > len(best.files) and best.extent_mm < _LEAST_HEAD_MM:
        raise InputError(larger[1])
    left_out = [f"left out: {found.words()}"] if found.words() else []
    rest = [f"{describe(other.files)} ({why})" for other, why in choice.others]
    rest += [f"{counted(n, 'slice')} that are no volume" for n, _ in refusals]
    if rest:
        left_out.append(f"left out: {len(rest)} other series or parts of one, " + "; ".join(rest))
    for other, why in choice.others:
        if why != "no head" and goes_on(best, other):
            left_out.append(
                f"what was taken may be a part of the head: {describe(other.files)} goes on where "
                "it ends, and is in no mask"
            )
    whys = dict.fromkeys(why for _, why in choice.others)
    return Series(
        folder=folder,
        slices=best.files,
        stack=best.stack,
        words=f"taken was {describe(best.files)}"
        + (f"; others were left out as: {', '.join(whys)}" if whys else ""),
        warnings=(*left_out, *best.warnings, *_about_header(best)),
    )


def _nothing_found(folder: Path, found: Sorted) -> InputError:
    """The error for a folder without a CT slice, which says what lies there instead."""
    if found.faults and not found.others:
        path, reason = found.faults[0]
        more = len(found.faults) - 1
        rest = f" (and {counted(more, 'more file')})" if more else ""
        return InputError(f"{path}: {reason}{rest}")
    what = f" of a CT's slices, but {found.words()}" if found.others else ""
    return InputError(f"{folder}: no DICOM file{what}; expected the slices of a CT series")


def _refuse_several(folder: Path, slices: Sequence[DicomFile]) -> None:
    """Refuse slices of several studies or patients.

    Raises:
        InputError: They are.
    """
    keys = [("studies", "StudyInstanceUID"), ("patients", "PatientID")]
    if not all(file.text("PatientID") for file in slices):  # names alone may be spelt differently
        keys += [("patients", "PatientName"), ("patients", "PatientBirthDate")]
    for what, key in keys:
        several = {value for file in slices if (value := file.text(key).rstrip("^ ").upper())}
        if len(several) > 1:
            raise InputError(f"{folder}: slices of {len(several)} {what}, expected those of one")


def read_series(series: Series) -> Volume:
    """The slices on a straight grid, in HU.

    Raises:
        InputError: A slice's pixels are damaged, or no CT's.
    """
    with decompress.decoder() as decode:
        return straighten(series.stack, lambda i: pixels.hounsfield(series.slices[i], decode))


def voxel_count(series: Series) -> int:
    """The number of voxels of the straight grid that the series is brought to."""
    return math.prod(grid_of(series.stack).shape)


def _about_header(chosen: Candidate) -> list[str]:
    """What else a reader should know of the series that is taken."""
    first = chosen.files[0]
    words = []
    if not is_axial(chosen):
        words.append("the slices are not axial")
    if not is_plain(chosen):
        agent = first.text("ContrastBolusAgent")[:40] or "as its description says"
        words.append(f"taken with contrast agent ({agent}); the networks know scans without")
    if says_head(chosen) is False:
        part = first.text("BodyPartExamined")[:20].upper()
        words.append(f"the header says body part {part}, expected a head")
    padding = pixels.padding_in_tissue(first)
    if padding is not None:
        values = " to ".join(f"{value:g}" for value in dict.fromkeys(padding))
        words.append(f"the header calls {values} HU padding; tissue lies there, so it was kept")
    if first.text("LossyImageCompression") == "01":
        words.append("its pixels have been compressed with loss")
    return words
