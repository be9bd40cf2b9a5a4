"""Folders of DICOM slices: what is taken, mended in words, or refused."""

import os
import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from helpers.dicom_files import SERIES, make_slice, save, write_stack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ichseg.errors import InputError
from ichseg.scan.dicom.elements import CT_IMAGE
from ichseg.scan.dicom.series import find_series, read_series
from ichseg.scan.dicom.sorting import ENHANCED_CT
from ichseg.scan.reader import read_scan

HEIGHTS = (0.0, 5.0, 10.0, 15.0)


def noise(at):
    return np.random.default_rng(int(at[0, 0, 2])).integers(-100, 200, at.shape[:2])


def write(folder, heights=HEIGHTS, **changes):
    write_stack(folder, [(1.0, 2.0, z) for z in heights], noise, **changes)
    return folder


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
    (tmp_path / "thin" / "VERSION").write_text("1.0")
    (tmp_path / "thin" / ".hidden.dcm").write_bytes(b"nor this")
    series = find_series(tmp_path)
    assert series.words.startswith("taken was series 2 of 8 slices, kernel H31s; others were left")
    assert [file.path.parent.name for file in series.slices] == ["thin"] * 8
    said = " ".join(series.warnings)
    assert "1 file of a localiser, 1 file of modality MR" in said
    assert "3 other series or parts of one" in said
    assert "VERSION" not in said
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
    np.testing.assert_array_equal(found.voxels[2], noise(np.full((24, 20, 3), 10.0)))
    assert found.series is not None
    assert sizes == [4 * 24 * 20]


def test_itk_reads_the_same_of_a_straight_series(tmp_path):
    write(tmp_path)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    itk, ours = reader.Execute(), read_scan(tmp_path)
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


def test_copies_whose_positions_are_rounded_are_copies(tmp_path):
    """Counted as slices they made the usual step, and the grid a hundred times as fine."""
    write(tmp_path)
    for path in sorted(tmp_path.glob("*.dcm")):
        made = pydicom.dcmread(path)
        made.ImagePositionPatient[2] += 0.04
        made.save_as(path.with_name(f"rounded_{path.name}"))
    series = find_series(tmp_path)
    assert [file.path.name for file in series.slices] == [
        "000.dcm",
        "007.dcm",
        "014.dcm",
        "021.dcm",
    ]
    assert series.warnings == ("4 slices are there twice, one of each was taken",)


@pytest.mark.parametrize("change", ["RescaleIntercept", "RescaleSlope", "ImagePositionPatient"])
def test_the_same_pixels_of_another_scale_or_beside_it_are_no_copy(tmp_path, change):
    write(tmp_path)
    made = pydicom.dcmread(tmp_path / "007.dcm")
    x, y, z = made.ImagePositionPatient
    setattr(made, change, [x + 40, y, z] if change == "ImagePositionPatient" else 2)
    made.save_as(tmp_path / "copy.dcm")
    with pytest.raises(InputError, match="lie at the same place and differ"):
        find_series(tmp_path)


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("fault", ["link", "folder", "empty", "cut", "unreadable"])
def test_slices_that_cannot_be_opened_are_missed_in_words(tmp_path, monkeypatch, fault, follow):
    """At an end of the volume nothing else tells that they are missing."""
    home = write(tmp_path / "case", heights=range(0, 60, 5))
    files = sorted(home.glob("*.dcm"))
    lost = []
    for number, path in enumerate(files):
        plain = path.rename(path.with_name(f"IM{number:02}"))
        if number < 8:
            continue
        lost.append(plain)
        if fault == "link":
            plain.unlink()
            plain.symlink_to("nowhere")
        elif fault in ("empty", "cut"):
            plain.write_bytes(plain.read_bytes()[: 0 if fault == "empty" else 100])
        elif fault == "folder":
            (tmp_path / "rest").mkdir(exist_ok=True)
            plain.rename(tmp_path / "rest" / plain.name)
    words = {
        "link": "a link to nothing", "empty": "cut off, 0 bytes", "cut": "cut off, 100 bytes",
        "folder": "a link to a folder", "unreadable": "Input/output error",
    }[fault]  # fmt: skip
    if fault == "folder":
        (home / "rest").symlink_to(tmp_path / "rest")
    if fault == "unreadable":
        opened = Path.open

        def broken(path, *args, **more):
            if path in lost:
                raise OSError(5, "Input/output error")
            return opened(path, *args, **more)

        monkeypatch.setattr(Path, "open", broken)
    series = find_series(home, follow_links=follow)
    if fault == "folder" and follow:
        assert len(series.slices) == 12
        return
    assert len(series.slices) == 8
    count = "1 entry" if fault == "folder" else "4 entries"
    assert series.warnings[0].startswith(f"left out: {count} that cannot be read as a slice: ")
    assert words in series.warnings[0]


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


