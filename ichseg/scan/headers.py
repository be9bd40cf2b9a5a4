"""What a volume's file says of itself, held against what is in it: before any library sees it.

Type, size and length are checked before memory is taken, compressed voxels are counted as they
inflate, and nothing outside the file is read, whatever its header asks for. The voxels are read
here as well, since ITK's libraries fill what is missing with zeros, follow ``ElementDataFile`` to
other files, and fail by signal on some headers.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError

MOST_VOXELS = 1_000_000_000  # a head at 0.25 mm has 500 million
NIFTI1_HEADER = 348
_NIFTI1_DATA = 352  # where voxels begin at the earliest: four bytes speak of extensions
_LONGEST_TEXT = 65_536  # of an MHA header
_CHUNK = 1 << 20
_FARTHEST_MM = 1e5
_GZIP = b"\x1f\x8b"
NIFTI_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
    256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
# Without MET_LONG and MET_ULONG, which are of 4 or 8 bytes according to who wrote the file.
MHA_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """Where a file's voxels are and what they are.

    Attributes:
        shape: ``(z, y, x)`` or ``(channel, z, y, x)``.
        dtype: As stored, with byte order.
        start: Byte at which they begin; of a compressed NIfTI file after inflation.
        packed: Whether the voxels of an MHA are compressed.
        scale: Factor and summand that make intensities of them; None for none.
        raw: The 348 bytes of a NIfTI-1 header, else empty.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    start: int
    packed: bool = False
    scale: tuple[float, float] | None = None
    raw: bytes = b""

    @property
    def nbytes(self) -> int:
        """Of the voxels."""
        return math.prod(self.shape) * self.dtype.itemsize


class _FaultError(Exception):
    """What is wrong with a file, without its name."""


class _OtherKindError(_FaultError):
    """A sound file, perhaps, but not of a kind that is read."""


def read_header(path: Path, suffix: str) -> Header:
    """Check a file's header; no voxels are read.

    Args:
        path: An existing file.
        suffix: ``.mha``, ``.nii`` or ``.nii.gz``.

    Raises:
        InputError: It is not such a file, or a volume of a kind that is not read.
    """
    try:
        with path.open("rb") as stream:
            return _mha(stream) if suffix == ".mha" else _nifti(_inflated(stream))
    except (OSError, EOFError, zlib.error, _FaultError) as error:
        raise _damaged(path, suffix, error) from error


def read_voxels(path: Path, suffix: str, header: Header) -> npt.NDArray[np.generic]:
    """The voxels in the machine's byte order, scaled, of the header's shape.

    Raises:
        InputError: There are fewer than the header says, or more, or a checksum does not hold.
    """
    # bytearray: a file that lies about its length is found out before this is filled
    voxels = bytearray(header.nbytes)
    try:
        with path.open("rb") as stream:
            if suffix == ".mha":
                stream.seek(header.start)
                pieces = _inflate(stream) if header.packed else _plain(stream)
            else:
                pieces = _skip(_inflated(stream), header.start)
            _fill(voxels, pieces, exact=suffix == ".mha")
    except (OSError, EOFError, zlib.error, _FaultError) as error:
        raise _damaged(path, suffix, error) from error
    stored = np.frombuffer(voxels, header.dtype).reshape(header.shape)
    native = stored.astype(header.dtype.newbyteorder("="), copy=False)
    if header.scale is None:
        return native
    slope, inter = header.scale
    return native.astype(np.float32) * slope + inter


def is_whole(path: Path, suffix: str, nbytes: int) -> bool:
    """Whether a file that ITK has just written holds so many bytes of voxels.

    On a full disk ITK leaves the end away, and says nothing if that was in a last buffer.
    """
    found = 0
    try:
        with path.open("rb") as stream:
            if suffix == ".mha":
                text = stream.read(_LONGEST_TEXT)
                text = text[: text.index(b"\n", text.index(b"ElementDataFile")) + 1]
                stream.seek(len(text))
                packed = b"CompressedData = True" in text
                pieces = _inflate(stream) if packed else _plain(stream)
            else:
                pieces = _skip(_inflated(stream), _NIFTI1_DATA)
            for piece in pieces:
                found += len(piece)
    except (EOFError, ValueError, zlib.error):
        return False
    return found == nbytes


def frames_differ(raw: bytes) -> float:
    """How far apart a NIfTI-1 header's two frames, sform and qform, put a corner, in mm.

    0 unless both are given.
    """
    end = _endian(raw)
    qcode, scode = struct.unpack_from(end + "hh", raw, 252)
    if qcode <= 0 or scode <= 0:
        return 0.0
    size = np.array(struct.unpack_from(end + "3h", raw, 42), float) - 1
    qfac, *pixdim = struct.unpack_from(end + "4f", raw, 76)
    b, c, d, *offset = struct.unpack_from(end + "6f", raw, 256)
    a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    turn = np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ])  # fmt: skip
    steps = np.array(pixdim) * (1, 1, -1 if qfac < 0 else 1)
    rows = np.array(struct.unpack_from(end + "12f", raw, 280)).reshape(3, 4)
    corners = np.array(np.meshgrid(*([0, 1],) * 3)).reshape(3, -1) * size[:, None]
    first = (turn * steps) @ corners + np.array(offset)[:, None]
    second = rows[:, :3] @ corners + rows[:, 3:]
    distance = np.sqrt(((first - second) ** 2).sum(0)).max()
    return float(distance) if np.isfinite(distance) else math.inf


