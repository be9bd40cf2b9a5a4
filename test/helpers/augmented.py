"""A phantom to augment and what is measured of the result.

NumPy alone: ``benchmarks/nnunetv2_augmentation.py`` measures nnunetv2's augmentation by this file.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

PATCHES = {False: (20, 20, 20), True: (4, 20, 20)}  # whether the augmentation is in-plane
SPATIAL = ("angle", "volume", "shift")
INTENSITY = ("mean", "deviation", "skewness", "roughness", "change")
Volume = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int8]
Balls = tuple[int, npt.NDArray[np.float64], npt.NDArray[np.float64]]


@functools.cache
def phantom(size: tuple[int, int, int], *, in_plane: bool) -> tuple[Volume, Labels]:
    """A ball (1) with a smaller one (2) beside it along x, in waves; the middle is the centre.

    In-plane they are cylinders. All of them stay in the patch however far it is scaled.

    Returns:
        Image and labels, both ``size``, not to be written to; the image's deviation is about 1.
    """
    z, y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in size), indexing="ij")
    if in_plane:
        z = z * 0
    labels = np.zeros(size, np.int8)
    labels[z**2 + y**2 + x**2 <= 3.4**2] = 1
    labels[z**2 + y**2 + (x - 5) ** 2 <= 1.8**2] = 2
    waves = np.sin(0.9 * y + 0.2 * z) + np.cos(1.1 * x - 0.4 * z)
    image = 0.6 * waves + 2.0 * np.exp(-(z**2 + y**2 + x**2) / 30) - 0.3
    return image.astype(np.float32), labels


def measure(image: Volume, labels: Labels, *, in_plane: bool) -> dict[str, float]:
    """Numbers of one augmented patch, less what the unchanged one has.

    Returns:
        angle: Degrees between the line from ball to ball and where it was.
        volume: Of the larger ball, as the third (in-plane, second) root of its share.
        shift: Voxels that its centre has moved.
        mean, deviation, skewness: Of the intensities.
        roughness: Mean absolute difference of neighbours along x and y.
        change: Root of the mean squared difference.
    """
    moments, balls = _numbers(image, labels)
    before, drawn = _unchanged(image.shape, in_plane)
    plain, _ = phantom(image.shape, in_plane=in_plane)
    (volume, first, second), (whole, origin, beside) = balls, drawn
    values = {
        "angle": _angle(second - first, beside - origin),
        "volume": (volume / whole) ** (1 / (2 if in_plane else 3)) - 1,
        "shift": np.linalg.norm(first - origin),
        "change": np.sqrt(np.mean((image - plain) ** 2)),
    }
    for name, moment in moments.items():
        values[name] = moment - before[name]
    # what is the same but for rounding is to be equal
    return {name: round(float(value), 3) + 0.0 for name, value in values.items()}


@functools.cache
def _unchanged(shape: tuple[int, int, int], in_plane: bool) -> tuple[dict[str, float], Balls]:
    return _numbers(*phantom(shape, in_plane=in_plane))


def _numbers(image: Volume, labels: Labels) -> tuple[dict[str, float], Balls]:
    """Moments of the image; volume and centre of the larger ball and centre of the smaller."""
    mean, deviation = image.mean(dtype=np.float64), image.std(dtype=np.float64)
    normal = (image - mean) / deviation
    moments = {
        "mean": mean,
        "deviation": deviation,
        "skewness": np.mean(normal * normal * normal),
        "roughness": sum(np.abs(np.diff(image, axis=axis)).mean() for axis in (1, 2)),
    }
    large, small = (np.stack(np.nonzero(labels == label)) for label in (1, 2))
    return moments, (large.shape[1], large.mean(1), small.mean(1))


def _angle(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
