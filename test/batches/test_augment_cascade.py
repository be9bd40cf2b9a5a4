import dataclasses
import time

import numpy as np
import pytest
from scipy import ndimage

from training.batches import augment_cascade
from training.batches.augment_cascade import (
    apply_operator,
    closing,
    corrupt,
    dilate,
    erode,
    opening,
    remove_component,
)
from training.batches.augmentation import MSD2018, NNUNETV2, NO_AUGMENTATION

ALWAYS = dataclasses.replace(
    NO_AUGMENTATION, morphology_probability=1, morphology_label_probability=1
)


def drawn(*rows):
    """One slice of labels, a digit a voxel."""
    return np.array([[[int(digit) for digit in row] for row in rows]], np.int8)


def blobs(seed, shape=(9, 30, 40), classes=1):
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2)
    order = np.argsort(np.argsort(smooth.ravel())).reshape(shape) / smooth.size
    return sum(order > 1 - 0.1 * k for k in range(1, classes + 1)).astype(np.int8)


def test_dilation_by_hand():
    # radius 1: the faces; 1.5: the edges too (1.41), not yet two steps (2)
    point = drawn("00000", "00000", "00100", "00000", "00000") == 1
    cross = drawn("00000", "00100", "01110", "00100", "00000") == 1
    square = drawn("00000", "01110", "01110", "01110", "00000") == 1
    diamond = drawn("00100", "01110", "11111", "01110", "00100") == 1
    np.testing.assert_array_equal(dilate(point, 1.0), cross)
    np.testing.assert_array_equal(dilate(point, 1.5), square)
    np.testing.assert_array_equal(dilate(point, 2.0), square | diamond)


@pytest.mark.parametrize("radius", [1.0, 2.3, 5.0, 7.99, 13.0])
def test_operators_are_those_of_scipy(radius):
    """A ball as scipy's structure; beyond the border a dilation finds nothing, an erosion all."""
    reach = int(radius)
    grid = np.mgrid[[slice(-reach, reach + 1)] * 3]
    ball = (grid**2).sum(0) <= radius**2
    mask = blobs(1, (5, 14, 18) if radius > 8 else (9, 30, 40)) == 1
    dilated = ndimage.binary_dilation(mask, ball)
    eroded = ndimage.binary_erosion(mask, ball, border_value=1)
    np.testing.assert_array_equal(dilate(mask, radius), dilated)
    np.testing.assert_array_equal(erode(mask, radius), eroded)
    np.testing.assert_array_equal(
        closing(mask, radius), ndimage.binary_erosion(dilated, ball, border_value=1)
    )
    np.testing.assert_array_equal(opening(mask, radius), ndimage.binary_dilation(eroded, ball))


def test_nothing_grows_from_nothing_and_all_stays_all():
    empty, full = np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool)
    assert not dilate(empty, 8).any()
    assert erode(full, 8).all()


def test_a_label_that_grows_wins_and_leaves_no_hole_in_others():
    labels = drawn("0000000", "0120020", "0000000")
    grown, shrunk = labels.copy(), drawn("111", "111", "111")
    apply_operator(grown, 1, dilate, 1.0)
    np.testing.assert_array_equal(grown, drawn("0100000", "1110020", "0100000"))
    apply_operator(grown, 3, dilate, 1.0)  # a label that is not there
    np.testing.assert_array_equal(grown, drawn("0100000", "1110020", "0100000"))
    shrunk[0, 0, 2] = 2
    apply_operator(shrunk, 1, erode, 1.0)
    np.testing.assert_array_equal(shrunk, drawn("102", "110", "111"))


def test_only_small_components_go_one_at_a_time():
    labels = drawn("1100100", "1100010", "0000000", "2211100")
    # of label 1: four voxels, two that touch by a corner, and three
    results = set()
    for seed in range(20):
        result = labels.copy()
        remove_component(result, 1, 4, np.random.default_rng(seed))
        results.add(result.tobytes())
    pair = drawn("1100000", "1100000", "0000000", "2211100")
    three = drawn("1100100", "1100010", "0000000", "2200000")
    assert results == {pair.tobytes(), three.tobytes()}
    kept = labels.copy()
    remove_component(kept, 1, 2, np.random.default_rng(0))
    np.testing.assert_array_equal(kept, labels)