def _mha(stream: BinaryIO) -> Header:
    """MetaImage with its voxels in the same file."""
    text = stream.read(_LONGEST_TEXT)
    fields: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in fields:
        end = text.find(b"\n", start)
        if end < 0:
            raise _FaultError("no MetaImage header")
        key, equals, value = text[start:end].decode("latin-1").partition("=")
        if not equals or key.strip() in fields:
            raise _FaultError(f"no MetaImage header: line {text[start : min(end, start + 40)]!r}")
        fields[key.strip()] = value.strip()
        start = end + 1
    return _mha_header(fields, start)


def _mha_header(fields: dict[str, str], start: int) -> Header:
    where = fields["ElementDataFile"]
    if where != "LOCAL":
        raise _OtherKindError(
            f"its voxels are in {where[:80]!r}, expected in the file itself (LOCAL)"
        )
    if fields.get("ObjectType", "Image") != "Image" or _flag(fields, "BinaryData", True) is False:
        raise _OtherKindError("not a binary MetaImage")
    if fields.get("HeaderSize", "0") not in ("0", "-1"):
        raise _OtherKindError(f"HeaderSize {fields['HeaderSize'][:20]}, expected none")
    channels = fields.get("ElementNumberOfChannels", "1")
    if channels != "1":
        raise _OtherKindError(f"{channels[:20]} components per voxel, expected a scalar volume")
    kind = fields.get("ElementType", "none")
    if kind not in MHA_TYPES:
        raise _OtherKindError(f"element type {kind[:20]}, expected one of {', '.join(MHA_TYPES)}")
    axes = _integer(fields.get("NDims", ""))
    size = [_integer(word) for word in fields.get("DimSize", "").split()]
    if len(size) != axes:
        raise _FaultError(f"NDims {axes} with DimSize {fields.get('DimSize', '')[:60]!r}")
    big = _flag(fields, "BinaryDataByteOrderMSB", _flag(fields, "ElementByteOrderMSB", False))
    return Header(
        shape=_shape(size),
        dtype=np.dtype((">" if big else "<") + MHA_TYPES[kind]),
        start=start,
        packed=_flag(fields, "CompressedData", False),
    )


def _nifti(pieces: Iterator[bytes]) -> Header:
    """NIfTI-1 with header and voxels in one file."""
    raw = b""
    while len(raw) < NIFTI1_HEADER:
        piece = next(pieces, b"")
        if not piece:
            break
        raw += piece
    raw = raw[:NIFTI1_HEADER]
    if raw[4:8] in (b"n+2\0", b"ni2\0"):
        raise _OtherKindError("NIfTI-2, expected NIfTI-1")
    if len(raw) < NIFTI1_HEADER or raw[344:348] != b"n+1\0":
        raise _FaultError("no NIfTI-1 header")
    end = _endian(raw)
    if struct.unpack_from(end + "i", raw, 0)[0] != NIFTI1_HEADER:
        raise _FaultError("no NIfTI-1 header: its length is not 348")
    axes, *dims = struct.unpack_from(end + "8h", raw, 40)
    datatype, bits = struct.unpack_from(end + "hh", raw, 70)
    offset, slope, inter = struct.unpack_from(end + "fff", raw, 108)
    if datatype not in NIFTI_TYPES:
        raise _OtherKindError(f"NIfTI datatype {datatype}, expected one real number per voxel")
    dtype = np.dtype(end + NIFTI_TYPES[datatype])
    if bits != 8 * dtype.itemsize:
        raise _FaultError(
            f"NIfTI datatype {datatype} of {bits} bits, expected {8 * dtype.itemsize}"
        )
    if axes == 5 and dims[4] > 1:  # where NIfTI puts vectors
        raise _OtherKindError(f"{dims[4]} components per voxel, expected a scalar volume")
    if not 1 <= axes <= 7 or any(n != 1 for n in dims[4:axes]):
        raise _OtherKindError(f"{axes} axes of {dims}, expected 3")
    start = int(offset) if math.isfinite(offset) else _NIFTI1_DATA
    if start > _LONGEST_TEXT * 16 or start < 0:
        raise _FaultError(f"voxels from byte {start}, expected {_NIFTI1_DATA}")
    _check_place(raw, end)
    scaled = math.isfinite(slope) and slope != 0  # 0 is the standard's word for "not scaled"
    inter = inter if math.isfinite(inter) else 0.0
    return Header(
        shape=_shape(dims[: 3 if axes > 3 and dims[3] == 1 else min(axes, 4)]),
        dtype=dtype,
        start=max(start, NIFTI1_HEADER),
        scale=(slope, inter) if scaled and (slope, inter) != (1, 0) else None,
        raw=raw,
    )


