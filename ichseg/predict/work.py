"""What an ensemble has to do for a volume, and the account of what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ichseg.errors import InputError
from ichseg.model.bundle import Member, Model
from ichseg.model.plans import Configuration
from ichseg.predict import air, prepare, sliding_window
from ichseg.predict.passes import Unit
from ichseg.predict.prepare import Placement
from ichseg.predict.sliding_window import Tiles
from ichseg.scan.volume import Volume


@dataclass(frozen=True, slots=True)
class Preset:
    """How much of an ensemble runs: how many folds (None: all) and whether tiles are mirrored."""

    folds: int | None
    mirror: bool


PRESETS = {
    "full": Preset(folds=None, mirror=True),
    "balanced": Preset(folds=None, mirror=False),
    "fast": Preset(folds=1, mirror=False),
}


@dataclass(frozen=True, slots=True)
class Work:
    """What one configuration has to do for one volume.

    Attributes:
        configuration: Whose networks.
        placement: Of the volume in its grid.
        tiles: In that grid.
        mirrors: Axes to mirror, for each pass over the tiles.
        members: The networks.
    """

    configuration: Configuration
    placement: Placement
    tiles: Tiles
    mirrors: list[tuple[int, ...]]
    members: tuple[Member, ...]

    @property
    def unit_passes(self) -> int:
        """Tiles that are not skipped: forward passes of one network with one mirroring."""
        return self.tiles.total - len(self.tiles.skipped)

    @property
    def forward_passes(self) -> int:
        """Tiles that are not skipped, times mirrorings, times networks."""
        return self.unit_passes * len(self.mirrors) * len(self.members)


def plan_works(model: Model, volume: Volume, preset: str) -> tuple[Work, ...]:
    """What has to be done, for each configuration, first stages of cascades first.

    Raises:
        InputError: The volume does not fit the model, or there is no such preset.
    """
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r}, expected one of {', '.join(PRESETS)}")
    chosen, plans = PRESETS[preset], model.plans
    works = []
    for name in model.in_order:
        configuration = plans.configuration(name)
        placement = prepare.place([volume], plans, configuration)
        tiles = sliding_window.cover(placement.grid_shape, configuration.tile)
        dimensions = configuration.architecture.dimensions
        axes = [a for a in model.mirror_axes if a >= 3 - dimensions]
        works.append(
            Work(
                configuration,
                placement,
                air.skip_air(tiles, [volume], placement, plans),
                sliding_window.mirrorings(axes if chosen.mirror else ()),
                model.members_of(name)[: chosen.folds],
            )
        )
    return tuple(works)


def record(
    model: Model, preset: str, works: Sequence[Work], ran: Sequence[Sequence[Unit]]
) -> dict[str, object]:
    """For the log and ``results.json``: what ran of these works, whose units are given."""
    return {
        "model": model.name,
        "version": model.version,
        "preset": preset,
        "networks": list(_mirrorings(works, ran)),
        "mirrored": any(unit.mirror for done in ran for unit in done),
        "tiles": sum(work.tiles.total for work in works),
        "tiles_skipped": sum(len(work.tiles.skipped) for work in works),
        "forward_passes": sum(
            work.unit_passes * len(done) for work, done in zip(works, ran, strict=True)
        ),
    }


def units_record(
    works: Sequence[Work], ran: Sequence[Sequence[Unit]], budget_s: float
) -> dict[str, object]:
    """What a time budget has left: of each network the axes over which it was mirrored."""
    return {
        "time_budget_s": round(budget_s, 3),
        "units": sum(map(len, ran)),
        "units_planned": sum(len(work.mirrors) * len(work.members) for work in works),
        "mirrorings": _mirrorings(works, ran),
    }


def _mirrorings(works: Sequence[Work], ran: Sequence[Sequence[Unit]]) -> dict[str, list[str]]:
    """By network: ``plain``, or axes such as ``zy``, in the order in which they ran."""
    found: dict[str, list[str]] = {}
    for work, done in zip(works, ran, strict=True):
        for unit in done:
            network = f"{work.configuration.name} fold {unit.member.fold}"
            axes = "".join("zyx"[axis] for axis in unit.mirror) or "plain"
            found.setdefault(network, []).append(axes)
    return found
