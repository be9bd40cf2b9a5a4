"""The layouts in which datasets arrive, and what is refused in each."""

import json
import logging

import pytest
from helpers.datasets import (
    SPACING_MM,
    make_voxels,
    write_4d,
    write_instance,
    write_msd,
    write_v1,
    write_v2,
)

from ichseg.errors import DatasetError
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.data.convert import convert
from training.data.dataset import Case
from training.data.layouts import read_source

LABELS = ("background", "bleed")


def test_msd_reads_the_names_of_nnunet_v2(tmp_path):
    source = write_msd(
        tmp_path / "source",
        modality=None,
        channel_names={"0": "ct"},
        labels={"bleed": 1, "background": 0},
    )
    found = read_source(source)
    assert (found.layout, found.channels, found.declared.labels) == ("MSD task", ("ct",), LABELS)


def test_nnunet_v1(tmp_path):
    source = write_v1(tmp_path / "Task101_Tiny", numTraining=3)
    found = read_source(source)
    assert found.layout == "nnU-Net v1 raw folder"
    assert (found.name, found.channels, found.declared.labels) == ("Tiny", ("T1", "T2"), LABELS)
    images = tuple(source / f"imagesTr/b_{i:04d}.nii.gz" for i in range(2))
    assert found.cases[1] == Case("b", images, source / "labelsTr/b.nii.gz")
    converted = convert(source, tmp_path / "work")
    assert converted.cases[1].images[1].samefile(images[1])


def test_a_case_name_of_msd_may_look_like_a_channel(tmp_path):
    found = read_source(write_msd(tmp_path / "source", names=("a", "a_0000")))
    assert found.layout == "MSD task"
    assert [case.name for case in found.cases] == ["a", "a_0000"]


def test_nnunet_v2(tmp_path, caplog):
    source = write_v2(tmp_path / "Dataset101_Tiny", names=("b", "a_1"))
    (source / "imagesTr/.hidden_0000.nii.gz").touch()
    found = read_source(source)
    assert found.layout == "nnU-Net v2 raw folder"
    assert (found.name, found.channels) == ("Dataset101_Tiny", ("T1", "T2"))
    assert found.declared.labels == LABELS
    images = tuple(source / f"imagesTr/a_1_{i:04d}.nii.gz" for i in range(2))
    assert found.cases[0] == Case("a_1", images, source / "labelsTr/a_1.nii.gz")
    assert [case.name for case in found.cases] == ["a_1", "b"]
    assert caplog.text == ""
    converted = convert(source, tmp_path / "work")
    assert converted.cases[0].images[1].samefile(images[1])
    assert converted.cases[0].label.samefile(source / "labelsTr/a_1.nii.gz")


def test_nnunet_v2_with_explicit_files(tmp_path):
    files = write_v2(tmp_path / "files", channels=("CT",))
    source = tmp_path / "Dataset102_Elsewhere"
    source.mkdir()
    content = json.loads((files / "dataset.json").read_text())
    relative, absolute = "../files/imagesTr/a_0000.nii.gz", files / "imagesTr/b_0000.nii.gz"
    content["dataset"] = {
        "second": {"images": [str(absolute)], "label": str(files / "labelsTr/b.nii.gz")},
        "first": {"images": [relative], "label": "../files/labelsTr/a.nii.gz"},
    }
    (source / "dataset.json").write_text(json.dumps(content))
    converted = convert(source, tmp_path / "work")
    assert [case.name for case in converted.cases] == ["first", "second"]
    assert converted.cases[0].images[0].samefile(files / "imagesTr/a_0000.nii.gz")
    assert converted.cases[1].images[0].samefile(absolute)
    assert converted.cases[0].label.samefile(files / "labelsTr/a.nii.gz")


