"""Brain, ventricles and midline of a head made by hand."""

import numpy as np
import pytest
from helpers.hand_made_head import SPACING_MM, hand_made_head

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
