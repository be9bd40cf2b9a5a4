"""The header of a NIfTI-1 file with its voxels in the same file (``.nii``, ``.nii.gz``).

Byte offsets are those of the standard's ``nifti1.h``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ichseg.scan.stored import FARTHEST_MM, DamagedError, Header, OtherKindError, checked_shape
from ichseg.wording import times

HEADER_BYTES = 348
VOXELS_AT = 352  # at the earliest: four bytes speak of extensions
_MOST_EXTENSIONS = 1 << 20  # bytes before the voxels
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}  # metres and micrometres; all other codes are taken for mm
_SAME_LENGTH = 0.01  # a share; writers round
UINT8, FLOAT32 = 2, 16  # codes of the stored numbers
TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
    256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip


def parse_header(pieces: Iterator[bytes]) -> Header:
    """Read and check the header, the first bytes of a file; no more pieces are taken than needed.

    Raises:
        DamagedError: It is no such header, or contradicts itself.
        OtherKindError: It is that of a volume of a kind that is not read.
    """
    raw = b""
    while len(raw) < HEADER_BYTES and (piece := next(pieces, b"")):
        raw += piece
    raw = raw[:HEADER_BYTES]
    if raw[4:8] in (b"n+2\0", b"ni2\0"):
        raise OtherKindError("NIfTI-2, expected NIfTI-1")
    if len(raw) < HEADER_BYTES or raw[344:348] != b"n+1\0":
        raise DamagedError("no NIfTI-1 header")
    end = endian(raw)
    if struct.unpack_from(end + "i", raw, 0)[0] != HEADER_BYTES:
        raise DamagedError(f"no NIfTI-1 header: its length is not {HEADER_BYTES}")
    offset, slope, inter = struct.unpack_from(end + "fff", raw, 108)
    start = int(offset) if math.isfinite(offset) else VOXELS_AT
    if not 0 <= start <= _MOST_EXTENSIONS:
        raise DamagedError(f"voxels from byte {start}, expected {VOXELS_AT}")
    shape, dtype = checked_shape(_size(raw, end)), _dtype(raw, end)
    _check_place(raw, end)
    scaled = math.isfinite(slope) and slope != 0  # 0 is the standard's word for "not scaled"
    inter = inter if math.isfinite(inter) else 0.0
    return Header(
        shape=shape,
        dtype=dtype,
        start=max(start, HEADER_BYTES),
        raw=raw,
        scale=(slope, inter) if scaled and (slope, inter) != (1, 0) else None,
    )


def _dtype(raw: bytes, end: str) -> np.dtype[np.generic]:
    """The type of the stored numbers."""
    datatype, bits = struct.unpack_from(end + "hh", raw, 70)
    if datatype not in TYPES:
        raise OtherKindError(f"NIfTI datatype {datatype}, expected one real number per voxel")
    dtype = np.dtype(end + TYPES[datatype])
    if bits != 8 * dtype.itemsize:
        raise DamagedError(
            f"NIfTI datatype {datatype} of {bits} bits, expected {8 * dtype.itemsize}"
        )
    return dtype


def _size(raw: bytes, end: str) -> list[int]:
    """The three or four axes that count; a fourth of length 1 does not."""
    axes, *dims = struct.unpack_from(end + "8h", raw, 40)
    if axes == 5 and dims[4] > 1:  # where NIfTI puts vectors
        raise OtherKindError(f"{dims[4]} components per voxel, expected a scalar volume")
    if not 1 <= axes <= 7 or any(n != 1 for n in dims[4:axes]):
        raise OtherKindError(f"{axes} axes of {dims}, expected 3")
    return list(dims[: 3 if axes > 3 and dims[3] == 1 else min(axes, 4)])


def _check_place(raw: bytes, end: str) -> None:
    """Refuse numbers that can be no place in a patient: on them ITK's decomposition never ends."""
    qcode, scode = _codes(raw, end)
    used = [*struct.unpack_from(end + "3f", raw, 80)]
    if qcode > 0:
        used += struct.unpack_from(end + "6f", raw, 256)
    if scode > 0:
        used += struct.unpack_from(end + "12f", raw, 280)
    used_mm = [value * mm_per_unit(raw) for value in used]
    if 0 in used[: min(3, len(_size(raw, end)))]:  # 1 mm for ITK, of a single slice too
        raise DamagedError(f"voxels of {times(used_mm[2::-1], 4)} mm, expected more than 0")
    odd = [value for value in used_mm if not abs(value) <= FARTHEST_MM]  # NaN is not, either
    if odd:
        raise DamagedError(f"{odd[0]:g} mm as a size or place, expected up to {FARTHEST_MM:g}")
    if scode > 0:
        _check_lengths(raw, end)


