"""Where the head lies in a CT: found on raw HU, on a coarse grid, by rules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ichseg import ndimage
from ichseg.scan.orientation import Array, Box, nonzero_box

TISSUE_HU = -300.0  # skin and fat lie above, the foam of a headrest below
MARGIN_MM = 10.0  # around what is found: ears and nose are lost to the opening
_COARSE_MM = 3.0  # voxels of the grid that is looked at, where the volume's own are finer
_OPENING_MM = 3.0  # on either side: what is thinner than about 9 mm is no head
_OF_LARGEST = 0.02  # smaller pieces are the headrest's; larger ones may be of a head with a gap
_LEAST_ML = 50.0  # a head is larger, even in a single thick slice


def head_box(channels: Sequence[Array], spacing_mm: Sequence[float]) -> Box | None:
    """Box around the head and what hangs together with it, such as the neck, with a margin.

    The shell of a headrest is thin and vanishes in the opening. What does not, is a piece of its
    own or touches the head, and then lies in the box: too much is kept before too little.

    Args:
        channels: ``(z, y, x)`` in HU, in any order of axes; tissue of any channel counts.
        spacing_mm: Voxel size along the axes.

    Returns:
        ``(start, stop)`` per axis, or None where no head is found.
    """
    steps = [max(1, math.floor(_COARSE_MM / size)) for size in spacing_mm]
    grid = tuple(slice(None, None, step) for step in steps)
    tissue = np.greater(channels[0][grid], TISSUE_HU)
    for channel in channels[1:]:
        tissue |= np.greater(channel[grid], TISSUE_HU)

    coarse_mm = [step * size for step, size in zip(steps, spacing_mm, strict=True)]
    brush = np.ones([2 * math.floor(_OPENING_MM / size + 1e-6) + 1 for size in coarse_mm], np.bool_)
    # beyond the volume counts as tissue: a head that leaves it is not eaten away from there
    opened = ndimage.binary_dilation(ndimage.binary_erosion(tissue, brush, border_value=1), brush)
    pieces, count = ndimage.label(opened)
    if count == 0:
        return None
    sizes = np.bincount(pieces.ravel())[1:]
    large = np.flatnonzero(sizes >= _OF_LARGEST * sizes.max())
    if sizes[large].sum() * math.prod(coarse_mm) / 1000 < _LEAST_ML:
        return None
    found = ndimage.find_objects(pieces)
    kept = [found[piece] for piece in large]
    bounds = []
    for axis, (step, size) in enumerate(zip(steps, spacing_mm, strict=True)):
        margin = math.ceil(MARGIN_MM / size)
        low = step * min(piece[axis].start for piece in kept) - margin
        high = step * (max(piece[axis].stop for piece in kept) - 1) + 1 + margin
        bounds.append((max(0, low), min(channels[0].shape[axis], high)))
    return bounds[0], bounds[1], bounds[2]


def crop_box(channels: Sequence[Array], spacing_mm: Sequence[float], crop: str) -> Box:
    """The part of a case that the network sees, see ``Plans.crop``.

    Args:
        channels: ``(z, y, x)`` of each channel, in any order of axes.
        spacing_mm: Voxel size along the axes.
        crop: ``nonzero`` or ``head``.
    """
    nonzero = nonzero_box(channels)
    if crop == "nonzero":
        return nonzero
    z, y, x = (slice(*bounds) for bounds in nonzero)
    head = head_box([channel[z, y, x] for channel in channels], spacing_mm)
    if head is None:
        return nonzero
    (z0, _), (y0, _), (x0, _) = nonzero
    (z1, z2), (y1, y2), (x1, x2) = head
    return (z0 + z1, z0 + z2), (y0 + y1, y0 + y2), (x0 + x1, x0 + x2)
