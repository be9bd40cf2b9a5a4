"""HU of what lies outside the dura: skin, fat, muscle, bone, air spaces and eyes.

Muscle is where a network trained on phantoms goes wrong on real scans: it is as dense as blood,
and lies against bone in patches between planes of fat, as a subdural bleed does inside.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from phantom.head_atlas import BONE, FAT, MASTOID, MUSCLE, SPONGY, Array, Atlas, smooth_noise
from phantom.person import HeadParameters


def outside_hu(atlas: Atlas, p: HeadParameters, rng: np.random.Generator) -> Array:
    """HU of everything but the brain, ``(z, y, x)`` on the atlas.

    Args:
        atlas: Says where each tissue is.
        p: This person's densities.
        rng: Draws where muscles part and how bone is grained.
    """
    tissue = atlas.tissue
    # air, fat, muscle, bone, spongy bone, sinus, mastoid, fluid, inside
    table = np.array(
        [-1000, p.fat_hu, p.muscle_hu, p.bone_hu, p.spongy_hu, -1000, 0, 12, p.bone_hu * 0.8],
        np.float32,
    )
    hu = table[tissue]
    coarse = smooth_noise(tissue.shape, 5.0, rng)
    fine = rng.standard_normal(tissue.shape, dtype=np.float32)
    bone = (tissue == BONE) | (tissue == SPONGY)
    hu += bone * (0.10 * p.bone_hu * coarse + 120 * fine)
    hu += (tissue == MUSCLE) * muscle_texture(coarse, p, rng)
    hu += (tissue == FAT) * np.where(coarse > 1.6, 60, 8 * coarse)
    # mastoid cells: walls of bone around holes of air, a few mm across
    cells = ndimage.gaussian_filter(fine, 0.9) * 5.3
    hu = np.where(tissue == MASTOID, np.clip(100 + 900 * cells, -950, 1300), hu)
    hu += atlas.lens * (p.lens_hu - hu)
    return np.clip(hu, -1000, 2400).astype(np.float32)


def muscle_texture(coarse: Array, p: HeadParameters, rng: np.random.Generator) -> Array:
    """What is added to muscle: bellies that differ, and the planes of fat between them.

    Args:
        coarse: Noise that varies over some millimetres; the texture has its shape.
        p: This person's densities.
        rng: Draws bellies and planes.
    """
    bellies = 4.0 * smooth_noise(coarse.shape, 14.0, rng)
    # about 1.5 mm of fat where a smooth field passes through zero: sheets that close around bellies
    plane = np.clip(1.6 - np.abs(smooth_noise(coarse.shape, 9.0, rng)) / 0.1, 0, 1)
    plane *= rng.uniform(0.2, 0.8)  # lean people show less
    texture: Array = (bellies + 6.0 * coarse + plane * (p.fat_hu - p.muscle_hu)).astype(np.float32)
    return texture
