"""pydicom's and nibabel's own test files, a folder each: read as those libraries do, or refused.

Whatever is refused is refused in one line that names the file or its folder.
"""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from ichseg.app.cases import find_cases
from ichseg.errors import InputError
from ichseg.scan import plausibility
from ichseg.scan.dicom import decompress
from ichseg.scan.dicom.elements import read_elements
from ichseg.scan.dicom.pixels import hounsfield
from ichseg.scan.reader import read_scan

DICOM = Path(pydicom.__file__).parent / "data" / "test_files"
NIFTI = Path(nib.__file__).parent / "tests" / "data"
DICOM_FILES = sorted(path for path in DICOM.rglob("*") if path.is_file())
DICOM_FOLDERS = sorted({path.parent for path in DICOM_FILES} | {DICOM})
NIFTI_FILES = sorted(path for path in NIFTI.rglob("*") if path.is_file() and path.suffix != ".py")


def read_all(folder):
    """Every case that is found in the folder; errors where none is, or it cannot be read."""
    try:
        job = find_cases(folder, folder / "out", input_slug="head-ct", output_slug="bleed")
    except InputError as error:
        return [], [str(error)]
    scans, refusals = [], []
    for case in job.cases:
        try:
            scan = read_scan(case.image, study=case.study)
            plausibility.check(scan, case.image)
        except InputError as error:
            refusals.append(str(error))
        else:
            scans.append((case, scan))
    return scans, refusals


def check_refusals(refusals, folder):
    for words in refusals:
        assert "\n" not in words
        assert str(folder) in words
        assert len(words) < 600


@pytest.mark.parametrize("path", DICOM_FILES, ids=lambda path: str(path.relative_to(DICOM)))
def test_each_of_pydicoms_files(tmp_path, path):
    shutil.copy(path, tmp_path / path.name)
    scans, refusals = read_all(tmp_path)
    check_refusals(refusals, tmp_path)
    assert len(scans) + len(refusals) == 1
    assert not scans  # one slice is no volume


@pytest.mark.parametrize("folder", DICOM_FOLDERS, ids=lambda path: path.name)
def test_each_of_pydicoms_folders(folder):
    scans, refusals = read_all(folder)
    check_refusals(refusals, folder)
    assert refusals
    assert not scans  # none of them holds a head


def test_each_of_pydicoms_slices_has_the_pixels_that_pydicom_reads():
    """Where both read it; in HU, from air on, without padding."""
    compared = 0
    with decompress.decoder() as decode:
        for path in DICOM_FILES:
            try:
                ours = hounsfield(read_elements(path), decode)
                made = pydicom.dcmread(path)
                stored = made.pixel_array.astype(np.int64)
            except (InputError, RuntimeError, AttributeError, ValueError):
                continue
            hu = np.float32(stored) * np.float32(made.RescaleSlope)
            hu = np.maximum(np.rint(hu + np.float32(made.RescaleIntercept)), -1024)
            seen = stored != made.get("PixelPaddingValue", 1 << 40)
            np.testing.assert_array_equal(ours[seen], hu[seen])
            compared += 1
    assert compared >= 10, compared


@pytest.mark.parametrize("path", NIFTI_FILES, ids=lambda path: path.name)
def test_each_of_nibabels_files(tmp_path, path):
    shutil.copy(path, tmp_path / path.name)
    scans, refusals = read_all(tmp_path)
    check_refusals(refusals, tmp_path)
    assert len(scans) + len(refusals) == 1
    for case, scan in scans:
        theirs = nib.load(case.image)
        np.testing.assert_allclose(scan.voxels.T, theirs.get_fdata(), rtol=1e-6)
        sizes = nib.affines.voxel_sizes(theirs.affine)
        np.testing.assert_allclose(scan.spacing_mm[::-1], sizes, rtol=1e-5)


def test_nibabels_volumes_are_read_as_nibabel_reads_them():
    """Heads by MR, which the check of HU refuses: here without it."""
    read = 0
    for path in NIFTI_FILES:
        if path.name.endswith((".nii", ".nii.gz")):
            try:
                found = read_scan(path)
            except InputError:
                continue
            theirs = nib.load(path)
            np.testing.assert_allclose(found.voxels.T, theirs.get_fdata(), rtol=1e-6)
            sizes = nib.affines.voxel_sizes(theirs.affine)
            np.testing.assert_allclose(found.spacing_mm[::-1], sizes, rtol=1e-5)
            read += 1
    assert read >= 3
