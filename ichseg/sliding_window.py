"""Prediction by overlapping tiles (P18, section 2.4).

Tiles overlap by half, voxels near a tile's centre weigh more, each tile is also predicted mirrored.
The network is any callable, so the arithmetic here is tested with the identity.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from scipy import ndimage

Network = Callable[[torch.Tensor], torch.Tensor]
Job = tuple[tuple[int, ...], tuple[int, ...]]  # corner of a tile, axes of (C, z, y, x) to mirror
BATCH_VOXELS = 1_200_000  # 8 tiles of 16x96x96: small tiles alone leave a CPU's convolutions idle
STEP_FRACTION = 0.5  # "overlap by patch size / 2"


def tile_starts(image_size: int, tile_size: int, step_fraction: float = STEP_FRACTION) -> list[int]:
    """First voxel of each tile along one axis.

    Tiles are spread evenly: neighbours start about ``step_fraction * tile_size`` voxels apart or
    less, and the last tile ends on the last voxel.

    Args:
        image_size: Voxels along this axis, already padded to ``tile_size`` or more.
        tile_size: Voxels of one tile; 1 along the slices of a 2D network.
        step_fraction: Largest step as a fraction of ``tile_size``, in (0, 1].

    Raises:
        ValueError: The image is smaller than a tile, or the fraction is out of range.
    """
    if image_size < tile_size or not 0 < step_fraction <= 1:
        raise ValueError(f"image {image_size}, tile {tile_size}, step fraction {step_fraction}")
    span = image_size - tile_size
    count = math.ceil(span / max(1, step_fraction * tile_size)) + 1  # slices of a 2D network: each
    return [round(i * span / max(count - 1, 1)) for i in range(count)]


def axis_importance(tile_size: int) -> torch.Tensor:
    """Weight of each voxel along an axis: a Gaussian, sigma ``tile_size / 8``.

    Its four sigma reach the tile's border, where it is 3e-4: never zero.
    """
    delta = np.zeros(tile_size)
    delta[tile_size // 2] = 1
    weight = ndimage.gaussian_filter1d(delta, tile_size / 8, mode="constant")
    weight /= weight.max()
    return torch.from_numpy(weight.astype(np.float32))


def mirrorings(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """All subsets of the mirror axes, the empty one first: 8 for three axes."""
    return [subset for n in range(len(axes) + 1) for subset in itertools.combinations(axes, n)]


def padded_shape(shape: Sequence[int], tile: Sequence[int]) -> tuple[int, int, int]:
    """Size after padding to at least one tile."""
    z, y, x = (max(size, t) for size, t in zip(shape, tile, strict=True))
    return z, y, x


def tile_count(shape: Sequence[int], tile: Sequence[int]) -> int:
    """Number of tiles that cover a volume of this ``(z, y, x)`` shape."""
    padded = padded_shape(shape, tile)
    return math.prod(len(tile_starts(size, t)) for size, t in zip(padded, tile, strict=True))


def predict_tiled(
    network: Network,
    data: torch.Tensor,
    tile: tuple[int, int, int],
    *,
    mirror_axes: Sequence[int] = (),
) -> torch.Tensor:
    """Scores of a whole volume.

    Args:
        network: ``(B, C, *tile)`` to scores ``(B, K, *tile)``, on the device of ``data``; B varies.
        data: ``(C, Z, Y, X)``, float32.
        tile: Voxels of a tile ``(z, y, x)``.
        mirror_axes: Spatial axes (0, 1, 2 for z, y, x) over whose subsets scores are averaged.

    Returns:
        ``(K, Z, Y, X)`` float32: of all tiles and mirrorings, weighted by importance.
    """
    padded, inner = _pad(data, tile)
    shape = padded.shape[1:]
    starts = [tile_starts(size, t) for size, t in zip(shape, tile, strict=True)]
    weights = [axis_importance(t).to(data.device) for t in tile]
    importance = torch.einsum("i,j,k->ijk", *weights)
    subsets = mirrorings([axis + 1 for axis in mirror_axes])  # of (C, z, y, x)
    total: torch.Tensor | None = None
    for jobs in _batches(itertools.product(itertools.product(*starts), subsets), tile):
        views = [padded[_where(corner, tile)].flip(axes) for corner, axes in jobs]
        for (corner, axes), scores in zip(jobs, network(torch.stack(views)), strict=True):
            if total is None:
                total = torch.zeros((scores.shape[0], *shape), device=data.device)
            total[_where(corner, tile)] += scores.float().flip(axes) * importance
    assert total is not None
    total /= len(subsets)
    # the importance is a product over axes, so its sum over all tiles is one too
    for axis, (size, begins, weight) in enumerate(zip(shape, starts, weights, strict=True)):
        sums = torch.zeros(size, device=data.device)
        for start in begins:
            sums[start : start + len(weight)] += weight
        total /= sums.reshape([-1 if a == axis else 1 for a in range(3)])
    return total[(slice(None), *inner)]


def tiles_at_once(tile: Sequence[int]) -> int:
    """How many tiles go through the network together."""
    return max(1, BATCH_VOXELS // math.prod(tile))


def _batches(jobs: Iterable[Job], tile: Sequence[int]) -> Iterator[list[Job]]:
    remaining = iter(jobs)
    while batch := list(itertools.islice(remaining, tiles_at_once(tile))):
        yield batch


def _where(corner: Sequence[int], tile: Sequence[int]) -> tuple[slice, ...]:
    """Index of a tile in ``(channel, z, y, x)``."""
    return (slice(None), *(slice(s, s + t) for s, t in zip(corner, tile, strict=True)))


def _pad(
    data: torch.Tensor, tile: tuple[int, int, int]
) -> tuple[torch.Tensor, tuple[slice, slice, slice]]:
    """Zero-pad, centred, to at least a tile; and where the data then lies."""
    shape = data.shape[1:]
    before = [(p - s) // 2 for p, s in zip(padded_shape(shape, tile), shape, strict=True)]
    z, y, x = (slice(b, b + s) for b, s in zip(before, shape, strict=True))
    if padded_shape(shape, tile) == tuple(shape):
        return data, (z, y, x)
    padded = data.new_zeros((data.shape[0], *padded_shape(shape, tile)))
    padded[:, z, y, x] = data
    return padded, (z, y, x)
