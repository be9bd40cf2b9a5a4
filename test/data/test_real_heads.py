"""Head CT that was published as pictures becomes a dataset."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from ichseg.errors import DatasetError, OutputError
from training.data import downloads as downloads_of
from training.data import real_heads, windowed
from training.data.layouts import read_source

SIZE = 240


def head(slices=9, *, brain=29.0, bleed=None, bleed_hu=65.0, calcified=None):
    """A round head in HU -20..100: skull 10 pixels thick, brain inside, air outside."""
    rows, columns = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    radius = np.hypot(rows, columns)
    plane = np.where(radius < 100, brain, np.where(radius < 110, 100.0, -20.0))
    hu = np.repeat(plane[None], slices, axis=0).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 3, hu.shape).astype(np.float32)
    hu = np.where((radius < 100), hu + noise, hu)
    for place, value in ((bleed, bleed_hu), (calcified, 100.0)):
        if place is not None:
            hu[place] = value
    return hu.clip(-20, 100)


def as_png(folder, name, plane):
    folder.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(plane), str(folder / f"{name}.png"))


def test_ranks_become_hu_whatever_grey_they_were_shown_in():
    hu = np.rint(head())
    hu[0, 0, :121] = np.arange(-20, 101)
    grey = np.array([0, *np.arange(1, 120) * 2 + 1, 255])[(hu + 20).astype(int)].astype(np.uint8)
    np.testing.assert_array_equal(windowed.hu_of_ranks(grey), hu)


def test_another_window_is_placed_by_the_brain():
    shown = np.rint(head(brain=41.0)).clip(0, 80)
    shown[0, 0, :81] = np.arange(81)
    found = windowed.hu_of_ranks(shown.astype(np.uint8))
    assert np.median(found[:, 80:160, 80:160]) == pytest.approx(29, abs=1)
    near = np.rint(head(brain=31.0)).clip(0, 80)
    near[0, 0, :81] = np.arange(81)
    np.testing.assert_array_equal(windowed.hu_of_ranks(near.astype(np.uint8)), near)


def test_spacing_is_that_of_an_adults_head():
    found = windowed.head_spacing_mm(head())
    assert found == pytest.approx(147.6 / (np.pi * 110**2) ** 0.5, rel=0.01)


def test_a_bleed_is_marked_in_its_box_and_beyond_it_where_it_goes_on():
    bleed = np.s_[3:7, 100:120, 130:150]
    hu = head(bleed=bleed)
    boxes = [[(125, 95, 155, 125)] if z in (4, 5) else [] for z in range(len(hu))]
    found, doubtful = windowed.mark_bleeds(hu, boxes)
    expected = np.zeros(hu.shape, bool)
    expected[bleed] = True
    overlap = 2 * (found & expected).sum() / (found.sum() + expected.sum())
    assert overlap > 0.93
    assert found[3].any()  # no box, but the bleed goes on
    assert not found[2].any()
    assert not (found & doubtful).any()
    assert doubtful[4].any()  # its rim
    assert not doubtful[:, :90].any()


def test_calcifications_and_what_lies_outside_the_skull_are_no_bleeds():
    hu = head(bleed=np.s_[4, 118:123, 10:16], bleed_hu=70.0, calcified=np.s_[4, 118:124, 118:124])
    hu[4, 5:25, 5:25] = 70.0  # scalp
    boxes = [[(0, 0, SIZE - 1, SIZE - 1)] if z == 4 else [] for z in range(len(hu))]
    found, _ = windowed.mark_bleeds(hu, boxes)
    assert not found.any()


def test_what_is_fainter_is_left_to_nobody_can_tell():
    hu = head(bleed=np.s_[3:6, 100:120, 130:150])
    hu[3:6, 100:120, 150:170] = 43.0  # 14 HU over the brain, connected to the bleed
    boxes = [[(120, 90, 175, 130)] if z in (3, 4, 5) else [] for z in range(len(hu))]
    found, doubtful = windowed.mark_bleeds(hu, boxes)
    assert doubtful[4, 103:117, 154:166].mean() > 0.9
    assert found[4, 103:117, 154:166].mean() < 0.05


@pytest.mark.parametrize("outside", [0.0, -20.0, -1000.0])
def test_a_stripped_head_is_its_brain(outside):
    hu = head()
    stripped, kept = windowed.strip_skull(hu, 0, outside)
    inside = np.hypot(*(np.mgrid[:SIZE, :SIZE] - SIZE / 2)) < 95
    assert kept[:, inside].all()
    assert not kept[:, np.hypot(*(np.mgrid[:SIZE, :SIZE] - SIZE / 2)) > 101].any()
    assert (stripped[~kept] == outside).all()
    np.testing.assert_array_equal(stripped[kept], hu[kept])
    tight = windowed.strip_skull(hu, 2, outside)[1]
    loose = windowed.strip_skull(hu, -2, outside)[1]
    assert tight.sum() < kept.sum() < loose.sum()


@pytest.fixture
def downloads(tmp_path):
    """Two patients of each set, as pictures."""
    boxes = ["slice,xmin,ymin,xmax,ymax"]
    for patient in ("0001", "0002"):
        hu = np.rint(head(5, bleed=np.s_[1:4, 100:130, 130:160]))
        hu[0, 0, :121] = np.arange(-20, 101)
        for z, plane in enumerate(hu):
            as_png(
                tmp_path / "phe" / "images",
                f"{patient}_{z + 1:02d}",
                (plane + 20).astype(np.uint8) * 2,
            )
        boxes += [f"{patient}_{z + 1:02d},125,95,165,135" for z in (1, 2, 3)]
    (tmp_path / "phe" / "boxes.csv").write_text("\n".join(boxes) + "\n")
    rows = ["PatientNumber,SliceNumber,No_Hemorrhage"]
    for patient in ("051", "060"):
        for z, plane in enumerate(head(4)):
            grey = np.rint((plane + 20) / 120 * 255).astype(np.uint8)
            as_png(tmp_path / "ich" / "brain", f"{patient}_{z + 1:02d}", grey)
            rows.append(f"{int(patient)},{z + 1},{0 if patient == '060' and z == 2 else 1}")
    (tmp_path / "ich" / "hemorrhage_diagnosis.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_a_dataset_with_its_copies_groups_and_record(downloads):
    out = downloads / "out"
    phe, ich = downloads / "phe", downloads / "ich"
    real_heads.write_dataset(out, phe_sich=phe, ct_ich=ich, workers=1)
    names = ["phesich_0001", "phesich_0002", "ctich_051", "ctich_060"]
    expected = sorted([*names, *(f"{name}_copy" for name in names)])
    assert [case.name for case in read_source(out).cases] == expected
    assert json.loads((out / "dataset.json").read_text())["labels"]["2"] == "ignore"
    groups = dict(csv.reader((out / "groups.csv").open()))
    assert groups["phesich_0001_copy"] == groups["phesich_0001"] == "phesich_0001"
    labels = read(out / "labelsTr" / "phesich_0001.nii.gz")
    image = sitk.ReadImage(str(out / "imagesTr" / "phesich_0001.nii.gz"))
    assert labels.shape == (5, SIZE // 2, SIZE // 2)
    # the pictures lie on their side: x of the picture is y of the scan
    assert (labels[2, 67:78, 52:63] == 1).all()
    assert sitk.GetArrayFromImage(image)[2, 70, 57] == pytest.approx(65, abs=2)
    assert image.GetSpacing()[0] == pytest.approx(147.6 / (np.pi * 55**2) ** 0.5, rel=0.02)
    bleeding = read(out / "labelsTr" / "ctich_060.nii.gz")
    assert (bleeding[2] == 2).all()  # somewhere in this slice
    assert (np.delete(bleeding, 2, axis=0) == 0).all()
    record = {row["case"]: row for row in csv.DictReader((out / "record.csv").open())}
    assert float(record["phesich_0001"]["bleed_ml"]) > 1
    assert record["phesich_0001"]["copy"] == ""
    assert record["phesich_0001_copy"]["copy"] != ""


def test_scans_without_a_bleed_have_as_many_copies_as_wanted_each_another(downloads):
    out = downloads / "out"
    ich = downloads / "ich"
    real_heads.write_dataset(out, ct_ich=ich, negative_copies=3, workers=1)
    names = [case.name for case in read_source(out).cases]
    quiet = ["ctich_051", "ctich_051_copy", "ctich_051_copy2", "ctich_051_copy3"]
    assert names == [*quiet, "ctich_060", "ctich_060_copy"]  # whose third slice holds a bleed
    copies = [read(out / "imagesTr" / f"{name}.nii.gz") for name in quiet[1:]]
    assert not any(np.array_equal(copies[a], copies[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert set(dict(csv.reader((out / "groups.csv").open())).values()) == {
        "group", "ctich_051", "ctich_060",
    }  # fmt: skip
    with pytest.raises(DatasetError, match="--negative-copies is 0, expected at least 1"):
        real_heads.write_dataset(downloads / "none", ct_ich=ich, negative_copies=0)


def test_the_same_bytes_again(downloads):
    for name in ("a", "b"):
        real_heads.write_dataset(downloads / name, phe_sich=downloads / "phe", workers=1)
    for path in sorted((downloads / "a").rglob("*.nii.gz")):
        other = downloads / "b" / path.relative_to(downloads / "a")
        np.testing.assert_array_equal(read(path), read(other))


def test_what_is_missing_is_named(downloads):
    phe, ich = downloads / "phe", downloads / "ich"
    with pytest.raises(DatasetError, match="nothing to make"):
        real_heads.write_dataset(downloads / "out")
    with pytest.raises(DatasetError, match=r"boxes.csv: cannot read \(No such file"):
        real_heads.write_dataset(downloads / "out", phe_sich=ich)
    (downloads / "ich_1.3" / "ct_scans").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"ich_1.3: version 1.3 .*; expected version 1.0.0"):
        real_heads.write_dataset(downloads / "out", ct_ich=downloads / "ich_1.3")
    (phe / "boxes.csv").write_text("slice,xmin,ymin,xmax\n0001_01,1,2,3\n")
    with pytest.raises(DatasetError, match=r"boxes.csv: lacks the columns ymax"):
        real_heads.write_dataset(downloads / "out", phe_sich=phe)
    (phe / "boxes.csv").write_text("slice,xmin,ymin,xmax,ymax\n0001_01,1,2,3,4\n")
    with pytest.raises(DatasetError, match="no box for any slice of 0002"):
        real_heads.write_dataset(downloads / "out", phe_sich=phe)
    rows = (ich / "hemorrhage_diagnosis.csv").read_text().splitlines()
    (ich / "hemorrhage_diagnosis.csv").write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(DatasetError, match="no row for slice 4 of patient 060"):
        real_heads.write_dataset(downloads / "out", ct_ich=ich)
    (ich / "brain" / "note.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"note.png: expected a name such as"):
        real_heads.write_dataset(downloads / "out", ct_ich=ich)


PHE = "slice,xmin,ymin,xmax,ymax\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PHE + "0001_01,1,2,3,x\n", "boxes.csv: ymax is 'x', expected a number"),
        (PHE + "0001_01,1,2,3,nan\n", "boxes.csv: ymax is 'nan', expected a number"),
        (PHE + "0001_01,1,2,3,1e999\n", "boxes.csv: ymax is '1e999', expected a number"),
        (PHE + "0001_01,1,2\n", "boxes.csv: line 2 is too short, expected slice, xmin"),
        (PHE + "0001-01,1,2,3,4\n", "boxes.csv: slice is '0001-01', expected PATIENT_SLICE"),
        (PHE + "0001_01,9,2,3,4\n", "boxes.csv: box 9, 2, 3, 4 in slice '0001_01', expected"),
        (PHE.encode() + b"\xff\xfe", "boxes.csv: not a table in UTF-8"),
    ],
)
def test_damaged_tables_of_boxes_are_refused(downloads, content, message):
    raw = content if isinstance(content, bytes) else content.encode()
    (downloads / "phe" / "boxes.csv").write_bytes(raw)
    with pytest.raises(DatasetError, match=message):
        real_heads.write_dataset(downloads / "out", phe_sich=downloads / "phe")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,1,1", "PatientNumber is 'x', expected a number"),
        ("51,1,", "No_Hemorrhage is '', expected a number"),
        ("51,1,2", "No_Hemorrhage is 2 for slice 1 of patient 51, expected 0 or 1"),
    ],
)
def test_damaged_tables_of_bleeds_are_refused(downloads, row, message):
    with (downloads / "ich" / "hemorrhage_diagnosis.csv").open("a") as stream:
        stream.write(row + "\n")
    with pytest.raises(DatasetError, match=message):
        real_heads.write_dataset(downloads / "out", ct_ich=downloads / "ich")


def test_pictures_that_are_damaged_or_of_another_size_are_named(downloads):
    images = downloads / "phe" / "images"
    whole = (images / "0002_03.png").read_bytes()
    (images / "0002_03.png").write_bytes(whole[:90])
    with pytest.raises(DatasetError, match=r"phesich_0002: .*0002_03\.png: not a picture"):
        real_heads.write_dataset(downloads / "out", phe_sich=downloads / "phe")
    as_png(images, "0002_03", np.zeros((60, 50), np.uint8))
    with pytest.raises(DatasetError, match=r"0002_03\.png: 60x50 pixels, expected 240x240 as in"):
        real_heads.write_dataset(downloads / "out", phe_sich=downloads / "phe")
    assert not (downloads / "out" / "dataset.json").exists()


def test_slices_without_a_picture_are_told_and_recorded(downloads, caplog):
    """One with a box, one that no table lists, one of which a table says what it shows."""
    (downloads / "phe" / "images" / "0001_02.png").unlink()
    (downloads / "phe" / "images" / "0002_04.png").unlink()
    (downloads / "ich" / "brain" / "060_04.png").unlink()
    out = downloads / "out"
    real_heads.write_dataset(out, phe_sich=downloads / "phe", ct_ich=downloads / "ich")
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [line.partition(";")[0] for line in told] == [
        f"{downloads}/phe/images: no picture of 2 slices: phesich_0001 2, phesich_0002 4",
        f"{downloads}/ich/brain: no picture of 1 slice: ctich_060 4",
    ]
    record = {row["case"]: row for row in csv.DictReader((out / "record.csv").open())}
    assert {name: row["missing_slices"] for name, row in record.items()} == {
        "phesich_0001": "2", "phesich_0001_copy": "2",
        "phesich_0002": "4", "phesich_0002_copy": "4",
        "ctich_051": "", "ctich_051_copy": "", "ctich_060": "4", "ctich_060_copy": "4",
    }  # fmt: skip


def test_one_slice_by_two_names_is_refused(downloads):
    images = downloads / "phe" / "images"
    (images / "0001_002.png").write_bytes((images / "0001_02.png").read_bytes())
    with pytest.raises(DatasetError, match=r"0001_02\.png: slice 2 of 0001 is there twice, the"):
        downloads_of.find_phe_sich(downloads / "phe")


def finished(folder, name, voxels, labels, names=("background", "hemorrhage", "ignore")):
    """Another dataset, of one case."""
    for part, array in (("imagesTr", voxels), ("labelsTr", labels)):
        (folder / part).mkdir(parents=True)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / part / f"{name}.nii.gz"))
    entry = {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
    listed = {
        "name": "Other", "modality": {"0": "CT"}, "numTraining": 1, "training": [entry],
        "labels": {str(value): name for value, name in enumerate(names)},
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(listed))
    return folder


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((3, 4, 5), np.uint8), r"a\.nii\.gz: 3x4x5 voxels, expected 3x4x6 as in .*a\.nii"),
        (np.full((3, 4, 6), 257, np.int16), r"labelsTr/a\.nii\.gz: label 257, expected 0, 1 or 2"),
    ],
)
def test_labels_of_another_dataset_must_fit_its_scans(tmp_path, labels, message):
    other = finished(tmp_path / "other", "a", np.zeros((3, 4, 6), np.int16), labels)
    with pytest.raises(DatasetError, match=message):
        real_heads.write_dataset(tmp_path / "out", also=[other])


def test_labels_of_another_dataset_must_mean_the_same(tmp_path):
    voxels, labels = np.zeros((3, 4, 6), np.int16), np.zeros((3, 4, 6), np.uint8)
    for number, names in enumerate(
        [("background", "core", "oedema"), ("background", "core", "oedema", "ignore")]
    ):
        other = finished(tmp_path / str(number), "a", voxels, labels, names)
        with pytest.raises(DatasetError, match=r"labels background, core, oedema.*; expected"):
            downloads_of.find_others(other)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("b,p\n", "1 of 1 cases have no group: a"),
        ("a,p\na,q\n", "row 3 puts case a into q, an earlier one into p"),
    ],
)
def test_groups_of_another_dataset_are_read_as_those_of_a_workspace(tmp_path, rows, message):
    voxels, labels = np.zeros((3, 4, 6), np.int16), np.zeros((3, 4, 6), np.uint8)
    other = finished(tmp_path / "other", "a", voxels, labels)
    (other / "groups.csv").write_text("\ufeffcase,group\na,p\n")
    assert [scan.group for scan in downloads_of.find_others(other)] == ["p"]
    (other / "groups.csv").write_text("case,group\n" + rows)
    with pytest.raises(DatasetError, match=message):
        downloads_of.find_others(other)


def test_two_cases_of_one_name_are_refused(tmp_path):
    voxels, labels = np.zeros((3, 4, 6), np.int16), np.zeros((3, 4, 6), np.uint8)
    folders = [
        finished(tmp_path / name, case, voxels, labels)
        for name, case in (("x", "a"), ("y", "a"), ("z", "a_copy"))
    ]
    with pytest.raises(DatasetError, match="two cases would be called a"):
        real_heads.write_dataset(tmp_path / "out", also=folders[:2])
    with pytest.raises(DatasetError, match="two cases would be called a_copy"):
        real_heads.write_dataset(tmp_path / "out", also=folders[1:])


def test_a_full_disk_leaves_no_dataset_behind(downloads, monkeypatch):
    out, ich = downloads / "out", downloads / "ich"
    real = Path.write_text

    def full(path, text, **given):
        real(path, text[:10], **given)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OutputError, match=r"dataset\.json: cannot write \(No space left"):
            real_heads.write_dataset(out, ct_ich=ich)
    real_heads.write_dataset(out, ct_ich=ich)  # the same command makes it anew
    assert len(read_source(out).cases) == 4


def test_a_dataset_is_not_written_over(downloads):
    (downloads / "dataset.json").write_text("{}")
    with pytest.raises(DatasetError, match="holds a dataset already"):
        real_heads.write_dataset(downloads, phe_sich=downloads / "phe")
