"""Fingerprints: statistics of all foreground voxels, geometry after orientation and crop."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.heads import SPACING_MM, head_in_air
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ichseg.errors import DatasetError, PlansError
from ichseg.model import strict_json
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.data.dataset import Case, Dataset, save_dataset
from training.data.sources import digest_sources
from training.planning import fingerprint
from training.planning.fingerprint import (
    Counts,
    Fingerprint,
    compute_fingerprint,
    count_values,
    load_or_compute,
    percentile_of_counts,
    summarise,
)

SPACING = (5.0, 0.5, 0.4)


def make_dataset(folder, images, labels, channels=("CT",)):
    """A dataset of the given volumes; ``images[i]`` lists the channels of case i."""
    cases = []
    for index, (stack, label) in enumerate(zip(images, labels, strict=True)):
        name = f"case_{index}"
        paths = tuple(folder / f"{name}_{channel:04d}.mha" for channel in range(len(stack)))
        for path, image in zip(paths, stack, strict=True):
            volume.write(image, path)
        volume.write(label, folder / f"{name}.mha")
        cases.append(Case(name, paths, folder / f"{name}.mha"))
    return Dataset("Tiny", channels, ("background", "bleed"), tuple(cases))


def random_dataset(folder, dtype, shift=0.0, cases=3):
    rng = np.random.default_rng(7)
    images, labels = [], []
    for index in range(cases):
        shape = (3 + index, 12, 11)
        voxels = (rng.normal(40, 300, shape) + shift).astype(dtype)
        voxels[voxels == 0] = 1  # no crop
        images.append([Volume(voxels, SPACING)])
        labels.append(Volume((rng.random(shape) < 0.3).astype(np.uint8), SPACING))
    return make_dataset(folder, images, labels), images, labels


def expected_statistics(values):
    values = values.astype(np.float64)
    return {
        "voxels": len(values),
        "mean": values.mean(),
        "deviation": values.std(),
        "minimum": values.min(),
        "percentile_00_5": np.percentile(values, 0.5),
        "median": np.median(values),
        "percentile_99_5": np.percentile(values, 99.5),
        "maximum": values.max(),
    }


def assert_statistics(found, values):
    for name, expected in expected_statistics(values).items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_statistics_of_all_foreground_voxels(tmp_path, dtype):
    dataset, images, labels = random_dataset(tmp_path, dtype)
    found = compute_fingerprint(dataset, 1)
    pooled = np.concatenate(
        [image[0].voxels[label.voxels > 0] for image, label in zip(images, labels, strict=True)]
    )
    assert_statistics(found.intensities[0], pooled)
    assert found.names == ("case_0", "case_1", "case_2")
    assert found.spacings_mm == (SPACING,) * 3
    assert found.shapes == ((3, 12, 11), (4, 12, 11), (5, 12, 11))
    assert found.relative_size == 1.0


def test_parallel_equals_serial(tmp_path):
    dataset, *_ = random_dataset(tmp_path, np.float32)
    assert compute_fingerprint(dataset, 2) == compute_fingerprint(dataset, 1)


@given(
    hnp.arrays(np.int16, st.integers(1, 300), elements=st.integers(-1000, 1000)),
    st.sampled_from([0.0, 0.5, 10.0, 50.0, 99.5, 100.0]),
)
def test_percentile_of_counts_is_numpys_to_the_bit(values, percent):
    counts = count_values(values)
    assert isinstance(counts, Counts)
    assert percentile_of_counts(counts, percent) == np.percentile(values, percent)


@pytest.mark.parametrize(
    "values",
    [
        np.array([3, -1, 3, 3, 7], np.int16),
        np.array([3.0, -1.0, 3.0]),  # whole numbers, whatever their type
        np.array([-2_000_000_000, 2_000_000_000, 0], np.int64),  # too wide for a table
        np.array([True, False]),
    ],
)
def test_whole_numbers_are_counted(values):
    counts = count_values(values)
    distinct, occurrences = np.unique(values, return_counts=True)
    np.testing.assert_array_equal(counts.values, distinct)
    np.testing.assert_array_equal(counts.counts, occurrences)


@pytest.mark.parametrize("values", [np.array([0.5, 1.0]), np.array([1.0, 1e300])])
def test_other_numbers_are_kept(values):
    np.testing.assert_array_equal(count_values(values), values)


def test_mixed_parts_are_pooled():
    parts = [np.array([1, 2, 2, 9]), np.array([0.25, 4.5]), np.array([], np.int16)]
    found = summarise([count_values(part) for part in parts])
    assert_statistics(found, np.concatenate(parts))


def test_counted_parts_are_merged():
    parts = [np.array([1, 2, 2, 9]), np.array([2, -5]), np.array([], np.int16)]
    assert_statistics(summarise([count_values(part) for part in parts]), np.concatenate(parts))


def test_axes_are_brought_to_lps(tmp_path):
    voxels = np.arange(1, 61, dtype=np.int16).reshape(3, 4, 5)
    # array axes run left, superior, posterior: (z, y, x) = (S, P, L) are axes 1, 2, 0
    direction = (0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    image = Volume(voxels, (0.4, 5.0, 0.5), direction=direction)
    label = image.with_voxels((voxels > 30).astype(np.uint8))
    found = compute_fingerprint(make_dataset(tmp_path, [[image]], [label]), 1)
    assert found.shapes == ((4, 5, 3),)
    assert found.spacings_mm == ((5.0, 0.5, 0.4),)
    assert_statistics(found.intensities[0], voxels[voxels > 30])


def test_crop_to_nonzero_over_all_channels(tmp_path):
    first, second = np.zeros((2, 6, 8, 10), np.int16)
    first[1:3, 2:5, 3:4] = 100
    second[2:5, 2:4, 3:8] = np.arange(1, 31).reshape(3, 2, 5)
    label = np.zeros((6, 8, 10), np.uint8)
    label[2:4, 2:4, 3:5] = 1
    images = [[Volume(first, SPACING), Volume(second, SPACING)]]
    dataset = make_dataset(tmp_path, images, [Volume(label, SPACING)], channels=("CT", "MRI"))
    found = compute_fingerprint(dataset, 1)
    assert found.shapes == ((4, 3, 5),)
    assert found.relative_size == pytest.approx(60 / 480)
    assert_statistics(found.intensities[0], first[label > 0])
    assert_statistics(found.intensities[1], second[label > 0])


def test_cases_without_foreground_count_in_geometry_only(tmp_path):
    dataset, images, labels = random_dataset(tmp_path, np.int16, cases=2)
    volume.write(labels[1].with_voxels(np.zeros((4, 12, 11), np.uint8)), dataset.cases[1].label)
    found = compute_fingerprint(dataset, 1)
    assert len(found.shapes) == 2
    assert_statistics(found.intensities[0], images[0][0].voxels[labels[0].voxels > 0])


def test_no_foreground_at_all_is_refused(tmp_path):
    image = Volume(np.ones((2, 3, 4), np.int16), SPACING)
    label = image.with_voxels(np.zeros((2, 3, 4), np.uint8))
    with pytest.raises(DatasetError, match="channel CT: no foreground voxel in any case"):
        compute_fingerprint(make_dataset(tmp_path, [[image]], [label]), 1)


def test_no_labelled_case_is_refused():
    dataset = Dataset("Tiny", ("CT",), ("background", "bleed"), (Case("a", (Path("a"),), None),))
    with pytest.raises(DatasetError, match="no case has a reference"):
        compute_fingerprint(dataset, 1)


def test_every_failing_case_is_named(tmp_path, caplog):
    dataset, *_ = random_dataset(tmp_path, np.int16)
    dataset.cases[0].images[0].write_bytes(b"")
    dataset.cases[2].label.unlink()
    with pytest.raises(DatasetError, match="2 of 3 cases failed, the first: case case_0"):
        compute_fingerprint(dataset, 1)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "case case_0",
        "case case_2",
    ]


def test_computed_once_and_kept(tmp_path, monkeypatch):
    dataset, *_ = random_dataset(tmp_path, np.int16)
    made = load_or_compute(tmp_path, dataset, 1)
    monkeypatch.setattr(volume, "read", None)  # no image is read
    assert load_or_compute(tmp_path, dataset, 1) == made
    assert strict_json.load(Fingerprint, tmp_path / "fingerprint.json") == made


@pytest.mark.parametrize("file", ["image", "label"])
def test_computed_again_for_changed_files(tmp_path, caplog, file):
    dataset, images, labels = random_dataset(tmp_path, np.int16)
    old = load_or_compute(tmp_path, dataset, 1)
    case = dataset.cases[1]
    if file == "image":  # as large as before
        volume.write(images[1][0].with_voxels(images[1][0].voxels + np.int16(3)), case.images[0])
    else:
        volume.write(labels[1].with_voxels(1 - labels[1].voxels), case.label)
    new = load_or_compute(tmp_path, dataset, 1)
    assert new.intensities != old.intensities
    sources = digest_sources(tmp_path, dataset)
    expected = compute_fingerprint(dataset, 1, sources)
    assert new == expected == fingerprint.load_fingerprint(tmp_path)
    assert "the cases have changed since; computed again" in caplog.text
    case.label.unlink()
    with pytest.raises(DatasetError, match="1 of 3 cases failed, the first: case case_1"):
        load_or_compute(tmp_path, dataset, 1)


def test_one_made_by_hand_stands(tmp_path):
    dataset, *_ = random_dataset(tmp_path, np.int16)
    by_hand = replace(compute_fingerprint(dataset, 1), relative_size=0.5, sources="")
    (tmp_path / "fingerprint.json").write_text(strict_json.dumps(by_hand))
    assert load_or_compute(tmp_path, dataset, 1) == by_hand


def test_one_of_an_earlier_version_is_replaced(tmp_path, caplog):
    dataset, *_ = random_dataset(tmp_path, np.int16)
    raw = strict_json.to_json(compute_fingerprint(dataset, 1))
    del raw["sources"]
    (tmp_path / "fingerprint.json").write_text(strict_json.dumps(raw))
    expected = compute_fingerprint(dataset, 1, digest_sources(tmp_path, dataset))
    assert load_or_compute(tmp_path, dataset, 1) == expected
    assert "missing keys ['sources']; computed again" in caplog.text


def test_shapes_of_heads_and_what_a_cut_to_them_loses(tmp_path):
    """The box is worked out in test_head.py: 11 of 12 slices, 69 rows, 54 columns."""
    label = np.zeros((12, 100, 100), np.uint8)
    label[3:5, 30:40, 40:50] = 1
    beyond = label.copy()
    beyond[11, 40:42, 40:43] = 1
    image = Volume(head_in_air(), SPACING_MM)
    labels = [image.with_voxels(label), image.with_voxels(beyond)]
    for channels in (("CT",), ("CT", "CT")):
        stacks = [[image] * len(channels)] * 2
        found = compute_fingerprint(make_dataset(tmp_path, stacks, labels, channels), 1)
        assert found.shapes == ((12, 100, 100),) * 2
        assert found.head_shapes == ((11, 69, 54),) * 2
        assert found.beyond_head == (0, 6)
    other = compute_fingerprint(make_dataset(tmp_path, stacks, labels, ("CT", "MR")), 1)
    assert (other.head_shapes, other.beyond_head) == ((), ())


def test_one_that_does_not_know_heads_stands_until_they_are_asked_for(tmp_path, caplog):
    dataset, *_ = random_dataset(tmp_path, np.int16)
    made = compute_fingerprint(dataset, 1, digest_sources(tmp_path, dataset))
    raw = strict_json.to_json(made)
    assert raw.pop("head_shapes") == raw["shapes"]  # nothing in them is a head
    del raw["beyond_head"]
    (tmp_path / "fingerprint.json").write_text(strict_json.dumps(raw))
    old = load_or_compute(tmp_path, dataset, 1)
    assert old == replace(made, head_shapes=(), beyond_head=())
    assert load_or_compute(tmp_path, dataset, 1, heads=True) == made
    assert "does not say where heads are; computed again" in caplog.text


def test_computed_again_for_other_cases(tmp_path):
    dataset, *_ = random_dataset(tmp_path, np.int16)
    load_or_compute(tmp_path, dataset, 1)
    fewer = Dataset(dataset.name, dataset.channels, dataset.labels, dataset.cases[:2])
    found = load_or_compute(tmp_path, fewer, 1)
    assert found.names == ("case_0", "case_1")
    assert fingerprint.load_fingerprint(tmp_path) == found


def test_computed_again_for_another_label_to_ignore(tmp_path):
    """The same files, of which label 1 counts and label 2 is for what nobody could tell."""
    both, *_ = random_dataset(tmp_path, np.int16)
    for case in both.cases:
        label = volume.read(case.label)
        half = np.arange(label.voxels.shape[0])[:, None, None] > 0
        volume.write(label.with_voxels(label.voxels + label.voxels * half), case.label)
    both = replace(both, labels=("background", "bleed", "rim"))
    one = replace(both, labels=both.labels[:2], ignore_label=2)
    for dataset in (both, one, both):
        found = load_or_compute(tmp_path, dataset, 1)
        assert found == compute_fingerprint(dataset, 1, found.sources)
        assert load_or_compute(tmp_path, dataset, 1) == found
    by_hand = replace(found, sources="")
    (tmp_path / "fingerprint.json").write_text(strict_json.dumps(by_hand))
    assert load_or_compute(tmp_path, one, 1) == by_hand


def test_command(tmp_path, capsys):
    dataset, *_ = random_dataset(tmp_path, np.int16)
    save_dataset(dataset, tmp_path)
    parser = fingerprint.argparse.ArgumentParser()
    fingerprint.add_arguments(parser)
    args = parser.parse_args(["--workspace", str(tmp_path), "--workers", "1"])
    assert fingerprint.main(args) == 0
    assert fingerprint.load_fingerprint(tmp_path).names == ("case_0", "case_1", "case_2")
    assert "median spacing 5x0.5x0.4 mm" in capsys.readouterr().out


def test_other_schemas_are_refused(tmp_path):
    dataset, *_ = random_dataset(tmp_path, np.int16)
    raw = strict_json.to_json(load_or_compute(tmp_path, dataset, 1))
    with pytest.raises(PlansError, match="fingerprint schema 2, this code reads 1"):
        strict_json.from_json(Fingerprint, {**raw, "schema_version": 2}, where="x")
    with pytest.raises(PlansError, match="3 names, 3 spacings, 2 shapes"):
        strict_json.from_json(Fingerprint, {**raw, "shapes": raw["shapes"][:2]}, where="x")


def test_needs_no_torch():
    """Loading it would take longer than the fingerprint of ten cases."""
    code = "import sys, training.planning.fingerprint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_voxels_to_ignore_are_no_foreground(tmp_path):
    """The same as if they were background, for intensities as for what a cut to the head loses."""
    dataset, _, labels = random_dataset(tmp_path, np.int16)
    expected = compute_fingerprint(dataset, 1)
    for case, label in zip(dataset.cases, labels, strict=True):
        doubted = np.where(label.voxels > 0, label.voxels, len(dataset.labels))
        volume.write(label.with_voxels(doubted.astype(np.uint8)), case.label)
    ignoring = replace(dataset, ignore_label=len(dataset.labels))
    assert compute_fingerprint(ignoring, 1) == replace(expected, ignore_label=2)
    with pytest.raises(DatasetError, match="expected whole labels"):
        compute_fingerprint(dataset, 1)
