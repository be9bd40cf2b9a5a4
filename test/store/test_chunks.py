"""The store of preprocessed cases."""

import json
import time

import blosc2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichseg.errors import DatasetError, PlansError
from ichseg.model.plans import Normalisation
from training.store import chunks
from training.store.chunks import (
    is_complete,
    list_cases,
    open_case,
    write_case,
    write_previous,
)
from training.store.foreground import sample_foreground, sample_lesions

CT = Normalisation("ct", clip_low=0, clip_high=100, mean=40, deviation=8)
ZSCORE = Normalisation("zscore")
NONE = Normalisation("none")
SUFFIXES = [".data.b2nd", ".target.b2nd", ".foreground.npz", ".json"]


def example(seed=0, shape=(4, 6, 5)):
    """Two channels, a target, and how the channels were normalised."""
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(2, *shape)).astype(np.float32)
    target = rng.integers(-1, 3, shape).astype(np.int8)
    return data, target, (CT, ZSCORE)


def test_what_is_written_is_read_to_half_a_step(tmp_path):
    data, target, normalisations = example()
    write_case(tmp_path / "store", "case_1", data, target, normalisations)
    case = open_case(tmp_path / "store", "case_1")
    assert abs(case.data[0] - data[0]).max() * CT.deviation <= 1 / 32 + 1e-6  # HU
    assert abs(case.data[1] - data[1]).max() <= 1 / 2048 + 1e-6  # standard deviations
    np.testing.assert_array_equal(case.target[:], target)
    assert case.data[:].dtype == np.float32
    assert case.target[:].dtype == np.int8
    assert sorted(case.foreground) == [1, 2]
    for label, found in case.foreground.items():
        np.testing.assert_array_equal(found, np.argwhere(target == label))
    meta = chunks.load_meta(tmp_path / "store", "case_1")
    assert meta.shape == case.data.shape == (2, 4, 6, 5)
    assert meta.steps == (1 / 16 / 8, 1 / 1024)
    assert dict(zip(meta.labels, meta.voxels, strict=True)) == {
        label: int((target == label).sum()) for label in (1, 2)
    }


def test_multiples_of_a_sixteenth_hu_are_exact(tmp_path):
    data = (np.arange(-64, 64, dtype=np.float32) / 16 / CT.deviation).reshape(1, 4, 4, 8)
    write_case(tmp_path, "a", data, np.zeros((4, 4, 8), np.int8), (CT,))
    np.testing.assert_allclose(open_case(tmp_path, "a").data[:], data, rtol=1e-6)


@pytest.mark.parametrize(
    ("image", "tolerance"),
    [
        ([0.1, 1.2345, 2.71, 3.337], 1.25 / 2048),  # the deviation is 1.25
        ([7.5] * 4, 0),
        ([0.0] * 4, 0),
        ([-3e30, 0, 0, 1e30], 2e27),
        ([1e7, 1e7 + 1, 1e7, 1e7], 0.5),  # codes beyond int32
    ],
)
def test_images_that_are_not_normalised_keep_a_thousandth_of_their_own_deviation(
    tmp_path, image, tolerance
):
    data = np.array(image, np.float32).reshape(1, 1, 2, 2)
    write_case(tmp_path, "a", data, np.zeros((1, 2, 2), np.int8), (NONE,))
    found = open_case(tmp_path, "a").data[:].astype(np.float64)
    np.testing.assert_allclose(found, data, rtol=0, atol=tolerance)


