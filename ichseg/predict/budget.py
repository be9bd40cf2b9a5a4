"""The time that a volume may take: how it is shared by configurations, and what still fits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ichseg.errors import BudgetError, InputError
from ichseg.model.bundle import Member

Count = Callable[[int, int], None]
_WARM_CALLS = 3  # of a network, before its speed is believed; the first one is slower


def check_seconds(budget_s: float | None) -> None:
    """Refuse what is no time budget; one that is used up is for ``BudgetError``.

    Raises:
        InputError: It is neither None nor a finite number.
    """
    if budget_s is not None and not (
        isinstance(budget_s, int | float | np.number) and np.isfinite(budget_s)
    ):
        raise InputError(f"budget_s {budget_s!r}, expected a number of seconds")


class LateError(Exception):
    """A pass has not ended when it should have."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much one configuration has to compute.

    Attributes:
        tile_voxels: Voxels of one tile.
        tiles_each: Tiles of one pass, which is one network with one mirroring.
        forward_passes: Tiles of all passes together.
    """

    tile_voxels: int
    tiles_each: int
    forward_passes: int


@dataclass(slots=True)
class Clock:
    """Counts forward passes and time over all configurations of a volume.

    Attributes:
        progress: Called with (forward passes done, total) after each.
        total: Forward passes, if all is done.
        deadline: When all must have ended, by ``time.perf_counter()``; None without a time budget.
        to_come: What the configurations that have not begun have to do, in order.
        done: Forward passes so far.
        compiling_s: Seconds of loading networks so far.
        predicting_s: Seconds of running them so far.
    """

    progress: Count | None
    total: int
    deadline: float | None
    to_come: list[Effort]
    done: int = 0
    compiling_s: float = 0.0
    predicting_s: float = 0.0

    def begin(self) -> Budget | None:
        """The time budget of the next configuration; None where there is no time budget.

        It gets the share of the time that is left which its work is of all work that is left.
        """
        own, *later = self.to_come
        self.to_come = later
        if self.deadline is None:
            return None
        now = time.perf_counter()
        work = [effort.tile_voxels * effort.forward_passes for effort in (own, *later)]
        until = now + (self.deadline - now) * work[0] / max(sum(work), 1)
        # one pass of this and of each later configuration, in passes of this one
        least = [effort.tile_voxels * effort.tiles_each for effort in (own, *later)]
        return Budget(until, self.deadline, own.tiles_each, sum(least) / max(least[0], 1))

    def count(self, tiles: int) -> None:
        """So many more tiles have gone through a network."""
        self.done += tiles
        if self.progress is not None:
            self.progress(self.done, self.total)


@dataclass(slots=True)
class Budget:
    """The time that one configuration may take, and what loading and passes have taken so far.

    Attributes:
        until: Until when passes of this configuration may run, by ``time.perf_counter()``.
        deadline: When all configurations must have ended.
        tiles_each: Tiles of one pass.
        least_passes: One pass of this and of each later configuration, in passes of this one.
        loaded: The network that was loaded last.
        loads_s: Seconds that each loading of a network has taken.
        passes_s: Seconds that each pass has taken.
    """

    until: float
    deadline: float
    tiles_each: int
    least_passes: float
    loaded: Member | None = None
    loads_s: list[float] = field(default_factory=list)
    passes_s: list[float] = field(default_factory=list)

    def fits(self, member: Member) -> bool:
        """Whether one more pass of this network is likely to end in time.

        The first pass does not count once there are others: on a GPU cuDNN looks for algorithms
        in it.
        """
        expected = max(self.passes_s[1:] or self.passes_s)
        if member != self.loaded:
            expected += max(self.loads_s)
        return time.perf_counter() + expected <= self.until

    def note(self, member: Member, load_s: float, pass_s: float) -> None:
        """A pass of this network has ended."""
        if member != self.loaded:
            self.loads_s.append(load_s)
        self.loaded = member
        self.passes_s.append(pass_s)


@dataclass(slots=True)
class Watch:
    """Follows one pass under a time budget, tile by tile.

    The first pass of a configuration must run, so it is only held against what the least of all
    needs. A later one that is late is of no use.

    Attributes:
        budget: The configuration's budget.
        began: When loading the network began, by ``time.perf_counter()``.
        loaded: When it was loaded.
    """

    budget: Budget
    began: float
    loaded: float
    _calls: int = field(default=0, init=False)
    _tiles: int = field(default=0, init=False)
    _warm_at: float = field(init=False)
    _warm_tiles: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._warm_at = self.loaded

    def after(self, tiles: int) -> None:
        """So many more tiles are done.

        Raises:
            BudgetError: By the speed of the first tiles, the least that must run cannot end in
                time.
            LateError: The pass is late, and is not the first one.
        """
        now = time.perf_counter()
        self._calls += 1
        self._tiles += tiles
        over = now > self.budget.deadline
        if self.budget.passes_s:
            if over:
                raise LateError
            return
        unfinished = self._tiles < self.budget.tiles_each
        if self._calls == _WARM_CALLS or (self._calls < _WARM_CALLS and over and unfinished):
            per_tile_s = (now - self._warm_at) / (self._tiles - self._warm_tiles)
            self._refuse_if_hopeless(per_tile_s * self.budget.tiles_each)
        if self._calls == 1:
            self._warm_at, self._warm_tiles = now, self._tiles

    def _refuse_if_hopeless(self, pass_s: float) -> None:
        least_s = self.budget.least_passes * (self.loaded - self.began + pass_s)
        left_s = self.budget.deadline - self.began
        if least_s > left_s:
            raise BudgetError(
                f"the time budget leaves {max(left_s, 0):.1f} s for the networks, and one network "
                f"without mirroring needs about {least_s:.1f} s here"
            )
