"""A scan as it was found: its volume, and what a reader of the result should know about it."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def read_scan(path: Path, check_size: Callable[[int], object] = lambda _: None) -> Scan:
    """Read an ``.mha``, ``.nii`` or ``.nii.gz`` file, or a folder of DICOM slices.

    Args:
        path: The file or folder.
        check_size: Given the number of voxels as headers say, before any is read; may raise.

    Raises:
        InputError: It is missing, of another type, damaged, or no finite 3D volume.
    """
    if path.is_dir():
        series = find_series(path)
        check_size(voxel_count(series))
        return Scan(read_series(series), series.warnings, series)
    check_size(math.prod(volume.stored_shape(path)))
    found = volume.read(path)
    warnings = []
    if found.nifti_header is not None:
        apart_mm = nifti.frames_differ(found.nifti_header)
        if apart_mm > _SAME_FRAME_MM:
            warnings.append(
                f"its sform and qform put a corner {apart_mm:.1f} mm apart; sizes and places are "
                "as ITK reads them, and the mask has the same header"
            )
    return Scan(found, tuple(warnings))
