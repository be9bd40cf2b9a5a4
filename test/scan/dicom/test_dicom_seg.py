"""A folder of DICOM through the whole of process.py's way: names, masks, DICOM-SEG, volume."""

import importlib.util
import json

import highdicom
import numpy as np
import pydicom
import pytest
from conftest import make_bundle
from helpers.dicom_files import make_slice, save, write_stack

from ichseg.app import contents, pipeline
from ichseg.app.cases import find_cases
from ichseg.app.main import main as process
from ichseg.app.one_case import Options
from ichseg.predict import components
from ichseg.predict.components import Segmentation
from ichseg.predict.ensemble import Ensemble
from ichseg.scan import volume
from ichseg.scan.dicom import dicom_seg, straighten
from ichseg.scan.dicom.dicom_seg import Algorithm, write_seg
from ichseg.scan.dicom.series import find_series

TILT = np.radians(15)
TILTED = (1.0, 0.0, 0.0, 0.0, float(np.cos(TILT)), -float(np.sin(TILT)))
HEIGHTS = (0.0, 4.0, 8.0, 12.0, 19.0, 26.0)
ALGORITHM = Algorithm("bleeds", "1", ("hemorrhage",))


def head(at):
    """Tissue in a disc, air around it, a bright piece between 5 and 21 mm."""
    x, y, z = np.moveaxis(at, -1, 0)
    inside = np.hypot(x - 20, y - 12) < 11
    bright = inside & (x > 20) & (z > 5) & (z < 21)
    return np.where(bright, 70, np.where(inside, 35, -1000))


def write_head(folder, **changes):
    places = [(0.0, 0.0, z) for z in HEIGHTS]
    write_stack(folder, places, head, shape=(60, 54), orientation=TILTED, **changes)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    make_bundle(folder, folds=1)
    return folder


class Bright(Ensemble):
    """Finds what lies above 50 HU."""

    def finish(self, predicted, **choices):
        found = super().finish(predicted, **choices)
        mask = predicted.volume.with_voxels((predicted.volume.voxels > 50).astype(np.uint8))
        lesions = components.lesions(mask.voxels, predicted.volume)
        return Segmentation(mask, found.volume_ml, found.ran, found.seconds, lesions=lesions)


def segment(folder, bundle, out):
    real = Ensemble.load(bundle, "cpu")
    ensemble = Bright(real.model, real.folder, real.engine)
    job = find_cases(folder, out, input_slug="head-ct", output_slug="bleed")
    return pipeline.run(job, pipeline.alone(ensemble), Options(out, "fast"))


@pytest.fixture(scope="module")
def segmented(tmp_path_factory, bundle):
    place = tmp_path_factory.mktemp("dicom")
    write_head(place / "in" / "patient")
    (ended,) = segment(place / "in", bundle, place / "out")
    return place, ended


def test_mask_lies_on_the_straight_grid_and_is_named_so(segmented):
    place, ended = segmented
    assert (ended.image, ended.mask, ended.error) == ("patient", "patient_straight.mha", "")
    mask = volume.read(place / "out" / "patient_straight.mha")
    series = find_series(place / "in" / "patient")
    grid = straighten.grid_of(series.stack)
    assert mask.voxels.shape == grid.shape
    assert mask.spacing_mm == pytest.approx(grid.spacing_mm)
    assert mask.voxels.any()
    said = " ".join(ended.report["warnings"])
    assert "gantry tilted by 15.0 degrees" in said
    assert "brought to an even 4.19 mm" in said
    assert not [name for name in (place / "out").iterdir() if name.name.startswith(".")]


