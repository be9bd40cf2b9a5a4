"""Findings within the dura that are bright and no bleeds: calcium, contrast, dense veins, metal.

All arrays are ``(z, y, x)`` on the atlas at 1 mm and are drawn into in place.
"""

from __future__ import annotations

import numpy as np

from phantom.brain import Axes, arteries, full_size, sinuses, tentorium_mm
from phantom.findings.outside import around, bore, pick_on_vault
from phantom.head_atlas import ATLAS_ORIGIN_MM, Array, load_atlas, smooth_noise

_KOCHER_MM, _HORN_MM = (75.0, -30.0, 28.0), (16.0, -22.0, 8.0)  # where drains enter, and end
_CLIP_SITES_MM = ((-16.0, -8.0, 12.0), (-14.0, -22.0, 1.0), (-18.0, 6.0, 1.0), (-15.0, -4.0, 24.0))


def add_contrast(within: Array, rng: np.random.Generator) -> None:
    """Arteries and sinuses filled with contrast medium; grey matter is a little denser, too."""
    axes, depth = _axes(within.shape), full_size(load_atlas().depth_mm, within.shape)
    early = rng.random() < 0.5  # arteries before veins
    artery_hu = rng.uniform(180, 380) if early else rng.uniform(90, 160)
    vein_hu = rng.uniform(70, 110) if early else rng.uniform(110, 200)
    z, y, x = axes
    # anterior and posterior cerebral arteries, which do not show without it
    front = np.exp(-((x - 1) ** 2 + (y + 30 + 0.35 * np.abs(z - 5)) ** 2) / 2.5) * (
        np.abs(z - 3) < 17
    )
    back = np.exp(-((z + 13) ** 2 + (y - 14 - 0.35 * (np.abs(x) - 6)) ** 2) / 2.5) * (
        np.abs(np.abs(x) - 16) < 12
    )
    vessels = np.maximum.reduce([arteries(axes), front + 0 * y, back + 0 * x])
    within += rng.uniform(1, 4)  # of the capillaries
    within += vessels * np.clip(artery_hu - within, 0, None)
    within += np.clip(sinuses(axes, depth), 0, 1) * np.clip(vein_hu - within, 0, None)
    line = np.clip(1.2 - depth / 1.5, 0, 1)  # the dura takes it up
    within += 0.5 * line * np.clip(vein_hu - 20 - within, 0, None)


def add_dense_veins(within: Array, rng: np.random.Generator) -> None:
    """Wide sinuses and deep veins full of dense blood, as young or dehydrated people have them."""
    axes, depth = _axes(within.shape), full_size(load_atlas().depth_mm, within.shape)
    z, y, x = axes
    ridge = tentorium_mm(y, np.zeros_like(x))
    middle = rng.normal(0, 5)
    confluence = rng.uniform(5, 14) - np.sqrt(
        (z + 14 - rng.normal(0, 5)) ** 2 + (x - middle) ** 2 + (1.6 * (depth - 2)) ** 2
    )
    confluence = confluence * (y > 60)
    straight = rng.uniform(1.8, 4.0) - np.sqrt((z - ridge - 1) ** 2 + x**2)
    straight = straight * ((y > 40) & (y < 100))
    galen = 1 - np.sqrt(((z - 7) / 5.5) ** 2 + ((y - 37) / 6.5) ** 2 + (x / 3.2) ** 2)
    internal = rng.uniform(1.0, 1.8) - np.sqrt((z - 11) ** 2 + (np.abs(x) - 2.5) ** 2)
    internal = internal * ((y > 12) & (y < 36))
    wide = rng.uniform(1.0, 1.8) * sinuses(axes, depth)
    veins = np.maximum.reduce(
        [np.clip(part, 0, 1) for part in (confluence, straight, 3 * galen, internal, wide)]
    )
    within += veins * np.clip(rng.uniform(55, 80) - within, 0, None)


def add_calcified_dura(within: Array, rng: np.random.Generator) -> None:
    """Plates in the falx, and some under the inner table, bright and thin."""
    z, y, x = _axes(within.shape)
    depth = full_size(load_atlas().depth_mm, within.shape)
    above = ((y - 18) / 62) ** 2 + ((z - 2) / 38) ** 2 > 1
    patchy = smooth_noise(within.shape, 9.0, rng)
    plate = np.clip(rng.uniform(1.2, 2.2) - np.abs(x), 0, 1) * above * (z > 0) * (depth > 1)
    plate = plate * (depth < 40) * np.clip(4 * (patchy - rng.uniform(0.6, 1.4)), 0, 1)
    peak = rng.uniform(150, 900)
    within += plate * np.clip(peak - within, 0, None)
    if rng.random() < 0.5:
        under = np.clip(2.2 - depth, 0, 1) * (z > 0) * np.clip(4 * (-patchy - 1.6), 0, 1)
        within += under * np.clip(rng.uniform(120, 600) - within, 0, None)


def add_drain(outside: Array, within: Array, rng: np.random.Generator) -> None:
    """A burr hole in front, and a drain from it to the front horn of a lateral ventricle."""
    side = np.array((1, 1, 1 if rng.random() < 0.5 else -1))
    entry, normal = pick_on_vault(rng, side * _KOCHER_MM + rng.normal(0, 3, 3))
    bore(outside, entry, normal, rng)
    end = side * _HORN_MM + rng.normal(0, 3, 3)
    way = end - entry
    length = float(np.linalg.norm(way))
    direction = way / length
    box, offset = around((entry + end) / 2, length / 2 + 12, within.shape)
    along = sum(axis * np.float32(d) for axis, d in zip(offset, direction, strict=True))
    far = np.sqrt(np.clip(sum(axis**2 for axis in offset) - along**2, 0, None))
    tube = np.clip(1.7 - far, 0, 1) * (along < length / 2) * (along > -length / 2 - 10)
    density = rng.uniform(120, 350)
    for part in (within[box], outside[box]):
        part += tube * np.clip(density - part, 0, None)


def add_clip(within: Array, rng: np.random.Generator) -> None:
    """A clip or a coil at an aneurysm's place; the beam's streaks follow from its density."""
    index = int(rng.integers(len(_CLIP_SITES_MM)))
    side = np.array((1, 1, 1 if rng.random() < 0.5 else -1))
    site = side * _CLIP_SITES_MM[index] + rng.normal(0, 2, 3)
    box, offset = around(site, 12, within.shape)
    far = np.sqrt(sum(axis**2 for axis in offset))
    if rng.random() < 0.5:  # a coil fills the aneurysm
        metal = np.clip(rng.uniform(2.5, 5) + 0.5 - far, 0, 1)
    else:
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        along = sum(axis * np.float32(d) for axis, d in zip(offset, direction, strict=True))
        beside = np.sqrt(np.clip(far**2 - along**2, 0, None))
        metal = np.clip(1.8 - beside, 0, 1) * (np.abs(along) < rng.uniform(4, 8))
    part = within[box]
    part += metal * (3000 - part)


def _axes(shape: tuple[int, ...]) -> Axes:
    z, y, x = (
        ATLAS_ORIGIN_MM[a] + np.indices(shape, sparse=True)[a].astype(np.float32) for a in range(3)
    )
    return z, y, x
