"""Train one fold of one configuration: epoch after epoch, until the schedule ends it.

The run's folder holds everything: ``config.json``, ``checkpoint_latest.pt`` every few minutes and
at the end, ``checkpoint_best.pt``, ``progress.csv``, ``progress.png``. A run that was cut off is
resumed from its latest checkpoint; on the CPU, with as many threads, it ends bit-equal to one that
was not. Started by ``torchrun``, one fold trains on several GPUs, each with its share of every
batch.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ichseg import files
from ichseg.engine import torch_device
from ichseg.errors import TrainingError
from ichseg.model import strict_json
from ichseg.wording import times
from training.batches.sampling import BatchKey
from training.batches.stream import BatchStream, open_batches
from training.data.workspace import BEST_CHECKPOINT, CONFIG_FILE, LATEST_CHECKPOINT
from training.fit import schedule
from training.fit.checkpoint import LOWEST_SCALE, diverged, reason_to_end, resume
from training.fit.compiling import forward_of
from training.fit.configuration import TrainingConfig
from training.fit.fold_run import FoldRun
from training.fit.history import EpochRow
from training.fit.pretrained import Pretrained, begin_with
from training.fit.process_group import GradientSums
from training.fit.progress import Moment, Watch
from training.fit.saver import Saver
from training.fit.step import (
    Reading,
    TrainingState,
    begin,
    determinism,
    memory_advice,
    pseudo_dice,
    train_step,
    validation_step,
)

BEST_MOMENTUM = 0.9  # of the pseudo-Dice average that picks the best checkpoint

Interrupted = Callable[[], bool]  # whether the training is to end after the step in hand

_log = logging.getLogger(__name__)


def train_fold(
    run: FoldRun,
    *,
    restart: bool = False,
    pretrained: Callable[[], Pretrained] | None = None,
    interrupted: Interrupted = lambda: False,
) -> bool:
    """Train one fold to its end, or until it is interrupted.

    Args:
        run: The fold, with its cases preprocessed.
        restart: Begin anew although there is a checkpoint; it is removed before the first step.
        pretrained: Reads the weights to begin with; not called where there is a checkpoint to go on
            from.
        interrupted: Asked at each step whether to stop.

    Returns:
        Whether training has reached its end; False when it was interrupted, with a checkpoint of
        the last step.

    Raises:
        TrainingError: The loss is not finite, memory ran out, or the checkpoint is of other plans.
        IchsegError: Something that earlier commands make is missing or damaged.
    """
    if run.config.threads:
        torch.set_num_threads(run.config.threads)
    with determinism(run), memory_advice(run):
        state = _state_of(run, None if restart else run.folder / LATEST_CHECKPOINT, pretrained)
        reason = _train(run, state, interrupted)
        run.group.all_done(done=True)  # one writes the checkpoint, and all of them read it next
    if reason is not None:
        _log.info("training has ended: %s", reason)
    return reason is not None


def batch_keys(config: TrainingConfig, epoch: int, step: int) -> Iterator[BatchKey]:
    """All batches from ``step`` of ``epoch`` on: an epoch's training, its validation, the next."""
    for later in itertools.count(epoch):
        for number in range(step if later == epoch else 0, config.batches_per_epoch):
            yield BatchKey(later, number)
        yield from _validation_keys(config, later)


def _state_of(
    run: FoldRun, latest: Path | None, pretrained: Callable[[], Pretrained] | None
) -> TrainingState:
    """The state to begin with: from the latest checkpoint, from other weights, or from nothing."""
    state = begin(run)
    if latest is not None and latest.exists():
        resume(run, state)
    elif pretrained is not None:
        begin_with(state.network, pretrained(), run.configuration.name)
    state.forward = forward_of(run, state.network)
    if run.group.count > 1:  # after its trial, which has gradients that no step has
        state.sums = GradientSums(state.network.parameters())
    if run.group.leads:
        files.remove_unfinished(run.folder)  # of a session that was killed
        with files.replacing(run.folder / CONFIG_FILE) as temporary:
            temporary.write_text(strict_json.dumps(run.config), encoding="utf-8")
            if latest is None:  # what was trained so far is not of these settings
                for name in (BEST_CHECKPOINT, LATEST_CHECKPOINT):
                    (run.folder / name).unlink(missing_ok=True)
    return state


