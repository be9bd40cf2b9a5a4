"""A case's volumes as a script, which a page can load from disk where it may load nothing else.

Browsers let a page from ``file://`` read no other file, but run scripts and show pictures beside
it. So each volume is a gzipped NIfTI file in base64, the argument of a function call.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ichseg.report.framing import Framed, Labels

MOST_BYTES = 8_000_000  # of the script
MOST_VOXELS = 16_000_000  # what gzip could still bring below that
_HU_RANGE = (-1024, 3071)  # lowest and highest that are kept
# Outside these HU are kept to a multiple of 8: air and bone are looked at in windows so wide that
# a grey level is more, and noise takes most of the room.
_FINE_HU = (-200, 300)
_COARSE_STEP = 8
_STEPS = 4095  # that other intensities are kept in
_INT16, _UINT8 = (4, 16), (2, 8)  # NIfTI datatype and bits


@dataclass(frozen=True, slots=True)
class Script:
    """A case for the viewer.

    Attributes:
        text: The script itself, ASCII.
        merged: How many voxels along ``(z, y, x)`` were made one to keep it small.
    """

    text: str
    merged: tuple[int, int, int]


def make_script(framed: Framed, slug: str, *, is_ct: bool) -> Script:
    """Make the script that hands a case's volumes to the page.

    Where it would be larger than ``MOST_BYTES``, voxels are merged, two by two along the axes on
    which they are smallest: intensities to their mean, labels to their largest, so that no bleed is
    lost.

    Args:
        framed: The part of the scan that is shown.
        slug: The case's name in the page's files.
        is_ct: Whether intensities are HU, and kept as they are; else they are scaled.
    """
    merged = np.array([1, 1, 1])
    while True:
        size = np.prod(np.ceil(np.array(framed.image.shape) / merged))
        if size <= MOST_VOXELS:
            text = _write(framed, slug, merged, is_ct=is_ct)
            if len(text) <= MOST_BYTES:
                return Script(text, (int(merged[0]), int(merged[1]), int(merged[2])))
        room = np.array(framed.image.shape) > merged
        sizes_mm = np.where(room, np.array(framed.spacing_mm) * merged, np.inf)
        merged[sizes_mm <= 1.01 * sizes_mm.min()] *= 2


def _write(framed: Framed, slug: str, merged: npt.NDArray[np.int64], *, is_ct: bool) -> str:
    """Write the script with ``merged`` voxels along ``(z, y, x)`` made one."""
    image = _merge_mean(framed.image, merged)
    affine = framed.affine.copy()
    affine[:3, 3] += framed.affine[:3, :3] @ ((merged[::-1] - 1) / 2)
    affine[:3, :3] *= merged[::-1]
    slope = inter = 0.0
    stored = np.empty(image.shape, "<i2")
    if not is_ct:
        low, high = float(image.min()), float(image.max())
        slope, inter = (high - low) / _STEPS or 1.0, low
    for plane, kept in zip(image, stored, strict=True):
        kept[:] = _coarse_hu(plane) if is_ct else np.rint((plane - inter) / slope)
    del image  # its memory is of use to what follows
    volumes: dict[str, str] = {"image": _nifti(stored, affine, _INT16, slope, inter)}
    for name, labels in framed.masks.items():
        volumes[name] = _nifti(_merge_largest(labels, merged), affine, _UINT8)
    return f"ichsegCase({json.dumps(slug)}, {json.dumps(volumes)});\n"


def _coarse_hu(hu: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """HU in whole numbers, those of air and bone in steps."""
    hu = np.clip(hu, *_HU_RANGE)
    fine = (hu >= _FINE_HU[0]) & (hu <= _FINE_HU[1])
    return np.where(fine, np.rint(hu), np.rint(hu / _COARSE_STEP) * _COARSE_STEP)


def _nifti(
    voxels: npt.NDArray[np.generic],
    affine: npt.NDArray[np.float64],
    datatype: tuple[int, int],
    slope: float = 0.0,
    inter: float = 0.0,
) -> str:
    """A gzipped NIfTI-1 file in base64; without name and time, so the same bytes each time."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *voxels.shape[::-1], 1, 1, 1, 1)
    struct.pack_into("<hh", header, 70, *datatype)
    struct.pack_into("<4f", header, 76, 1.0, *np.linalg.norm(affine[:3, :3], axis=0))
    struct.pack_into("<fff", header, 108, 352.0, slope, inter)
    header[123] = 2  # mm
    struct.pack_into("<hh", header, 252, 0, 1)  # no qform; the sform is of the scanner
    struct.pack_into("<12f", header, 280, *affine[:3].ravel())
    header[344:348] = b"n+1\0"
    content = bytes(header) + np.ascontiguousarray(voxels).tobytes()
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii")


def _merge_mean(
    voxels: npt.NDArray[np.generic], merged: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """The mean of each block of ``merged`` voxels; those at the far faces may be smaller.

    Slab by slab: of a large scan no copy is made.
    """
    merged_planes = []
    for start in range(0, len(voxels), merged[0]):
        slab = voxels[start : start + merged[0]].astype(np.float32)
        for axis, count in enumerate(merged):
            if count > 1:
                starts = np.arange(0, slab.shape[axis], count)
                lengths = np.diff(np.append(starts, slab.shape[axis]))
                shape = [-1 if a == axis else 1 for a in range(3)]
                sums = np.add.reduceat(slab, starts, axis)
                slab = (sums / lengths.reshape(shape)).astype(np.float32)
        merged_planes.append(slab)
    return np.concatenate(merged_planes)


def _merge_largest(labels: Labels, merged: npt.NDArray[np.int64]) -> Labels:
    """The largest label of each block of ``merged`` voxels."""
    for axis, count in enumerate(merged):
        if count > 1:
            starts = np.arange(0, labels.shape[axis], count)
            labels = np.maximum.reduceat(labels, starts, axis)
    return labels