def test_intensities_far_out_are_not_cut_off(tmp_path):
    data = np.zeros((1, 2, 2, 2), np.float32)
    data[0, 0, 0] = 40, -33_000  # standard deviations; int16 ends at 32
    write_case(tmp_path, "a", data, np.zeros((2, 2, 2), np.int8), (ZSCORE,))
    np.testing.assert_allclose(open_case(tmp_path, "a").data[:], data, atol=1e-3)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_a_region_read_is_the_region_of_the_whole(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers((1, 60, 60), (40, 150, 150)))
    data = rng.integers(-100, 100, (2, *shape)).astype(np.float32) / 1024
    target = rng.integers(-1, 3, shape).astype(np.int8)
    folder = tmp_path_factory.mktemp("store")
    write_case(folder, "a", data, target, (ZSCORE, ZSCORE))
    case = open_case(folder, "a")
    region = tuple(slice(*sorted(rng.integers(0, size + 1, 2).tolist())) for size in shape)
    np.testing.assert_array_equal(case.data[(slice(None), *region)], data[(slice(None), *region)])
    np.testing.assert_array_equal(case.target[region], target[region])


def test_a_patch_costs_a_fraction_of_the_case(tmp_path):
    """What is not asked for is not inflated: a corner of 2 % costs less than half the time."""
    data = np.random.default_rng(0).normal(size=(1, 64, 384, 384)).astype(np.float32)
    write_case(tmp_path, "a", data, np.zeros(data.shape[1:], np.int8), (ZSCORE,))
    array = open_case(tmp_path, "a").data

    def seconds(index):
        started = time.process_time()
        array[index]
        return time.process_time() - started

    corner = (slice(None), slice(0, 16), slice(0, 128), slice(0, 128))
    whole = (slice(None),) * 4
    assert min(seconds(corner) for _ in range(3)) < min(seconds(whole) for _ in range(3)) / 2


def test_a_case_without_foreground(tmp_path):
    data, target, normalisations = example()
    write_case(tmp_path, "negative", data, np.zeros_like(target), normalisations)
    assert open_case(tmp_path, "negative").foreground == {}


