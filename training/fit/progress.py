"""What a training run shows while it goes on, and what it leaves behind after each epoch.

At a terminal two live lines follow the steps; elsewhere there is one plain line an epoch. Each
epoch updates ``progress.csv``, from time to time ``progress.png``, and with ``--tensorboard`` or
``--mlflow`` the boards of those names.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from ichseg.errors import TrainingError
from ichseg.files import make_folder
from ichseg.model import strict_json
from ichseg.wording import clock
from training.batches.stream import choose_engine
from training.data.workspace import PROGRESS_PICTURE, PROGRESS_TABLE
from training.fit.configuration import TrainingConfig
from training.fit.history import (
    EpochRow,
    describe,
    left_s,
    number,
    waiting,
    write_csv,
    write_picture,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

WAIT_SHARE = 0.10  # of an epoch; whoever waits longer for batches is told so
_WAIT_NEWS = 0.10  # by how much the share has grown before it is told again
_DRAW_EVERY_S = 60.0
_REFRESH_EVERY_S = 0.2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a training stands after a step.

    Attributes:
        epoch: Number of the epoch, from 1.
        step: Steps of this epoch done; of its validation when ``validating``.
        steps: Steps of this epoch, or of its validation, in all.
        loss: Loss of the step.
        lr: Learning rate.
        seconds: Seconds spent in this epoch so far.
        data_wait_s: Seconds of them spent waiting for batches.
        elapsed_s: Seconds spent in the training so far.
        validating: Whether these are validation steps.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    lr: float
    seconds: float
    data_wait_s: float
    elapsed_s: float
    validating: bool = False


class Watch:
    """Tells how a fold's training goes; entered while its epochs go on."""

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
        """Prepare to tell.

        Args:
            folder: The run's folder.
            title: What is trained, such as ``3d_fullres, fold 0``.
            config: What the user chose.
            device: Where the network trains.
            labels: Names of the foreground classes.
            history: Epochs of earlier sessions.
            stream: Where the live lines go; stderr by default.

        Raises:
            TrainingError: A board is asked for and not installed.
        """
        self._folder, self._title, self._config = folder, title, config
        self._labels, self._history = labels, tuple(history)
        self._stream = sys.stderr if stream is None else stream
        self._live: Live | None = None
        self._shown, self._drawn = -math.inf, -math.inf
        self._failed: set[Path | str] = set()
        self._waits = _Waits(advise(config, device))
        self._end = contextlib.ExitStack()
        self._boards: list[Any] = []
        require_boards(config)
        if config.tensorboard:
            self._boards.append(open_tensorboard(folder / "tensorboard"))
        if config.mlflow:
            self._boards.append(open_mlflow(folder / "mlflow", title, config))
        for board in self._boards:
            self._end.callback(self._close, board)
            with self._optional(type(board).__name__):
                for row in history:
                    write_board(board, row, labels)

    def __enter__(self) -> Watch:
        """Show the live lines, if the stream is a terminal."""
        self._live = self._end.enter_context(live_lines(self._stream))
        return self

    def __exit__(self, *_: object) -> None:
        """Take the live lines away."""
        self._end.close()

    def step(self, now: Moment) -> None:
        """Show a step at a terminal, a few times a second at most."""
        self._waits.begin(now.data_wait_s)
        due = time.monotonic() - self._shown >= _REFRESH_EVERY_S
        if self._live is None or not (due or now.step == now.steps):
            return
        left = self._left_s(now.elapsed_s, self._epoch_s(now), now.seconds)
        dice = self._history[-1].pseudo_dice if self._history else None
        title = f"{self._title}  epoch {now.epoch}/{self._config.epochs}"
        self._live.update(two_lines(title, now, dice, left), refresh=True)
        self._shown = time.monotonic()

    def epoch(self, history: Sequence[EpochRow], elapsed_s: float, *, last: bool) -> None:
        """Tell of the epoch that has just ended and bring the files up to date."""
        self._history, row = tuple(history), history[-1]
        with self._optional(self._folder / PROGRESS_TABLE):
            write_csv(history, self._folder / PROGRESS_TABLE, self._labels)
        if last or time.monotonic() - self._drawn > _DRAW_EVERY_S:
            with self._optional(self._folder / PROGRESS_PICTURE):
                write_picture(history, self._folder / PROGRESS_PICTURE, title=self._title)
            self._drawn = time.monotonic()
        for board in self._boards:
            with self._optional(type(board).__name__):
                write_board(board, row, self._labels)
        _log.info(describe(row, self._config.epochs, self._left_s(elapsed_s)))
        self._waits.judge(row)

    def _close(self, board: Any) -> None:
        with self._optional(type(board).__name__):
            board.close()

    @contextlib.contextmanager
    def _optional(self, what: Path | str) -> Iterator[None]:
        """Turn the failure of what no training depends on into a warning, which is given once."""
        try:
            yield
        except Exception as error:
            if what not in self._failed:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                _log.warning(
                    "warning: %s is not brought up to date (%s); the training goes on",
                    what,
                    reason,
                )
            self._failed.add(what)

    def _left_s(self, elapsed_s: float, epoch_s: float = 0.0, spent_s: float = 0.0) -> float:
        minutes = self._config.minutes
        return left_s(
            self._history,
            epochs=self._config.epochs,
            epoch_s=epoch_s,
            spent_s=spent_s,
            budget_s=None if minutes is None else 60 * minutes - elapsed_s,
        )

    def _epoch_s(self, now: Moment) -> float:
        """Seconds that a whole epoch takes, going by this one's first steps."""
        config = self._config
        done = now.step + (config.batches_per_epoch if now.validating else 0)
        return now.seconds / max(1, done) * (config.batches_per_epoch + config.validation_batches)


