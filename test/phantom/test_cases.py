"""The phantom generator: deterministic, labels as large as asked, bleeds where bleeds can be."""

import argparse
import csv
import json

import numpy as np
import pytest

from ichseg.errors import DatasetError
from ichseg.scan.volume import read
from phantom import bleeds, cases, scanner
from phantom import head as phantom
from phantom.cases import SynthesisConfig, draw_lesions, make_case, make_phantom, write_dataset

SHRINK = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two cases by one worker: a bleed and, in a second folder, the same by two workers."""
    folder = tmp_path_factory.mktemp("synthesized")
    config = SynthesisConfig(cases=2, seed=5, negatives=0.0, balanced=True, shrink=SHRINK)
    write_dataset(config, folder / "one", workers=1)
    write_dataset(config, folder / "two", workers=2)
    return folder


def test_workers_and_runs_give_the_same_bytes(dataset):
    names = sorted(
        path.relative_to(dataset / "one") for path in (dataset / "one").rglob("*") if path.is_file()
    )
    assert len(names) == 6  # two images, two labels, dataset.json, cases.csv
    for name in names:
        assert (dataset / "one" / name).read_bytes() == (dataset / "two" / name).read_bytes(), name


def test_dataset_json_lists_files_that_fit_each_other(dataset):
    folder = dataset / "one"
    listed = json.loads((folder / "dataset.json").read_text())
    assert (listed["numTraining"], listed["numTest"], listed["test"]) == (2, 0, [])
    assert listed["labels"] == {"0": "background", "1": "hemorrhage"}
    for pair in listed["training"]:
        image, label = read(folder / pair["image"]), read(folder / pair["label"])
        assert (image.spacing_mm, image.origin_mm, image.direction) == (
            label.spacing_mm, label.origin_mm, label.direction,
        )  # fmt: skip
        assert image.voxels.shape == label.voxels.shape
        assert (image.voxels.dtype, label.voxels.dtype) == (np.int16, np.uint8)
        assert set(np.unique(label.voxels)) == {0, 1}


def test_table_gives_the_labelled_volumes(dataset):
    with (dataset / "one" / "cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["kinds"] for row in rows] == ["intraparenchymal", "intraventricular"]
    for row in rows:
        label = read(dataset / "one" / "labelsTr" / f"{row['case']}.nii.gz")
        volume = float(row["volume_ml"].split("=")[1])
        assert volume == pytest.approx(label.voxels.sum() * label.voxel_ml, rel=1e-2, abs=1e-3)


def test_another_seed_gives_another_scan(dataset):
    first = read(dataset / "one" / "imagesTr" / "ICH_0001.nii.gz")
    other = make_case(
        SynthesisConfig(cases=1, seed=6, negatives=0.0, balanced=True, shrink=SHRINK), 0
    )
    assert other.voxels.shape != first.voxels.shape or (other.voxels != first.voxels).mean() > 0.2


@pytest.mark.parametrize(
    ("kind", "volume_ml"),
    [
        ("intraparenchymal", 0.6),
        ("intraventricular", 3.0),
        ("subdural", 12.0),
        ("epidural", 30.0),
        ("subarachnoid", 6.0),
    ],
)
def test_bleed_has_its_volume_and_stands_out(kind, volume_ml):
    rng = np.random.default_rng(11)
    head = phantom.draw_head(rng)
    scan = scanner.draw_scan(head, rng, shrink=1)
    case = make_phantom(head, scan, ((kind, volume_ml),), rng)
    bleed = case.mask > 0
    assert bleed.sum() * np.prod(case.spacing_mm) / 1000 == pytest.approx(volume_ml, rel=0.2)
    assert 45 <= case.voxels[bleed].mean() <= 95
    around = _shell(bleed) & (case.voxels > 0) & (case.voxels < 100)
    assert case.voxels[bleed].mean() > case.voxels[around].mean() + 10


def test_negative_has_calcifications_and_no_label():
    rng = np.random.default_rng(3)
    head = cases._replace(
        phantom.draw_head(rng), calcified=("pineal", "left choroid", "right choroid")
    )
    scan = scanner.draw_scan(head, rng, shrink=2)
    case = make_phantom(head, scan, (), rng)
    assert not case.mask.any()
    assert case.volumes_ml == {}
    slices, rows, columns = case.voxels.shape
    middle = case.voxels[
        slices // 3 : 2 * slices // 3,
        rows // 3 : 2 * rows // 3,
        columns * 2 // 5 : columns * 3 // 5,
    ]
    assert (middle > 90).any()  # bright enough to be taken for blood


def test_calcifications_are_not_labelled():
    rng = np.random.default_rng(4)
    head = cases._replace(
        phantom.draw_head(rng), calcified=("pineal", "left choroid", "right choroid")
    )
    scan = scanner.draw_scan(head, rng, shrink=2)
    case = make_phantom(head, scan, (("epidural", 10.0),), rng)
    assert case.voxels[case.mask > 0].max() < 110 + 6 * scan.noise_hu


def test_negative_fraction_and_balance_are_kept():
    drawn = [
        draw_lesions(SynthesisConfig(400, 1, negatives=0.25), i, np.random.default_rng([1, i]))
        for i in range(400)
    ]
    assert 0.19 < np.mean([not lesions for lesions in drawn]) < 0.31
    volumes = np.array([sum(ml for _, ml in lesions) for lesions in drawn if lesions])
    assert volumes.min() >= 0.19
    assert volumes.max() <= 155
    assert 1.5 < np.median(volumes) < 9  # log-uniform: the middle of 0.2..155 is 5.6
    config = SynthesisConfig(20, 20221, negatives=0.0, balanced=True)
    kinds = [draw_lesions(config, i, np.random.default_rng([20221, i]))[0][0] for i in range(20)]
    assert all(kinds.count(kind) == 4 for kind in bleeds.KINDS)


def test_existing_folder_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DatasetError, match="exists already"):
        write_dataset(SynthesisConfig(1, 0), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_settings_out_of_range_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="negatives"):
        write_dataset(SynthesisConfig(1, 0, negatives=1.5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(job):
        raise RuntimeError("disk full")

    monkeypatch.setattr(cases, "_write_case", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write_dataset(SynthesisConfig(1, 0), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_out_the_command_says_what_it_needs():
    parser = argparse.ArgumentParser()
    cases.add_arguments(parser)
    with pytest.raises(DatasetError, match="--out"):
        cases.main(parser.parse_args([]))


def _shell(mask):
    from scipy import ndimage

    return ndimage.binary_dilation(mask, iterations=6) & ~ndimage.binary_dilation(
        mask, iterations=2
    )
