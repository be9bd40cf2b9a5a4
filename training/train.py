"""Train one fold of one configuration, and validate it at full volume.

The run's folder holds everything: ``config.json``, ``checkpoint_latest.pt`` after every epoch,
``checkpoint_best.pt``, ``progress.csv``, ``progress.png``, ``validation/``. The same command
resumes a run that was cut off; on the CPU, with as many threads, it ends bit-equal to one that was
not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import logging
import math
import shutil
import signal
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ichseg import engine, plans, schema, volume
from ichseg.errors import PlansError, TrainingError
from ichseg.network import build_network
from training import dataset, log, schedule
from training.augment import AugmentationConfig
from training.config import RECIPES, TrainingConfig, add_flags, config_from
from training.fold import ALL_FOLD, BEST, LATEST, SCHEMA_VERSION, FoldRun, load_checkpoint, open_run
from training.log import EpochRow
from training.losses import dice_cross_entropy
from training.sampling import Batch, BatchKey, BatchStream
from training.schedule import ScheduleState
from training.validate import validate

BEST_MOMENTUM = 0.9  # of the pseudo-Dice average that picks the best checkpoint
_DRAW_EVERY_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class TrainingState:
    """What changes, and what a checkpoint holds.

    Attributes:
        network, optimiser: With their tensors.
        schedule: After the last whole epoch.
        losses: Training losses of the current epoch so far, one for each step.
        seconds, data_wait_s: Spent in the current epoch so far.
        elapsed_s: Spent in all, by all sessions of this run.
        history: One row for each whole epoch.
        average_dice, best_dice: Moving average of the pseudo-Dice, and its best value.
    """

    network: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: ScheduleState
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    data_wait_s: float = 0.0
    elapsed_s: float = 0.0
    history: list[EpochRow] = field(default_factory=list)
    average_dice: float | None = None
    best_dice: float | None = None


def train_fold(
    workspace: Path, configuration: str, fold: str, config: TrainingConfig, *, restart: bool = False
) -> bool:
    """Train one fold to its end, or until a signal; then validate it.

    Args:
        workspace: With plans, splits and preprocessed cases.
        configuration: Such as ``3d_fullres``.
        fold: Index into the splits, or ``all`` to train on every case.
        config: What the user chose.
        restart: Begin anew although there is a checkpoint.

    Returns:
        Whether training has reached its end; False after SIGTERM or Ctrl-C, with a checkpoint of
        the last step.

    Raises:
        TrainingError: The loss is not finite, or the checkpoint is of other plans.
        IchsegError: Something that earlier commands make is missing or damaged.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    run = open_run(workspace, configuration, fold, config)
    state = begin(run)
    if (run.folder / LATEST).exists() and not restart:
        _resume(run, state)
    for leftover in run.folder.glob(".writing-*"):  # of a session that was killed while it wrote
        leftover.unlink()
    _write_json(run.config, run.folder / "config.json")
    with _Signals() as signals:
        reason = _train(run, state, signals)
        if reason is None:
            _log.info("stopped by %s; the same command goes on from here", signals.name)
            return False
        _log.info("training has ended: %s", reason)
        if config.validation and fold != ALL_FOLD:
            return validate(workspace, run, interrupted=lambda: bool(signals.name))
    return True


def begin(run: FoldRun) -> TrainingState:
    """A freshly initialised network and its optimiser; depends on seed and fold only."""
    words = np.random.SeedSequence([run.config.seed, run.spec.fold])
    torch.manual_seed(int(words.generate_state(1)[0]))
    network = build_network(
        run.configuration.architecture, len(run.plans.channels), len(run.plans.labels)
    )
    network = network.to(run.device, memory_format=run.layout)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(
        network.parameters(),
        lr=run.config.learning_rate,
        weight_decay=run.config.weight_decay,
        amsgrad=run.config.amsgrad,
    )
    return TrainingState(network, optimiser, schedule.start(run.config.rules))


