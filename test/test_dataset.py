"""Converting, loading and reading training datasets."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from ichseg import volume
from ichseg.errors import DatasetError, PlansError
from ichseg.volume import Volume
from training import dataset
from training.dataset import Case, Dataset, convert, each_case, load_dataset, read_case

LABELS = ("background", "bleed")


def write_msd(folder, names=("a", "b"), **changes):
    """A Decathlon folder of tiny cases; ``changes`` replace keys of its dataset.json."""
    rng = np.random.default_rng(0)
    for name in names:
        voxels = rng.integers(-100, 100, (3, 4, 5)).astype(np.int16)
        volume.write(Volume(voxels, (5.0, 0.5, 0.5)), folder / "imagesTr" / f"{name}.nii.gz")
        label = Volume((voxels > 50).astype(np.uint8), (5.0, 0.5, 0.5))
        volume.write(label, folder / "labelsTr" / f"{name}.nii.gz")
    content = {
        "name": "Tiny",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "bleed"},
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in names
        ],
        "test": [],
    }
    content.update(changes)
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def contents(folder):
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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
    assert convert(source, work) == expected
    assert expected.cases[0].images[0].samefile(source / "imagesTr/a.nii.gz")
    (work / "dataset.json").unlink()
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError))
    assert convert(source, work) == expected
    assert not expected.cases[0].images[0].samefile(source / "imagesTr/a.nii.gz")
    assert contents(source) == before


def test_workspace_can_be_moved(tmp_path):
    convert(write_msd(tmp_path / "source"), tmp_path / "work")
    shutil.rmtree(tmp_path / "source")
    shutil.move(tmp_path / "work", tmp_path / "moved")
    for case in load_dataset(tmp_path / "moved").cases:
        read_case(case, LABELS)


def test_files_outside_the_workspace_are_named_absolutely(tmp_path):
    source = write_msd(tmp_path / "source")
    case = Case("a", (source / "imagesTr/a.nii.gz",), source / "labelsTr/a.nii.gz")
    (tmp_path / "work").mkdir()
    other = Case("t", case.images, None)
    dataset.save_dataset(Dataset("Tiny", ("CT",), LABELS, (other, case)), tmp_path / "work")
    kept = load_dataset(tmp_path / "work")
    assert kept == Dataset("Tiny", ("CT",), LABELS, (case, other))  # in order of names
    assert kept.labelled == (case,)


def test_convert_refuses_an_existing_dataset(tmp_path):
    source = write_msd(tmp_path / "source")
    convert(source, tmp_path / "work")
    before = contents(tmp_path / "work")
    with pytest.raises(DatasetError, match=r"work/dataset\.json: exists"):
        convert(source, tmp_path / "work")
    assert contents(tmp_path / "work") == before


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


def test_convert_reads_the_names_of_nnunet_v2(tmp_path):
    source = write_msd(
        tmp_path / "source",
        modality=None,
        channel_names={"0": "ct"},
        labels={"bleed": 1, "background": 0},
    )
    raw = json.loads((source / "dataset.json").read_text())
    del raw["modality"]
    (source / "dataset.json").write_text(json.dumps(raw))
    converted = convert(source, tmp_path / "work")
    assert (converted.channels, converted.labels) == (("ct",), LABELS)


@pytest.mark.parametrize(
    ("name", "expected"), [("CT", True), ("ct", True), (" Ct ", True), ("MRI", False), ("", False)]
)
def test_is_ct(name, expected):
    assert dataset.is_ct(name) is expected


CASE = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensorImageSize": "4D"}, "4D images"),
        ({"modality": {"0": "T1", "1": "T2"}}, r"4D images with channels \('T1', 'T2'\)"),
        ({"modality": {"1": "CT"}}, r"modality has keys \['1'\], expected \['0'\]"),
        ({"modality": "CT"}, "modality is 'CT', expected an object"),
        ({"labels": {"0": "background", "2": "bleed"}}, "labels has keys"),
        ({"labels": {"0": "background"}}, "expected a background and one more"),
        ({"labels": []}, r"labels is \[\], expected an object"),
        ({"training": []}, "no training cases"),
        ({"training": None}, "training is None, expected a list"),
        ({"training": ["a"]}, "training lists 'a', expected image and label"),
        ({"training": [CASE, CASE]}, r"case names given twice: \['a'\]"),
        ({"training": [{**CASE, "label": "gone.nii.gz"}]}, r"case a: .*gone\.nii\.gz: no such"),
        ({"training": [{**CASE, "label": "dataset.json"}]}, "unknown file type"),
    ],
)
def test_convert_refuses(tmp_path, changes, message):
    source = write_msd(tmp_path / "source", **changes)
    with pytest.raises(DatasetError, match=message):
        convert(source, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_convert_refuses_a_folder_without_dataset(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(DatasetError, match=r"dataset\.json: no such file; expected an MSD"):
        convert(source, tmp_path / "work")
    (source / "dataset.json").write_text("[]")
    with pytest.raises(DatasetError, match="found list, expected an object"):
        convert(source, tmp_path / "work")


def test_load_refuses(tmp_path):
    with pytest.raises(DatasetError, match="no such file; make it with `convert"):
        load_dataset(tmp_path)
    content = {"schema_version": 9, "name": "", "channels": [], "labels": [], "cases": []}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(PlansError, match="dataset schema 9, this code reads 1"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("channels", "case", "message"),
    [
        ((), Case("a", (), None), "no channels"),
        (("CT",), Case("a", (), None), "case a: 0 images, expected one for each"),
        (("CT",), Case("a/b", (Path("x"),), None), "is no file name"),
        (("CT",), Case(".a", (Path("x"),), None), "is no file name"),
    ],
)
def test_dataset_refuses(channels, case, message):
    with pytest.raises(DatasetError, match=message):
        Dataset("Tiny", channels, LABELS, (case,))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.zeros((3, 4, 6), np.uint8), r"shape \(3, 4, 5\), but its reference has \(3, 4, 6\)"),
        (np.full((3, 4, 5), 2, np.uint8), r"values 2\.\.2, expected whole labels 0\.\.1"),
        (np.full((3, 4, 5), -1, np.int16), r"values -1\.\.-1, expected"),
        (np.full((3, 4, 5), 0.5, np.float32), "that are not all whole"),
    ],
)
def test_read_case_refuses(tmp_path, label, message):
    case = convert(write_msd(tmp_path / "source"), tmp_path / "work").cases[0]
    volume.write(Volume(label, (5.0, 0.5, 0.5)), tmp_path / "label.mha")
    with pytest.raises(DatasetError, match=message):
        read_case(Case("a", case.images, tmp_path / "label.mha"), LABELS)


def test_read_case_takes_whole_floats_and_refuses_no_label(tmp_path):
    case = convert(write_msd(tmp_path / "source"), tmp_path / "work").cases[0]
    ones = Volume(np.ones((3, 4, 5), np.float32), (5.0, 0.5, 0.5))
    volume.write(ones, tmp_path / "label.mha")
    read_case(Case("a", case.images, tmp_path / "label.mha"), LABELS)
    with pytest.raises(DatasetError, match="case a: no reference"):
        read_case(Case("a", case.images, None), LABELS)


def _triple_or_fail(case, offset):
    if case.name == "bad":
        raise KeyError("odd")
    return 3 * len(case.name) + offset


def _die(case):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_case_goes_on_after_a_failure(workers):
    cases = [Case(name, (), None) for name in ("a", "bad", "ccc")]
    found = dict(each_case(_triple_or_fail, cases, 1, workers=workers))
    assert found[cases[0]] == 4
    assert found[cases[2]] == 10
    failure = found[cases[1]]
    assert isinstance(failure, KeyError)
    assert dataset.describe_failure(cases[1], failure) == "case bad: KeyError: 'odd'"


def test_each_case_says_when_a_worker_was_killed():
    with pytest.raises(DatasetError, match="worker process was killed"):
        list(each_case(_die, [Case("a", (), None)], workers=2))


def test_each_case_refuses_no_workers():
    with pytest.raises(DatasetError, match="0 workers, expected at least 1"):
        list(each_case(_triple_or_fail, [], workers=0))
