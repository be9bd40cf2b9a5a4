"""Head CT that was published as pictures: windowed slices of 8 bit become HU, spacing and masks.

Public sets often hold what a viewer showed: grey levels of a window, without spacing. Brain, bone
and the size of a head are known well enough to undo that. Arrays are ``(z, y, x)``; HU saturate at
both ends of the window, so bone is the window's upper end and air its lower end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Hu = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Box = tuple[int, int, int, int]  # first and last column, then row: x0, y0, x1, y1

BONE_HU = 90.0  # in a window that ends at 100
BRAIN_HU = 29.0  # median of a brain between its sulci, at 120 kV
HEAD_MM = 147.6  # square root of the largest cross-section of an adult's head, about 21,800 mm2
_BRAIN_WINDOW = (-20, 121)  # lower end, and number of levels, of the window 40 +- 60 HU
_SKULL_PIXELS = (
    1500  # a piece of bone in a slice is the skull's from this on; less is a calcification
)


@dataclass(frozen=True, slots=True)
class Region:
    """Where in a slice a bleed was seen.

    Attributes:
        outline: Corners of a polygon, ``(x, y)`` in fractions of the picture's width and height.
        sure: Whether what is dense in it is blood; if not, nobody can tell what lies in it.
    """

    outline: tuple[tuple[float, float], ...]
    sure: bool = True


@dataclass(frozen=True, slots=True)
class Skull:
    """What a stack shows of the skull, slice by slice.

    Attributes:
        bone: The skull.
        calcified: What is as dense, but not connected to a large piece of bone.
        inside: What the skull encloses.
    """

    bone: Mask
    calcified: Mask
    inside: Mask


def find_skull(hu: Hu) -> Skull:
    """The skull of a stack whose bone saturates."""
    dense = hu >= hu.max() - 0.5
    bone = _without_small(dense, _SKULL_PIXELS + 1)
    inside = [
        ndimage.binary_fill_holes(ndimage.binary_closing(plane, iterations=3)) & ~plane
        for plane in bone
    ]
    return Skull(bone, dense & ~bone, np.stack(inside))


def hu_of_ranks(grey: npt.NDArray[np.uint8]) -> Hu:
    """HU of a stack whose levels lie one HU apart, whatever grey they were shown in.

    A stack of 121 levels shows the window from -20 to 100 HU. Another starts at 0 HU; where its
    brain would then lie more than 6 HU from a brain's 29, it starts where that fits.
    """
    levels = np.unique(grey)
    ranks = np.searchsorted(levels, grey).astype(np.float32)
    low, count = _BRAIN_WINDOW
    if len(levels) == count:
        return ranks + np.float32(low)
    found = brain_level(ranks, find_skull(ranks))
    shift = 0 if found is None or abs(found - BRAIN_HU) < 6 else round(BRAIN_HU - found)
    return ranks + np.float32(shift)


def hu_of_window(grey: npt.NDArray[np.uint8], low: float, high: float) -> Hu:
    """HU of a stack that shows the window from ``low`` to ``high`` linearly in 0..255."""
    return (low + grey.astype(np.float32) * ((high - low) / 255)).astype(np.float32)


def brain_level(hu: Hu, skull: Skull) -> float | None:
    """Median HU of what lies well inside the skull; None where there is no skull."""
    values = hu[_eroded(skull.inside, 8)]
    values = values[(values > 5) & (values < 60)]
    return float(np.median(values)) if values.size else None


def head_spacing_mm(hu: Hu) -> float:
    """In-plane voxel size, from the largest cross-section of the head; 5 % off is usual."""
    dense = hu >= hu.max() - 3
    areas = [
        ndimage.binary_fill_holes(ndimage.binary_closing(plane, iterations=3)).sum()
        for plane in dense
    ]
    return HEAD_MM / float(max(areas)) ** 0.5


def mark_bleeds(hu: Hu, boxes: Sequence[Sequence[Box]]) -> tuple[Mask, Mask]:
    """Bleeds in the boxes of a stack at about 0.5 mm, and what nobody can tell.

    Blood is 20 HU denser than the patient's own brain, grows through what is 16 HU denser within
    12 pixels around the box, and into slices without a box as far as it goes on there. What lies
    outside the skull or within 3 pixels of it is none, nor are parts under 40 voxels, parts half of
    which lie within 12 pixels of the skull, and small parts around a calcification.

    Args:
        hu: The stack, ``(z, y, x)``.
        boxes: For each slice the boxes around its lesions.

    Returns:
        The bleed, and voxels that may or may not be part of it: its rim, fainter parts that are
        connected to it, and the parts that were left out for lying beside the skull.
    """
    skull = find_skull(hu)
    smooth = ndimage.gaussian_filter(hu, (0, 1.2, 1.2))
    level = brain_level(smooth, skull) or BRAIN_HU
    # a slice whose ring of bone is open, as at the skull's base, encloses nothing: others tell
    within = np.stack([skull.inside[max(0, z - 2) : z + 7].any(0) for z in range(len(hu))])
    allowed = within & ~_dilated(skull.bone, 3)
    bright = (smooth > level + 16) & allowed
    dense = (smooth > level + 20) & allowed
    inside, around = _boxes_of(hu.shape, boxes, 0), _boxes_of(hu.shape, boxes, 12)
    bleed = ndimage.binary_propagation(dense & inside, mask=bright & around)
    boxed = np.asarray(inside.any((1, 2)))
    _follow(bleed, bright, dense, around, boxed)
    bleed = np.stack([ndimage.binary_fill_holes(ndimage.binary_opening(p)) for p in bleed])
    bleed, beside_skull = _sorted_out(bleed & allowed, skull)
    rim = _dilated(bleed, 2) & (smooth > level + 8)
    faint = (ndimage.gaussian_filter(hu, (0, 2, 2)) > level + 9) & allowed & around
    grown = ndimage.binary_propagation(bleed & faint, mask=faint | bleed)
    disc = np.hypot(*np.mgrid[-2:3, -2:3]) <= 2.3
    grown = np.stack([ndimage.binary_opening(plane, disc) for plane in grown])
    return bleed, (rim | grown | beside_skull) & ~bleed


def mark_in_regions(
    hu: Hu, regions: Sequence[Sequence[Region]], in_plane_mm: float
) -> tuple[Mask, Mask]:
    """Bleeds in the regions of a stack, up to the skull, and what nobody can tell.

    Blood is 14 HU denser than the patient's own brain. What saturates in pieces of 4 mm2 or more is
    bone or calcification; it, and about one pixel along it of which bone has a part, are no blood,
    nor do they make what lies beside them look denser. Holes are filled, and parts under 8 mm2
    dropped.

    Args:
        hu: The stack, ``(z, y, x)``, at about 0.5 to 1 mm.
        regions: For each slice where its bleeds lie.
        in_plane_mm: Size of a pixel.

    Returns:
        The bleed, and in slices with a region voxels that may or may not be part of it: its rim,
        the bone's edge along it, pockets between it and the skull, what is over 10 HU denser than
        brain within 3 mm around a region, what lies in an unsure region, and what is as dense as
        blood anywhere else in the skull.
    """
    if not any(regions):
        return np.zeros(hu.shape, bool), np.zeros(hu.shape, bool)
    pixel_mm2 = in_plane_mm**2
    bone = _without_small(hu >= BONE_HU, 4 / pixel_mm2)
    edge = _dilated(bone, max(1, round(0.7 / in_plane_mm))) & ~bone
    soft = ~bone & ~edge
    sigma = (0, 0.7 / in_plane_mm, 0.7 / in_plane_mm)
    weight = ndimage.gaussian_filter(soft.astype(np.float32), sigma)
    smooth = ndimage.gaussian_filter(np.where(soft, hu, 0), sigma) / np.maximum(weight, 1e-3)
    skull = find_skull(hu)
    level = brain_level(smooth, skull) or BRAIN_HU
    within = _intracranial(skull)
    sure = _regions_of(hu.shape, regions, True) & within
    unsure = _regions_of(hu.shape, regions, False) & within
    dense = (smooth > level + 14) & soft & within
    bleed = np.stack(
        [ndimage.binary_fill_holes(ndimage.binary_opening(p)) for p in dense & sure & ~unsure]
    )
    bleed = _without_small(bleed & soft, 8 / pixel_mm2)
    near = _dilated(sure, round(3 / in_plane_mm)) & within
    beside = _dilated(bleed, 2)
    closed = [ndimage.binary_closing(p, iterations=2) for p in (bleed | ~soft) & near]
    pockets = np.stack([ndimage.binary_fill_holes(p) for p in closed]) & soft
    doubtful = (
        np.stack([ndimage.binary_opening(p) for p in dense])
        | (near & soft & (smooth > level + 10))
        | (beside & soft & (smooth > level + 6))
        | (beside & edge)
        | (unsure & ~bone)
        | pockets
    )
    in_slice = np.array([bool(found) for found in regions])[:, None, None]
    return bleed, doubtful & in_slice & ~bleed


def strip_skull(hu: Hu, margin: int, background: float) -> tuple[Hu, Mask]:
    """A stack as a skull stripper leaves it, and what was kept: the inside of the skull.

    Args:
        hu: The stack, at about 0.5 to 1 mm.
        margin: Pixels by which the rim is eroded; negative keeps some of the inner table.
        background: What stands outside.
    """
    kept = np.zeros(hu.shape, bool)
    for z, plane in enumerate(hu >= hu.max() - 2):
        filled = ndimage.binary_fill_holes(ndimage.binary_closing(plane, iterations=3))
        kept[z] = ndimage.binary_opening(filled & ~ndimage.binary_dilation(plane), iterations=2)
    kept = _without_small(kept, 151, corners=False)
    if margin > 0:
        kept = _eroded(kept, margin)
    elif margin < 0:
        kept = _dilated(kept, -margin)
    return np.where(kept, hu, np.float32(background)).astype(np.float32), kept


def _boxes_of(shape: tuple[int, ...], boxes: Sequence[Sequence[Box]], more: int) -> Mask:
    """The boxes as a mask, each larger by ``more`` pixels on every side."""
    found = np.zeros(shape, bool)
    for z, in_slice in enumerate(boxes):
        for x0, y0, x1, y1 in in_slice:
            rows = slice(max(0, y0 - more), y1 + 1 + more)
            found[z, rows, max(0, x0 - more) : x1 + 1 + more] = True
    return found


def _regions_of(shape: tuple[int, ...], regions: Sequence[Sequence[Region]], sure: bool) -> Mask:
    """The sure or the unsure regions as a mask: pixels whose centres they hold."""
    height, width = shape[1:]
    y = (np.arange(height)[:, None] + 0.5) / height
    x = (np.arange(width) + 0.5) / width
    found = np.zeros(shape, bool)
    for z, in_slice in enumerate(regions):
        for region in in_slice:
            if region.sure != sure:
                continue
            odd = np.zeros((height, width), bool)  # crossed, going right, an odd number of sides
            ends = region.outline[1:] + region.outline[:1]
            for (x0, y0), (x1, y1) in zip(region.outline, ends, strict=True):
                if y0 != y1:
                    odd ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
            found[z] |= odd
    return found


def _intracranial(skull: Skull) -> Mask:
    """What the skull encloses, also where its ring is open by a fracture or at its base."""
    found = skull.inside.copy()
    for z, plane in enumerate(skull.inside):
        bone = np.pad(skull.bone[z], 8)
        ring = ndimage.binary_fill_holes(ndimage.binary_closing(bone, iterations=8))
        bridged = (ring & ~bone)[8:-8, 8:-8]
        near = skull.inside[max(0, z - 2) : z + 7].any(0)
        if plane.sum() < 0.6 * max(bridged.sum(), near.sum()):
            found[z] = bridged if bridged.sum() >= 0.6 * near.sum() else near
    return found


def _without_small(mask: Mask, pixels: float, *, corners: bool = True) -> Mask:
    """Each slice without its pieces of fewer pixels; what touches by a corner may be one piece."""
    found = np.zeros_like(mask)
    for z, plane in enumerate(mask):
        parts, count = ndimage.label(plane, np.ones((3, 3)) if corners else None)
        if count:
            sizes = ndimage.sum_labels(plane, parts, range(1, count + 1))
            found[z] = np.isin(parts, 1 + np.flatnonzero(sizes >= pixels))
    return found


def _follow(
    bleed: Mask, bright: Mask, dense: Mask, around: Mask, boxed: npt.NDArray[np.bool_]
) -> None:
    """Carry a bleed into slices that have no box, up and down, as long as it goes on.

    ``bleed`` and ``around`` grow in place.
    """
    count = len(bleed)
    for step in (1, -1):
        for z in range(count)[::step]:
            before = z - step
            if boxed[z] or not 0 <= before < count or (bleed[before] & dense[z]).sum() < 20:
                continue
            reach = ndimage.binary_dilation(ndimage.binary_opening(bleed[before]), iterations=4)
            bleed[z] = ndimage.binary_propagation(bleed[before] & bright[z], mask=bright[z] & reach)
            around[z] |= reach


def _sorted_out(bleed: Mask, skull: Skull) -> tuple[Mask, Mask]:
    """The parts that are bleeds, and those that lie beside the skull and may be none."""
    parts, count = ndimage.label(bleed)
    if not count:
        return bleed, np.zeros_like(bleed)
    index = range(1, count + 1)
    sizes = ndimage.sum_labels(bleed, parts, index)
    beside = ndimage.sum_labels(_dilated(skull.bone, 12), parts, index) / sizes
    calcified = ndimage.sum_labels(_dilated(skull.calcified, 2), parts, index) / sizes
    around_calcification = (sizes < 250) & (calcified > 0.15)
    kept = (sizes > 40) & (beside < 0.5) & ~around_calcification
    largest = int(np.argmax(np.where(around_calcification, 0, sizes)))
    kept[largest] |= sizes[largest] > 300  # the lesion itself, which may lie at the skull
    doubtful = ~kept & ~around_calcification
    return (
        np.isin(parts, 1 + np.flatnonzero(kept)),
        np.isin(parts, 1 + np.flatnonzero(doubtful)),
    )


def _dilated(mask: Mask, pixels: int) -> Mask:
    return np.stack([ndimage.binary_dilation(plane, iterations=pixels) for plane in mask])


def _eroded(mask: Mask, pixels: int) -> Mask:
    return np.stack([ndimage.binary_erosion(plane, iterations=pixels) for plane in mask])
