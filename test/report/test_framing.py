"""What is shown of a scan: the right part, the right way round, where it lies in the patient."""

import numpy as np
import pytest
import SimpleITK as sitk

from ichseg.errors import InputError
from ichseg.report.framing import frame
from ichseg.scan.volume import Volume, read, write

TURNED = np.array([[0.0, 0.96, 0.28], [0.0, -0.28, 0.96], [1.0, 0.0, 0.0]])  # columns: array axes


def oblique(shape=(7, 60, 50)):
    """A scan whose axes are none of the patient's, with a number of its own in each voxel."""
    voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return Volume(voxels, (2.0, 0.5, 0.7), (10.0, -20.0, 30.0), tuple(TURNED.ravel()))


def test_every_voxel_keeps_its_place(tmp_path):
    """Against ITK: the position of a voxel in the file is the one that the frame's affine gives."""
    image = oblique()
    write(image, tmp_path / "scan.mha")
    stored = sitk.ReadImage(str(tmp_path / "scan.mha"))
    framed = frame(read(tmp_path / "scan.mha"), {}, is_ct=False)
    for z, y, x in [(0, 0, 0), (3, 2, 1), (framed.image.shape[0] - 1, 4, 5)]:
        value = float(framed.image[z, y, x])
        index = np.unravel_index(int(value), image.voxels.shape)[::-1]
        lps = stored.TransformIndexToPhysicalPoint([int(i) for i in index])
        ras = framed.affine @ [x, y, z, 1]
        np.testing.assert_allclose(ras[:3], [-lps[0], -lps[1], lps[2]], atol=1e-4)
    # to the patient's left, back and head, as near as quarter turns bring it
    directions = framed.affine[:3, :3] / np.linalg.norm(framed.affine[:3, :3], axis=0)
    assert (np.diag(directions) * [-1, -1, 1] > 0.9).all()


def head(shape=(10, 200, 200)):
    voxels = np.full(shape, -1000, np.int16)
    voxels[3:7, 60:160, 80:160] = 30
    return Volume(voxels, (5.0, 1.0, 1.0))


def test_crop_moves_the_affine_and_the_first_slice():
    framed = frame(head(), {})
    assert framed.first_slice == 1
    assert framed.slices == 10
    assert framed.image.shape == (8, 120, 99)  # 10 mm around, found on every third voxel
    np.testing.assert_allclose(framed.affine @ [0, 0, 0, 1], [-71, -50, 5, 1])


def test_what_is_no_ct_is_shown_whole():
    assert frame(head(), {}, is_ct=False).image.shape == (10, 200, 200)


def test_masks_are_cut_alike_and_stay_inside():
    image = head()
    mask = np.zeros(image.voxels.shape, np.uint8)
    mask[0, 190, 190] = 3  # far from the head
    framed = frame(image, {"reference": image.with_voxels(mask)})
    assert framed.first_slice == 0
    assert framed.masks["reference"].sum() == 3
    assert framed.masks["reference"].shape == framed.image.shape


def test_two_scans_that_are_shown_side_by_side_are_cut_alike():
    image = head()
    lower = image.with_voxels(np.roll(image.voxels, 20, axis=1))
    mask, empty = (image.with_voxels(np.zeros(image.voxels.shape, np.uint8)) for _ in range(2))
    mask.voxels[0, 190, 190] = 1
    alone = frame(image, {"prediction": empty})
    framed = [
        frame(image, {"prediction": empty}, beside=(lower, mask)),
        frame(lower, {"prediction": mask}, beside=(image, empty)),
    ]
    assert framed[0].image.shape == framed[1].image.shape
    np.testing.assert_array_equal(framed[0].affine, framed[1].affine)
    assert framed[0].image.shape[1] >= alone.image.shape[1] + 20
    assert framed[0].first_slice == framed[1].first_slice == 0
    assert framed[1].masks["prediction"].sum() == 1


def test_other_shape_is_refused():
    image = head()
    with pytest.raises(InputError, match="shape"):
        frame(image, {"prediction": Volume(image.voxels[1:], image.spacing_mm)})
