"""Pictures for people: a montage of axial slices with the segmentation outlined."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage

from ichseg.errors import OutputError
from ichseg.orient import orient_axes
from ichseg.volume import Volume, replacing

WINDOW_LEVEL_HU = 40.0
WINDOW_WIDTH_HU = 80.0
OUTLINE_RGB = (230, 159, 0)  # the orange of Okabe and Ito's colour-blind-safe palette
OUTLINE_PX = 2
TEXT_RGB = (200, 200, 200)
PANEL_PX = 256  # longer side of one slice
TITLE_PX = 28
COLUMNS = 5
MOST_SLICES = 20
MOST_MASK_SLICES = 15  # the rest shows the head around it
HEAD_ABOVE_HU = -300.0
HEAD_MARGIN_MM = 6.0

# 3 x 5 pixels each: five rows from the top, three bits a row
_FONT = """
0 75557 1 26227 2 71747 3 71717 4 55711 5 74717 6 74757 7 71122 8 75757 9 75717 A 25755 B 65656
C 34443 D 65556 E 74647 F 74644 G 34553 H 55755 I 72227 J 11152 K 55655 L 44447 M 57755 N 65555
O 25552 P 65644 Q 25573 R 65655 S 34216 T 72222 U 55557 V 55552 W 55775 X 55255 Y 55222 Z 71247
. 00002 , 00024 - 00700 _ 00007 : 02020 / 11244 % 51245 ( 12221 ) 42224 + 02720
"""
_GLYPHS = {glyph: int(rows, 8) for glyph, rows in re.findall(r"(\S) (\d{5})", _FONT)}


def write_overlay(image: Volume, mask: Volume, path: Path, *, title: str = "") -> None:
    """Write a PNG montage of the head at brain window with the mask outlined.

    Slices run from the lowest to the highest and are seen from the feet, as radiologists do: the
    patient's right is on the left, the front is up. An oblique volume is turned by the nearest
    quarter turns only. The number on each slice counts from the lowest, which is 0. At most 20
    slices are shown, those with mask before others. Not for diagnosis.

    Args:
        image: CT in HU.
        mask: Same shape; everything but 0 is outlined.
        path: Ends in ``.png``; replaced whole or not at all.
        title: One line of ASCII above the slices.

    Raises:
        ValueError: The shapes differ.
        OutputError: The file cannot be written.
    """
    if mask.voxels.shape != image.voxels.shape:
        raise ValueError(f"image has shape {image.voxels.shape}, its mask {mask.voxels.shape}")
    axes = orient_axes(image)
    spacing_mm = np.array(image.spacing_mm)[list(axes.permutation)]
    hu = axes.apply(image.voxels).astype(np.float32)
    inside = axes.apply(mask.voxels).astype(bool)

    box = _head_box(hu, inside, spacing_mm)
    hu, inside = hu[box], inside[box]
    px_mm = max(np.array(hu.shape[1:]) * spacing_mm[1:]) / PANEL_PX
    panels = []
    for index in _choose_slices(np.flatnonzero(inside.any(axis=(1, 2))), len(hu)):
        panel = _draw_slice(hu[index], inside[index], spacing_mm[1:] / px_mm)
        _draw_text(panel, str(index + box[0].start), 4, 4)
        _draw_text(panel, "R", 24, 4)
        panels.append(panel)
    with replacing(path, suffix=".png") as temporary:
        picture = sitk.GetImageFromArray(_arrange(panels, title), isVector=True)
        try:
            sitk.WriteImage(picture, str(temporary))
        except RuntimeError as error:
            raise OutputError(f"{path}: cannot write the overlay picture") from error


def _head_box(
    hu: npt.NDArray[np.float32], inside: npt.NDArray[np.bool_], spacing_mm: npt.NDArray[np.float64]
) -> tuple[slice, slice, slice]:
    """Box around the head without headrest, and the mask; everything if no head is found."""
    every = np.maximum(1, np.floor(2.0 / spacing_mm)).astype(int)
    coarse = hu[:: every[0], :: every[1], :: every[2]] > HEAD_ABOVE_HU
    plane = ndimage.generate_binary_structure(2, 1)[None]
    labels, count = ndimage.label(ndimage.binary_opening(coarse, plane, iterations=2))
    if count == 0:
        return (slice(0, hu.shape[0]), slice(0, hu.shape[1]), slice(0, hu.shape[2]))
    head = ndimage.find_objects(labels)[np.argmax(np.bincount(labels.ravel())[1:])]
    margin = np.ceil([0, HEAD_MARGIN_MM / spacing_mm[1], HEAD_MARGIN_MM / spacing_mm[2]])
    low = np.array([s.start for s in head]) * every - margin
    high = np.array([s.stop for s in head]) * every + margin
    if inside.any():
        of_mask = ndimage.find_objects(inside.astype(np.uint8))[0]
        low = np.minimum(low, [s.start for s in of_mask])
        high = np.maximum(high, [s.stop for s in of_mask])
    z, y, x = (
        slice(max(0, int(first)), min(size, int(end)))
        for first, end, size in zip(low, high, hu.shape, strict=True)
    )
    return z, y, x


def _choose_slices(with_mask: npt.NDArray[np.intp], count: int) -> list[int]:
    """At most 20 of so many slices: up to 15 of the mask's, evenly, then the others, evenly."""
    others = np.setdiff1d(np.arange(count), with_mask)
    chosen = _spread(with_mask, max(MOST_MASK_SLICES, MOST_SLICES - len(others)))
    return sorted(chosen + _spread(others, MOST_SLICES - len(chosen)))


