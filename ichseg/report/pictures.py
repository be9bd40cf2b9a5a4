"""Pictures for people: axial slices with segmentations outlined."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage

from ichseg.errors import OutputError
from ichseg.files import replacing
from ichseg.report.framing import Framed, frame
from ichseg.scan.volume import Volume

Picture = npt.NDArray[np.uint8]  # (rows, columns, 3)
BRAIN = (80.0, 40.0)  # HU, width and level of the window
# Okabe and Ito's colours, which the colour-blind tell apart: warm ones for what was found, cool
# ones for the reference; label 1 has the first, label 2 the second, and so on in turn.
COLOURS = {
    "prediction": ((230, 159, 0), (213, 94, 0), (240, 228, 66)),
    "reference": ((86, 180, 233), (0, 158, 115), (0, 114, 178)),
}
OUTLINE_RGB = COLOURS["prediction"][0]
OUTLINE_PX = 2
DASH_PX = 14  # a dash and the gap after it
TEXT_RGB = (200, 200, 200)
PANEL_PX = 256  # longer side of one slice
TITLE_PX = 28
COLUMNS = 5
MOST_SLICES = 20
MOST_MASK_SLICES = 15  # the rest shows the head around it
STRIP_PANEL_PX = 400
STRIP_SLICES = 8
JPEG_QUALITY = 88

# 3 x 5 pixels each: five rows from the top, three bits a row
_FONT = """
0 75557 1 26227 2 71747 3 71717 4 55711 5 74717 6 74757 7 71122 8 75757 9 75717 A 25755 B 65656
C 34443 D 65556 E 74647 F 74644 G 34553 H 55755 I 72227 J 11152 K 55655 L 44447 M 57755 N 65555
O 25552 P 65644 Q 25573 R 65655 S 34216 T 72222 U 55557 V 55552 W 55775 X 55255 Y 55222 Z 71247
. 00002 , 00024 - 00700 _ 00007 : 02020 / 11244 % 51245 ( 12221 ) 42224 + 02720
"""
_GLYPHS = {glyph: int(rows, 8) for glyph, rows in re.findall(r"(\S) (\d{5})", _FONT)}


def write_overlay(
    image: Volume, mask: Volume, path: Path, *, title: str = "", is_ct: bool = True
) -> None:
    """Write a PNG montage of the head at brain window with the mask outlined.

    Slices run from the lowest to the highest and are seen from the feet, as radiologists do: the
    patient's right is on the left, the front is up. An oblique volume is turned by the nearest
    quarter turns only. The number on each slice counts from the lowest, which is 0. At most 20
    slices are shown, those with mask before others. Not for diagnosis.

    Args:
        image: The scan.
        mask: Same shape; everything but 0 is outlined.
        path: Ends in ``.png``; replaced whole or not at all.
        title: One line of ASCII above the slices.
        is_ct: Whether it is in HU; else it is shown whole, in a window that fits it.

    Raises:
        ValueError: The shapes differ.
        OutputError: The file cannot be written.
    """
    framed = frame(image, {"prediction": mask.with_voxels(mask.voxels != 0)}, is_ct=is_ct)
    window = BRAIN if is_ct else fitting_window(framed)
    panels = []
    for index in _choose_slices(_with_mask(framed), len(framed.image)):
        panel = draw_slice(framed, index, window, PANEL_PX)
        _draw_text(panel, str(index + framed.first_slice), 4, 4)
        _draw_text(panel, "R", 24, 4)
        panels.append(panel)
    _write(_arrange(panels, title), path)


def write_strip(
    framed: Framed, path: Path, *, window: tuple[float, float]
) -> tuple[list[int], tuple[int, int]]:
    """Write a JPEG of up to 8 slices, one below another, those with masks before others.

    Args:
        framed: The part of the scan that is shown.
        path: Ends in ``.jpg``; replaced whole or not at all.
        window: Width and level.

    Returns:
        Indices of the slices in ``framed``, from the lowest; width and height of each in pixels.

    Raises:
        OutputError: The file cannot be written.
    """
    chosen = _choose_slices(
        _with_mask(framed), len(framed.image), most=STRIP_SLICES, most_with_mask=STRIP_SLICES
    )
    panels = [draw_slice(framed, index, window, STRIP_PANEL_PX) for index in chosen]
    _write(np.concatenate(panels), path)
    height, width, _ = panels[0].shape
    return chosen, (width, height)


def fitting_window(framed: Framed) -> tuple[float, float]:
    """Width and level that span all but the darkest and the brightest of the intensities."""
    low, high = np.percentile(framed.image.astype(np.float32), [0.5, 99.5])
    return max(float(high - low), 1e-6), float(low + high) / 2


def draw_slice(framed: Framed, index: int, window: tuple[float, float], panel_px: int) -> Picture:
    """One slice with square pixels, windowed, each label of each mask outlined.

    The reference is dashed, and above what was found: where they coincide, both show.

    Args:
        framed: The part of the scan that is shown.
        index: Of the slice in it.
        window: Width and level, in the scan's units.
        panel_px: Longer side of the picture.
    """
    extent_mm = np.array(framed.image.shape[1:]) * framed.spacing_mm[1:]
    px_per_voxel = panel_px * np.array(framed.spacing_mm[1:]) / max(extent_mm)
    panel = _draw_grey(framed.image[index].astype(np.float32), window, px_per_voxel)
    for name in (name for name in COLOURS if name in framed.masks):
        masks, colours = framed.masks[name], COLOURS[name]
        for label in np.unique(masks[index]):
            if label:
                outline = _outline(masks[index] == label, panel.shape[:2])
                if name == "reference":
                    outline = _dashed(outline)
                panel[outline] = colours[(int(label) - 1) % len(colours)]
    return panel


def _with_mask(framed: Framed) -> npt.NDArray[np.intp]:
    """Slices in which any mask has a voxel."""
    found = np.zeros(len(framed.image), dtype=bool)
    for labels in framed.masks.values():
        found |= labels.any(axis=(1, 2))
    return np.flatnonzero(found)


def _choose_slices(
    with_mask: npt.NDArray[np.intp],
    count: int,
    *,
    most: int = MOST_SLICES,
    most_with_mask: int = MOST_MASK_SLICES,
) -> list[int]:
    """At most so many slices: up to 15 of the mask's, evenly, then the others, evenly."""
    others = np.setdiff1d(np.arange(count), with_mask)
    chosen = _spread(with_mask, max(most_with_mask, most - len(others)))
    return sorted(chosen + _spread(others, most - len(chosen)))


