"""Compressed pixels are those before; damaged ones cost a slice, not the process."""

import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.dicom_files import make_slice
from pydicom.uid import (
    RLELossless,
)

from ichseg.errors import InputError
from ichseg.scan.dicom import decompress
from ichseg.scan.dicom.elements import COMPRESSED, read_elements
from ichseg.scan.dicom.pixels import hounsfield


def in_hu(path):
    with decompress.decoder() as decode:
        return hounsfield(read_elements(path), decode)


@pytest.fixture
def pixels():
    return np.random.default_rng(5).integers(-1000, 1500, (24, 20))


def compressed(tmp_path, pixels, compressor):
    """By ITK's writer."""
    image = sitk.GetImageFromArray(pixels.astype(np.int16)[None])
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetUseCompression(True)
    writer.SetCompressor(compressor)
    path = tmp_path / f"{compressor}.dcm"
    writer.SetFileName(str(path))
    writer.Execute(image)
    return path


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_compressed_pixels_are_those_before(tmp_path, pixels, compressor):
    path = compressed(tmp_path, pixels, compressor)
    assert read_elements(path).syntax in COMPRESSED
    np.testing.assert_array_equal(in_hu(path), pixels)


def test_run_lengths_in_fragments_are_joined(tmp_path, pixels):
    made = make_slice(pixels, (0, 0, 0))
    made.compress(RLELossless)
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(in_hu(tmp_path / "a.dcm"), pixels)


def test_damaged_compressed_pixels_are_an_error_even_if_the_decoder_dies(tmp_path, pixels):
    path = compressed(tmp_path, pixels, "JPEG")
    whole, at = path.read_bytes(), read_elements(path).pixels_at
    rng = np.random.default_rng(0)
    ended = set()
    with decompress.decoder() as decode:
        for _ in range(25):
            changed = bytearray(whole)
            for where in rng.integers(at + 18, at + 150, 4):
                changed[where] = rng.integers(256)
            path.write_bytes(changed)
            try:
                hounsfield(read_elements(path), decode)
                ended.add("read")
            except InputError as error:
                ended.add(str(error).split(": ", 1)[1])
        path.write_bytes(whole)  # and the next good one is read
        np.testing.assert_array_equal(hounsfield(read_elements(path), decode), pixels)
    assert any("compressed as JPEG Lossless" in words for words in ended)


def test_a_decoder_that_dies_or_hangs_costs_one_slice(tmp_path, pixels, monkeypatch):
    path = compressed(tmp_path, pixels, "JPEG")
    monkeypatch.setattr(decompress, "_SLOWEST_S", 0.2)
    code = "import os, sys, time; sys.stdin.buffer.read(8); {}"
    for fate in ("os.abort()", "time.sleep(60)", "sys.stdout.write('x' * 5)"):
        words = [sys.executable, "-c", code.format(fate)]
        begin = lambda words=words: subprocess.Popen(  # noqa: E731
            words, stdin=-1, stdout=-1, stderr=-3
        )
        monkeypatch.setattr(decompress, "_begin", begin)
        with pytest.raises(InputError, match=r"compressed as JPEG Lossless.*are damaged"):
            in_hu(path)


def test_where_no_decoder_can_be_started_the_pixels_are_not_called_damaged(
    tmp_path, pixels, monkeypatch
):
    path = compressed(tmp_path, pixels, "JPEG")
    words = [sys.executable, "-c", "raise SystemExit(1)"]
    start = lambda: subprocess.Popen(words, stdin=-1, stdout=-1)  # noqa: E731
    monkeypatch.setattr(decompress, "_start", start)
    with pytest.raises(InputError, match=r"JPEG\.dcm: .*no decoder can be started.*TMPDIR"):
        in_hu(path)

    def cannot_start():
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(decompress, "_start", cannot_start)
    with pytest.raises(InputError, match=r"no decoder can be started \(Cannot allocate memory\)"):
        in_hu(path)


def test_a_compressed_slice_that_cannot_be_read_any_more_is_named(tmp_path, pixels):
    path = compressed(tmp_path, pixels, "JPEG")
    file = read_elements(path)
    path.unlink()
    with decompress.decoder() as decode, pytest.raises(InputError, match=r"cannot read \(No such"):
        hounsfield(file, decode)
