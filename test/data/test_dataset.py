"""Listing, loading and reading training datasets."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import write_msd

from ichseg.errors import DatasetError, PlansError
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.data import dataset
from training.data.convert import convert
from training.data.dataset import Case, Dataset, load_dataset, read_case

LABELS = ("background", "bleed")


def test_workspace_can_be_moved(tmp_path):
    convert(write_msd(tmp_path / "source"), tmp_path / "work")
    shutil.move(tmp_path / "source", tmp_path / "kept")
    shutil.move(tmp_path / "work", tmp_path / "moved")
    found = load_dataset(tmp_path / "moved").cases
    assert found
    for case in found:
        images, label = read_case(case, LABELS)
        original = tmp_path / "kept" / "labelsTr" / f"{case.name}.nii.gz"
        np.testing.assert_array_equal(label.voxels, volume.read(original).voxels)
        assert images[0].voxels.shape == label.voxels.shape


def test_files_outside_the_workspace_are_named_absolutely(tmp_path):
    source = write_msd(tmp_path / "source")
    case = Case("a", (source / "imagesTr/a.nii.gz",), source / "labelsTr/a.nii.gz")
    (tmp_path / "work").mkdir()
    other = Case("t", case.images, None)
    dataset.save_dataset(Dataset("Tiny", ("CT",), LABELS, (other, case)), tmp_path / "work")
    kept = load_dataset(tmp_path / "work")
    assert kept == Dataset("Tiny", ("CT",), LABELS, (case, other))  # in order of names
    assert kept.labelled == (case,)


@pytest.mark.parametrize(
    ("name", "expected"), [("CT", True), ("ct", True), (" Ct ", True), ("MRI", False), ("", False)]
)
def test_is_ct(name, expected):
    assert dataset.is_ct(name) is expected


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


@pytest.mark.parametrize(
    "frame",
    [
        {"direction": (1, 0, 0, 0, 1, 0, 0, 0, -1)},
        {"direction": (0, 1, 0, 1, 0, 0, 0, 0, 1)},
        {"spacing_mm": (5.0, 0.5, 0.6)},
    ],
)
def test_a_reference_whose_axes_run_otherwise_is_refused(tmp_path, frame):
    """Of the same size it would be trained on in another place, where `verify` was not run."""
    case = convert(write_msd(tmp_path / "source"), tmp_path / "work").cases[0]
    image = volume.read(case.images[0])
    same = {"spacing_mm": image.spacing_mm, "direction": image.direction}
    moved = {"origin_mm": (7.0, 8.0, 9.0)}
    label = np.ones(image.voxels.shape, np.uint8)
    volume.write(Volume(label, **(same | moved)), tmp_path / "label.mha")
    read_case(Case("a", case.images, tmp_path / "label.mha"), LABELS)
    volume.write(Volume(label, **(same | frame)), tmp_path / "label.mha")
    with pytest.raises(DatasetError, match="axes or voxel sizes are others than its reference's"):
        read_case(Case("a", case.images, tmp_path / "label.mha"), LABELS)


def test_labels_of_one_name_are_refused(tmp_path):
    """Scores go by name: those of the second were taken for those of both."""
    labels = {"0": "background", "1": "bleed", "2": "oedema", "3": "bleed"}
    source = write_msd(tmp_path / "source", labels=labels)
    with pytest.raises(DatasetError, match="several labels are called bleed, expected a name"):
        convert(source, tmp_path / "work")
    assert not (tmp_path / "work" / "dataset.json").exists()


@pytest.mark.parametrize(("count", "ignored"), [(129, None), (128, 128)])
def test_labels_that_a_stored_case_cannot_hold_are_refused(count, ignored):
    """Its target is int8: 128 would become -128, and be lost without a word."""
    labels = tuple(f"label {value}" for value in range(count))
    with pytest.raises(DatasetError, match="labels up to 128, expected up to 127"):
        Dataset("many", ("CT",), labels, (), ignored)
    assert len(Dataset("many", ("CT",), labels[:127], (), 127).labels) == 127
