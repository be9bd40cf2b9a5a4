"""Augmentation of the 2018 recipe with batchgenerators' functions.

Elastic deformation, rotation and scaling in one interpolation, then gamma, then mirroring. What to
do is drawn first (``draw_warp``), so a patch is read from the case exactly as large as its warp
needs it. The only module that imports batchgenerators.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from batchgenerators.augmentations.color_augmentations import augment_gamma
from batchgenerators.augmentations.utils import (
    create_zero_centered_coordinate_mesh,
    elastic_deform_coordinates,
    interpolate_img,
)

FloatArray = npt.NDArray[np.float32]
OUTSIDE = -1  # target outside the image or outside its nonzero region


@dataclass(frozen=True, slots=True)
class AugmentationConfig:
    """Probabilities and ranges, per sample; each range is (low, high).

    Attributes:
        elastic_probability: Of an elastic deformation.
        elastic_alpha: Its displacement before smoothing, in voxels, for a 3D warp.
        elastic_alpha_2d: The same for an in-plane warp.
        elastic_sigma: Its smoothing in voxels.
        rotation_probability: Of a rotation.
        rotation_degrees: At most so far about each axis, either way, for a 3D warp.
        rotation_degrees_2d: The same for an in-plane warp.
        rotation_degrees_oblong: For a 2D network whose patch is oblong (edges above 1.5 : 1).
        scaling_probability: Of scaling, alike along all warped axes.
        scaling: Factor of the sampled region, so above 1 shrinks what is seen.
        gamma_probability: Of a gamma change that keeps mean and deviation.
        gamma: Its exponent.
        mirror_probability: Of mirroring along each axis.
        image_order: Spline order of the warped image, 0, 1 or 3.
        target_order: The same of each label.
    """

    elastic_probability: float = 0.2
    elastic_alpha: tuple[float, float] = (0.0, 900.0)
    elastic_alpha_2d: tuple[float, float] = (0.0, 200.0)
    elastic_sigma: tuple[float, float] = (9.0, 13.0)
    rotation_probability: float = 0.2
    rotation_degrees: float = 15.0
    rotation_degrees_2d: float = 180.0
    rotation_degrees_oblong: float = 15.0
    scaling_probability: float = 0.2
    scaling: tuple[float, float] = (0.85, 1.25)
    gamma_probability: float = 0.3
    gamma: tuple[float, float] = (0.7, 1.5)
    mirror_probability: float = 0.5
    image_order: int = 3
    target_order: int = 1

    def __post_init__(self) -> None:
        for name in ("elastic", "rotation", "scaling", "gamma", "mirror"):
            probability = getattr(self, f"{name}_probability")
            if not 0 <= probability <= 1:
                raise ValueError(f"{name}_probability is {probability}, expected 0 to 1")
        for name in ("elastic_alpha", "elastic_alpha_2d", "elastic_sigma", "scaling", "gamma"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name} is {low} to {high}, expected a range")
        if self.image_order not in (0, 1, 3) or self.target_order not in (0, 1):
            raise ValueError(
                f"orders {self.image_order} and {self.target_order}, expected 0, 1 or 3 and 0 or 1"
            )


NO_AUGMENTATION = AugmentationConfig(
    elastic_probability=0,
    rotation_probability=0,
    scaling_probability=0,
    gamma_probability=0,
    mirror_probability=0,
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

    def reach(self, patch: tuple[int, int, int]) -> tuple[int, int, int]:
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


def augment(
    data: FloatArray,
    target: npt.NDArray[np.int8],
    warp: Warp | None,
    patch: tuple[int, int, int],
    config: AugmentationConfig,
    rng: np.random.Generator,
    *,
    two_dimensional: bool = False,
) -> tuple[FloatArray, npt.NDArray[np.int8]]:
    """Apply the drawn warp, then gamma and mirroring drawn from ``rng``.

    Args:
        data: ``(C, Z, Y, X)``, of the size ``warp.reach(patch)`` or, without a warp, ``patch``.
        target: ``(Z, Y, X)``; -1 is outside the image or its nonzero region.
        warp: From ``draw_warp``.
        patch: Size of the result ``(z, y, x)``.
        config: Probabilities and ranges.
        rng: Source of all further draws, also of those that batchgenerators makes.
        two_dimensional: The patch is a slice, so its first axis is no axis to mirror.

    Returns:
        The patch ``(C, *patch)`` and its target, in which -1 is still -1.
    """
    with _seeded_globals(rng):
        if warp is not None:
            data, target = _apply_warp(data, target, warp, patch, config)
        if rng.random() < config.gamma_probability:
            data = augment_gamma(
                data, gamma_range=config.gamma, per_channel=True, retain_stats=True
            )
        drawn = [rng.random() < config.mirror_probability for _ in range(3)]
        first = 1 if two_dimensional else 0
        axes = tuple(axis for axis in range(first, 3) if drawn[axis])
        data = np.flip(data, tuple(axis + 1 for axis in axes))
        target = np.flip(target, axes)
    return np.ascontiguousarray(data, dtype=np.float32), np.ascontiguousarray(target)


def _apply_warp(
    data: FloatArray,
    target: npt.NDArray[np.int8],
    warp: Warp,
    patch: tuple[int, int, int],
    config: AugmentationConfig,
) -> tuple[FloatArray, npt.NDArray[np.int8]]:
    flat = len(warp.angles) == 1
    grid = patch[1:] if flat else patch
    coordinates = create_zero_centered_coordinate_mesh(grid)
    if warp.elastic is not None:
        coordinates = elastic_deform_coordinates(coordinates, *warp.elastic)
    # einsum and not a BLAS product, whose rounding may depend on the number of threads
    coordinates = np.einsum("ij,j...->i...", warp.matrix(), coordinates)
    for axis, size in enumerate(data.shape[-len(grid) :]):
        coordinates[axis] += (size - 1) / 2
    # dummy-2D: slices are folded into channels, so all of them get the same in-plane change
    images = data.reshape(-1, *data.shape[-len(grid) :])  # (C * Z, Y, X) or (C, Z, Y, X)
    labels = target.reshape(-1, *target.shape[-len(grid) :])  # (Z, Y, X) or (1, Z, Y, X)
    warped = [
        interpolate_img(image, coordinates, config.image_order, "constant", cval=0.0)
        for image in images
    ]
    moved = [
        interpolate_img(
            label, coordinates, config.target_order, "constant", cval=OUTSIDE, is_seg=True
        )
        for label in labels
    ]
    return np.stack(warped).reshape(-1, *patch), np.stack(moved).reshape(patch)


def _plane_rotation(
    angle: float, dimensions: int, plane: tuple[int, int]
) -> npt.NDArray[np.float64]:
    matrix = np.eye(dimensions)
    a, b = plane
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def _draw_factor(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    """Half of the draws below 1, half above, if the range straddles it (as batchgenerators)."""
    low, high = limits
    if rng.random() < 0.5 and low < 1:
        return float(rng.uniform(low, min(1.0, high)))
    return float(rng.uniform(max(low, 1.0), max(high, low, 1.0)))


@contextlib.contextmanager
def _seeded_globals(rng: np.random.Generator) -> Iterator[None]:
    """Seed the two global generators that batchgenerators draws from, and put them back."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    seed = int(rng.integers(2**32))
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
