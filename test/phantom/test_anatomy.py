"""Brain, ventricles and midline of a head made by hand."""

import numpy as np
import pytest
from helpers.hand_made_head import SPACING_MM, blurred_head, hand_made_head
from scipy import ndimage

from phantom.anatomy import estimate_anatomy


def test_anatomy_is_found():
    scan = hand_made_head()
    anatomy = estimate_anatomy(scan.astype(np.float32), SPACING_MM)
    voxel_ml = np.prod(anatomy.spacing_mm) / 1000
    ball_ml = 4 / 3 * np.pi * 66 * 80 * 66 / 1000
    assert anatomy.inside.sum() * voxel_ml == pytest.approx(ball_ml, rel=0.12)
    ventricles_ml = 2 * np.pi * 9 * 32 * 32 / 1000 * 0.95
    assert (anatomy.ventricles > 0.5).sum() * voxel_ml == pytest.approx(ventricles_ml, rel=0.35)
    assert abs(float(anatomy.middle_mm[0, 0, anatomy.inside.shape[2] // 2])) < 3


def test_the_inside_ends_at_the_inner_table():
    scan = blurred_head()
    inside = estimate_anatomy(scan.astype(np.float32), SPACING_MM).fine_inside
    soft = ndimage.distance_transform_edt(scan[15] < 90)
    rim = inside[15] & ~ndimage.binary_erosion(inside[15])
    assert soft[rim].mean() < 1.5  # 1 where a voxel touches one with bone
    assert not inside[scan > 90].any()


@pytest.mark.parametrize(("width", "end"), [(2, 146), (6, 150)])
def test_the_inside_does_not_leak_through_a_gap_of_the_skull(width, end):
    scan = blurred_head()
    scan[12:18, 90 - width // 2 : 90 + width // 2, 144:156] = 35  # through bone and scalp
    scan[12:18, 70:110, 153:160] = 35  # soft tissue beyond
    inside = estimate_anatomy(scan.astype(np.float32), SPACING_MM).fine_inside
    assert inside[15].sum() > 15_000
    assert not inside[:, :, end:].any()
