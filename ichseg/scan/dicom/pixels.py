"""The pixels of a DICOM slice, in HU. Numbers of attributes are those of the standard, PS3.6."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from ichseg.scan.dicom import files
from ichseg.scan.dicom.decompress import Decoder
from ichseg.scan.dicom.files import COMPRESSED, CT_IMAGE, EXPLICIT_BIG, DicomFile
from ichseg.scan.dicom.straighten import NOTHING_HU

_SOP_CLASS, _SOP_INSTANCE = 0x00080016, 0x00080018
_ROWS, _COLUMNS, _FRAMES, _SAMPLES = 0x00280010, 0x00280011, 0x00280008, 0x00280002
_PHOTOMETRIC, _ALLOCATED, _STORED, _HIGH, _SIGNED = (
    0x00280004, 0x00280100, 0x00280101, 0x00280102, 0x00280103,
)  # fmt: skip
_PADDING, _PADDING_LIMIT = 0x00280120, 0x00280121
_INTERCEPT, _SLOPE, _RESCALED_TO = 0x00281052, 0x00281053, 0x00281054


def hounsfield(file: DicomFile, decode: Decoder) -> npt.NDArray[np.int16]:
    """A slice in HU, ``(y, x)``; what the scanner did not reconstruct is ``NOTHING_HU``.

    Args:
        file: As its header says.
        decode: See ``decompress.decoder``; asked only for compressed pixels.

    Raises:
        InputError: It has other pixels than a CT slice, or they are damaged.
    """
    _refuse_other_pixels(file)
    slope, intercept = file.numbers(_SLOPE, 1), file.numbers(_INTERCEPT, 1)
    unit = file.text(_RESCALED_TO).upper()  # US: unspecified
    if slope is None or intercept is None or slope[0] == 0 or unit not in ("", "HU", "US"):
        raise file.fault(
            f"rescaled by {slope} and {intercept} to {unit[:16] or 'HU'!r}, expected a slope and "
            "an intercept to HU"
        )
    stored = _stored(file, decode)
    hu = stored * np.float32(slope[0]) + np.float32(intercept[0])
    np.clip(np.rint(hu, out=hu), NOTHING_HU, 32_767, out=hu)
    slice_hu = hu.astype(np.int16)
    padding = file.elements.get(_PADDING, b"")
    if len(padding) == 2:
        form = "<h" if file.integer(_SIGNED) else "<H"
        limit = file.elements.get(_PADDING_LIMIT, b"")
        ends = [struct.unpack(form, v)[0] for v in (padding, limit if len(limit) == 2 else padding)]
        slice_hu[(stored >= min(ends)) & (stored <= max(ends))] = NOTHING_HU
    return slice_hu


def _refuse_other_pixels(file: DicomFile) -> None:
    allocated, stored, high = (file.integer(tag) for tag in (_ALLOCATED, _STORED, _HIGH))
    if file.integer(_SAMPLES) not in (None, 1) or file.integer(_FRAMES) not in (None, 1):
        raise file.fault("pixels of several samples or frames, expected one slice of grey values")
    if file.text(_PHOTOMETRIC) != "MONOCHROME2":
        raise file.fault(f"pixels are {file.text(_PHOTOMETRIC)[:16]!r}, expected MONOCHROME2")
    if allocated != 16 or not stored or not 8 < stored <= 16 or high != stored - 1:
        raise file.fault(
            f"{stored} bits of {allocated} up to bit {high}, expected 9 to 16 of 16, from bit 0 on"
        )
    if file.integer(_SIGNED) not in (0, 1):
        raise file.fault("does not say whether its pixels have a sign")


def _stored(file: DicomFile, decode: Decoder) -> npt.NDArray[np.int32]:
    """Numbers as they are stored, ``(y, x)``."""
    rows, columns = file.integer(_ROWS) or 0, file.integer(_COLUMNS) or 0
    bits = file.integer(_STORED) or 16
    if file.syntax in COMPRESSED:
        raw = _decompressed(file, rows, columns, decode)
    else:
        wanted = 2 * rows * columns
        if not wanted <= file.pixels_size <= wanted + 2:
            raise file.fault(
                f"{file.pixels_size} bytes of pixels, expected {wanted} for {rows} x {columns}"
            )
        order = ">u2" if file.syntax == EXPLICIT_BIG else "<u2"
        raw = np.frombuffer(pixel_bytes(file)[:wanted], order).reshape(rows, columns)
    values = raw.astype(np.int32) & ((1 << bits) - 1)  # above them old files keep overlays
    if file.integer(_SIGNED):
        values -= (values >> (bits - 1)) << bits
    return values


def pixel_bytes(file: DicomFile) -> bytes:
    """The pixels as they lie in the file."""
    try:
        with file.path.open("rb") as stream:
            stream.seek(file.pixels_at)
            return stream.read(file.pixels_size) if file.pixels_at else b""
    except OSError as error:
        raise file.fault(f"cannot read ({error.strerror or error})") from error


def _decompressed(
    file: DicomFile, rows: int, columns: int, decode: Decoder
) -> npt.NDArray[np.uint16]:
    """By ITK, which is shown a file of ours: what it needs, and the pixels.

    So no attribute of the file but its pixels reaches that reader.
    """
    pixels = files.fragments(file, 4 * rows * columns + 65_536)
    found = decode(_plain_slice(file, pixels, rows, columns))
    if found is None:
        raise file.fault(f"its pixels, compressed as {COMPRESSED[file.syntax]}, are damaged")
    if found.shape != (rows, columns):
        raise file.fault(
            f"its compressed pixels are {found.shape[0]} x {found.shape[1]}, its header says "
            f"{rows} x {columns}"
        )
    return found


def _plain_slice(file: DicomFile, pixels: bytes, rows: int, columns: int) -> bytes:
    """A DICOM file with these compressed pixels and nothing of a patient's."""

    def element(tag: int, kind: bytes, value: bytes) -> bytes:
        value += (b"\0" if kind == b"UI" else b" ") * (len(value) % 2)
        head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, kind)
        long = kind in (b"OB", b"OW")
        return head + struct.pack("<HI" if long else "<H", *([0] * long), len(value)) + value

    def number(tag: int, value: int) -> bytes:
        return element(tag, b"US", struct.pack("<H", value))

    meta = (
        element(0x00020001, b"OB", b"\0\1")
        + element(0x00020002, b"UI", CT_IMAGE.encode())
        + element(0x00020003, b"UI", b"1.2.3")
        + element(0x00020010, b"UI", file.syntax.encode())
    )
    stored = file.integer(_STORED) or 16
    data = (
        element(_SOP_CLASS, b"UI", CT_IMAGE.encode())
        + element(_SOP_INSTANCE, b"UI", b"1.2.3")
        + number(_SAMPLES, 1)
        + element(_PHOTOMETRIC, b"CS", b"MONOCHROME2")
        + number(_ROWS, rows)
        + number(_COLUMNS, columns)
        + number(_ALLOCATED, 16)
        + number(_STORED, stored)
        + number(_HIGH, stored - 1)
        + number(_SIGNED, file.integer(_SIGNED) or 0)
    )
    pixels += b"\0" * (len(pixels) % 2)
    fragments = (
        struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
        + struct.pack("<HHI", 0xFFFE, 0xE000, 0)
        + struct.pack("<HHI", 0xFFFE, 0xE000, len(pixels))
        + pixels
        + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    )
    group_length = struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, len(meta))
    return bytes(128) + b"DICM" + group_length + meta + data + fragments
