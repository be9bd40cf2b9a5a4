"""Train one fold of one configuration, and validate it at full volume.

The run's folder holds everything: ``config.json``, ``checkpoint_latest.pt`` after every epoch,
``checkpoint_best.pt``, ``progress.csv``, ``progress.png``, ``validation/``. The same command
resumes a run that was cut off; on the CPU, with as many threads, it ends bit-equal to one that was
not. Started by ``torchrun``, one fold trains on several GPUs, each with its share of every batch.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import logging
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch

from ichseg.engine import torch_engine
from ichseg.errors import TrainingError
from ichseg.files import remove_unfinished, replacing
from ichseg.model import plans, strict_json
from training.batches.sampling import BatchKey
from training.batches.stream import BatchStream, open_batches
from training.crossval.validate import validate
from training.data import dataset
from training.data.workspace import (
    ALL_FOLD,
    BEST_CHECKPOINT,
    CONFIG_FILE,
    LATEST_CHECKPOINT,
    TRAIN_LOG,
    plans_file,
    run_folder,
)
from training.fit import log, schedule
from training.fit.checkpoint import diverged, resume, save
from training.fit.configuration import (
    RECIPES,
    TrainingConfig,
    add_settings,
    config_from,
    flags_from,
)
from training.fit.fold_run import FoldRun, open_run
from training.fit.log import EpochRow
from training.fit.pretrained import load_pretrained
from training.fit.process_group import ALONE, Peers, joined
from training.fit.progress import Moment, Watch
from training.fit.signals import Signals
from training.fit.step import (
    TrainingState,
    begin,
    compile_forward,
    determinism,
    memory_advice,
    pseudo_dice,
    train_step,
    validation_step,
)
from training.jobs import queue

BEST_MOMENTUM = 0.9  # of the pseudo-Dice average that picks the best checkpoint

_log = logging.getLogger(__name__)


def train_fold(
    workspace: Path,
    configuration: str,
    fold: str,
    config: TrainingConfig,
    *,
    restart: bool = False,
    peers: Peers = ALONE,
) -> bool:
    """Train one fold to its end, or until a signal; then validate it.

    Args:
        workspace: With plans, splits and preprocessed cases.
        configuration: Such as ``3d_fullres``.
        fold: Index into the splits, or ``all`` to train on every case.
        config: What the user chose.
        restart: Begin anew although there is a checkpoint.
        peers: The processes that train this fold together; the leading one writes and validates.

    Returns:
        Whether training has reached its end; False after SIGTERM or Ctrl-C, with a checkpoint of
        the last step.

    Raises:
        TrainingError: The loss is not finite, memory ran out, or the checkpoint is of other plans.
        IchsegError: Something that earlier commands make is missing or damaged.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    run = open_run(workspace, configuration, fold, config, peers)
    with determinism(run), Signals() as signals:
        with memory_advice(run):
            state = _state_of(run, fold, restart=restart)
            reason = _train(run, state, signals)
        if reason is None:
            _log.info("stopped by %s; the same command goes on from here", signals.name)
            return False
        _log.info("training has ended: %s", reason)
        if config.validation and fold != ALL_FOLD and peers.leads:
            del state  # its memory is validation's now
            return validate(workspace, run, interrupted=lambda: bool(signals.name))
    return True


def _state_of(run: FoldRun, fold: str, *, restart: bool) -> TrainingState:
    """From the latest checkpoint, a bundle, or nothing."""
    state = begin(run)
    if (run.folder / LATEST_CHECKPOINT).exists() and not restart:
        resume(run, state)
    elif run.config.pretrained is not None:
        bundle = Path(run.config.pretrained)
        load_pretrained(state.network, bundle, run.configuration.name, fold)
    if run.config.compile:
        state.forward = compile_forward(run, state.network)
    if run.peers.leads:
        remove_unfinished(run.folder)
        with replacing(run.folder / CONFIG_FILE) as temporary:
            temporary.write_text(strict_json.dumps(run.config), encoding="utf-8")
    return state


def batch_keys(config: TrainingConfig, epoch: int, step: int) -> Iterator[BatchKey]:
    """All batches from ``step`` of ``epoch`` on: an epoch's training, its validation, the next."""
    for later in itertools.count(epoch):
        for number in range(step if later == epoch else 0, config.batches_per_epoch):
            yield BatchKey(later, number)
        yield from _validation_keys(config, later)


