"""A folder of DICOM slices as a case: which series it is, where its slices lie, and their HU.

Headers are read first, all of them; pixels only of the slices that are used. Geometry is that of
each slice's own position and orientation, never of the file's name, its number, or the thickness
or tilt that its header mentions.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ichseg.errors import InputError
from ichseg.scan.dicom import decompress, elements, files, pixels
from ichseg.scan.dicom.elements import CT_IMAGE, DicomFile
from ichseg.scan.dicom.stacking import Candidate, describe, frame_of, stack_slices
from ichseg.scan.dicom.straighten import Stack, grid_of, straighten
from ichseg.scan.volume import Volume
from ichseg.wording import counted

ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"

_HEAD = ("HEAD", "BRAIN", "SKULL", "NEURO", "SINUS", "ORBIT", "FACE", "EAR")


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
        groups.setdefault(frame_of(file), []).append(file)
    candidates, refusals = [], []
    for group in groups.values():
        try:
            candidates.append(stack_slices(group))
        except InputError as error:
            refusals.append((len(group), str(error)))
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
            + ", ".join([describe(c.files) for c in rest] + [f"{n} slices" for n, _ in refusals])
        )
    return Series(
        folder=folder,
        slices=best.files,
        stack=best.stack,
        words=f"taken was {describe(best.files)}",
        warnings=(*left_out, *best.warnings, *_about_header(best)),
    )


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


def _headers(folder: Path) -> tuple[list[DicomFile], Counter[str]]:
    """Of the CT slices; and how many files of what else there are."""
    found: list[DicomFile] = []
    others: Counter[str] = Counter()
    for path in files.walk(folder):
        if not files.is_dicom(path):
            if path.suffix.lower() in (".dcm", ".ima"):
                raise InputError(f"{path}: not a DICOM file, expected DICM at byte 128")
            continue
        file = elements.read_elements(path)
        kind, modality = file.text("SOPClassUID"), file.text("Modality")
        if kind == ENHANCED_CT:
            raise InputError(
                f"{path}: an Enhanced CT image, many slices in one file; expected a file a slice"
            )
        if not kind and not file.pixels_at:  # a medium's directory
            continue
        if kind != CT_IMAGE or modality != "CT":
            others[f"of modality {modality[:16]}" if modality else "without an image"] += 1
        elif "LOCALIZER" in file.text("ImageType").upper():
            others["of a localiser"] += 1
        else:
            found.append(file)
    return found, others


def _counted(others: Counter[str]) -> str:
    return ", ".join(f"{counted(n, 'file')} {what}" for what, n in sorted(others.items()))


def _about_header(chosen: Candidate) -> list[str]:
    """What else a reader should know."""
    first = chosen.files[0]
    words = []
    if not chosen.rank[0]:
        words.append("the slices are not axial")
    if contrast := first.text("ContrastBolusAgent")[:40]:
        words.append(f"taken with contrast agent ({contrast}); the networks know scans without")
    part = first.text("BodyPartExamined").upper()
    if part and not any(word in part for word in _HEAD):
        words.append(f"the header says body part {part[:20]}, expected a head")
    if first.text("LossyImageCompression") == "01":
        words.append("its pixels have been compressed with loss")
    return words