def _check_lengths(raw: bytes, end: str) -> None:
    """Refuse a header whose sform speaks of other voxels than its pixdim.

    ITK takes pixdim, others take the sform; nothing says which of them is right.
    """
    lengths = np.sqrt((_sform(raw, end)[0] ** 2).sum(0)) * mm_per_unit(raw)
    pixdim = np.abs(struct.unpack_from(end + "3f", raw, 80)) * mm_per_unit(raw)
    if np.any(abs(lengths - pixdim) > _SAME_LENGTH * pixdim):
        raise OtherKindError(
            f"voxels of {times(lengths[::-1], 4)} mm by its sform, of {times(pixdim[::-1], 4)} mm "
            "by its pixdim; expected one size"
        )


def mm_per_unit(raw: bytes) -> float:
    """The factor that turns a header's sizes and places into millimetres, by ``xyzt_units``."""
    return _MM_PER_UNIT.get(raw[123] & 7, 1.0)


def has_frame(raw: bytes) -> bool:
    """Whether a header says where in the patient the volume lies, by qform or sform."""
    return max(_codes(raw, endian(raw))) > 0


def _codes(raw: bytes, end: str) -> tuple[int, int]:
    """``qform_code`` and ``sform_code``; above 0 the frame is in use."""
    qcode, scode = struct.unpack_from(end + "hh", raw, 252)
    return qcode, scode


def place_only(raw: bytes) -> bytes:
    """A checked header without the frames that are not in use, which may hold anything."""
    qcode, scode = _codes(raw, endian(raw))
    shown = bytearray(raw)
    if qcode <= 0:
        shown[256:280] = bytes(24)
    if scode <= 0:
        shown[280:328] = bytes(48)
    return bytes(shown)


def frames_differ(raw: bytes) -> float:
    """How far apart a header's two frames, sform and qform, put a corner of the volume, in mm.

    0 unless both are in use.
    """
    end = endian(raw)
    if min(_codes(raw, end)) <= 0:
        return 0.0
    size = np.array(struct.unpack_from(end + "3h", raw, 42), float) - 1
    corners = np.array(np.meshgrid(*([0, 1],) * 3)).reshape(3, -1) * size[:, None]
    (first, start), (second, other_start) = _qform(raw, end), _sform(raw, end)
    apart = first @ corners + start[:, None] - second @ corners - other_start[:, None]
    distance = np.sqrt((apart**2).sum(0)).max() * mm_per_unit(raw)
    return float(distance) if np.isfinite(distance) else math.inf


Frame = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def _qform(raw: bytes, end: str) -> Frame:
    """A 3x3 matrix whose columns are the steps along x, y, z in mm, and the first voxel's place."""
    qfac, *pixdim = struct.unpack_from(end + "4f", raw, 76)
    b, c, d, *offset = struct.unpack_from(end + "6f", raw, 256)
    a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    turn = np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ])  # fmt: skip
    steps = np.array(pixdim) * (1, 1, -1 if qfac < 0 else 1)
    return turn * steps, np.array(offset)


def _sform(raw: bytes, end: str) -> Frame:
    """The same of the other frame."""
    rows = np.array(struct.unpack_from(end + "12f", raw, 280)).reshape(3, 4)
    return rows[:, :3], rows[:, 3]


def mask_header(raw: bytes) -> bytes:
    """A scan's header for its mask: other voxels, no scaling, and no text that names a patient."""
    return _other_voxels(raw, UINT8, slope=1.0)


def values_header(
    raw: bytes, size: Sequence[int], *, labels: int, datatype: int, slope: float
) -> bytes:
    """A header for other values in a scan's place.

    Args:
        raw: The scan's header, or one of another size with the same place.
        size: Voxels along x, y, z.
        labels: How many volumes the file holds; more than one are its fourth axis.
        datatype: The standard's code of the stored numbers.
        slope: The factor that turns them into values.
    """
    header = bytearray(_other_voxels(raw, datatype, slope))
    axes = (3, *size, 1, 1, 1, 1) if labels == 1 else (4, *size, labels, 1, 1, 1)
    struct.pack_into(endian(raw) + "8h", header, 40, *axes)  # dim
    struct.pack_into(endian(raw) + "4f", header, 92, 1.0, 1.0, 1.0, 1.0)  # pixdim beyond space
    return bytes(header)


def _other_voxels(raw: bytes, datatype: int, slope: float) -> bytes:
    """A header with numbers of another type, and no text that names a patient."""
    header = bytearray(raw)
    end = endian(raw)
    bits = 8 * np.dtype(TYPES[datatype]).itemsize
    struct.pack_into(end + "hh", header, 70, datatype, bits)  # datatype, bitpix
    struct.pack_into(end + "f", header, 108, float(VOXELS_AT))  # vox_offset
    struct.pack_into(end + "ff", header, 112, slope, 0.0)  # scl_slope, scl_inter
    struct.pack_into(end + "ff", header, 124, 0.0, 0.0)  # cal_max, cal_min
    header[4:32] = bytes(28)  # data_type, db_name
    header[148:228] = bytes(80)  # descrip
    header[228:252] = bytes(24)  # aux_file
    header[328:344] = bytes(16)  # intent_name
    return bytes(header)


def endian(raw: bytes) -> str:
    """The byte order of a header, as ``struct`` has it."""
    return "<" if struct.unpack_from("<i", raw, 0)[0] == HEADER_BYTES else ">"
