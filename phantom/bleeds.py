"""The five kinds of intracranial bleed, drawn into a known or an estimated anatomy.

A bleed is a level set: a smooth field over the anatomy's coarse grid, higher deeper inside the
bleed, cut at the level that gives the wanted volume. Cutting happens after enlarging the field to
the image's own grid, so edges are smooth and partial volume along thick slices is right. All grids
are ``(z, y, x)``, z up, y back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from phantom.anatomy import Anatomy, enlarge
from phantom.head_atlas import smooth_noise

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

KINDS = ("intraparenchymal", "intraventricular", "subdural", "epidural", "subarachnoid")
LARGEST_ML = {
    "intraparenchymal": 155.0,
    "intraventricular": 40.0,
    "subdural": 155.0,
    "epidural": 110.0,
    "subarachnoid": 60.0,
}
SMALLEST_HU, LARGEST_HU = 45.0, 90.0
_OUTSIDE = np.float32(-1e3)
_SOFTNESS_MM = 1.2  # width of a bleed's edge, over which the fraction rises from 0 to 1


@dataclass(frozen=True)
class Bleed:
    """One bleed on the anatomy's grid.

    Attributes:
        kind: One of ``KINDS``.
        volume_ml: Wanted volume.
        field: Level set in mm or so, above 0 inside the bleed; very low where no blood may be.
        hu: Density of the blood at each voxel.
        oedema_mm: Reach of the dark rim, 0 for none.
        oedema_hu: How much darker the rim is next to the blood.
        labelled: Whether it is a bleed for the label; an old, dark collection is not.
    """

    kind: str
    volume_ml: float
    field: Array
    hu: Array
    oedema_mm: float
    oedema_hu: float
    labelled: bool = True


def draw_bleed(anatomy: Anatomy, *, kind: str, volume_ml: float, rng: np.random.Generator) -> Bleed:
    """A bleed of one kind and about one volume somewhere it can be.

    Raises:
        ValueError: The kind is unknown, the volume is not positive, or the head has no room for it.
    """
    if kind not in _FIELDS:
        raise ValueError(f"bleed kind {kind!r}, expected one of {', '.join(KINDS)}")
    if not 0 < volume_ml <= LARGEST_ML[kind]:
        raise ValueError(
            f"{kind} bleed of {volume_ml} mL, expected more than 0 and at most {LARGEST_ML[kind]}"
        )
    field = _FIELDS[kind](anatomy, volume_ml, rng)
    return bleed_of(anatomy, field, kind=kind, volume_ml=volume_ml, rng=rng)


def bleed_of(
    anatomy: Anatomy, field: Array, *, kind: str, volume_ml: float, rng: np.random.Generator
) -> Bleed:
    """A bleed of a field, cut at the level that gives its volume, with its density.

    Args:
        anatomy: The head.
        field: Higher deeper inside the bleed; very low where no blood may be.
        kind: One of ``KINDS``.
        volume_ml: Wanted volume.
        rng: Draws the density.

    Raises:
        ValueError: There is no room for it.
    """
    voxel_ml = float(np.prod(anatomy.spacing_mm)) / 1000
    wanted = max(round(volume_ml / voxel_ml), 1)
    allowed = field[field > _OUTSIDE / 2]
    if allowed.size < wanted:
        if allowed.size < 8:
            raise ValueError(f"no room for a {kind} bleed of {volume_ml} mL")
        wanted = int(0.95 * allowed.size)
    level = np.partition(allowed, allowed.size - wanted)[allowed.size - wanted]
    field = _in_millimetres(field, level, anatomy.spacing_mm)
    centre_hu = {"subarachnoid": 58.0, "intraventricular": 62.0, "subdural": 62.0}.get(kind, 64.0)
    texture = 3.5 * smooth_noise(field.shape, 3.0, rng) + 2.0 * smooth_noise(field.shape, 8.0, rng)
    hu = rng.normal(centre_hu, 5.0) + texture
    if kind in ("subdural", "intraparenchymal", "epidural") and rng.random() < 0.3:
        hu = hu - 9 * (
            smooth_noise(field.shape, 6.0, rng) > 0.6
        )  # fresh, unclotted blood swirls darker
    has_rim = kind == "intraparenchymal"
    return Bleed(
        kind=kind,
        volume_ml=volume_ml,
        field=field,
        hu=np.clip(hu, SMALLEST_HU + 3, LARGEST_HU).astype(np.float32),
        oedema_mm=float(rng.uniform(1.5, 3.0) + rng.uniform(0.1, 0.45) * radius_mm(volume_ml))
        if has_rim
        else 0.0,
        oedema_hu=float(rng.uniform(7, 15)) if has_rim else 0.0,
    )


def _in_millimetres(field: Array, level: float, spacing_mm: tuple[float, float, float]) -> Array:
    """The field above its level, scaled to fall by about 1 per mm at the bleed's edge."""
    above = field - level
    slope = np.sqrt(sum(g**2 for g in np.gradient(field, *spacing_mm)))
    near = (np.abs(above) < 2 * float(np.median(slope[above > 0])) * max(spacing_mm)) & (slope < 50)
    usual = float(np.median(slope[near])) if near.any() else 1.0
    return np.clip(above / max(usual, 1e-3), _OUTSIDE, 50).astype(np.float32)


