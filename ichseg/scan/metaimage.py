"""The header of a MetaImage: of ``.mha`` with its voxels, or of ``.mhd``, with them beside it."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from ichseg.scan.stored import (
    LONGEST_HEADER,
    DamagedError,
    Header,
    OtherKindError,
    checked_shape,
    number,
    whole_number,
)

# Without MET_LONG and MET_ULONG, which are of 4 or 8 bytes according to who wrote the file.
TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip

# Names of the field that says how the axes lie; without it ITK takes them for the patient's.
_DIRECTIONS = ("TransformMatrix", "Rotation", "Orientation")


def parse_header(stream: BinaryIO, *, detached: bool = False) -> Header:
    """Read and check the header; no voxels are read.

    Args:
        stream: A file at its beginning.
        detached: Whether its voxels may lie in a second file in the same folder.

    Raises:
        DamagedError: It is no such header, or contradicts itself.
        OtherKindError: It is that of a volume of a kind that is not read.
    """
    text = stream.read(LONGEST_HEADER)
    fields: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in fields:
        end = text.find(b"\n", start)
        if end < 0:
            raise DamagedError("no MetaImage header")
        key, equals, value = text[start:end].decode("latin-1").partition("=")
        if not equals or key.strip() in fields:
            raise DamagedError(f"no MetaImage header: line {text[start : min(end, start + 40)]!r}")
        fields[key.strip()] = value.strip()
        start = end + 1
    _refuse_other_kinds(fields, detached)
    axes = whole_number(fields.get("NDims", ""))
    size = [whole_number(word) for word in fields.get("DimSize", "").split()]
    if len(size) != axes:
        raise DamagedError(f"NDims {axes} with DimSize {fields.get('DimSize', '')[:60]!r}")
    where = fields["ElementDataFile"]
    big = _flag(fields, "BinaryDataByteOrderMSB", _flag(fields, "ElementByteOrderMSB", False))
    return Header(
        shape=checked_shape(size),
        dtype=np.dtype((">" if big else "<") + TYPES[fields["ElementType"]]),
        start=start if where == "LOCAL" else 0,
        raw=text[:start],
        packed=_flag(fields, "CompressedData", False),
        beside="" if where == "LOCAL" else where,
        has_frame=any(name in fields for name in _DIRECTIONS),
    )


def _refuse_other_kinds(fields: dict[str, str], detached: bool) -> None:
    """Refuse all but one number a voxel, binary, in one file, with voxels of a size in mm."""
    where = fields["ElementDataFile"]
    if detached and where != "LOCAL":
        _refuse_other_places(where)
    elif where != "LOCAL":
        raise OtherKindError(
            f"its voxels are in {where[:80]!r}, expected in the file itself (LOCAL)"
        )
    if fields.get("ObjectType", "Image") != "Image" or not _flag(fields, "BinaryData", True):
        raise OtherKindError("not a binary MetaImage")
    if fields.get("HeaderSize", "0") not in (("0", "-1") if where == "LOCAL" else ("0",)):
        raise OtherKindError(f"HeaderSize {fields['HeaderSize'][:20]}, expected none")
    channels = fields.get("ElementNumberOfChannels", "1")
    if channels != "1":
        raise OtherKindError(f"{channels[:20]} components per voxel, expected a scalar volume")
    if "ElementSpacing" not in fields and "ElementSize" not in fields:
        raise OtherKindError("no ElementSpacing, expected the size of its voxels in mm")
    unit = fields.get("DistanceUnits", "mm")
    if unit not in ("mm", "?"):
        raise OtherKindError(f"DistanceUnits {unit[:20]}, expected mm")
    for key, plain in (("Slope", 1.0), ("Offset", 0.0)):  # which ITK passes over
        word = fields.get(f"ElementToIntensityFunction{key}", str(plain))
        if number(word) != plain:
            raise OtherKindError(f"ElementToIntensityFunction{key} {word[:20]}, expected {plain:g}")
    kind = fields.get("ElementType", "none")
    if kind not in TYPES:
        raise OtherKindError(f"element type {kind[:20]}, expected one of {', '.join(TYPES)}")


def _refuse_other_places(where: str) -> None:
    """Refuse voxels that are not in one file in the header's own folder."""
    several = where.startswith("LIST") or "%" in where
    if several or not where or where in (".", "..") or not where.isprintable() or "/" in where:
        raise OtherKindError(
            f"its voxels are in {where[:80]!r}, expected in one file in the same folder"
        )


def _flag(fields: dict[str, str], key: str, default: bool) -> bool:
    value = fields.get(key, str(default)).lower()
    if value not in ("true", "false", "0", "1"):
        raise DamagedError(f"{key} {value[:20]!r}, expected True or False")
    return value in ("true", "1")
