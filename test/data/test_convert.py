"""Bringing datasets into a workspace."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.datasets import (
    contents,
    make_voxels,
    write_4d,
    write_msd,
    write_v2,
)

from ichseg.errors import DatasetError
from ichseg.scan import volume
from training.__main__ import main
from training.data.convert import changed_at_source, convert
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
        return changed_at_source(read_source(source), kept, after - 10**9)

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
    assert changed_at_source(read_source(source), kept, after) == []
    image = read_source(source).cases[0].images[0]
    os.utime(image, ns=(after + 1, after + 1))
    assert changed_at_source(read_source(source), kept, after) == [image]


def _refuse(*_):
    raise OSError("another file system")
