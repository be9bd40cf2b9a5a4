"""Augmentation in torch, on whatever device the batch lies.

Does what ``training.batches.augment_host`` does for the same draws, but linearly where that may be
cubic (docs/decisions/0006-augmentation-engines.md). Values that were drawn go to the device as
arguments of operations, never as tensors, and nothing is read back: the host does not wait for the
device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.batches.augmentation import (
    OUTSIDE,
    AugmentationConfig,
    Changes,
    Shape,
    Warp,
    draw_changes,
)


@torch.no_grad()
def augment_batch(
    data: Tensor,
    labels: Tensor,
    warps: Sequence[Warp | None],
    patch: Shape,
    config: AugmentationConfig,
    rngs: Sequence[np.random.Generator],
    *,
    classes: int,
    in_plane: bool = False,
) -> tuple[Tensor, Tensor]:
    """Apply each sample's drawn warp, then its further changes, drawn from its own generator.

    Args:
        data: float32 ``(B, C, Z, Y, X)``; the patch and, equally on both sides, at least what the
            warps of the batch reach. Not changed.
        labels: int8 ``(B, L, Z, Y, X)``, label maps that are warped alike; -1 is outside the image
            or its nonzero region.
        warps: The spatial change that ``draw_warp`` has drawn for each sample, or None; all
            in-plane, or all not.
        patch: Size of the result ``(z, y, x)``.
        config: Probabilities and ranges.
        rngs: The source of all further draws of each sample.
        classes: Labels are -1 to ``classes - 1``.
        in_plane: Leave the resolution between slices alone.

    Returns:
        Patches ``(B, C, *patch)`` and their labels ``(B, L, *patch)``, in which -1 is still -1.
    """
    changes = [draw_changes(rng, config, data.shape[1], patch, in_plane=in_plane) for rng in rngs]
    generators = [torch.Generator(data.device).manual_seed(drawn.seed) for drawn in changes]
    images = _centre(data, patch).clone()
    moved = _centre(labels, patch).clone()
    warped = [sample for sample, warp in enumerate(warps) if warp is not None]
    if warped:
        grids = []
        for sample in warped:
            warp = warps[sample]
            assert warp is not None
            grids.append(_grid(warp, patch, data.shape[2:], generators[sample]))
        grid = torch.stack(grids)  # (W, *patch, 3) or, in-plane, (W, Y, X, 2)
        new = _warp_images(torch.stack([data[i] for i in warped]), grid, patch, config.image_order)
        old = torch.stack([labels[i] for i in warped])
        turned = _warp_labels(old, grid, patch, config.target_order, classes)
        for index, sample in enumerate(warped):
            images[sample], moved[sample] = new[index], turned[index]
    for sample, drawn in enumerate(changes):
        for channel, image in enumerate(images[sample]):
            _change_intensities(image, drawn, channel, generators[sample])
        if drawn.mirrored:
            axes = [axis + 1 for axis in drawn.mirrored]
            images[sample] = images[sample].flip(axes)
            moved[sample] = moved[sample].flip(axes)
    return images, moved


def _centre(region: Tensor, patch: Shape) -> Tensor:
    """The centred patch of ``(..., Z, Y, X)``; sizes differ by even numbers."""
    for axis, size in enumerate(patch):
        extra = region.shape[2 + axis] - size
        region = region.narrow(2 + axis, extra // 2, size)
    return region


def _grid(warp: Warp, patch: Shape, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Where the patch's voxels look in a region of ``size``, in the terms of ``grid_sample``.

    Returns:
        ``(*patch, 3)`` or, in-plane, ``(Y, X, 2)``: x, y, z, with -1 and 1 at the region's faces.
    """
    matrix = warp.matrix()
    axes = len(matrix)
    shape = patch[-axes:]
    device = generator.device
    offsets: list[Tensor] = []
    for axis, length in enumerate(shape):
        line = torch.arange(length, dtype=torch.float32, device=device) - (length - 1) / 2
        offsets.append(line.view([-1 if a == axis else 1 for a in range(axes)]))
    if warp.elastic is not None:
        offsets = [
            offset + _displacement(shape, *warp.elastic, generator=generator) for offset in offsets
        ]
    # one product at a time, not a matrix product, which may be taken in TF32: a tenth of a voxel
    looked = []
    for row, length in zip(matrix.tolist(), size[-axes:], strict=True):
        products = (factor * offset for factor, offset in zip(row, offsets, strict=True))
        looked.append(sum(products, torch.zeros(shape, device=device)) * (2 / length))
    return torch.stack(looked[::-1], -1)


def _displacement(
    shape: Sequence[int], alpha: float, sigma: float, *, generator: torch.Generator
) -> Tensor:
    """One axis' smooth random displacement in voxels; zero noise is assumed beyond the edges."""
    device = generator.device
    field = torch.rand(tuple(shape), generator=generator, device=device) * (2 * alpha) - alpha
    return smooth(field, sigma)


