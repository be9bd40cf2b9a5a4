"""Jaw, tongue and upper neck, which scans show whose lowest slices lie below the skull's base.

The atlas ends at the hard palate. Nothing below it is an intracranial bleed, but a tongue is as
dense as one, streaked, and has bone around it: a network that has not seen tongues marks them.

Arrays are ``(z, y, x)`` at 1 mm; y and x are those of the atlas, z ends where the atlas begins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from phantom.head_atlas import ATLAS_ORIGIN_MM, Array, smooth_noise
from phantom.outside import muscle_texture
from phantom.person import HeadParameters

Field = npt.NDArray[np.floating[Any]]

DEPTH_MM = 60
_JAW_MIDDLE_MM, _SPINE_MM = -20.0, 30.0  # y of the jaw's angles and of the spinal canal
_SKIN_MM, _SEAM_MM = 2.0, 6.0
_SKIN_HU, _CORD_HU, _ENAMEL_HU, _FILLING_HU = 45.0, 30.0, 2200.0, 3000.0


def draw_below(outside: Array, p: HeadParameters, rng: np.random.Generator) -> Array:
    """What lies under the atlas, ``DEPTH_MM`` mm of it: HU, the lowest slice first.

    Args:
        outside: HU outside the dura, on the atlas; the first slices below go over into its lowest.
        p: This person's densities.
        rng: Draws jaw, teeth, tongue, airway, glands and neck.
    """
    lowest = outside[0]
    shape = (DEPTH_MM, *lowest.shape)
    below = np.arange(DEPTH_MM, 0, -1, dtype=np.float32)[:, None, None]
    y = (ATLAS_ORIGIN_MM[1] + np.arange(shape[1], dtype=np.float32))[:, None]
    x = (ATLAS_ORIGIN_MM[2] + np.arange(shape[2], dtype=np.float32))[None, :]
    x = x + 2.0 * np.float32(rng.normal())
    uneven = 2.0 * smooth_noise(shape, 12.0, rng)

    hu = np.full(shape, p.fat_hu, np.float32)
    flesh = p.muscle_hu + muscle_texture(smooth_noise(shape, 5.0, rng), p, rng)
    neck_half_mm = (rng.uniform(44, 58), rng.uniform(52, 66))
    _put(hu, _ellipse(y, x, (_SPINE_MM + 12, 0.0), neck_half_mm) + uneven / 40, flesh)
    _add_spine(hu, below, y, x, p, rng)
    length, width = rng.uniform(46, 56), rng.uniform(36, 44)
    floor = _ellipse(y, x, (_JAW_MIDDLE_MM + 4, 0.0), (length - 6, width - 4))
    _put(hu, (floor + uneven / 30) * (rng.random() < 0.7), flesh - rng.uniform(0, 8))
    for side in (-1, 1):
        for across, half_mm in ((width + 9, (24, 8)), (width - 9, (18, 7))):  # outer, inner muscle
            chewing = _ellipse(y, x, (rng.normal(-8, 4), side * across), half_mm)
            _put(hu, chewing + uneven / 16, flesh + rng.normal(0, 4))
        gland = _ellipse(y, x, (rng.normal(16, 4), side * rng.normal(54, 4)), (14, 9))
        _put(hu, gland + uneven / 12, rng.uniform(-40, 50))
    _add_tongue(hu, below, y, x, p, rng)
    _add_jaw(hu, _arch(y, x, length, width) + uneven / 60, below, y, x, p, rng)
    _add_airway(hu, below, y, x, rng)

    head = ndimage.binary_fill_holes(ndimage.binary_opening(lowest > -300, iterations=4))
    within = ndimage.distance_transform_edt(head).astype(np.float32)
    within = within - rng.uniform(0, 16) * (below / DEPTH_MM) ** 1.5 + 0.3 * uneven
    fat_mm = rng.uniform(3, 10)
    hu = np.where((within < fat_mm) & (hu < 300) & (y > _JAW_MIDDLE_MM), p.fat_hu, hu)
    hu = np.select([~head | (within <= 0), within < _SKIN_MM], [np.float32(-1000), _SKIN_HU], hu)
    seam = np.clip(1 - below / _SEAM_MM, 0, 1)
    found: Array = (seam * lowest + (1 - seam) * hu).astype(np.float32)
    return found


def _add_spine(
    hu: Field, below: Field, y: Field, x: Field, p: HeadParameters, rng: np.random.Generator
) -> None:
    """Vertebrae with canal and cord; discs between them."""
    ring = _ellipse(y, x, (_SPINE_MM, 0.0), (rng.uniform(17, 21), rng.uniform(19, 25)))
    body = _ellipse(y, x, (_SPINE_MM - 19, 0.0), (rng.uniform(7, 9), rng.uniform(9, 12)))
    spine = _ellipse(y, x, (_SPINE_MM + 26, 0.0), (12, rng.uniform(3, 5)))
    disc = np.mod(below + rng.uniform(0, 18), 18) < 5
    for part in (ring, spine, body):
        bony = p.spongy_hu * 0.5 + (part < 0.2) * 0.5 * p.bone_hu
        _put(hu, part, np.where(disc, 80, bony))
    _put(hu, _ellipse(y, x, (_SPINE_MM, 0.0), (9, 11)), p.fluid_hu)
    _put(hu, _ellipse(y, x, (_SPINE_MM, 0.0), (4.5, 6)), _CORD_HU)


def _arch(y: Field, x: Field, length_mm: float, width_mm: float) -> Field:
    """1 on the middle line of the jaw's arch, in proportion to the distance from its middle."""
    ahead = np.clip(_JAW_MIDDLE_MM - y, 0, None) / length_mm
    across = np.abs(x) / (width_mm + 0.12 * np.clip(y - _JAW_MIDDLE_MM, 0, None))
    arch: Field = np.sqrt(ahead**2 + across**2)
    return arch


