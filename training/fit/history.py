"""What the epochs of a run have come to: a line of the log each, ``progress.csv``, a picture.

The picture, ``progress.png``, shows losses and Dice over epochs as in the paper's Fig. 2, the
learning rate, and the time.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ichseg.files import replacing
from ichseg.wording import clock

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = (
    "epoch",
    "train_loss",
    "validation_loss",
    "pseudo_dice",
    "lr",
    "seconds",
    "compute_s",
    "data_wait_s",
)
_CLASSES_IN_A_LINE = 4
_RECENT_EPOCHS = 10  # whose time says how long those to come take
_AVERAGED_FROM = 100  # epochs: a shorter curve is read without an average
_MARKED_UP_TO = 60  # epochs: so many points can be told apart


@dataclass(frozen=True, slots=True)
class EpochRow:
    """One line of ``progress.csv``.

    Attributes:
        epoch: Number of the epoch, from 1.
        train_loss: Mean loss of the epoch's training batches.
        validation_loss: Mean loss of its validation batches.
        pseudo_dice: Dice of the validation patches taken as one volume, averaged over classes; None
            when neither they nor the prediction had any foreground.
        lr: Learning rate of the epoch.
        seconds: Wall time of the epoch in seconds, validation included.
        data_wait_s: Seconds of it spent waiting for batches.
        class_dice: The same Dice for each foreground class.
    """

    epoch: int
    train_loss: float
    validation_loss: float
    pseudo_dice: float | None
    lr: float
    seconds: float
    data_wait_s: float
    class_dice: tuple[float | None, ...] = ()

    @property
    def compute_s(self) -> float:
        """Wall time of the epoch in seconds, without the wait for batches."""
        return self.seconds - self.data_wait_s


def describe(row: EpochRow, epochs: int, left_s: float) -> str:
    """The epoch in one line; Dice of each class in brackets where there are several, but few."""
    dice = number(row.pseudo_dice)
    if 1 < len(row.class_dice) <= _CLASSES_IN_A_LINE:
        dice += f" ({', '.join(map(number, row.class_dice))})"
    return (
        f"epoch {row.epoch}/{epochs}  train {row.train_loss:+.4f}  "
        f"validation {row.validation_loss:+.4f}  "
        f"dice {dice}  lr {row.lr:.2e}  {row.seconds:.1f} s (data wait {row.data_wait_s:.1f} s)  "
        f"ETA {clock(left_s)}"
    )


def number(dice: float | None) -> str:
    """A Dice score as text, five characters wide; a dash where there is none."""
    return "  -  " if dice is None else f"{dice:.3f}"


def left_s(
    history: Sequence[EpochRow],
    *,
    epochs: int,
    epoch_s: float = 0.0,
    spent_s: float = 0.0,
    budget_s: float | None = None,
) -> float:
    """Seconds until the training ends, if the coming epochs take as long as the last ones.

    Args:
        history: The whole epochs so far.
        epochs: Number of epochs of the whole training.
        epoch_s: Seconds that one epoch takes, for when there is no history yet.
        spent_s: Seconds that the current epoch has taken so far.
        budget_s: Seconds left of the time that the training may take, if that is limited.
    """
    recent = [row.seconds for row in history[-_RECENT_EPOCHS:]] or [epoch_s]
    left = max(0, epochs - len(history)) * sum(recent) / len(recent) - spent_s
    return max(0.0, left if budget_s is None else min(left, budget_s))


def write_csv(rows: Sequence[EpochRow], path: Path, labels: Sequence[str] = ()) -> None:
    """Write all epochs so far; the file is replaced as a whole.

    Args:
        rows: The epochs.
        path: Where to write the table.
        labels: Names of the foreground classes; with two or more, each has a column for its Dice.
    """
    classes = [f"dice_{label}" for label in labels] if len(labels) > 1 else []
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*_COLUMNS, *classes])
        for row in rows:
            dice = row.class_dice or (None,) * len(classes)
            values = [*(getattr(row, name) for name in _COLUMNS), *(dice if classes else ())]
            writer.writerow("" if v is None else f"{v:.7g}" for v in values)


def waiting(row: EpochRow, *, startup_s: float = 0.0) -> float:
    """The share of an epoch that went into waiting for batches, the workers' start left out."""
    return max(0.0, row.data_wait_s - startup_s) / max(row.seconds - startup_s, 1e-9)