def test_the_share_is_of_the_patch():
    # a component of 12 voxels: 15 % of 80 are 12, which is not less
    labels = drawn("111111", "111111", "000000")
    config = dataclasses.replace(
        NO_AUGMENTATION, removal_probability=1, removal_label_probability=1
    )
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(corrupt(labels, 1, rng, config, patch_voxels=80), labels)
    assert not corrupt(labels, 1, rng, config, patch_voxels=81).any()
    assert labels.sum() == 12


def test_background_and_outside_stay_and_no_label_is_invented():
    labels = blobs(2, classes=3)
    labels[:, :2] = -1
    before = labels.copy()
    result = corrupt(labels, 3, np.random.default_rng(5), ALWAYS, patch_voxels=labels.size)
    assert result.dtype == np.int8
    assert set(np.unique(result)) <= {-1, 0, 1, 2, 3}
    assert not np.array_equal(result, before)
    np.testing.assert_array_equal(labels, before)


def test_draws_are_the_references(monkeypatch):
    """Shares of samples and labels, operators and radii, over many draws (nnunetv2 2.8.1)."""
    calls, removed = [], []
    monkeypatch.setattr(
        augment_cascade, "apply_operator", lambda _, label, *drawn: calls.append((label, *drawn))
    )
    monkeypatch.setattr(
        augment_cascade, "remove_component", lambda _, label, limit, __: removed.append(limit)
    )
    labels, rng, count = np.ones((1, 1, 1), np.int8), np.random.default_rng(0), 8000
    for _ in range(count):
        corrupt(labels, 2, rng, NNUNETV2, patch_voxels=1000)
    # p 0.4 a sample, 0.5 a label, two labels; four standard deviations are some 3.5 %
    assert len(calls) / count == pytest.approx(0.4, abs=0.03)
    assert len(removed) / count == pytest.approx(0.2, abs=0.02)
    assert set(removed) == {150.0}
    for change in augment_cascade.OPERATORS:
        assert np.mean([drawn[1] is change for drawn in calls]) == pytest.approx(0.25, abs=0.03)
    radii = [drawn[2] for drawn in calls]
    assert min(radii) >= 1
    assert max(radii) <= 8
    assert np.mean(radii) == pytest.approx(4.5, abs=0.15)
    assert np.mean([drawn[0] == 1 for drawn in calls]) == pytest.approx(0.5, abs=0.04)


def test_which_label_goes_first_is_drawn(monkeypatch):
    monkeypatch.setattr(augment_cascade, "OPERATORS", (dilate,))
    # both grow over the voxel between them: the later one has it
    labels = drawn("10002")
    config = dataclasses.replace(ALWAYS, morphology_radius=(2.0, 2.0))
    found = {
        int(corrupt(labels, 2, np.random.default_rng(seed), config, patch_voxels=5)[0, 0, 2])
        for seed in range(40)
    }
    assert found == {1, 2}


def test_the_same_generator_gives_the_same_and_none_changes_nothing():
    labels = blobs(3, classes=2)
    first, second = (
        corrupt(labels, 2, np.random.default_rng(9), ALWAYS, patch_voxels=labels.size)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(corrupt(labels, 2, rng, NO_AUGMENTATION, patch_voxels=9), labels)


def test_both_recipes_spoil_alike():
    for name in ("morphology_probability", "morphology_radius", "removal_share"):
        assert getattr(MSD2018, name) == getattr(NNUNETV2, name)
    assert (MSD2018.morphology_probability, MSD2018.removal_probability) == (0.4, 0.2)


def test_a_large_ball_on_a_large_patch_is_quick():
    mask = blobs(4, (16, 320, 320)) == 1
    began = time.process_time()
    closing(mask, 8.0)
    assert time.process_time() - began < 0.5  # 0.02 s; a full distance transform takes 1 s
