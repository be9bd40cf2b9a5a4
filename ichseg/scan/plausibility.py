"""Whether a volume can be a head CT in HU: mended, told in a warning, or refused in words.

For models of CT alone. A network marks something in any picture; what it finds in one that is not
in HU looks like a result and means nothing. So the values' distribution is judged: where tissue
and air lie, how sharp they are, and what else is there. Single values that stand for "nothing"
(padding, a background that was set to one number, the ends of a window) are put aside first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError
from ichseg.scan import slices
from ichseg.scan.volume import Volume
from ichseg.wording import times

OFFSET_HU = 1024  # what is added to HU where they are stored without a sign
_SAMPLE = 4_000_000  # voxels that are looked at
_LOWEST, _HIGHEST = -5000, 20_000  # whole values that are told apart
_TISSUE_HU = (-20, 110)  # brain, fluid, muscle, blood
_LEAST_TISSUE = 0.005  # of the volume; a head in a field of 500 x 500 x 300 mm is 0.015 and more
_BRAIN_HU = (0, 110)  # where most tissue may lie: brain is 20 to 45, plastic heads are 100
_USUAL_BRAIN_HU = (18, 46)  # real heads have 22 to 43, phantoms 28 to 36
_AIR_HU = (-1150, -850)
_NOTHING_HU, _BONE_HU = -1200, 500  # below: nothing in HU; above: bone and metal
_MOST_JUMPS = 0.002  # from one to the other, of the volume; of real heads with wrapped bone 0.0136
_MOST_AT_THE_TOP = 0.3  # of the volume: bone in a narrow window; 129 real heads have 0.15 and less
_LEAST_RANGE = 50  # from the lowest to the highest value; the narrowest window is 80 HU
_SMALL_MM = 100.0  # a head is 140 mm wide and more
_SHORT_MM = 30.0  # from below to above
_LARGE_MM = 700.0
_POSSIBLE_MM = (10.0, 3000.0)  # of the longest side; beyond, the unit is another
_POSSIBLE_VOXEL_MM = (0.01, 50.0)


def check(volume: Volume, name: Path | str) -> tuple[Volume, tuple[str, ...]]:
    """The volume in HU, and what a reader of its mask should know.

    Values that are HU + 1024 are mended; the volume that comes back is then another.

    Args:
        volume: The volume as read.
        name: What messages begin with, such as its path.

    Raises:
        InputError: It is no CT in HU (8-bit, constant, scaled, negated, shifted by another number,
            normalised, or without anything of a tissue's density), or its voxels have no size that
            a head's can have.
    """
    about_size = _check_size(volume, name)
    sample = _sampled(volume.voxels)
    whole = all(bool((plane == np.rint(plane)).all()) for plane in sample)
    low, high = float(sample.min()), float(sample.max())
    if reason := _why_no_ct(low, high, whole):
        raise InputError(f"{name}: {reason}")
    values = _distribution(sample)
    mended = []
    if values.is_raised:
        brain = values.mode(OFFSET_HU - 60, OFFSET_HU + 300)
        if brain < OFFSET_HU + 21:  # brain is darker than that only where less was added
            raise InputError(
                f"{name}: most tissue lies near {brain}, as if about 1000 had been added to HU; "
                f"expected HU, or HU + {OFFSET_HU}"
            )
        volume = volume.with_voxels(_without_offset(volume.voxels))
        sample -= OFFSET_HU
        values = _distribution(sample)
        mended = [f"stored with {OFFSET_HU} added to HU, which was taken off"]
    if reason := _why_not_hu(values, whole):
        raise InputError(
            f"{name}: {reason}; expected a head CT in HU (values are {low:g} to {high:g})"
        )
    about_slices = slices.check(volume, name)
    about_values = (*_about_values(values), *_about_bone(sample))
    return volume, (*mended, *about_values, *(about_size or about_slices))


def is_offset(volume: Volume, name: Path | str) -> bool:
    """Whether the values are HU + 1024, which ``check`` would mend."""
    try:
        checked, _ = check(volume, name)
    except InputError:
        return False
    return checked is not volume


def _why_no_ct(low: float, high: float, whole: bool) -> str:
    """Why values in this range are those of no CT; empty if they can be.

    Args:
        low: The lowest value.
        high: The highest value.
        whole: Whether all values are whole numbers.
    """
    if low == high:
        return f"every voxel is {low:g}, expected a head CT in HU"
    if high - low < _LEAST_RANGE:
        return f"values from {low:.4g} to {high:.4g}, expected HU (air is -1000, bone 1000)"
    if low >= 0 and 200 <= high <= 255 and whole:
        return (
            f"whole numbers from {low:g} to {high:g}, expected HU (air is -1000, bone "
            "1000); this seems to be a picture of 8 bits, in which HU are lost"
        )
    return ""


def _about_values(values: _Distribution) -> list[str]:
    """What a reader of the mask should know about values that can be HU."""
    words = []
    if values.share(-2000, -200, spikes=True) < 0.01:
        removed = values.share(0, 0, spikes=True) > 0.2
        words.append(
            "no air around the head"
            + (", and 0 instead: is the skull removed? " if removed else "; ")
            + "the networks have learned on whole heads"
        )
    brain = values.tissue
    if not _USUAL_BRAIN_HU[0] <= brain <= _USUAL_BRAIN_HU[1]:
        words.append(f"most tissue lies near {brain} HU, where brain is 20 to 45; is it in HU?")
    return words


def _about_bone(sample: npt.NDArray[np.float32]) -> list[str]:
    """A warning where bone ends in values far below air's, as if too large a number had wrapped."""
    dark, bone = sample < _NOTHING_HU, sample > _BONE_HU
    beside = (
        (dark[:, 1:], bone[:, :-1]),
        (dark[:, :-1], bone[:, 1:]),
        (dark[:, :, 1:], bone[:, :, :-1]),
        (dark[:, :, :-1], bone[:, :, 1:]),
    )
    jumps = sum(np.count_nonzero(one & other) for one, other in beside)
    if jumps < _MOST_JUMPS * sample.size:
        return []
    return [
        f"values below {_NOTHING_HU} lie all along bone, as if its highest ones had wrapped around "
        "to negative: are the stored numbers unsigned, and called signed?"
    ]


def _check_size(volume: Volume, name: Path | str) -> list[str]:
    """Warnings about the voxels' sizes and the field of view.

    Raises:
        InputError: They are those of no head in millimetres.
    """
    sides_mm = [n * mm for n, mm in zip(volume.voxels.shape, volume.spacing_mm, strict=True)]
    field = f"a field of view of {times(sides_mm, 3)} mm"
    least, most = _POSSIBLE_VOXEL_MM
    odd_voxel = min(volume.spacing_mm) < least or max(volume.spacing_mm) > most
    if odd_voxel or not _POSSIBLE_MM[0] <= max(sides_mm) <= _POSSIBLE_MM[1]:
        raise InputError(
            f"{name}: voxels of {times(volume.spacing_mm, 3)} mm, {field}; expected a head in "
            "millimetres, are the sizes in another unit?"
        )
    if min(sorted(sides_mm)[1:]) < _SMALL_MM or min(sides_mm) < _SHORT_MM:
        return [f"{field}, less than a head"]
    if max(sides_mm) > _LARGE_MM:
        return [f"{field}; are the voxel sizes right?"]
    return []


def _why_not_hu(values: _Distribution, whole: bool) -> str:
    """Why the values are no HU; empty if they can be.

    Args:
        values: Their distribution.
        whole: Whether all of them are whole numbers.
    """
    tissue = values.share(*_TISSUE_HU, spikes=True)
    if tissue < _LEAST_TISSUE:
        return (
            f"only {100 * tissue:.2f} % of it have the density of tissue, {_TISSUE_HU[0]} to "
            f"{_TISSUE_HU[1]} HU"
        )
    brain = values.tissue
    if not _BRAIN_HU[0] <= brain <= _BRAIN_HU[1]:
        return f"most of what could be tissue lies near {brain}, where brain is 20 to 45 HU"
    high = values.share(5000, _HIGHEST, spikes=True)
    if high > 0.01:
        return f"{100 * high:.0f} % of it lie above 5000"
    top = float(values.counts[np.flatnonzero(values.counts)[-1]])
    if top > _MOST_AT_THE_TOP:
        return f"{100 * top:.0f} % of it have the highest value, as if tissue had been cut off"
    near = values.share(brain - 2, brain + 2)
    if not whole and near > 0.7 * values.share(brain - 10, brain + 10):
        return f"tissue lies within 2 of {brain}, where brain alone spans 20 HU"
    below = values.share(_LOWEST, -1200)
    if below > max(0.005, 0.5 * values.share(-1100, -200)):
        return f"{100 * below:.1f} % of it lie below -1200, where air is -1000 HU"
    air = values.share(_LOWEST, -200)
    peak = values.mode(_LOWEST, -200)
    is_sharp = values.share(peak - 25, peak + 25) > 0.25 * air
    if air > 0.02 and is_sharp and not _AIR_HU[0] <= peak <= _AIR_HU[1]:
        return f"air lies near {peak}, where it is -1000 HU"
    if air < 0.01:
        other = values.mode(150, _HIGHEST)
        if values.share(other - 4, other + 4) > 0.1 * values.share(brain - 4, brain + 4):
            return f"values gather near {brain} and near {other}, and none are air's"
    return ""


@dataclass(frozen=True, slots=True)
class _Distribution:
    """How many voxels have each whole value.

    Attributes:
        counts: The share of the voxels at each value from ``_LOWEST`` on.
        smooth: The same without spikes: single values that stand out from those beside them, and
            the lowest and highest one.
    """

    counts: npt.NDArray[np.float64]
    smooth: npt.NDArray[np.float64]

    def share(self, low: int, high: int, *, spikes: bool = False) -> float:
        """The share of the voxels from ``low`` to ``high``, both of them included."""
        counts = self.counts if spikes else self.smooth
        return float(counts[max(low - _LOWEST, 0) : max(high - _LOWEST + 1, 0)].sum())

    def mode(self, low: int, high: int) -> int:
        """The value from ``low`` to ``high`` around which most voxels lie, within 4."""
        part = self.smooth[low - _LOWEST : high - _LOWEST + 1]
        return low + int(np.convolve(part, np.ones(9), "same").argmax())

    @property
    def tissue(self) -> int:
        """The value in HU around which most of what could be tissue lies."""
        return self.mode(-60, 300)

    @property
    def is_raised(self) -> bool:
        """Whether a number near ``OFFSET_HU`` was added: nothing is air's, and tissue is there.

        Little is between blood and bone: in HU without a sign there is as much bone at the
        tissue's place as above it.
        """
        if self.share(-1100, -200) >= 0.01:
            return False
        there = self.share(OFFSET_HU + _TISSUE_HU[0] - 24, OFFSET_HU + _TISSUE_HU[1])
        above = self.share(OFFSET_HU + _TISSUE_HU[1] + 20, OFFSET_HU + 2 * _TISSUE_HU[1] + 40)
        return there > _LEAST_TISSUE and there > 3 * above


def _distribution(sample: npt.NDArray[np.float32]) -> _Distribution:
    found = np.zeros(_HIGHEST - _LOWEST + 1, np.intp)
    for plane in sample:  # numpy counts in 8 bytes a voxel
        values = np.clip(np.rint(plane), _LOWEST, _HIGHEST).astype(np.intp).ravel() - _LOWEST
        found += np.bincount(values, minlength=len(found))
    counts = found / sample.size
    present = np.flatnonzero(counts)
    beside = np.maximum.reduce([np.roll(counts, by) for by in (-3, -2, -1, 1, 2, 3)])
    smooth = np.where((counts > 0.02) & (counts > 5 * beside), 0.0, counts)
    smooth[present[[0, -1]]] = 0.0
    # a drawing of few values has nothing else
    return _Distribution(counts, smooth if smooth.sum() > _LEAST_TISSUE else counts)


def _sampled(voxels: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Every few voxels along each axis, float32."""
    step = max(1, int(np.ceil((voxels.size / _SAMPLE) ** (1 / 3))))
    steps = [min(step, max(1, n // 8)) for n in voxels.shape]
    return voxels[:: steps[0], :: steps[1], :: steps[2]].astype(np.float32)


def _without_offset(voxels: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """HU of voxels that are HU + 1024; whole numbers in a type that has negative ones."""
    if voxels.dtype.kind == "f":
        kind: npt.DTypeLike = voxels.dtype
    else:
        fits = int(voxels.max()) <= 32_767 and int(voxels.min()) >= OFFSET_HU - 32_768
        kind = np.int16 if fits else np.int32
    shifted: npt.NDArray[np.generic] = np.subtract(voxels.astype(kind), OFFSET_HU, dtype=kind)
    return shifted