def batch_keys(config: TrainingConfig, epoch: int, step: int) -> Iterator[BatchKey]:
    """All batches from ``step`` of ``epoch`` on: an epoch's training, its validation, the next."""
    for later in itertools.count(epoch):
        for number in range(step if later == epoch else 0, config.batches_per_epoch):
            yield BatchKey(later, number)
        yield from _validation_keys(config, later)


def train_step(run: FoldRun, state: TrainingState, batch: Batch) -> float:
    """One update of the weights; the loss before it."""
    state.network.train()
    data, target = _to_device(run, batch)
    with _autocast(run):
        logits = state.network(data)
    loss = dice_cross_entropy(logits, target, batch_dice=run.configuration.batch_dice)
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    value = loss.item()
    if math.isfinite(value):  # a loss that is not must not reach the weights
        state.optimiser.step()
    return value


def checkpoint_of(run: FoldRun, state: TrainingState) -> dict[str, Any]:
    """Tensors and plain values, so that it loads with ``weights_only=True``."""
    reason = schedule.end_reason(run.config.rules, state.schedule, state.elapsed_s)
    return {
        "schema_version": SCHEMA_VERSION,
        "configuration": schema.dumps(run.configuration),
        "network": state.network.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "schedule": dataclasses.asdict(state.schedule),
        "losses": state.losses,
        "seconds": state.seconds,
        "data_wait_s": state.data_wait_s,
        "elapsed_s": state.elapsed_s,
        "history": [dataclasses.asdict(row) for row in state.history],
        "average_dice": state.average_dice,
        "best_dice": state.best_dice,
        "finished": reason,
    }


def _train(run: FoldRun, state: TrainingState, signals: _Signals) -> str | None:
    """Epoch after epoch; why training has ended, or None when a signal came."""
    config, rules = run.config, run.config.rules
    reason = schedule.end_reason(rules, state.schedule, state.elapsed_s)
    if reason is not None:
        _save(run, state, LATEST)  # the length may have been lowered since
        return reason
    _log.info("training %s", _describe(run, state))
    drawn = -math.inf
    keys = batch_keys(config, state.schedule.epoch, len(state.losses))
    with BatchStream(run.spec, keys, workers=config.workers, prefetch=config.prefetch) as stream:
        while reason is None:
            try:
                whole = _train_batches(run, state, stream, signals)
                row = _finish_epoch(run, state, stream, signals) if whole else None
            except BrokenProcessPool as error:
                if not signals.name:  # a signal to the whole process group ends the workers, too
                    raise TrainingError(
                        "a worker process was killed, perhaps for want of memory; try fewer "
                        "--workers"
                    ) from error
                row = None
            if row is None:
                _save(run, state, LATEST)
                return None
            began = time.perf_counter()
            reason = schedule.end_reason(rules, state.schedule, state.elapsed_s)
            _save(run, state, LATEST)
            if state.best_dice is not None and state.best_dice == state.average_dice:
                _copy(run.folder / LATEST, run.folder / BEST)
            log.write_csv(state.history, run.folder / "progress.csv")
            if reason is not None or time.monotonic() - drawn > _DRAW_EVERY_S:
                title = f"{run.configuration.name}, fold {run.folder.name.removeprefix('fold_')}"
                log.draw(state.history, run.folder / "progress.png", title=title)
                drawn = time.monotonic()
            state.elapsed_s += time.perf_counter() - began
            _log.info(log.describe(row, config.epochs, _eta_s(config, state)))
    return reason


