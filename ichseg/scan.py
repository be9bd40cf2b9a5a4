"""A scan as it was found: its volume, and what a reader of the result should know about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ichseg import headers, volume
from ichseg.volume import Volume

_SAME_FRAME_MM = 0.5  # writers round differently; a voxel is rarely smaller


@dataclass(frozen=True, slots=True)
class Scan:
    """What was read.

    Attributes:
        volume: On a straight grid.
        warnings: About the file.
    """

    volume: Volume
    warnings: tuple[str, ...] = ()


def read(path: Path) -> Scan:
    """Read an ``.mha``, ``.nii`` or ``.nii.gz`` file.

    Raises:
        InputError: The file is missing, of another type, damaged, or no finite 3D volume.
    """
    found = volume.read(path)
    warnings = []
    if found.nifti_header is not None:
        apart_mm = headers.frames_differ(found.nifti_header)
        if apart_mm > _SAME_FRAME_MM:
            warnings.append(
                f"its sform and qform put a corner {apart_mm:.1f} mm apart; sizes and places are "
                "as ITK reads them, and the mask has the same header"
            )
    return Scan(found, tuple(warnings))
