import dataclasses
import math

import pytest

from training.fit.configuration import TRAINING_RECIPES
from training.fit.schedule import adopt, advance, end_reason, progress, start

PAPER = TRAINING_RECIPES["msd2018"].rules
POLY = dataclasses.replace(PAPER, kind="poly", learning_rate=0.01)


def run(rules, losses, *, validation=None):
    """The states after each of these epochs."""
    state, states = start(rules), []
    for epoch, loss in enumerate(losses):
        state = advance(
            rules, state, train_loss=loss, validation_loss=(validation or losses)[epoch]
        )
        states.append(state)
    return states


def test_moving_average_by_hand():
    states = run(PAPER, [1.0, 0.0, 0.5], validation=[2.0, 1.0, 0.0])
    assert [s.train_average for s in states] == pytest.approx([1, 0.93, 0.93 * 0.93 + 0.07 * 0.5])
    assert [s.validation_average for s in states] == pytest.approx([2, 1.93, 0.93 * 1.93])


def test_an_average_that_an_earlier_version_left_nan_begins_anew():
    states = run(PAPER, [1.0, 0.5])
    spoilt = dataclasses.replace(states[-1], train_average=math.nan)
    later = advance(PAPER, spoilt, train_loss=0.25, validation_loss=0.5)
    assert (later.train_average, later.train_best, later.train_best_epoch) == (0.25, 0.25, 3)


def test_rate_drops_after_30_epochs_without_improvement():
    states = run(PAPER, [0.5] * 70)
    rates = [s.learning_rate for s in states]
    # epoch 1 is the best; 31, 61 are 30 later; the count begins again at each drop
    assert rates[:30] == [3e-4] * 30
    assert rates[30:60] == pytest.approx([6e-5] * 30)
    assert rates[60:] == pytest.approx([1.2e-5] * 10)


def test_an_improvement_must_exceed_the_threshold():
    rules = dataclasses.replace(PAPER, momentum=0.0, drop_patience=3)  # the average is the loss
    creeping = run(rules, [0.500, 0.497, 0.4951, 0.4950])  # never more than 5e-3 below 0.500
    assert creeping[-1].train_best == 0.5
    assert creeping[-1].learning_rate == pytest.approx(6e-5)
    falling = run(rules, [0.500, 0.497, 0.494, 0.491])  # 6e-3 below at the third
    assert falling[-1].train_best_epoch == 3
    assert falling[-1].learning_rate == 3e-4


def test_stops_when_validation_has_not_improved_in_60_epochs():
    falling = [1 - 0.01 * epoch for epoch in range(61)]
    states = run(PAPER, falling, validation=[0.5] * 61)
    assert end_reason(PAPER, states[59], 0) is None  # epoch 60, the best is epoch 1
    assert end_reason(PAPER, states[60], 0) == "validation loss has not improved in 60 epochs"


def test_stops_below_the_lowest_rate():
    """3e-4, 6e-5, 1.2e-5, 2.4e-6, 4.8e-7: the fourth drop ends it."""
    falling = [1 - 0.01 * epoch for epoch in range(130)]
    states = run(PAPER, [0.5] * 130, validation=falling)
    reasons = [end_reason(PAPER, state, 0) for state in states]
    assert reasons[119] is None
    assert reasons[120] == "learning rate 4.8e-07 is below 1.0e-06"


def test_stops_after_all_epochs():
    rules = dataclasses.replace(PAPER, epochs=2)
    first, second = run(rules, [0.5, 0.4])
    assert end_reason(rules, first, 0) is None
    assert end_reason(rules, second, 0) == "all 2 epochs done"


def test_poly_by_hand():
    """nnunetv2: lr0 * (1 - epoch / N)^0.9."""
    rules = dataclasses.replace(POLY, epochs=4)
    rates = [s.learning_rate for s in run(rules, [0.5] * 4)]
    assert rates == pytest.approx([0.01 * 0.75**0.9, 0.01 * 0.5**0.9, 0.01 * 0.25**0.9, 0])


