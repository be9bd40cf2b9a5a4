"""Each study is a case, whatever lies beside it."""

import numpy as np
import pytest
from helpers.dicom_files import SERIES, make_slice, save, write_stack
from pydicom.uid import generate_uid

from ichseg.errors import InputError
from ichseg.scan.dicom.series import find_series
from ichseg.scan.dicom.studies import Study, find_studies
from ichseg.scan.reader import read_scan


def put(folder, study="1.2.3", heights=(0.0, 5.0), **changes):
    """A series of its own."""
    write_stack(
        folder, [(0, 0, z) for z in heights], lambda at: at[..., 2], StudyInstanceUID=study,
        **({"SeriesInstanceUID": generate_uid()} | changes),
    )  # fmt: skip
    return folder


def found(folder):
    return find_studies(folder, sorted(folder.iterdir())).studies


def screenshot(path, study):
    """A secondary capture."""
    kind = "1.2.840.10008.5.1.4.1.1.7"
    made = make_slice(
        np.zeros((4, 4)), (0, 0, 0), SOPClassUID=kind, Modality="OT",
        StudyInstanceUID=study,
    )  # fmt: skip
    return save(made, path)


def test_what_lies_beside_two_patients_does_not_make_them_one(tmp_path):
    """A screenshot of one of them, and a medium's directory."""
    one, two = put(tmp_path / "a", "1.1"), put(tmp_path / "b", "1.2", PatientID="2")
    screenshot(tmp_path / "capture", "1.1")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(8))
    assert found(tmp_path) == [Study("a", one), Study("b", two)]


def test_two_studies_of_a_patient_are_two_cases(tmp_path):
    put(tmp_path / "p" / "first", "1.9", StudyDate="20200101")
    put(tmp_path / "p" / "later", "1.1", StudyDate="20210101")
    p = tmp_path / "p"
    assert found(tmp_path) == [Study("p_first", p / "first"), Study("p_later", p / "later")]
    with pytest.raises(InputError, match="slices of 2 studies, expected those of one"):
        find_series(p)


def test_studies_that_share_a_folder_are_told_apart_by_date(tmp_path):
    folder = tmp_path / "p"
    put(folder, "1.9", StudyDate="20200101")
    for path in list(folder.iterdir()):
        path.rename(folder / f"x{path.name}")
    put(folder, "1.1", heights=(0.0, 5.0, 10.0), StudyDate="20210101")
    first, second = found(tmp_path)
    assert (first, second) == (Study("p_study1", folder, "1.9"), Study("p_study2", folder, "1.1"))
    assert len(read_scan(folder, study="1.9").voxels) == 2
    scan = read_scan(folder, study="1.1")
    assert len(scan.voxels) == 3
    assert scan.warnings == ()


def test_series_of_one_study_are_one_case(tmp_path):
    """With the folder of its localiser, which is then named."""
    put(tmp_path / "SE1", "1.1", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    put(tmp_path / "SE2", "1.1", SeriesNumber="2")
    assert found(tmp_path) == [Study("SE2", tmp_path)]
    put(tmp_path / "SE3", "1.1", SeriesNumber="3")
    assert found(tmp_path) == [Study(tmp_path.name, tmp_path)]
    warnings = read_scan(tmp_path).warnings
    assert "left out: 2 files of a localiser" in warnings
    assert any("1 other series or parts of one, series 3" in w for w in warnings)


def test_folders_whose_numbers_were_taken_away_stay_apart(tmp_path):
    """An anonymiser gave all patients the same UIDs, or none."""
    for name in ("a", "b"):
        put(tmp_path / "same" / name, "1.1", SeriesInstanceUID=SERIES)
        put(tmp_path / "none" / name, None)
    for kind in ("same", "none"):
        folder = tmp_path / kind
        assert found(folder) == [Study("a", folder / "a"), Study("b", folder / "b")]


def test_a_folder_without_a_slice_is_a_case_that_says_so(tmp_path):
    put(tmp_path / "mr", "1.7", Modality="MR")
    put(tmp_path / "ct", "1.8")
    assert found(tmp_path) == [Study("ct", tmp_path / "ct"), Study("mr", tmp_path / "mr")]
    with pytest.raises(InputError, match="but 2 files of modality MR"):
        find_series(tmp_path / "mr")


def test_slices_of_several_patients_are_refused(tmp_path):
    put(tmp_path / "a", heights=(0.0,), SeriesInstanceUID=SERIES)
    (tmp_path / "a" / "000.dcm").rename(tmp_path / "a" / "first.dcm")
    put(tmp_path / "a", heights=(5.0,), SeriesInstanceUID=SERIES, PatientID="SECRET")
    with pytest.raises(InputError, match=r"a: slices of 2 patients, expected those of one$"):
        find_series(tmp_path / "a")


@pytest.mark.parametrize(
    ("one", "other", "is_refused"),
    [
        ({"PatientName": "A"}, {"PatientName": "B"}, True),
        ({"PatientBirthDate": "19500101"}, {"PatientBirthDate": "19510101"}, True),
        ({"PatientName": "Doe^Jane"}, {"PatientName": "DOE^JANE^^"}, False),
        ({"PatientName": "A", "PatientID": "1"}, {"PatientName": "B", "PatientID": "1"}, False),
    ],
)
def test_patients_without_numbers_are_told_apart_by_name(tmp_path, one, other, is_refused):
    """Whoever took their numbers away gave all of them the same study and series."""
    without = {"SeriesInstanceUID": SERIES, "PatientID": None}
    put(tmp_path / "a", **(without | one))
    put(tmp_path / "a" / "b", heights=(2.5, 7.5), **(without | other))
    if is_refused:
        with pytest.raises(InputError, match=r"a: slices of 2 patients, expected those of one$"):
            read_scan(tmp_path / "a")
    else:
        assert read_scan(tmp_path / "a").voxels.shape[0] == 4


def test_files_that_are_in_no_case_are_named(tmp_path):
    """A whole scan in one file is one of them; a medium's directory says nothing."""
    put(tmp_path / "p1", "1.1")
    put(tmp_path / "p2" / "first", "1.2")
    put(tmp_path / "p2" / "later", "1.3")
    enhanced = make_slice(np.zeros((4, 4)), (0, 0, 0), SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1")
    loose = save(enhanced, tmp_path / "enhanced.dcm")
    above = save(enhanced, tmp_path / "p2" / "enhanced.dcm")
    capture = screenshot(tmp_path / "capture.dcm", "1.1")
    there = find_studies(tmp_path, sorted(tmp_path.iterdir()))
    assert [study.name for study in there.studies] == ["p1", "p2_first", "p2_later"]
    assert sorted(path for path, _ in there.faults) == [loose, above]
    assert {why[:21] for _, why in there.faults} == {"an Enhanced CT image,"}
    assert there.others == [(capture, "DICOM of modality OT")]
    put(tmp_path, "1.4")  # whoever reads this study names them
    there = find_studies(tmp_path, sorted(tmp_path.iterdir()))
    assert (there.faults, there.others) == ([], [])
