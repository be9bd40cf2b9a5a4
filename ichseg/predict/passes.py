"""One configuration's networks over one volume's tiles: which run, in what order, how they count.

A pass is one network with one mirroring over all tiles. Without a time budget a network's passes
run together, one network after another. With one they run singly, all networks plain first, and as
many as there is time for.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ichseg.engine.arrays import Grid, Mask, stack, zeros_like
from ichseg.engine.engine import Network
from ichseg.model.bundle import Member
from ichseg.predict import sliding_window
from ichseg.predict.budget import Budget, Clock, Effort, LateError, Watch
from ichseg.predict.dice import dice_of_masks
from ichseg.predict.sliding_window import Tiles

Mirror = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """One network with one mirroring over all tiles.

    Attributes:
        member: The network.
        mirror: The mirrored axes, 0, 1, 2 for z, y, x; empty for none.
    """

    member: Member
    mirror: Mirror


@dataclass(frozen=True, slots=True)
class Passes:
    """All passes of one configuration over one volume: each network with each mirroring.

    Attributes:
        tiles: The volume's tiles.
        members: The networks.
        mirrors: The sets of axes to mirror, the empty one first.
    """

    tiles: Tiles
    members: tuple[Member, ...]
    mirrors: tuple[Mirror, ...]

    @property
    def tiles_each(self) -> int:
        """Tiles of one pass: those that are not skipped."""
        return self.tiles.total - len(self.tiles.skipped)

    @property
    def forward_passes(self) -> int:
        """Tiles that are not skipped, times mirrorings, times networks."""
        return self.tiles_each * len(self.mirrors) * len(self.members)

    @property
    def effort(self) -> Effort:
        """How much that is to compute."""
        return Effort(math.prod(self.tiles.tile), self.tiles_each, self.forward_passes)


@dataclass(frozen=True, slots=True)
class MeanScores:
    """What the passes of a configuration have given.

    Attributes:
        scores: Mean scores of all passes that ran, float32 ``(K, Z, Y, X)``.
        ran: The passes that ran.
        disagreements: For each network, where there are several, 1 - Dice of the foreground that it
            found and of what all found together.
    """

    scores: Grid
    ran: tuple[Pass, ...]
    disagreements: tuple[float, ...]


def run(
    load: Callable[[Member], Network],
    passes: Passes,
    padded: Grid,
    background: Sequence[float],
    *,
    regions: bool,
    clock: Clock,
) -> MeanScores:
    """Run a configuration's networks on all tiles that are not skipped.

    Beside the sum of all scores there is one more array of that size where several passes or
    networks run, and a byte a voxel for each network.

    Args:
        load: Gives a network, ready to run.
        passes: The networks, the tiles and the mirrorings.
        padded: The volume, ``(C, *tiles.padded)``.
        background: The K scores of voxels that no network sees.
        regions: Whether scores are of regions, and not of labels.
        clock: Counts forward passes and time over all configurations of the volume.

    Raises:
        BudgetError: The time that is left does not suffice for one pass of each configuration.
        PredictionError: A score is not finite.
    """
    budget = clock.begin()
    total: Grid | None = None
    ran: list[Pass] = []
    found: dict[Member, Mask] = {}
    for member, mirrors in _in_order(passes, singly=budget is not None):
        if budget is not None and ran and not budget.fits(member):
            break
        try:
            own = _summed(load, member, mirrors, padded, passes.tiles, budget, clock)
        except LateError:
            break
        ran += [Pass(member, mirror) for mirror in mirrors]
        if len(passes.members) > 1 and member not in found:
            found[member] = _foreground(own, regions)
        if total is None:
            total = own
        else:
            total += own
    if total is None:  # there is nothing for a network to do
        total = zeros_like(padded, (len(background), *passes.tiles.padded))
    disagreements = _disagreements(found, total, regions)
    scores = sliding_window.average(total, passes.tiles, max(len(ran), 1), background)
    return MeanScores(scores, tuple(ran), disagreements)


def _in_order(passes: Passes, *, singly: bool) -> Iterator[tuple[Member, Sequence[Mirror]]]:
    """Networks with all mirrorings, or each mirroring for itself, networks first.

    Then each round begins with the network that the last one ended with: it is loaded.
    """
    if passes.tiles_each == 0:
        return
    if not singly:
        yield from ((member, passes.mirrors) for member in passes.members)
        return
    for number, mirror in enumerate(passes.mirrors):
        for member in passes.members if number % 2 == 0 else reversed(passes.members):
            yield member, [mirror]


def _summed(
    load: Callable[[Member], Network],
    member: Member,
    mirrors: Sequence[Mirror],
    padded: Grid,
    tiles: Tiles,
    budget: Budget | None,
    clock: Clock,
) -> Grid:
    """Summed scores of one network with these mirrorings, ``(K, *tiles.padded)``."""
    began = time.perf_counter()
    network = load(member)
    loaded = time.perf_counter()
    clock.compiling_s += loaded - began
    watch = None if budget is None else Watch(budget, began, loaded)

    def counted(views: Iterable[Grid]) -> Generator[Grid]:
        with contextlib.closing(network(views)) as batches:
            for scores in batches:
                clock.count(len(scores))
                if watch is not None:
                    watch.after(len(scores))
                yield scores

    total = sliding_window.sum_tiles(counted, padded, tiles, mirrors=mirrors)
    ended = time.perf_counter()
    clock.predicting_s += ended - loaded
    if budget is not None:
        budget.note(member, loaded - began, ended - loaded)
    return total


def _disagreements(found: Mapping[Member, Mask], total: Grid, regions: bool) -> tuple[float, ...]:
    """For each of several networks 1 - Dice of its foreground and that of all together."""
    if len(found) < 2:
        return ()
    together = _foreground(total, regions)
    return tuple(1 - dice_of_masks(alone, together, empty=1.0) for alone in found.values())


def _foreground(scores: Grid, regions: bool) -> Mask:
    """Where any label beats the background, or any region is more likely than not."""
    if regions:
        slices = [(scores[:, z] > 0).any(0) for z in range(scores.shape[1])]
    else:
        slices = [(scores[1:, z] > scores[0, z]).any(0) for z in range(scores.shape[1])]
    return stack(cast("list[Mask]", slices))
