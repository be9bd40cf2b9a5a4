"""HU of what lies within the dura: grey and white matter, fluid, dura, vessels, old damage.

All arrays are ``(z, y, x)`` on the atlas; coordinates are in mm of the atlas's frame.
"""

from __future__ import annotations

import numpy as np
import torch

from phantom.head_atlas import ATLAS_ORIGIN_MM, Array, Atlas, smooth_noise
from phantom.person import HeadParameters

_CALCIFICATION_SITE_MM = {  # (z, y, x) in the atlas
    "pineal": (3.0, 27.0, 0.0),
    "left choroid": (10.0, 42.0, 22.0), "right choroid": (10.0, 42.0, -22.0),
    "left pallidum": (0.0, 5.0, 19.0), "right pallidum": (0.0, 5.0, -19.0),
    "falx": (50.0, -35.0, 0.0),
    "left carotid": (-20.0, -6.0, 13.0), "right carotid": (-20.0, -6.0, -13.0),
}  # fmt: skip
Axes = tuple[Array, Array, Array]


def brain_hu(
    atlas: Atlas, p: HeadParameters, grey: Array, fluid: Array, rng: np.random.Generator
) -> Array:
    """HU within the dura, with falx, tentorium, sinuses, vessels, calcifications and old damage.

    Args:
        atlas: Says where each structure is.
        p: This person's densities.
        grey: Fraction of grey matter in each voxel.
        fluid: Fraction of cerebrospinal fluid in each voxel; what is neither is white matter.
        rng: Draws the texture and what varies from head to head.
    """
    hu = _tissue_hu(atlas, p, grey, fluid, rng)
    z, y, x = (
        ATLAS_ORIGIN_MM[a] + np.indices(grey.shape, sparse=True)[a].astype(np.float32)
        for a in range(3)
    )
    depth = full_size(atlas.depth_mm, grey.shape)
    if p.old_infarct:
        _add_old_infarct(hu, atlas, (z, y, x), depth, rng)
    hu += _dura((z, y, x), depth, rng) * (p.dura_hu - hu)
    hu += arteries((z, y, x)) * np.clip(p.grey_hu + 9 - hu, 0, None)
    hu += p.rim_hu * np.exp(-depth / 12.0)
    # where that is strong, the dura under the inner table shows as a thin bright line, too
    line = np.clip((p.rim_hu - 1.5) / 6.5, 0, 1) * np.clip(1.5 - depth / 2.0, 0, 1)
    hu += 0.6 * line * np.clip(p.dura_hu - hu, 0, None)
    hu = hu.astype(np.float32)
    for name in p.calcified:
        _add_calcification(hu, name, rng)
    return hu


def _tissue_hu(
    atlas: Atlas, p: HeadParameters, grey: Array, fluid: Array, rng: np.random.Generator
) -> Array:
    """Mix grey matter, white matter (paler around the ventricles) and fluid, with some texture."""
    shape = grey.shape
    white = 1 - grey - fluid
    near = np.exp(-full_size(atlas.ventricle_distance_mm, shape) / 9.0)
    patchy = 1 + 0.5 * smooth_noise(shape, 8.0, rng)
    hu: Array = (
        p.grey_hu * grey
        + p.fluid_hu * fluid
        + white * (p.white_hu - p.pallor_hu * near * np.clip(patchy, 0, 2))
    )
    hu += (1 - fluid) * (1.0 * smooth_noise(shape, 6.0, rng) + 0.8 * smooth_noise(shape, 25.0, rng))
    return hu


def _add_old_infarct(
    hu: Array, atlas: Atlas, axes_mm: Axes, depth: Array, rng: np.random.Generator
) -> None:
    """Replace a lump of brain by something close to fluid, in place."""
    z, y, x = axes_mm
    site = _random_site(atlas, rng)
    far = np.sqrt((z - site[0]) ** 2 + (y - site[1]) ** 2 + (x - site[2]) ** 2)
    radius = rng.uniform(7, 22)
    damage = np.clip((radius - far + 5 * smooth_noise(hu.shape, 6.0, rng)) / 6 + 0.5, 0, 1)
    hu += damage * (rng.uniform(9, 20) - hu) * (depth > 1)