def test_slices_beside_each_other_are_no_tilt(tmp_path):
    places = [(0.4 * (z == 10), 0.0, z) for z in HEIGHTS]
    write_stack(tmp_path, places, noise)
    (warning,) = find_series(tmp_path).warnings
    assert warning.startswith("slices lie up to 0.4 mm out of line: slices were moved within")


def test_every_second_slice_missing_is_said(tmp_path):
    """The steps are even, so only the slices' thickness tells."""
    heights = (0, 10, 20, 30)
    (warning,) = find_series(write(tmp_path / "half", heights, SliceThickness=5)).warnings
    assert warning.startswith("slices 5 mm thick lie 10 mm apart")
    for mm in (10, 7, 20, 0):
        assert find_series(write(tmp_path / str(mm), heights, SliceThickness=mm)).warnings == ()


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
    for enhanced in (ENHANCED_CT, f"{CT_IMAGE}.2"):
        one(tmp_path, SOPClassUID=enhanced)
        with pytest.raises(InputError, match="an Enhanced CT image, many slices in one file"):
            find_series(tmp_path)
    one(tmp_path, NumberOfFrames=2, PixelData=bytes(2 * 960))
    with pytest.raises(
        InputError, match=r"x\.dcm: many slices in one file; expected a file a slice"
    ):
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
        text = rf"left out: 1 entry that cannot be read as a slice: 000\.dcm \(.*({words})"
        assert re.match(text, series.warnings[0])
    for other in tmp_path.glob("*.dcm"):
        other.write_bytes(whole[:400])
    with pytest.raises(InputError, match=r"000\.dcm: cut off.* \(and 4 more files\)"):
        find_series(tmp_path)


def test_slices_without_a_preamble_are_missed_in_words(tmp_path):
    """Without a suffix nothing else told them from any other file."""
    write(tmp_path, heights=(*HEIGHTS, 20.0))
    for path in sorted(tmp_path.glob("*.dcm")):
        path.rename(path.with_suffix(""))
    (tmp_path / "000").write_bytes((tmp_path / "000").read_bytes()[132:])
    (tmp_path / "README").write_text("the slices of a head" * 20)
    series = find_series(tmp_path)
    assert len(series.slices) == 4
    assert series.warnings[0].endswith(
        "as a slice: 000 (DICOM without a preamble, expected DICM at byte 128)"
    )


