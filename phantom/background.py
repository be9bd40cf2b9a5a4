"""Bleeds drawn into real scans, which keep their own noise, skull and everything else.

A scan whose values were cut to a window, as public sets are published, serves as well: bone that
saturates is given the density of bone for as long as it takes to find the brain.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ichseg.errors import DatasetError, InputError
from ichseg.scan.volume import Volume, read
from ichseg.wording import repeated, times
from phantom.anatomy import Anatomy, Array, enlarge, estimate_anatomy
from phantom.bleeds import cannot_be_blood, draw_bleed, label, oedema, rasterise

IGNORE_LABEL = 2  # the label of voxels that nobody could tell, in a dataset of real scans
_BONE_HU, _BRAIN_HU, _AIR_HU = 900.0, 34.0, -1000.0
_LABEL_HU = 90  # what is whiter before a bleed is drawn holds bone, and is not labelled
_WINDOW_TOP = (70, 130)  # where the upper end of a window lies whose bone saturates, in HU
_SKULL_PIXELS = 300  # a saturated piece of a slice is skull from this on; less is a calcification


@dataclass(frozen=True, slots=True)
class Background:
    """A real scan to draw bleeds into.

    Attributes:
        name: The name of its case.
        group: Its patient: what is drawn into it belongs to the same fold.
        image: Its file.
        label: The file of its labels, which are kept where nothing is drawn; None for none.
    """

    name: str
    group: str
    image: Path
    label: Path | None = None


@dataclass(frozen=True, slots=True)
class Painted:
    """A real scan with bleeds in it.

    Attributes:
        voxels: HU, ``(z, y, x)``.
        labels: The scan's own labels, and 1 where blood was drawn.
        spacing_mm: Voxel size ``(z, y, x)``.
        volumes_ml: Labelled volume of each kind that was drawn.
    """

    voxels: npt.NDArray[np.int16]
    labels: npt.NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]
    volumes_ml: dict[str, float]


def find_backgrounds(path: Path) -> tuple[Background, ...]:
    """The scan of that name, or all training scans of a folder in MSD layout.

    Raises:
        DatasetError: The folder is no such dataset, two of its cases have one name, or
            ``groups.csv`` beside it misses a case or puts one into two groups.
    """
    if not path.is_dir():
        return (Background(path.name, path.name, path),)
    listing = path / "dataset.json"
    try:
        table = json.loads(listing.read_text(encoding="utf-8"))
        files = [(path / each["image"], path / each["label"]) for each in table["training"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DatasetError(
            f"{path}: expected a scan or a folder in MSD layout: {repr(error)[:200]}"
        ) from error
    if not files:
        raise DatasetError(f"{listing}: no training cases, expected scans to draw bleeds into")
    names = [image.name.removesuffix(".gz").removesuffix(".nii") for image, _ in files]
    if twice := repeated(names):
        raise DatasetError(f"{listing}: two images are called {twice[0][:100]!r}")
    for pair in files:
        for file in pair:
            if not _is_file(file):
                raise DatasetError(f"{listing}: names {str(file)[:200]!r}, which is no file")
    groups = _groups(path / "groups.csv", names)
    return tuple(
        Background(name, groups[name], *pair) for name, pair in zip(names, files, strict=True)
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, for one
        return False


def _groups(table: Path, names: Sequence[str]) -> Mapping[str, str]:
    """The patient of each case; without a table each is one of its own."""
    if not table.exists():
        return {name: name for name in names}
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:  # spreadsheets write a mark
            rows = [(row["case"], row["group"]) for row in csv.DictReader(stream)]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise DatasetError(
            f"{table}: expected a table in UTF-8 with the columns case and group: "
            f"{repr(error)[:200]}"
        ) from error
    groups: dict[str, str] = {}
    for case, group in rows:
        if groups.setdefault(case, group) != group:
            raise DatasetError(f"{table}: case {case[:100]!r} is in two groups, expected one")
    missing = [name for name in names if not groups.get(name)]
    if missing:
        raise DatasetError(f"{table}: no group for case {missing[0][:100]!r}")
    return groups


def paint(
    background: Background, lesions: tuple[tuple[str, float], ...], rng: np.random.Generator
) -> Painted:
    """Draw bleeds into a real scan, one after the other.

    Args:
        background: The scan.
        lesions: Kind and wanted volume in mL of each bleed.
        rng: Draws places and shapes.

    Raises:
        InputError: The file is no CT, its brain is not found, or it has no room for the bleed.
    """
    scan = read(background.image)
    voxels, window = unwindowed(scan, background.image)
    labels = _own_labels(background, voxels.shape)
    volumes: dict[str, float] = {}
    for kind, volume_ml in lesions:
        try:
            voxels, added = insert_bleed(
                voxels, scan.spacing_mm, kind=kind, volume_ml=volume_ml, rng=rng
            )
        except ValueError as error:
            raise InputError(f"{background.image}: {error}") from error
        blood = (added != 0) & (labels != 1)
        volumes[kind] = volumes.get(kind, 0.0) + float(blood.sum()) * scan.voxel_ml
        labels[blood] = 1
    if window is not None:
        voxels = np.clip(voxels, *window)
    return Painted(voxels.astype(np.int16), labels, scan.spacing_mm, volumes)


def _own_labels(background: Background, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The labels that a scan has already; none by default.

    Raises:
        InputError: They are of another shape, or hold what is neither a bleed nor to be ignored.
    """
    if background.label is None:
        return np.zeros(shape, np.uint8)
    found = read(background.label).voxels
    if found.shape != shape:
        raise InputError(
            f"{background.label}: {times(found.shape)} voxels, expected {times(shape)} as in "
            f"{background.image}"
        )
    if not np.isin(found, (0, 1, IGNORE_LABEL)).all():
        raise InputError(f"{background.label}: expected the labels 0, 1 and {IGNORE_LABEL} alone")
    return found.astype(np.uint8)