def test_the_same_case_gives_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        write_case(tmp_path / folder, "a", *example())
    for suffix in SUFFIXES:
        one, two = (tmp_path / folder / f"a{suffix}" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_no_temporary_file_is_left_and_none_stays_open(tmp_path):
    write_case(tmp_path, "a", *example())
    case = open_case(tmp_path, "a")
    assert {path.name for path in tmp_path.iterdir()} == {f"a{suffix}" for suffix in SUFFIXES}
    for suffix in SUFFIXES[:2]:
        (tmp_path / f"a{suffix}").unlink()
    with pytest.raises(DatasetError, match=r"a\.data\.b2nd: damaged, or missing"):
        case.data[:, 0]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_case_counts_only_when_whole(tmp_path, suffix):
    write_case(tmp_path, "a", *example())
    write_case(tmp_path, "b", *example(1))
    assert list_cases(tmp_path) == ("a", "b")
    (tmp_path / f"a{suffix}").unlink()
    assert not is_complete(tmp_path, "a")
    assert list_cases(tmp_path) == ("b",)
    with pytest.raises(DatasetError, match="no finished case a"):
        open_case(tmp_path, "a")


@pytest.mark.parametrize("at", range(4))
def test_a_rewrite_interrupted_at_any_file_is_not_a_finished_case(tmp_path, monkeypatch, at):
    write_case(tmp_path, "a", *example())
    replacing, count = chunks.replacing, iter(range(4))

    def interrupted(*args, **kwargs):
        if next(count) == at:
            raise KeyboardInterrupt
        return replacing(*args, **kwargs)

    monkeypatch.setattr(chunks, "replacing", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_case(tmp_path, "a", *example(1))
    assert not is_complete(tmp_path, "a")


def test_other_files_are_no_cases(tmp_path):
    write_case(tmp_path, "a", *example())
    (tmp_path / ".preprocessing.json").write_text("{}")
    (tmp_path / "b.json").write_text("{}")
    assert list_cases(tmp_path) == ("a",)
    assert list_cases(tmp_path / "missing") == ()


def test_all_of_a_small_label_and_a_sample_of_a_large_one():
    target = np.zeros((20, 60, 60), np.int8)
    target[:8] = 1  # 28 800 voxels: 10 000 are kept
    target[9, :5, :5] = 2  # 25 voxels: all
    foreground, counts = sample_foreground(target)
    assert counts == {1: 28_800, 2: 25}
    assert foreground[1].shape == (10_000, 3)
    order = np.ravel_multi_index(tuple(foreground[1].astype(int).T), target.shape)
    assert (np.diff(order) > 0).all()  # without replacement, and in order: so they compress
    assert (target[tuple(foreground[1].T)] == 1).all()
    np.testing.assert_array_equal(foreground[2], np.argwhere(target == 2))
    assert foreground[1].dtype == np.int16


def test_one_percent_of_a_very_large_label():
    target = np.ones((1, 1_000, 1_050), np.int8)
    foreground, _ = sample_foreground(target)
    assert len(foreground[1]) == 10_500


def test_coordinates_beyond_int16():
    target = np.zeros((1, 1, 40_000), np.int8)
    target[0, 0, 39_999] = 1
    foreground, _ = sample_foreground(target)
    np.testing.assert_array_equal(foreground[1], [[0, 0, 39_999]])


@pytest.mark.parametrize(
    ("data", "target", "message"),
    [
        (np.zeros((1, 2, 2, 2)), np.zeros((2, 2, 2), np.int8), "data is float64"),
        (np.zeros((2, 2, 2), np.float32), np.zeros((2, 2, 2), np.int8), r"expected float32 \(1,"),
        (np.zeros((2, 2, 2, 2), np.float32), np.zeros((2, 2, 2), np.int8), r"float32 \(1, Z, Y"),
        (np.zeros((1, 2, 2, 2), np.float32), np.zeros((2, 2, 2)), "target is float64"),
        (np.zeros((1, 2, 2, 2), np.float32), np.zeros((2, 2, 3), np.int8), r"int8 \(2, 2, 2\)"),
    ],
)
def test_write_refuses(tmp_path, data, target, message):
    with pytest.raises(DatasetError, match=message):
        write_case(tmp_path, "a", data, target, (CT,))
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path):
    write_case(tmp_path, "a", *example())
    (tmp_path / "a.data.b2nd").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="case a is damaged"):
        open_case(tmp_path, "a")
    write_case(tmp_path, "a", *example())
    (tmp_path / "a.target.b2nd").unlink()
    blosc2.asarray(np.zeros((2, 6, 5), np.int8), urlpath=str(tmp_path / "a.target.b2nd"))
    with pytest.raises(DatasetError, match=r"case a has shapes .* expected \(2, 4, 6, 5\)"):
        open_case(tmp_path, "a")
    meta = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps({**meta, "schema_version": 7}))
    with pytest.raises(PlansError, match="store schema 7, this code reads 2"):
        open_case(tmp_path, "a")


def test_previous_labels_lie_beside_a_case_until_it_is_written_anew(tmp_path):
    data, target, normalisations = example()
    write_case(tmp_path, "a", data, target, normalisations)
    assert open_case(tmp_path, "a").previous is None
    labels = np.random.default_rng(1).integers(0, 3, target.shape).astype(np.int8)
    write_previous(tmp_path, "a", labels, "w")
    case = open_case(tmp_path, "a")
    np.testing.assert_array_equal(case.previous[1:3], labels[1:3])
    assert case.previous_weights == "w"
    np.testing.assert_array_equal(case.target[...], target)
    assert case.previous[...].dtype == np.int8
    assert list_cases(tmp_path) == ("a",)
    write_case(tmp_path, "a", data, target, normalisations)
    assert open_case(tmp_path, "a").previous is None


def test_refuses_previous_labels_that_are_not_of_the_case(tmp_path):
    data, target, normalisations = example()
    with pytest.raises(DatasetError, match="no finished case a"):
        write_previous(tmp_path, "a", target, "w")
    write_case(tmp_path, "a", data, target, normalisations)
    for wrong in (target[1:], target.astype(np.uint8)):
        with pytest.raises(DatasetError, match=r"case a are .*, expected int8 \(4, 6, 5\)"):
            write_previous(tmp_path, "a", wrong, "w")
    write_case(tmp_path / "other", "b", data[:, 1:], target[1:], normalisations)
    write_previous(tmp_path / "other", "b", target[1:], "w")
    (tmp_path / "other" / "b.previous.b2nd").rename(tmp_path / "a.previous.b2nd")
    with pytest.raises(DatasetError, match=r"shape \(3, 6, 5\), expected \(4, 6, 5\)"):
        open_case(tmp_path, "a")


