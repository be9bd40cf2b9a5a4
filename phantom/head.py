"""A head to scan: the atlas bent into an individual, as HU on any grid of points.

Points are in mm in the scanner's frame, ``(z, y, x)`` = (superior, posterior, left), zero at the
head's middle. ``Head`` says where each of them lies in the atlas, and what is there. The atlas
(``phantom/atlas``) is a real anatomy at 1 mm; everything that differs between people and days is
drawn here from a generator.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from phantom.head_atlas import ATLAS_ORIGIN_MM, INSIDE, Array, Atlas, load_atlas, smooth_noise
from phantom.outside import outside_hu

ATLAS_CENTRE_MM = np.array((10.0, 18.0, 0.0), np.float32)
VERTEX_MM = 88.0  # z of the skin's highest point in the atlas
CHANNELS = ("outside_hu", "inside", "grey", "fluid", "ventricles")


@dataclass(frozen=True, slots=True)
class HeadParameters:
    """What makes one head differ from another; angles in degrees, HU of the pure tissues."""

    mirrored: bool
    scale: tuple[float, float, float]
    angles_deg: tuple[float, float, float]
    """Pitch (chin down), roll (ear to shoulder), yaw (head turned)."""
    bend_mm: float
    average_share: float
    """How much of the brain comes from the ICBM152 average instead of Colin 27."""
    fluid_exponent: float
    """Below 1 widens sulci (age), above 1 narrows them (youth, swelling)."""
    ventricle_growth_mm: float
    pallor_hu: float
    """Loss of density of white matter around the ventricles (leukoaraiosis)."""
    old_infarct: bool
    grey_hu: float
    white_hu: float
    fluid_hu: float
    muscle_hu: float
    fat_hu: float
    bone_hu: float
    spongy_hu: float
    dura_hu: float
    lens_hu: float
    rim_hu: float
    """Brightening towards the inner table, what bone correction leaves over; strongest at the
    vertex. The strongest also shows the dura as a line."""
    calcified: tuple[str, ...]


def draw_head(rng: np.random.Generator) -> HeadParameters:
    """A person: size, pose, age, densities."""
    size = 0.955 * rng.normal(1.0, 0.035)
    age = rng.beta(1.8, 1.2)
    calcified = [name for name, chance in _CALCIFICATION_CHANCE.items() if rng.random() < chance]
    return HeadParameters(
        mirrored=bool(rng.random() < 0.5),
        scale=(_vary(size, rng), _vary(size, rng), _vary(size, rng)),
        angles_deg=(float(rng.normal(4, 8)), float(rng.normal(0, 4)), float(rng.normal(0, 6))),
        bend_mm=float(rng.uniform(1.5, 3.5)),
        average_share=float(rng.uniform(0.0, 0.7)),
        fluid_exponent=float(np.exp(0.35 - 1.25 * age + rng.normal(0, 0.12))),
        ventricle_growth_mm=float(-0.7 + 4.8 * age**1.5 + rng.normal(0, 0.7)),
        pallor_hu=float(max(0.0, rng.normal(10 * age - 2, 2.5))),
        old_infarct=bool(rng.random() < 0.2),
        grey_hu=float(rng.normal(35.7, 1.2)),
        white_hu=float(rng.normal(24.0, 1.2)),
        fluid_hu=float(rng.normal(7.5, 1.5)),
        muscle_hu=float(rng.normal(60, 8)),
        fat_hu=float(rng.normal(-95, 8)),
        bone_hu=float(rng.normal(1500, 120)),
        spongy_hu=float(rng.normal(800, 150)),
        dura_hu=float(rng.normal(53, 6)),
        lens_hu=float(rng.normal(80, 10)),
        rim_hu=float(rng.uniform(1.5, 8.0)),
        calcified=tuple(calcified),
    )


_CALCIFICATION_CHANCE = {
    "pineal": 0.7, "left choroid": 0.6, "right choroid": 0.6,
    "left pallidum": 0.12, "right pallidum": 0.12,
    "falx": 0.2, "left carotid": 0.4, "right carotid": 0.4,
}  # fmt: skip
_CALCIFICATION_SITE_MM = {  # (z, y, x) in the atlas
    "pineal": (3.0, 27.0, 0.0),
    "left choroid": (10.0, 42.0, 22.0), "right choroid": (10.0, 42.0, -22.0),
    "left pallidum": (0.0, 5.0, 19.0), "right pallidum": (0.0, 5.0, -19.0),
    "falx": (50.0, -35.0, 0.0),
    "left carotid": (-20.0, -6.0, 13.0), "right carotid": (-20.0, -6.0, -13.0),
}  # fmt: skip


@dataclass(frozen=True)
class Head:
    """One head, ready to be sampled.

    Attributes:
        maps: The channels of ``CHANNELS`` and the brain's own HU, stacked ``(channel, z, y, x)`` on
            the atlas.
        parameters: What it was made from.
        bend_mm: Displacement field ``(3, z, y, x)`` over the scanner's frame, nodes
            ``BEND_STEP_MM`` apart.
    """

    maps: torch.Tensor
    parameters: HeadParameters
    bend_mm: Array = field(repr=False)


BEND_STEP_MM = 6.0
BEND_NODES = 48  # the displacement field covers 282 mm, zero at its middle


def make_head(parameters: HeadParameters, rng: np.random.Generator) -> Head:
    """Fill the atlas with this person's tissues and draw how it is bent."""
    atlas = load_atlas()
    shape = atlas.tissue.shape
    share = smooth_noise(shape, 22.0, rng) + 2.2 * (2 * parameters.average_share - 1)
    share = 1 / (1 + np.exp(-5 * share))
    grey = atlas.grey[0] + share * (atlas.grey[1] - atlas.grey[0])
    fluid = atlas.fluid[0] + share * (atlas.fluid[1] - atlas.fluid[0])
    wet = atlas.ventricles[0] + share * (atlas.ventricles[1] - atlas.ventricles[0])
    sulci = np.power(fluid, parameters.fluid_exponent, dtype=np.float32)
    fluid = np.maximum(np.where(wet > 0.5, fluid, sulci), wet)
    grey = np.minimum(grey, 1 - fluid)
    inside = ndimage.gaussian_filter((atlas.tissue == INSIDE).astype(np.float32), 0.5)

    brain_hu = _brain_hu(atlas, parameters, grey, fluid, rng)
    outside = outside_hu(atlas, parameters, rng)
    maps = np.stack([outside, inside, grey, fluid, wet, brain_hu])
    bend = np.stack([
        parameters.bend_mm * _noise_nodes(40.0, rng) + 0.9 * _noise_nodes(13.0, rng) for _ in
        range(3)
    ])  # fmt: skip
    return Head(torch.from_numpy(maps)[None], parameters, bend.astype(np.float32))


