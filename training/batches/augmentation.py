"""What augmentation does, for both engines: probabilities and ranges, and what was drawn of them.

Everything that has a name and a number is drawn here, from the sample's own generator, so both
engines (``augment_host`` on the host, ``augment_device`` on the training device) do the same for
the same generator. They differ in how they apply it and in the random fields that they fill
themselves (noise, elastic displacement), for which a seed is drawn here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

OUTSIDE = -1  # label outside the image or outside its nonzero region
Shape = tuple[int, int, int]


def flag(default: Any, doc: str) -> Any:
    """A field, with the line that its flag's help shows."""
    return field(default=default, metadata={"help": doc})


@dataclass(frozen=True, slots=True)
class AugmentationConfig:
    """Probabilities and ranges (low, high) in the order in which they are applied; flags of train.

    The defaults are the 2018 recipe (C19); of what it leaves out, the ranges are V2's. Factors
    (scaling, brightness, contrast, gamma) are below 1 in half of the draws and above in the others.
    """

    elastic_probability: float = flag(0.2, "of an elastic deformation")
    elastic_alpha: tuple[float, float] = flag(
        (0.0, 900.0), "its displacement before smoothing, in voxels, of a 3D warp"
    )
    elastic_alpha_2d: tuple[float, float] = flag((0.0, 200.0), "the same of an in-plane warp")
    elastic_sigma: tuple[float, float] = flag((9.0, 13.0), "its smoothing in voxels")
    rotation_probability: float = flag(0.2, "of a rotation")
    rotation_degrees: float = flag(15.0, "at most, either way, about each axis of a 3D warp")
    rotation_degrees_2d: float = flag(180.0, "the same of an in-plane warp")
    rotation_degrees_oblong: float = flag(
        15.0, "the same where a 2D network's patch is oblong (above 1.5 : 1)"
    )
    scaling_probability: float = flag(0.2, "of scaling, alike along all warped axes")
    scaling: tuple[float, float] = flag(
        (0.85, 1.25), "of the sampled region: above 1, all looks smaller"
    )
    noise_probability: float = flag(0.0, "of Gaussian noise")
    noise_deviation: tuple[float, float] = flag((0.0, 0.1), "its standard deviation")
    blur_probability: float = flag(0.0, "of Gaussian blur")
    blur_channel_probability: float = flag(0.5, "of each channel then")
    blur_sigma: tuple[float, float] = flag((0.5, 1.0), "in voxels, along each axis")
    brightness_probability: float = flag(0.0, "of a multiplied intensity")
    brightness: tuple[float, float] = flag((0.75, 1.25), "factor of each channel")
    contrast_probability: float = flag(0.0, "of a changed contrast, clipped to the old range")
    contrast: tuple[float, float] = flag(
        (0.75, 1.25), "factor of each channel's distance from its mean"
    )
    low_resolution_probability: float = flag(0.0, "of a simulated low resolution")
    low_resolution_channel_probability: float = flag(0.5, "of each channel then")
    low_resolution: tuple[float, float] = flag(
        (0.5, 1.0), "what its size is multiplied by in between"
    )
    inverted_gamma_probability: float = flag(0.0, "of a gamma change of the inverted image")
    gamma_probability: float = flag(0.3, "of a gamma change; both keep mean and deviation")
    gamma: tuple[float, float] = flag((0.7, 1.5), "exponent of each channel")
    mirror_probability: float = flag(0.5, "of mirroring along each axis")
    morphology_probability: float = flag(
        0.4, "cascade: of growing, shrinking, closing or opening the first stage's labels"
    )
    morphology_label_probability: float = flag(0.5, "of each label then")
    morphology_radius: tuple[float, float] = flag((1.0, 8.0), "by a ball of so many voxels")
    removal_probability: float = flag(
        0.2, "cascade: of removing a component of the first stage's labels"
    )
    removal_label_probability: float = flag(0.5, "of each label then")
    removal_share: float = flag(0.15, "only of components smaller than this share of a patch")
    image_order: int = flag(
        3, "spline order of the warped image, 0, 1 or 3; the device engine takes 3 for 1"
    )
    target_order: int = flag(1, "the same of each label, 0 or 1")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            name, value = option.name, getattr(self, option.name)
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, expected 0 to 1")
            if isinstance(value, (tuple, list)) and not 0 <= value[0] <= value[1]:
                raise ValueError(f"{name} is {value[0]} to {value[1]}, expected a range")
        if not 0 < self.low_resolution[0] <= self.low_resolution[1] <= 1:
            low, high = self.low_resolution
            raise ValueError(f"low_resolution is {low} to {high}, expected above 0 to 1")
        if self.image_order not in (0, 1, 3) or self.target_order not in (0, 1):
            raise ValueError(
                f"orders {self.image_order} and {self.target_order}, expected 0, 1 or 3 and 0 or 1"
            )


