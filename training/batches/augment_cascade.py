"""Spoils the first stage's labels as the second stage of a cascade will not find them (V2).

The first stage errs less on cases that are like those it was trained on, and the second one must
not learn to copy. So its extra input is grown, shrunk, smoothed or robbed of a component now and
then. This happens on the host, before the spatial change and whichever engine makes that: see
docs/decisions/0007-cascade-augmentation.md.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ichseg.pieces import CONNECTED
from training.batches.augmentation import AugmentationConfig

Labels = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]


def corrupt(
    previous: Labels,
    classes: int,
    rng: np.random.Generator,
    config: AugmentationConfig,
    *,
    patch_voxels: int,
) -> Labels:
    """Labels of the first stage with errors that a first stage could make.

    Args:
        previous: int8 ``(Z, Y, X)``; 0 and below is background. Not altered.
        classes: Foreground labels are 1 to ``classes``.
        rng: Source of all draws.
        config: Probabilities and ranges.
        patch_voxels: Voxels of the network's patch, by which the largest component to remove is
            measured.
    """
    result = previous.copy()
    if rng.random() < config.morphology_probability:
        for label in _chosen(rng, classes, config.morphology_label_probability):
            change = OPERATORS[int(rng.integers(len(OPERATORS)))]
            radius = float(rng.uniform(*config.morphology_radius))
            apply_operator(result, label, change, radius)
    if rng.random() < config.removal_probability:
        for label in _chosen(rng, classes, config.removal_label_probability):
            remove_component(result, label, config.removal_share * patch_voxels, rng)
    return result


def apply_operator(
    labels: Labels, label: int, change: Callable[[Mask, float], Mask], radius: float
) -> None:
    """Change one label's mask in place; it wins over other labels where it grows."""
    before = labels == label
    if not before.any():
        return
    after = change(before, radius)
    labels[before & ~after] = 0
    labels[after] = label


def remove_component(
    labels: Labels, label: int, less_than: float, rng: np.random.Generator
) -> None:
    """Set to background, in place, one component of a label that has fewer voxels than that."""
    components, count = ndimage.label(labels == label, structure=CONNECTED)
    sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
    small = np.flatnonzero(sizes < less_than) + 1
    if len(small):
        labels[components == small[int(rng.integers(len(small)))]] = 0


def dilate(mask: Mask, radius: float) -> Mask:
    """All voxels at most ``radius`` voxels from the mask, beyond whose border there is nothing.

    Squared distances are added up axis by axis, each over the few steps that the radius allows: far
    quicker than a full distance transform.
    """
    limit = int(radius * radius)  # squared distances are whole numbers
    squared = np.where(mask, 0, limit + 1).astype(np.min_scalar_type(2 * limit + 1))
    for axis in range(mask.ndim):
        nearest = squared.copy()
        source, sink = np.moveaxis(squared, axis, 0), np.moveaxis(nearest, axis, 0)
        for step in range(1, min(int(radius), mask.shape[axis] - 1) + 1):
            farther = source + squared.dtype.type(step * step)
            np.minimum(sink[step:], farther[:-step], out=sink[step:])
            np.minimum(sink[:-step], farther[step:], out=sink[:-step])
        squared = nearest
    within: Mask = squared <= limit
    return within


def erode(mask: Mask, radius: float) -> Mask:
    """Voxels of the mask farther than ``radius`` from all voxels outside it."""
    return ~dilate(~mask, radius)


def closing(mask: Mask, radius: float) -> Mask:
    """Dilated, then eroded: small gaps are filled."""
    return erode(dilate(mask, radius), radius)


def opening(mask: Mask, radius: float) -> Mask:
    """Eroded, then dilated: thin parts go."""
    return dilate(erode(mask, radius), radius)


OPERATORS = (dilate, erode, closing, opening)


def _chosen(rng: np.random.Generator, classes: int, probability: float) -> list[int]:
    """Some of the labels, in random order, as one can win over another."""
    return [int(label) + 1 for label in rng.permutation(classes) if rng.random() < probability]
