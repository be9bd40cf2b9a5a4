"""Where a U-Net pools, and what a patch costs: nnU-Net's rules as arithmetic.

Three rules, one for each generation of nnU-Net, say how often each axis of a patch is pooled and
how large the kernels are; two formulas estimate the memory of training on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ichseg.model.architecture import Architecture

SMALLEST_EDGE = 4  # voxels of an axis in the bottleneck


@dataclass(frozen=True, slots=True)
class Topology:
    """Where a U-Net pools, finest level first.

    Attributes:
        strides: Downsampling on entering each level; the first is all ones.
        kernels: Kernel size per level.
    """

    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]

    @property
    def divisor(self) -> tuple[int, ...]:
        """A patch must be a multiple of this along each axis."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))


def pool_late(size: Sequence[float], spacing_mm: Sequence[float], most: int) -> Topology:
    """Pool each axis as often as its size allows, the short ones only at the deepest levels.

    Kernels are 3 along axes that are still finer than half the coarsest spacing and 1 along the
    others, until all axes have come that near; then 3 throughout.

    Args:
        size: Size of the patch; it need not be a multiple of anything.
        spacing_mm: Voxel size.
        most: How many levels may pool at most.
    """
    pools = [min(most, _halvings(s)) for s in size]
    depth = max(pools)
    coarsest = max(spacing_mm)
    current = list(spacing_mm)
    strides: list[tuple[int, ...]] = []
    kernels: list[tuple[int, ...]] = []
    for level in range(depth):
        near = [s / coarsest > 0.5 for s in current]
        kernels.append(tuple(1 if n and not all(near) else 3 for n in near))
        stride = tuple(2 if p + level >= depth else 1 for p in pools)
        strides.append(stride)
        current = [s * k for s, k in zip(current, stride, strict=True)]
    return _topology(strides, kernels, len(size))


def pool_by_spacing(size: Sequence[float], spacing_mm: Sequence[float], most: int) -> Topology:
    """Pool the axes within a factor 2 of the finest spacing, while 8 voxels or more are left.

    Kernels are 3 along the largest group of axes within a factor 2 of one another, else 1.
    """
    current, left = list(spacing_mm), list(size)
    axes = range(len(left))
    strides: list[tuple[int, ...]] = []
    kernels: list[tuple[int, ...]] = []
    while len(strides) < most:
        pooled = [a for a in axes if current[a] / min(current) < 2 and left[a] >= 2 * SMALLEST_EDGE]
        if not pooled:
            break
        groups = [
            [b for b in axes if current[b] / current[a] < 2 and current[a] / current[b] < 2]
            for a in axes
        ]
        largest = max(groups, key=len)  # the first of equals
        kernels.append(tuple(3 if a in largest else 1 for a in axes))
        strides.append(tuple(2 if a in pooled else 1 for a in axes))
        for a in pooled:
            current[a] *= 2
            left[a] /= 2
    return _topology(strides, kernels, len(left))


def pool_by_spacing_v2(size: Sequence[float], spacing_mm: Sequence[float], most: int) -> Topology:
    """Pool as ``pool_by_spacing`` does, but compare only axes that can still be pooled.

    A last single axis is pooled only from 12 voxels on. A kernel is 1 until its axis has come
    within a factor 2 of the finest spacing, and 3 from then on.
    """
    current, left = list(spacing_mm), list(size)
    axes = range(len(left))
    kernel = [1] * len(left)
    strides: list[tuple[int, ...]] = []
    kernels: list[tuple[int, ...]] = []
    while len(strides) < most:
        long = [a for a in axes if left[a] >= 2 * SMALLEST_EDGE]
        pooled = [a for a in long if current[a] / min(current[b] for b in long) < 2]
        if not pooled or (len(pooled) == 1 and left[pooled[0]] < 3 * SMALLEST_EDGE):
            break
        kernel = [3 if k == 3 or current[a] / min(current) < 2 else 1 for a, k in enumerate(kernel)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if a in pooled else 1 for a in axes))
        for a in pooled:
            current[a] *= 2
            left[a] = math.ceil(left[a] / 2)
    return _topology(strides, kernels, len(left))


POOLINGS: dict[str, Callable[[Sequence[float], Sequence[float], int], Topology]] = {
    "late": pool_late,
    "spacing": pool_by_spacing,
    "spacing_v2": pool_by_spacing_v2,
}


def approximate_elements(
    patch: Sequence[int], network: Architecture, channels: int, classes: int
) -> float:
    """Feature-map elements of one patch, as nnU-Net v1 estimated them."""
    maps = _level_maps(patch, network)
    middle = 5 * sum(maps[:-1])
    return middle + 2 * maps[-1] + (channels + classes) * math.prod(patch)


def exact_elements(
    patch: Sequence[int], network: Architecture, channels: int, classes: int
) -> float:
    """Elements of all convolutions' outputs for one patch, as nnU-Net v2 counts them."""
    del channels  # the input itself is not charged
    maps = _level_maps(patch, network)
    # a residual block has two convolutions; one more is the stem of the first level, or on the
    # shortcut of a level that pools
    convs = [2 * n + 1 if network.block == "residual" else n for n in network.encoder_convs]
    encoder = sum(n * m for n, m in zip(convs, maps, strict=True))
    decoder = sum((n + 1) * m for n, m in zip(network.decoder_convs, maps[:-1], strict=True))
    return encoder + decoder + classes * math.prod(patch)


MEMORIES: dict[str, Callable[[Sequence[int], Architecture, int, int], float]] = {
    "approximate": approximate_elements,
    "exact": exact_elements,
}


def _halvings(size: float) -> int:
    """How often an axis can be halved with at least 4 voxels left."""
    return max(0, int(size // SMALLEST_EDGE).bit_length() - 1)


def _topology(
    strides: list[tuple[int, ...]], kernels: list[tuple[int, ...]], axes: int
) -> Topology:
    """Add the first level, which does not pool, and the bottleneck, whose kernels are 3."""
    return Topology(((1,) * axes, *strides), (*kernels, (3,) * axes))


def _level_maps(patch: Sequence[int], network: Architecture) -> list[float]:
    """Elements that one convolution puts out at each level."""
    voxels = float(math.prod(patch))
    found = []
    for stride, features in zip(network.strides, network.features, strict=True):
        voxels /= math.prod(stride)
        found.append(voxels * features)
    return found


def padded(size: Sequence[float], divisor: Sequence[int]) -> tuple[int, ...]:
    """The smallest multiples of the divisor that are not below the size."""
    return tuple(math.ceil(s / d) * d for s, d in zip(size, divisor, strict=True))
