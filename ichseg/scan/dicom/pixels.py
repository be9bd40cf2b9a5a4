"""The pixels of a DICOM slice, in HU."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError
from ichseg.scan.dicom import elements
from ichseg.scan.dicom.decompress import Decoder
from ichseg.scan.dicom.elements import COMPRESSED, CT_IMAGE, EXPLICIT_BIG, DicomFile
from ichseg.scan.dicom.straighten import NOTHING_HU

_TISSUE_HU = (-500, 2000)  # no padding lies within: such a value marks nothing, or damages tissue


def hounsfield(file: DicomFile, decode: Decoder) -> npt.NDArray[np.int16]:
    """A slice in HU, ``(y, x)``; what the scanner did not reconstruct is ``NOTHING_HU``.

    Args:
        file: The slice's file.
        decode: Made by ``decompress.decoder``; asked only for compressed pixels.

    Raises:
        InputError: It has other pixels than a CT slice, or they are damaged.
    """
    _refuse_other_pixels(file)
    slope, intercept = file.numbers("RescaleSlope", 1), file.numbers("RescaleIntercept", 1)
    unit = file.text("RescaleType").upper()  # US: unspecified
    if slope is None or intercept is None or slope[0] == 0 or unit not in ("", "HU", "US"):
        raise file.fault(
            f"rescaled by {slope} and {intercept} to {unit[:16] or 'HU'!r}, expected a slope and "
            "an intercept to HU"
        )
    raw = _raw(file, decode)
    stored = _values(raw, file, file.integer("BitsStored") or 16)
    hu = stored * np.float32(slope[0]) + np.float32(intercept[0])
    np.clip(np.rint(hu, out=hu), NOTHING_HU, 32_767, out=hu)
    slice_hu = hu.astype(np.int16)
    padding = _padding(file)
    if padding is not None and not padding_in_tissue(file):
        for numbers in (stored, _values(raw, file, 16)):  # padding may need more bits than pixels
            slice_hu[(numbers >= padding[0]) & (numbers <= padding[1])] = NOTHING_HU
    return slice_hu


def padding_in_tissue(file: DicomFile) -> tuple[float, float] | None:
    """The range in HU that its header calls padding, if tissue lies there; otherwise None.

    Some writers call 0 padding and store 0 HU as 0: such pixels are left as they are.
    """
    padding = _padding(file)
    slope, intercept = file.numbers("RescaleSlope", 1), file.numbers("RescaleIntercept", 1)
    if padding is None or slope is None or intercept is None:
        return None
    low, high = sorted(value * slope[0] + intercept[0] for value in padding)
    return (low, high) if low <= _TISSUE_HU[1] and high >= _TISSUE_HU[0] else None


def _padding(file: DicomFile) -> tuple[int, int] | None:
    """The lowest and highest stored number that stands for no measured pixel."""
    padding = file.elements.get("PixelPaddingValue", b"")
    if len(padding) != 2:
        return None
    form = "<h" if file.integer("PixelRepresentation") else "<H"
    limit = file.elements.get("PixelPaddingRangeLimit", b"")
    ends = [struct.unpack(form, v)[0] for v in (padding, limit if len(limit) == 2 else padding)]
    return min(ends), max(ends)


def _refuse_other_pixels(file: DicomFile) -> None:
    if any(file.integer(many) not in (None, 1) for many in ("SamplesPerPixel", "NumberOfFrames")):
        raise file.fault("pixels of several samples or frames, expected one slice of grey values")
    kind = file.text("PhotometricInterpretation")
    if kind != "MONOCHROME2":
        raise file.fault(f"pixels are {kind[:16]!r}, expected MONOCHROME2")
    bits = ("BitsAllocated", "BitsStored", "HighBit")
    allocated, stored, high = (file.integer(keyword) for keyword in bits)
    if allocated != 16 or not stored or not 8 < stored <= 16 or high != stored - 1:
        raise file.fault(
            f"{stored} bits of {allocated} up to bit {high}, expected 9 to 16 of 16, from bit 0 on"
        )
    if file.integer("PixelRepresentation") not in (0, 1):
        raise file.fault("does not say whether its pixels have a sign")


def _raw(file: DicomFile, decode: Decoder) -> npt.NDArray[np.uint16]:
    """The two bytes of each pixel, ``(y, x)``."""
    rows, columns = file.integer("Rows") or 0, file.integer("Columns") or 0
    if file.syntax in COMPRESSED:
        return _decompressed(file, rows, columns, decode)
    wanted = 2 * rows * columns
    if not wanted <= file.pixels_size <= wanted + 2:
        raise file.fault(
            f"{file.pixels_size} bytes of pixels, expected {wanted} for {rows} x {columns}"
        )
    order = ">u2" if file.syntax == EXPLICIT_BIG else "<u2"
    return np.frombuffer(file.pixel_bytes()[:wanted], order).reshape(rows, columns)


def _values(raw: npt.NDArray[np.uint16], file: DicomFile, bits: int) -> npt.NDArray[np.int32]:
    """The numbers in the lowest bits of each pixel, with their sign if the file has any."""
    values = raw.astype(np.int32) & ((1 << bits) - 1)  # above them old files keep overlays
    if file.integer("PixelRepresentation"):
        values -= (values >> (bits - 1)) << bits
    return values


def _decompressed(
    file: DicomFile, rows: int, columns: int, decode: Decoder
) -> npt.NDArray[np.uint16]:
    """The pixels as ITK decompresses them.

    ITK is shown a file of ours, with what it needs and the pixels, so that nothing else of the
    patient's file reaches it.
    """
    pixels = elements.fragments(file, 4 * rows * columns + 65_536)
    try:
        found = decode(_plain_slice(file, pixels, rows, columns))
    except InputError as error:
        raise file.fault(f"compressed as {COMPRESSED[file.syntax]}, and {error}") from error
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
    stored = file.integer("BitsStored") or 16
    data = (
        element(0x00080016, b"UI", CT_IMAGE.encode())
        + element(0x00080018, b"UI", b"1.2.3")
        + number(0x00280002, 1)
        + element(0x00280004, b"CS", b"MONOCHROME2")
        + number(0x00280010, rows)
        + number(0x00280011, columns)
        + number(0x00280100, 16)
        + number(0x00280101, stored)
        + number(0x00280102, stored - 1)
        + number(0x00280103, file.integer("PixelRepresentation") or 0)
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
