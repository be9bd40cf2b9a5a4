"""What a training run shows while it goes on, and what it leaves behind after each epoch.

At a terminal two live lines follow the steps; elsewhere there is one plain line an epoch. Each
epoch updates ``progress.csv``, from time to time ``progress.png``, and with ``--tensorboard``
TensorBoard.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from ichseg.errors import TrainingError
from ichseg.wording import clock
from training.batches.stream import choose_engine
from training.data.workspace import PROGRESS_PICTURE, PROGRESS_TABLE
from training.fit import curves, log
from training.fit.configuration import TrainingConfig
from training.fit.log import EpochRow

WAIT_SHARE = 0.10  # of an epoch; whoever waits longer for batches is told so
_WAIT_NEWS = 0.10  # by how much the share has grown before it is told again
_DRAW_EVERY_S = 60.0
_REFRESH_EVERY_S = 0.2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a training stands after a step.

    Attributes:
        epoch: From 1.
        step, steps: Steps of this epoch done, and in all; of its validation when ``validating``.
        loss: Of the step, None if it is not known yet.
        lr: Learning rate.
        seconds, data_wait_s: Spent in this epoch so far.
        elapsed_s: Spent in all.
        validating: Whether these are validation steps.
    """

    epoch: int
    step: int
    steps: int
    loss: float | None
    lr: float
    seconds: float
    data_wait_s: float
    elapsed_s: float
    validating: bool = False


class Watch:
    """Tells how a fold's training goes; entered while its epochs go on.

    Args:
        folder: Of the run.
        title: Such as ``3d_fullres, fold 0``.
        config: What the user chose.
        device: Where the network trains.
        labels: Names of the foreground classes.
        history: Epochs of earlier sessions.
        stream: Where the live lines go; stderr by default.

    Raises:
        TrainingError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        title: str,
        config: TrainingConfig,
        device: torch.device,
        labels: Sequence[str],
        history: Sequence[EpochRow] = (),
        stream: TextIO | None = None,
    ) -> None:
        self._folder, self._title, self._config = folder, title, config
        self._device, self._labels, self._history = device, labels, tuple(history)
        self._lines = LiveLines(sys.stderr if stream is None else stream)
        self._startup_s: float | None = None  # what the first batch of this session took
        self._wait_told = WAIT_SHARE - _WAIT_NEWS
        self._drawn: float | None = None
        self._board = open_tensorboard(folder / "tensorboard") if config.tensorboard else None
        for row in history if self._board is not None else ():
            write_tensorboard(self._board, row, labels)

    def __enter__(self) -> Watch:
        self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.stop()
        if self._board is not None:
            self._board.close()

    def step(self, now: Moment) -> None:
        """Show a step at a terminal, a few times a second at most."""
        if self._startup_s is None:
            self._startup_s = now.data_wait_s
        if self._lines.due() or now.step == now.steps:
            left = self._left_s(now.elapsed_s, self._epoch_s(now), now.seconds)
            dice = self._history[-1].pseudo_dice if self._history else None
            self._lines.show(now, self._title, self._config.epochs, dice, left)

    def epoch(self, history: Sequence[EpochRow], elapsed_s: float, *, last: bool) -> None:
        """Tell of the epoch that has just ended and bring the files up to date."""
        self._history, row = tuple(history), history[-1]
        log.write_csv(history, self._folder / PROGRESS_TABLE, self._labels)
        if last or self._drawn is None or time.monotonic() - self._drawn > _DRAW_EVERY_S:
            curves.draw(history, self._folder / PROGRESS_PICTURE, title=self._title)
            self._drawn = time.monotonic()
        if self._board is not None:
            write_tensorboard(self._board, row, self._labels)
        _log.info(log.describe(row, self._config.epochs, self._left_s(elapsed_s)))
        self._warn_of_waiting(row)

    def _left_s(self, elapsed_s: float, epoch_s: float = 0.0, spent_s: float = 0.0) -> float:
        minutes = self._config.minutes
        return log.left_s(
            self._history,
            epochs=self._config.epochs,
            epoch_s=epoch_s,
            spent_s=spent_s,
            budget_s=None if minutes is None else 60 * minutes - elapsed_s,
        )

    def _epoch_s(self, now: Moment) -> float:
        """What a whole epoch takes, going by this one's first steps."""
        config = self._config
        done = now.step + (config.batches_per_epoch if now.validating else 0)
        return now.seconds / max(1, done) * (config.batches_per_epoch + config.validation_batches)

    def _warn_of_waiting(self, row: EpochRow) -> None:
        """Once, and again when it has become much worse."""
        share = log.waiting(row, startup_s=self._startup_s or 0.0)
        self._startup_s = 0.0
        if share > self._wait_told + _WAIT_NEWS:
            self._wait_told = share
            _log.warning(
                "warning: %.0f %% of epoch %d went into waiting for batches; %s",
                100 * share,
                row.epoch,
                advise(self._config, self._device),
            )


