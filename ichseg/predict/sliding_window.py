"""Prediction by overlapping tiles (P18, section 2.4).

Tiles overlap by half, voxels near a tile's centre weigh more, each tile is also predicted mirrored.
The network is any callable, so the arithmetic here is tested with the identity. Volumes are numpy
arrays or torch tensors on any device: whatever the network takes and gives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ichseg.engine.arrays import Grid, all_finite, as_kind_of, copy_into, flip, zeros_like
from ichseg.engine.engine import Network
from ichseg.errors import InputError, PredictionError
from ichseg.wording import times

Corner = tuple[int, int, int]  # a tile's first voxel
MOST_TILES = 5_000_000  # a day for the fastest network
STEP_FRACTION = 0.5  # "overlap by patch size / 2"


@dataclass(frozen=True, slots=True)
class Tiles:
    """Where the tiles of a volume lie.

    Attributes:
        shape: The volume's size ``(z, y, x)``.
        tile: The size of a tile in voxels.
        starts: The tiles' first voxels along each axis, in the volume padded to at least a tile.
        skipped: The tiles that no network need see: their voxels are background.
    """

    shape: tuple[int, int, int]
    tile: tuple[int, int, int]
    starts: tuple[list[int], list[int], list[int]]
    skipped: frozenset[Corner] = frozenset()

    @property
    def padded(self) -> tuple[int, int, int]:
        """Size after padding to at least one tile."""
        return padded_shape(self.shape, self.tile)

    @property
    def inner(self) -> tuple[slice, slice, slice]:
        """Where the volume lies in the padded one: in its middle."""
        before = [(p - s) // 2 for p, s in zip(self.padded, self.shape, strict=True)]
        z, y, x = (slice(b, b + s) for b, s in zip(before, self.shape, strict=True))
        return z, y, x

    @property
    def total(self) -> int:
        """Number of tiles, skipped ones included."""
        return math.prod(map(len, self.starts))

    def corners(self) -> list[Corner]:
        """The first voxels of the tiles that a network has to see."""
        return [c for c in itertools.product(*self.starts) if c not in self.skipped]

    def where(self, corner: Corner) -> tuple[slice, slice, slice, slice]:
        """Index of a tile in the padded volume ``(channel, z, y, x)``."""
        z, y, x = (slice(s, s + t) for s, t in zip(corner, self.tile, strict=True))
        return slice(None), z, y, x


def cover(shape: Sequence[int], tile: tuple[int, int, int]) -> Tiles:
    """Tiles that cover a volume of this ``(z, y, x)`` shape; none is skipped.

    Raises:
        InputError: They are more than could ever be predicted.
    """
    padded = padded_shape(shape, tile)
    steps = (max(1, STEP_FRACTION * t) for t in tile)
    count = math.prod(size / step for size, step in zip(padded, steps, strict=True))
    if count > MOST_TILES:
        raise InputError(
            f"a grid of {times(padded)} voxels in tiles of {times(tile)} makes about {count:.0e} "
            "tiles; the voxel sizes of the scan or of the plan cannot be right"
        )
    z, y, x = (tile_starts(size, t) for size, t in zip(padded, tile, strict=True))
    return Tiles((shape[0], shape[1], shape[2]), tile, (z, y, x))


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


def axis_importance(tile_size: int) -> npt.NDArray[np.float32]:
    """Weight of each voxel along an axis: a Gaussian, sigma ``tile_size / 8``.

    Its four sigma reach the tile's border, where it is 3e-4: never zero.
    """
    away = (np.arange(tile_size) - tile_size // 2) / (tile_size / 8)
    return np.exp(-0.5 * away**2).astype(np.float32)


def mirrorings(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """All subsets of the mirror axes, the empty one first: 8 for three axes."""
    return [subset for n in range(len(axes) + 1) for subset in itertools.combinations(axes, n)]


def padded_shape(shape: Sequence[int], tile: Sequence[int]) -> tuple[int, int, int]:
    """Size after padding to at least one tile."""
    z, y, x = (max(size, t) for size, t in zip(shape, tile, strict=True))
    return z, y, x


def predict_tiled(
    network: Network,
    data: Grid,
    tile: tuple[int, int, int],
    *,
    mirror_axes: Sequence[int] = (),
    padding: str = "zero",
) -> Grid:
    """Scores of a whole volume by one network.

    Args:
        network: From tiles ``(C, *tile)`` to their scores, where ``data`` are.
        data: The volume ``(C, Z, Y, X)``, float32; a numpy array or a tensor, as the network takes
            it.
        tile: The size of a tile in voxels ``(z, y, x)``.
        mirror_axes: Spatial axes (0, 1, 2 for z, y, x) over whose subsets scores are averaged.
        padding: What lies beyond a volume smaller than a tile, see ``pad``.

    Returns:
        Mean scores ``(K, Z, Y, X)`` of all tiles and mirrorings, weighted by importance; float32.
    """
    tiles, mirrors = cover(data.shape[1:], tile), mirrorings(mirror_axes)
    padded = pad(data, tiles, padding)
    total = sum_tiles(network, padded, tiles, mirrors=mirrors)
    return average(total, tiles, len(mirrors))


def pad(data: Grid, tiles: Tiles, padding: str = "zero") -> Grid:
    """Pad ``(C, Z, Y, X)``, centred, to at least a tile; the data themselves if that fits.

    Args:
        data: The volume.
        tiles: Where its tiles lie.
        padding: ``zero``, or ``nearest`` for the nearest voxel, see ``Plans.padding``.
    """
    if tiles.padded == tiles.shape:
        return data
    padded = zeros_like(data, (data.shape[0], *tiles.padded))
    copy_into(padded[(slice(None), *tiles.inner)], data)
    if padding == "nearest":
        for axis, inside in enumerate(tiles.inner, start=1):
            every = (slice(None),) * axis
            first, last = inside.start, inside.stop - 1
            copy_into(padded[(*every, slice(first))], padded[(*every, slice(first, first + 1))])
            copy_into(
                padded[(*every, slice(last + 1, None))], padded[(*every, slice(last, last + 1))]
            )
    return padded


def sum_tiles(
    network: Network, padded: Grid, tiles: Tiles, *, mirrors: Sequence[tuple[int, ...]]
) -> Grid:
    """The sum of a network's scores of all tiles and mirrorings, weighted by importance.

    Args:
        network: From tiles to their scores. They are added up in the order of the tiles.
        padded: The volume, from ``pad``.
        tiles: Where the tiles lie.
        mirrors: Sets of spatial axes to mirror, see ``mirrorings``.

    Returns:
        Sums ``(K, *tiles.padded)``, float32.

    Raises:
        ValueError: Every tile is skipped.
    """
    weights = [as_kind_of(padded, axis_importance(t)) for t in tiles.tile]
    importance = weights[0][:, None, None] * weights[1][:, None] * weights[2]
    jobs, again = itertools.tee(
        itertools.product(tiles.corners(), [tuple(a + 1 for a in axes) for axes in mirrors])
    )
    views = (flip(padded[tiles.where(corner)], axes) for corner, axes in jobs)
    total: Grid | None = None
    for batch in network(views):
        for scores in batch:
            corner, axes = next(again)
            if total is None:
                total = zeros_like(padded, (scores.shape[0], *tiles.padded))
            part = total[tiles.where(corner)]  # a view
            part += flip(scores, axes) * importance
    if total is None:
        raise ValueError("every tile is skipped, and there are no scores to add up")
    return total


def average(
    total: Grid, tiles: Tiles, passes: int, background: Sequence[float] | None = None
) -> Grid:
    """The mean, in place, of what ``sum_tiles`` has added.

    A score that is not finite beats no other, so that a mask would be empty where there is one.

    Args:
        total: The sums, ``(K, *tiles.padded)``.
        tiles: Where the tiles lie.
        passes: How many times each tile went through a network: mirrorings times networks.
        background: The K scores of the voxels of skipped tiles.

    Returns:
        Means ``(K, *tiles.shape)``, a view of ``total``.

    Raises:
        PredictionError: A score is not finite.
    """
    # the importance is a product over axes, so its sum over all tiles is one too
    by_axis = []
    for size, starts, tile in zip(tiles.padded, tiles.starts, tiles.tile, strict=True):
        weight, sums = axis_importance(tile), np.zeros(size, np.float32)
        for start in starts:
            sums[start : start + tile] += weight
        by_axis.append(sums)
    plane = as_kind_of(total, np.asarray(1 / (by_axis[1][:, None] * by_axis[2] * passes)))
    finite = True
    for z, sum_z in enumerate(by_axis[0]):  # slice by slice, each read and written once
        scores = total[:, z]  # a view
        scores *= plane / float(sum_z)
        finite = all_finite(scores) & finite
    if not finite:  # asked once: a GPU computes until then, and nobody waits for it
        raise PredictionError(
            "a network gives scores that are not finite: its weights or the scan's values are "
            "out of all proportion"
        )
    for corner in tiles.skipped:
        assert background is not None
        for channel, score in zip(total[tiles.where(corner)], background, strict=True):
            channel[...] = score
    return total[(slice(None), *tiles.inner)]
