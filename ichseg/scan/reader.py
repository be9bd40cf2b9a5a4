"""A scan as it was found: its volume, and what a reader of the result should know about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ichseg.scan import nifti, volume
from ichseg.scan.dicom.series import Series, find_series, read_series, voxel_count
from ichseg.scan.volume import Volume

_SAME_FRAME_MM = 0.5  # writers round differently; a voxel is rarely smaller


@dataclass(frozen=True, slots=True)
class Scan:
    """A volume with what is known of where it came from.

    Attributes:
        volume: The voxels, on a straight grid.
        warnings: What a reader of the result should know about the file.
        series: The slices that it was made from, if it came as DICOM.
    """

    volume: Volume
    warnings: tuple[str, ...] = ()
    series: Series | None = None


def read_scan(
    path: Path, check_size: Callable[[int], object] = lambda _: None, study: str = ""
) -> Scan:
    """Read an ``.mha``, ``.nii`` or ``.nii.gz`` file, or a folder of DICOM slices.

    Args:
        path: The file or folder.
        check_size: Given the number of voxels as headers say, before any is read; may raise.
        study: The UID of the study that is meant, where a folder holds several.

    Raises:
        InputError: It is missing, of another type, damaged, or no finite 3D volume.
    """
    if path.is_dir():
        series = find_series(path, study)
        check_size(voxel_count(series))
        return Scan(read_series(series), series.warnings, series)
    check_size(math.prod(volume.stored_shape(path)))
    found = volume.read(path)
    return Scan(found, tuple(_about_nifti(found.nifti_header) if found.nifti_header else ()))


def _about_nifti(header: bytes) -> Iterator[str]:
    """What is odd about where a NIfTI header puts the volume."""
    apart_mm = nifti.frames_differ(header)
    if apart_mm > _SAME_FRAME_MM:
        yield (
            f"its sform and qform put a corner {apart_mm:.1f} mm apart; sizes and places are "
            "as ITK reads them, and the mask has the same header"
        )
    if not nifti.has_frame(header):
        yield (
            "neither sform nor qform says how the head lies; taken was the first axis from right "
            "to left, the second from front to back, the third from below to above"
        )
    if (factor := nifti.mm_per_unit(header)) != 1:
        yield f"its header says sizes in {'metres' if factor > 1 else 'micrometres'}, read so"
