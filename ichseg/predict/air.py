"""Tiles that hold nothing but air: no network need see them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ichseg.model.plans import Plans
from ichseg.predict.prepare import Placement
from ichseg.predict.sliding_window import Corner, Tiles
from ichseg.scan.volume import Volume

AIR_HU = -500.0  # all tissue lies above, lung apart
_REACH = 2  # voxels around a tile that a cubic spline brings into it


def skip_air(tiles: Tiles, channels: Sequence[Volume], placement: Placement, plans: Plans) -> Tiles:
    """The same tiles; those whose raw HU all lie below -500 are marked as skipped.

    The CT itself is asked, not what normalisation leaves of it, where air and fat may be one. Only
    plans that normalise every channel as CT say that it is in HU. Where a volume is smaller than a
    tile, padding is part of every tile: its value 0 is, on the scale of the CT, the mean of the
    training foreground, so that no tile is air.

    Args:
        tiles: The case's tiles in the network's grid.
        channels: The case's volumes.
        placement: Where the case lies in that grid.
        plans: Say how channels are normalised.
    """
    schemes = plans.normalisations
    if any(scheme.scheme != "ct" for scheme in schemes):
        return tiles
    if tiles.padded != tiles.shape and max(scheme.mean for scheme in schemes) >= AIR_HU:
        return tiles
    crops = [placement.axes.apply(channel.voxels)[placement.slices] for channel in channels]
    pad = [where.start for where in tiles.inner]
    spans_z, spans_y, spans_x = (
        [_source(start - before, start - before + tile, grid, raw) for start in starts]
        for starts, before, tile, grid, raw in zip(
            tiles.starts, pad, tiles.tile, placement.grid_shape, placement.crop_shape, strict=True
        )
    )
    skipped: set[Corner] = set()
    for z, span_z in zip(tiles.starts[0], spans_z, strict=True):
        highest = [crop[span_z].max(0) for crop in crops]  # over the slices: (y, x)
        for y, span_y in zip(tiles.starts[1], spans_y, strict=True):
            lines = [plane[span_y].max(0) for plane in highest]
            for x, span_x in zip(tiles.starts[2], spans_x, strict=True):
                if all(line[span_x].max() < AIR_HU for line in lines):
                    skipped.add((z, y, x))
    return dataclasses.replace(tiles, skipped=frozenset(skipped))


def _source(start: int, stop: int, grid: int, raw: int) -> slice:
    """The raw voxels along an axis that make the grid's voxels ``start`` to ``stop``."""
    start, stop = max(start, 0), min(stop, grid)
    if grid == raw:
        return slice(start, stop)
    low, high = math.floor(start * raw / grid) - _REACH, math.ceil(stop * raw / grid) + _REACH
    return slice(max(low, 0), min(high, raw))