def write_picture(rows: Sequence[EpochRow], path: Path, *, title: str) -> None:
    """Write the picture of all epochs so far, at least one; the file is replaced whole."""
    with replacing(path, suffix=".png") as temporary:
        plot(rows, title).savefig(temporary)


def plot(rows: Sequence[EpochRow], title: str) -> Figure:
    """Draw all epochs so far, at least one.

    Losses and Dice are drawn as measured, over many epochs with their moving averages. Epochs
    without Dice, or whose loss is not finite, leave a gap.
    """
    from matplotlib.figure import Figure  # a second to import, and only training needs it
    from matplotlib.ticker import MaxNLocator

    epochs = [row.epoch for row in rows]
    figure = Figure(figsize=(10, 9), dpi=100, layout="constrained")
    losses, rates, times = figure.subplots(3, 1, sharex=True, height_ratios=(4, 1.3, 1.3))
    scores = losses.twinx()
    lines = [
        _curve(losses, epochs, [row.train_loss for row in rows], "blue", "training loss"),
        _curve(losses, epochs, [row.validation_loss for row in rows], "red", "validation loss"),
        _curve(scores, epochs, _dice(rows), "green", "Dice of validation patches"),
    ]
    losses.set(ylabel="loss", title=title)
    scores.set(ylabel="Dice", ylim=(0, 1))
    figure.legend(
        lines, [line.get_label() for line in lines], loc="outside upper center", ncols=len(lines)
    )

    rates.plot(
        epochs,
        [row.lr for row in rows],
        color="black",
        drawstyle="steps-mid",
        marker="o" if len(rows) <= _MARKED_UP_TO else None,
        markersize=3.5,
    )
    rates.set(ylabel="learning rate", yscale="log" if all(r.lr > 0 for r in rows) else "linear")

    compute = [row.compute_s for row in rows]
    edges = [epoch - 0.5 for epoch in epochs] + [epochs[-1] + 0.5]
    total = [row.seconds for row in rows]
    times.stairs(compute, edges, fill=True, color="tab:gray", label="compute")
    times.stairs(total, edges, baseline=compute, fill=True, color="tab:orange", label="data wait")
    times.set(xlabel="epoch", ylabel="seconds an epoch")
    times.set_ylim(0, 1.35 * _usual_most(total))
    times.legend(loc="upper right", ncols=2)
    times.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (losses, rates, times):
        axes.grid(alpha=0.3)
    return figure


def moving_average(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value with as many neighbours before as after it, up to ``reach`` of each.

    Towards the ends there are fewer, so that a steep beginning stays steep. Values that are not
    finite do not count; NaN where no other is near.
    """
    averages = []
    for i in range(len(values)):
        within = min(reach, i, len(values) - 1 - i)
        near = [value for value in values[i - within : i + within + 1] if math.isfinite(value)]
        averages.append(sum(near) / len(near) if near else math.nan)
    return averages


def _curve(
    axes: Any, epochs: Sequence[int], values: Sequence[float], color: str, label: str
) -> Any:
    """One quantity as measured, and its moving average once the measured line is a thicket."""
    known = [math.isfinite(value) for value in values]
    few, many = len(values) <= _MARKED_UP_TO, len(values) >= _AVERAGED_FROM
    # a point without neighbours makes no line
    marked = [
        i
        for i in range(len(known))
        if few or not any(known[max(0, i - 1) : i] + known[i + 1 : i + 2])
    ]
    (line,) = axes.plot(
        epochs,
        [value if math.isfinite(value) else math.nan for value in values],
        color=f"tab:{color}",
        alpha=0.4 if many else 1.0,
        label=label,
        linewidth=1.2,
        marker="o",
        markersize=3.5,
        markevery=marked,
    )
    if many:
        reach = len(values) // _AVERAGED_FROM
        axes.plot(epochs, moving_average(values, reach), color=f"dark{color}", linewidth=1.0)
    return line


def _dice(rows: Sequence[EpochRow]) -> list[float]:
    return [math.nan if row.pseudo_dice is None else row.pseudo_dice for row in rows]


def _usual_most(values: Sequence[float]) -> float:
    """The largest value, unless a few are far off: one epoch on a busy machine hides the others."""
    ordered = sorted(values)
    usual = 3 * ordered[len(ordered) // 2]
    return min(ordered[-1], usual) or 1.0