def _train(run: FoldRun, state: TrainingState, signals: Signals) -> str | None:
    """Epoch after epoch; why training has ended, or None when a signal came."""
    config, rules = run.config, run.config.rules
    reason = schedule.end_reason(rules, state.schedule, state.elapsed_s)
    if reason is not None:
        save(run, state, LATEST_CHECKPOINT)  # the length may have been lowered since
        return reason
    _log.info("training %s", _describe(run, state))
    keys = batch_keys(config, state.schedule.epoch, len(state.losses))
    stream = open_batches(run.spec, keys, config, run.device, run.layout)
    with stream, _watch(run, state) as watch:
        while reason is None:
            try:
                whole = _train_batches(run, state, stream, signals, watch)
                row = _finish_epoch(run, state, stream, signals, watch) if whole else None
            except BrokenProcessPool as error:
                if not signals.name:  # a signal to the whole process group ends the workers, too
                    raise TrainingError(
                        "a worker process was killed, perhaps for want of memory; try fewer "
                        "--workers"
                    ) from error
                row = None
            if row is None:
                save(run, state, LATEST_CHECKPOINT)
                return None
            began = time.perf_counter()
            reason = schedule.end_reason(rules, state.schedule, state.elapsed_s)
            if state.best_dice is not None and state.best_dice == state.average_dice:
                save(run, state, BEST_CHECKPOINT)
            if watch is not None:
                watch.epoch(state.history, state.elapsed_s, last=reason is not None)
            # last: what a kill before it leaves out is done again
            save(run, state, LATEST_CHECKPOINT)
            state.elapsed_s += time.perf_counter() - began
    return reason


@contextlib.contextmanager
def _watch(run: FoldRun, state: TrainingState) -> Iterator[Watch | None]:
    """What shows the training; None where another process does."""
    if not run.peers.leads:
        yield None
        return
    with Watch(
        run.folder,
        title=f"{run.configuration.name}, fold {run.folder.name.removeprefix('fold_')}",
        config=run.config,
        device=run.device,
        labels=run.plans.labels[1:],
        history=state.history,
    ) as watch:
        yield watch


def _train_batches(
    run: FoldRun, state: TrainingState, stream: BatchStream, signals: Signals, watch: Watch | None
) -> bool:
    """The training batches left in this epoch, or in the time; False when a signal came."""
    config = run.config
    for group in state.optimiser.param_groups:
        group["lr"] = state.schedule.learning_rate
    while len(state.losses) < config.batches_per_epoch:
        stopped, late = run.peers.any(bool(signals.name), _time_is_up(config, state))
        if stopped:
            return False
        if late:  # what is left of the epoch is dropped
            stream.restart(_validation_keys(config, state.schedule.epoch))
            break
        began, waited = time.perf_counter(), stream.waited_s
        loss = train_step(run, state, next(stream))
        if not math.isfinite(loss):
            step = f"epoch {state.schedule.epoch + 1}, step {len(state.losses) + 1}"
            raise diverged(run, f"the loss is {loss} in {step}")
        state.losses.append(loss)
        _spend(state, time.perf_counter() - began, stream.waited_s - waited)
        if watch is not None:
            watch.step(_moment(state, len(state.losses), config.batches_per_epoch, loss))
    return True


def _finish_epoch(
    run: FoldRun, state: TrainingState, stream: BatchStream, signals: Signals, watch: Watch | None
) -> EpochRow | None:
    """Validate on patches and move the schedule on; None when a signal came."""
    config = run.config
    losses, counts = [], torch.zeros(len(run.plans.labels) - 1, 2, dtype=torch.int64)
    state.network.eval()
    for number in range(1, config.validation_batches + 1):
        if any(run.peers.any(bool(signals.name))):
            return None
        began, waited = time.perf_counter(), stream.waited_s
        loss, found = validation_step(run, state, next(stream))
        losses.append(loss)
        counts += found
        _spend(state, time.perf_counter() - began, stream.waited_s - waited)
        if watch is not None:
            watch.step(_moment(state, number, config.validation_batches, loss, validating=True))
    if not math.isfinite(sum(losses)):  # it would stay in the schedule's average for ever
        what = f"the validation loss is {np.mean(losses)} after epoch {state.schedule.epoch + 1}"
        raise diverged(run, what)
    state.elapsed_s = run.peers.of_leader(state.elapsed_s)  # all take the same schedule
    class_dice = pseudo_dice(counts)
    known = [dice for dice in class_dice if dice is not None]
    row = EpochRow(
        epoch=state.schedule.epoch + 1,
        train_loss=float(np.mean(state.losses)) if state.losses else math.nan,
        validation_loss=float(np.mean(losses)),
        pseudo_dice=sum(known) / len(known) if known else None,
        lr=state.schedule.learning_rate,
        seconds=state.seconds,
        data_wait_s=state.data_wait_s,
        class_dice=class_dice,
    )
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
    return row