MSD2018 = AugmentationConfig()
NNUNETV2 = AugmentationConfig(
    elastic_probability=0,
    rotation_degrees=30,
    scaling=(0.7, 1.4),
    noise_probability=0.1,
    blur_probability=0.2,
    brightness_probability=0.15,
    contrast_probability=0.15,
    low_resolution_probability=0.25,
    inverted_gamma_probability=0.1,
    image_order=1,
)
NO_AUGMENTATION = AugmentationConfig(
    elastic_probability=0,
    rotation_probability=0,
    scaling_probability=0,
    gamma_probability=0,
    mirror_probability=0,
    morphology_probability=0,
    removal_probability=0,
)


@dataclass(frozen=True, slots=True)
class Warp:
    """One drawn spatial change, applied in the order elastic, rotation, scaling.

    Attributes:
        elastic: Displacement (alpha) and smoothing (sigma) in voxels, or None.
        angles: Radians about z, y, x (3D), or the one in-plane angle (each slice alike).
        scale: Factor of the sampled region.
    """

    elastic: tuple[float, float] | None
    angles: tuple[float, ...]
    scale: float

    def matrix(self) -> npt.NDArray[np.float64]:
        """Rotation and scaling: an output offset (column) times this is an input offset."""
        if len(self.angles) == 1:
            return self.scale * _plane_rotation(self.angles[0], 2, (0, 1))
        z, y, x = self.angles
        rotation = (
            _plane_rotation(z, 3, (1, 2))
            @ _plane_rotation(y, 3, (0, 2))
            @ _plane_rotation(x, 3, (0, 1))
        )
        return self.scale * rotation

    def reach(self, patch: Shape) -> Shape:
        """Size ``(z, y, x)`` of the centred region that the warp reads to fill ``patch``.

        The true bounding size of the drawn change, where nnU-Net reads one size for the worst
        case, caps angles at 90 degrees and divides by the wrong end of the scale. An elastic
        displacement is allowed three standard deviations; further out is read as outside.
        """
        axes = len(self.matrix())
        half = (np.array(patch[3 - axes :]) - 1) / 2
        need = np.abs(self.matrix()) @ half
        if self.elastic is not None:
            alpha, sigma = self.elastic
            # uniform noise of deviation 1/sqrt(3), smoothed by a Gaussian in as many axes
            deviation = alpha / math.sqrt(3) / (2 * math.sqrt(math.pi) * sigma) ** (axes / 2)
            need += self.scale * 3 * deviation
        extra = np.ceil(np.maximum(need - half, 0)).astype(int) + 1  # one for the spline's taps
        grown = [size + 2 * int(more) for size, more in zip(patch[3 - axes :], extra, strict=True)]
        z, y, x = (*patch[: 3 - axes], *grown)
        return z, y, x


@dataclass(frozen=True, slots=True)
class Changes:
    """What was drawn for a patch besides its warp, in the order of application.

    All but the last three have one entry for each channel; None leaves the channel as it is.

    Attributes:
        noise: Standard deviation of added noise.
        blur: Sigma in voxels along z, y, x.
        brightness: Factor.
        contrast: Factor of the distance from the mean.
        low_resolution: What the size is multiplied by in between, along ``zoomed`` axes.
        inverted_gamma: Exponent for the inverted image.
        gamma: Exponent.
        zoomed: First axis whose resolution is lowered: 0, or 1 (slices are left alone).
        mirrored: Axes to mirror, of 0 to 2.
        seed: Seed of the random fields that the engine fills itself.
    """

    noise: tuple[float | None, ...]
    blur: tuple[tuple[float, float, float] | None, ...]
    brightness: tuple[float | None, ...]
    contrast: tuple[float | None, ...]
    low_resolution: tuple[float | None, ...]
    inverted_gamma: tuple[float | None, ...]
    gamma: tuple[float | None, ...]
    zoomed: int
    mirrored: tuple[int, ...]
    seed: int