def _add_jaw(
    hu: Field, jaw: Field, below: Field, y: Field, x: Field, p: HeadParameters,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Bone of the lower jaw with its branches, two rows of teeth, and fillings in some."""
    half = rng.uniform(3.0, 4.5) / 42
    off = np.abs(jaw - 1) / half
    reach = y < 12
    row = rng.uniform(12, 18)  # mm below the atlas where the rows of teeth meet
    lower = (below > row + 6) & reach
    branch = (below <= row + 6) & reach & (y > _JAW_MIDDLE_MM + 8)
    upper = (below < row - 6) & (y < _JAW_MIDDLE_MM + 5)
    bony = np.where(off > 0.55, p.bone_hu, 0.6 * p.spongy_hu)
    for where in (lower, branch, upper):
        _put(hu, (1 - off) * 3 * where, bony)
    turn = np.arctan2(x, _JAW_MIDDLE_MM + 12 - y)
    tooth = np.mod(turn * rng.uniform(5.2, 6.0) + 100, 1)
    teeth = (np.abs(below - row) < 8) & (y < _JAW_MIDDLE_MM) & (tooth > 0.15)
    lost = np.floor(turn * 5.5) % 7 < (rng.integers(0, 7) if rng.random() < 0.4 else 0)
    _put(hu, (1.1 - off) * 3 * (teeth & ~lost), _ENAMEL_HU)
    for _ in range(int(rng.integers(1, 6)) if rng.random() < 0.4 else 0):
        filled = np.abs(turn - rng.uniform(-1.2, 1.2)) < 0.07
        filled = filled & (np.abs(below - row) < rng.uniform(2, 5)) & (y < _JAW_MIDDLE_MM)
        _put(hu, (1 - off) * 3 * filled, _FILLING_HU)


def _add_tongue(
    hu: Field, below: Field, y: Field, x: Field, p: HeadParameters, rng: np.random.Generator
) -> None:
    """The tongue between the jaw's branches: bundles of muscle, streaks of fat, a plane between."""
    top, centre = rng.uniform(4, 12), (rng.uniform(-38, -28), rng.normal(0, 2))
    half = (rng.uniform(26, 38), rng.uniform(21, 32))
    density = rng.uniform(42, 74)
    bundles = smooth_noise(hu.shape, rng.uniform(2.5, 5), rng)
    streaks = np.clip(np.abs(smooth_noise(hu.shape, 4.0, rng)) - rng.uniform(1.1, 2.2), 0, 1)
    tongue = density + rng.uniform(3, 9) * bundles + streaks * (p.fat_hu - density)
    plane = np.clip(rng.uniform(0.4, 1.4) - np.abs(x - centre[1]), 0, 1) * rng.uniform(0, 0.7)
    tongue += plane * (p.fat_hu - density)
    rise = np.sqrt(np.clip((below - top) / 8, 0, 1))
    _put(hu, _ellipse(y, x, centre, half) - 1.2 * (1 - rise), tongue)
    for side in (-1, 1):  # salivary glands beside and under it
        gland = _ellipse(y, x, (rng.normal(-12, 4), side * rng.normal(27, 3)), (10, 7))
        _put(hu, gland * (below > 30), rng.uniform(30, 75))


def _add_airway(hu: Field, below: Field, y: Field, x: Field, rng: np.random.Generator) -> None:
    """The pharynx behind the tongue, open or nearly closed, and often air over the tongue."""
    centre = (rng.uniform(-6, 0), rng.normal(0, 1.5))
    throat = _ellipse(y, x, centre, (rng.uniform(2, 9), rng.uniform(6, 15)))
    _put(hu, throat, -1000)
    if rng.random() < 0.6:
        thick = rng.uniform(1, 5)
        over = _ellipse(y, x, (-34, 0.0), (26, 20)) * (np.abs(below - 8) < thick)
        _put(hu, over, -1000)


def _ellipse(
    y: Field, x: Field, centre: tuple[float, float], half_mm: tuple[float, float]
) -> Field:
    """1 in the middle of an ellipse, 0 on its outline, negative outside."""
    far = ((y - centre[0]) / half_mm[0]) ** 2 + ((x - centre[1]) / half_mm[1]) ** 2
    found: Field = 1 - np.sqrt(far)
    return found


def _put(hu: Field, depth: Field, density: Field | float) -> None:
    """Replace what is there where ``depth`` is positive, with an edge about a voxel wide."""
    share = np.clip(depth * 12, 0, 1)
    hu += share * (density - hu)