def _validation_keys(config: TrainingConfig, epoch: int) -> Iterator[BatchKey]:
    return (BatchKey(epoch, number, validation=True) for number in range(config.validation_batches))


def _spend(state: TrainingState, seconds: float, waited: float) -> None:
    state.elapsed_s += seconds
    state.seconds += seconds
    state.data_wait_s += waited


def _time_is_up(config: TrainingConfig, state: TrainingState) -> bool:
    return config.minutes is not None and state.elapsed_s >= 60 * config.minutes


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
    c = run.configuration
    count = sum(p.numel() for p in state.network.parameters())
    where = torch_engine.describe(run.device)
    return (
        f"{c.name} in {run.folder}: {len(run.spec.train)} cases, "
        f"{len(run.spec.validation)} to validate; "
        f"patch {'x'.join(map(str, c.patch))}, batch {c.batch}, {count / 1e6:.2f} M parameters, "
        f"recipe {run.config.recipe}, {run.precision} on {where}"
        + (f", {run.peers.count} processes" if run.peers.count > 1 else "")
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``train`` command: one flag for each field of ``TrainingConfig``."""
    parser.usage = (
        "python -m training train CONFIGURATION --workspace W --fold K|--folds K,K,... [options]"
    )
    parser.add_argument("configuration", metavar="CONFIGURATION", help="such as 3d_fullres")
    dataset.add_workspace_argument(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--fold", metavar="K", help=f"0, 1, ... or {ALL_FOLD}")
    which.add_argument(
        "--folds", type=queue.parse_folds, metavar="K,K,...", help="several, one after another"
    )
    parser.add_argument(
        "--gpus",
        metavar="N,N,...",
        help="train folds side by side, each on one of these GPUs, whichever is free",
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="where the defaults below come from; default: the plans' recipe",
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin anew although there is a checkpoint"
    )
    add_settings(parser)


def main(args: argparse.Namespace) -> int:
    """Run the ``train`` command; 130 when a signal ended it."""
    recipe = args.recipe or plans.load(plans_file(args.workspace)).recipe
    config = config_from(args, recipe)
    with joined(config.device) as peers:
        if not peers.leads:
            logging.getLogger().setLevel(logging.WARNING)  # the leading process tells it all
        if peers.count > 1 and args.gpus is not None:
            raise TrainingError(
                "--gpus gives each fold a GPU, torchrun all GPUs to one fold; use one of them"
            )
        gpus = None if args.gpus is None else queue.find_gpus(args.gpus)
        waiting = []
        for fold in args.folds or (args.fold,):  # all are opened, so that they are refused now
            run = open_run(args.workspace, args.configuration, fold, config, peers)
            if not args.restart and queue.is_finished(args.workspace, run):
                _log.info("%s, fold %s: finished already", args.configuration, fold)
            else:
                waiting.append(fold)
        if gpus is None:
            train = functools.partial(_train_one, args, config, peers)
            done = queue.train_in_sequence(waiting, train)
        else:
            done = queue.train_on_gpus(waiting, gpus, functools.partial(_command, args))
    return 0 if done else 130


def _train_one(args: argparse.Namespace, config: TrainingConfig, peers: Peers, fold: str) -> bool:
    """One fold in this process, which nobody else may train meanwhile."""
    with contextlib.ExitStack() as stack:
        if peers.leads:
            folder = run_folder(args.workspace, args.configuration, fold)
            stack.enter_context(queue.claimed(folder))
            stack.enter_context(log.to_file(folder / TRAIN_LOG))
        return train_fold(
            args.workspace, args.configuration, fold, config, restart=args.restart, peers=peers
        )


def _command(args: argparse.Namespace, fold: str) -> list[str]:
    """The command line that trains one fold in a process of its own."""
    words = [sys.executable, "-m", "training", "train", args.configuration]
    words += ["--workspace", str(args.workspace), "--fold", fold]
    words += ["--recipe", args.recipe] if args.recipe else []
    words += ["--restart"] if args.restart else []
    return words + flags_from(args)
