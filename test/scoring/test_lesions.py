"""Lesions one by one: which are found, which are false, of what size."""

import numpy as np
import pytest

from training.scoring.lesions import Lesion, count_lesions, find_lesions, size_class

VOXEL_ML = 0.5


def drawn(*rows):
    """One slice: ``#`` is inside."""
    return np.array([[[cell == "#" for cell in row] for row in rows]])


def test_lesions_of_a_drawing():
    mask = drawn("##..#", "##...", "..#..", ".....", "####.")
    other = drawn("#....", ".....", ".....", ".....", "..###")
    # the square and the voxel at its corner are one lesion
    assert find_lesions(mask, other, VOXEL_ML) == (
        Lesion(2.5, 0.5),
        Lesion(2.0, 1.0),
        Lesion(0.5, 0.0),
    )
    assert find_lesions(other, mask, VOXEL_ML) == (Lesion(1.5, 1.0), Lesion(0.5, 0.5))


def test_slices_touch_by_a_corner_too():
    mask = np.zeros((2, 2, 2), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert find_lesions(mask, mask, 1.0) == (Lesion(2.0, 2.0),)


def test_no_lesions():
    empty = np.zeros((2, 3, 4), bool)
    assert find_lesions(empty, ~empty, 1.0) == ()
    assert find_lesions(np.zeros((0, 0, 0), bool), np.zeros((0, 0, 0), bool), 1.0) == ()


@pytest.mark.parametrize(
    ("volume_ml", "expected"),
    [
        (0.999, "< 1 mL"),
        (1.0, "1..10 mL"),
        (9.99, "1..10 mL"),
        (10.0, "10..30 mL"),
        (30.0, "10..30 mL"),
        (30.01, "> 30 mL"),
    ],
)
def test_size_classes(volume_ml, expected):
    assert size_class(volume_ml) == expected


def test_counts_of_two_cases():
    found, missed, false = 1.0, 0.0, 0.0  # mL shared
    cases = [
        ([Lesion(40, found), Lesion(0.5, missed)], [Lesion(35, found), Lesion(2, false)]),
        ([Lesion(0.5, found), Lesion(0.2, missed)], [Lesion(0.9, found), Lesion(0.1, false)]),
    ]
    counts = {c.size: c for c in count_lesions(cases)}
    table = {size: (c.reference, c.found, c.false_positives) for size, c in counts.items()}
    assert table == {
        "< 1 mL": (3, 1, 1),
        "1..10 mL": (0, 0, 1),
        "10..30 mL": (0, 0, 0),
        "> 30 mL": (1, 1, 0),
        "all": (4, 2, 2),
    }
    assert counts["< 1 mL"].sensitivity == pytest.approx(1 / 3)
    assert counts["< 1 mL"].f1 == pytest.approx(2 / (2 + 2 + 1))
    assert (counts["1..10 mL"].sensitivity, counts["1..10 mL"].f1) == (None, 0.0)
    assert (counts["10..30 mL"].sensitivity, counts["10..30 mL"].f1) == (None, None)
    assert counts["all"].f1 == pytest.approx(4 / (4 + 2 + 2))


def test_one_blob_over_two_lesions_finds_both():
    reference = drawn("##..##")
    blob = drawn(".####.")
    (counts,) = count_lesions(
        [(find_lesions(reference, blob, 1.0), find_lesions(blob, reference, 1.0))]
    )[-1:]
    assert (counts.reference, counts.found, counts.false_positives, counts.f1) == (2, 2, 0, 1.0)