def radius_mm(volume_ml: float) -> float:
    """Radius of the ball of that volume."""
    return float((3 * volume_ml * 1000 / (4 * np.pi)) ** (1 / 3))


def _intraparenchymal(anatomy: Anatomy, volume_ml: float, rng: np.random.Generator) -> Array:
    """A lumpy ellipsoid in brain tissue; half of them deep, beside the ventricles."""
    depth = anatomy.depth_mm()
    radius = radius_mm(volume_ml)
    tissue = anatomy.inside & (anatomy.fluid < 0.35) & (anatomy.ventricles < 0.3)
    far = ndimage.distance_transform_edt(anatomy.ventricles < 0.5, sampling=anatomy.spacing_mm)
    deep = rng.random() < 0.55
    room = min(0.8 * radius + 3.0, 0.75 * float(depth.max()))
    site = tissue & (depth > room)
    if deep and (site & (far > 0.5 * radius) & (far < 0.7 * radius + 18) & (depth > 25)).any():
        site &= (far > 0.5 * radius) & (far < 0.7 * radius + 18) & (depth > 25)
    site = site if site.any() else anatomy.inside & (depth >= 0.9 * depth.max())
    centre = _pick(site, rng)
    axes = np.exp(rng.normal(0, 0.17, 3))
    axes /= axes.prod() ** (1 / 3)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    offset = [
        a - c * s for a, c, s in zip(anatomy.axes_mm(), centre, anatomy.spacing_mm, strict=True)
    ]
    squared = sum(
        (sum(rotation[i, j] * offset[j] for j in range(3)) / axes[i]) ** 2 for i in range(3)
    )  # distance in the ellipsoid's own measure, mm^2
    pixel = anatomy.spacing_mm[1]
    lumps = 0.20 * radius * smooth_noise(anatomy.inside.shape, max(0.7 * radius / pixel, 2.5), rng)
    lumps += 0.09 * radius * smooth_noise(anatomy.inside.shape, max(0.3 * radius / pixel, 2.0), rng)
    field = -np.sqrt(squared).astype(np.float32) + lumps
    # it spares the ventricles and keeps off the skull
    field -= 25 * np.clip(anatomy.ventricles, 0, 1) + 4 * np.clip(2.5 - depth, 0, None)
    return np.where(anatomy.inside, field, _OUTSIDE)


def _intraventricular(anatomy: Anatomy, volume_ml: float, rng: np.random.Generator) -> Array:
    """Sediment at the lying patient's back, or a cast spreading from one place."""
    wet = ndimage.gaussian_filter(anatomy.ventricles, 0.5)
    allowed = wet > 0.25
    if not allowed.any():
        raise ValueError("no room for an intraventricular bleed: no ventricles found")
    z, y, _ = anatomy.axes_mm()
    room_ml = float((wet > 0.4).sum() * np.prod(anatomy.spacing_mm)) / 1000
    if rng.random() < 0.5 and volume_ml < 0.4 * room_ml:
        one_side = rng.random() < 0.6
        side = np.sign(rng.normal()) if one_side else 0.0
        field = y + 0.05 * z + 0 * wet + 4.0 * np.clip(side * anatomy.middle_mm / 6, -1, 1)
    else:
        centre = _pick(wet > 0.6 if (wet > 0.6).any() else allowed, rng)
        field = -_distance(anatomy, centre)
    field = field + 1.2 * smooth_noise(wet.shape, 4.0, rng) + 8.0 * np.clip(wet - 0.5, -0.5, 0.1)
    return np.where(allowed, field, _OUTSIDE).astype(np.float32)


