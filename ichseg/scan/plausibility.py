"""Whether a volume can be a head CT in HU: repaired, done with a warning, or refused in words.

For models of CT alone. A network marks something in any picture; what it finds in one that is not
in HU looks like a result and means nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError
from ichseg.scan.volume import Volume
from ichseg.wording import times

OFFSET_HU = 1024  # what is added to HU where they are stored without a sign
_SAMPLE = 4_000_000  # voxels that are looked at
_TISSUE_HU = (-20, 110)  # brain, fluid, muscle, blood
_LEAST_TISSUE = 0.005  # of the volume; a head in a field of 500 x 500 x 300 mm is 0.015 and more
_SMALL_MM = 100.0  # a head is 140 mm wide and more
_SHORT_MM = 30.0  # from below to above


def check(volume: Volume, path: Path) -> tuple[Volume, tuple[str, ...]]:
    """The volume in HU, and what a reader of its mask should know.

    Args:
        volume: As read.
        path: For messages.

    Raises:
        InputError: It is no CT in HU: 8-bit, constant, or without anything of a tissue's density.
    """
    sample = _sampled(volume.voxels)
    low, high = float(sample.min()), float(sample.max())
    if low == high:
        raise InputError(f"{path}: every voxel is {low:g}, expected a head CT in HU")
    warnings = []
    whole = bool((sample == np.round(sample)).all())
    if low >= 0 and 200 <= high <= 255 and whole:
        raise InputError(
            f"{path}: whole numbers from {low:g} to {high:g}, expected HU (air is -1000, bone "
            "1000); this seems to be a picture of 8 bits, in which HU are lost"
        )
    tissue = _share(sample, *_TISSUE_HU)
    shifted = _share(sample, _TISSUE_HU[0] + OFFSET_HU, _TISSUE_HU[1] + OFFSET_HU)
    # little is between blood and bone: in HU without a sign there is as much bone on either side
    above = _share(sample, _TISSUE_HU[1] + OFFSET_HU + 20, 2 * _TISSUE_HU[1] + OFFSET_HU + 40)
    if low >= 0 and shifted > 0.02 and shifted > 3 * above:
        volume = volume.with_voxels(_shift(volume.voxels))
        sample = sample - OFFSET_HU
        tissue = shifted
        warnings.append(f"stored with {OFFSET_HU} added to HU, which was taken off")
    if tissue < _LEAST_TISSUE:
        raise InputError(
            f"{path}: only {100 * tissue:.2f} % of it have the density of tissue, "
            f"{_TISSUE_HU[0]} to {_TISSUE_HU[1]} HU; expected a head CT in HU (values are "
            f"{low:g} to {high:g})"
        )
    if _share(sample, -2000, -200) < 0.01:
        removed = float((sample == 0).mean()) > 0.2
        warnings.append(
            "no air around the head"
            + (", and 0 instead: is the skull removed? " if removed else "; ")
            + "the networks have learned on whole heads"
        )
    size_mm = [n * mm for n, mm in zip(volume.voxels.shape, volume.spacing_mm, strict=True)]
    text = times(round(size) for size in size_mm)
    if min(sorted(size_mm)[1:]) < _SMALL_MM or min(size_mm) < _SHORT_MM:
        warnings.append(f"a field of view of {text} mm, less than a head")
    if max(size_mm) > 700:
        warnings.append(f"a field of view of {text} mm; are the voxel sizes right?")
    return volume, tuple(warnings)


def _sampled(voxels: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Every few voxels along each axis, float32."""
    step = max(1, int(np.ceil((voxels.size / _SAMPLE) ** (1 / 3))))
    steps = [min(step, max(1, n // 8)) for n in voxels.shape]
    return voxels[:: steps[0], :: steps[1], :: steps[2]].astype(np.float32)


def _share(sample: npt.NDArray[np.float32], low: float, high: float) -> float:
    return float(((sample >= low) & (sample <= high)).mean())


def _shift(voxels: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Less the offset; whole numbers in a type that has negative ones."""
    if voxels.dtype.kind == "f":
        kind: npt.DTypeLike = voxels.dtype
    else:
        kind = np.int16 if int(voxels.max()) <= 32_767 else np.int32
    shifted: npt.NDArray[np.generic] = np.subtract(voxels.astype(kind), OFFSET_HU, dtype=kind)
    return shifted
