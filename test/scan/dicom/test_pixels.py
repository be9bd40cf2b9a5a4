"""A slice's pixels in HU, in every byte order; what are none of a CT's is refused."""

import numpy as np
import pytest
from helpers.dicom_files import make_slice, save
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from ichseg.errors import InputError
from ichseg.scan.dicom import decompress
from ichseg.scan.dicom.elements import read_elements
from ichseg.scan.dicom.pixels import hounsfield, padding_in_tissue
from ichseg.scan.dicom.straighten import NOTHING_HU


def in_hu(path):
    with decompress.decoder() as decode:
        return hounsfield(read_elements(path), decode)


@pytest.fixture
def pixels():
    return np.random.default_rng(5).integers(-1000, 1500, (24, 20))


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_every_byte_order_gives_the_same_pixels(tmp_path, pixels, syntax):
    """With sequences of either length and private elements to step over."""
    made = make_slice(pixels, (1, 2, 3))
    inner = Dataset()
    inner.ReferencedSOPInstanceUID = "1.2"
    inner.PurposeOfReferenceCodeSequence = Sequence([Dataset()])
    made.ReferencedImageSequence = Sequence([inner, inner])
    made["ReferencedImageSequence"].is_undefined_length = True
    made.add_new(0x00291010, "OB", b"private" * 11)
    made.SourceImageSequence = Sequence([inner])
    path = save(made, tmp_path / "a.dcm", syntax)
    file = read_elements(path)
    assert file.syntax == syntax
    assert file.numbers("ImagePositionPatient", 3) == (1, 2, 3)
    assert file.integer("Rows") == 24
    np.testing.assert_array_equal(in_hu(path), pixels)


def test_signed_pixels_of_twelve_bits_with_an_overlay_above_them(tmp_path):
    stored = np.array([[-1024, -1, 0], [5, 2047, -2048]])
    raw = (stored & 0xFFF) | 0x3000
    made = make_slice(
        np.zeros((2, 3)), (0, 0, 0), PixelData=raw.astype("<u2").tobytes(), BitsStored=12,
        HighBit=11, PixelRepresentation=1, RescaleSlope=0.5, RescaleIntercept=-10,
    )  # fmt: skip
    found = in_hu(save(made, tmp_path / "a.dcm"))
    np.testing.assert_array_equal(found, [[-522, -10, -10], [-8, 1014, -1024]])  # 0.5s to even


def test_padding_and_what_lies_below_air_is_nothing(tmp_path, pixels):
    pixels[0, :5] = 3000  # unlike any other
    pixels[1, :5] = 2990
    changes = {"PixelPaddingValue": 3000 + 1024, "PixelPaddingRangeLimit": 2985 + 1024}
    made = make_slice(pixels, (0, 0, 0), **changes)
    for name in changes:
        made[name].VR = "US"
    found = in_hu(save(made, tmp_path / "a.dcm"))
    assert (found[:2, :5] == NOTHING_HU).all()
    np.testing.assert_array_equal(found[2:], pixels[2:])
    made = make_slice(pixels, (0, 0, 0), RescaleIntercept=-2000)
    assert in_hu(save(made, tmp_path / "a.dcm")).min() == NOTHING_HU


@pytest.mark.parametrize(("sign", "padding"), [(0, 63_536), (1, -32_768), (1, -2000)])
def test_padding_of_more_bits_than_the_pixels(tmp_path, sign, padding):
    """Around the field of view some scanners and archives write a number that BitsStored hides."""
    stored = np.array([[1024, 1060, 24]]) - 1024 * sign
    raw = np.append(stored, [[padding]], axis=1).astype(np.int64) & 0xFFFF
    made = make_slice(
        np.zeros((1, 4)), (0, 0, 0), PixelData=raw.astype("<u2").tobytes(), BitsStored=12,
        HighBit=11, PixelRepresentation=sign, RescaleIntercept=-1024 * (1 - sign),
    )  # fmt: skip
    made.add_new("PixelPaddingValue", "SS" if sign else "US", padding)
    found = in_hu(save(made, tmp_path / "a.dcm"))
    np.testing.assert_array_equal(found, [[0, 36, -1000, NOTHING_HU]])


@pytest.mark.parametrize(
    ("value", "limit", "found"),
    [(60, None, (60, 60)), (0, None, (0, 0)), (-2000, -400, (-2000, -400)), (-2000, -600, None)],
)
def test_padding_that_is_tissue_is_kept(tmp_path, pixels, value, limit, found):
    """By its header 60 HU is nothing, which would make holes in every bleed."""
    pixels[:] = np.linspace(-1000, 1000, pixels.size).astype(int).reshape(pixels.shape)
    pixels[0, 0] = value
    changes = {"PixelPaddingValue": value, "PixelRepresentation": 1, "RescaleIntercept": 0}
    changes |= {} if limit is None else {"PixelPaddingRangeLimit": limit}
    raw = pixels.astype("<i2").tobytes()
    made = make_slice(pixels, (0, 0, 0), PixelData=raw, **changes)
    for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        if name in made:
            made[name].VR = "SS"
    path = save(made, tmp_path / "a.dcm")
    assert padding_in_tissue(read_elements(path)) == found
    kept = np.maximum(pixels, NOTHING_HU)
    if found is None:
        kept[(pixels >= value) & (pixels <= limit)] = NOTHING_HU
        assert (kept != np.maximum(pixels, NOTHING_HU)).any()
    np.testing.assert_array_equal(in_hu(path), kept)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RescaleSlope": None}, "rescaled by None and"),
        ({"RescaleSlope": 0}, "rescaled by"),
        ({"RescaleType": "OD"}, "'OD', expected a slope"),
        ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "8 bits of 8"),
        ({"HighBit": 14}, "16 bits of 16 up to bit 14"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "'MONOCHROME1', expected MONOCHROME2"),
        ({"SamplesPerPixel": 3}, "several samples"),
        ({"NumberOfFrames": 2}, "several samples or frames"),
        ({"PixelRepresentation": None}, "have a sign"),
        ({"Rows": 23}, "960 bytes of pixels, expected 920"),
        ({"PixelData": None}, "0 bytes of pixels"),
    ],
)
def test_pixels_that_are_no_ct_are_refused(tmp_path, pixels, changes, words):
    path = save(make_slice(pixels, (0, 0, 0), **changes), tmp_path / "a.dcm")
    with pytest.raises(InputError, match=f"a.dcm: .*{words}"):
        in_hu(path)
