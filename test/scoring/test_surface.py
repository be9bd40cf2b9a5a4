"""Surface elements and distances: by hand, by symmetry, and against google-deepmind's package."""

import math

import numpy as np
import pytest
from helpers import references
from surface_distance import lookup_tables

from training.scoring.surface import (
    SurfaceDistances,
    element_areas,
    hausdorff_mm,
    neighbour_codes,
    surface_dice,
    surface_distances,
)

SPACING_MM = (5.0, 0.45, 0.4)


def masks(shape, *boxes):
    """One mask for each box."""
    found = [np.zeros(shape, bool) for _ in boxes]
    for mask, inside in zip(found, boxes, strict=True):
        mask[inside] = True
    return found


def elements(distances_mm, areas):
    """Distances of one surface; the other has none."""
    nothing = np.zeros(0)
    return SurfaceDistances(np.array(distances_mm), np.array(areas), nothing, nothing)


def test_code_of_a_corner():
    (mask,) = masks((2, 2, 2), (1, 0, 1))
    codes = neighbour_codes(mask)
    assert codes[1, 1, 1] == 1 << 0b101
    assert codes[2, 1, 2] == 1  # of the eight corners of the voxel, the last
    assert np.count_nonzero(codes) == 8


def test_one_voxel_is_an_octahedron():
    z, y, x = SPACING_MM
    face = math.hypot(y * x, z * x, z * y) / 8  # cuts the voxel half way along each edge
    (mask,) = masks((1, 1, 1), np.s_[:])
    found = surface_distances(mask, mask, SPACING_MM)
    np.testing.assert_allclose(found.reference_mm2, [face] * 8, rtol=1e-12)
    np.testing.assert_array_equal(found.reference_mm, [0] * 8)


def test_wide_slab_has_its_two_faces():
    z, y, x = SPACING_MM
    (mask,) = masks((2, 202, 202), np.s_[:, 1:-1, 1:-1])
    area = surface_distances(mask, mask, SPACING_MM).reference_mm2.sum()
    faces = 2 * 200 * 200 * y * x
    sides = 2 * 2 * 200 * z * (y + x)
    assert area == pytest.approx(faces + sides, rel=0.02)  # less what the edges are bevelled
    assert area < faces + sides


@pytest.mark.parametrize("spacing_mm", [SPACING_MM, (1.0, 1.0, 1.0), (0.3, 2.0, 7.0)])
def test_area_of_every_arrangement_of_eight_voxels(spacing_mm):
    table = lookup_tables.create_table_neighbour_code_to_surface_area(spacing_mm)
    bits = lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL.ravel()
    theirs = [table[sum(int(bits[b]) for b in range(8) if code >> b & 1)] for code in range(256)]
    np.testing.assert_allclose(element_areas(spacing_mm), theirs, rtol=1e-12)


def test_two_voxels_apart():
    first, second = masks((1, 1, 4), np.s_[:, :, 0], np.s_[:, :, 3])
    found = surface_distances(first, second, (5.0, 1.0, 2.0))
    # corners at x = 0, 1 and at 3, 4 voxels of 2 mm; across, the surfaces are alike
    assert sorted(found.prediction_mm) == [4.0] * 4 + [6.0] * 4
    assert sorted(found.reference_mm) == [4.0] * 4 + [6.0] * 4
    assert hausdorff_mm(found, 100) == 6.0
    assert surface_dice(found, 3.9) == 0.0
    assert surface_dice(found, 4.0) == pytest.approx(0.5)
    assert surface_dice(found, 6.0) == 1.0


def test_one_step_is_within_a_tolerance_of_its_size():
    """Differences of positions, such as 3 * 0.42 - 2 * 0.42, are a little more than 0.42."""
    first, second = masks((40, 3, 3), np.s_[7:9], np.s_[8:10])
    found = surface_distances(first, second, (0.42, 1.0, 1.0))
    assert found.prediction_mm.max() == 0.42
    assert surface_dice(found, 0.42) == 1.0


def test_hausdorff_by_area():
    found = elements([1.0, 2.0, 9.0], [2.0, 90.0, 8.0])
    other = elements([4.0], [1.0])
    both = SurfaceDistances(found.prediction_mm, found.prediction_mm2,
                            other.prediction_mm, other.prediction_mm2)  # fmt: skip
    assert hausdorff_mm(both, 100) == 9.0
    assert hausdorff_mm(both, 95) == 9.0  # 92 % of the area is not further than 2 mm
    assert hausdorff_mm(both, 91) == 4.0  # now the other surface's is the larger


def test_empty():
    full, empty = masks((3, 4, 5), np.s_[:], np.s_[:0])
    lone = surface_distances(full, empty, SPACING_MM)
    assert np.isinf(lone.prediction_mm).all()
    assert not len(lone.reference_mm)
    assert hausdorff_mm(lone, 95) == math.inf
    assert surface_dice(lone, 0.42) == 0.0
    neither = surface_distances(empty, empty, SPACING_MM)
    assert math.isnan(surface_dice(neither, 0.42))
    assert hausdorff_mm(neither, 100) == math.inf


def test_place_and_direction_do_not_matter():
    random = np.random.default_rng(3)
    first, second = references.random_pair(random, (6, 14, 11))
    found = surface_distances(first, second, SPACING_MM)
    padded = [np.pad(mask, ((3, 0), (1, 4), (2, 2))) for mask in (first, second)]
    turned = [mask.transpose(2, 0, 1)[::-1, :, ::-1] for mask in padded]
    again = surface_distances(*turned, (SPACING_MM[2], SPACING_MM[0], SPACING_MM[1]))
    np.testing.assert_allclose(np.sort(again.prediction_mm), np.sort(found.prediction_mm))
    assert surface_dice(again, 1.0) == pytest.approx(surface_dice(found, 1.0), rel=1e-12)
    assert hausdorff_mm(again, 95) == pytest.approx(hausdorff_mm(found, 95), rel=1e-12)


def test_shapes_that_differ():
    with pytest.raises(ValueError, match=r"masks of shapes \(1, 1, 2\) and \(1, 1, 3\)"):
        surface_distances(np.ones((1, 1, 2), bool), np.ones((1, 1, 3), bool), SPACING_MM)
