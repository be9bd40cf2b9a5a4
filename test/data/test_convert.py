"""Recognising layouts and bringing datasets into a workspace."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.datasets import (
    SPACING_MM,
    contents,
    make_voxels,
    write_instance,
    write_msd,
    write_v1,
    write_v2,
)

from ichseg.errors import DatasetError
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.__main__ import main
from training.data.convert import convert, corrected_since
from training.data.dataset import Case, load_dataset, read_case
from training.data.layouts import read_source

LABELS = ("background", "bleed")


def test_convert_then_load(tmp_path):
    source = write_msd(tmp_path / "source", names=("b", "a"))
    converted = convert(source, tmp_path / "work")
    assert converted == load_dataset(tmp_path / "work")
    assert converted.name == "Tiny"
    assert converted.channels == ("CT",)
    assert converted.labels == LABELS
    assert [case.name for case in converted.cases] == ["a", "b"]
    assert converted.labelled == converted.cases
    assert converted.cases[0] == Case(
        "a",
        (tmp_path / "work/raw/images/a_0000.nii.gz",),
        tmp_path / "work/raw/labels/a.nii.gz",
    )
    original = volume.read(source / "imagesTr/a.nii.gz")
    (image,), label = read_case(converted.cases[0], converted.labels)
    np.testing.assert_array_equal(image.voxels, original.voxels)
    np.testing.assert_array_equal(label.voxels, original.voxels > 50)


@pytest.mark.parametrize(
    ("write", "labels"),
    [
        (write_msd, {"0": "background", "1": "bleed", "2": "ignore"}),
        (write_v2, {"background": 0, "bleed": 1, "ignore": 2}),
        (write_v2, {"ignore": 2, "bleed": 1, "background": 0}),
    ],
)
def test_the_highest_label_may_be_one_to_ignore(tmp_path, capsys, write, labels):
    source = write(tmp_path / "source", labels=labels)
    path = source / "labelsTr" / "a.nii.gz"
    label = volume.read(path)
    doubted = label.voxels.copy()
    doubted[0] = 2
    volume.write(label.with_voxels(doubted), path)
    assert main(["convert", str(source), "--workspace", str(tmp_path / "work")]) == 0
    assert "labels background, bleed (2 is left out of training and scores)" in (
        capsys.readouterr().out
    )
    found = load_dataset(tmp_path / "work")
    assert (found.labels, found.ignore_label) == (("background", "bleed"), 2)
    case = found.cases[0]
    np.testing.assert_array_equal(read_case(case, found.labels, 2)[1].voxels, doubted)
    with pytest.raises(DatasetError, match=r"values 0\.\.2, expected whole labels 0\.\.1"):
        read_case(case, found.labels)


@pytest.mark.parametrize("link", [True, False])
def test_convert_never_alters_the_source(tmp_path, monkeypatch, link):
    source = write_msd(tmp_path / "source")
    before = contents(source)
    if not link:

        def refuse(*_):
            raise OSError("another file system")

        monkeypatch.setattr(os, "link", refuse)
    case = convert(source, tmp_path / "work").cases[0]
    assert contents(source) == before
    assert case.images[0].samefile(source / "imagesTr/a.nii.gz") == link
    assert case.images[0].read_bytes() == before[Path("imagesTr/a.nii.gz")][0]


def test_interrupted_conversion_starts_again_without_writing_through_links(tmp_path, monkeypatch):
    source, work = write_msd(tmp_path / "source"), tmp_path / "work"
    before = contents(source)
    expected = convert(source, work)
    (work / "dataset.json").unlink()  # as if cut off before the end
    (work / "raw/images/.writing-1.nii.gz").touch()
    assert convert(source, work) == expected
    assert not (work / "raw/images/.writing-1.nii.gz").exists()
    assert expected.cases[0].images[0].samefile(source / "imagesTr/a.nii.gz")
    (work / "dataset.json").unlink()
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError))
    assert convert(source, work) == expected
    assert not expected.cases[0].images[0].samefile(source / "imagesTr/a.nii.gz")
    assert contents(source) == before


@pytest.mark.parametrize(
    "taken", ["dataset.json", "fingerprint.json", "plans.json", "preprocessed", "runs"]
)
def test_convert_refuses_a_workspace_in_use(tmp_path, taken):
    source = write_msd(tmp_path / "source")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / taken).write_text("kept")
    with pytest.raises(DatasetError, match=f"work/{taken}: exists; expected"):
        convert(source, tmp_path / "work")
    assert [p.name for p in (tmp_path / "work").iterdir()] == [taken]


def test_convert_refuses_a_file_for_a_workspace(tmp_path):
    (tmp_path / "work").touch()
    with pytest.raises(DatasetError, match="work: is a file, expected a folder"):
        convert(write_msd(tmp_path / "source"), tmp_path / "work")


def test_convert_refuses_a_workspace_within_the_source(tmp_path):
    source = write_msd(tmp_path / "source")
    with pytest.raises(DatasetError, match="lies in the dataset"):
        convert(source, source / "work")
    assert not (source / "work").exists()


def test_convert_passes_over_hidden_files(tmp_path):
    source = write_msd(tmp_path / "source")
    listed = json.loads((source / "dataset.json").read_text())
    listed["training"].append({"image": "imagesTr/._a.nii.gz", "label": "labelsTr/._a.nii.gz"})
    (source / "dataset.json").write_text(json.dumps(listed))
    assert [case.name for case in convert(source, tmp_path / "work").cases] == ["a", "b"]


def test_msd_reads_the_names_of_nnunet_v2(tmp_path):
    source = write_msd(
        tmp_path / "source",
        modality=None,
        channel_names={"0": "ct"},
        labels={"bleed": 1, "background": 0},
    )
    found = read_source(source)
    assert (found.layout, found.channels, found.labels) == ("MSD task", ("ct",), LABELS)


def write_4d(path, channels, dtype=np.int16):
    """As ITK writes a series of volumes: channels last in NIfTI, a direction of 4x4."""
    turn = np.deg2rad(10)
    direction = (np.cos(turn), -np.sin(turn), 0, np.sin(turn), np.cos(turn), 0, 0, 0, 1)
    stack = []
    for channel in channels:
        image = sitk.GetImageFromArray(channel.astype(dtype))
        image.SetSpacing((0.5, 0.75, 5.0))
        image.SetOrigin((-10.0, 20.0, 30.0))
        image.SetDirection(direction)
        stack.append(image)
    sitk.WriteImage(sitk.JoinSeries(stack, 7.0, 2.0), str(path))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_msd_4d_is_split(tmp_path, suffix, workers):
    source = write_msd(tmp_path / "source", modality={"0": "T1", "1": "T2", "2": "FLAIR"})
    channels = {name: [make_voxels(10 * i + j) for j in range(3)] for i, name in enumerate("ab")}
    listed = json.loads((source / "dataset.json").read_text())
    for entry, name in zip(listed["training"], "ab", strict=True):
        (source / "imagesTr" / f"{name}.nii.gz").unlink()
        write_4d(source / "imagesTr" / f"{name}{suffix}", channels[name])
        entry["image"] = f"imagesTr/{name}{suffix}"
    (source / "dataset.json").write_text(json.dumps(listed))
    before = contents(source)
    converted = convert(source, tmp_path / "work", workers=workers)
    assert contents(source) == before
    assert converted.cases[1].images == tuple(
        tmp_path / "work/raw/images" / f"b_{i:04d}.nii.gz" for i in range(3)
    )
    for case in converted.cases:
        for path, expected in zip(case.images, channels[case.name], strict=True):
            image = sitk.ReadImage(str(path))  # not by the code under test
            np.testing.assert_array_equal(sitk.GetArrayFromImage(image), expected)
            assert image.GetPixelID() == sitk.sitkInt16
            np.testing.assert_allclose(image.GetSpacing(), (0.5, 0.75, 5.0))
            np.testing.assert_allclose(image.GetOrigin(), (-10, 20, 30))
            turn = np.deg2rad(10)
            rotation = [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0]]
            np.testing.assert_allclose(
                image.GetDirection(), np.ravel([*rotation, [0, 0, 1]]), atol=1e-6
            )


def test_a_failure_names_its_case_and_leaves_no_dataset(tmp_path, caplog):
    source = write_msd(tmp_path / "source", modality={"0": "T1", "1": "T2"})
    for name in "ab":
        write_4d(source / f"imagesTr/{name}.nii.gz", [make_voxels(1), make_voxels(2)])
    whole = (source / "imagesTr/b.nii.gz").read_bytes()
    (source / "imagesTr/b.nii.gz").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DatasetError, match=r"1 of 2 cases failed, the first: case b: .*damaged"):
        convert(source, tmp_path / "work", workers=1)
    assert "case b: " in caplog.text
    assert not (tmp_path / "work/dataset.json").exists()
    assert (tmp_path / "work/raw/images/a_0001.nii.gz").exists()


def test_nnunet_v1(tmp_path):
    source = write_v1(tmp_path / "Task101_Tiny", numTraining=3)
    found = read_source(source)
    assert found.layout == "nnU-Net v1 raw folder"
    assert (found.name, found.channels, found.labels) == ("Tiny", ("T1", "T2"), LABELS)
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
    assert (found.name, found.channels, found.labels) == ("Dataset101_Tiny", ("T1", "T2"), LABELS)
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
            {"labels": {"background": 0, "all": [1, 2]}},
            r"'all' is the region \[1, 2\]; regions are",
        ),
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
    with pytest.raises(DatasetError, match=r"train/data: two files of one case"):
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


def test_table_of_groups_comes_along(tmp_path):
    source, groups = write_msd(tmp_path / "source"), tmp_path / "patients.csv"
    groups.write_text("case,group\na,p1\n")
    with pytest.raises(DatasetError, match=r"patients\.csv: 1 of 2 cases have no group: b"):
        convert(source, tmp_path / "work", groups=groups)
    assert not (tmp_path / "work").exists()
    groups.write_text("case,group\na,p1\nb,p1\n")
    convert(source, tmp_path / "work", groups=groups)
    assert (tmp_path / "work/groups.csv").read_text() == groups.read_text()


def test_another_table_of_groups_is_not_written_over(tmp_path):
    source, groups = write_msd(tmp_path / "source"), tmp_path / "patients.csv"
    groups.write_text("case,group\na,p1\nb,p1\n")
    (tmp_path / "work").mkdir()
    (tmp_path / "work/groups.csv").write_text("case,group\na,p1\nb,p2\n")
    with pytest.raises(DatasetError, match=r"work/groups\.csv: exists and differs from"):
        convert(source, tmp_path / "work", groups=groups)
    convert(source, tmp_path / "work")
    assert "b,p2" in (tmp_path / "work/groups.csv").read_text()


@pytest.mark.parametrize("link", [True, False])
def test_what_has_been_corrected_in_the_dataset_since(tmp_path, monkeypatch, link):
    source, work = write_msd(tmp_path / "source"), tmp_path / "work"
    if not link:
        monkeypatch.setattr(os, "link", _refuse)
    kept = convert(source, work)
    after = (work / "dataset.json").stat().st_mtime_ns + 10**9

    def found():
        return corrected_since(read_source(source), kept, after - 10**9)

    assert found() == []
    label = source / "labelsTr" / "a.nii.gz"
    if not link:  # touched, and the same
        os.utime(label, ns=(after, after))
        assert found() == []
    voxels = volume.read(label)
    label.unlink()  # a link is replaced, as by most programs; the workspace keeps the old file
    volume.write(voxels.with_voxels(1 - voxels.voxels), label)
    os.utime(label, ns=(after, after))
    assert found() == [label]


def test_a_4d_image_counts_as_corrected_once_it_is_younger(tmp_path):
    source = write_msd(tmp_path / "source", ("a",), modality={"0": "T1", "1": "T2"})
    write_4d(source / "imagesTr/a.nii.gz", [make_voxels(1), make_voxels(2)])
    work = tmp_path / "work"
    kept = convert(source, work)
    after = (work / "dataset.json").stat().st_mtime_ns
    assert corrected_since(read_source(source), kept, after) == []
    image = read_source(source).cases[0].images[0]
    os.utime(image, ns=(after + 1, after + 1))
    assert corrected_since(read_source(source), kept, after) == [image]


def _refuse(*_):
    raise OSError("another file system")
