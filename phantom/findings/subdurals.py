"""Subdural bleeds that lie in another way: fresh blood in an old collection, and at the tentorium.

All grids are ``(z, y, x)``, z up, y back, as in ``phantom.bleeds``.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from phantom.anatomy import Anatomy
from phantom.bleeds import LARGEST_ML, Array, Bleed, bleed_of, draw_bleed
from phantom.brain import tentorium_mm
from phantom.head_atlas import smooth_noise


def acute_on_chronic(
    anatomy: Anatomy, volume_ml: float, rng: np.random.Generator
) -> tuple[Bleed, Bleed]:
    """An old collection, darker than brain or about as dense, and fresh blood in it.

    The fresh blood has sunk to the back of the lying patient, or clots anywhere. Only that is
    labelled.

    Args:
        anatomy: The head.
        volume_ml: How much fresh blood there is.
        rng: Draws place and shape.

    Raises:
        ValueError: The head has no room for it.
    """
    whole_ml = min(volume_ml * rng.uniform(1.6, 5.0) + rng.uniform(8, 30), LARGEST_ML["subdural"])
    whole = draw_bleed(anatomy, kind="subdural", volume_ml=whole_ml, rng=rng)
    texture = 2.0 * smooth_noise(whole.field.shape, 4.0, rng)
    old = dataclasses.replace(
        whole, hu=(rng.uniform(10, 30) + texture).astype(np.float32), labelled=False
    )
    _, y, _ = anatomy.axes_mm()
    lumps = smooth_noise(whole.field.shape, 7.0, rng)
    sunk = rng.random() < 0.6
    order = y + 0 * whole.field + 3.0 * lumps if sunk else 12.0 * lumps
    held = whole.field > 0
    share = min(volume_ml / whole_ml, 0.95)
    level = float(np.quantile(order[held], 1 - share)) if held.any() else 0.0
    field = np.minimum(whole.field, order - level).astype(np.float32)
    return old, dataclasses.replace(whole, field=field, volume_ml=volume_ml)


def tentorial(
    anatomy: Anatomy, atlas_mm: Array, volume_ml: float, rng: np.random.Generator
) -> Bleed:
    """A layer of blood on one half of the tentorium.

    Args:
        anatomy: The head.
        atlas_mm: Where each voxel of the anatomy's grid lies in the atlas, ``(z, y, x, 3)``.
        volume_ml: Wanted volume.
        rng: Draws place and shape.

    Raises:
        ValueError: The head has no room for it.
    """
    z, y, x = np.moveaxis(atlas_mm, -1, 0)
    side = 1 if rng.random() < 0.5 else -1
    height = z - tentorium_mm(y, x)
    on_tent = anatomy.inside & (side * x > 2) & (y > 30) & (np.abs(x) < 52)
    thickness = rng.uniform(3.0, 5.0) + 0.8 * volume_ml ** (1 / 3)
    site = np.argwhere(on_tent & (np.abs(height) < 3))
    if not len(site):
        raise ValueError(f"no room for a tentorial bleed of {volume_ml} mL")
    centre = atlas_mm[tuple(site[rng.integers(len(site))])]
    spread = float(np.clip(1.3 * np.sqrt(volume_ml * 1000 / (np.pi * thickness)), 8, 45))
    away = np.hypot(y - centre[1], x - centre[2])
    bump = np.exp(-0.25 * (away / spread) ** 4) * (1 + 0.15 * smooth_noise(y.shape, 8.0, rng))
    field = bump * thickness - np.abs(height - thickness / 2)
    allowed = on_tent & (bump > 0.05) & (height > -4) & (height < 2 * thickness)
    return bleed_of(
        anatomy,
        np.where(allowed, field, np.float32(-1e3)).astype(np.float32),
        kind="subdural",
        volume_ml=volume_ml,
        rng=rng,
    )