def test_every_frame_of_the_segmentation_lies_on_its_slice(segmented):
    """Read back by pydicom: positions are the source's to the file's digits."""
    place, _ = segmented
    seg = pydicom.dcmread(place / "out" / "patient_seg.dcm")
    sources = {}
    for path in (place / "in" / "patient").iterdir():
        source = pydicom.dcmread(path)
        sources[source.SOPInstanceUID] = source
    (plane,) = seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    np.testing.assert_allclose(plane.ImageOrientationPatient, TILTED, atol=1e-6)
    seen = set()
    for frame, pixels in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True):
        (image,) = frame.DerivationImageSequence[0].SourceImageSequence
        source = sources[image.ReferencedSOPInstanceUID]
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        assert [float(v) for v in position] == [float(v) for v in source.ImagePositionPatient]
        hu = source.pixel_array.astype(int) - 1024
        overlap = 2 * (pixels & (hu > 50)).sum() / (pixels.sum() + (hu > 50).sum())
        assert overlap > 0.75, position  # 7 mm slices give to and take from a 4 mm grid
        seen.add(image.ReferencedSOPInstanceUID)
    assert len(seen) == 4  # of those from 8 mm on, which reach 8 mm down
    assert seg.SegmentSequence[0].SegmentLabel == "hemorrhage"
    assert seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeValue == "50960005"
    assert "not for diagnosis" in seg.ContentDescription
    assert seg.PatientName == "A^B"


def test_volume_is_that_of_the_slices(segmented):
    """By hand: each frame's pixels, half the way to the slices beside it."""
    place, ended = segmented
    seg = highdicom.seg.segread(place / "out" / "patient_seg.dcm")
    heights = np.array([4, 4, 4, 5.5, 7, 7]) * np.cos(TILT)
    by_height = dict(zip(HEIGHTS, heights, strict=True))
    total = 0.0
    for frame, pixels in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True):
        z = float(frame.PlanePositionSequence[0].ImagePositionPatient[2])
        total += pixels.sum() * 0.5 * 0.75 * by_height[z] / 1000
    assert ended.report["volume_ml"] == pytest.approx(total, abs=1e-3)
    written = json.loads((place / "out" / "results.json").read_text())
    assert written[0]["report"]["volume_ml"] == ended.report["volume_ml"]


def test_the_same_mask_has_the_same_uids(segmented, bundle, tmp_path):
    place, _ = segmented
    segment(place / "in", bundle, tmp_path / "again")
    one, two = (
        pydicom.dcmread(out / "patient_seg.dcm") for out in (place / "out", tmp_path / "again")
    )
    assert one.SOPInstanceUID == two.SOPInstanceUID
    assert one.SeriesInstanceUID != one.SOPInstanceUID


def test_an_empty_mask_is_written_too(segmented, tmp_path):
    place, _ = segmented
    series = find_series(place / "in" / "patient")
    labels = np.zeros((len(series.slices), *series.stack.shape), np.uint8)
    assert write_seg(labels, series, tmp_path / "empty_seg.dcm", ALGORITHM) is None
    assert not pydicom.dcmread(tmp_path / "empty_seg.dcm").pixel_array.any()


def test_several_labels_are_several_segments(segmented, tmp_path):
    place, _ = segmented
    series = find_series(place / "in" / "patient")
    labels = np.zeros((len(series.slices), *series.stack.shape), np.uint8)
    labels[1, 5:9, 5:9], labels[2, 5:9, 5:9] = 1, 2
    two = Algorithm("bleeds", "1", ("hemorrhage", "calcification"))
    assert write_seg(labels, series, tmp_path / "two_seg.dcm", two) is None
    seg = highdicom.seg.segread(tmp_path / "two_seg.dcm")
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["hemorrhage", "calcification"]
    frames = seg.PerFrameFunctionalGroupsSequence
    numbers = [f.SegmentIdentificationSequence[0].ReferencedSegmentNumber for f in frames]
    heights = [float(f.PlanePositionSequence[0].ImagePositionPatient[2]) for f in frames]
    assert sorted(zip(numbers, heights, strict=True)) == [(1, 4.0), (2, 8.0)]


