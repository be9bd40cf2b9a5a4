"""INSTANCE's measures: by hand, for empty masks, and against an independent implementation."""

import dataclasses
import math

import numpy as np
import pytest
from helpers import references

from training.scoring.measures import (
    EMPTY_POLICIES,
    MEASURES,
    Scores,
    diagonal_mm,
    score_masks,
)

SPACING_MM = (5.0, 0.42, 0.42)
INF = math.inf


def score(prediction, reference, spacing_mm=SPACING_MM, empty="instance"):
    return score_masks(prediction, reference, spacing_mm, empty=empty,
                       diagonal_mm=diagonal_mm(reference.shape, spacing_mm))  # fmt: skip


def squares():
    """Two squares of 4x4 voxels in one slice, the second a step further along x."""
    first, second = np.zeros((2, 1, 8, 8), bool)
    first[:, 2:6, 1:5] = True
    second[:, 2:6, 2:6] = True
    return first, second


def test_two_squares():
    first, second = squares()
    found = score(first, second, (5.0, 0.42, 0.42))
    assert found.dice == pytest.approx((2 * 12 + 1e-5) / (32 + 1e-5), rel=1e-12)
    assert found.relative_volume_difference == 0.0
    assert found.surface_dice == 1.0  # a step of 0.42 mm is within the tolerance
    assert found.hausdorff_mm == 0.42
    coarser = score(first, second, (5.0, 0.43, 0.43))
    assert coarser.hausdorff_mm == 0.43
    assert 0 < coarser.surface_dice < 1  # what coincides, and what is a step of 0.43 mm away


def test_volume_difference_is_of_the_reference():
    first, second = squares()
    first[:, 2] = False  # 12 of 16 voxels
    assert score(first, second).relative_volume_difference == 0.25
    assert score(second, first).relative_volume_difference == pytest.approx(1 / 3)


def test_disjoint_masks_of_the_paper():
    """Its Fig. 3 has the minimum 1.1086474378198733e-08, which 902 voxels and no overlap give."""
    first, second = np.zeros((2, 1, 50, 50), bool)
    first.ravel()[:500] = True
    second.ravel()[1000:1402] = True
    assert score(first, second).dice == pytest.approx(1.10864743782e-08, rel=1e-11)


def test_200_random_pairs_like_the_independent_implementation():
    random = np.random.default_rng(2022)
    for _ in range(200):
        shape = tuple(int(n) for n in random.integers(1, (9, 25, 25)))
        spacing_mm = tuple(float(s) for s in random.uniform((0.4, 0.2, 0.2), (7, 1.1, 1.1)))
        prediction, reference = references.random_pair(random, shape)
        ours = dataclasses.asdict(score(prediction, reference, spacing_mm))
        theirs = references.reference_scores(prediction, reference, spacing_mm)
        for measure in MEASURES:
            assert ours[measure] == pytest.approx(theirs[measure], rel=1e-6, abs=1e-6), measure


EMPTIES = {
    # prediction is empty, reference is empty: what is scored
    ("instance", True, False): Scores(None, 1.0, 0.0, INF, INF),
    ("instance", False, True): Scores(None, None, 0.0, INF, INF),
    ("instance", True, True): Scores(1.0, None, None, INF, INF),
    ("diagonal", True, False): Scores(None, 1.0, 0.0, 13.0, 13.0),
    ("diagonal", False, True): Scores(None, None, 0.0, 13.0, 13.0),
    ("diagonal", True, True): Scores(1.0, 0.0, 1.0, 0.0, 0.0),
    ("null", True, False): Scores(None, 1.0, 0.0, None, None),
    ("null", False, True): Scores(None, None, 0.0, None, None),
    ("null", True, True): Scores(None, None, None, None, None),
}


@pytest.mark.parametrize(("empty", "no_prediction", "no_reference"), EMPTIES)
def test_empty_masks(empty, no_prediction, no_reference):
    prediction, reference = np.zeros((2, 1, 3, 4), bool)
    prediction[0, 0, 0] = not no_prediction
    reference[0, 0, 0] = not no_reference
    found = score(prediction, reference, (12.0, 1.0, 1.0), empty)  # 12, 3 and 4 mm: 13 across
    expected = EMPTIES[empty, no_prediction, no_reference]
    if no_prediction != no_reference:  # one voxel in all, under every policy
        expected = dataclasses.replace(expected, dice=pytest.approx(1e-5 / (1 + 1e-5)))
    assert dataclasses.astuple(found) == dataclasses.astuple(expected)


@pytest.mark.parametrize("empty", EMPTY_POLICIES)
def test_policy_does_not_touch_what_is_not_empty(empty):
    assert score(*squares(), empty=empty) == score(*squares())


def test_refusals():
    first, second = squares()
    with pytest.raises(ValueError, match="policy 'zero' for empty masks, expected one of"):
        score(first, second, empty="zero")
    with pytest.raises(ValueError, match="masks of shapes"):
        score(first[:, 1:], second)
