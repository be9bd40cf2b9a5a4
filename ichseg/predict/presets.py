"""Presets, and what an ensemble has to do for a volume under one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ichseg.errors import InputError
from ichseg.model.bundle import Model
from ichseg.model.plans import Configuration
from ichseg.predict import air, sliding_window
from ichseg.predict.passes import Pass, Passes
from ichseg.predict.prepare import Placement, find_crop, place_crop
from ichseg.scan.volume import Volume


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
            tiles=air.skip_air(tiles, [volume], placement, plans),
            members=model.members_of(name)[: chosen.folds],
            mirrors=tuple(sliding_window.mirrorings(axes if chosen.mirror else ())),
        )
        planned.append(Planned(configuration, placement, passes))
    return tuple(planned)


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
