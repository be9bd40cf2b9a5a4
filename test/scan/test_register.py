"""Rigid registration: a head that was moved is found again, and what grew stays grown."""

import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from ichseg.errors import InputError
from ichseg.scan.register import Alignment, mirrored, onto, register
from ichseg.scan.volume import Volume, read, to_itk

BLOOD_HU = 75
SAMPLE = Path(__file__).parents[1] / "sample" / "input" / "ge_negative.mha"
# From the middle of the scan, (x, y, z) in mm: of the brain, and near its borders.
OFFSETS_MM = ((0.0, 0.0, 0.0), (60.0, 0.0, 0.0), (0.0, -60.0, 30.0), (-40.0, 50.0, -30.0))


def head(bleed_mm: float = 0.0) -> Volume:
    """Every second voxel of a real head's slices, and a ball of blood of this radius in it."""
    scan = read(SAMPLE)
    z_mm, y_mm, x_mm = scan.spacing_mm
    voxels = scan.voxels[:, ::2, ::2].copy()
    z, y, x = np.meshgrid(*(np.arange(n) - n // 2 for n in voxels.shape), indexing="ij")
    away_mm = np.sqrt((z_mm * z) ** 2 + (2 * y_mm * y) ** 2 + (2 * x_mm * x - 30) ** 2)
    voxels[away_mm < bleed_mm] = BLOOD_HU
    return Volume(voxels, (z_mm, 2 * y_mm, 2 * x_mm), scan.origin_mm, scan.direction)


def middle(volume: Volume) -> np.ndarray:
    """``(x, y, z)`` in mm."""
    image = to_itk(volume)
    size = image.GetSize()
    return np.array(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in size]))


def moved(volume: Volume, degrees: tuple[float, float, float], mm: tuple[float, float, float]):
    """The head turned and shifted in the scanner, and the transform that says how."""
    image = to_itk(volume)
    way = sitk.Euler3DTransform()
    way.SetCenter(middle(volume).tolist())
    way.SetRotation(*np.radians(degrees))
    way.SetTranslation(mm)
    found = sitk.Resample(image, image, way.GetInverse(), sitk.sitkLinear, -1000.0)
    return volume.with_voxels(sitk.GetArrayFromImage(found)), way


@pytest.mark.parametrize(
    ("degrees", "mm"),
    [
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
        ((14.0, 3.0, -6.0), (8.0, -12.0, 5.0)),
        ((0.0, 0.0, 40.0), (2.0, 3.0, -7.0)),  # turned to a side
        ((0.0, 25.0, 0.0), (2.0, 3.0, -7.0)),  # bent to a side
        ((10.0, -20.0, 35.0), (2.0, 3.0, -7.0)),
    ],
)
def test_a_moved_head_is_found_again_to_a_millimetre(degrees, mm):
    first = head()
    second, way = moved(first, degrees, mm)
    alignment = register(first, second)
    for offset in OFFSETS_MM:
        point = (middle(first) + offset).tolist()
        wanted = way.TransformPoint(point)
        assert math.dist(alignment.transform.TransformPoint(point), wanted) < 1.0
        assert math.dist(alignment.to_first(wanted), point) < 1.0
    assert alignment.agreement > 0.9


@pytest.mark.parametrize("whole_first", [True, False])
@pytest.mark.parametrize("slices", [slice(12, None), slice(14, 22)])
def test_a_part_of_a_head_is_found_in_the_whole(slices, whole_first):
    """As of a scan that begins farther down, and of a few slices through a bleed."""
    first = head()
    second, way = moved(first, (14.0, 3.0, -6.0), (8.0, -12.0, 5.0))
    if whole_first:
        second = part(second, slices)
    else:
        first = part(first, slices)
    alignment = register(first, second)
    for x_mm, y_mm, z_mm in OFFSETS_MM:
        point = (middle(head()) + np.array((x_mm, y_mm, z_mm / 3))).tolist()
        found = alignment.transform.TransformPoint(point)
        assert math.dist(found, way.TransformPoint(point)) < 2.5
    assert alignment.agreement > 0.95


def part(volume: Volume, slices: slice) -> Volume:
    """Some slices of it, where they were."""
    z, y, x = to_itk(volume)[:, :, slices].GetOrigin()[::-1]
    return Volume(volume.voxels[slices], volume.spacing_mm, (z, y, x), volume.direction)


def test_a_window_that_ends_above_air_is_no_hindrance():
    """Air and fat are -20 HU then, and bone 100."""
    first = head()
    second, way = moved(first, (5.0, 3.0, -6.0), (8.0, -12.0, 5.0))
    windowed = (scan.with_voxels(np.clip(scan.voxels, -20, 100)) for scan in (first, second))
    alignment = register(*windowed)
    for offset in OFFSETS_MM:
        point = (middle(first) + offset).tolist()
        found = alignment.transform.TransformPoint(point)
        assert math.dist(found, way.TransformPoint(point)) < 1.0


def test_a_bleed_that_grew_stays_grown():
    first = head(bleed_mm=10)
    grown = head(bleed_mm=20)
    second, _ = moved(grown, (5.0, 0.0, 4.0), (6.0, 3.0, -4.0))
    alignment = register(first, second)
    back = onto(first, second, alignment)
    inside = (grown.voxels == BLOOD_HU) & (first.voxels != BLOOD_HU)
    assert abs(np.median(back.voxels[inside]) - BLOOD_HU) < 5


def test_labels_are_not_mixed():
    first = head()
    labels = first.with_voxels((first.voxels > 800).astype(np.uint8) * 2)
    _, way = moved(first, (7.0, 0.0, 0.0), (3.0, 0.0, 0.0))
    alignment = Alignment(way, 7.0, 3.0, 1.0)
    back = onto(first, labels, alignment, labels=True)
    assert set(np.unique(back.voxels)) == {0, 2}
    assert back.spacing_mm == first.spacing_mm
    assert back.origin_mm == first.origin_mm


def test_the_same_scans_give_the_same_numbers():
    first = head()
    second, _ = moved(first, (5.0, 2.0, 0.0), (1.0, 2.0, 3.0))
    once, again = (register(first, second).transform.GetParameters() for _ in range(2))
    assert once == again


def test_another_grid_is_no_hindrance():
    first = head()
    second, way = moved(first, (0.0, 0.0, 8.0), (4.0, 0.0, 0.0))
    z_mm, y_mm, x_mm = second.spacing_mm
    wide = Volume(second.voxels[:, ::3], (z_mm, 3 * y_mm, x_mm), second.origin_mm, second.direction)
    found = register(first, wide).transform
    for offset in OFFSETS_MM:
        point = (middle(first) + offset).tolist()
        assert math.dist(found.TransformPoint(point), way.TransformPoint(point)) < 1.5


def test_a_head_agrees_less_with_its_mirror_image():
    first = head()
    second, _ = moved(first, (8.0, 3.0, 20.0), (4.0, 0.0, 0.0))
    image = mirrored(second)
    assert register(first, image).agreement < register(first, second).agreement - 0.03
    size = (np.array(to_itk(second).GetSize()) - 1).tolist()
    x, y, z = to_itk(second).TransformIndexToPhysicalPoint(size)
    np.testing.assert_allclose(to_itk(image).TransformIndexToPhysicalPoint(size), (-x, y, z))


def test_nothing_in_common_is_refused():
    empty = Volume(np.full((10, 20, 20), -1000, np.int16), (5.0, 5.0, 5.0))
    with pytest.raises(InputError, match=r"brought onto each other|in common"):
        register(head(), empty)
