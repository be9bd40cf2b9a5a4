"""Folders of DICOM slices: what is chosen, mended in words, or refused."""

import dataclasses
import os
import re
import subprocess
import sys

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from helpers.dicom_files import SERIES, make_slice, save, write_stack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from ichseg.errors import InputError
from ichseg.scan.dicom import decompress
from ichseg.scan.dicom.elements import COMPRESSED, read_elements
from ichseg.scan.dicom.pixels import hounsfield
from ichseg.scan.dicom.series import find_series, read_series
from ichseg.scan.dicom.sorting import ENHANCED_CT
from ichseg.scan.dicom.straighten import NOTHING_HU
from ichseg.scan.reader import read_scan

HEIGHTS = (0.0, 5.0, 10.0, 15.0)


def noise(at):
    return np.random.default_rng(int(at[0, 0, 2])).integers(-100, 200, at.shape[:2])


def write(folder, heights=HEIGHTS, **changes):
    write_stack(folder, [(1.0, 2.0, z) for z in heights], noise, **changes)
    return folder


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


def test_the_largest_axial_series_is_taken_and_the_others_named(tmp_path):
    write(tmp_path / "thin", heights=np.arange(0, 40, 5.0), ConvolutionKernel="H31s")
    write(tmp_path / "short", SeriesInstanceUID=SERIES + ".7", SeriesNumber="7")
    coronal = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
    places = [(0.0, float(y), 0.0) for y in range(60)]
    write_stack(tmp_path / "cor", places, noise, orientation=coronal, SeriesNumber="9")
    derived = ["DERIVED", "SECONDARY", "MPR"]
    write(tmp_path / "mpr", heights=range(50), ImageType=derived, SeriesNumber="8",
          SeriesInstanceUID=SERIES + ".8")  # fmt: skip
    localiser = make_slice(np.zeros((9, 9)), (0, 0, 0), ImageType=["ORIGINAL", "X", "LOCALIZER"])
    save(localiser, tmp_path / "top")
    save(make_slice(np.zeros((9, 9)), (0, 0, 0), Modality="MR"), tmp_path / "mr")
    (tmp_path / "thin" / "notes.txt").write_text("not DICOM")
    (tmp_path / "thin" / ".hidden.dcm").write_bytes(b"nor this")
    series = find_series(tmp_path)
    assert series.words.startswith("taken was series 2 of 8 slices, kernel H31s; others were left")
    assert [file.path.parent.name for file in series.slices] == ["thin"] * 8
    said = " ".join(series.warnings)
    assert "1 file of a localiser, 1 file of modality MR" in said
    assert "3 other series or parts of one" in said
    for part in ("series 7 of 4 slices", "series 8 of 50 slices", "series 9 of 60 slices"):
        assert part in said


def test_parts_of_a_series_with_another_frame_are_left_out(tmp_path):
    """Such as a scout that carries the series' number."""
    write(tmp_path)
    save(make_slice(np.zeros((9, 9)), (0, 0, 0)), tmp_path / "odd.dcm")
    series = find_series(tmp_path)
    assert len(series.slices) == 4
    assert series.warnings[0].startswith(
        "left out: 1 other series or parts of one, 1 slice that are"
    )


def test_slices_are_ordered_by_place_and_the_lowest_is_first(tmp_path):
    write(tmp_path, heights=(15.0, 0.0, 10.0, 5.0))
    series = find_series(tmp_path)
    heights = [file.numbers("ImagePositionPatient", 3)[2] for file in series.slices]
    assert heights == [0, 5, 10, 15]
    assert not series.warnings
    sizes = []
    found = read_scan(tmp_path, sizes.append)
    np.testing.assert_array_equal(found.volume.voxels[2], noise(np.full((24, 20, 3), 10.0)))
    assert found.series is not None
    assert sizes == [4 * 24 * 20]


def test_itk_reads_the_same_of_a_straight_series(tmp_path):
    write(tmp_path)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    itk, ours = reader.Execute(), read_scan(tmp_path).volume
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk), ours.voxels)
    assert itk.GetSpacing()[::-1] == ours.spacing_mm
    assert itk.GetOrigin()[::-1] == ours.origin_mm


def test_copies_are_taken_once_and_differing_ones_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "copy.dcm").write_bytes((tmp_path / "007.dcm").read_bytes())
    series = find_series(tmp_path)
    assert len(series.slices) == 4
    assert series.warnings == ("1 slice is there twice, one of each was taken",)
    made = pydicom.dcmread(tmp_path / "copy.dcm")
    made.PixelData = bytes(len(made.PixelData))
    made.save_as(tmp_path / "copy.dcm")
    with pytest.raises(InputError, match="lie at the same place and differ"):
        find_series(tmp_path)