def test_the_whole_numbers_times_their_steps_are_what_is_read(tmp_path):
    data, target, normalisations = example()
    write_case(tmp_path, "a", data, target, normalisations)
    case = open_case(tmp_path, "a")
    multiples = case.data.multiples((slice(None), slice(1, 3)))
    assert multiples.dtype == np.int16
    product = multiples.astype(np.float32) * case.data.steps[:, None, None, None]
    np.testing.assert_array_equal(product, case.data[:, 1:3])
    assert (case.data.nbytes, case.target.nbytes) == (2 * 2 * 120, 120)


def test_voxels_to_ignore_are_kept_and_are_no_foreground(tmp_path):
    data, target, normalisations = example()
    top = int(target.max())
    doubted = target.copy()
    doubted[:2] = top + 1
    write_case(tmp_path, "a", data, doubted, normalisations, ignore_label=top + 1)
    case, meta = open_case(tmp_path, "a"), chunks.load_meta(tmp_path, "a")
    np.testing.assert_array_equal(case.target[:], doubted)
    assert case.ignore_label == meta.ignore_label == top + 1
    assert set(case.foreground) == set(meta.labels) == set(np.unique(doubted[2:])) - {-1, 0}
    for label, voxels in case.foreground.items():
        np.testing.assert_array_equal(voxels, np.argwhere(doubted == label))
    np.testing.assert_array_equal(case.annotated, np.argwhere(doubted != top + 1))
    write_case(tmp_path, "a", data, target, normalisations)
    assert open_case(tmp_path, "a").annotated is None


def test_large_labels_are_sampled_alike_with_voxels_to_ignore(tmp_path):
    target = np.ones((40, 40, 40), np.int8)
    target[0] = 2
    sampled, counts = sample_foreground(target, 2)
    assert counts == {1: 39 * 1600}
    plain, _ = sample_foreground(np.where(target == 2, 0, target).astype(np.int8))
    np.testing.assert_array_equal(sampled[1], plain[1])


def test_each_lesion_has_voxels_of_its_own(tmp_path):
    """A box of 3000 voxels of two labels, one voxel that touches a corner of it, one alone."""
    target = np.zeros((20, 30, 40), np.int8)
    target[1:11, 1:21, 1:16] = 1
    target[1:11, 1:11, 1:16] = 2
    target[11, 21, 16] = 1
    target[15, 25, 35] = 2
    target[18, 0, 0] = 3  # nobody could tell
    listed = sample_lesions(target, ignore_label=3)
    assert np.bincount(listed[:, 0])[1:].tolist() == [1000, 1]
    assert listed[listed[:, 0] == 2, 1:].tolist() == [[15, 25, 35]]
    assert len(np.unique(listed[:, 1:], axis=0)) == 1001
    assert np.isin(target[tuple(listed[:, 1:].T)], (1, 2)).all()
    data = np.zeros((1, *target.shape), np.float32)
    write_case(tmp_path, "a", data, target, (CT,), ignore_label=3)
    case = open_case(tmp_path, "a")
    assert {number: len(voxels) for number, voxels in case.lesions.items()} == {1: 1000, 2: 1}
    assert case.counts == {1: 1501, 2: 1501}


def test_a_case_without_foreground_has_no_lesions(tmp_path):
    target = np.zeros((2, 3, 4), np.int8)
    write_case(tmp_path, "a", np.zeros((1, 2, 3, 4), np.float32), target, (CT,))
    assert open_case(tmp_path, "a").lesions == {}
