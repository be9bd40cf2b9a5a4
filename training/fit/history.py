"""What the epochs of a run have come to: a line of the log each, and ``progress.csv``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg.files import replacing
from ichseg.wording import clock

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
