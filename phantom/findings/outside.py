"""Findings of scalp and skull: dense or broken, and none of them an intracranial bleed.

All arrays are ``(z, y, x)`` on the atlas at 1 mm and are drawn into in place.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from phantom.head_atlas import (
    ATLAS_ORIGIN_MM,
    BONE,
    INSIDE,
    MASTOID,
    SINUS,
    SPONGY,
    Array,
    load_atlas,
    smooth_noise,
)

Point = npt.NDArray[np.float64]
Box = tuple[slice, slice, slice]

_SKIN_MM, _FAT_MM = 2.0, 4.0
_SKIN_HU, _METAL_HU = 45.0, 2400.0
_LOWEST_MM = 5.0  # of the vault in the atlas; below lie face and skull base


def add_scalp_haematoma(outside: Array, fat_hu: float, rng: np.random.Generator) -> None:
    """A swelling of blood between skull and skin, which rises over the skull around it."""
    site, _ = pick_on_vault(rng)
    radius, height = rng.uniform(16, 40), rng.uniform(4, 13)
    box, offset = around(site, radius + 4, outside.shape)
    above = _above_skull()[box]
    part = outside[box]
    far = np.sqrt(sum(axis**2 for axis in offset))
    rise = height * np.clip(1 - (far / radius) ** 2, 0, 1)
    rise = rise * (1 + 0.2 * smooth_noise(part.shape, 8.0, rng))
    blood_hu = rng.uniform(45, 75) + 5 * smooth_noise(part.shape, 5.0, rng)
    layers = np.select(
        [above < rise, above < rise + _FAT_MM, above < rise + _FAT_MM + _SKIN_MM],
        [blood_hu, np.float32(fat_hu), np.float32(_SKIN_HU)],
        part,
    )
    solid = np.isin(load_atlas().tissue[box], (BONE, SPONGY, INSIDE))
    swollen = (above > 0.3) & (rise > 0.8) & ~solid
    part[:] = np.where(swollen, layers, part)


def add_fracture(outside: Array, rng: np.random.Generator) -> None:
    """A crack through the vault, a millimetre or two wide."""
    site, normal = pick_on_vault(rng)
    along = _across(normal, rng)
    beside = np.cross(normal, along)
    length, width = rng.uniform(25, 70), rng.uniform(1.0, 2.4)
    box, offset = around(site, length / 2 + 3, outside.shape)
    part = outside[box]
    way = _along(offset, along)
    wobble = 1.5 * np.sin(way / rng.uniform(4, 10) + rng.uniform(0, 6))
    gap = np.clip(width / 2 + 0.5 - np.abs(_along(offset, beside) + wobble), 0, 1)
    gap = gap * (np.abs(way) < length / 2) * (np.abs(_along(offset, normal)) < 25)
    part += gap * _is_bone()[box] * (rng.uniform(10, 50) - part)


def add_flap(outside: Array, rng: np.random.Generator) -> None:
    """A flap of bone that was cut out and put back, held by small plates of metal."""
    site, normal = pick_on_vault(rng)
    radius, width = rng.uniform(20, 36), rng.uniform(1.2, 2.4)
    box, offset = around(site, radius + 10, outside.shape)
    part = outside[box]
    height = _along(offset, normal)
    far = np.sqrt(np.clip(sum(axis**2 for axis in offset) - height**2, 0, None))
    cut = np.clip(width / 2 + 0.5 - np.abs(far - radius), 0, 1) * (np.abs(height) < 25)
    part += cut * _is_bone()[box] * (rng.uniform(5, 45) - part)
    across = _across(normal, rng)
    turn = np.arctan2(_along(offset, np.cross(normal, across)), _along(offset, across))
    above = _above_skull()[box]
    for start in rng.uniform(-np.pi, np.pi, 4):
        away = np.abs((turn - start + np.pi) % (2 * np.pi) - np.pi) * radius
        plate = (np.abs(far - radius) < 6) & (away < 2) & (above > 0) & (above < 1.8)
        part[plate & (np.abs(height) < 25)] = _METAL_HU


def bore(outside: Array, site: Point, normal: Point, rng: np.random.Generator) -> None:
    """A burr hole through the skull at this place."""
    box, offset = around(site, 22, outside.shape)
    part = outside[box]
    height = _along(offset, normal)
    far = np.sqrt(np.clip(sum(axis**2 for axis in offset) - height**2, 0, None))
    hole = np.clip(rng.uniform(3, 7) + 0.5 - far, 0, 1) * (np.abs(height) < 20)
    part += hole * _is_bone()[box] * (rng.uniform(10, 45) - part)


def pick_on_vault(rng: np.random.Generator, near_mm: Point | None = None) -> tuple[Point, Point]:
    """A place on the outer table, in mm of the atlas, and the direction outwards there.

    Args:
        rng: Draws the place.
        near_mm: Take the place that is nearest to this one instead.
    """
    places, normals = _vault()
    if near_mm is None:
        index = int(rng.integers(len(places)))
    else:
        index = int(((places - near_mm) ** 2).sum(1).argmin())
    return places[index], normals[index]


def around(
    site_mm: Point, reach_mm: float, shape: tuple[int, ...]
) -> tuple[Box, tuple[Array, Array, Array]]:
    """The part of the atlas around a place, and coordinates in it from there, which broadcast."""
    middle = site_mm - ATLAS_ORIGIN_MM
    spans = [
        (max(int(at - reach_mm), 0), min(int(at + reach_mm) + 2, n))
        for at, n in zip(middle, shape, strict=True)
    ]
    axes = [
        (np.arange(*span, dtype=np.float32) - np.float32(at)).reshape(
            [-1 if axis == k else 1 for k in range(3)]
        )
        for axis, (span, at) in enumerate(zip(spans, middle, strict=True))
    ]
    z, y, x = (slice(*span) for span in spans)
    return (z, y, x), (axes[0], axes[1], axes[2])


def _along(offset: tuple[Array, Array, Array], direction: Point) -> Array:
    way: Array = sum(axis * np.float32(d) for axis, d in zip(offset, direction, strict=True))  # type: ignore[assignment]
    return way


def _across(normal: Point, rng: np.random.Generator) -> Point:
    """A random direction at right angles to another."""
    other = np.cross(normal, rng.normal(size=3))
    across: Point = other / np.linalg.norm(other)
    return across


@functools.lru_cache(maxsize=1)
def _above_skull() -> Array:
    """Distance in mm to the skull and what it holds, 0 there."""
    coarse = load_atlas().tissue[::2, ::2, ::2]
    solid = np.isin(coarse, (BONE, SPONGY, INSIDE, SINUS, MASTOID))
    solid = ndimage.binary_fill_holes(ndimage.binary_closing(solid))
    far = ndimage.distance_transform_edt(~solid, sampling=2.0).astype(np.float32)
    zoom = [n / m for n, m in zip(load_atlas().tissue.shape, far.shape, strict=True)]
    full: Array = ndimage.zoom(far, zoom, order=1).astype(np.float32)
    return full


@functools.lru_cache(maxsize=1)
def _vault() -> tuple[Point, Point]:
    """Places on the outer table of the vault in mm, ``(n, 3)``, and the directions outwards."""
    above = _above_skull()[::4, ::4, ::4]
    slope = np.stack(np.gradient(ndimage.gaussian_filter(above, 1.0)), -1)
    at = np.argwhere((above > 0) & (above < 5))
    places = at * 4.0 + ATLAS_ORIGIN_MM
    normals = slope[tuple(at.T)]
    length = np.linalg.norm(normals, axis=1)
    is_vault = (places[:, 0] > _LOWEST_MM) & (length > 0.5)
    # the forehead above the eyes is vault, what lies in front below is face
    is_vault &= (places[:, 1] > -70) | (places[:, 0] > 25)
    return places[is_vault], normals[is_vault] / length[is_vault, None]


@functools.lru_cache(maxsize=1)
def _is_bone() -> npt.NDArray[np.bool_]:
    return np.isin(load_atlas().tissue, (BONE, SPONGY))