def _train_batches(
    run: FoldRun, state: TrainingState, stream: BatchStream, signals: _Signals
) -> bool:
    """The training batches left in this epoch, or in the time; False when a signal came."""
    config = run.config
    for group in state.optimiser.param_groups:
        group["lr"] = state.schedule.learning_rate
    while len(state.losses) < config.batches_per_epoch and not _time_is_up(config, state):
        if signals.name:
            return False
        began = time.perf_counter()
        batch = next(stream)
        waited = time.perf_counter() - began
        loss = train_step(run, state, batch)
        if not math.isfinite(loss):
            raise TrainingError(
                f"{run.folder}: the loss is {loss} in epoch {state.schedule.epoch + 1}, step "
                f"{len(state.losses) + 1}; go on from {LATEST} with a --learning-rate below "
                f"{state.schedule.learning_rate:g} or --precision fp32"
            )
        state.losses.append(loss)
        _spend(state, time.perf_counter() - began, waited)
    if (
        len(state.losses) < config.batches_per_epoch
    ):  # time is up: what is left of the epoch is dropped
        stream.restart(_validation_keys(config, state.schedule.epoch))
    return True


def _finish_epoch(
    run: FoldRun, state: TrainingState, stream: BatchStream, signals: _Signals
) -> EpochRow | None:
    """Validate on patches and move the schedule on; None when a signal came."""
    config = run.config
    losses, counts = [], torch.zeros(len(run.plans.labels) - 1, 2, dtype=torch.int64)
    began = time.perf_counter()
    waited = 0.0
    state.network.eval()
    for _ in range(config.validation_batches):
        if signals.name:
            return None
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        loss, found = _validation_step(run, state, batch)
        losses.append(loss)
        counts += found
    _spend(state, time.perf_counter() - began, waited)
    pseudo_dice = _pseudo_dice(counts)
    row = EpochRow(
        epoch=state.schedule.epoch + 1,
        train_loss=float(np.mean(state.losses)) if state.losses else math.nan,
        validation_loss=float(np.mean(losses)),
        pseudo_dice=pseudo_dice,
        lr=state.schedule.learning_rate,
        seconds=state.seconds,
        data_wait_s=state.data_wait_s,
    )
    state.schedule = schedule.advance(
        config.rules,
        state.schedule,
        train_loss=row.train_loss,
        validation_loss=row.validation_loss,
        elapsed_s=state.elapsed_s,
    )
    if pseudo_dice is not None:
        old = state.average_dice
        state.average_dice = (
            pseudo_dice if old is None else BEST_MOMENTUM * old + (1 - BEST_MOMENTUM) * pseudo_dice
        )
        state.best_dice = max(state.average_dice, state.best_dice or 0.0)
    state.history.append(row)
    state.losses, state.seconds, state.data_wait_s = [], 0.0, 0.0
    return row


@torch.no_grad()
def _validation_step(run: FoldRun, state: TrainingState, batch: Batch) -> tuple[float, Tensor]:
    """Loss, and per foreground class twice the hits and both masks' voxels, ``(K - 1, 2)``."""
    data, target = _to_device(run, batch)
    with _autocast(run):
        logits = state.network(data)
    loss = dice_cross_entropy(logits, target, batch_dice=run.configuration.batch_dice)
    found = logits.argmax(1)
    counts = [
        [
            2 * int(((found == label) & (target == label)).sum()),
            int((found == label).sum() + (target == label).sum()),
        ]
        for label in range(1, logits.shape[1])
    ]
    return loss.item(), torch.tensor(counts, dtype=torch.int64)


def _pseudo_dice(counts: Tensor) -> float | None:
    """Mean Dice of the classes that occur at all."""
    scores = [twice_hits / both for twice_hits, both in counts.tolist() if both]
    return sum(scores) / len(scores) if scores else None


def _to_device(run: FoldRun, batch: Batch) -> tuple[Tensor, Tensor]:
    data = torch.from_numpy(batch.data).to(run.device, memory_format=run.layout, non_blocking=True)
    return data, torch.from_numpy(batch.target).to(run.device, non_blocking=True)


def _autocast(run: FoldRun) -> torch.autocast:
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.precision == "bf16")


def _validation_keys(config: TrainingConfig, epoch: int) -> Iterator[BatchKey]:
    return (BatchKey(epoch, number, validation=True) for number in range(config.validation_batches))


def _spend(state: TrainingState, seconds: float, waited: float) -> None:
    state.elapsed_s += seconds
    state.seconds += seconds
    state.data_wait_s += waited