def _train(run: FoldRun, state: TrainingState, interrupted: Interrupted) -> str | None:
    """Train epoch after epoch; why training has ended, or None when it was interrupted."""
    reason = reason_to_end(run, state)
    if reason is not None:
        with Saver(run) as saver:
            saver.save(state)  # the length may have been lowered since
        return reason
    _log.info("training %s", _describe(run, state))
    keys = batch_keys(run.config, state.schedule.epoch, len(state.losses))
    stream = open_batches(run.spec, keys, run.config.stream, run.device, run.layout)
    with stream, Saver(run) as saver, _watch(run, state) as watch:
        while reason is None:
            try:
                whole = _train_batches(
                    run, state, stream, interrupted, watch
                ) and _validate_batches(run, state, stream, interrupted, watch)
            except BrokenProcessPool as error:
                if not interrupted():  # a signal to all processes at once ends the workers, too
                    raise TrainingError(
                        "a worker process was killed, perhaps for want of memory; try fewer "
                        "--workers"
                    ) from error
                whole = False
            if not whole:
                saver.save(state)
                return None
            began = time.perf_counter()
            reason = reason_to_end(run, state)
            if watch is not None:
                watch.epoch(state.history, state.elapsed_s, last=reason is not None)
            saver.epoch(state, last=reason is not None)
            state.elapsed_s += time.perf_counter() - began
    return reason


def _train_batches(
    run: FoldRun,
    state: TrainingState,
    stream: BatchStream,
    interrupted: Interrupted,
    watch: Watch | None,
) -> bool:
    """Train on what is left of this epoch or of the time; False if interrupted.

    An epoch has one step at least.

    On a GPU the loss of a step is read while the next one is computed.
    """
    config = run.config
    at_most = _steps_ahead(run.device)
    under_way: deque[Reading] = deque()

    def read(left: int) -> None:
        while len(under_way) > left:
            loss = under_way.popleft().read()
            if not math.isfinite(loss) and not _is_left_out(state):
                step = f"epoch {state.schedule.epoch + 1}, step {len(state.losses) + 1}"
                raise diverged(run, f"a gradient or the loss is {loss} in {step}")
            state.losses.append(loss)
            if watch is not None:
                watch.step(_moment(state, len(state.losses), config.batches_per_epoch, loss))

    for group in state.optimiser.param_groups:
        group["lr"] = state.schedule.learning_rate
    stopped = False
    while len(state.losses) + len(under_way) < config.batches_per_epoch:
        stopped, late = run.group.any(interrupted(), _is_over(config, state))
        late = late and bool(state.losses or under_way)  # without a step an epoch has no loss
        if late and not stopped:  # what is left of the epoch is dropped
            stream.restart(batch_keys(config, state.schedule.epoch, config.batches_per_epoch))
        if stopped or late:
            break
        with _timed(state, stream):
            under_way.append(Reading(train_step(run, state, next(stream))))
            read(at_most)
    with _timed(state, stream):
        read(0)
    if stopped:
        return False
    if state.losses and not any(map(math.isfinite, state.losses)):
        raise diverged(run, f"no loss of epoch {state.schedule.epoch + 1} is finite")
    return True


def _steps_ahead(device: torch.device) -> int:
    """How many steps a device is given before the loss of one is read."""
    return 1 if device.type == "cuda" else 0


def _validate_batches(
    run: FoldRun,
    state: TrainingState,
    stream: BatchStream,
    interrupted: Interrupted,
    watch: Watch | None,
) -> bool:
    """Validate on patches, which ends the epoch; False when interrupted."""
    losses: list[float] = []
    counts = torch.zeros(len(run.plans.foreground), 2, dtype=torch.int64, device=run.device)
    state.network.eval()
    steps = run.config.validation_batches
    while len(losses) < steps:
        if any(run.group.any(interrupted())):
            return False
        with _timed(state, stream):
            found, hits = validation_step(run, state, next(stream))
            loss = found.item()
        losses.append(loss)
        counts += hits
        if watch is not None:
            watch.step(_moment(state, len(losses), steps, loss, validating=True))
    if not math.isfinite(sum(losses)):  # it would stay in the schedule's average for ever
        what = f"the validation loss is {np.mean(losses)} after epoch {state.schedule.epoch + 1}"
        raise diverged(run, what)
    state.elapsed_s = run.group.of_leader(state.elapsed_s)  # all take the same schedule
    _end_epoch(run.config, state, _row_of(state, losses, counts))
    return True


