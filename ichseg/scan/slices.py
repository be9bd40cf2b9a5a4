"""What the slices of a CT show, one beside the other: whether they are in order, and of one head.

The values of each may be HU and their grid a head's, and yet they may be stacked as their files
were called (1, 10, 11, ..., 2, 20), or be those of two scans in turn. Then no slice is like the
ones beside it, but like others further away.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError
from ichseg.scan.orientation import orient_axes
from ichseg.scan.volume import Volume
from ichseg.wording import counted

_ACROSS = 64  # pixels of a slice along each side that are looked at, or a few more
_LOW_HU, _HIGH_HU = -200.0, 200.0  # between which slices are compared
_MUCH_NEARER = 0.75  # 128 real heads have no slice below; out of order nearly all of them do
_LEAST_SHOWN = 0.5  # of the contrast of half of the slices; what is left of one without its skull
_LEAST_STRAY, _MOST_STRAY = 2, 0.25  # slices that are told, and the share that is refused
_LEAST_SLICES, _MOST_SLICES = 8, 2000
_AIR_HU = -200.0
_DARKEST_TISSUE_HU = 5.0  # where a window hides the air, which then has its lowest value
_HEAD_MM2 = (7_500.0, 45_000.0)  # the largest cross-section; real heads have 21,000 to 29,000
_HEAD_AND_NECK_MM = 320.0
_WHOLE_MM = 100.0  # what is lower, or is narrower, need not show a head's largest cross-section


def check(volume: Volume, name: Path | str) -> list[str]:
    """What a reader of the mask should know about the slices of a CT.

    Args:
        volume: The CT in HU.
        name: What messages begin with, such as its path.

    Raises:
        InputError: So many are out of their order that no head is seen.
    """
    axes = orient_axes(volume)
    planes = axes.apply(volume.voxels)
    z, y, x = axes.permutation
    mm = (volume.spacing_mm[z], volume.spacing_mm[y], volume.spacing_mm[x])
    steps = [max(1, size // _ACROSS) for size in planes.shape[1:]]
    some = planes[:, :: steps[0], :: steps[1]].astype(np.float32)
    pixel_mm2 = mm[1] * mm[2] * steps[0] * steps[1]
    sides_mm = [size * step for size, step in zip(planes.shape, mm, strict=True)]
    about = _about_order(some, name) + _about_copies(some)
    return about + _about_size(some, pixel_mm2, mm[0], min(sides_mm))


def _about_order(planes: npt.NDArray[np.float32], name: Path | str) -> list[str]:
    """Words for slices that are more like others than like those beside them.

    Raises:
        InputError: Many are.
    """
    if not _LEAST_SLICES <= len(planes) <= _MOST_SLICES:
        return []
    likeness, most_like = _likeness(planes)
    stray = np.flatnonzero((likeness < _MUCH_NEARER) & _shown(planes))
    if len(stray) > _MOST_STRAY * len(planes):
        stray = stray[~_are_mirrored(stray, most_like[stray])]
    if len(stray) < _LEAST_STRAY:
        return []
    found = (
        f"{counted(len(stray), 'slice')} of {len(planes)} are less like those beside them than "
        f"like others, such as number {stray[0] + 1} from below"
    )
    if len(stray) > _MOST_STRAY * len(planes):
        raise InputError(f"{name}: {found}; expected slices in their order, of one scan")
    return [f"{found}: are they in their order, and of one scan?"]


def _shown(planes: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Which slices show enough to be compared: nearly empty ones are all alike."""
    contrast = np.clip(planes, _LOW_HU, _HIGH_HU).var((1, 2))
    enough = contrast >= _LEAST_SHOWN * float(np.median(contrast))
    shown: npt.NDArray[np.bool_] = enough & (contrast > 0)
    return shown


def _about_copies(planes: npt.NDArray[np.float32]) -> list[str]:
    """Words for slices that are the one below again: noise alone makes two scanned ones differ."""
    same = (planes[1:] == planes[:-1]).all((1, 2)) & _shown(planes)[1:]
    if not same.any():
        return []
    return [
        f"{counted(int(same.sum()), 'slice')} of {len(planes)} show the same as the one below, "
        f"voxel by voxel, such as number {int(same.argmax()) + 2} from below: copies lie where "
        "others should, or the scan was brought to thinner slices"
    ]


def _are_mirrored(
    stray: npt.NDArray[np.intp], most_like: npt.NDArray[np.intp]
) -> npt.NDArray[np.bool_]:
    """Which slices are like one as far on the other side of a middle, if half of them or more are.

    As in a ball, whose slices are in order.
    """
    middles = stray + most_like
    if not len(middles):
        return np.zeros(0, np.bool_)
    mirrored: npt.NDArray[np.bool_] = abs(middles - np.median(middles)) <= 1
    return mirrored if mirrored.mean() >= 0.5 else np.zeros(len(middles), np.bool_)


def _likeness(
    planes: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]:
    """For each slice, how far the most similar one is that is not beside it, and which it is.

    As a share of the distance to the more similar of those beside it; above 1 if they are in order.
    """
    flat = np.clip(planes, _LOW_HU, _HIGH_HU).reshape(len(planes), -1).astype(np.float64)
    products = flat @ flat.T
    squares = np.diag(products)
    apart = np.sqrt(np.maximum(squares[:, None] + squares - 2 * products, 0))
    near = abs(np.subtract.outer(np.arange(len(planes)), np.arange(len(planes))))
    beside = np.where(near == 1, apart, np.inf).min(1)
    others = np.where(near > 1, apart, np.inf)
    least = 1e-3 * float(np.median(beside))  # air alone, and slices that are there twice
    ratio: npt.NDArray[np.float64] = np.where(
        beside > least, others.min(1) / (beside + 1e-9), np.inf
    )
    return ratio, others.argmin(1)


def _about_size(
    planes: npt.NDArray[np.float32], pixel_mm2: float, step_mm: float, shortest_mm: float
) -> list[str]:
    """Words for what is larger than a head and its neck, or smaller than any head."""
    air_is_there = np.count_nonzero(planes < _AIR_HU) > 0.01 * planes.size
    tissue = planes > (_AIR_HU if air_is_there else _DARKEST_TISSUE_HU)
    areas = np.count_nonzero(tissue, axis=(1, 2)) * pixel_mm2
    smallest, largest = _HEAD_MM2
    most = float(areas.max())
    if most > largest:
        return [
            f"tissue of up to {most / 100:.0f} cm2 in a slice, where a head has 200 to 300: other "
            "parts of the body are seen as well, or the voxel sizes are wrong; the networks know "
            "heads alone"
        ]
    height_mm = float(np.count_nonzero(areas >= smallest)) * step_mm
    if height_mm > _HEAD_AND_NECK_MM:
        return [
            f"what could be a head and its neck is {height_mm:.0f} mm high; are the voxel sizes "
            "right?"
        ]
    if most < smallest and shortest_mm >= _WHOLE_MM:
        return [
            f"tissue of {most / 100:.0f} cm2 in a slice at most, where a head has 200 to 300; are "
            "the voxel sizes right?"
        ]
    return []
