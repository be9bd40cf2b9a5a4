"""Files that hold several channels: 4D volumes, split on reading."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from ichseg.errors import InputError
from ichseg.scan.volume import Volume, read, read_channels, stored_shape, write


def test_channels_of_a_4d_file_lie_where_a_3d_file_lies(tmp_path: Path) -> None:
    """Written by nibabel: channels last, scaled, oblique."""
    stored = np.random.default_rng(0).integers(0, 100, (5, 4, 3, 2)).astype(np.int16)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("zx", (20, -35), degrees=True).as_matrix() * (0.5, 0.7, 5)
    affine[:3, 3] = (-12, 30, 7)
    image = nib.Nifti1Image(stored, affine)
    image.header.set_slope_inter(0.5, -3)
    image.header.set_zooms((0.5, 0.7, 5, 2))
    nib.save(image, tmp_path / "both.nii.gz")
    nib.save(nib.Nifti1Image(stored[..., 0], affine), tmp_path / "first.nii.gz")
    assert stored_shape(tmp_path / "both.nii.gz") == (2, 3, 4, 5)
    assert stored_shape(tmp_path / "first.nii.gz") == (3, 4, 5)
    channels = read_channels(tmp_path / "both.nii.gz")
    expected = read(tmp_path / "first.nii.gz")
    for index, channel in enumerate(channels):
        scaled = np.float32(stored[..., index]).T * np.float32(0.5) - np.float32(3)
        np.testing.assert_array_equal(channel.voxels, scaled)
        np.testing.assert_allclose(channel.spacing_mm, expected.spacing_mm, rtol=1e-6)
        np.testing.assert_allclose(channel.origin_mm, expected.origin_mm, rtol=1e-6)
        np.testing.assert_allclose(channel.direction, expected.direction, atol=1e-6)
        assert channel.nifti_header is None  # it says four axes


def test_channels_of_a_3d_file_may_be_nan(tmp_path: Path) -> None:
    voxels = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    voxels[0, 1, 2] = np.nan
    scan = Volume(voxels, (5.0, 0.5, 0.5))
    write(scan, tmp_path / "case.nii.gz")
    (channel,) = read_channels(tmp_path / "case.nii.gz")
    np.testing.assert_array_equal(channel.voxels, scan.voxels)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone.nii", "no such file"),
        ("case.txt", "unknown file type"),
        ("5d.nii", "2 components per voxel, expected a scalar volume"),
    ],
)
def test_no_shape(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "case.txt").touch()
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 2, 2), np.uint8), np.eye(4)), tmp_path / "5d.nii")
    for function in (stored_shape, read_channels):
        with pytest.raises(InputError, match=reason):
            function(tmp_path / name)
