"""What a training run tells while it goes on: a log line, ``progress.csv`` and ``progress.png``."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg.volume import replacing


@dataclass(frozen=True, slots=True)
class EpochRow:
    """One line of ``progress.csv``.

    Attributes:
        epoch: From 1.
        train_loss, validation_loss: Means over the epoch's batches.
        pseudo_dice: Dice of the validation patches taken as one volume, averaged over classes; None
            when neither they nor the prediction had any foreground.
        lr: Learning rate of the epoch.
        seconds: Wall time, validation included.
        data_wait_s: Of which spent waiting for batches.
    """

    epoch: int
    train_loss: float
    validation_loss: float
    pseudo_dice: float | None
    lr: float
    seconds: float
    data_wait_s: float


def describe(row: EpochRow, epochs: int, eta_s: float) -> str:
    """The epoch in one line."""
    dice = "  -  " if row.pseudo_dice is None else f"{row.pseudo_dice:.3f}"
    return (
        f"epoch {row.epoch}/{epochs}  train {row.train_loss:+.4f}  "
        f"validation {row.validation_loss:+.4f}  "
        f"dice {dice}  lr {row.lr:.2e}  {row.seconds:.1f} s (data wait {row.data_wait_s:.1f} s)  "
        f"ETA {clock(eta_s)}"
    )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = math.ceil(max(0.0, seconds))
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def write_csv(rows: Sequence[EpochRow], path: Path) -> None:
    """Write all epochs so far; the file is replaced as a whole."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(EpochRow))
        for row in rows:
            writer.writerow("" if v is None else f"{v:.7g}" for v in dataclasses.astuple(row))


def draw(rows: Sequence[EpochRow], path: Path, *, title: str) -> None:
    """Draw losses and Dice over epochs as the paper's Fig. 2 does; the file is replaced whole."""
    from matplotlib.figure import Figure  # a second to import, and only training needs it

    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    losses = figure.add_subplot()
    epochs = [row.epoch for row in rows]
    losses.plot(epochs, [row.train_loss for row in rows], color="tab:blue", label="training loss")
    losses.plot(
        epochs, [row.validation_loss for row in rows], color="tab:red", label="validation loss"
    )
    losses.set(xlabel="epoch", ylabel="loss", title=title)
    losses.grid(alpha=0.3)
    scores = losses.twinx()
    dice = [math.nan if row.pseudo_dice is None else row.pseudo_dice for row in rows]
    scores.plot(epochs, dice, color="tab:green", label="Dice of validation patches")
    scores.set_ylabel("Dice")
    scores.set_ylim(0, 1)
    lines = [*losses.get_lines(), *scores.get_lines()]
    losses.legend(lines, [str(line.get_label()) for line in lines], loc="center right")
    with replacing(path, suffix=".png") as temporary:
        figure.savefig(temporary)
