"""A mask as DICOM-SEG, on the slices it was made from: one frame for each that has some of it.

By highdicom, which is optional (requirements-dicom.txt); without it a warning says so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ichseg.files import replacing
from ichseg.scan.dicom.series import Series

_BLEED = ("hemorrh", "haemorrh", "bleed", "blood", "hematoma", "haematoma")
_MUST_BE_THERE = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "StudyID", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
NOT_INSTALLED = "no DICOM-SEG: highdicom is not installed (pip install highdicom)"
_STRAIGHT, _SEG = "_straight.mha", "_seg.dcm"


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Who found what, as a segmentation object names it.

    Attributes:
        name: The name of the model.
        version: Its version.
        labels: The names of the foreground labels, from label 1 on.
    """

    name: str
    version: str
    labels: tuple[str, ...]


def is_possible() -> bool:
    """Whether highdicom is installed."""
    return importlib.util.find_spec("highdicom") is not None


def seg_path(mask: Path) -> Path:
    """Where the DICOM-SEG lies: beside the mask on the straight grid."""
    return mask.with_name(mask.name.removesuffix(_STRAIGHT) + _SEG)


def write_seg(
    labels: npt.NDArray[np.uint8], series: Series, path: Path, algorithm: Algorithm
) -> str | None:
    """Write a segmentation object that refers to the series' slices.

    Its position in the patient is that of each source slice, tilted and uneven as they are. UIDs
    follow from the slices', the labels and the algorithm: the same mask has the same.

    Args:
        labels: ``(slice, y, x)``, in the order of the series' slices.
        series: The slices.
        path: The ``.dcm`` file, which appears whole or not at all.
        algorithm: Who found the labels.

    Returns:
        Why there is none, for a reader of the result; None if it was written.

    Raises:
        OutputError: The folder cannot be written.
    """
    path.unlink(missing_ok=True)  # an earlier run's would be taken for this one's
    if not is_possible():
        return NOT_INSTALLED
    for library in ("pydicom", "highdicom"):  # which say much about a source's headers
        logging.getLogger(library).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=library)
    try:
        made = _segmentation(labels, series, algorithm)
    except Exception as error:  # whatever a scanner may have written into its headers
        reason = str(error).splitlines()[0][:160] if str(error) else ""
        return f"no DICOM-SEG: {type(error).__name__}: {reason}"
    with replacing(path, suffix=".dcm") as temporary:
        made.save_as(temporary, enforce_file_format=True)
    return None


def _segmentation(labels: npt.NDArray[np.uint8], series: Series, by: Algorithm) -> Any:
    """The object, made by highdicom."""
    import highdicom as hd
    import pydicom
    from pydicom.sr.codedict import codes

    sources = [pydicom.dcmread(f.path, stop_before_pixels=True) for f in series.slices]
    for source in sources:
        for name in _MUST_BE_THERE:  # if empty; anonymisers take them away
            if name not in source:
                setattr(source, name, "")
        if not source.get("SliceThickness"):
            source.SliceThickness = round(float(np.median(series.stack.steps_mm)), 4)
    algorithm = hd.AlgorithmIdentificationSequence(
        name=by.name[:64], version=by.version[:64],
        family=codes.DCM.ArtificialIntelligence,
    )  # fmt: skip
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=_kind(name),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(by.labels, 1)
    ]
    digest = hashlib.sha256(np.ascontiguousarray(labels).data).hexdigest()
    made_of = [sources[0].SeriesInstanceUID, by.name, by.version, digest]
    return hd.seg.Segmentation(
        source_images=sources,
        pixel_array=labels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=pydicom.uid.generate_uid(entropy_srcs=[*made_of, "series"]),
        series_number=900,
        sop_instance_uid=pydicom.uid.generate_uid(entropy_srcs=[*made_of, "instance"]),
        instance_number=1,
        manufacturer="ichseg",
        manufacturer_model_name=by.name[:64],
        software_versions=by.version[:64],
        device_serial_number="none",
        content_description="Research only, not for diagnosis",
        content_label="SEGMENTATION",
        series_description=f"{by.name}, research only"[:64],
    )


def _kind(label: str) -> Any:
    """The coded concept of what a label marks."""
    from highdicom.sr.coding import CodedConcept
    from pydicom.sr.codedict import codes

    if any(word in label.lower() for word in _BLEED):
        return CodedConcept("50960005", "SCT", "Hemorrhage")
    return codes.SCT.MorphologicallyAbnormalStructure