def _check_place(raw: bytes, end: str) -> None:
    """Numbers that can be a place in a patient: on others ITK's decomposition never ends."""
    qcode, scode = struct.unpack_from(end + "hh", raw, 252)
    used = [*struct.unpack_from(end + "3f", raw, 80)]
    if qcode > 0:
        used += struct.unpack_from(end + "6f", raw, 256)
    if scode > 0:
        used += struct.unpack_from(end + "12f", raw, 280)
    odd = [value for value in used if not abs(value) <= _FARTHEST_MM]  # NaN is not, either
    if odd:
        raise _FaultError(f"{odd[0]:g} mm as a size or place, expected up to {_FARTHEST_MM:g}")


def place_only(raw: bytes) -> bytes:
    """A checked NIfTI-1 header without the frames that are not in use, which may hold anything."""
    end = _endian(raw)
    qcode, scode = struct.unpack_from(end + "hh", raw, 252)
    shown = bytearray(raw)
    if qcode <= 0:
        shown[256:280] = bytes(24)
    if scode <= 0:
        shown[280:328] = bytes(48)
    return bytes(shown)


def _shape(size: list[int]) -> tuple[int, ...]:
    """In this project's order; three or four axes that an array can have."""
    if len(size) not in (3, 4):
        raise _OtherKindError(f"{len(size)}D image of size {tuple(size)}, expected a 3D volume")
    if min(size) < 1:
        raise _FaultError(f"empty volume of size {tuple(size)}")
    if math.prod(size) > MOST_VOXELS:
        raise _OtherKindError(
            f"{math.prod(size):,} voxels of size {tuple(size)}, expected at most {MOST_VOXELS:,}"
        )
    return tuple(size[::-1])


def _integer(word: str) -> int:
    if not (word.isascii() and word.isdecimal() and len(word) < 10):
        raise _FaultError(f"{word[:20]!r} where a number is expected")
    return int(word)


def _flag(fields: dict[str, str], key: str, default: bool) -> bool:
    value = fields.get(key, str(default)).lower()
    if value not in ("true", "false", "0", "1"):
        raise _FaultError(f"{key} {value[:20]!r}, expected True or False")
    return value in ("true", "1")


def _endian(raw: bytes) -> str:
    return "<" if struct.unpack_from("<i", raw, 0)[0] == NIFTI1_HEADER else ">"


def _inflated(stream: BinaryIO) -> Iterator[bytes]:
    """A file in pieces, inflated if it is gzip, whatever its name."""
    start = stream.read(2)
    stream.seek(0)
    yield from _inflate(stream) if start == _GZIP else _plain(stream)


def _plain(stream: BinaryIO) -> Iterator[bytes]:
    while piece := stream.read(_CHUNK):
        yield piece


def _inflate(stream: BinaryIO) -> Iterator[bytes]:
    """Zlib or gzip, of one or several members, in pieces of at most a megabyte."""
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    left = b""
    while chunk := left or stream.read(_CHUNK):
        if inflater.eof:  # another member, or zeros that pad the file
            if not chunk.strip(b"\0"):
                left = b""
                continue
            inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
        piece = inflater.decompress(chunk, _CHUNK)
        left = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
        if piece:
            yield piece
    while not inflater.eof:
        piece = inflater.decompress(b"", _CHUNK)
        if not piece and not inflater.eof:
            raise EOFError("the compressed voxels end early")
        yield piece


def _skip(pieces: Iterator[bytes], start: int) -> Iterator[bytes]:
    for piece in pieces:
        if start < len(piece):
            yield piece[start:]
        start = max(0, start - len(piece))


def _fill(voxels: bytearray, pieces: Iterator[bytes], *, exact: bool) -> None:
    """Fill to the last byte; all pieces are taken, since the last one proves a checksum."""
    filled = beyond = 0
    for piece in pieces:
        part = piece[: len(voxels) - filled]
        voxels[filled : filled + len(part)] = part
        filled += len(part)
        beyond += len(piece) - len(part)
        if beyond > (0 if exact else 16 * _CHUNK):
            raise _FaultError(f"more voxels than the {len(voxels)} bytes that its header says")
    if filled < len(voxels):
        raise _FaultError(f"{filled} bytes of voxels, its header says {len(voxels)}")


def _damaged(path: Path, suffix: str, reason: object) -> InputError:
    if isinstance(reason, _OtherKindError):
        return InputError(f"{path}: {reason}")
    return InputError(f"{path}: damaged or not a {suffix} volume ({reason})")
