"""The header of an NRRD whose voxels lie in the same file (``.nrrd``).

Its place is worked out here; field names are those of the format's definition, teem's ``nrrd.h``.
"""

from __future__ import annotations

import math
import re
from typing import BinaryIO

import numpy as np

from ichseg.scan.stored import (
    FARTHEST_MM,
    LONGEST_HEADER,
    DamagedError,
    Header,
    OtherKindError,
    Place,
    checked_shape,
    number,
    whole_number,
)

_TYPES = {
    "signed char": "i1", "int8": "i1", "int8_t": "i1",
    "uchar": "u1", "unsigned char": "u1", "uint8": "u1", "uint8_t": "u1",
    "short": "i2", "short int": "i2", "signed short": "i2", "signed short int": "i2",
    "int16": "i2", "int16_t": "i2",
    "ushort": "u2", "unsigned short": "u2", "unsigned short int": "u2", "uint16": "u2",
    "uint16_t": "u2",
    "int": "i4", "signed int": "i4", "int32": "i4", "int32_t": "i4",
    "uint": "u4", "unsigned int": "u4", "uint32": "u4", "uint32_t": "u4",
    "longlong": "i8", "long long": "i8", "long long int": "i8", "signed long long": "i8",
    "signed long long int": "i8", "int64": "i8", "int64_t": "i8",
    "ulonglong": "u8", "unsigned long long": "u8", "unsigned long long int": "u8",
    "uint64": "u8", "uint64_t": "u8",
    "float": "f4", "double": "f8",
}  # fmt: skip
# What turns a space's x, y, z into LPS.
_SPACES = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip


def parse_header(stream: BinaryIO) -> Header:
    """Read and check the header; no voxels are read.

    Raises:
        DamagedError: It is no such header, or contradicts itself.
        OtherKindError: It is that of a volume of a kind that is not read.
    """
    text = stream.read(LONGEST_HEADER)
    fields, start = _fields(text)
    _refuse_other_kinds(fields)
    size = [whole_number(word) for word in fields.get("sizes", "").split()]
    axes = whole_number(fields.get("dimension", ""))
    if len(size) != axes:
        raise DamagedError(f"dimension {axes} with sizes {fields.get('sizes', '')[:60]!r}")
    if axes != 3:
        raise OtherKindError(f"{axes}D image of size {tuple(size)}, expected a 3D volume")
    kind = _TYPES[fields["type"].lower()]
    order = fields.get("endian", "little").lower()
    if order not in ("little", "big") or ("endian" not in fields and kind[1] != "1"):
        raise DamagedError(f"endian {fields.get('endian', 'none')[:20]!r}, expected little or big")
    return Header(
        shape=checked_shape(size),
        dtype=np.dtype((">" if order == "big" else "<") + kind),
        start=start,
        raw=text[:start],
        packed=fields.get("encoding", "").lower() != "raw",
        place=_place(fields),
        has_frame=fields.get("space", "").lower() in _SPACES,
    )


def _fields(text: bytes) -> tuple[dict[str, str], int]:
    """Each field's words by its name in lower case, and the byte at which voxels begin."""
    if not re.match(rb"NRRD000[1-5]\r?\n", text):
        raise DamagedError("no NRRD header")
    fields: dict[str, str] = {}
    start = text.index(b"\n") + 1
    while True:
        end = text.find(b"\n", start)
        if end < 0:
            raise DamagedError("no NRRD header: no empty line ends it")
        line = text[start:end].decode("latin-1").strip()
        start = end + 1
        if not line:
            return fields, start
        if line.startswith("#") or ":=" in line:  # a remark, or a key and its value
            continue
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        if not colon or name in fields:
            raise DamagedError(f"no NRRD header: line {line[:40]!r}")
        fields[name] = value.strip()


def _refuse_other_kinds(fields: dict[str, str]) -> None:
    """Refuse all but one number a voxel, raw or as gzip, in the file itself, in millimetres."""
    for name in ("data file", "datafile"):
        if name in fields:
            raise OtherKindError(
                f"its voxels are in {fields[name][:80]!r}, expected in the file itself"
            )
    encoding = fields.get("encoding", "none").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise OtherKindError(f"encoding {encoding[:20]}, expected raw or gzip")
    for name in ("line skip", "lineskip", "byte skip", "byteskip"):
        if fields.get(name, "0") != "0":
            raise OtherKindError(f"{name} {fields[name][:20]}, expected none")
    kind = fields.get("type", "none").lower()
    if kind not in _TYPES:
        raise OtherKindError(f"type {kind[:30]}, expected one real number per voxel")
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", ""))) - {"mm", ""}
    if units:
        raise OtherKindError(f"space units {', '.join(sorted(units))[:40]}, expected mm")
    space = fields.get("space", "left-posterior-superior").lower()
    if space not in _SPACES:
        raise OtherKindError(f"space {space[:40]}, expected {', '.join(list(_SPACES)[::2])}")


def _place(fields: dict[str, str]) -> Place:
    """Sizes of a voxel, the first one's place and the axes' directions, in LPS.

    Without ``space directions`` the axes are the patient's, as ITK takes it.

    Raises:
        DamagedError: It says no place.
        OtherKindError: It has sizes of voxels in another space than LPS and no directions, or
            ``axis mins``.
    """
    signs = np.array(_SPACES[fields.get("space", "lps").lower()], float)
    if "space directions" in fields:
        steps = np.array(_vectors(fields["space directions"], 3)) * signs  # a row an axis
    else:
        if (signs < 0).any():
            raise OtherKindError("a space but no space directions, expected both")
        steps = np.diag(_numbers(fields.get("spacings", "")))
    if "axis mins" in fields or "axismins" in fields:  # of a corner or a centre
        raise OtherKindError("axis mins, expected a space origin")
    origin = np.array(_vectors(fields.get("space origin", "(0,0,0)"), 1)[0]) * signs
    lengths = np.sqrt((steps**2).sum(1))
    if not (np.isfinite(lengths).all() and lengths.min() > 0):
        raise DamagedError("space directions or spacings that are no sizes in mm")
    if max(abs(steps).max(), abs(origin).max()) > FARTHEST_MM or not np.isfinite(origin).all():
        raise DamagedError(f"a size or place beyond {FARTHEST_MM:g} mm")
    directions = (steps / lengths[:, None]).T[::-1, ::-1]  # rows and columns z, y, x
    return Place(
        spacing_mm=tuple(lengths[::-1].tolist()),
        origin_mm=tuple(origin[::-1].tolist()),
        direction=tuple(directions.ravel().tolist()),
    )


def _numbers(text: str) -> list[float]:
    """Three numbers, or three NaN where there are fewer or more."""
    words = text.split()
    return [number(word) for word in words] if len(words) == 3 else [math.nan] * 3


def _vectors(text: str, count: int) -> list[list[float]]:
    """Vectors of three numbers, each in brackets."""
    found = re.findall(r"\(([^()]*)\)|(\S+)", text)
    if len(found) != count or any(other for _, other in found):
        raise DamagedError(f"{text[:60]!r}, expected {count} vectors of three numbers")
    vectors = [[number(word) for word in inside.split(",")] for inside, _ in found]
    if any(len(vector) != 3 for vector in vectors):
        raise DamagedError(f"{text[:60]!r}, expected {count} vectors of three numbers")
    return vectors
