"""Slices onto the straight grid and back: each voxel where it was in the patient."""

import numpy as np
import pytest
from helpers.dicom_files import UPRIGHT, write_stack

from ichseg.scan.dicom import straighten
from ichseg.scan.dicom.series import find_series, read_series
from ichseg.scan.dicom.straighten import Stack

TILT = np.radians(18.5)
TILTED = (1.0, 0.0, 0.0, 0.0, float(np.cos(TILT)), -float(np.sin(TILT)))


def plane(at):
    """HU that grow along x, y and z; a spline and a straight line go through them exactly."""
    return 3.0 * at[..., 0] + 2.0 * at[..., 1] + 5.0 * at[..., 2]


def positions(volume):
    """Of all voxels, ``(z, y, x, 3)``, as x, y, z in mm."""
    index = np.moveaxis(np.indices(volume.voxels.shape), 0, -1) * volume.spacing_mm
    direction = np.reshape(volume.direction, (3, 3))
    return (np.array(volume.origin_mm) + index @ direction.T)[..., ::-1]


@pytest.mark.parametrize(
    ("orientation", "heights"),
    [
        (UPRIGHT, [0, 5, 10, 15]),
        (UPRIGHT, [0, 4, 8, 12, 19, 26]),  # thicker above
        (TILTED, [0, 5, 10, 15, 20]),
        (TILTED, [0, 4, 8, 9.1, 16.5, 24]),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_every_voxel_has_the_value_of_its_place(tmp_path, orientation, heights, backwards):
    places = [(-5.0, 7.0, 3.0 + z) for z in (heights[::-1] if backwards else heights)]
    write_stack(tmp_path, places, plane, orientation=orientation, shape=(40, 20))
    found = read_series(find_series(tmp_path))
    wanted = plane(positions(found))
    inside = found.voxels != straighten.NOTHING_HU
    assert inside.mean() > 0.6
    if orientation == TILTED:  # at the rim are slices that others do not reach
        inside[:, :18] = inside[:, -18:] = False
    assert np.abs(found.voxels - wanted)[inside].max() <= 1.5  # stored and mixed as whole numbers
    height = found.spacing_mm[0] * (len(found.voxels) - 1)
    assert height == pytest.approx(abs(np.cross(orientation[:3], orientation[3:])[2]) * heights[-1])


def test_a_straight_stack_is_taken_as_it_is(tmp_path):
    rng = np.random.default_rng(1)
    write_stack(
        tmp_path, [(1, 2, z) for z in (0, 5, 10)], lambda at: rng.integers(-50, 99, at.shape[:2])
    )
    series = find_series(tmp_path)
    found = read_series(series)
    assert found.voxels.shape == (3, 24, 20)
    assert found.spacing_mm == (5.0, 0.5, 0.75)
    assert found.origin_mm == (0.0, 2.0, 1.0)
    assert found.direction == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    labels = (found.voxels > 20).astype(np.uint8)
    np.testing.assert_array_equal(straighten.onto_slices(series.stack, labels), labels)
    assert series.warnings == ()


def made(places, axes=None):
    return Stack((10, 10), (1.0, 1.0), np.eye(3) if axes is None else axes, np.array(places, float))


def test_volume_is_by_each_slices_share():
    """Steps of 4, 4, 7, 7 mm: the slices stand for 4, 4, 5.5, 7 and 7."""
    uneven = made([(z, 0, 0) for z in (0, 4, 8, 15, 22)])
    np.testing.assert_allclose(uneven.heights_mm, [4, 4, 5.5, 7, 7])
    labels = np.zeros((5, 10, 10), np.uint8)
    labels[2, :5, :4] = 1  # 20 pixels of 1 mm2, 5.5 mm high
    labels[4, 0, :3] = 2
    assert straighten.volume_ml(uneven, labels) == pytest.approx((20 * 5.5 + 3 * 7) / 1000)


def test_labels_come_back_to_their_slices():
    """Uneven and tilted: a slice gets the grid's nearest plane, moved back within itself."""
    tilted = made([(0, 0, 0), (4, -2, 0), (8, -4, 0), (15, -7, 0)])
    grid = straighten.grid_of(tilted)
    assert grid.shape == (5, 17, 10)  # 15 mm in steps of about 4; 7 rows more
    assert grid.spacing_mm == (3.75, 1.0, 1.0)
    assert grid.start_mm == (0.0, -7.0, 0.0)
    labels = np.zeros(grid.shape, np.uint8)
    labels[0, 7], labels[1, 5], labels[2, 3], labels[4, 0] = 1, 2, 3, 4  # each slice's first row
    labels[3] = 9  # at 11.25 mm, near no slice
    back = straighten.onto_slices(tilted, labels)
    assert [int(s[0, 0]) for s in back] == [1, 2, 3, 4]
    assert (back[:, 1:] == 0).all()
    with pytest.raises(ValueError, match="shape"):
        straighten.onto_slices(tilted, labels[1:])


def test_tilt_and_steps_in_numbers():
    tilted = made([(0, 0, 0), (4, -2, 0), (8, -4, 0)])
    assert tilted.tilt_degrees == pytest.approx(np.degrees(np.arctan(0.5)))
    assert tilted.is_even
    assert not tilted.is_upright
    assert not made([(0, 0, 0), (4, 0, 0), (8.5, 0, 0)]).is_even
    assert made([(0, 0, 0), (4.04, 0.05, 0), (8, 0, 0)]).is_even  # written with one decimal
    assert not made([(0, 0, 0), (0.5, 0, 0), (1.2, 0, 0)]).is_even


def test_oblique_slices_whose_positions_have_one_decimal_are_straight():
    """Each axis of the patient is off by up to 0.05 mm, and what lies across them by more."""
    turn = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))[0]
    for start in np.random.default_rng(5).uniform(-1, 1, (50, 3)):
        exact = start + np.arange(30)[:, None] * 5.0 * turn[:, 0]
        assert made(np.round(exact, 1) @ turn, turn).is_upright