def test_without_highdicom_a_warning_says_so(bundle, tmp_path, monkeypatch):
    write_head(tmp_path / "in" / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a_seg.dcm").write_bytes(b"an earlier run's")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    (ended,) = segment(tmp_path / "in", bundle, tmp_path / "out")
    assert not ended.error
    assert any("highdicom is not installed" in w for w in ended.report["warnings"])
    assert not (tmp_path / "out" / "a_seg.dcm").exists()


def test_without_highdicom_the_command_says_so_once(bundle, tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        write_head(tmp_path / "in" / name)
    monkeypatch.setattr(dicom_seg, "is_possible", lambda: False)
    given = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--weights", bundle]
    assert process([str(word) for word in (*given, "--device", "cpu")]) == 0
    assert capsys.readouterr().err.count("highdicom is not installed") == 1
    process([str(word) for word in (*given, "--device", "cpu", "--resume")])
    assert "2 of 2 cases are finished already" in capsys.readouterr().err


def test_headers_that_highdicom_refuses_cost_only_the_segmentation(bundle, tmp_path):
    write_head(tmp_path / "in" / "a", StudyInstanceUID=None)
    (ended,) = segment(tmp_path / "in", bundle, tmp_path / "out")
    assert not ended.error
    assert any(w.startswith("no DICOM-SEG: ") for w in ended.report["warnings"])
    assert [p.name for p in (tmp_path / "out").iterdir() if "seg" in p.name] == []


def test_what_anonymisers_take_away_is_not_needed(bundle, tmp_path):
    write_head(tmp_path / "in" / "a", PatientName=None, PatientID=None)
    segment(tmp_path / "in", bundle, tmp_path / "out")
    assert pydicom.dcmread(tmp_path / "out" / "a_seg.dcm").PatientName == ""


def test_a_series_that_fails_leaves_nothing_of_an_earlier_run(bundle, tmp_path):
    save(make_slice(np.zeros((9, 9)), (0, 0, 0)), tmp_path / "in" / "a" / "1.dcm")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a_seg.dcm", "a_straight.mha"):
        (out / name).write_bytes(b"an earlier run's")
    (ended,) = segment(tmp_path / "in", bundle, out)
    assert "of 1 slice at one place" in ended.error
    assert [path.name for path in out.iterdir()] == ["results.json"]


# ---- which folders are cases ----


def found(folder, out):
    job = find_cases(folder, out, input_slug="head-ct", output_slug="bleed")
    return [(c.name, c.image, c.output.name) for c in job.cases]


def a_slice(path):
    return save(make_slice(np.zeros((4, 4)), (0, 0, 0)), path)


def test_folders_that_hold_dicom_are_cases_beside_volumes(tmp_path):
    a_slice(tmp_path / "b" / "series" / "1.dcm")
    a_slice(tmp_path / "out" / "x_seg.dcm")  # of an earlier run
    a_slice(tmp_path / ".hidden" / "1.dcm")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("nothing")
    (tmp_path / "a.mha").write_bytes(b"")
    assert found(tmp_path, tmp_path / "out") == [
        ("a.mha", tmp_path / "a.mha", "a.mha"),
        ("b", tmp_path / "b", "b_straight.mha"),
    ]


def test_slices_in_the_folder_itself_are_one_case(tmp_path):
    a_slice(tmp_path / "scan" / "IM1")
    a_slice(tmp_path / "scan" / "more" / "IM2")
    assert found(tmp_path / "scan", tmp_path) == [
        ("scan", tmp_path / "scan", "scan_straight.mha"),
    ]


def test_masks_that_would_be_one_are_refused(tmp_path):
    a_slice(tmp_path / "a" / "1.dcm")
    (tmp_path / "a_straight.mha").write_bytes(b"")
    job = find_cases(tmp_path, tmp_path / "out", input_slug="ct", output_slug="bleed")
    assert [case.refusal for case in job.cases] == [
        "2 scans whose masks would be a_straight.mha"
    ] * 2


def test_a_folder_has_changed_when_a_slice_has(tmp_path):
    a_slice(tmp_path / "a" / "1.dcm")
    before = contents.stamp_of(tmp_path / "a")
    a_slice(tmp_path / "a" / "2.dcm")
    assert contents.stamp_of(tmp_path / "a")["bytes"] > before["bytes"]


def test_what_is_written_among_the_slices_is_no_change_of_them(tmp_path):
    study, out = tmp_path / "study", tmp_path / "study" / "made" / "out"
    a_slice(study / "1.dcm")
    before = contents.stamp_of(study, output=out)
    a_slice(out / "study_seg.dcm")
    assert contents.stamp_of(study, output=out) == before
    assert contents.stamp_of(study) != before
    assert contents.stamp_of(study, output=study) == contents.stamp_of(study)
