"""The files of one case for a page: written as each case ends, read when the page is made."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichseg.errors import OutputError
from ichseg.files import replacing
from ichseg.model import strict_json
from ichseg.report import CASES_FOLDER, pictures, viewer
from ichseg.report.framing import Framed, frame
from ichseg.scan.volume import Volume, write


@dataclass(frozen=True, slots=True)
class Shown:
    """What the page needs to know of a case's pictures and volumes.

    Attributes:
        name: The case's name.
        slug: What the names of its files begin with.
        is_ct: Whether intensities are in HU, so that window presets make sense.
        masks: Names of the masks: ``prediction``, ``reference`` or both.
        slices: Numbers of the slices in the strip, from the lowest, counted from 0.
        present: For each of these slices the names of the masks that have a voxel in it, with
            spaces between.
        largest_slice: Number of the slice with most of the masks, where the viewer opens.
        first_slice: Number of the lowest slice that the viewer has.
        all_slices: How many slices the whole scan has.
        panel_px: Width and height of one slice in the strip.
        merged: How many voxels along ``(z, y, x)`` are one in the viewer.
        window: Width and level of the pictures, in the scan's units.
    """

    name: str
    slug: str
    is_ct: bool
    masks: tuple[str, ...]
    slices: tuple[int, ...]
    present: tuple[str, ...]
    largest_slice: int
    first_slice: int
    all_slices: int
    panel_px: tuple[int, int]
    merged: tuple[int, int, int]
    window: tuple[float, float]


def write_case(
    folder: Path,
    name: str,
    image: Volume,
    masks: Mapping[str, Volume],
    *,
    is_ct: bool = True,
    beside: tuple[Volume, Volume] | None = None,
) -> None:
    """Write a case's pictures and volumes, for a page to show.

    They lie in ``folder/cases``: ``.jpg`` a strip of slices, ``.js`` the volumes for the viewer, at
    most 8 MB, ``_prediction.nii.gz`` what was found, in the scan's grid, for those who want it from
    the page, and ``.json`` what the page has to know of them. The last one is written last and an
    earlier one removed first, so that where anything fails the page has no pictures of the case.

    Args:
        folder: The folder of the page, made if need be.
        name: The case's name.
        image: The scan.
        masks: ``prediction``, ``reference`` or both, in the scan's grid.
        is_ct: Whether the scan is in HU; else nothing is cut off around it, and it is shown in a
            window that fits it.
        beside: Another scan in the same grid, and its mask, for a page that shows both side by
            side.

    Raises:
        InputError: A mask has another shape.
        OutputError: The folder cannot be written.
    """
    slug = slug_of(name)
    framed = frame(image, masks, is_ct=is_ct, beside=beside)
    window = pictures.BRAIN if is_ct else pictures.fitting_window(framed)
    cases = folder / CASES_FOLDER
    _remove(cases / f"{slug}.json")
    slices, panel_px = pictures.write_strip(framed, cases / f"{slug}.jpg", window=window)
    script = viewer.make_script(framed, slug, is_ct=is_ct)
    with replacing(cases / f"{slug}.js", suffix=".js") as temporary:
        temporary.write_text(script.text, encoding="ascii")
    if "prediction" in masks:
        write(masks["prediction"], cases / f"{slug}_prediction.nii.gz")
    shown = Shown(
        name=name.encode(errors="backslashreplace").decode(),  # it may be no text
        slug=slug,
        is_ct=is_ct,
        masks=tuple(masks),
        slices=tuple(framed.first_slice + index for index in slices),
        present=tuple(
            " ".join(key for key, labels in framed.masks.items() if labels[index].any())
            for index in slices
        ),
        largest_slice=framed.first_slice + _largest_slice(framed, slices),
        first_slice=framed.first_slice,
        all_slices=framed.slices,
        panel_px=panel_px,
        merged=script.merged,
        window=window,
    )
    with replacing(cases / f"{slug}.json", suffix=".json") as temporary:
        temporary.write_text(strict_json.dumps(shown), encoding="utf-8")


def memory_bytes(image: Volume, *, is_ct: bool) -> int:
    """Bytes that ``write_case`` and the overlay take beside the scan and its mask; measured.

    A mask once more, what the viewer gets, and for a scan that is not in HU its intensities twice.
    """
    voxels = image.voxels.size
    return voxels * (1 if is_ct else 6) + 9 * min(voxels, viewer.MOST_VOXELS) + 20 * 2**20


def files_of(folder: Path, name: str) -> tuple[Path, ...]:
    """The files of ``write_case``, of which the first says that the others are whole."""
    cases, slug = folder / CASES_FOLDER, slug_of(name)
    return tuple(cases / f"{slug}{end}" for end in (".json", ".js", ".jpg", "_prediction.nii.gz"))


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot remove ({error.strerror})") from error


def _largest_slice(framed: Framed, slices: Sequence[int]) -> int:
    """The slice with most of the reference, or else of what was found, or else in the middle."""
    for name in ("reference", "prediction"):
        if name in framed.masks and framed.masks[name].any():
            return int(np.count_nonzero(framed.masks[name], axis=(1, 2)).argmax())
    return slices[len(slices) // 2]


def read_case(folder: Path, name: str) -> Shown | None:
    """What ``write_case`` left of a case; None if it was not called for it.

    Raises:
        PlansError: The file holds something else.
    """
    path = folder / CASES_FOLDER / f"{slug_of(name)}.json"
    return strict_json.load(Shown, path) if path.is_file() else None


def slug_of(name: str) -> str:
    """A name for a case's files that needs no care in a URL or a file system.

    Names of letters, digits, ``_``, ``-`` and ``.`` are kept; others get a checksum, which tells
    them apart.
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).lstrip(".")[:80]
    if name and safe == name:
        return name
    return f"{safe}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
