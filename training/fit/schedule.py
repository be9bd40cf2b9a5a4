"""When the learning rate drops and when training ends: pure functions of a frozen state.

``plateau`` is the schedule of the paper (P18): exponential moving
averages of the losses decide. ``poly`` decays over a length known beforehand, in epochs or minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

SCHEDULES = ("plateau", "poly")


@dataclass(frozen=True, slots=True)
class ScheduleRules:
    """The numbers of a schedule.

    Attributes:
        kind: ``plateau`` or ``poly``.
        learning_rate: Learning rate of the first epoch.
        epochs: Most epochs of a training.
        minutes: Most minutes of a training, or None.
        momentum: Weight of the old value in a loss average.
        threshold: A smaller change of a loss average is no improvement.
        drop_patience: Epochs without improvement of the training average before the rate drops.
        drop_factor: What the learning rate is multiplied by then.
        stop_patience: Epochs without improvement of the validation average before training ends.
        lowest_rate: Training ends below this rate.
        exponent: Exponent of the poly decay.
    """

    kind: str
    learning_rate: float
    epochs: int
    minutes: float | None
    momentum: float
    threshold: float
    drop_patience: int
    drop_factor: float
    stop_patience: int
    lowest_rate: float
    exponent: float


@dataclass(frozen=True, slots=True)
class ScheduleState:
    """Where a schedule stands after ``epoch`` epochs.

    Attributes:
        epoch: Number of epochs completed.
        learning_rate: Learning rate of the next epoch.
        train_average: Moving average of the training loss; None before any epoch.
        train_best: The value of that average when it last improved.
        train_best_epoch: The epoch of that improvement, or of the last drop of the rate.
        validation_average: Moving average of the validation loss; None before any epoch.
        validation_best: The value of that average when it last improved.
        validation_best_epoch: The epoch of that improvement.
        kind: The kind of schedule that led here; None in checkpoints of earlier versions.
    """

    epoch: int
    learning_rate: float
    train_average: float | None = None
    train_best: float | None = None
    train_best_epoch: int = 0
    validation_average: float | None = None
    validation_best: float | None = None
    validation_best_epoch: int = 0
    kind: str | None = None


def start(rules: ScheduleRules) -> ScheduleState:
    """The state before the first epoch."""
    return ScheduleState(epoch=0, learning_rate=rules.learning_rate, kind=rules.kind)


def advance(
    rules: ScheduleRules,
    state: ScheduleState,
    *,
    train_loss: float,
    validation_loss: float,
    elapsed_s: float = 0.0,
) -> ScheduleState:
    """The state after one more epoch with these mean losses.

    Args:
        rules: The schedule's numbers.
        state: Where the schedule stands before the epoch.
        train_loss: Mean training loss of the epoch.
        validation_loss: Mean validation loss after it.
        elapsed_s: Seconds trained so far; counts when the rules limit the minutes.
    """
    epoch = state.epoch + 1
    train, train_best, train_epoch = _follow(
        rules, train_loss, state.train_average, state.train_best, state.train_best_epoch, epoch
    )
    validation, validation_best, validation_epoch = _follow(
        rules,
        validation_loss,
        state.validation_average,
        state.validation_best,
        state.validation_best_epoch,
        epoch,
    )
    rate = state.learning_rate
    if rules.kind == "poly":
        rate = _poly_rate(rules, epoch, elapsed_s)
    elif epoch - train_epoch >= rules.drop_patience:
        rate, train_epoch = rate * rules.drop_factor, epoch  # and the count begins again
    return replace(
        state,
        epoch=epoch,
        learning_rate=rate,
        train_average=train,
        train_best=train_best,
        train_best_epoch=train_epoch,
        validation_average=validation,
        validation_best=validation_best,
        validation_best_epoch=validation_epoch,
    )


def adopt(
    rules: ScheduleRules, state: ScheduleState, *, old_rate: float, elapsed_s: float
) -> ScheduleState:
    """The state under these rules, if others may have led to it.

    A longer ``poly`` decay is higher from now on. The drops that a ``plateau`` has made so far
    hold for another rate at the start, too. A ``plateau`` after a ``poly`` decay begins with its
    own rate, and its patience counts from here.

    Args:
        rules: The schedule's numbers from now on.
        state: Where the schedule stands under the rules so far.
        old_rate: Learning rate of the first epoch under the rules so far.
        elapsed_s: Seconds trained so far.
    """
    changed, state = _is_of_another_kind(rules, state), replace(state, kind=rules.kind)
    if rules.kind == "poly":
        return replace(state, learning_rate=_poly_rate(rules, state.epoch, elapsed_s))
    if changed:
        return replace(
            state,
            learning_rate=rules.learning_rate,
            train_best_epoch=state.epoch,
            validation_best_epoch=state.epoch,
        )
    return replace(state, learning_rate=state.learning_rate * (rules.learning_rate / old_rate))


def progress(rules: ScheduleRules, epoch: int, elapsed_s: float) -> float:
    """How much of the training is done, 0 to 1, by epochs or by minutes, whichever ends first."""
    done = epoch / rules.epochs
    if rules.minutes is not None:
        done = max(done, elapsed_s / (60 * rules.minutes))
    return min(1.0, done)


def end_reason(rules: ScheduleRules, state: ScheduleState, elapsed_s: float) -> str | None:
    """Why training is over, in words, or None when it goes on."""
    if state.epoch >= rules.epochs:
        return f"all {rules.epochs} epochs done"
    if rules.minutes is not None and elapsed_s >= 60 * rules.minutes:
        return f"{rules.minutes:g} minutes have passed"
    if rules.kind == "plateau" and not _is_of_another_kind(rules, state):
        if state.learning_rate < rules.lowest_rate:
            return f"learning rate {state.learning_rate:.1e} is below {rules.lowest_rate:.1e}"
        if state.epoch - state.validation_best_epoch >= rules.stop_patience:
            return f"validation loss has not improved in {rules.stop_patience} epochs"
    return None


def _is_of_another_kind(rules: ScheduleRules, state: ScheduleState) -> bool:
    """Whether a schedule of another kind led to the state, whose rate says nothing here."""
    return state.kind not in (None, rules.kind)


def _poly_rate(rules: ScheduleRules, epoch: int, elapsed_s: float) -> float:
    return rules.learning_rate * (1 - progress(rules, epoch, elapsed_s)) ** rules.exponent


def _follow(
    rules: ScheduleRules,
    loss: float,
    average: float | None,
    best: float | None,
    best_epoch: int,
    epoch: int,
) -> tuple[float, float, int]:
    """The moving average with this loss, its best value so far and the epoch of that."""
    if average is None or math.isnan(average):  # earlier versions left NaN after an empty epoch
        average = loss
    else:
        average = rules.momentum * average + (1 - rules.momentum) * loss
    if best is None or average < best - rules.threshold:
        return average, average, epoch
    return average, best, best_epoch
