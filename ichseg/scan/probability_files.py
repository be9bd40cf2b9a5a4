"""Probabilities on a scan's grid as files: NIfTI, or the layout that nnU-Net ensembles.

Both are written in pieces, so that beside the probabilities no copy of a volume is made.
"""

from __future__ import annotations

import gzip
import pickle
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.errors import OutputError
from ichseg.files import replacing
from ichseg.scan import nifti
from ichseg.scan.volume import Volume, check_place, temporary_folder

Steps = npt.NDArray[np.uint8] | npt.NDArray[np.float16]
_COMPRESSION = 3  # takes half of 6's time


def write_nifti(steps: Steps, grid: Volume, path: Path) -> None:
    """Write probabilities as ``.nii.gz``, whole or not at all.

    One label gives a volume, several give one of four axes, the labels last. uint8 steps of 1/255
    are stored with the factor 1/255, so that every program shows 0 to 1; float16, which NIfTI does
    not know, is stored as float32. The written geometry is read back and compared.

    Args:
        steps: ``(labels, z, y, x)``, float16 from 0 to 1, or uint8 in steps of 1/255.
        grid: The mask or scan that they belong to.
        path: A file that ends in ``.nii.gz``.

    Raises:
        OutputError: The folder cannot be written, or the written geometry differs.
    """
    whole = steps.dtype == np.uint8
    header = nifti.values_header(
        grid.nifti_header or _header_by_itk(grid, path),
        grid.voxels.shape[::-1],
        labels=len(steps),
        datatype=nifti.UINT8 if whole else nifti.FLOAT32,
        slope=1 / 255 if whole else 1.0,
    )
    dtype = np.dtype(np.uint8) if whole else np.dtype(nifti.endian(header) + "f4")
    with replacing(path, suffix=".nii.gz") as temporary:
        # no name and no time: the same probabilities give the same bytes
        with (
            temporary.open("wb") as file,
            gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as out,
        ):
            out.write(header + bytes(4))
            for label in steps:
                for plane in label:
                    out.write(np.ascontiguousarray(plane, dtype).data)
        check_place(grid, temporary, path, labels=len(steps))


def write_nnunet(steps: Steps, grid: Volume, path: Path, *, regions: bool) -> None:
    """Write what ``nnUNetv2_ensemble`` reads: ``path``, an ``.npz``, and a ``.pkl`` beside it.

    The array ``probabilities`` is float16 ``(K, z, y, x)``, the background first, or of regions
    each of them. The ``.pkl`` says spacing, origin and direction as nnU-Net's ``SimpleITKIO`` does.

    Args:
        steps: Float16 ``(labels, z, y, x)``, of each label but the background, or of each region.
        grid: The mask or scan that they belong to.
        path: A file that ends in ``.npz``.
        regions: Whether they are of regions, among which there is no background.

    Raises:
        OutputError: The folder cannot be written.
    """
    spacing = tuple(grid.spacing_mm[::-1])
    direction = np.reshape(grid.direction, (3, 3))[::-1, ::-1]
    properties = {
        "sitk_stuff": {
            "spacing": spacing,
            "origin": tuple(grid.origin_mm[::-1]),
            "direction": tuple(float(value) for value in direction.ravel()),
        },
        "spacing": list(grid.spacing_mm),
    }
    with replacing(path.with_suffix(".pkl"), suffix=".pkl") as temporary:
        temporary.write_bytes(pickle.dumps(properties, protocol=4))
    shape = (len(steps) + (not regions), *grid.voxels.shape)
    with replacing(path, suffix=".npz") as temporary, zipfile.ZipFile(temporary, "w") as archive:
        entry = zipfile.ZipInfo("probabilities.npy")  # of 1980: the same bytes each time
        entry.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(entry, "w", force_zip64=True) as out:
            np.lib.format.write_array_header_1_0(
                out, {"descr": "<f2", "fortran_order": False, "shape": shape}
            )
            if not regions:
                for z in range(shape[1]):
                    rest = 1 - steps[:, z].astype(np.float32).sum(0)
                    out.write(rest.clip(0, 1).astype("<f2").data)
            for label in steps:
                for plane in label:
                    out.write(np.ascontiguousarray(plane, "<f2").data)


def _header_by_itk(grid: Volume, path: Path) -> bytes:
    """A NIfTI-1 header with the grid's place, of a few voxels, as ITK writes it."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.zeros((2, 2, 2), np.uint8))
    image.SetSpacing(grid.spacing_mm[::-1])
    image.SetOrigin(grid.origin_mm[::-1])
    direction = np.reshape(grid.direction, (3, 3))[::-1, ::-1]
    image.SetDirection([float(value) for value in direction.ravel()])
    try:
        with temporary_folder() as folder:
            sitk.WriteImage(image, str(folder / "header.nii"))
            return (folder / "header.nii").read_bytes()[: nifti.HEADER_BYTES]
    except (RuntimeError, OSError) as error:
        raise OutputError(f"{path}: no header can be made for it ({error})") from error
