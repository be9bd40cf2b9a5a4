"""What a file's elements say, and what they only seem to say."""

import dataclasses

import numpy as np
import pytest
from helpers.dicom_files import make_slice, save
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
)

from ichseg.errors import InputError
from ichseg.scan.dicom.elements import read_elements


@pytest.fixture
def pixels():
    return np.random.default_rng(5).integers(-1000, 1500, (24, 20))


def one(tmp_path, **changes):
    return save(make_slice(np.zeros((24, 20)), (0, 0, 0), **changes), tmp_path / "x.dcm")


def test_transfer_syntaxes_that_are_not_read_are_named(tmp_path, pixels):
    path = save(make_slice(pixels, (0, 0, 0)), tmp_path / "a.dcm", DeflatedExplicitVRLittleEndian)
    with pytest.raises(InputError, match=r"a.dcm: transfer syntax Deflated Explicit VR"):
        read_elements(path)


def test_values_that_only_look_like_numbers_are_refused(tmp_path):
    file = read_elements(one(tmp_path))
    for tag, value in (
        ("ImagePositionPatient", b"1\\2\\nan"),
        ("ImagePositionPatient", b"1\\2"),
        ("PixelSpacing", b"1e9\\1"),
    ):
        odd = dataclasses.replace(file, elements={**file.elements, tag: value})
        with pytest.raises(InputError, match=r"expected \d numbers"):
            odd.numbers(tag, 3 if tag == "ImagePositionPatient" else 2)
    for value in ("²", "1.5", "9" * 13):
        odd = dataclasses.replace(file, elements={"NumberOfFrames": value.encode("latin-1")})
        with pytest.raises(InputError, match="expected a whole number"):
            odd.integer("NumberOfFrames")