class _Waits:
    """Warns of waiting for batches: once, and again when it has become much worse."""

    def __init__(self, advice: str) -> None:
        self._advice, self._told = advice, WAIT_SHARE - _WAIT_NEWS
        self._startup_s: float | None = None  # what the first batch of this session took

    def begin(self, data_wait_s: float) -> None:
        if self._startup_s is None:
            self._startup_s = data_wait_s

    def judge(self, row: EpochRow) -> None:
        share = waiting(row, startup_s=self._startup_s or 0.0)
        self._startup_s = 0.0
        if share > self._told + _WAIT_NEWS:
            self._told = share
            _log.warning(
                "warning: %.0f %% of epoch %d went into waiting for batches; %s",
                100 * share,
                row.epoch,
                self._advice,
            )


def advise(config: TrainingConfig, device: torch.device) -> str:
    """What to do about waiting for batches."""
    if choose_engine(config.augmentation_engine, device) == "device":
        return f"try --gpu-cache yes, or --workers above {config.workers}"
    ahead = f"--workers above {config.workers}"
    if config.workers:
        ahead += f" or --prefetch above {config.prefetch}"
    return f"try {'--augmentation-engine device, or ' if device.type == 'cuda' else ''}{ahead}"


@contextlib.contextmanager
def live_lines(stream: TextIO) -> Iterator[Live | None]:
    """Lines at the bottom of a terminal, rewritten in place, with log lines going above them.

    Gives None where the stream is no terminal that can move its cursor.
    """
    if not stream.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield None
        return
    from rich.console import Console  # a tenth of a second, and only a terminal needs it
    from rich.live import Live

    console = Console(file=stream, highlight=False)
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is stream
    ]
    with Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False) as lines:
        for handler in handlers:
            handler.setStream(_Above(console))
        try:
            yield lines
        finally:
            for handler in handlers:
                handler.setStream(stream)