def _one_side(anatomy: Anatomy, rng: np.random.Generator) -> tuple[Array, Array, Array, float]:
    """Depth below the skull, distance from the midline towards a random side, height, all in mm.

    And the height of the top of the brain.
    """
    depth = anatomy.depth_mm()
    side = 1.0 if rng.random() < 0.5 else -1.0
    z, _, _ = anatomy.axes_mm()
    height = z + 0 * depth
    return depth, side * anatomy.middle_mm, height, float(height[anatomy.inside].max())


def _subdural(anatomy: Anatomy, volume_ml: float, rng: np.random.Generator) -> Array:
    """A crescent along one convexity (a sixth of them along the falx), which it does not cross."""
    depth, lateral, height, top = _one_side(anatomy, rng)
    falcine = rng.random() < 0.16 and volume_ml < 25
    if falcine:
        surface = np.clip(lateral, 0, None).astype(np.float32)
        site = (
            anatomy.inside
            & (lateral > 0)
            & (lateral < 4)
            & (height > top - 60)
            & (depth < 22)
            & (depth > 3)
        )
    else:
        surface = depth
        site = (
            anatomy.inside
            & (depth < 4)
            & (lateral > 22)
            & (height > top - 95)
            & (height < top - 18)
        )
    if not site.any():
        raise ValueError(f"no room for a subdural bleed of {volume_ml} mL")
    centre = _pick(site, rng)
    thickness = rng.uniform(4.5, 7.5) + 2.2 * volume_ml ** (1 / 3) * rng.uniform(0.5, 1.0)
    spread = np.sqrt(volume_ml * 1000 / (2 * np.pi * thickness))
    spread = float(np.clip(spread * 1.35, 6.0, 62.0))
    away = _distance(anatomy, centre)
    bump = np.exp(-0.5 * (away / spread) ** 4 / 2.0) * (
        1 + 0.12 * smooth_noise(depth.shape, 9.0, rng)
    )
    field = bump * thickness - surface
    allowed = anatomy.inside & (lateral > 1.0) & (bump > 0.05) & (height > top - 115)
    return np.where(allowed, field, _OUTSIDE).astype(np.float32)


def _epidural(anatomy: Anatomy, volume_ml: float, rng: np.random.Generator) -> Array:
    """A lens: of a ball around a point of the inner table, the part that lies inside."""
    depth, lateral, height, top = _one_side(anatomy, rng)
    site = (
        anatomy.inside & (depth < 2.6) & (lateral > 18) & (height > top - 95) & (height < top - 15)
    )
    if not site.any():
        raise ValueError(f"no room for an epidural bleed of {volume_ml} mL")
    # the smoothest of a few places: on ridges of bone the smeared inside has a weaker slope
    smeared = ndimage.gaussian_filter(
        anatomy.inside.astype(np.float32), [6.0 / s for s in anatomy.spacing_mm]
    )
    slopes = np.stack(np.gradient(smeared, *anatomy.spacing_mm))
    places = [_pick(site, rng) for _ in range(6)]
    centre = max(places, key=lambda place: float(np.linalg.norm(slopes[:, *place]))).astype(
        np.float64
    )
    inwards = slopes[:, *centre.astype(int)]
    inwards = inwards / max(float(np.linalg.norm(inwards)), 1e-6)
    # the ball's centre lies outside: the further, the flatter the lens
    back_mm = rng.uniform(0.35, 0.9) * radius_mm(volume_ml)
    centre -= inwards * back_mm / np.array(anatomy.spacing_mm)
    field = -_distance(anatomy, centre) + 0.6 * smooth_noise(depth.shape, 5.0, rng)
    return np.where(anatomy.inside & (lateral > -4), field, _OUTSIDE).astype(np.float32)