def _spread(indices: npt.NDArray[np.intp], most: int) -> list[int]:
    """At most so many of the indices, first and last among them."""
    if len(indices) <= most:
        return [int(i) for i in indices]
    return [int(indices[round(at)]) for at in np.linspace(0, len(indices) - 1, most)]


def _draw_slice(
    hu: npt.NDArray[np.float32],
    inside: npt.NDArray[np.bool_],
    px_per_voxel: npt.NDArray[np.float64],
) -> npt.NDArray[np.uint8]:
    """One slice ``(y, x)`` with square pixels, windowed, outlined: ``(rows, columns, 3)``."""
    size = [max(1, round(n * float(px))) for n, px in zip(hu.shape, px_per_voxel, strict=True)]
    step = np.array(hu.shape) / size  # voxels a pixel
    # Clipped first, so that bone does not blur into brain; blurred, so that no voxel is skipped.
    grey = np.clip((hu - WINDOW_LEVEL_HU) / WINDOW_WIDTH_HU + 0.5, 0, 1)
    grey = ndimage.gaussian_filter(grey, np.where(step > 1, 0.3 * step, 0), mode="nearest")
    grey = ndimage.affine_transform(
        grey, step, offset=(step - 1) / 2, output_shape=tuple(size), order=1, mode="nearest"
    )
    panel = np.repeat(np.rint(255 * grey).astype(np.uint8)[..., None], 3, axis=2)
    # The largest under each pixel: a bleed of one voxel stays visible.
    for axis in (0, 1):
        starts = np.minimum(np.arange(size[axis]) * step[axis], hu.shape[axis] - 1).astype(int)
        inside = np.logical_or.reduceat(inside, starts, axis=axis)
    square = np.ones((2 * OUTLINE_PX + 1, 2 * OUTLINE_PX + 1), dtype=bool)
    panel[ndimage.binary_dilation(inside, square) & ~inside] = OUTLINE_RGB
    return panel


def _draw_text(picture: npt.NDArray[np.uint8], text: str, top: int, left: int) -> None:
    """Write into a picture; what does not fit is cut off, unknown characters are blank."""
    scale = 3
    for position, character in enumerate(text.upper()):
        glyph = _GLYPHS.get(character, 0)
        bits = [[glyph >> 3 * row + column & 1 for column in (2, 1, 0)] for row in (4, 3, 2, 1, 0)]
        ink = np.array(bits, dtype=bool).repeat(scale, axis=0).repeat(scale, axis=1)
        place = picture[top:, left + 4 * scale * position :][: 5 * scale, : 3 * scale]
        place[ink[: place.shape[0], : place.shape[1]]] = TEXT_RGB


def _arrange(panels: list[npt.NDArray[np.uint8]], title: str) -> npt.NDArray[np.uint8]:
    """Panels of one size, row by row under the title."""
    height, width, _ = panels[0].shape
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    picture = np.zeros((TITLE_PX + rows * height, columns * width, 3), dtype=np.uint8)
    for position, panel in enumerate(panels):
        top, left = TITLE_PX + position // columns * height, position % columns * width
        picture[top : top + height, left : left + width] = panel
    _draw_text(picture, title, (TITLE_PX - 15) // 2, 4)
    return picture