def _dura(axes_mm: Axes, depth: Array, rng: np.random.Generator) -> Array:
    """Share of dura and of blood in its sinuses in each voxel."""
    z, y, x = axes_mm
    # falx: a sheet in the midline above the corpus callosum, thicker behind
    above = ((y - 18) / 62) ** 2 + ((z - 2) / 38) ** 2 > 1
    wave = 1.2 * np.sin(y / 31 + rng.uniform(0, 6)) * np.sin(z / 27 + rng.uniform(0, 6))
    sheet = np.clip(1.3 - np.abs(x - wave) / 1.0, 0, 1) * above * (z > -8 - 0.12 * y) * (depth < 55)
    # tentorium: a tent whose ridge falls to the sides, behind the midbrain
    roof = tentorium_mm(y, x)
    tent = np.clip(1.0 - np.abs(z - roof) / 1.1, 0, 1) * (y > 32 + 0 * z) * (np.abs(x) > 3 + 0 * z)
    dura: Array = np.maximum.reduce([sheet, 0.7 * tent, sinuses(axes_mm, depth)])
    return dura


def tentorium_mm(y: Array, x: Array) -> Array:
    """Height of the tentorium in the atlas, a tent whose ridge falls to the sides."""
    roof: Array = 2.0 - 0.011 * x**2 - 0.0045 * (y - 50) ** 2 - 0.10 * (y - 40)
    return roof


def sinuses(axes_mm: Axes, depth: Array) -> Array:
    """Share of each voxel that the venous sinuses along midline and tentorium take."""
    z, y, x = axes_mm
    sagittal = (
        np.clip(2.0 - depth / 3.5 - np.abs(x) / 4.5, 0, 1) * (z > -10) * (depth > 0.5) * (y > -50)
    )
    roof = tentorium_mm(y, x)
    transverse = np.clip(1.4 - depth / 4.5 - np.abs(z - roof) / 5, 0, 1) * (y > 50)
    found: Array = np.maximum(sagittal * np.ones_like(depth), transverse)
    return found


def arteries(axes_mm: Axes) -> Array:
    """Basilar, carotid and middle cerebral arteries, which stand out a little against fluid."""
    z, y, x = axes_mm
    basilar = np.exp(-(((x - 1) / 1.7) ** 2 + ((y - 14 - 0.08 * (z + 30)) / 1.7) ** 2)) * (
        np.abs(z + 28) < 16
    )
    lateral = np.exp(-((z + 15) ** 2 + (y + 3 - 0.12 * (np.abs(x) - 15)) ** 2) / 3.0) * (
        np.abs(np.abs(x) - 22) < 12
    )
    vessels: Array = np.maximum(basilar, lateral)
    return vessels


def _add_calcification(hu: Array, name: str, rng: np.random.Generator) -> None:
    """Put a few bright grains at a known site, in place; bright, and never a bleed."""
    site = np.array(_CALCIFICATION_SITE_MM[name])
    peak = rng.uniform(50, 110) if "pallidum" in name else rng.uniform(180, 800)
    low = (site - ATLAS_ORIGIN_MM).astype(int) - 9
    box = tuple(slice(max(int(n), 0), int(n) + 19) for n in low)
    part = hu[box]
    axes = [
        ATLAS_ORIGIN_MM[a] + box[a].start + np.indices(part.shape, sparse=True)[a] for a in range(3)
    ]
    for _ in range(5 if "choroid" in name else 3):
        centre = site + rng.normal(0, 1.8, 3)
        radius = rng.uniform(0.8, 2.2)
        far = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)))
        part += np.clip(radius - far + 0.5, 0, 1).astype(np.float32) * np.clip(peak - part, 0, None)


def _random_site(atlas: Atlas, rng: np.random.Generator) -> Array:
    """A place 5 to 35 mm under the inner table, above the skull base."""
    candidates = np.argwhere((atlas.depth_mm > 5) & (atlas.depth_mm < 35))
    candidates = candidates[candidates[:, 0] > 26]
    return (ATLAS_ORIGIN_MM + 2.0 * candidates[rng.integers(len(candidates))]).astype(np.float32)


def full_size(half: Array, shape: tuple[int, ...]) -> Array:
    """A map of every second voxel, enlarged to all of them."""
    tensor = torch.from_numpy(half)[None, None]
    return torch.nn.functional.interpolate(tensor, shape, mode="trilinear", align_corners=True)[
        0, 0
    ].numpy()
