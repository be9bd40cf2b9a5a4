"""What every kind of volume file has: a header that says where its voxels are, and their bytes.

Bytes come in pieces of at most a megabyte, inflated as they are read and counted before they are
kept, so that a file that lies about its size is found out before memory is taken for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from zlib_ng import zlib_ng  # inflates in less than half of zlib's time

MOST_VOXELS = 1_000_000_000  # a head at 0.25 mm has 500 million
LONGEST_HEADER = 65_536  # bytes, of a header in letters
FARTHEST_MM = 1e5  # a size or a place beyond is damage
_PIECE = 1 << 20
_MOST_BEYOND = 16 * _PIECE  # what may follow the voxels of a NIfTI file
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a volume lies, as ``Volume`` has it: everything in the order ``(z, y, x)``.

    Attributes:
        spacing_mm: Sizes of a voxel.
        origin_mm: Where the first voxel is.
        direction: 3x3, row-major.
    """

    spacing_mm: tuple[float, ...]
    origin_mm: tuple[float, ...]
    direction: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """Where a file's voxels are and what they are.

    Attributes:
        shape: ``(z, y, x)`` or ``(channel, z, y, x)``.
        dtype: The type of the stored numbers, with their byte order.
        start: The byte at which voxels begin; in a compressed NIfTI file, after inflation.
        raw: The bytes of the header.
        packed: Whether the voxels of a MetaImage or NRRD are compressed.
        scale: The factor and summand that turn stored numbers into intensities; None for none.
        beside: The name of the file in the same folder that holds the voxels; empty for the file
            itself.
        place: Where the volume lies, if that was worked out; else ITK is asked.
        has_frame: Whether the header says how the patient lies; of NIfTI ask ``nifti.has_frame``.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    start: int
    raw: bytes
    packed: bool = False
    scale: tuple[float, float] | None = None
    beside: str = ""
    place: Place | None = None
    has_frame: bool = True

    @property
    def nbytes(self) -> int:
        """The number of bytes that the stored voxels take, uncompressed."""
        return math.prod(self.shape) * self.dtype.itemsize


class DamagedError(Exception):
    """What is wrong with a file, without its name."""


class OtherKindError(DamagedError):
    """The file may be sound, but is not of a kind that is read."""


def whole_number(word: str) -> int:
    """A whole number of a header, not negative and of at most nine digits.

    Raises:
        DamagedError: It is none.
    """
    if not (word.isascii() and word.isdecimal() and len(word) < 10):
        raise DamagedError(f"{word[:20]!r} where a number is expected")
    return int(word)


def number(word: str) -> float:
    """A number of a header; it may be infinite or NaN.

    Raises:
        DamagedError: It is none.
    """
    try:
        return float(word)
    except ValueError:
        raise DamagedError(f"{word[:20]!r} where a number is expected") from None


def checked_shape(size: list[int]) -> tuple[int, ...]:
    """A file's size ``(x, y, z)`` or ``(x, y, z, channel)`` as the shape of an array.

    Raises:
        OtherKindError: It has other than three or four axes, or too many voxels.
        DamagedError: An axis is empty.
    """
    if len(size) not in (3, 4):
        raise OtherKindError(f"{len(size)}D image of size {tuple(size)}, expected a 3D volume")
    if min(size) < 1:
        raise DamagedError(f"empty volume of size {tuple(size)}")
    if math.prod(size) > MOST_VOXELS:
        raise OtherKindError(
            f"{math.prod(size):,} voxels of size {tuple(size)}, expected at most {MOST_VOXELS:,}"
        )
    return tuple(size[::-1])


def read_pieces(stream: BinaryIO) -> Iterator[bytes]:
    """What is left of a file, in pieces."""
    while piece := stream.read(_PIECE):
        yield piece


def inflate(stream: BinaryIO) -> Iterator[bytes]:
    """Inflate zlib or gzip, of one or several members.

    Raises:
        DamagedError: The data are damaged, or end early.
    """
    try:
        yield from _inflated(stream)
    except zlib_ng.error as error:  # type: ignore[misc]  # its stub gives an instance
        raise DamagedError(str(error)) from error


def _inflated(stream: BinaryIO) -> Iterator[bytes]:
    inflater = zlib_ng.decompressobj(zlib_ng.MAX_WBITS | 32)
    left = b""
    while chunk := left or stream.read(_PIECE):
        if inflater.eof:  # another member, or zeros that pad the file
            if not chunk.strip(b"\0"):
                left = b""
                continue
            inflater = zlib_ng.decompressobj(zlib_ng.MAX_WBITS | 32)
        piece = inflater.decompress(chunk, _PIECE)
        left = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
        if piece:
            yield piece
    while not inflater.eof:
        piece = inflater.decompress(b"", _PIECE)
        if not piece and not inflater.eof:
            raise DamagedError("the compressed voxels end early")
        yield piece


def inflate_if_gzip(stream: BinaryIO) -> Iterator[bytes]:
    """A file from its beginning, inflated if it is gzip, whatever its name."""
    start = stream.read(2)
    stream.seek(0)
    yield from inflate(stream) if start == _GZIP else read_pieces(stream)


def skip(pieces: Iterator[bytes], start: int) -> Iterator[bytes]:
    """The pieces without their first ``start`` bytes."""
    for piece in pieces:
        if start < len(piece):
            yield piece[start:]
        start = max(0, start - len(piece))


def fill(voxels: bytearray, pieces: Iterator[bytes], *, exact: bool) -> None:
    """Fill ``voxels`` to the last byte; all pieces are taken, since the last proves a checksum.

    Args:
        voxels: What is filled.
        pieces: The bytes of a file from the first voxel on.
        exact: Whether nothing may follow the voxels.

    Raises:
        DamagedError: There are fewer bytes, or more.
    """
    filled = beyond = 0
    for piece in pieces:
        part = piece[: len(voxels) - filled]
        voxels[filled : filled + len(part)] = part
        filled += len(part)
        beyond += len(piece) - len(part)
        if beyond > (0 if exact else _MOST_BEYOND):
            raise DamagedError(f"more voxels than the {len(voxels)} bytes that its header says")
    if filled < len(voxels):
        raise DamagedError(f"{filled} bytes of voxels, its header says {len(voxels)}")