def _spread(indices: npt.NDArray[np.intp], most: int) -> list[int]:
    """At most so many of the indices, first and last among them."""
    if len(indices) <= most:
        return [int(i) for i in indices]
    return [int(indices[round(at)]) for at in np.linspace(0, len(indices) - 1, most)]


def _draw_grey(
    intensities: npt.NDArray[np.float32],
    window: tuple[float, float],
    px_per_voxel: npt.NDArray[np.float64],
) -> Picture:
    """One slice ``(y, x)`` with square pixels, windowed."""
    size = [
        max(1, round(n * float(p))) for n, p in zip(intensities.shape, px_per_voxel, strict=True)
    ]
    step = np.array(intensities.shape) / size  # voxels a pixel
    # Clipped first, so that bone does not blur into brain; blurred, so that no voxel is skipped.
    width, level = window
    grey = np.clip((intensities - level) / width + 0.5, 0, 1)
    grey = ndimage.gaussian_filter(grey, np.where(step > 1, 0.3 * step, 0), mode="nearest")
    grey = ndimage.affine_transform(
        grey, step, offset=(step - 1) / 2, output_shape=tuple(size), order=1, mode="nearest"
    )
    return np.repeat(np.rint(255 * grey).astype(np.uint8)[..., None], 3, axis=2)


def _outline(inside: npt.NDArray[np.bool_], size: Sequence[int]) -> npt.NDArray[np.bool_]:
    """The pixels around a mask ``(y, x)`` in a picture of this size."""
    # The largest under each pixel: a bleed of one voxel stays visible.
    for axis in (0, 1):
        at = np.arange(size[axis]) * (inside.shape[axis] / size[axis])
        starts = np.minimum(at, inside.shape[axis] - 1).astype(int)
        inside = np.logical_or.reduceat(inside, starts, axis=axis)
    square = np.ones((2 * OUTLINE_PX + 1, 2 * OUTLINE_PX + 1), dtype=bool)
    around: npt.NDArray[np.bool_] = ndimage.binary_dilation(inside, square) & ~inside
    return around


def _dashed(outline: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Two thirds of each closed line, in pieces by the direction from its middle."""
    lines, count = ndimage.label(outline, np.ones((3, 3)))
    kept = np.zeros_like(outline)
    for line in range(1, count + 1):
        rows, columns = np.nonzero(lines == line)
        turns = np.arctan2(rows - rows.mean(), columns - columns.mean()) / (2 * np.pi)
        dashes = max(5, round(len(rows) / OUTLINE_PX / DASH_PX))
        on = (turns * dashes) % 1 < 2 / 3
        kept[rows[on], columns[on]] = True
    return kept


def _draw_text(picture: Picture, text: str, top: int, left: int) -> None:
    """Write into a picture; what does not fit is cut off, unknown characters are blank."""
    scale = 3
    for position, character in enumerate(text.upper()):
        glyph = _GLYPHS.get(character, 0)
        bits = [[glyph >> 3 * row + column & 1 for column in (2, 1, 0)] for row in (4, 3, 2, 1, 0)]
        ink = np.array(bits, dtype=bool).repeat(scale, axis=0).repeat(scale, axis=1)
        place = picture[top:, left + 4 * scale * position :][: 5 * scale, : 3 * scale]
        place[ink[: place.shape[0], : place.shape[1]]] = TEXT_RGB


def _arrange(panels: list[Picture], title: str) -> Picture:
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


def _write(picture: Picture, path: Path) -> None:
    """As the kind of file that its name ends in, which is made in memory.

    Where a disk is full libpng says nothing, and libjpeg ends the process.
    """
    content = sitk.GetImageFromArray(picture, isVector=True)
    with replacing(path, suffix=path.suffix) as temporary, _memory_file() as memory:
        os.posix_fallocate(memory.fileno(), 0, picture.nbytes)  # RLIMIT_FSIZE holds here too
        name = f"/proc/self/fd/{memory.fileno()}"
        try:
            if path.suffix == ".jpg":
                sitk.WriteImage(content, name, True, JPEG_QUALITY, imageIO="JPEGImageIO")
            else:
                sitk.WriteImage(content, name, imageIO="PNGImageIO")
        except RuntimeError as error:
            raise OutputError(f"{path}: cannot write the picture") from error
        temporary.write_bytes(memory.read())


def _memory_file() -> BinaryIO:
    return os.fdopen(os.memfd_create("picture"), "rb")
