"""DICOM slices for tests, written by pydicom."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from ichseg.scan.dicom.elements import CT_IMAGE

UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SERIES = "1.2.826.0.1.3680043.8.498.1"


def make_slice(pixels: np.ndarray, position: Sequence[float], **changes: object) -> Dataset:
    """A CT slice, pixels ``(y, x)`` in HU from -1024 on; changes by keyword, None takes away."""
    stored = (pixels + 1024).astype(np.uint16)
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = CT_IMAGE
    uid = SERIES + "." + ".".join(str(abs(round(100 * v)) + 1) for v in position)
    attributes = {
        "SOPClassUID": CT_IMAGE, "SOPInstanceUID": uid, "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "PatientName": "A^B", "PatientID": "1",
        "StudyInstanceUID": "1.2.3", "SeriesInstanceUID": SERIES, "SeriesNumber": "2",
        "FrameOfReferenceUID": "1.2.4", "ImagePositionPatient": list(position),
        "ImageOrientationPatient": list(UPRIGHT), "PixelSpacing": [0.5, 0.75],
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0], "Columns": pixels.shape[1], "BitsAllocated": 16,
        "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0, "RescaleSlope": 1,
        "RescaleIntercept": -1024, "PixelData": stored.tobytes(),
    }  # fmt: skip
    for name, value in (attributes | changes).items():
        if value is not None:
            setattr(made, name, value)
    if "PixelData" in made:
        made["PixelData"].VR = "OW"
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    return made


def save(made: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> Path:
    """Write it in one of the uncompressed transfer syntaxes."""
    made = copy.deepcopy(made)
    made.file_meta.TransferSyntaxUID = syntax
    path.parent.mkdir(parents=True, exist_ok=True)
    if syntax == pydicom.uid.ExplicitVRBigEndian and "PixelData" in made:
        made.PixelData = np.frombuffer(made.PixelData, "<u2").astype(">u2").tobytes()
    made.save_as(path, enforce_file_format=True)
    return path


def write_stack(
    folder: Path,
    places: Sequence[Sequence[float]],
    values: Callable[[np.ndarray], np.ndarray],
    *,
    shape: tuple[int, int] = (24, 20),
    orientation: Sequence[float] = UPRIGHT,
    **changes: object,
) -> None:
    """Slices of a function of the patient's x, y, z in mm; file names say nothing of the order."""
    spacing = (0.5, 0.75)
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    j, i = np.mgrid[: shape[0], : shape[1]]
    for number, place in enumerate(places):
        at = np.array(place) + (spacing[0] * j)[..., None] * column
        at = at + (spacing[1] * i)[..., None] * row
        made = make_slice(
            np.rint(values(at)), place, ImageOrientationPatient=list(orientation), **changes
        )
        save(made, folder / f"{(7 * number) % 101:03}.dcm")