def advise(config: TrainingConfig, device: torch.device) -> str:
    """What to do about waiting for batches."""
    if choose_engine(config.augmentation_engine, device) == "device":
        return f"try --resident yes, or --workers above {config.workers}"
    ahead = f"--workers above {config.workers}"
    if config.workers:
        ahead += f" or --prefetch above {config.prefetch}"
    return f"try {'--augmentation-engine device, or ' if device.type == 'cuda' else ''}{ahead}"


class LiveLines:
    """Two lines at the bottom of a terminal, rewritten in place; nothing where there is none.

    While they are shown, log lines go above them.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live: Any = None
        self._handlers: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []
        self._shown = 0.0

    def start(self) -> None:
        """Begin, if the stream is a terminal that can move its cursor."""
        if not self._stream.isatty() or os.environ.get("TERM", "dumb") == "dumb":
            return
        from rich.console import Console  # a tenth of a second, and only a terminal needs it
        from rich.live import Live

        console = Console(file=self._stream, highlight=False)
        self._live = Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False
        )
        self._live.start()
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._stream:
                self._handlers.append((handler, handler.stream))
                handler.setStream(_Above(console))

    def stop(self) -> None:
        """Take the lines away."""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers = []
        if self._live is not None:
            self._live.stop()
            self._live = None

    def due(self) -> bool:
        """Whether it is time to show something new."""
        return self._live is not None and time.monotonic() - self._shown >= _REFRESH_EVERY_S

    def show(self, now: Moment, title: str, epochs: int, dice: float | None, left_s: float) -> None:
        """Rewrite the lines."""
        if self._live is None:
            return
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        above = Table.grid(padding=(0, 1))
        above.add_row(
            Text(f"{title}  epoch {now.epoch}/{epochs}", no_wrap=True),
            ProgressBar(total=now.steps, completed=now.step, width=20, complete_style="green"),
            Text(f"{'validating' if now.validating else 'step'} {now.step}/{now.steps}"),
        )
        below = Text(details(now, dice, left_s), no_wrap=True, overflow="ellipsis")
        self._live.update(Group(above, below), refresh=True)
        self._shown = time.monotonic()


class _Above:
    """A stream whose lines go above those that are shown, unbroken however long they are."""

    def __init__(self, console: Any) -> None:
        self._console = console

    def write(self, text: str) -> None:
        self._console.print(text, end="", markup=False, soft_wrap=True)

    def flush(self) -> None:
        """Each line is written at once."""


def details(now: Moment, dice: float | None, left_s: float) -> str:
    """The second live line: loss, the last epoch's Dice, learning rate, pace, data wait, ETA."""
    loss = "   -   " if now.loss is None else f"{now.loss:+.4f}"
    wait = 100 * now.data_wait_s / max(now.seconds, 1e-9)
    return (
        f"loss {loss}  dice {log.number(dice)}  lr {now.lr:.2e}  data wait {wait:.0f} %  "
        f"ETA {clock(left_s)}"
    )


def require_tensorboard() -> None:
    """Refuse when TensorBoard is not installed.

    Raises:
        TrainingError: It is not.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise TrainingError(
            "--tensorboard: the package tensorboard is not installed; `pip install tensorboard`, "
            "or leave the flag out: progress.csv and progress.png hold the same"
        )


def open_tensorboard(folder: Path) -> Any:
    """A writer into this folder; what earlier sessions wrote there counts no longer.

    Raises:
        TrainingError: TensorBoard is not installed.
    """
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=0)


def write_tensorboard(board: Any, row: EpochRow, labels: Sequence[str]) -> None:
    """One epoch's numbers."""
    values = {
        "loss/training": row.train_loss,
        "loss/validation": row.validation_loss,
        "dice/mean": row.pseudo_dice,
        "learning rate": row.lr,
        "seconds/compute": row.compute_s,
        "seconds/data wait": row.data_wait_s,
    }
    if len(row.class_dice) > 1:
        values |= {
            f"dice/{label}": dice for label, dice in zip(labels, row.class_dice, strict=True)
        }
    for name, value in values.items():
        if value is not None:
            board.add_scalar(name, value, row.epoch)
    board.flush()
