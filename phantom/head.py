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

from phantom.brain import brain_hu
from phantom.head_atlas import ATLAS_ORIGIN_MM, INSIDE, Array, load_atlas, smooth_noise
from phantom.outside import outside_hu
from phantom.person import HeadParameters

ATLAS_CENTRE_MM = np.array((10.0, 18.0, 0.0), np.float32)
VERTEX_MM = 88.0  # z of the skin's highest point in the atlas
CHANNELS = ("outside_hu", "inside", "grey", "fluid", "ventricles", "brain_hu")


@dataclass(frozen=True)
class Head:
    """One head, ready to be sampled.

    Attributes:
        maps: The channels of ``CHANNELS``, ``(1, channel, z, y, x)`` on the atlas, and maybe slices
            below it.
        parameters: The person that it was made from.
        bend_mm: Displacement field ``(3, z, y, x)`` over the scanner's frame, with nodes
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

    within = brain_hu(atlas, parameters, grey, fluid, rng)
    outside = outside_hu(atlas, parameters, rng)
    maps = np.stack([outside, inside, grey, fluid, wet, within])
    bend = np.stack([
        parameters.bend_mm * _noise_nodes(40.0, rng) + 0.9 * _noise_nodes(13.0, rng) for _ in
        range(3)
    ])  # fmt: skip
    return Head(torch.from_numpy(maps)[None], parameters, bend.astype(np.float32))


def atlas_position(
    head: Head, axes_mm: tuple[Array, Array, Array], push_mm: Array | None = None
) -> torch.Tensor:
    """Where each grid point of the scanner's frame lies in the atlas, in mm ``(z, y, x, 3)``.

    Args:
        head: The head on the grid.
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
    """Linear interpolation of ``(1, channel, z, y, x)`` maps; edge values go on outwards.

    Slices that maps have more than the atlas lie below it.
    """
    size = torch.tensor(maps.shape[2:], dtype=torch.float32) - 1
    origin = ATLAS_ORIGIN_MM - (maps.shape[2] - load_atlas().tissue.shape[0], 0, 0)
    unit = (atlas_mm - torch.from_numpy(origin.astype(np.float32))) / size * 2 - 1
    return torch.nn.functional.grid_sample(
        maps, unit.flip(-1)[None], padding_mode="border", align_corners=True
    )[0]


def lowest_mm(parameters: HeadParameters) -> float:
    """Height of the atlas's lowest slice, below the head's middle, untilted; negative."""
    return float(ATLAS_ORIGIN_MM[0] - ATLAS_CENTRE_MM[0]) * parameters.scale[0]


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


def _noise_nodes(scale_mm: float, rng: np.random.Generator) -> Array:
    return smooth_noise((BEND_NODES,) * 3, scale_mm / BEND_STEP_MM, rng)