def unwindowed(scan: Volume, path: Path) -> tuple[npt.NDArray[np.int16], tuple[int, int] | None]:
    """HU with air and bone as such, and the ends of the window that the scan had been cut to.

    Raises:
        InputError: The values are neither HU with air around the head nor a window of them.
    """
    values = np.round(scan.voxels.astype(np.float32))
    if not np.isfinite(values).all() or max(-values.min(), values.max()) > np.iinfo(np.int16).max:
        raise InputError(f"{path}: values that are no number or beyond 16 bits, expected HU")
    voxels = values.astype(np.int16)
    low, top = int(voxels.min()), int(voxels.max())
    if low <= -500:
        return voxels, None
    if not (-100 <= low <= 0 and _WINDOW_TOP[0] <= top <= _WINDOW_TOP[1]):
        raise InputError(
            f"{path}: values from {low} to {top}, expected HU with air around the head, or a "
            "window of them whose bone saturates"
        )
    skull = np.zeros(voxels.shape, bool)
    inside = np.zeros(voxels.shape, bool)
    for z, plane in enumerate(np.asarray(voxels >= top, bool)):
        parts, count = ndimage.label(plane, np.ones((3, 3)))
        if count:
            sizes = ndimage.sum_labels(plane, parts, range(1, count + 1))
            skull[z] = np.isin(parts, 1 + np.flatnonzero(np.asarray(sizes) > _SKULL_PIXELS))
        closed = ndimage.binary_closing(skull[z], iterations=3)
        inside[z] = np.asarray(ndimage.binary_fill_holes(closed), bool)
    voxels[skull] = _BONE_HU
    voxels[(voxels <= low) & ~inside] = _AIR_HU
    return voxels, (low, top)


def insert_bleed(
    voxels: npt.NDArray[np.generic],
    spacing_mm: tuple[float, float, float],
    *,
    kind: str,
    volume_ml: float,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """Draw a bleed into a real scan, keeping the scan's own noise.

    Args:
        voxels: HU ``(z, y, x)``, first slice lowest, first row in front, as LPS volumes are.
        spacing_mm: Voxel size ``(z, y, x)``.
        kind: One of ``KINDS``.
        volume_ml: Wanted volume.
        rng: Draws place and shape.

    Returns:
        The scan with the bleed, int16, and its mask, uint8, of the same shape.

    Raises:
        ValueError: No brain is found, or it has no room for the bleed.
    """
    hu = voxels.astype(np.float32)
    anatomy = estimate_anatomy(hu, spacing_mm)
    inside = anatomy.fine_inside
    assert inside is not None
    bleed = draw_bleed(anatomy, kind=kind, volume_ml=volume_ml, rng=rng)
    bleed = dataclasses.replace(bleed, field=_beyond_the_edge(bleed.field, anatomy))
    blood = enlarge(bleed.hu, hu.shape)
    tissue = _soft_tissue(hu)
    # a voxel that holds some bone keeps it: what is not bone of it becomes blood
    added = (blood - tissue) * np.clip((_BONE_HU - hu) / (_BONE_HU - tissue), 0, 1)
    room = inside & ~cannot_be_blood(hu + np.where(inside, added, 0), spacing_mm)

    parts = max(round(spacing_mm[0] / 1.25), 1)
    fine = (hu.shape[0] * parts, (hu.shape[1] + 1) // 2, (hu.shape[2] + 1) // 2)
    box_ml = float(np.prod(spacing_mm)) * hu.size / 1000
    fraction = rasterise(bleed, fine, box_ml / float(np.prod(fine)), room=enlarge(room, fine) > 0.5)
    fraction = enlarge(fraction.reshape(hu.shape[0], parts, *fine[1:]).mean(1), hu.shape)
    fraction = fraction * inside
    inserted = hu - oedema(bleed, fraction, spacing_mm) * (tissue > 10) * inside
    inserted += fraction * added
    fraction = np.where(cannot_be_blood(inserted, spacing_mm) | (hu > _LABEL_HU), 0, fraction)
    mask = label(fraction, float(np.prod(spacing_mm)) / 1000, volume_ml, least=0.5)
    return np.clip(np.round(inserted), -32768, 32767).astype(np.int16), mask


def _beyond_the_edge(field: Array, anatomy: Anatomy) -> Array:
    """The level set carried on outwards for two voxels, so that no gap is left along the skull."""
    outside = ~anatomy.inside
    far, nearest = ndimage.distance_transform_edt(outside, return_indices=True)
    carried: Array = np.where(outside & (far < 3), field[tuple(nearest)], field)
    return carried


def _soft_tissue(hu: Array) -> Array:
    """Smoothed HU of the brain and fluid around each voxel, without bone, fat and air."""
    soft = ((hu > -20) & (hu < 75)).astype(np.float32)
    sigma = (0, 1.6, 1.6)
    weight = ndimage.gaussian_filter(soft, sigma)
    total = ndimage.gaussian_filter(hu * soft, sigma)
    tissue: Array = np.where(weight > 0.02, total / np.maximum(weight, 0.02), _BRAIN_HU)
    return tissue
