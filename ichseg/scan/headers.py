"""What a volume's file says of itself, held against what is in it: before any library sees it.

Type, size and length are checked before memory is taken, compressed voxels are counted as they
inflate, and nothing outside the file is read, whatever its header asks for, but for the voxels of
an ``.mhd``, which lie in a file in the same folder. The voxels are read
here as well, since ITK's libraries fill what is missing with zeros, follow ``ElementDataFile`` to
other files, and fail by signal on some headers. Each kind of header has a file of its own:
``metaimage``, ``nifti``, ``nrrd``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError
from ichseg.files import NIFTI_SUFFIXES
from ichseg.scan import metaimage, nifti, nrrd, stored
from ichseg.scan.stored import DamagedError, Header, OtherKindError

_READING_FAILS = (OSError, DamagedError)


def read_header(path: Path, suffix: str) -> Header:
    """Check a file's header; no voxels are read.

    Args:
        path: An existing file.
        suffix: One of ``files.SCAN_SUFFIXES``.

    Raises:
        InputError: It is not such a file, or a volume of a kind that is not read.
    """
    try:
        with path.open("rb") as stream:
            if suffix in (".mha", ".mhd"):
                return metaimage.parse_header(stream, detached=suffix == ".mhd")
            if suffix == ".nrrd":
                return nrrd.parse_header(stream)
            return nifti.parse_header(stored.inflate_if_gzip(stream))
    except _READING_FAILS as error:
        raise damaged(path, suffix, error) from error


def read_voxels(path: Path, suffix: str, header: Header) -> npt.NDArray[np.generic]:
    """The voxels in the machine's byte order, scaled, of the header's shape.

    Raises:
        InputError: There are fewer than the header says, or more, or a checksum does not hold.
    """
    # bytearray: a file that lies about its length is found out before this is filled
    voxels = bytearray(header.nbytes)
    try:
        with (_beside(path, header) if header.beside else path).open("rb") as stream:
            pieces = _voxel_pieces(stream, suffix, header.start, header.packed)
            stored.fill(voxels, pieces, exact=suffix not in NIFTI_SUFFIXES)
    except _READING_FAILS as error:
        raise damaged(path, suffix, error) from error
    numbers = np.frombuffer(voxels, header.dtype).reshape(header.shape)
    native = numbers.astype(header.dtype.newbyteorder("="), copy=False)
    if header.scale is None:
        return native
    slope, inter = header.scale
    return native.astype(np.float32) * slope + inter


def voxels_beside(path: Path) -> Path | None:
    """The file that holds the voxels of an ``.mhd``; None if its header does not say."""
    try:
        header = read_header(path, ".mhd")
    except InputError:
        return None
    return path.parent / header.beside if header.beside else None


def is_whole(path: Path, suffix: str, nbytes: int) -> bool:
    """Whether a file that ITK has just written holds so many bytes of voxels.

    On a full disk ITK leaves the end away, and says nothing if that was in a last buffer.
    """
    found = 0
    try:
        with path.open("rb") as stream:
            start, packed = nifti.VOXELS_AT, False
            if suffix == ".nrrd":
                header = nrrd.parse_header(stream)
                start, packed = header.start, header.packed
            elif suffix == ".mha":
                text = stream.read(stored.LONGEST_HEADER)
                start = text.index(b"\n", text.index(b"ElementDataFile")) + 1
                packed = b"CompressedData = True" in text[:start]
                stream.seek(0)
            for piece in _voxel_pieces(stream, suffix, start, packed):
                found += len(piece)
    except (ValueError, DamagedError):
        return False
    return found == nbytes


def _voxel_pieces(stream: BinaryIO, suffix: str, start: int, packed: bool) -> Iterator[bytes]:
    """The bytes of the voxels, inflated, from a stream at its beginning."""
    if suffix in NIFTI_SUFFIXES:
        return stored.skip(stored.inflate_if_gzip(stream), start)
    stream.seek(start)
    return stored.inflate(stream) if packed else stored.read_pieces(stream)


def _beside(path: Path, header: Header) -> Path:
    """The file in the same folder that holds the voxels of a header.

    Raises:
        DamagedError: It is not there, or is a link that leads out of the folder.
    """
    home = path.resolve().parent
    voxels = home / header.beside
    if not voxels.is_file():
        raise DamagedError(f"its voxels are in {header.beside[:80]!r}, which is not there")
    if voxels.resolve().parent != home:
        raise OtherKindError(
            f"its voxels are in {header.beside[:80]!r}, a link that leads out of the folder"
        )
    return voxels


def damaged(path: Path, suffix: str, reason: object) -> InputError:
    """The error for a file that cannot be read for this reason."""
    if isinstance(reason, OtherKindError):
        return InputError(f"{path}: {reason}")
    return InputError(f"{path}: damaged or not a {suffix} volume ({reason})")
