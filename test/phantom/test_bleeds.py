"""Bleeds in an anatomy drawn by hand, and in a hand-made scan."""

import numpy as np
import pytest
from scipy import ndimage

from phantom import bleeds
from phantom.anatomy import estimate_anatomy

SPACING_MM = (5.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def scan():
    """A ball of brain, 30 HU, with a ventricle, sulci and a shell of bone, in air, with noise."""
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(
        np.arange(30) * 5.0 - 72, np.arange(180.0) - 90, np.arange(160.0) - 80, indexing="ij"
    )
    far = np.sqrt((z / 66) ** 2 + (y / 80) ** 2 + (x / 66) ** 2)
    hu = np.full(far.shape, -1000.0)
    hu[far < 1.12] = 40
    hu[far < 1.08] = 1000
    hu[far < 1.0] = 30
    hu[(far < 1.0) & (far > 0.85) & (np.sin(y / 5) * np.cos(z / 9) > 0.6)] = 5
    hu[(np.abs(x) > 4) & (np.hypot((np.abs(x) - 14) / 9, y / 32) < 1) & (np.abs(z) < 16)] = 5
    hu += rng.normal(0, 3, hu.shape)
    return np.round(hu).astype(np.int16)


def test_anatomy_is_found(scan):
    anatomy = estimate_anatomy(scan.astype(np.float32), SPACING_MM)
    voxel_ml = np.prod(anatomy.spacing_mm) / 1000
    ball_ml = 4 / 3 * np.pi * 66 * 80 * 66 / 1000
    assert anatomy.inside.sum() * voxel_ml == pytest.approx(ball_ml, rel=0.12)
    ventricles_ml = 2 * np.pi * 9 * 32 * 32 / 1000 * 0.95
    assert (anatomy.ventricles > 0.5).sum() * voxel_ml == pytest.approx(ventricles_ml, rel=0.35)
    assert abs(float(anatomy.middle_mm[0, 0, anatomy.inside.shape[2] // 2])) < 3


@pytest.mark.parametrize("kind", bleeds.KINDS)
def test_inserted_bleed_has_its_volume_and_only_changes_its_place(scan, kind):
    after, mask = bleeds.insert_bleed(
        scan, SPACING_MM, kind=kind, volume_ml=8.0, rng=np.random.default_rng(2)
    )
    bleed = mask > 0
    assert bleed.sum() * np.prod(SPACING_MM) / 1000 == pytest.approx(8.0, rel=0.2)
    assert 45 <= after[bleed].mean() <= 95
    assert (after[bleed].astype(int) - scan[bleed]).mean() > 10
    assert (
        2.0
        < (after[bleed] - ndimage.uniform_filter(after.astype(float), (0, 3, 3))[bleed]).std()
        < 8
    )
    bone = scan > 500
    np.testing.assert_array_equal(after[scan < -500], scan[scan < -500])
    assert np.abs(after[bone].astype(int) - scan[bone]).mean() < 5


@pytest.mark.parametrize("kind", ["subdural", "epidural"])
def test_bleeds_at_the_skull_touch_it(scan, kind):
    _, mask = bleeds.insert_bleed(
        scan, SPACING_MM, kind=kind, volume_ml=20.0, rng=np.random.default_rng(7)
    )
    grown = ndimage.binary_dilation(mask > 0, np.ones((1, 3, 3)), iterations=4)
    falx = np.abs(np.argwhere(mask)[:, 2].mean() - 80) < 15
    assert falx or (grown & (scan > 500)).any()


def test_ventricular_blood_stays_in_the_ventricles(scan):
    _, mask = bleeds.insert_bleed(
        scan, SPACING_MM, kind="intraventricular", volume_ml=6.0, rng=np.random.default_rng(1)
    )
    assert (scan[mask > 0] < 18).mean() > 0.9  # it lies where fluid was


def test_same_generator_same_bleed(scan):
    runs = [
        bleeds.insert_bleed(
            scan, SPACING_MM, kind="epidural", volume_ml=4.0, rng=np.random.default_rng(9)
        )
        for _ in range(2)
    ]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_unknown_kind_and_volume_are_refused(scan):
    with pytest.raises(ValueError, match="'stroke', expected one of"):
        bleeds.insert_bleed(
            scan, SPACING_MM, kind="stroke", volume_ml=4.0, rng=np.random.default_rng(9)
        )
    with pytest.raises(ValueError, match="at most 155"):
        bleeds.insert_bleed(
            scan, SPACING_MM, kind="subdural", volume_ml=400.0, rng=np.random.default_rng(9)
        )


def test_a_scan_without_brain_is_refused():
    air = np.full((10, 64, 64), -1000, np.int16)
    with pytest.raises(ValueError, match="no brain found"):
        bleeds.insert_bleed(
            air, SPACING_MM, kind="subdural", volume_ml=4.0, rng=np.random.default_rng(9)
        )
