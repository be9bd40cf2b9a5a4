"""Make the sample cases again: ``python test/sample/make_samples.py --ge DICOM_FOLDER``.

DICOM_FOLDER holds the 28 slices of the tilted GE head CT of neurolabusc/dcm_qa_ct. What becomes
of them, and which cases are synthetic, stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import torch
from scipy import ndimage

SAMPLE = Path(__file__).resolve().parent
sys.path.insert(0, str(SAMPLE.parents[1]))

# ruff: noqa: E402  (run as a script, so the project is not on the path before)
from ichseg.scan.volume import Volume, write
from phantom.background import insert_bleed
from phantom.cases import make_phantom
from phantom.person import draw_head
from phantom.scanner import draw_scan

SLICE_STEP_MM = 5.0
PIXEL_MM = 0.58  # the scan has 0.488; coarser only to keep the file small
LOWEST_HU = -1024
AIR_BELOW_HU = -900
AIR_HU = -1000  # the noise of air would be a third of the file

BLEED_ML = 22.0
BLEED_SEED = 8  # deep in the right hemisphere, beside the scan's old infarct on the left
SUBDURAL_ML = 40.0
SUBDURAL_SEED = 900_004  # far from the seeds that training and its held-out set use
SUBDURAL_PIXEL_MM = 0.6  # INSTANCE's coarsest, for the size of the file


def straighten(folder: Path) -> Volume:
    """Read a CT series of parallel slices onto a regular grid, each placed by its own header.

    The gantry was tilted by 18.5 degrees about the patient's left-right axis while the table moved
    along the patient's long axis: all slices share one tilted ImageOrientationPatient, and
    ImagePositionPatient changes along patient z alone, in steps of 4.22, 1.14 and 7.38 mm. Stacked
    as they are, the slices make a sheared block: from one slice to the next the head slides
    within the picture by sin(18.5 degrees) times the table's step.

    The output keeps the tilted planes and stacks them along their normal, so that each slice is
    only moved within its own plane (cubic spline) and mixed with its neighbour (linear along the
    normal). A grid along the patient's axes would instead cut obliquely through slices 4 and 7 mm
    thick. So the direction matrix of the output is a rotation by 18.5 degrees, and every voxel
    lies where it was in the patient.

    Returns:
        Volume of int16 HU, the series' field of view, 0.58 mm pixels, 5 mm slices.
    """
    slices = [pydicom.dcmread(path) for path in sorted(folder.iterdir()) if path.is_file()]
    orientation = np.array([s.ImageOrientationPatient for s in slices], dtype=float)
    if len(slices) < 2 or np.ptp(orientation, axis=0).max() > 1e-4:
        raise SystemExit(f"{folder}: expected parallel CT slices")
    row, column = orientation[0, :3], orientation[0, 3:]
    axes = np.stack([row, column, np.cross(row, column)])  # of the output, x' y' z', in patient xyz
    place_mm = np.array([s.ImagePositionPatient for s in slices], dtype=float) @ axes.T
    order = np.argsort(place_mm[:, 2])
    slices, place_mm = [slices[i] for i in order], place_mm[order]  # (slice, x' y' z')

    # One frame for all: it begins where the field of view does on average.
    start_mm = np.array([place_mm[:, 1].mean(), place_mm[0, 0]])  # (y', x')
    spacing_mm = np.array([float(v) for v in slices[0].PixelSpacing])
    extent_mm = (np.array(slices[0].pixel_array.shape) - 1) * spacing_mm
    straight = np.stack(
        [
            ndimage.affine_transform(
                _hounsfield(s),
                PIXEL_MM / spacing_mm,
                offset=(start_mm - (y_mm, x_mm)) / spacing_mm,
                output_shape=tuple(int(v) + 1 for v in extent_mm / PIXEL_MM),
                order=3,
                cval=LOWEST_HU,
            )
            for s, (x_mm, y_mm, _) in zip(slices, place_mm, strict=True)
        ]
    )  # (slice, y', x')

    z_mm = place_mm[:, 2]
    wanted_mm = np.arange(z_mm[0], z_mm[-1], SLICE_STEP_MM)
    below = np.searchsorted(z_mm, wanted_mm, side="right") - 1
    part = ((wanted_mm - z_mm[below]) / (z_mm[below + 1] - z_mm[below]))[:, None, None]
    voxels = (1 - part) * straight[below] + part * straight[below + 1]

    x_mm, y_mm, z0_mm = np.array([start_mm[1], start_mm[0], z_mm[0]]) @ axes
    return Volume(
        voxels=_flat_air(np.rint(voxels)).astype(np.int16),
        spacing_mm=(SLICE_STEP_MM, PIXEL_MM, PIXEL_MM),
        origin_mm=(float(z0_mm), float(y_mm), float(x_mm)),
        direction=tuple(float(v) for v in axes.T[::-1, ::-1].ravel()),
    )


def _hounsfield(s: pydicom.Dataset) -> npt.NDArray[np.float64]:
    """One slice ``(y, x)`` in HU, -1024 where the scanner did not reconstruct (stored as -1500)."""
    stored = s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept)
    return np.maximum(stored, LOWEST_HU)


def _flat_air(hu: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    return np.where(hu < AIR_BELOW_HU, AIR_HU, hu)


def synthesize_subdural() -> tuple[Volume, Volume]:
    """A phantom head with a subdural bleed, and its mask."""
    rng = np.random.default_rng(SUBDURAL_SEED)
    head = draw_head(rng)
    scan = draw_scan(head, rng)
    width = int(scan.shape[1] * scan.spacing_mm[1] / SUBDURAL_PIXEL_MM / 2) * 2
    scan = dataclasses.replace(
        scan,
        shape=(scan.shape[0], width, width),
        spacing_mm=(scan.spacing_mm[0], SUBDURAL_PIXEL_MM, SUBDURAL_PIXEL_MM),
    )
    case = make_phantom(head, scan, (("subdural", SUBDURAL_ML),), rng)
    image = Volume(_flat_air(case.voxels).astype(np.int16), case.spacing_mm)
    return image, image.with_voxels(case.mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ge", type=Path, required=True, metavar="DICOM_FOLDER", help="the tilted GE head CT"
    )
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    negative = straighten(parser.parse_args().ge)
    voxels, mask = insert_bleed(
        negative.voxels,
        negative.spacing_mm,
        kind="intraparenchymal",
        volume_ml=BLEED_ML,
        rng=np.random.default_rng(BLEED_SEED),
    )
    cases = {
        "ge_negative.mha": (negative, negative.with_voxels(np.zeros(mask.shape, np.uint8))),
        "ge_intraparenchymal.mha": (negative.with_voxels(voxels), negative.with_voxels(mask)),
        "synthetic_subdural.nii.gz": synthesize_subdural(),
    }
    for name, (image, reference) in cases.items():
        write(image, SAMPLE / "input" / name)
        write(reference, SAMPLE / "reference" / name)
        print(f"{name}: {reference.voxels.sum() * image.voxel_ml:.1f} mL")


if __name__ == "__main__":
    main()