def test_a_longer_poly_decay_goes_on_higher():
    """Two epochs done of two, so the rate is 0; of four they are half of the way."""
    rules = dataclasses.replace(POLY, epochs=2)
    end = run(rules, [0.5, 0.5])[-1]
    assert end.learning_rate == 0
    longer = dataclasses.replace(rules, epochs=4, learning_rate=0.02)
    went_on = adopt(longer, end, old_rate=0.01, elapsed_s=0)
    assert went_on.learning_rate == pytest.approx(0.02 * 0.5**0.9)
    assert dataclasses.replace(went_on, learning_rate=0) == end
    assert adopt(rules, end, old_rate=0.01, elapsed_s=0) == end


def test_another_rate_keeps_the_drops_so_far():
    dropped = run(PAPER, [0.5] * 40)[-1]  # 3e-4 / 5
    lower = dataclasses.replace(PAPER, learning_rate=1e-4)
    adopted = adopt(lower, dropped, old_rate=3e-4, elapsed_s=0)
    assert adopted.learning_rate == pytest.approx(2e-5)
    assert adopt(PAPER, dropped, old_rate=3e-4, elapsed_s=0) == dropped


def test_a_plateau_begins_anew_at_the_end_of_a_poly_decay():
    """Its rate was 0, and its best epoch long ago: neither ends what the plateau has yet to do."""
    poly = dataclasses.replace(POLY, epochs=100)
    end = run(poly, [0.5] * 100)[-1]
    plateau = dataclasses.replace(PAPER, epochs=300)
    assert end_reason(plateau, end, 0) is None  # before it is adopted, too
    state = adopt(plateau, end, old_rate=0.01, elapsed_s=0)
    assert state.learning_rate == plateau.learning_rate
    assert (state.train_best_epoch, state.validation_best_epoch) == (100, 100)
    for _ in range(29):
        state = advance(plateau, state, train_loss=0.5, validation_loss=0.5)
        assert (end_reason(plateau, state, 0), state.learning_rate) == (None, 3e-4)
    state = advance(plateau, state, train_loss=0.5, validation_loss=0.5)
    assert state.learning_rate == pytest.approx(6e-5)
    assert adopt(plateau, state, old_rate=3e-4, elapsed_s=0) == state


def test_a_poly_decay_goes_on_from_a_plateau_and_back():
    dropped = run(PAPER, [0.5] * 40)[-1]
    poly = dataclasses.replace(POLY, epochs=80)
    decaying = adopt(poly, dropped, old_rate=3e-4, elapsed_s=0)
    assert decaying.learning_rate == pytest.approx(0.01 * 0.5**0.9)
    back = adopt(PAPER, decaying, old_rate=0.01, elapsed_s=0)
    assert (back.learning_rate, back.train_best_epoch) == (3e-4, 40)


def test_a_state_that_does_not_say_its_kind_is_of_the_rules():
    """As earlier versions left it."""
    dropped = dataclasses.replace(run(PAPER, [0.5] * 61)[-1], kind=None)
    adopted = adopt(PAPER, dropped, old_rate=3e-4, elapsed_s=0)
    assert adopted == dataclasses.replace(dropped, kind="plateau")
    assert end_reason(PAPER, dropped, 0) == "validation loss has not improved in 60 epochs"


def test_poly_does_not_watch_the_losses():
    states = run(POLY, [0.5] * 100)
    assert end_reason(POLY, states[-1], 0) is None


def test_minutes_end_the_training_and_set_the_decay():
    rules = dataclasses.replace(POLY, minutes=2)
    state = advance(rules, start(rules), train_loss=1, validation_loss=1, elapsed_s=90)
    assert state.learning_rate == pytest.approx(0.01 * 0.25**0.9)
    assert end_reason(rules, state, 119.9) is None
    assert end_reason(rules, state, 120) == "2 minutes have passed"
    assert progress(rules, 1, 500) == 1
    # whichever ends first
    assert progress(dataclasses.replace(rules, epochs=10), 9, 60) == pytest.approx(0.9)