def test_instance(tmp_path, caplog):
    source = write_instance(tmp_path / "INSTANCE")
    (source / "train/data/.DS_Store").touch()
    (source / "evaluation").mkdir()
    with caplog.at_level(logging.INFO):
        converted = convert(source, tmp_path / "work")
    assert "INSTANCE: INSTANCE 2022 download, 2 cases" in caplog.text
    assert (converted.channels, converted.labels) == (("CT",), ("background", "hemorrhage"))
    assert [case.name for case in converted.cases] == ["001", "002"]
    assert converted.cases[1].images[0].samefile(source / "train/data/002.nii.gz")
    assert converted.cases[1].label.samefile(source / "train/label/002.nii.gz")


def test_another_number_of_cases_than_declared_is_told(tmp_path, caplog):
    read_source(write_msd(tmp_path / "source", numTraining=260))
    assert "dataset.json: numTraining is 260, found 2 cases" in caplog.text


def test_files_that_no_case_has_are_told(tmp_path, caplog):
    """Added to a folder and not to its list, they would be missed by nobody."""
    source = write_msd(tmp_path / "source")
    read_source(source)
    read_source(write_v1(tmp_path / "first"))
    read_source(write_v2(tmp_path / "second"))
    assert "left out" not in caplog.text
    write_msd(tmp_path / "more", names=("a", "b", "c"))
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / "more" / part / "c.nii.gz").rename(source / part / "c.nii.gz")
    assert len(read_source(source).cases) == 2
    assert "dataset.json: 2 files beside those of the cases are not among them" in caplog.text
    assert "imagesTr/c.nii.gz; they are left out" in caplog.text


CASE = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modality": {"0": "T1", "1": "T2"}},
            r"2 problems, the first: case a: .*a\.nii\.gz: 1 channels in 1 files, expected 2 \(T1,",
        ),
        ({"modality": {"1": "CT"}}, r"modality has keys \['1'\], expected \['0'\]"),
        ({"modality": "CT"}, "modality is 'CT', expected an object"),
        ({"modality": None}, "modality is None, expected an object"),
        ({"labels": {"0": "background", "2": "bleed"}}, "labels has keys"),
        ({"labels": {"0": "background"}}, "expected a background and one more"),
        ({"labels": []}, r"labels is \[\], expected an object"),
        ({"labels": {"0": "background", "1": "ignore"}}, "expected a background and one more"),
        (
            {"labels": {"0": "background", "1": "ignore", "2": "bleed"}},
            "label 'ignore' is 1, expected the highest, 2",
        ),
        ({"training": []}, "no training cases"),
        ({"training": None}, "training is None, expected a list"),
        ({"training": ["a"]}, "training lists 'a', expected image and label"),
        ({"training": [CASE, CASE]}, r"case names given twice: \['a'\]"),
        ({"training": [{**CASE, "label": "gone.nii.gz"}]}, r"case a: .*gone\.nii\.gz: no such"),
        ({"training": [{**CASE, "label": "dataset.json"}]}, "unknown file type"),
    ],
)
def test_msd_refuses(tmp_path, changes, message):
    source = write_msd(tmp_path / "source", **changes)
    with pytest.raises(DatasetError, match=message):
        convert(source, tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": {"ignore": 0, "background": 1, "bleed": 2}},
            "label 'ignore' is 0, expected the highest, 2",
        ),
        ({"labels": {"background": 0, "bleed": 1, "ignore": 3}}, "labels has keys"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "give one value to two names"),
        ({"labels": {"background": 0, "bleed": 2}}, r"labels has keys \['0', '2'\], expected"),
        ({"channel_names": {"0": "T1"}}, r"case a: .*holds its channels 0000, 0001, expected 0000"),
        ({"channel_names": {"0": "T1", "2": "T2"}}, "channel_names has keys"),
        ({"file_ending": ".png"}, r"file_ending is '\.png', expected one of \.mha"),
        ({"file_ending": 7}, "file_ending is 7, expected one of"),
        ({"dataset": ["a"]}, r"dataset is \['a'\], expected an object of cases"),
        ({"dataset": {"a": {"images": "a.nii.gz"}}}, r"dataset lists a: .*, expected images \(a"),
        ({"dataset": {"a": {"images": ["x.mha", "y.mha"], "label": "z.mha"}}}, r"x\.mha: no such"),
    ],
)
def test_nnunet_v2_refuses(tmp_path, changes, message):
    source = write_v2(tmp_path / "source", **changes)
    with pytest.raises(DatasetError, match=message):
        convert(source, tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("imagesTr/a_0001.nii.gz", "case a: .*holds its channels 0000, expected 0000, 0001"),
        ("labelsTr/a.nii.gz", "case a: an image in .*imagesTr, but no label in .*labelsTr"),
        ("imagesTr", "imagesTr: no such folder"),
    ],
)
def test_nnunet_v2_refuses_what_is_missing(tmp_path, file, message):
    source = write_v2(tmp_path / "source")
    (source / file).rename(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match=message):
        convert(source, tmp_path / "work")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("labelsTr/c.nii.gz", "case c: a label in .*labelsTr, but no image in .*imagesTr"),
        ("imagesTr/a_2.nii.gz", r"a_2\.nii\.gz: its name does not end in a channel"),
        ("imagesTr/a_0002.nii.gz", "holds its channels 0000, 0001, 0002, expected 0000, 0001"),
    ],
)
def test_nnunet_v2_refuses_what_is_left_over(tmp_path, file, message):
    source = write_v2(tmp_path / "source")
    (source / file).write_bytes((source / "labelsTr/a.nii.gz").read_bytes())
    with pytest.raises(DatasetError, match=message):
        convert(source, tmp_path / "work")


