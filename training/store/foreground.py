"""Which voxels of a case patches may be centred on: some of each label, and some of each lesion.

They are drawn once, when a case is stored, so that a batch is drawn without reading its labels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ichseg.pieces import CONNECTED
from ichseg.scan.orientation import nonzero_box

_LISTED_AT_LEAST = 10_000  # voxels of a label whose coordinates are kept (nnU-Net v1)
_LISTED_FRACTION = 0.01  # of larger labels
_LISTED_OF_A_LESION = 1000
_SEED = 1234


def sample_foreground(
    target: npt.NDArray[np.int8], ignore_label: int | None = None
) -> tuple[dict[int, npt.NDArray[np.integer]], dict[int, int]]:
    """Coordinates to centre foreground patches on, and voxel counts, both by label.

    Args:
        target: ``(Z, Y, X)``; values above 0 are foreground, but for the one to be ignored.
        ignore_label: That value, or None.

    Returns:
        For each label that is present the coordinates ``(n, 3)`` as ``sample_voxels`` draws them,
        and how many voxels it has.
    """
    random = np.random.RandomState(_SEED)
    foreground: dict[int, npt.NDArray[np.integer]] = {}
    counts: dict[int, int] = {}
    for label in range(1, int(target.max(initial=0)) + 1):
        mask = target == label
        if label != ignore_label and (count := int(np.count_nonzero(mask))):
            counts[label] = count
            foreground[label] = sample_voxels(mask, random)
    return foreground, counts


def sample_voxels(
    mask: npt.NDArray[np.bool_], random: np.random.RandomState | None = None
) -> npt.NDArray[np.integer]:
    """Coordinates ``(n, 3)`` of the voxels of a mask ``(Z, Y, X)``, in order.

    All of up to 10 000 voxels; of more 10 000 or 1 %, whichever is more, drawn without replacement
    with a fixed seed.
    """
    random = np.random.RandomState(_SEED) if random is None else random
    dtype = np.int16 if max(mask.shape) <= np.iinfo(np.int16).max else np.int32
    flat = np.flatnonzero(mask)
    wanted = max(min(_LISTED_AT_LEAST, len(flat)), int(np.ceil(len(flat) * _LISTED_FRACTION)))
    if wanted < len(flat):
        flat = flat[np.sort(random.choice(len(flat), wanted, replace=False))]
    return np.stack(np.unravel_index(flat, mask.shape), axis=1).astype(dtype)


def sample_lesions(
    target: npt.NDArray[np.int8], ignore_label: int | None = None
) -> npt.NDArray[np.integer]:
    """Coordinates to centre patches on, lesion by lesion: ``(n, 4)``, the lesion's number first.

    A lesion is a set of foreground voxels, of whatever labels, that touch. Listed are all of up to
    1000 voxels of each, else so many that are drawn without replacement with a fixed seed.

    Args:
        target: ``(Z, Y, X)``; values above 0 are foreground, but for the one to be ignored.
        ignore_label: That value, or None.
    """
    random = np.random.RandomState(_SEED)
    foreground = target > 0
    if ignore_label is not None:
        foreground &= target != ignore_label
    if not foreground.any():
        return np.empty((0, 4), np.int32)
    box = nonzero_box([foreground])
    numbered, _ = ndimage.label(foreground[tuple(slice(*b) for b in box)], structure=CONNECTED)
    flat = np.flatnonzero(numbered)
    numbers = numbered.ravel()[flat]
    order = np.argsort(numbers, kind="stable")
    found = []
    for voxels in np.split(flat[order], np.flatnonzero(np.diff(numbers[order])) + 1):
        if len(voxels) > _LISTED_OF_A_LESION:
            voxels = np.sort(random.choice(voxels, _LISTED_OF_A_LESION, replace=False))
        found.append(voxels)
    kept = np.concatenate(found)
    places = [
        place + start
        for place, (start, _) in zip(np.unravel_index(kept, numbered.shape), box, strict=True)
    ]
    return np.stack([numbered.ravel()[kept], *places], axis=1).astype(np.int32)


def by_lesion(listed: npt.NDArray[np.integer]) -> dict[int, npt.NDArray[np.integer]]:
    """The coordinates of each lesion, by its number."""
    return {int(n): listed[listed[:, 0] == n, 1:] for n in np.unique(listed[:, 0])}