class _Above:
    """A stream whose lines go above those that are shown, unbroken however long they are."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> None:
        self._console.print(text, end="", markup=False, soft_wrap=True)

    def flush(self) -> None:
        """Each line is written at once."""


def two_lines(title: str, now: Moment, dice: float | None, left_s: float) -> RenderableType:
    """The live lines: how far the epoch is; loss, last epoch's Dice, learning rate, wait, ETA."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    above = Table.grid(padding=(0, 1))
    above.add_row(
        Text(title, no_wrap=True),
        ProgressBar(total=now.steps, completed=now.step, width=20, complete_style="green"),
        Text(f"{'validating' if now.validating else 'step'} {now.step}/{now.steps}"),
    )
    wait = 100 * now.data_wait_s / max(now.seconds, 1e-9)
    below = (
        f"loss {now.loss:+.4f}  dice {number(dice)}  lr {now.lr:.2e}  data wait {wait:.0f} %  "
        f"ETA {clock(left_s)}"
    )
    return Group(above, Text(below, no_wrap=True, overflow="ellipsis"))


def require_boards(config: TrainingConfig) -> None:
    """Refuse when a board that is asked for is not installed.

    Raises:
        TrainingError: It is not installed.
    """
    for name, wanted in (("tensorboard", config.tensorboard), ("mlflow", config.mlflow)):
        if wanted and importlib.util.find_spec(name) is None:
            raise TrainingError(
                f"--{name}: the package {name} is not installed; `pip install {name}`, or leave "
                "the flag out: progress.csv and progress.png hold the same"
            )


def open_tensorboard(folder: Path) -> Any:
    """A writer into this folder; what earlier sessions wrote there counts no longer."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=0)


def open_mlflow(folder: Path, title: str, config: TrainingConfig) -> MlflowBoard:
    """A new run of MLflow's experiment ``ichseg`` with the settings, where MLflow is told to track.

    That is ``MLFLOW_TRACKING_URI`` or what else MLflow goes by; if nothing says so, ``mlflow.db``
    in the folder: MLflow 3 refuses plain files.

    Raises:
        TrainingError: MLflow cannot be written to.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    where = files = None
    if not mlflow.is_tracking_uri_set():
        if importlib.util.find_spec("sqlalchemy") is None:
            raise TrainingError(
                "--mlflow: this MLflow has no database; `pip install mlflow` in place of "
                "mlflow-skinny, or set MLFLOW_TRACKING_URI to a server"
            )
        make_folder(folder)
        where, files = f"sqlite:///{folder.absolute()}/mlflow.db", folder.absolute().as_uri()
    try:
        client = mlflow.MlflowClient(where)
        experiment = client.get_experiment_by_name("ichseg")
        number = experiment and experiment.experiment_id
        number = number or client.create_experiment("ichseg", files)
        board = MlflowBoard(client, client.create_run(number, run_name=title).info.run_id)
        for name, value in strict_json.to_json(config).items():
            client.log_param(board.run, name, value)
    except MlflowException as error:
        raise TrainingError(f"--mlflow: {str(error).splitlines()[0]}") from error
    return board


@dataclass(slots=True)
class MlflowBoard:
    """A run of MLflow, written like TensorBoard's.

    What MLflow cannot take, as when its server has gone, ends the writing and not the training.

    Attributes:
        client: MLflow's client.
        run: The run's id.
    """

    client: Any
    run: str
    _lost: bool = False

    def add_scalar(self, name: str, value: float, epoch: int) -> None:
        """Write one number of an epoch; signs that MLflow refuses in names become ``_``."""
        from mlflow.exceptions import MlflowException

        if self._lost:
            return
        try:
            self.client.log_metric(self.run, re.sub(r"[^\w\-. /]", "_", name), value, step=epoch)
        except MlflowException as error:
            self._lost = True
            _log.warning("MLflow gets no more of this training (%s)", str(error).splitlines()[0])

    def flush(self) -> None:
        """Nothing is left to write."""

    def close(self) -> None:
        """End the run, unless it has been lost."""
        if not self._lost:
            self.client.set_terminated(self.run)


def write_board(board: Any, row: EpochRow, labels: Sequence[str]) -> None:
    """Write the numbers of one epoch."""
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