@pytest.mark.parametrize("name", ["b.dcm.gz", "1.2.3.DCM.zip"])
def test_packed_slices_are_missed_in_words(tmp_path, name):
    """At an end of the head nothing else would tell that they are missing."""
    write(tmp_path)
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    (tmp_path / "a.dcm.png").write_bytes(b"a picture")
    (warning,) = find_series(tmp_path).warnings
    assert f"slice: {name} (a packed file, expected the slice itself)" in warning
    assert "png" not in warning


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
        assert found.voxels.dtype == np.int16


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    write(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot read \(Permission denied\)"):
        find_series(tmp_path)


def test_a_second_acquisition_between_the_slices_of_the_first_is_left_out(tmp_path):
    """Nobody lies still: the slices of two scans in turn are a head that there never was."""
    write(tmp_path, AcquisitionNumber=1)
    again = [h + 2.5 for h in HEIGHTS]
    write(tmp_path / "again", heights=again, AcquisitionNumber=2)
    series = find_series(tmp_path)
    assert {file.text("AcquisitionNumber") for file in series.slices} == {"1"}
    assert len(series.slices) == 4
    assert (
        "left out: 1 other series or parts of one, series 2 of 4 slices, acquisition 2"
        in (series.warnings[0])
    )


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ({"ConvolutionKernel": "H31s"}, {"ConvolutionKernel": "H60s"}),
        ({"SeriesNumber": "2"}, {"SeriesNumber": "3"}),
    ],
)
@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_series_that_were_given_one_uid_are_told_apart(tmp_path, own, other, shift):
    """Slices of a soft and a bone kernel in turn were one scan of half the step, without a word."""
    write(tmp_path, **own)
    write(tmp_path / "other", heights=[h + shift for h in HEIGHTS], **other)
    series = find_series(tmp_path)
    ((keyword, value),) = own.items()
    assert {file.text(keyword) for file in series.slices} == {value}
    assert len(series.slices) == 4
    assert series.warnings[0].startswith("left out: 1 other series or parts of one")


def test_kernels_one_after_the_other_are_one_scan(tmp_path):
    """Such as the skull base and what lies above."""
    write(tmp_path, ConvolutionKernel="H31s")
    write(tmp_path / "above", heights=(20.0, 25.0, 30.0), ConvolutionKernel="H40s")
    assert len(find_series(tmp_path).slices) == 7


def test_a_part_that_was_taken_again_is_left_out(tmp_path):
    write(tmp_path, heights=np.arange(0, 60, 5.0), AcquisitionNumber=1)
    write(tmp_path / "again", heights=(22.0, 27.0, 32.0), AcquisitionNumber=2)
    series = find_series(tmp_path)
    assert len(series.slices) == 12
    assert "series 2 of 3 slices, acquisition 2" in series.warnings[0]


@pytest.mark.parametrize("each", [1, 2, 3, 4])
def test_a_scan_of_many_acquisitions_one_after_the_other_is_one(tmp_path, each):
    heights = np.arange(0, 60, 5.0)
    for number, start in enumerate(range(0, 12, each)):
        write(tmp_path / str(number), heights=heights[start : start + each],
              AcquisitionNumber=number + 1)  # fmt: skip
    series = find_series(tmp_path)
    assert len(series.slices) == 12
    assert series.warnings == ()


def test_acquisitions_that_overlap_by_a_slice_are_one_scan(tmp_path):
    """Such as the skull base in thin slices, and the rest in thick ones."""
    write(tmp_path, heights=(0.0, 4.0, 8.0, 12.0, 16.0), AcquisitionNumber=1)
    write(tmp_path / "above", heights=(15.0, 19.0, 23.0, 27.0), AcquisitionNumber=2)
    assert len(find_series(tmp_path).slices) == 9


@pytest.mark.parametrize("heights", [(2.5, 7.5, 12.5, 17.5, 22.5), (20.0, 25.0, 30.0, 35.0, 40.0)])
def test_slices_of_another_frame_of_reference_are_another_scan(tmp_path, heights):
    """Positions in two frames cannot be held against each other."""
    write(tmp_path)
    write(tmp_path / "other", heights=heights, FrameOfReferenceUID="1.2.5")
    series = find_series(tmp_path)
    assert {file.text("FrameOfReferenceUID") for file in series.slices} == {"1.2.5"}  # more
    assert (
        "1 other series or parts of one, series 2 of 4 slices (covering less)"
        in (series.warnings[0])
    )