def _time_is_up(config: TrainingConfig, state: TrainingState) -> bool:
    return config.minutes is not None and state.elapsed_s >= 60 * config.minutes


def _eta_s(config: TrainingConfig, state: TrainingState) -> float:
    recent = [row.seconds for row in state.history[-10:]]
    left = (config.epochs - state.schedule.epoch) * sum(recent) / len(recent)
    return left if config.minutes is None else min(left, 60 * config.minutes - state.elapsed_s)


def _resume(run: FoldRun, state: TrainingState) -> None:
    """Fill the state from the latest checkpoint, and say which settings are no longer the same."""
    raw = load_checkpoint(run.folder / LATEST, run.configuration, run.device)
    state.network.load_state_dict(raw["network"])
    state.optimiser.load_state_dict(raw["optimiser"])
    state.schedule = ScheduleState(**raw["schedule"])
    state.losses = list(raw["losses"])
    state.seconds, state.data_wait_s = raw["seconds"], raw["data_wait_s"]
    state.elapsed_s = raw["elapsed_s"]
    state.history = [EpochRow(**row) for row in raw["history"]]
    state.average_dice, state.best_dice = raw["average_dice"], raw["best_dice"]
    with contextlib.suppress(PlansError):
        before = schema.load(TrainingConfig, run.folder / "config.json")
        for option in dataclasses.fields(TrainingConfig):
            old, new = getattr(before, option.name), getattr(run.config, option.name)
            if old != new:
                _log.warning("going on with %s %s, so far it was %s", option.name, new, old)
    _log.info("going on after epoch %d, step %d", state.schedule.epoch, len(state.losses))


def _save(run: FoldRun, state: TrainingState, name: str) -> None:
    with volume.replacing(run.folder / name, suffix=".pt") as temporary:
        torch.save(checkpoint_of(run, state), temporary)


def _copy(source: Path, path: Path) -> None:
    with volume.replacing(path) as temporary:
        shutil.copyfile(source, temporary)


def _write_json(value: object, path: Path) -> None:
    with volume.replacing(path) as temporary:
        temporary.write_text(schema.dumps(value), encoding="utf-8")


def _describe(run: FoldRun, state: TrainingState) -> str:
    c = run.configuration
    count = sum(p.numel() for p in state.network.parameters())
    return (
        f"{c.name} in {run.folder}: {len(run.spec.train)} cases, "
        f"{len(run.spec.validation)} to validate; "
        f"patch {'x'.join(map(str, c.patch))}, batch {c.batch}, {count / 1e6:.2f} M parameters, "
        f"recipe {run.config.recipe}, {run.config.precision} on {engine.describe(run.device)}"
    )


class _Signals:
    """While entered, the first SIGTERM or Ctrl-C is only noted; a second acts as it always does."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: types.FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._before[signal.Signals(number)])
        _log.info("%s: ending after this step with a checkpoint", self.name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``train`` command: one flag for each field of ``TrainingConfig``."""
    parser.add_argument("configuration", metavar="CONFIGURATION", help="such as 3d_fullres")
    dataset.add_workspace_argument(parser)
    parser.add_argument("--fold", required=True, metavar="K", help=f"0, 1, ... or {ALL_FOLD}")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="where the defaults below come from; default: the plans' recipe",
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin anew although there is a checkpoint"
    )
    settings = parser.add_argument_group("settings", "defaults of the recipe msd2018 in brackets")
    add_flags(settings, TrainingConfig, RECIPES["msd2018"])
    ranges = parser.add_argument_group("augmentation", "probabilities and ranges")
    add_flags(ranges, AugmentationConfig, RECIPES["msd2018"].augmentation)


def main(args: argparse.Namespace) -> int:
    """FoldRun the ``train`` command; 130 when a signal ended it."""
    recipe = args.recipe or plans.load(args.workspace / "plans.json").recipe
    config = config_from(args, recipe)
    done = train_fold(args.workspace, args.configuration, args.fold, config, restart=args.restart)
    return 0 if done else 130