def test_nnunet_v1_refuses_a_missing_channel(tmp_path):
    source = write_v1(tmp_path / "source")
    (source / "imagesTr/b_0001.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"case b: .*b_0001\.nii\.gz: no such file"):
        convert(source, tmp_path / "work")


def test_nnunet_refuses_4d_files(tmp_path):
    source = write_v2(tmp_path / "source", names=("a",))
    write_4d(source / "imagesTr/a_0001.nii.gz", [make_voxels(1), make_voxels(2)])
    with pytest.raises(DatasetError, match="3 channels in 2 files, expected 2"):
        convert(source, tmp_path / "work")


def test_all_problems_are_logged(tmp_path, caplog):
    source = write_instance(tmp_path / "source", names=("001", "002", "003"))
    (source / "train/data/001.nii.gz").unlink()
    (source / "train/label/003.nii.gz").unlink()
    with pytest.raises(DatasetError, match="2 problems, the first: case 003: an image in"):
        convert(source, tmp_path / "work")
    assert "case 001: a label in" in caplog.text


def test_instance_refuses_a_case_in_two_files(tmp_path):
    source = write_instance(tmp_path / "source")
    volume.write(Volume(make_voxels(5), SPACING_MM), source / "train/data/001.nii")
    with pytest.raises(DatasetError, match=r"train/data: two files of one case, 001\.nii and 001"):
        convert(source, tmp_path / "work")


def test_convert_refuses_what_it_does_not_recognise(tmp_path):
    source = tmp_path / "source"
    with pytest.raises(DatasetError, match="source: no such folder"):
        convert(source, tmp_path / "work")
    source.mkdir()
    with pytest.raises(DatasetError, match=r"no dataset\.json of .* expected one of train/data"):
        convert(source, tmp_path / "work")
    (source / "dataset.json").write_text("[]")
    with pytest.raises(DatasetError, match="found list, expected an object"):
        convert(source, tmp_path / "work")


@pytest.mark.parametrize("key", ["file_ending", "channel_names"])
def test_a_value_of_thousands_of_characters_is_not_quoted_whole(tmp_path, key):
    described = {
        "channel_names": {"0": "CT"}, "labels": {"background": 0, "bleed": 1}, "file_ending": ".mha"
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(described | {key: "x" * 10_000}))
    with pytest.raises(DatasetError, match=f"dataset.json: {key} is 'xxx") as refused:
        read_source(tmp_path)
    assert len(str(refused.value)) < 300 + len(str(tmp_path))
