"""Presets, and what an ensemble has to do for a volume under one of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ichseg.errors import InputError
from ichseg.model.bundle import Member, Model
from ichseg.model.plans import Configuration, Plans
from ichseg.predict import sliding_window
from ichseg.predict.passes import Pass, Passes
from ichseg.predict.prepare import Placement, find_crop, place_crop
from ichseg.predict.sliding_window import Corner, Tiles
from ichseg.scan.volume import Volume

AIR_HU = -500.0  # all tissue lies above, lung apart
_REACH = 2  # voxels around a tile that a cubic spline brings into it


@dataclass(frozen=True, slots=True)
class Preset:
    """How much of an ensemble runs.

    Attributes:
        folds: How many folds of each configuration run; None for all.
        mirror: Whether tiles are predicted mirrored as well.
    """

    folds: int | None
    mirror: bool


PRESETS = {
    "full": Preset(folds=None, mirror=True),
    "balanced": Preset(folds=None, mirror=False),
    "fast": Preset(folds=1, mirror=False),
}


@dataclass(frozen=True, slots=True)
class Planned:
    """What one configuration has to do for one volume.

    Attributes:
        configuration: The configuration whose networks run.
        placement: Where the volume lies in its grid.
        passes: Which networks run over which tiles of that grid, and how mirrored.
    """

    configuration: Configuration
    placement: Placement
    passes: Passes


@dataclass(frozen=True, slots=True)
class Plan:
    """What an ensemble will do for a volume.

    Attributes:
        volume: The volume.
        preset: The preset that was asked for.
        parts: What each configuration has to do, first stages of cascades first.
        seconds: The time that finding this out has taken.
    """

    volume: Volume
    preset: str
    parts: tuple[Planned, ...]
    seconds: float


def plan_passes(model: Model, volume: Volume, preset: str) -> tuple[Planned, ...]:
    """What each configuration has to do for a volume, first stages of cascades first.

    Raises:
        InputError: The volume does not fit the model, or there is no such preset.
    """
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r}, expected one of {', '.join(PRESETS)}")
    chosen, plans = PRESETS[preset], model.plans
    crop = find_crop([volume], plans)
    planned = []
    for name in model.in_order:
        configuration = plans.configuration(name)
        placement = place_crop(crop, configuration)
        tiles = sliding_window.cover(placement.grid_shape, configuration.tile)
        dimensions = configuration.architecture.dimensions
        axes = [a for a in model.mirror_axes if a >= 3 - dimensions]
        passes = Passes(
            tiles=skip_air(tiles, [volume], placement, plans),
            members=model.members_of(name)[: chosen.folds],
            mirrors=tuple(sliding_window.mirrorings(axes if chosen.mirror else ())),
        )
        planned.append(Planned(configuration, placement, passes))
    return tuple(planned)


def preset_members(model: Model, preset: str) -> list[Member]:
    """The networks that run under a preset, in their order."""
    folds = PRESETS[preset].folds
    return [member for name in model.in_order for member in model.members_of(name)[:folds]]


def skip_air(tiles: Tiles, channels: Sequence[Volume], placement: Placement, plans: Plans) -> Tiles:
    """The same tiles; those whose raw HU all lie below -500 are marked as skipped.

    The CT itself is asked, not what normalisation leaves of it, where air and fat may be one. Only
    plans that normalise every channel as CT say that it is in HU. Where a volume is smaller than a
    tile and padded with zeros, these are part of every tile: on the scale of the CT, zero is the
    mean of the training foreground, so that no tile is air.

    Args:
        tiles: The case's tiles in the network's grid.
        channels: The case's volumes.
        placement: Where the case lies in that grid.
        plans: Say how channels are normalised.
    """
    if not plans.expects_hu:
        return tiles
    with_zeros = plans.padding == "zero" and tiles.padded != tiles.shape
    if with_zeros and max(scheme.mean for scheme in plans.normalisations) >= AIR_HU:
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


def ran_record(
    model: Model, preset: str, planned: Sequence[Planned], ran: Sequence[Sequence[Pass]]
) -> dict[str, object]:
    """What ran, for the log and ``results.json``.

    Args:
        model: The bundle's description.
        preset: How much of it was to run.
        planned: What each configuration had to do.
        ran: The passes that each configuration has done.
    """
    return {
        "model": model.name,
        "version": model.version,
        "preset": preset,
        "networks": list(_mirrorings(planned, ran)),
        "mirrored": any(each.mirror for done in ran for each in done),
        "tiles": sum(part.passes.tiles.total for part in planned),
        "tiles_skipped": sum(len(part.passes.tiles.skipped) for part in planned),
        "forward_passes": sum(
            part.passes.tiles_each * len(done) for part, done in zip(planned, ran, strict=True)
        ),
    }


def budget_record(
    planned: Sequence[Planned], ran: Sequence[Sequence[Pass]], budget_s: float
) -> dict[str, object]:
    """What a time budget has left: of each network the axes over which it was mirrored.

    Args:
        planned: What each configuration had to do.
        ran: The passes that each configuration has done.
        budget_s: The time budget in seconds.
    """
    return {
        "time_budget_s": round(budget_s, 3),
        "units": sum(map(len, ran)),
        "units_planned": sum(len(p.passes.mirrors) * len(p.passes.members) for p in planned),
        "mirrorings": _mirrorings(planned, ran),
    }


def _mirrorings(planned: Sequence[Planned], ran: Sequence[Sequence[Pass]]) -> dict[str, list[str]]:
    """The mirrorings of each network, ``plain`` or axes such as ``zy``, in the order they ran."""
    found: dict[str, list[str]] = {}
    for part, done in zip(planned, ran, strict=True):
        for each in done:
            network = f"{part.configuration.name} fold {each.member.fold}"
            axes = "".join("zyx"[axis] for axis in each.mirror) or "plain"
            found.setdefault(network, []).append(axes)
    return found
