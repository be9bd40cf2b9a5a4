"""Datasets without a description: a folder of images beside one of labels."""

import logging
import os

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.datasets import contents, write_instance, write_msd

from ichseg.errors import DatasetError
from ichseg.scan import volume
from training.data.convert import changed_at_source, convert
from training.data.dataset import load_dataset
from training.data.layouts import read_source


@pytest.mark.parametrize(
    ("images", "labels", "layout", "names"),
    [
        ("images", "labels", "images and labels", ("background", "hemorrhage")),
        ("ct_scans", "masks", "CT-ICH download", ("background", "hemorrhage")),
        (
            "images", "ground truths", "BHSD download",
            (
                "background", "epidural", "intraparenchymal", "intraventricular", "subarachnoid",
                "subdural",
            ),
        ),
    ],
)  # fmt: skip
def test_a_folder_of_images_beside_one_of_labels(tmp_path, caplog, images, labels, layout, names):
    source = write_instance(tmp_path / "mine")
    (source / "train/data").rename(source / images)
    (source / "train/label").rename(source / labels)
    (source / "train").rmdir()
    before = contents(source)
    with caplog.at_level(logging.INFO):
        converted = convert(source, tmp_path / "work")
    assert f"mine: {layout}, 2 cases" in caplog.text
    assert converted.labels == names
    assert converted.cases[1].images[0].samefile(source / images / "002.nii.gz")
    assert converted.cases[1].label.samefile(source / labels / "002.nii.gz")
    assert contents(source) == before
    named = convert(source, tmp_path / "other", labels=("nothing", "blood"))
    assert named.labels == ("nothing", "blood")
    (source / labels / "002.nii.gz").unlink()
    with pytest.raises(DatasetError, match=f"case 002: an image in .*{images}, but no label"):
        convert(source, tmp_path / "third")


def test_masks_of_255_become_labels(tmp_path):
    source = write_instance(tmp_path / "mine")
    (source / "train/data").rename(source / "ct_scans")
    (source / "train/label").rename(source / "masks")
    path = source / "masks/001.nii.gz"
    mask = volume.read(path)
    assert set(np.unique(mask.voxels)) == {0, 1}
    volume.write(mask.with_voxels((mask.voxels * 255).astype(np.uint8)), path)
    before = contents(source)
    converted = convert(source, tmp_path / "work")
    found = volume.read(converted.cases[0].label)
    np.testing.assert_array_equal(found.voxels, mask.voxels)
    assert (found.spacing_mm, found.origin_mm) == (mask.spacing_mm, mask.origin_mm)
    assert contents(source) == before
    dataset = load_dataset(tmp_path / "work")
    now = (tmp_path / "work" / "dataset.json").stat().st_mtime_ns
    assert changed_at_source(read_source(source), dataset, now) == []
    os.utime(path, ns=(now + 10**9, now + 10**9))
    assert changed_at_source(read_source(source), dataset, now) == [path]


def test_a_detached_metaimage_comes_in_one_file(tmp_path):
    source = write_instance(tmp_path / "mine", names=("001",))
    for part in ("data", "label"):
        path = source / "train" / part / "001.nii.gz"
        sitk.WriteImage(sitk.ReadImage(str(path)), str(path.with_name("001.mhd")))
        path.unlink()
    converted = convert(source, tmp_path / "work")
    (case,) = converted.cases
    assert (case.images[0].name, case.label.name) == ("001_0000.mha", "001.mha")
    np.testing.assert_array_equal(
        volume.read(case.images[0]).voxels, volume.read(source / "train/data/001.mhd").voxels
    )
    now = (tmp_path / "work" / "dataset.json").stat().st_mtime_ns
    assert changed_at_source(read_source(source), converted, now) == []


def test_labels_are_not_named_twice(tmp_path):
    source = write_msd(tmp_path / "source")
    with pytest.raises(DatasetError, match=r"dataset\.json: names its labels itself"):
        convert(source, tmp_path / "work", labels=("a", "b"))


def test_two_layouts_in_one_folder_are_refused(tmp_path):
    source = write_instance(tmp_path / "source")
    for name in ("images", "labels"):
        (source / name).mkdir()
    with pytest.raises(DatasetError, match=r"train/data with .*, images with labels, expected one"):
        convert(source, tmp_path / "work")


def test_a_dataset_that_lies_a_folder_off_is_named(tmp_path):
    source = write_instance(tmp_path / "BHSD" / "label_192")
    (source / "train/data").rename(source / "images")
    (source / "train/label").rename(source / "ground truths")
    (source / "train").rmdir()
    for given in (source.parent, source / "images"):
        with pytest.raises(DatasetError, match=r"did you mean .*/BHSD/label_192\?$"):
            convert(given, tmp_path / "work")
    (tmp_path / "nothing" / "in").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"ct_scans with masks$"):
        convert(tmp_path / "nothing", tmp_path / "work")