def test_a_missing_slice_is_mended_in_words_and_a_wide_gap_refused(tmp_path):
    series = find_series(write(tmp_path / "one", heights=(0, 5, 10, 20, 25)))
    assert "slices are missing in 1 place: up to 10 mm" in series.warnings[0]
    assert "5 are usual" in series.warnings[0]
    voxels = read_series(series).voxels
    assert voxels.shape[0] == 6
    middle = (voxels[2].astype(float) + voxels[4]) / 2
    assert abs(voxels[3] - middle).max() <= 0.5
    with pytest.raises(InputError, match=r"20 mm between 014.dcm and 021.dcm, expected about 5"):
        find_series(write(tmp_path / "gap", heights=(0, 5, 10, 30, 35)))
    thick = find_series(write(tmp_path / "thick", heights=(0, 12, 24), SliceThickness=12))
    assert thick.warnings == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ContrastBolusAgent": "Iomeron"}, r"contrast agent \(Iomeron\)"),
        ({"BodyPartExamined": "CHEST"}, "body part CHEST, expected a head"),
        ({"GantryDetectorTilt": 12}, "a gantry tilt of 12 degrees, the slices' positions of none"),
        ({"LossyImageCompression": "01"}, "compressed with loss"),
    ],
)
def test_what_a_header_says_is_passed_on(tmp_path, changes, words):
    (warning,) = find_series(write(tmp_path, **changes)).warnings
    assert re.search(words, warning)


def test_nothing_of_the_patient_is_said(tmp_path):
    write(tmp_path, PatientName="SECRET^NAME", PatientID="SECRET", SeriesDescription="SECRET")
    series = find_series(tmp_path)
    assert "SECRET" not in series.words + " ".join(series.warnings)


def one(tmp_path, **changes):
    return save(make_slice(np.zeros((24, 20)), (0, 0, 0), **changes), tmp_path / "x.dcm")


def test_what_is_no_series_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: no DICOM file; expected"):
        find_series(tmp_path)
    one(tmp_path, Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    with pytest.raises(InputError, match="of a CT's slices, but 1 file of modality MR"):
        find_series(tmp_path)
    one(tmp_path)
    with pytest.raises(InputError, match="of 1 slice at one place, expected a volume"):
        find_series(tmp_path)
    one(tmp_path, SOPClassUID=ENHANCED_CT)
    with pytest.raises(InputError, match="an Enhanced CT image, many slices in one file"):
        find_series(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ImagePositionPatient": None}, "without position"),
        ({"PixelSpacing": None}, "without position, orientation or pixel spacing"),
        ({"PixelSpacing": [0.5, 0]}, "pixels of 0.5 x 0 mm"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "no unit vectors at right angles"),
        ({"ImageOrientationPatient": [2, 0, 0, 0, 1, 0]}, "no unit vectors"),
        ({"Rows": None}, "None rows of 20"),
    ],
)
def test_a_slice_without_a_place_is_refused(tmp_path, changes, words):
    with pytest.raises(InputError, match=f"x.dcm: .*{words}"):
        find_series(one(tmp_path, **changes).parent)


def test_a_damaged_file_is_left_out_by_name(tmp_path):
    write(tmp_path, heights=(*HEIGHTS, 20.0))
    whole = (tmp_path / "000.dcm").read_bytes()
    for content, words in (
        (whole[:400], "cut off"),
        (whole[:-100], "cut off: 860 bytes of pixels, its header says 960"),
        (bytes(2000), "not a DICOM file"),
        (whole[:200] + b"\xff" * 40 + whole[240:], "damaged|cut off|unknown transfer"),
    ):
        (tmp_path / "000.dcm").write_bytes(content)
        series = find_series(tmp_path)
        assert len(series.slices) == 4
        text = rf"left out: 1 file that cannot be read as a slice: 000\.dcm \(.*({words})"
        assert re.match(text, series.warnings[0])
    for other in tmp_path.glob("*.dcm"):
        other.write_bytes(whole[:400])
    with pytest.raises(InputError, match=r"000\.dcm: cut off.* \(and 4 more files\)"):
        find_series(tmp_path)


def test_transfer_syntaxes_that_are_not_read_are_named(tmp_path, pixels):
    path = save(make_slice(pixels, (0, 0, 0)), tmp_path / "a.dcm", DeflatedExplicitVRLittleEndian)
    with pytest.raises(InputError, match=r"a.dcm: transfer syntax Deflated Explicit VR"):
        read_elements(path)


def test_links_that_lead_out_and_folders_too_deep_are_left_out(tmp_path):
    write(tmp_path / "in")
    write(tmp_path / "out")
    (tmp_path / "in" / "link.dcm").symlink_to(tmp_path / "out" / "000.dcm")
    series = find_series(tmp_path / "in")
    assert len(series.slices) == 4
    assert "link.dcm (a link that leads out of" in series.warnings[0]
    deep = tmp_path / "deep" / "/".join("abcdefghij")
    write(deep)
    with pytest.raises(InputError, match="/i: more than 8 folders deep"):
        find_series(tmp_path / "deep")


# ---- compressed ----


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


# ---- anything ----


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_altered_files_are_read_or_refused(tmp_path_factory, data):
    """Whatever stands in a header: a series or one clear error."""
    folder = tmp_path_factory.getbasetemp() / "altered"
    if not folder.exists():
        write(folder)
    path = folder / "000.dcm"
    original = folder.parent / "original"
    if not original.exists():
        original.write_bytes(path.read_bytes())
    changed = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(128, len(changed) - 970))
        length = data.draw(st.integers(1, 6))
        changed[where : where + length] = data.draw(st.binary(min_size=length, max_size=length))
    path.write_bytes(changed)
    try:
        found = read_scan(folder)
    except InputError as error:
        said = str(error)
        assert "\n" not in said and str(folder) in said  # noqa: PT018
    else:
        assert found.volume.voxels.dtype == np.int16


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


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    write(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot read \(Permission denied\)"):
        find_series(tmp_path)
