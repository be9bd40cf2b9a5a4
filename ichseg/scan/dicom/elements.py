"""The elements of one DICOM file that a CT slice needs, held against the file's length.

Read here, one by one, without a DICOM library (docs/decisions/0013-dicom.md): only what is asked
for is kept, everything else is stepped over, and nothing that a file claims is allocated before it
is known to be there. Names and numbers of elements are those of the DICOM standard, PS3.6.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ichseg.errors import InputError
from ichseg.scan.dicom.files import MARK, MARK_AT

_DEEPEST = 8  # sequences in sequences
_MOST_ELEMENTS = 20_000  # in one file; a CT slice has 100 to 500
_LONGEST_VALUE = 1024  # of those that are kept
_UNDEFINED = 0xFFFFFFFF
_LONG_FORM = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT",
              b"UV")  # fmt: skip
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXELS = 0x7FE00010

# What is kept, by its number in the file.
KEPT = {
    0x00080008: "ImageType",
    0x00080020: "StudyDate",
    0x00080030: "StudyTime",
    0x00080016: "SOPClassUID",
    0x00080018: "SOPInstanceUID",
    0x00080060: "Modality",
    0x0008103E: "SeriesDescription",
    0x00100010: "PatientName",
    0x00100020: "PatientID",
    0x00100030: "PatientBirthDate",
    0x00180010: "ContrastBolusAgent",
    0x00180015: "BodyPartExamined",
    0x00180050: "SliceThickness",
    0x00181120: "GantryDetectorTilt",
    0x00181210: "ConvolutionKernel",
    0x0020000D: "StudyInstanceUID",
    0x0020000E: "SeriesInstanceUID",
    0x00200011: "SeriesNumber",
    0x00200012: "AcquisitionNumber",
    0x00200032: "ImagePositionPatient",
    0x00200037: "ImageOrientationPatient",
    0x00200052: "FrameOfReferenceUID",
    0x00280002: "SamplesPerPixel",
    0x00280004: "PhotometricInterpretation",
    0x00280008: "NumberOfFrames",
    0x00280010: "Rows",
    0x00280011: "Columns",
    0x00280030: "PixelSpacing",
    0x00280100: "BitsAllocated",
    0x00280101: "BitsStored",
    0x00280102: "HighBit",
    0x00280103: "PixelRepresentation",
    0x00280120: "PixelPaddingValue",
    0x00280121: "PixelPaddingRangeLimit",
    0x00281052: "RescaleIntercept",
    0x00281053: "RescaleSlope",
    0x00281054: "RescaleType",
    0x00282110: "LossyImageCompression",
}
# Numbers of two bytes among them; the others are text.
_TWO_BYTES = (
    "SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
)  # fmt: skip

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"  # SOP class
IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
PLAIN = (IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG)
# Transfer syntaxes whose pixels are compressed, by the standard's names.
COMPRESSED = {
    "1.2.840.10008.1.2.5": "RLE Lossless",
    "1.2.840.10008.1.2.4.51": "JPEG Extended (lossy)",
    "1.2.840.10008.1.2.4.57": "JPEG Lossless",
    "1.2.840.10008.1.2.4.70": "JPEG Lossless, First-Order Prediction",
    "1.2.840.10008.1.2.4.80": "JPEG-LS Lossless",
    "1.2.840.10008.1.2.4.81": "JPEG-LS Near-Lossless (lossy)",
    "1.2.840.10008.1.2.4.90": "JPEG 2000 Lossless",
    "1.2.840.10008.1.2.4.91": "JPEG 2000 (lossy)",
}
NOT_READ = {
    "1.2.840.10008.1.2.1.99": "Deflated Explicit VR Little Endian",
    "1.2.840.10008.1.2.4.50": "JPEG Baseline, of 8 bits",
    "1.2.840.10008.1.2.4.92": "JPEG 2000 Part 2 Lossless",
    "1.2.840.10008.1.2.4.93": "JPEG 2000 Part 2",
    "1.2.840.10008.1.2.4.100": "MPEG2",
    "1.2.840.10008.1.2.4.201": "High-Throughput JPEG 2000 Lossless",
    "1.2.840.10008.1.2.4.202": "High-Throughput JPEG 2000 RPCL Lossless",
    "1.2.840.10008.1.2.4.203": "High-Throughput JPEG 2000",
}


@dataclass(frozen=True, slots=True)
class DicomFile:
    """What one file says of its slice, and where its pixels are.

    Attributes:
        path: Where the file is.
        syntax: The UID of its transfer syntax.
        elements: By keyword, the values of ``KEPT`` as they are stored; numbers of two bytes are
            little-endian whatever the file's order.
        pixels_at: The byte at which the pixels, or their first fragment, begin; 0 if there are
            none.
        pixels_size: The number of bytes that the pixels take, all of them in the file; of
            fragments as far as the file goes.
    """

    path: Path
    syntax: str
    elements: dict[str, bytes]
    pixels_at: int = 0
    pixels_size: int = 0

    def text(self, keyword: str) -> str:
        """A value as text, of one line, without the padding; empty if it is not there."""
        return self.elements.get(keyword, b"").decode("latin-1").strip("\0 \t\r\n")

    def integer(self, keyword: str) -> int | None:
        """A two-byte number, or a text of digits; None if it is not there.

        Raises:
            InputError: It is something else.
        """
        value = self.elements.get(keyword, b"")
        if keyword in _TWO_BYTES:
            if len(value) not in (0, 2):
                raise self.fault(f"{len(value)} bytes in {keyword}, expected 2")
            return struct.unpack("<H", value)[0] if value else None
        text = self.text(keyword)
        if not text:
            return None
        digits = text[1:] if text[0] in "+-" else text
        if not (digits.isascii() and digits.isdecimal() and len(digits) <= 12):
            raise self.fault(f"{text[:30]!r} in {keyword}, expected a whole number")
        return int(text)

    def numbers(self, keyword: str, count: int) -> tuple[float, ...] | None:
        """``count`` decimal numbers, finite and below a million; None if the value is not there.

        Raises:
            InputError: There are others.
        """
        text = self.text(keyword)
        if not text:
            return None
        try:
            found = tuple(float(word) for word in text.split("\\"))
        except ValueError:
            found = ()
        if len(found) != count or not all(abs(value) < 1e6 for value in found):
            raise self.fault(f"{text[:60]!r} in {keyword}, expected {count} numbers")
        return found

    def pixel_bytes(self, most: int | None = None) -> bytes:
        """The pixels as they lie in the file; of so many bytes the first, if that is given.

        Raises:
            InputError: The file cannot be read.
        """
        size = self.pixels_size if most is None else min(self.pixels_size, most)
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.pixels_at)
                return stream.read(size) if self.pixels_at else b""
        except OSError as error:
            raise self.fault(f"cannot read ({error.strerror or error})") from error

    def fault(self, reason: str) -> InputError:
        """An error that names the file."""
        return InputError(f"{self.path}: {reason}")


def _name(tag: int) -> str:
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def read_elements(path: Path) -> DicomFile:
    """Read what is kept of a file's elements, up to its pixels.

    Raises:
        InputError: It is damaged, or in a transfer syntax that cannot be stepped through.
    """
    try:
        with path.open("rb") as stream:
            return _Reader(path, stream).read()
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror or error})") from error


class _Reader:
    """Steps through a file's elements."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.end = os.fstat(stream.fileno()).st_size
        self.at = 0
        self.count = 0
        self.explicit, self.order = True, "<"

    def read(self) -> DicomFile:
        if self.take(MARK_AT + 4)[MARK_AT:] != MARK:
            raise self.fault("no DICOM file: without DICM at byte 128")
        syntax = self.meta()
        if syntax in NOT_READ:
            raise self.fault(f"transfer syntax {NOT_READ[syntax]}, expected one that is read")
        if syntax not in (*PLAIN, *COMPRESSED):
            raise self.fault(f"unknown transfer syntax {syntax[:64]!r}")
        self.explicit = syntax != IMPLICIT_LITTLE
        self.order = ">" if syntax == EXPLICIT_BIG else "<"
        elements: dict[str, bytes] = {}
        while self.at < self.end:
            tag, kind, size = self.element()
            if tag == _PIXELS:
                size = self.pixels_size(syntax, size)
                return DicomFile(self.path, syntax, elements, self.at, size)
            if tag in KEPT and kind != b"SQ":
                elements[KEPT[tag]] = self.value(KEPT[tag], size)
            else:
                self.skip(kind, size, 0)
        return DicomFile(self.path, syntax, elements)

    def pixels_size(self, syntax: str, size: int) -> int:
        """The number of bytes that the pixels take, as far as that is known without walking."""
        left = self.end - self.at
        if size == _UNDEFINED:
            if syntax in PLAIN:
                raise self.fault("pixels without a length")
            return left
        if syntax in COMPRESSED:
            raise self.fault("pixels that are not in fragments, though compressed")
        if size > left:
            raise self.fault(f"cut off: {left} bytes of pixels, its header says {size}")
        return size

    def value(self, keyword: str, size: int) -> bytes:
        """The value of an element that is kept."""
        if size > _LONGEST_VALUE:
            raise self.fault(f"{size} bytes in {keyword}, expected a short value")
        value = self.take(size)
        swapped = self.order == ">" and keyword in _TWO_BYTES and size == 2
        return value[::-1] if swapped else value

    def meta(self) -> str:
        """Step over group 2, which is always explicit and little-endian, to the data."""
        syntax = ""
        while self.at < self.end:
            group = self.take(2)
            self.seek(self.at - 2)
            if group != b"\2\0":  # what follows may be written in another way
                break
            tag, kind, size = self.element()
            if tag == 0x00020010 and size <= 66:
                syntax = self.take(size).decode("latin-1").strip("\0 ")
            else:
                self.skip(kind, size, 0)
        return syntax

    def element(self) -> tuple[int, bytes, int]:
        """Tag, value representation (empty if implicit) and length of the next element."""
        self.count += 1
        if self.count > _MOST_ELEMENTS:
            raise self.fault(f"more than {_MOST_ELEMENTS} elements, expected a CT slice")
        group, number = struct.unpack(self.order + "HH", self.take(4))
        tag = group << 16 | number
        if group == 0xFFFE or not self.explicit:
            return tag, b"", struct.unpack(self.order + "I", self.take(4))[0]
        kind = self.take(2)
        if kind in _LONG_FORM:
            self.take(2)
            return tag, kind, struct.unpack(self.order + "I", self.take(4))[0]
        if not (kind.isalpha() and kind.isupper()):
            raise self.fault(f"damaged at byte {self.at - 6}: no element {_name(tag)}")
        return tag, kind, struct.unpack(self.order + "H", self.take(2))[0]

    def skip(self, kind: bytes, size: int, depth: int) -> None:
        """Step over a value; one of undefined length is a sequence, and is walked through."""
        if size != _UNDEFINED:
            self.seek(self.at + size)
            return
        if depth == _DEEPEST:
            raise self.fault(f"sequences more than {_DEEPEST} deep")
        explicit = self.explicit
        self.explicit = explicit and kind != b"UN"  # which is implicit inside, by the standard
        while True:
            tag, _, size = self.element()
            if tag == _SEQUENCE_END:
                break
            if tag != _ITEM:
                raise self.fault(f"damaged at byte {self.at - 8}: no item, but {_name(tag)}")
            if size != _UNDEFINED:
                self.seek(self.at + size)
                continue
            while True:
                tag, inner, size = self.element()
                if tag == _ITEM_END:
                    break
                self.skip(inner, size, depth + 1)
        self.explicit = explicit

    def take(self, size: int) -> bytes:
        if size > self.end - self.at:
            raise self.fault(f"cut off: {self.end} bytes, it goes on to byte {self.at + size}")
        value = self.stream.read(size)
        self.at += size
        if len(value) != size:
            raise self.fault(f"cut off at byte {self.at}")
        return value

    def seek(self, to: int) -> None:
        if to > self.end:
            raise self.fault(f"cut off: {self.end} bytes, it goes on to byte {to}")
        self.stream.seek(to)
        self.at = to

    def fault(self, reason: str) -> InputError:
        return InputError(f"{self.path}: {reason}")


def fragments(file: DicomFile, most: int) -> bytes:
    """The pixels of a compressed file with one frame: its fragments, joined.

    Args:
        file: A file of a compressed transfer syntax.
        most: The number of bytes that they may have.

    Raises:
        InputError: The file cannot be read, they have more, their lengths do not fit the file, or
            they have no end.
    """
    data = file.pixel_bytes(most)
    joined: list[bytes] = []
    at = 0
    while True:
        if at + 8 > len(data):
            raise file.fault(
                f"its compressed pixels are cut off, or are more than {most} bytes for one slice"
            )
        group, number, size = struct.unpack_from("<HHI", data, at)
        at += 8
        if group << 16 | number == _SEQUENCE_END:
            return b"".join(joined[1:])  # the first is a table of offsets
        if group << 16 | number != _ITEM:
            raise file.fault(
                f"damaged in its compressed pixels: no item, but {group:04X}{number:04X}"
            )
        joined.append(data[at : at + size])
        at += size