def draw_warp(
    rng: np.random.Generator, config: AugmentationConfig, patch: Sequence[int], *, in_plane: bool
) -> Warp | None:
    """Draw a spatial change, or None when the sample is to stay as it is.

    Args:
        rng: Source of the draw.
        config: Probabilities and ranges.
        patch: The network's patch, two or three axes.
        in_plane: Leave the slice axis alone (dummy-2D); a patch of two axes always does.
    """
    flat = in_plane or len(patch) == 2
    elastic, angles, scale = None, (0.0,) * (1 if flat else 3), 1.0
    if rng.random() < config.elastic_probability:
        alpha = rng.uniform(*(config.elastic_alpha_2d if flat else config.elastic_alpha))
        elastic = (float(alpha), float(rng.uniform(*config.elastic_sigma)))
    if rng.random() < config.rotation_probability:
        limit = config.rotation_degrees_2d if flat else config.rotation_degrees
        if len(patch) == 2 and max(patch) / min(patch) > 1.5:
            limit = config.rotation_degrees_oblong
        angles = tuple(math.radians(rng.uniform(-limit, limit)) for _ in angles)
    if rng.random() < config.scaling_probability:
        scale = _draw_factor(rng, config.scaling)
    if elastic is None and scale == 1.0 and not any(angles):
        return None
    return Warp(elastic, angles, scale)


def draw_changes(
    rng: np.random.Generator,
    config: AugmentationConfig,
    channels: int,
    patch: Shape,
    *,
    in_plane: bool,
) -> Changes:
    """Draw all changes that follow the warp.

    Args:
        rng: Source of the draw.
        config: Probabilities and ranges.
        channels: Number of channels of the image.
        patch: Three axes; a 2D patch is one slice thick.
        in_plane: Leave the resolution between slices alone (dummy-2D).
    """
    nothing = (None,) * channels

    def factors(probability: float, limits: tuple[float, float]) -> tuple[float | None, ...]:
        if rng.random() >= probability:
            return nothing
        return tuple(_draw_factor(rng, limits) for _ in nothing)

    seed = int(rng.integers(2**32))
    noise: tuple[float | None, ...] = nothing
    if rng.random() < config.noise_probability:
        noise = (float(rng.uniform(*config.noise_deviation)),) * channels
    blur: tuple[tuple[float, float, float] | None, ...] = nothing
    if rng.random() < config.blur_probability:
        chosen = rng.random(channels) < config.blur_channel_probability
        blur = tuple(_draw_three(rng, config.blur_sigma) if c else None for c in chosen)
    brightness = factors(config.brightness_probability, config.brightness)
    contrast = factors(config.contrast_probability, config.contrast)
    zooms: tuple[float | None, ...] = nothing
    if rng.random() < config.low_resolution_probability:
        chosen = rng.random(channels) < config.low_resolution_channel_probability
        zooms = tuple(float(rng.uniform(*config.low_resolution)) if c else None for c in chosen)
    inverted_gamma = factors(config.inverted_gamma_probability, config.gamma)
    gamma = factors(config.gamma_probability, config.gamma)
    flips = rng.random(3) < config.mirror_probability
    return Changes(
        noise=noise,
        blur=blur,
        brightness=brightness,
        contrast=contrast,
        low_resolution=zooms,
        inverted_gamma=inverted_gamma,
        gamma=gamma,
        zoomed=1 if in_plane or patch[0] == 1 else 0,
        mirrored=tuple(axis for axis in range(3) if flips[axis]),
        seed=seed,
    )


def _plane_rotation(
    angle: float, dimensions: int, plane: tuple[int, int]
) -> npt.NDArray[np.float64]:
    matrix = np.eye(dimensions)
    a, b = plane
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def _draw_three(
    rng: np.random.Generator, limits: tuple[float, float]
) -> tuple[float, float, float]:
    z, y, x = (float(value) for value in rng.uniform(*limits, 3))
    return z, y, x


def _draw_factor(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    """Half of the draws below 1, half above, if the range straddles it (as batchgenerators)."""
    low, high = limits
    if low < 1 < high:
        low, high = (low, 1.0) if rng.random() < 0.5 else (1.0, high)
    return float(rng.uniform(low, high))
