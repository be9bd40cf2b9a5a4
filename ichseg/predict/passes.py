"""One configuration's networks over one volume's tiles: which run, in what order, how they count.

A unit is one network with one mirroring over all tiles. Without a time budget a network's units
run together, one network after another. With one they run singly, all networks plain first, and as
many as there is time for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from ichseg.engine.arrays import Grid, Mask, stack, zeros_like
from ichseg.engine.engine import LoadedNetwork
from ichseg.errors import BudgetError
from ichseg.model.bundle import Member
from ichseg.predict import sliding_window
from ichseg.predict.dice import dice_of_masks
from ichseg.predict.sliding_window import Tiles

Count = Callable[[int, int], None]
_WARM_CALLS = 3  # of a network, before its speed is believed; the first one is slower


@dataclass(frozen=True, slots=True)
class Unit:
    """One network with one mirroring, axes 0, 1, 2 for z, y, x."""

    member: Member
    mirror: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """What a configuration has to do: forward passes of a unit, a tile's voxels, and all passes."""

    unit_passes: int
    tile: tuple[int, int, int]
    passes: int


@dataclass(slots=True)
class Clock:
    """Counts forward passes and time over all configurations of a volume.

    Attributes:
        progress: Called with (passes done, total).
        total: Passes, if all is done.
        deadline: By ``time.perf_counter()``; None without a time budget.
        to_come: The configurations that have not begun, in order.
        done, compiling_s, predicting_s: So far.
    """

    progress: Count | None
    total: int
    deadline: float | None
    to_come: list[Load]
    done: int = 0
    compiling_s: float = 0.0
    predicting_s: float = 0.0

    def begin(self) -> _Budget | None:
        """The next configuration begins: its share of the time that is left, by its work."""
        load, *later = self.to_come
        self.to_come = later
        if self.deadline is None:
            return None
        now = time.perf_counter()
        work = [math.prod(part.tile) * part.passes for part in (load, *later)]
        share = now + (self.deadline - now) * work[0] / max(sum(work), 1)
        # one unit of this and of each later configuration, in units of this one
        unit = [math.prod(part.tile) * part.unit_passes for part in (load, *later)]
        return _Budget(share, self.deadline, load.unit_passes, sum(unit) / max(unit[0], 1))


@dataclass(frozen=True, slots=True)
class _Budget:
    """Until when units may run, when all must have ended, and what the least would take."""

    until: float
    deadline: float
    unit_passes: int
    least_units: float


@dataclass(frozen=True, slots=True)
class Done:
    """What ran: mean scores ``(K, Z, Y, X)``, the units, and 1 - Dice of each network and all."""

    scores: Grid
    units: list[Unit]
    doubts: list[float]


class _LateError(Exception):
    """A unit has not ended when it should have."""


def run(
    load: Callable[[Member], LoadedNetwork],
    members: Sequence[Member],
    mirrors: Sequence[tuple[int, ...]],
    padded: Grid,
    tiles: Tiles,
    background: Sequence[float],
    *,
    regions: bool,
    clock: Clock,
) -> Done:
    """Run a configuration's networks on all tiles that are not skipped.

    Beside the sum of all scores there is one more array of that size where several units or
    networks run, and a byte a voxel for each network.

    Args:
        load: Gives a network; the one before is given up.
        members: Which networks; none where there is nothing for them to do.
        mirrors: Each a set of axes, the empty one first.
        padded: ``(C, *tiles.padded)``.
        tiles: Of the volume.
        background: The K scores of voxels that no network sees.
        regions: Whether scores are of regions, and not of labels.
        clock: Of the volume.

    Raises:
        BudgetError: The time that is left does not suffice for one unit of each configuration.
    """
    budget = clock.begin()
    total: Grid | None = None
    units: list[Unit] = []
    found: dict[Member, Mask] = {}
    pace = _Pace()
    for member, axes in _groups(members, mirrors, together=budget is None):
        if budget is not None and units and not pace.fits(member, budget.until):
            break
        try:
            own = _run_group(load, member, axes, padded, tiles, pace, budget, clock)
        except _LateError:
            break
        units += [Unit(member, mirror) for mirror in axes]
        if len(members) > 1 and member not in found:
            found[member] = _foreground(own, regions)
        if total is None:
            total = own
        else:
            total += own
    doubts = []
    if len(found) > 1 and total is not None:
        together = _foreground(total, regions)
        doubts = [1 - dice_of_masks(alone, together, empty=1.0) for alone in found.values()]
    if total is None:
        total = zeros_like(padded, (len(background), *tiles.padded))
    scores = sliding_window.average(total, tiles, max(len(units), 1), background)
    return Done(scores, units, doubts)