def _brain_hu(
    atlas: Atlas, p: HeadParameters, grey: Array, fluid: Array, rng: np.random.Generator
) -> Array:
    """HU within the dura, with falx, tentorium, sinuses, vessels, calcifications and old damage."""
    shape = grey.shape
    white = 1 - grey - fluid
    near = np.exp(-_full(atlas.ventricle_distance_mm, shape) / 9.0)
    patchy = 1 + 0.5 * smooth_noise(shape, 8.0, rng)
    hu = (
        p.grey_hu * grey
        + p.fluid_hu * fluid
        + white * (p.white_hu - p.pallor_hu * near * np.clip(patchy, 0, 2))
    )
    hu += (1 - fluid) * (1.0 * smooth_noise(shape, 6.0, rng) + 0.8 * smooth_noise(shape, 25.0, rng))
    z, y, x = (
        ATLAS_ORIGIN_MM[a] + np.indices(shape, sparse=True)[a].astype(np.float32) for a in range(3)
    )
    depth = _full(atlas.depth_mm, shape)

    if p.old_infarct:
        site = _random_site(atlas, rng)
        far = np.sqrt((z - site[0]) ** 2 + (y - site[1]) ** 2 + (x - site[2]) ** 2)
        radius = rng.uniform(7, 22)
        damage = np.clip((radius - far + 5 * smooth_noise(shape, 6.0, rng)) / 6 + 0.5, 0, 1)
        hu += damage * (rng.uniform(9, 20) - hu) * (depth > 1)
    # falx: a sheet in the midline above the corpus callosum, thicker behind
    above = ((y - 18) / 62) ** 2 + ((z - 2) / 38) ** 2 > 1
    wave = 1.2 * np.sin(y / 31 + rng.uniform(0, 6)) * np.sin(z / 27 + rng.uniform(0, 6))
    sheet = np.clip(1.3 - np.abs(x - wave) / 1.0, 0, 1) * above * (z > -8 - 0.12 * y) * (depth < 55)
    # tentorium: a tent whose ridge falls to the sides, behind the midbrain
    roof = 2.0 - 0.011 * x**2 - 0.0045 * (y - 50) ** 2 - 0.10 * (y - 40)
    tent = np.clip(1.0 - np.abs(z - roof) / 1.1, 0, 1) * (y > 32 + 0 * z) * (np.abs(x) > 3 + 0 * z)
    sinus = (
        np.clip(2.0 - depth / 3.5 - np.abs(x) / 4.5, 0, 1) * (z > -10) * (depth > 0.5) * (y > -50)
    )
    transverse = np.clip(1.4 - depth / 4.5 - np.abs(z - roof) / 5, 0, 1) * (y > 50)
    dura = np.maximum.reduce([sheet, 0.7 * tent, sinus * np.ones_like(hu), transverse])
    hu += dura * (p.dura_hu - hu)
    # basilar, carotids and middle cerebral arteries stand out a little against fluid
    basilar = np.exp(-(((x - 1) / 1.7) ** 2 + ((y - 14 - 0.08 * (z + 30)) / 1.7) ** 2)) * (
        np.abs(z + 28) < 16
    )
    lateral = np.exp(-((z + 15) ** 2 + (y + 3 - 0.12 * (np.abs(x) - 15)) ** 2) / 3.0) * (
        np.abs(np.abs(x) - 22) < 12
    )
    vessel = np.maximum(basilar, lateral)
    hu += vessel * np.clip(p.grey_hu + 9 - hu, 0, None)
    hu += p.rim_hu * np.exp(-depth / 12.0)
    # where that is strong, the dura under the inner table shows as a thin bright line, too
    line = np.clip((p.rim_hu - 1.5) / 6.5, 0, 1) * np.clip(1.5 - depth / 2.0, 0, 1)
    hu += 0.6 * line * np.clip(p.dura_hu - hu, 0, None)
    hu = hu.astype(np.float32)
    for name in p.calcified:
        _add_calcification(hu, name, rng)
    return hu


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


