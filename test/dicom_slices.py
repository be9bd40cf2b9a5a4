"""Writes a volume as the DICOM slices of one CT series, by ITK alone; test.sh runs it in the image.

    python dicom_slices.py SCAN FOLDER

The names of the files have nothing to do with the slices' order, as in the platform's test packs.
"""

from __future__ import annotations

import hashlib
import locale
import sys
from pathlib import Path

import SimpleITK as sitk

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ROOT = "1.2.826.0.1.3680043.8.498.7"  # of the UIDs


def write(scan: Path, folder: Path) -> int:
    """Write the slices, of whole HU; returns how many there are."""
    volume = sitk.Cast(sitk.ReadImage(str(scan)), sitk.sitkInt16)
    count, direction = volume.GetDepth(), volume.GetDirection()
    across, down = direction[0::3], direction[1::3]
    shared = {
        "0008|0016": CT_IMAGE, "0008|0060": "CT", "0008|0008": r"ORIGINAL\PRIMARY\AXIAL",
        "0020|000d": f"{ROOT}.1", "0020|000e": f"{ROOT}.2", "0020|0052": f"{ROOT}.3",
        "0020|0037": "\\".join(f"{value:.8f}" for value in (*across, *down)),
        "0018|0050": f"{volume.GetSpacing()[2]:.6f}",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    spoken = locale.setlocale(locale.LC_ALL)  # GDCM sets another, for the whole process
    for index in range(count):
        image = volume[:, :, index]
        place = volume.TransformIndexToPhysicalPoint((0, 0, index))
        own = {
            "0008|0018": f"{ROOT}.4.{index + 1}",
            "0020|0013": str(index + 1),
            "0020|0032": "\\".join(f"{value:.6f}" for value in place),
        }
        for tag, value in (shared | own).items():
            image.SetMetaData(tag, value)
        writer.SetFileName(
            str(folder / f"{hashlib.sha256(str(index).encode()).hexdigest()[:16]}.dcm")
        )
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, spoken)
    return count


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: dicom_slices.py SCAN FOLDER")
    print(write(*map(Path, sys.argv[1:])), "slices")
