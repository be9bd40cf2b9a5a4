"""Pictures for people: axial slices with segmentations outlined."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ichseg import ndimage
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
TEXT_PX = 20  # size of the font; its capitals are CAPITAL_PX high
CAPITAL_PX = 15
PANEL_PX = 256  # longer side of one slice
TITLE_PX = 28
COLUMNS = 5
MOST_SLICES = 20
MOST_MASK_SLICES = 15  # the rest shows the head around it
STRIP_PANEL_PX = 400
STRIP_SLICES = 8
JPEG_QUALITY = 88


def draw_overlay(
    image: Volume,
    mask: Volume,
    *,
    title: str = "",
    is_ct: bool = True,
    reference: Volume | None = None,
) -> Image.Image:
    """Draw a montage of the head at brain window with the mask outlined; nothing is written.

    Slices run from the lowest to the highest and are seen from the feet, as radiologists do: the
    patient's right is on the left, the front is up. An oblique volume is turned by the nearest
    quarter turns only. The number on each slice counts from the lowest, which is 1. At most 20
    slices are shown, those with mask before others. Not for diagnosis.

    Args:
        image: The scan.
        mask: Its mask, of the same shape; everything but 0 is outlined.
        title: One line above the slices.
        is_ct: Whether the scan is in HU; else it is shown whole, in a window that fits it.
        reference: A mask to compare with, dashed, each of its labels in a colour of its own.

    Returns:
        A picture of Pillow, which a notebook shows where it is the last thing of a cell.

    Raises:
        InputError: The shapes differ.
    """
    masks = {"prediction": mask.with_voxels((mask.voxels != 0).view(np.uint8))}
    if reference is not None:
        masks["reference"] = reference
    framed = frame(image, masks, is_ct=is_ct)
    window = BRAIN if is_ct else fitting_window(framed)
    panels = []
    for index in _choose_slices(_with_mask(framed), len(framed.image)):
        panel = Image.fromarray(draw_slice(framed, index, window, PANEL_PX))
        _draw_text(panel, str(index + framed.first_slice + 1), top=4)
        _draw_text(panel, "R", top=24)
        panels.append(panel)
    return _arrange(panels, title)


def write_overlay(
    image: Volume,
    mask: Volume,
    path: Path,
    *,
    title: str = "",
    is_ct: bool = True,
    reference: Volume | None = None,
) -> None:
    """Write the picture that ``draw_overlay`` draws as a PNG.

    Args:
        image: The scan.
        mask: Its mask, of the same shape.
        path: A file that ends in ``.png``; it is replaced whole or not at all.
        title: One line above the slices.
        is_ct: Whether the scan is in HU.
        reference: A mask to compare with.

    Raises:
        InputError: The shapes differ.
        OutputError: The file cannot be written.
    """
    drawn = draw_overlay(image, mask, title=title, is_ct=is_ct, reference=reference)
    _write(drawn, path, "PNG")


def write_strip(
    framed: Framed, path: Path, *, window: tuple[float, float]
) -> tuple[list[int], tuple[int, int]]:
    """Write a JPEG of up to 8 slices, one below another, those with masks before others.

    Args:
        framed: The part of the scan that is shown.
        path: A file that ends in ``.jpg``; it is replaced whole or not at all.
        window: Width and level, in the scan's units.

    Returns:
        The indices of the slices in ``framed``, from the lowest, and the width and height of each
        in pixels.

    Raises:
        OutputError: The file cannot be written.
    """
    chosen = _choose_slices(
        _with_mask(framed), len(framed.image), most=STRIP_SLICES, most_with_mask=STRIP_SLICES
    )
    panels = [draw_slice(framed, index, window, STRIP_PANEL_PX) for index in chosen]
    strip = Image.fromarray(np.concatenate(panels))
    _write(strip, path, "JPEG", quality=JPEG_QUALITY, progressive=True)
    height, width, _ = panels[0].shape
    return chosen, (width, height)


def fitting_window(framed: Framed) -> tuple[float, float]:
    """Width and level that span all but the darkest and the brightest of the intensities."""
    low, high = np.percentile(framed.image.astype(np.float32), [0.5, 99.5], overwrite_input=True)
    return max(float(high - low), 1e-6), float(low + high) / 2


def draw_slice(framed: Framed, index: int, window: tuple[float, float], panel_px: int) -> Picture:
    """Draw one slice with square pixels, windowed, each label of each mask outlined.

    The reference is dashed, and above what was found: where they coincide, both show.

    Args:
        framed: The part of the scan that is shown.
        index: Index of the slice in it.
        window: Width and level, in the scan's units.
        panel_px: Length of the picture's longer side.
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
    """Indices of the slices in which any mask has a voxel."""
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
    """Choose slices, at most ``most``: some with the mask, evenly, then the others, evenly.

    Args:
        with_mask: Indices of the slices that have a voxel of a mask.
        count: How many slices there are.
        most: How many are chosen at most.
        most_with_mask: How many of them have the mask at most, while there are others.
    """
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
    """Draw one slice ``(y, x)`` in grey, windowed, with this many pixels along a voxel's sides."""
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
    """Keep two thirds of each closed line, in pieces by the direction from its middle."""
    lines, count = ndimage.label(outline, np.ones((3, 3)))
    kept = np.zeros_like(outline)
    for line in range(1, count + 1):
        rows, columns = np.nonzero(lines == line)
        turns = np.arctan2(rows - rows.mean(), columns - columns.mean()) / (2 * np.pi)
        dashes = max(5, round(len(rows) / OUTLINE_PX / DASH_PX))
        on = (turns * dashes) % 1 < 2 / 3
        kept[rows[on], columns[on]] = True
    return kept


def _draw_text(picture: Image.Image, text: str, *, top: int) -> None:
    """Write a line of text at the left of a picture, so many pixels below its top."""
    font = ImageFont.load_default(TEXT_PX)
    ImageDraw.Draw(picture).text((4, top + CAPITAL_PX), text, TEXT_RGB, font, anchor="ls")


def _arrange(panels: list[Image.Image], title: str) -> Image.Image:
    """Put panels of one size together, row by row under the title."""
    width, height = panels[0].size
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    picture = Image.new("RGB", (columns * width, TITLE_PX + rows * height))
    for position, panel in enumerate(panels):
        row, column = divmod(position, columns)
        picture.paste(panel, (column * width, TITLE_PX + row * height))
    _draw_text(picture, title, top=(TITLE_PX - CAPITAL_PX) // 2)
    return picture


def _write(picture: Image.Image, path: Path, kind: str, **options: int) -> None:
    """Write a picture as this kind of file, with options that the kind has."""
    with replacing(path, suffix=path.suffix) as temporary:
        encoded = io.BytesIO()  # a full disk has a clear error outside the encoder only
        picture.save(encoded, kind, **options)
        temporary.write_bytes(encoded.getvalue())