def atlas_position(
    head: Head, axes_mm: tuple[Array, Array, Array], push_mm: Array | None = None
) -> torch.Tensor:
    """Where each grid point of the scanner's frame lies in the atlas, in mm ``(z, y, x, 3)``.

    Args:
        head: Whose.
        axes_mm: The grid's coordinates along z, y and x.
        push_mm: Displacement ``(3, z, y, x)`` by mass effect, on the same nodes as
            ``head.bend_mm``.
    """
    p = head.parameters
    field_mm = head.bend_mm if push_mm is None else head.bend_mm + push_mm
    half = BEND_STEP_MM * (BEND_NODES - 1) / 2
    grid = torch.stack(
        torch.meshgrid(*(torch.from_numpy(axis) for axis in axes_mm), indexing="ij"), -1
    )
    bent = torch.nn.functional.grid_sample(
        torch.from_numpy(field_mm)[None],
        (grid / half).flip(-1)[None],
        padding_mode="border",
        align_corners=True,
    )[0]
    turned = torch.from_numpy(
        (_rotation(p.angles_deg) / np.array(p.scale)[None, :]).astype(np.float32)
    )
    atlas_mm = (grid + bent.movedim(0, -1)) @ turned  # rows: R^T p, then divided by the scale
    if p.mirrored:
        atlas_mm[..., 2] *= -1
    atlas_mm = atlas_mm + torch.from_numpy(ATLAS_CENTRE_MM)
    if p.ventricle_growth_mm:
        atlas_mm = atlas_mm + _growth(head, atlas_mm)
    return atlas_mm


def _growth(head: Head, atlas_mm: torch.Tensor) -> torch.Tensor:
    """Step towards the ventricles so that they appear wider (or narrower), dying out over 12 mm."""
    return (
        sample(_growth_field()[None], atlas_mm).movedim(0, -1) * head.parameters.ventricle_growth_mm
    )


@functools.lru_cache(maxsize=1)
def _growth_field() -> torch.Tensor:
    far = load_atlas().ventricle_distance_mm
    slope = np.stack(np.gradient(ndimage.gaussian_filter(far, 1.5), 2.0))
    fade = np.exp(-far / 12.0) * np.clip(load_atlas().depth_mm / 15, 0, 1)
    field_2mm = torch.from_numpy((-slope * fade).astype(np.float32))[None]
    full = torch.nn.functional.interpolate(
        field_2mm, load_atlas().tissue.shape, mode="trilinear", align_corners=True
    )
    return full[0]


def sample(maps: torch.Tensor, atlas_mm: torch.Tensor) -> torch.Tensor:
    """Linear interpolation of ``(1, channel, z, y, x)`` atlas maps; edge values go on outwards."""
    size = torch.tensor(maps.shape[2:], dtype=torch.float32) - 1
    unit = (atlas_mm - torch.from_numpy(ATLAS_ORIGIN_MM)) / size * 2 - 1
    return torch.nn.functional.grid_sample(
        maps, unit.flip(-1)[None], padding_mode="border", align_corners=True
    )[0]


def vertex_mm(parameters: HeadParameters) -> float:
    """Height of the skin's highest point above the head's middle, untilted."""
    return (VERTEX_MM - float(ATLAS_CENTRE_MM[0])) * parameters.scale[0]


def _rotation(angles_deg: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """Head to scanner, ``(z, y, x)`` on both sides: pitch (x), then roll (y), yaw (z)."""
    pitch, roll, yaw = np.radians(angles_deg)
    about_x = np.array(
        [[np.cos(pitch), np.sin(pitch), 0], [-np.sin(pitch), np.cos(pitch), 0], [0, 0, 1]]
    )
    about_y = np.array(
        [[np.cos(roll), 0, np.sin(roll)], [0, 1, 0], [-np.sin(roll), 0, np.cos(roll)]]
    )
    about_z = np.array([[1, 0, 0], [0, np.cos(yaw), np.sin(yaw)], [0, -np.sin(yaw), np.cos(yaw)]])
    return about_z @ about_y @ about_x


def _vary(value: float, rng: np.random.Generator) -> float:
    return float(value * rng.normal(1.0, 0.02))


def _noise_nodes(scale_mm: float, rng: np.random.Generator) -> Array:
    return smooth_noise((BEND_NODES,) * 3, scale_mm / BEND_STEP_MM, rng)


def _full(half: Array, shape: tuple[int, ...]) -> Array:
    tensor = torch.from_numpy(half)[None, None]
    return torch.nn.functional.interpolate(tensor, shape, mode="trilinear", align_corners=True)[
        0, 0
    ].numpy()
