"""Growth of bleeds between two scans, worked by hand on a few voxels of 1 mL."""

import numpy as np
import pytest
import SimpleITK as sitk

from ichseg.app.follow_up.growth import Change, compare_lesions
from ichseg.scan.register import Alignment
from ichseg.scan.volume import Volume

SHAPE, SPACING_MM = (4, 10, 12), (10.0, 10.0, 10.0)  # voxels of 1 mL


def masks(before, after):
    """Two masks from the voxels ``(z, y, x)`` that are set in them."""
    found = []
    for places in (before, after):
        voxels = np.zeros(SHAPE, np.uint8)
        for place in places:
            voxels[place] = 1
        found.append(Volume(voxels, SPACING_MM))
    return found


def compared(before, after, transform=None):
    first, second = masks(before, after)
    scan = first.with_voxels(np.full(SHAPE, 40, np.int16))
    alignment = Alignment(transform or sitk.Euler3DTransform(), 0.0, 0.0, 1.0)
    return compare_lesions(first, second, (scan, scan), alignment)


def told(changes):
    return [(c.before, c.after, round(c.change.growth_ml, 6), c.state) for c in changes]


def test_growth_in_ml_and_per_cent():
    change = Change(10.0, 14.0)
    assert change.growth_ml == 4.0
    assert change.growth_percent == pytest.approx(40.0)
    assert Change(0.0, 3.0).growth_percent is None
    assert Change(8.0, 6.0).growth_percent == pytest.approx(-25.0)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (10.0, 14.0, ("40 % are more than 33 %",)),
        (30.0, 36.5, ("6.5 mL are more than 6 mL",)),
        (10.0, 17.0, ("7.0 mL are more than 6 mL", "70 % are more than 33 %")),
        (20.0, 26.0, ()),  # 6 mL and 30 %: neither is more than its limit
        (100.0, 106.0, ()),
        (0.0, 50.0, ()),  # new, which the definition is not about
        (50.0, 10.0, ()),
    ],
)
def test_expansion_is_more_than_either_limit(before, after, said):
    assert Change(before, after).expansion == said


def test_lesions_are_paired_where_they_lie_on_each_other():
    changes = compared(
        [(1, 1, 1), (1, 1, 2), (1, 8, 8)],
        [(1, 1, 2), (1, 1, 3), (1, 1, 4), (1, 5, 5)],
    )
    assert told(changes) == [
        ((1,), (1,), 1.0, "larger"),
        ((2,), (), -1.0, "gone"),
        ((), (2,), 1.0, "new"),
    ]
    np.testing.assert_allclose(changes[0].centroid_mm, (15.0, 10.0, 10.0))
    np.testing.assert_allclose(changes[2].centroid_mm, (50.0, 50.0, 10.0))


def test_pieces_that_grow_together_are_one_change():
    (change,) = compared([(1, 1, 1), (1, 1, 3)], [(1, 1, 1), (1, 1, 2), (1, 1, 3)])
    assert change.before == (1, 2)
    assert change.after == (1,)
    assert change.change == Change(2.0, 3.0)


def test_pieces_of_a_split_are_one_change():
    (change,) = compared([(1, 1, 1), (1, 1, 2), (1, 1, 3)], [(1, 1, 1), (1, 1, 3)])
    assert (change.before, change.after, change.state) == ((1,), (1, 2), "smaller")


def test_a_neighbour_beyond_the_tolerance_is_another_lesion():
    assert len(compared([(1, 1, 1)], [(1, 1, 2)])) == 2  # 10 mm apart


def test_the_second_scan_is_brought_onto_the_first():
    """A patient who lies 30 mm further to the left in the second scan."""
    shifted = sitk.Euler3DTransform()
    shifted.SetTranslation((30.0, 0.0, 0.0))
    same = compared([(1, 1, 1), (1, 1, 2)], [(1, 1, 4), (1, 1, 5)], shifted)
    assert told(same) == [((1,), (1,), 0.0, "same")]
    _, new = compared([(1, 1, 1), (1, 1, 2)], [(1, 1, 4), (1, 1, 5), (1, 7, 7)], shifted)
    np.testing.assert_allclose(new.centroid_mm, (40.0, 70.0, 10.0))


def test_a_thin_lesion_between_the_slices_of_a_thick_scan_is_the_same():
    """One of 5 mm slices and one of 1 mm slices over the same 25 mm; the lesion is 1 mm high."""
    first = Volume(np.zeros((5, 4, 4), np.uint8), (5.0, 5.0, 5.0), (2.0, 0.0, 0.0))
    second = Volume(np.zeros((25, 4, 4), np.uint8), (1.0, 5.0, 5.0))
    first.voxels[3, 1:3, 1:3] = 1  # from 14.5 to 19.5 mm, by the middle of its slice 17 mm
    second.voxels[15, 1:3, 1:3] = 1
    scans = tuple(
        mask.with_voxels(np.full(mask.voxels.shape, 40, np.int16)) for mask in (first, second)
    )
    alignment = Alignment(sitk.Euler3DTransform(), 0.0, 0.0, 1.0)
    for one, two in ((0, 1), (1, 0)):
        pair = (first, second)[one], (first, second)[two]
        (change,) = compare_lesions(*pair, (scans[one], scans[two]), alignment)
        assert (change.before, change.after) == ((1,), (1,))


def test_a_lesion_beyond_the_end_of_the_other_scan_is_not_called_gone():
    mask = masks([], [(0, 2, 2), (3, 5, 5)])[1]
    half = Volume(np.zeros((2, *SHAPE[1:]), np.uint8), SPACING_MM)  # slices 0 and 1
    half.voxels[0, 2, 2] = 1
    alignment = Alignment(sitk.Euler3DTransform(), 0.0, 0.0, 1.0)
    scans = [each.with_voxels(np.full(each.voxels.shape, 40, np.int16)) for each in (mask, half)]
    seen = compare_lesions(mask, half, tuple(scans), alignment)
    assert sorted(change.state for change in seen) == ["not covered", "same"]
    turned_round = compare_lesions(half, mask, tuple(scans[::-1]), alignment)
    assert sorted(change.state for change in turned_round) == ["not covered", "same"]


@pytest.mark.parametrize(("before", "after"), [([], []), ([(0, 0, 0)], []), ([], [(3, 9, 11)])])
def test_empty_masks(before, after):
    assert len(compared(before, after)) == len(before) + len(after)
