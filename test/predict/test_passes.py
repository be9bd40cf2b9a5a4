"""Which passes run in which order, what a time budget leaves of them, and how networks disagree."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ichseg.engine.engine import in_batches
from ichseg.errors import BudgetError
from ichseg.model.bundle import Member
from ichseg.predict import budget, passes, sliding_window
from ichseg.predict.budget import Clock, Effort
from ichseg.predict.passes import Passes

TILE = (4, 8, 8)
TILES = sliding_window.cover((4, 8, 20), TILE)  # 4 tiles
MIRRORS = [(), (0,), (1,)]
MEMBERS = [Member("net", str(fold), f"net_{fold}.safetensors", "") for fold in range(3)]
BACKGROUND = (1.0, 0.0)


class Machine:
    """Networks that take a second a tile, two to load; scores as asked for; all on record."""

    def __init__(self, monkeypatch, scores=lambda fold, tile: (0.0, 1.0), tile_s=lambda calls: 1.0):
        self.now, self.log, self.calls = 0.0, [], 0
        self.scores, self.tile_s = scores, tile_s
        for module in (budget, passes):
            clock = SimpleNamespace(perf_counter=lambda: self.now)
            monkeypatch.setattr(module, "time", clock)

    def load(self, member):
        if not self.log or self.log[-1] != member.fold:
            self.now += 2.0
            self.log.append(member.fold)

        def run(batch):
            self.calls += 1
            self.now += self.tile_s(self.calls)
            result = np.empty((len(batch), 2, *TILE), np.float32)
            for scores, tile in zip(result, batch, strict=True):
                scores[0], scores[1] = self.scores(member.fold, tile)
            return result

        return in_batches(run, 1)

    def run(self, budget_s=None, members=MEMBERS, later=(), mirrors=MIRRORS, data=None):
        wanted = Passes(TILES, tuple(members), tuple(mirrors))
        deadline = None if budget_s is None else self.now + budget_s
        self.clock = Clock(None, wanted.forward_passes, deadline, [wanted.effort, *later])
        return passes.run(
            self.load,
            wanted,
            np.zeros((1, *TILES.padded), np.float32) if data is None else data,
            BACKGROUND,
            regions=False,
            clock=self.clock,
        )


def names(done):
    return [(each.member.fold, each.mirror) for each in done.ran]


def test_without_a_budget_each_network_is_loaded_once(monkeypatch):
    machine = Machine(monkeypatch)
    done = machine.run()
    assert machine.log == ["0", "1", "2"]
    assert names(done) == [(f, m) for f in "012" for m in MIRRORS]
    assert machine.clock.compiling_s == 6
    assert machine.clock.predicting_s == machine.clock.done == 4 * 9
    np.testing.assert_allclose(done.scores[1], 1, rtol=1e-6)


def test_with_time_enough_all_passes_run_networks_first(monkeypatch):
    machine = Machine(monkeypatch)
    done = machine.run(budget_s=1000)
    assert sorted(names(done)) == sorted((f, m) for f in "012" for m in MIRRORS)
    assert [each.mirror for each in done.ran] == [m for m in MIRRORS for _ in MEMBERS]
    assert machine.log == ["0", "1", "2", "1", "0", "1", "2"]  # a turn loads nothing


def test_a_first_pass_that_is_slow_is_not_charged_to_later_ones(monkeypatch):
    """It takes 42 s with its loading, the others 4 s each; it is all that the second one knows."""
    machine = Machine(monkeypatch, tile_s=lambda calls: 10.0 if calls <= 4 else 1.0)
    assert len(machine.run(budget_s=84, members=MEMBERS[:1]).ran) == 3
    machine = Machine(monkeypatch, tile_s=lambda calls: 10.0 if calls <= 4 else 1.0)
    assert len(machine.run(budget_s=81, members=MEMBERS[:1]).ran) == 1


@pytest.mark.parametrize(
    ("budget_s", "expected"),
    [
        (6.0, [("0", ())]),  # exactly one: two seconds to load, four tiles
        (11.9, [("0", ())]),
        (12.0, [("0", ()), ("1", ())]),
        (18.0, [("0", ()), ("1", ()), ("2", ())]),
        (21.9, [("0", ()), ("1", ()), ("2", ())]),
        (22.0, [("0", ()), ("1", ()), ("2", ()), ("2", (0,))]),
    ],
)
def test_as_many_passes_run_as_fit(monkeypatch, budget_s, expected):
    machine = Machine(monkeypatch)
    assert names(machine.run(budget_s=budget_s)) == expected
    assert machine.calls == 4 * len(expected)  # none was begun in vain


def test_finished_passes_weigh_equally(monkeypatch):
    machine = Machine(monkeypatch, scores=lambda fold, tile: (0.0, float(fold)))
    done = machine.run(budget_s=22)  # folds 0, 1, 2, 2
    np.testing.assert_allclose(done.scores[1], (0 + 1 + 2 + 2) / 4, rtol=1e-6)


def test_what_cannot_fit_ends_after_the_first_tiles(monkeypatch):
    machine = Machine(monkeypatch)
    with pytest.raises(BudgetError, match=r"leaves 5\.5 s .* needs about 6\.0 s"):
        machine.run(budget_s=5.5)
    assert machine.calls == 3


@pytest.mark.parametrize(("tile_s", "calls"), [(3.0, 2), (8.0, 1)])
def test_where_the_time_is_over_already_no_more_tiles_are_waited_for(monkeypatch, tile_s, calls):
    machine = Machine(monkeypatch, tile_s=lambda _: tile_s)
    needed = 2 + 4 * tile_s
    with pytest.raises(BudgetError, match=rf"leaves 5\.5 s .* needs about {needed:.1f} s"):
        machine.run(budget_s=5.5)
    assert machine.calls == calls


def test_the_first_pass_runs_to_its_end_though_it_gets_slower(monkeypatch):
    machine = Machine(monkeypatch, tile_s=lambda calls: 1.0 if calls < 4 else 50.0)
    assert names(machine.run(budget_s=7)) == [("0", ())]


def test_a_pass_that_is_late_is_dropped(monkeypatch):
    """The second network gets slow in its third tile; what it did before does not count."""
    machine = Machine(
        monkeypatch,
        scores=lambda fold, tile: (0.0, 1.0 if fold == "0" else 9.0),
        tile_s=lambda calls: 20.0 if calls == 7 else 1.0,
    )
    done = machine.run(budget_s=13)
    assert names(done) == [("0", ())]
    assert machine.calls == 7
    np.testing.assert_allclose(done.scores[1], 1, rtol=1e-6)


def test_a_later_configuration_keeps_its_share(monkeypatch):
    """As much work is to come: half of the time is left for it."""
    later = Effort(4 * 8 * 8, TILES.total, TILES.total * 9)
    assert len(Machine(monkeypatch).run(budget_s=24, later=[later]).ran) == 2
    with pytest.raises(BudgetError, match=r"needs about 12\.0 s"):  # a pass of each
        Machine(monkeypatch).run(budget_s=11, later=[later])


def test_disagreement_is_one_less_dice_of_each_network_and_the_mean(monkeypatch):
    """Fold 0 marks all 640 voxels, the others the 192 where the data are 1 (x from 8 to 13).

    All three together mark these, as two of three do; Dice of fold 0 and them: 2 x 192 / 832.
    """
    data = np.zeros((1, *TILES.padded), np.float32)
    data[..., 8:14] = 1

    def scores(fold, tile):
        marked = np.ones(TILE) if fold == "0" else tile[0]
        return 1 - marked, marked

    done = Machine(monkeypatch, scores).run(data=data, mirrors=[()])
    assert done.disagreements == pytest.approx([1 - 2 * 192 / 832, 0, 0])


def test_networks_that_find_nothing_agree(monkeypatch):
    machine = Machine(monkeypatch, scores=lambda fold, tile: (1.0, 0.0))
    assert machine.run().disagreements == (0, 0, 0)
    assert machine.run(members=MEMBERS[:1]).disagreements == ()