def _subarachnoid(anatomy: Anatomy, volume_ml: float, rng: np.random.Generator) -> Array:
    """Blood in sulci and cisterns around one place, thick enough to be drawn on thick slices."""
    depth = anatomy.depth_mm()
    spaces = np.where(anatomy.inside, np.clip(anatomy.fluid - 1.2 * anatomy.ventricles, 0, 1), 0)
    pixel = anatomy.spacing_mm[1]
    thick = ndimage.gaussian_filter(spaces, (0.8, 1.9 / pixel, 1.9 / pixel))
    z, y, _ = anatomy.axes_mm()
    height = z + 0 * depth
    top = float(height[anatomy.inside].max())
    site = anatomy.inside & (thick > 0.33) & (depth > 2)
    if rng.random() < 0.5:  # an aneurysm's bleed, in the basal cisterns
        middle_y = float((y + 0 * depth)[anatomy.inside].mean())
        basal = site & (np.abs(anatomy.middle_mm) < 22) & (height < top - 75) & (height > top - 105)
        basal &= np.abs(y - middle_y) < 40
        site = basal if basal.any() else site
    else:
        sylvian = site & (height > top - 90) & (np.abs(anatomy.middle_mm) > 15)
        site = sylvian if sylvian.any() else site
    if not site.any():
        raise ValueError(f"no room for a subarachnoid bleed of {volume_ml} mL")
    away = _distance(anatomy, _pick(site, rng))
    reach = 2.0 * radius_mm(volume_ml) + 2.0
    field = 14.0 * np.minimum(thick - 0.28, 0.25) - 8.0 * np.clip(away / reach - 0.5, 0, None)
    field = field + 0.35 * smooth_noise(depth.shape, 5.0, rng)
    return np.where(
        anatomy.inside & (anatomy.ventricles < 0.4) & (away < 2.5 * reach), field, _OUTSIDE
    ).astype(np.float32)


_FIELDS = {
    "intraparenchymal": _intraparenchymal,
    "intraventricular": _intraventricular,
    "subdural": _subdural,
    "epidural": _epidural,
    "subarachnoid": _subarachnoid,
}


def _pick(site: Mask, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    places = np.flatnonzero(site)
    return np.array(np.unravel_index(places[rng.integers(places.size)], site.shape))


def _distance(anatomy: Anatomy, centre: npt.NDArray[np.generic]) -> Array:
    offset = [
        (a - float(c) * s) ** 2
        for a, c, s in zip(anatomy.axes_mm(), centre, anatomy.spacing_mm, strict=True)
    ]
    return np.sqrt(offset[0] + offset[1] + offset[2]).astype(np.float32)


def rasterise(
    bleed: Bleed, shape: tuple[int, int, int], voxel_ml: float, *, room: Mask | None = None
) -> Array:
    """Fraction of blood in each voxel of a finer grid, its level moved to meet the volume there.

    Args:
        bleed: The bleed to draw; its grid and the finer one cover the same box.
        shape: Shape of the finer grid.
        voxel_ml: Volume of one of its voxels.
        room: Voxels that count for the volume, those free of bone.
    """
    field = enlarge(np.maximum(bleed.field, -20.0), shape)
    level = 0.0
    near = field[(field > -6.0) if room is None else (field > -6.0) & room]
    wanted = round(bleed.volume_ml / voxel_ml)
    if near.size > wanted > 0:
        level = float(np.partition(near, near.size - wanted)[near.size - wanted])
    return np.clip((field - level) / _SOFTNESS_MM + 0.5, 0, 1)


def oedema(bleed: Bleed, fraction: Array, spacing_mm: tuple[float, float, float]) -> Array:
    """HU to take away around a bleed: most beside it, none beyond the rim's reach."""
    if not bleed.oedema_mm:
        return np.zeros_like(fraction)
    sigma = [0.5 * bleed.oedema_mm / s for s in spacing_mm]
    halo = ndimage.gaussian_filter(fraction, sigma, truncate=2.5)
    return bleed.oedema_hu * np.clip(2.2 * halo, 0, 1) * (1 - fraction)


def cannot_be_blood(
    voxels: npt.NDArray[np.generic], spacing_mm: tuple[float, float, float]
) -> Mask:
    """White (skull) or black (air, fat) once smoothed: a reader leaves it out of a bleed."""
    sigma = 0.7 / spacing_mm[1]
    smooth = ndimage.gaussian_filter(voxels.astype(np.float32), (0, sigma, sigma), truncate=2.5)
    return (smooth > 105) | (smooth < 12)


def label(
    fraction: Array, voxel_ml: float, volume_ml: float, *, least: float = 0.25
) -> npt.NDArray[np.uint8]:
    """Voxels that hold most blood, cut so that their volume is the wanted one.

    Args:
        fraction: Of blood in each voxel.
        voxel_ml: Volume of a voxel.
        volume_ml: Wanted volume; less is labelled where no more voxels hold ``least``.
        least: Voxels with a smaller fraction are not labelled.
    """
    wanted = max(round(volume_ml / voxel_ml), 1)
    candidates = fraction[fraction > least]
    if candidates.size <= wanted:
        return (fraction > least).astype(np.uint8)
    level = float(np.partition(candidates, candidates.size - wanted)[candidates.size - wanted])
    return (fraction >= min(level, 0.65)).astype(np.uint8)