def _row_of(state: TrainingState, validation_losses: list[float], counts: Tensor) -> EpochRow:
    """What the epoch in hand has come to; counts are sums of what ``validation_step`` gives."""
    class_dice = pseudo_dice(counts)
    known = [dice for dice in class_dice if dice is not None]
    return EpochRow(
        epoch=state.schedule.epoch + 1,
        train_loss=_mean_of_finite(state.losses),
        validation_loss=float(np.mean(validation_losses)),
        pseudo_dice=sum(known) / len(known) if known else None,
        lr=state.schedule.learning_rate,
        seconds=state.seconds,
        data_wait_s=state.data_wait_s,
        class_dice=class_dice,
    )


def _mean_of_finite(losses: list[float]) -> float:
    """Mean without the losses of steps that were left out; NaN if there is no other."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return float(np.mean(finite)) if finite else math.nan


def _end_epoch(config: TrainingConfig, state: TrainingState, row: EpochRow) -> None:
    """Move the schedule and the Dice average on by this epoch, and begin the next."""
    state.schedule = schedule.advance(
        config.rules,
        state.schedule,
        train_loss=row.train_loss,
        validation_loss=row.validation_loss,
        elapsed_s=state.elapsed_s,
    )
    if row.pseudo_dice is not None:
        old, new = state.average_dice, row.pseudo_dice
        state.average_dice = new if old is None else BEST_MOMENTUM * old + (1 - BEST_MOMENTUM) * new
        state.best_dice = max(state.average_dice, state.best_dice or 0.0)
    state.history.append(row)
    state.losses, state.seconds, state.data_wait_s = [], 0.0, 0.0


def _is_left_out(state: TrainingState) -> bool:
    """Whether a step whose loss is not finite was left out, as fp16 overflows now and then."""
    return state.scaler.is_enabled() and state.scaler.get_scale() >= LOWEST_SCALE


def _validation_keys(config: TrainingConfig, epoch: int) -> Iterator[BatchKey]:
    return (BatchKey(epoch, number, validation=True) for number in range(config.validation_batches))


@contextlib.contextmanager
def _timed(state: TrainingState, stream: BatchStream) -> Iterator[None]:
    """Count the time of the block, and what of it was spent waiting for a batch."""
    began, waited = time.perf_counter(), stream.waited_s
    yield
    seconds = time.perf_counter() - began
    state.elapsed_s += seconds
    state.seconds += seconds
    state.data_wait_s += stream.waited_s - waited


def _is_over(config: TrainingConfig, state: TrainingState) -> bool:
    """Whether the training is to end without further steps, such as when its time is up."""
    return schedule.end_reason(config.rules, state.schedule, state.elapsed_s) is not None


@contextlib.contextmanager
def _watch(run: FoldRun, state: TrainingState) -> Iterator[Watch | None]:
    """What shows the training; None where another process does."""
    if not run.group.leads:
        yield None
        return
    with Watch(
        run.folder,
        title=f"{run.configuration.name}, fold {run.fold}",
        config=run.config,
        device=run.device,
        labels=[region.name for region in run.plans.foreground],
        history=state.history,
    ) as watch:
        yield watch


def _moment(
    state: TrainingState, step: int, steps: int, loss: float, *, validating: bool = False
) -> Moment:
    return Moment(
        epoch=state.schedule.epoch + 1,
        step=step,
        steps=steps,
        loss=loss,
        lr=state.schedule.learning_rate,
        seconds=state.seconds,
        data_wait_s=state.data_wait_s,
        elapsed_s=state.elapsed_s,
        validating=validating,
    )


def _describe(run: FoldRun, state: TrainingState) -> str:
    """What is trained, where and how, in one line."""
    c = run.configuration
    count = sum(p.numel() for p in state.network.parameters())
    where = torch_device.describe(run.device)
    return (
        f"{c.name} in {run.folder}: {len(run.spec.train)} cases, "
        f"{len(run.spec.validation)} to validate; "
        f"patch {times(c.patch)}, batch {c.batch}, {count / 1e6:.2f} M parameters, "
        f"recipe {run.config.recipe}, {run.precision} on {where}"
        + (f", {run.group.count} processes" if run.group.count > 1 else "")
    )
