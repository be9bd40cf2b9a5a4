"""Augmentation on the host, with batchgenerators' functions.

The warp in one interpolation, then noise, blur, brightness, contrast, low resolution, gamma and
mirroring as drawn (``training.batches.augmentation``). The only module that imports
batchgenerators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from batchgenerators.augmentations.color_augmentations import augment_contrast
from batchgenerators.augmentations.noise_augmentations import augment_gaussian_noise
from batchgenerators.augmentations.resample_augmentations import augment_linear_downsampling_scipy
from batchgenerators.augmentations.utils import (
    create_zero_centered_coordinate_mesh,
    elastic_deform_coordinates,
    interpolate_img,
)
from scipy.ndimage import gaussian_filter

from training.batches.augmentation import (
    OUTSIDE,
    AugmentationConfig,
    Changes,
    Shape,
    Warp,
    draw_changes,
)

FloatArray = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.int8]


def augment(
    data: FloatArray,
    labels: LabelArray,
    warp: Warp | None,
    patch: Shape,
    config: AugmentationConfig,
    rng: np.random.Generator,
    *,
    in_plane: bool = False,
) -> tuple[FloatArray, LabelArray]:
    """Apply the drawn warp, then all further changes, drawn from ``rng``.

    Args:
        data: ``(C, Z, Y, X)``, of the size ``warp.reach(patch)`` or, without a warp, ``patch``.
        labels: ``(L, Z, Y, X)``, label maps that are warped alike; -1 is outside the image or its
            nonzero region.
        warp: The spatial change that ``draw_warp`` has drawn, or None.
        patch: Size of the result ``(z, y, x)``.
        config: Probabilities and ranges.
        rng: Source of all further draws.
        in_plane: Leave the resolution between slices alone.

    Returns:
        The patch ``(C, *patch)`` and its labels ``(L, *patch)``, in which -1 is still -1.
    """
    changes = draw_changes(rng, config, len(data), patch, in_plane=in_plane)
    with _seeded_global(changes.seed):
        if warp is None:
            data = data.copy()
        else:
            data, labels = _apply_warp(data, labels, warp, patch, config)
        for channel in range(len(data)):
            _change_intensities(data[channel : channel + 1], changes, channel)
    data = np.flip(data, tuple(axis + 1 for axis in changes.mirrored))
    labels = np.flip(labels, tuple(axis + 1 for axis in changes.mirrored))
    return np.ascontiguousarray(data), np.ascontiguousarray(labels)


def _apply_warp(
    data: FloatArray, labels: LabelArray, warp: Warp, patch: Shape, config: AugmentationConfig
) -> tuple[FloatArray, LabelArray]:
    flat = len(warp.angles) == 1
    grid = patch[1:] if flat else patch
    coordinates = create_zero_centered_coordinate_mesh(grid)
    if warp.elastic is not None:
        coordinates = elastic_deform_coordinates(coordinates, *warp.elastic)
    # einsum and not a BLAS product, whose rounding may depend on the number of threads
    coordinates = np.einsum("ij,j...->i...", warp.matrix(), coordinates)
    for axis, size in enumerate(data.shape[-len(grid) :]):
        coordinates[axis] += (size - 1) / 2
    # in-plane: slices are folded into channels, so all of them get the same change
    images = data.reshape(-1, *data.shape[-len(grid) :])  # (C * Z, Y, X) or (C, Z, Y, X)
    maps = labels.reshape(-1, *labels.shape[-len(grid) :])  # (L * Z, Y, X) or (L, Z, Y, X)
    warped = [
        interpolate_img(image, coordinates, config.image_order, "constant", cval=0.0)
        for image in images
    ]
    moved = [
        interpolate_img(
            label, coordinates, config.target_order, "constant", cval=OUTSIDE, is_seg=True
        )
        for label in maps
    ]
    return np.stack(warped).reshape(-1, *patch), np.stack(moved).reshape(-1, *patch)


def _change_intensities(image: FloatArray, changes: Changes, channel: int) -> None:
    """All changes of one channel ``(1, Z, Y, X)``, in place."""
    # the drawn values are given to batchgenerators as ranges of no width
    if (deviation := changes.noise[channel]) is not None:
        augment_gaussian_noise(image, noise_variance=(deviation, deviation))
    if (sigma := changes.blur[channel]) is not None:
        gaussian_filter(image, (0, *sigma), output=image)
    if (factor := changes.brightness[channel]) is not None:
        image *= factor
    if (factor := changes.contrast[channel]) is not None:
        augment_contrast(image, contrast_range=_always(factor))
    if (zoom := changes.low_resolution[channel]) is not None:
        augment_linear_downsampling_scipy(
            image,
            zoom_range=(zoom, zoom),
            order_downsample=0,
            order_upsample=1,
            ignore_axes=tuple(range(changes.zoomed)),
        )
    if (exponent := changes.inverted_gamma[channel]) is not None:
        np.negative(image, out=image)
        _change_gamma(image, exponent)
        np.negative(image, out=image)
    if (exponent := changes.gamma[channel]) is not None:
        _change_gamma(image, exponent)


def _change_gamma(image: FloatArray, exponent: float) -> None:
    """Raise to a power within the image's range, then restore mean and deviation; in place.

    batchgenerators' own cannot be told one exponent below 1: half of its draws would lie above.
    """
    mean, deviation = image.mean(), image.std()
    low = image.min()
    extent = image.max() - low + np.float32(1e-7)
    image -= low
    image /= extent
    np.power(image, np.float32(exponent), out=image)
    image *= extent
    image -= image.mean()
    image *= deviation / (image.std() + np.float32(1e-8))
    image += mean


def _always(value: float) -> Callable[[], float]:
    return lambda: value


@contextlib.contextmanager
def _seeded_global(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, which batchgenerators fills fields from, and put it back.

    It would draw values from ``random``, too, but these are drawn already.
    """
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