def smooth(field: Tensor, sigma: float) -> Tensor:
    """Gaussian of ``sigma`` voxels along all axes, cut at four sigma, with zeros beyond the edges.

    The kernel is wide and the field small, so each axis is one product with a band matrix.
    """
    weights = _gaussian(sigma)
    radius = len(weights) // 2
    for axis, length in enumerate(field.shape):
        line = torch.arange(length, dtype=field.dtype, device=field.device)
        distance = (line[:, None] - line).abs()
        band = torch.exp(distance**2 * (-0.5 / sigma**2)) * weights[radius]
        band = band * (distance <= radius)
        field = torch.tensordot(field, band, dims=([axis], [1])).movedim(-1, axis)
    return field


def _warp_images(data: Tensor, grid: Tensor, patch: Shape, order: int) -> Tensor:
    """Sample ``(W, C, Z, Y, X)``, linearly unless the order is 0; outside is 0."""
    mode = "nearest" if order == 0 else "bilinear"
    folded = _fold(data, grid)
    return F.grid_sample(folded, grid, mode, "zeros", align_corners=False).view(
        *data.shape[:2], *patch
    )


def _warp_labels(labels: Tensor, grid: Tensor, patch: Shape, order: int, classes: int) -> Tensor:
    """The label with the largest share of each voxel; one label's share at a time is held."""
    mode = "nearest" if order == 0 else "bilinear"
    folded = _fold(labels, grid)
    most = torch.zeros((*folded.shape[:2], *grid.shape[1:-1]), device=labels.device)
    winner = torch.full_like(most, OUTSIDE, dtype=labels.dtype)
    for label in range(OUTSIDE, classes):
        share = F.grid_sample((folded == label).float(), grid, mode, "zeros", align_corners=False)
        winner.masked_fill_(share > most, label)
        torch.maximum(most, share, out=most)
    return winner.view(*labels.shape[:2], *patch)


def _fold(region: Tensor, grid: Tensor) -> Tensor:
    """``(W, C, Z, Y, X)``, or ``(W, C * Z, Y, X)`` in-plane: every slice gets the same change."""
    return region.flatten(1, 2) if grid.shape[-1] == 2 else region


def _change_intensities(
    image: Tensor, changes: Changes, channel: int, generator: torch.Generator
) -> None:
    """All changes of one channel ``(Z, Y, X)``, in place."""
    if (deviation := changes.noise[channel]) is not None:
        noise = torch.randn(image.shape, generator=generator, device=image.device)
        image.add_(noise, alpha=deviation)
    if (sigmas := changes.blur[channel]) is not None:
        for axis, sigma in enumerate(sigmas):
            image.copy_(_blur(image, axis, sigma))
    if (factor := changes.brightness[channel]) is not None:
        image.mul_(factor)
    if (factor := changes.contrast[channel]) is not None:
        low, high = torch.aminmax(image)
        mean = image.mean()
        image.sub_(mean).mul_(factor).add_(mean).clamp_(low, high)
    if (zoom := changes.low_resolution[channel]) is not None:
        image.copy_(_lower_resolution(image, zoom, changes.zoomed))
    if (exponent := changes.inverted_gamma[channel]) is not None:
        image.neg_()
        _change_gamma(image, exponent)
        image.neg_()
    if (exponent := changes.gamma[channel]) is not None:
        _change_gamma(image, exponent)


def _blur(image: Tensor, axis: int, sigma: float) -> Tensor:
    """Gaussian along one axis, cut at four sigma; the image goes on as its mirror image."""
    weights = _gaussian(sigma)
    radius, length = len(weights) // 2, image.shape[axis]
    line = torch.arange(-radius, length + radius, device=image.device) % (2 * length)
    padded = image.index_select(axis, torch.minimum(line, 2 * length - 1 - line))
    blurred = torch.zeros_like(image)
    for tap, weight in enumerate(weights):
        blurred.add_(padded.narrow(axis, tap, length), alpha=weight)
    return blurred


def _gaussian(sigma: float) -> list[float]:
    """Weights of sum 1 within four sigma, as SciPy cuts them."""
    radius = int(4 * sigma + 0.5)
    weights = [math.exp(-0.5 * (tap / sigma) ** 2) for tap in range(-radius, radius + 1)]
    return [weight / sum(weights) for weight in weights]


def _lower_resolution(image: Tensor, zoom: float, first: int) -> Tensor:
    """Down to ``zoom`` of the size by the nearest voxel and linearly up, from axis ``first`` on."""
    size = [
        max(1, round(length * zoom)) if axis >= first else length
        for axis, length in enumerate(image.shape)
    ]
    small = F.interpolate(image[None, None], size, mode="nearest-exact")
    return F.interpolate(small, image.shape, mode="trilinear", align_corners=False)[0, 0]


def _change_gamma(image: Tensor, exponent: float) -> None:
    """Raise to a power within the image's range, then restore mean and deviation; in place."""
    mean, deviation = image.mean(), image.std(correction=0)
    low, high = torch.aminmax(image)
    extent = high - low + 1e-7
    image.sub_(low).div_(extent).pow_(exponent).mul_(extent)
    image.sub_(image.mean())
    image.mul_(deviation / (image.std(correction=0) + 1e-8)).add_(mean)