def _groups(
    members: Sequence[Member], mirrors: Sequence[tuple[int, ...]], *, together: bool
) -> Iterator[tuple[Member, list[tuple[int, ...]]]]:
    """Networks with all mirrorings, or each mirroring for itself, networks first.

    Then each round begins with the network that the last one ended with: it is loaded.
    """
    if together:
        yield from ((member, list(mirrors)) for member in members)
        return
    for number, mirror in enumerate(mirrors):
        for member in members if number % 2 == 0 else reversed(members):
            yield member, [mirror]


@dataclass(slots=True)
class _Pace:
    """How long loading a network and running a unit have taken."""

    loaded: Member | None = None
    loads_s: list[float] = field(default_factory=list)
    units_s: list[float] = field(default_factory=list)

    def fits(self, member: Member, until: float) -> bool:
        """Whether one more unit of this network is likely to end in time."""
        expected = max(self.units_s)
        if member != self.loaded:
            expected += max(self.loads_s)
        return time.perf_counter() + expected <= until


def _run_group(
    load: Callable[[Member], LoadedNetwork],
    member: Member,
    axes: Sequence[tuple[int, ...]],
    padded: Grid,
    tiles: Tiles,
    pace: _Pace,
    budget: _Budget | None,
    clock: Clock,
) -> Grid:
    """Summed scores of one network with these mirrorings."""
    began = time.perf_counter()
    network = load(member)
    loaded = time.perf_counter()
    clock.compiling_s += loaded - began
    first = not pace.units_s
    calls = passes = 0
    warm_at = loaded
    warm_passes = 0

    def counted(batch: Grid) -> Grid:
        nonlocal calls, passes, warm_at, warm_passes
        scores: Grid = network.run(batch)
        calls, passes = calls + 1, passes + len(batch)
        clock.done += len(batch)
        if clock.progress is not None:
            clock.progress(clock.done, clock.total)
        if budget is None:
            return scores
        now = time.perf_counter()
        over = now > budget.deadline and passes < budget.unit_passes
        if first and (calls == _WARM_CALLS or (calls < _WARM_CALLS and over)):
            unit_s = (now - warm_at) / (passes - warm_passes) * budget.unit_passes
            _refuse_if_hopeless(loaded - began, unit_s, began, budget)
        if calls == 1:
            warm_at, warm_passes = now, passes
        if not first and now > budget.deadline:
            raise _LateError
        return scores

    own = sliding_window.add_tiles(counted, padded, tiles, None, mirrors=axes, batch=network.batch)
    ended = time.perf_counter()
    clock.predicting_s += ended - loaded
    if member != pace.loaded:
        pace.loads_s.append(loaded - began)
    pace.loaded = member
    pace.units_s.append(ended - loaded)
    return own


def _refuse_if_hopeless(load_s: float, unit_s: float, began: float, budget: _Budget) -> None:
    """By the speed of its first tiles: say so if the least that must run cannot end in time."""
    least_s = budget.least_units * (load_s + unit_s)
    left_s = budget.deadline - began
    if least_s > left_s:
        raise BudgetError(
            f"the time budget leaves {max(left_s, 0):.1f} s for the networks, and one network "
            f"without mirroring needs about {least_s:.1f} s here"
        )


def _foreground(scores: Grid, regions: bool) -> Mask:
    """Where any label beats the background, or any region is more likely than not: a bool array."""
    if regions:
        slices = [(scores[:, z] > 0).any(0) for z in range(scores.shape[1])]
    else:
        slices = [(scores[1:, z] > scores[0, z]).any(0) for z in range(scores.shape[1])]
    return stack(cast("list[Mask]", slices))
