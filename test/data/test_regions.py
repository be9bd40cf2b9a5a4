"""Labels that are regions in a dataset.json."""

import json
import logging

import pytest
from helpers.datasets import write_v2

from ichseg.errors import DatasetError
from training.data.convert import convert
from training.data.dataset import Dataset, load_dataset
from training.data.regions import declare, rewritten

LABELS = {"background": 0, "all": [1, 2], "core": [2], "ignore": 3}


def test_regions_come_into_the_workspace(tmp_path):
    source = write_v2(tmp_path / "source", labels=LABELS, regions_class_order=[1, 2])
    made = convert(source, tmp_path / "work")
    found = load_dataset(tmp_path / "work")
    assert found == made
    assert (found.labels, found.ignore_label) == (("background", "all", "core"), 3)
    assert (found.regions, found.region_labels) == ((1, 2), ((1, 2), (2,)))


def test_the_order_is_that_of_the_file(tmp_path):
    """BraTS: each region writes the label that it alone has; a name goes with what it writes."""
    labels = {"background": 0, "whole": [1, 2, 3], "core": [1, 3], "enhancing": 3}
    source = write_v2(tmp_path / "source", labels=labels, regions_class_order=[2, 1, 3])
    found = convert(source, tmp_path / "work")
    assert found.labels == ("background", "core", "whole", "enhancing")
    assert found.regions == (2, 1, 3)
    assert found.region_labels == ((1, 2, 3), (1, 3), (3,))


def test_lists_of_one_label_are_labels(tmp_path):
    labels = {"background": [0], "blood": [1], "oedema": [2]}
    found = convert(write_v2(tmp_path / "source", labels=labels), tmp_path / "work")
    assert found.labels == ("background", "blood", "oedema")
    assert found.regions == ()


def test_a_dataset_without_regions_is_written_as_before(tmp_path):
    convert(write_v2(tmp_path / "source"), tmp_path / "work")
    assert (
        not {"regions", "region_labels"}
        & json.loads((tmp_path / "work" / "dataset.json").read_text()).keys()
    )


@pytest.mark.parametrize(
    ("labels", "order", "message"),
    [
        (LABELS, None, "regions_class_order is None, expected the label that each region"),
        (LABELS, [1], r"regions_class_order \[1\], expected one label for each .* all, core"),
        (LABELS, [1, 1], r"regions_class_order is \[1, 1\], expected"),
        (LABELS, [1, 3], r"regions_class_order is \[1, 3\], expected among 1 to 2"),
        (LABELS, [0, 1], r"regions_class_order is \[0, 1\], expected among 1 to 2"),
        ({**LABELS, "ignore": 2}, [1, 2], "label 'ignore' is 2, expected the highest, 3"),
        ({"background": 0, "all": [1, 3]}, [1], "expected background 0, and regions of 1, 2"),
        ({"background": 0, "all": [0, 1]}, [1], "expected background 0, and regions of 1, 2"),
        ({"air": 0, "all": [1, 2]}, [1, 2], "expected background 0, and regions of 1, 2"),
        ({"background": 0, "all": [1, "2"]}, [1], r"label 'all' is \[1, '2'\], expected a whole"),
        ({"background": 0, "all": [1, 2], "none": []}, [1, 2], r"label 'none' is \[\], expected"),
    ],
)
def test_what_are_no_regions_is_refused(tmp_path, labels, order, message):
    source = write_v2(tmp_path / "source", labels=labels, regions_class_order=order)
    with pytest.raises(DatasetError, match=message) as refused:
        convert(source, tmp_path / "work")
    assert str(refused.value).startswith(str(source / "dataset.json"))
    assert not (tmp_path / "work").exists()


def test_regions_that_contradict_the_labels_are_refused():
    with pytest.raises(DatasetError, match=r"regions write the labels \(2,\), expected 1 to 1"):
        Dataset("a", ("CT",), ("background", "b"), (), regions=(2,), region_labels=((1,),))
    with pytest.raises(DatasetError, match="1 regions, and the labels of 0"):
        Dataset("a", ("CT",), ("background", "b"), (), regions=(1,))


def test_labels_that_the_order_overwrites_are_told(tmp_path, caplog):
    """Written the other way round, all of the core ends as bleed."""
    assert list(rewritten((1, 2), ((1, 2), (2,)))) == []
    assert list(rewritten((2, 1), ((2,), (1, 2)))) == ["a voxel of label 2 is written as 1"]
    caplog.set_level(logging.WARNING)
    labels = {"background": 0, "core": 2, "all": [1, 2]}
    source = write_v2(tmp_path / "source", labels=labels, regions_class_order=[2, 1])
    convert(source, tmp_path / "work")
    assert "a voxel of label 2 is written as 1" in caplog.text


def test_labels_in_no_order_keep_a_name_of_their_own():
    assert declare({"all": (1, 2, 3)}, (2,)).labels == ("background", "label 1", "all", "label 3")
