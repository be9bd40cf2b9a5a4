"""A scan as it was found: its volume, and what a reader of the result should know about it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ichseg.scan import nifti, plausibility, volume
from ichseg.scan.dicom.series import Series, find_series, read_series, voxel_count
from ichseg.scan.volume import Volume

_TAKEN = (
    "taken was the first axis from right to left, the second from front to back, the third from "
    "below to above"
)
SAME_FRAME_MM = 0.5  # writers round differently; a voxel is rarely smaller


@dataclass(frozen=True, slots=True, eq=False)
class Scan(Volume):
    """A volume with what is known of where it came from.

    Attributes:
        warnings: What a reader of the result should know about the file.
        series: The slices that it was made from, if it came as DICOM.
    """

    warnings: tuple[str, ...] = ()
    series: Series | None = None


def scan_of(found: Volume, warnings: tuple[str, ...] = (), series: Series | None = None) -> Scan:
    """A volume as a scan, with what is known of it; no voxels are copied."""
    return Scan(
        found.voxels,
        found.spacing_mm,
        found.origin_mm,
        found.direction,
        found.nifti_header,
        warnings,
        series,
    )


def read(path: str | Path) -> Scan:
    """Read an ``.mha``, ``.mhd``, ``.nrrd``, ``.nii`` or ``.nii.gz`` file, or a DICOM folder.

    Of a folder the series is taken that is the head CT; what was left out stands in the warnings.

    Raises:
        InputError: It is missing, of another type, damaged, or no finite 3D volume.
    """
    return read_scan(Path(path))


def in_hu(scan: Scan, name: Path | str) -> Scan:
    """The scan in HU, with warnings about its values and its size, see ``plausibility.check``.

    Raises:
        InputError: It is no head CT in HU.
    """
    checked, more = plausibility.check(scan, name)
    return dataclasses.replace(scan, voxels=checked.voxels, warnings=scan.warnings + more)


def read_scan(
    path: Path,
    check_size: Callable[[int], object] = lambda _: None,
    study: str = "",
    *,
    follow_links: bool = False,
) -> Scan:
    """Read a file of one volume, or a folder of DICOM slices.

    Args:
        path: The file or folder.
        check_size: Given the number of voxels as headers say, before any is read; may raise.
        study: The UID of the study that is meant, where a folder holds several.
        follow_links: Whether links in a folder are followed wherever they lead.

    Raises:
        InputError: It is missing, of another type, damaged, or no finite 3D volume.
    """
    if path.is_dir():
        series = find_series(path, study, follow_links=follow_links)
        check_size(voxel_count(series))
        return scan_of(read_series(series), series.warnings, series)
    check_size(math.prod(volume.stored_shape(path)))
    found = volume.read(path)
    warnings = tuple(_about_nifti(found.nifti_header) if found.nifti_header else ())
    if not volume.has_frame(path):
        warnings = ("its header does not say how the head lies; " + _TAKEN,)
    return scan_of(found, warnings)


def _about_nifti(header: bytes) -> Iterator[str]:
    """What is odd about where a NIfTI header puts the volume."""
    apart_mm = nifti.frames_differ(header)
    if apart_mm > SAME_FRAME_MM:
        yield (
            f"its sform and qform put a corner {apart_mm:.1f} mm apart; sizes and places are "
            "as ITK reads them, and the mask has the same header"
        )
    if not nifti.has_frame(header):
        yield ("neither sform nor qform says how the head lies; " + _TAKEN)
    if (factor := nifti.mm_per_unit(header)) != 1:
        yield f"its header says sizes in {'metres' if factor > 1 else 'micrometres'}, read so"
