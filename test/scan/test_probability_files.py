"""Probabilities as files, read by nibabel, ITK and numpy: the values, and where they lie."""

import dataclasses
import pickle

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from ichseg.errors import OutputError
from ichseg.scan import probability_files, volume
from ichseg.scan.probability_files import write_nifti, write_nnunet
from ichseg.scan.volume import Volume


@pytest.fixture
def grid():
    """Oblique, of odd sizes."""
    direction = (0.6, 0.8, 0.0, 0.8, -0.6, 0.0, 0.0, 0.0, -1.0)
    return Volume(np.zeros((2, 3, 4), np.int16), (5.0, 0.5, 0.75), (-10.5, 3.25, 40.0), direction)


def numbers(labels, dtype):
    rng = np.random.default_rng(1)
    if dtype == np.uint8:
        return rng.integers(0, 256, (labels, 2, 3, 4)).astype(np.uint8)
    return rng.random((labels, 2, 3, 4)).astype(np.float16)


@pytest.mark.parametrize("from_nifti", [False, True])
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
def test_nifti_holds_0_to_1_where_the_scan_lies(tmp_path, grid, dtype, labels, from_nifti):
    if from_nifti:
        volume.write(grid, tmp_path / "scan.nii.gz")
        grid = volume.read(tmp_path / "scan.nii.gz")
        assert grid.nifti_header is not None
    steps = numbers(labels, dtype)
    write_nifti(steps, grid, tmp_path / "p.nii.gz")
    expected = steps / 255 if dtype == np.uint8 else steps.astype(float)
    image = nibabel.load(tmp_path / "p.nii.gz")
    found = image.get_fdata().reshape(4, 3, 2, labels)  # x, y, z, label
    np.testing.assert_allclose(found, expected.transpose(3, 2, 1, 0), atol=1e-7)
    by_itk = sitk.ReadImage(str(tmp_path / "p.nii.gz"))
    np.testing.assert_allclose(by_itk.GetSpacing()[:3], grid.spacing_mm[::-1], rtol=1e-6)
    np.testing.assert_allclose(by_itk.GetOrigin()[:3], grid.origin_mm[::-1], atol=1e-4)
    ours = volume.read_channels(tmp_path / "p.nii.gz")
    for channel, label in zip(ours, expected, strict=True):
        np.testing.assert_allclose(channel.voxels, label, atol=1e-6)
        np.testing.assert_allclose(channel.direction, grid.direction, atol=1e-6)
    assert image.header.get_data_dtype() == (np.uint8 if dtype == np.uint8 else np.float32)


def test_a_header_of_the_other_byte_order_is_kept(tmp_path, grid):
    image = nibabel.Nifti1Image(np.zeros((4, 3, 2), np.int16), np.diag([0.5, 0.75, 5, 1]))
    swapped = nibabel.Nifti1Image(image.dataobj, image.affine, image.header.as_byteswapped(">"))
    nibabel.save(swapped, tmp_path / "scan.nii")
    scan = volume.read(tmp_path / "scan.nii")
    assert scan.nifti_header[:4] == b"\0\0\1\x5c"
    steps = numbers(1, np.float16)
    write_nifti(steps, scan, tmp_path / "p.nii.gz")
    np.testing.assert_array_equal(volume.read(tmp_path / "p.nii.gz").voxels, steps[0])


def test_the_same_probabilities_give_the_same_bytes(tmp_path, grid):
    for name in ("a", "b"):
        write_nifti(numbers(1, np.uint8), grid, tmp_path / f"{name}.nii.gz")
        write_nnunet(numbers(1, np.float16), grid, tmp_path / f"{name}.npz", regions=False)
    for suffix in (".nii.gz", ".npz", ".pkl"):
        first, second = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("a", "b"))
        assert first == second


def test_a_wrong_place_is_not_written(tmp_path, grid, monkeypatch):
    moved = dataclasses.replace(grid, origin_mm=(0.0, 0.0, 0.0))
    header = probability_files._header_by_itk(moved, tmp_path)
    monkeypatch.setattr(probability_files, "_header_by_itk", lambda *_: header)
    with pytest.raises(OutputError, match="written geometry differs"):
        write_nifti(numbers(1, np.uint8), grid, tmp_path / "p.nii.gz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("regions", [False, True])
def test_what_nnunet_ensembles(tmp_path, grid, regions):
    """As its ``ensemble.py`` reads it: the mean over files, then the likeliest label."""
    steps = numbers(2, np.float16) / np.float16(2)
    write_nnunet(steps, grid, tmp_path / "case.npz", regions=regions)
    found = np.load(tmp_path / "case.npz")["probabilities"]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found[0 if regions else 1 :], steps)
    if not regions:
        np.testing.assert_allclose(found.astype(float).sum(0), 1, atol=1e-3)
    properties = pickle.loads((tmp_path / "case.pkl").read_bytes())
    image = sitk.GetImageFromArray(found[-1].astype(np.float32))
    image.SetSpacing(properties["sitk_stuff"]["spacing"])
    image.SetOrigin(properties["sitk_stuff"]["origin"])
    image.SetDirection(properties["sitk_stuff"]["direction"])
    sitk.WriteImage(image, str(tmp_path / "seg.mha"))
    again = volume.read(tmp_path / "seg.mha")
    assert (again.spacing_mm, again.origin_mm) == (grid.spacing_mm, grid.origin_mm)
    np.testing.assert_allclose(again.direction, grid.direction, atol=1e-12)
    assert properties["spacing"] == list(grid.spacing_mm)
