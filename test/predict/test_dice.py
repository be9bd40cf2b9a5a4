"""The one Dice, and what it is of empty masks."""

import math

import numpy as np
import pytest

from ichseg.predict.dice import dice_of_counts, dice_of_masks

EMPTY, DIAGONAL, FULL = np.zeros((2, 2), bool), np.eye(2, dtype=bool), np.ones((2, 2), bool)


def test_twice_what_is_shared_over_both():
    assert dice_of_masks(DIAGONAL, FULL) == pytest.approx(2 * 2 / 6)
    assert dice_of_counts(12, 32) == 24 / 32
    assert dice_of_masks(EMPTY, DIAGONAL) == dice_of_masks(DIAGONAL, EMPTY) == 0


def test_two_empty_masks_give_what_is_asked_for():
    assert math.isnan(dice_of_masks(EMPTY, EMPTY))
    assert dice_of_masks(EMPTY, EMPTY, empty=1.0) == 1


def test_smoothing_lets_two_empty_masks_agree_and_changes_a_miss_little():
    assert dice_of_masks(EMPTY, EMPTY, smoothing=1e-5) == 1
    assert dice_of_masks(EMPTY, FULL, smoothing=1e-5) == pytest.approx(1e-5 / (4 + 1e-5))


def test_masks_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="masks of shapes"):
        dice_of_masks(EMPTY, np.zeros(2, bool))
