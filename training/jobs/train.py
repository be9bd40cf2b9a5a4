"""A fold as a job: train it, then segment its validation cases, in one process or one a GPU.

The same command resumes whatever was cut off, and leaves alone what is finished, unless it says
``--restart``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ichseg.engine import gpus as gpu_list
from ichseg.engine import torch_device
from ichseg.errors import DeviceFullError, IchsegError, TrainingError
from ichseg.wording import counted
from training.batches import hard_examples
from training.bundle.pretrained import read_pretrained, require_unseen
from training.crossval import cascade_labels
from training.crossval.validate import is_validated, validate
from training.data import dataset
from training.data.workspace import (
    ALL_FOLD,
    LATEST_CHECKPOINT,
    TRAIN_LOG,
    run_folder,
)
from training.fit.checkpoint import has_ended, load_checkpoint, require_sources
from training.fit.configuration import (
    TRAINING_RECIPES,
    TrainingConfig,
    add_settings,
    settings_from,
)
from training.fit.fold_run import FoldRun, changed_settings, open_run
from training.fit.loop import train_fold
from training.fit.pretrained import Pretrained
from training.fit.process_group import ALONE, ProcessGroup, joined
from training.fit.step import determinism
from training.jobs import board, graph, job_log, queue
from training.jobs.claim import claimed
from training.jobs.places import local
from training.jobs.signals import Signals, status_of
from training.planning.planned import load_plans
from training.store import chunks
from training.store.preprocess import require_current

_log = logging.getLogger(__name__)


def run_fold(
    workspace: Path,
    configuration: str,
    fold: str,
    config: TrainingConfig,
    *,
    restart: bool = False,
    group: ProcessGroup = ALONE,
    signals: Signals | None = None,
) -> bool:
    """Train one fold to its end, or until a signal; then validate it at full volume.

    Args:
        workspace: With plans, splits and preprocessed cases.
        configuration: Such as ``3d_fullres``.
        fold: Index into the splits, or ``all`` to train on every case.
        config: What the user chose.
        restart: Begin anew although there is a checkpoint.
        group: The processes that train this fold together, and share the cases that it validates.
        signals: Takes the signals meanwhile, and knows afterwards which came; one of its own by
            default.

    Returns:
        Whether all is done; False after a signal, with a checkpoint of the last step.

    Raises:
        TrainingError: The loss is not finite, memory ran out, or the checkpoint is of other plans.
        IchsegError: Something that earlier commands make is missing or damaged.
    """
    run = open_fold(workspace, configuration, fold, config, group, restart=restart)
    if group.leads:
        _warn_of_absent_labels(run)
    pretrained = None
    if config.pretrained is not None:
        folder = Path(config.pretrained)
        pretrained = functools.partial(_weights_to_begin_with, folder, run)
    with signals or _signals() as noted:
        done = train_fold(run, restart=restart, pretrained=pretrained, interrupted=noted.came)
        if done and wants_validation(run):
            with determinism(run), _memory_advice(run):
                done = validate(workspace, run, interrupted=noted.came)
    if not done:
        by = noted.name or "another process"
        without = " without --restart" if restart else ""
        _log.info("stopped by %s; the same command%s goes on from here", by, without)
    return done


def _warn_of_absent_labels(run: FoldRun) -> None:
    """Say which labels or regions no case that trains the fold has: it does not learn them."""
    metas = (chunks.load_meta(run.spec.folder, name) for name in run.spec.train)
    present = {label for meta in metas for label in meta.labels}
    absent = [region.name for region in run.plans.foreground if present.isdisjoint(region.labels)]
    if absent:
        _log.warning(
            "%s: none of the %s that train it has %s, which its network does not learn; "
            "splits.json can give it other cases before it is trained",
            run.folder,
            counted(len(run.spec.train), "case"),
            ", ".join(absent),
        )


def _weights_to_begin_with(folder: Path, run: FoldRun) -> Pretrained:
    """Weights that do not know the cases that the fold validates."""
    pretrained = read_pretrained(folder, run.configuration.name, run.fold)
    require_unseen(folder, run)
    return pretrained


def _signals() -> Signals:
    return Signals(lambda name: _log.info("%s: ending after this step with a checkpoint", name))


@contextlib.contextmanager
def _memory_advice(run: FoldRun) -> Iterator[None]:
    """Turn running out of memory in validation into one line; other folds go on.

    Raises:
        TrainingError: It ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, DeviceFullError) as error:
        if not isinstance(error, MemoryError) and not torch_device.is_full(error):
            raise
        raise TrainingError(
            f"{run.folder}: out of memory on {run.device} while segmenting the validation cases; "
            "the training has ended and its weights are kept. The same command validates where "
            "there is more memory, or with --device cpu"
        ) from error


def open_fold(
    workspace: Path,
    configuration: str,
    fold: str,
    config: TrainingConfig,
    group: ProcessGroup = ALONE,
    *,
    restart: bool = False,
) -> FoldRun:
    """Open a run for training, whose cases must be stored as their files are now.

    Raises:
        DatasetError: Cases are not stored, have changed since, or were stored by other plans.
        TrainingError: Cases lack the labels of a cascade's first stage, which its second needs, or
            unless ``restart`` is given the fold was trained on files that were corrected since, or
            on labels of first-stage weights that have been replaced since.
        IchsegError: Something else is missing, see ``open_run``.
    """
    run = open_run(workspace, configuration, fold, config, group)
    needed = sorted({*run.spec.train, *run.spec.validation})
    require_current(workspace, dataset.load_dataset(workspace), run.plans, configuration, needed)
    stored = {name: chunks.load_meta(run.spec.folder, name) for name in needed}
    run = dataclasses.replace(run, sources={name: meta.source for name, meta in stored.items()})
    if run.spec.hard_examples is not None:
        hard_examples.require(
            run.spec.hard_examples, run.spec.train, lambda name: stored[name].shape[1:]
        )
    if not restart:
        require_sources(run)
    if run.configuration.previous_stage is not None:
        run = _with_first_stage(workspace, run, needed, restart=restart)
    return run


def _with_first_stage(
    workspace: Path, run: FoldRun, needed: Sequence[str], *, restart: bool
) -> FoldRun:
    """The run of a second stage that knows on whose labels it trains: the first's as it is now."""
    cascade_labels.require_labels(workspace, run.plans, run.configuration, needed)
    path = run.folder / LATEST_CHECKPOINT
    if path.exists() and not restart:
        seen = load_checkpoint(path, run.plans, run.configuration, run.cases)
        cascade_labels.require_same_first_stage(workspace, run.plans, run.configuration, path, seen)
    noted = cascade_labels.weights_of_labels(workspace, run.configuration, needed)
    return dataclasses.replace(run, first_stage=noted)


def wants_validation(run: FoldRun) -> bool:
    """Whether the fold's validation cases are to be segmented once it is trained."""
    return run.config.validation and run.fold != ALL_FOLD


def is_finished(workspace: Path, run: FoldRun) -> bool:
    """Whether a fold has been trained to its end, as these settings define it, and validated.

    A cascade's second stage is not finished where its first has other weights since.
    """
    path = run.folder / LATEST_CHECKPOINT
    if not path.exists():
        return False
    raw = load_checkpoint(path, run.plans, run.configuration, run.cases)
    its = run.plans, run.configuration, raw
    if not has_ended(run, raw) or cascade_labels.of_other_first_stage(workspace, *its):
        return False
    return not wants_validation(run) or is_validated(workspace, run, raw["network"])


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
        "--folds", type=parse_folds, metavar="K,K,...", help="several, one after another"
    )
    parser.add_argument(
        "--gpus",
        metavar="N,N,...",
        help="train folds side by side, each on one of these GPUs, whichever is free",
    )
    parser.add_argument(
        "--recipe",
        choices=TRAINING_RECIPES,
        help="where the defaults below come from; default: the plans' recipe",
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin anew although there is a checkpoint"
    )
    add_settings(parser)


def parse_folds(text: str) -> tuple[str, ...]:
    """An argparse type: ``0,1,4`` as ``("0", "1", "4")``."""
    folds = tuple(part.strip() for part in text.split(","))
    if ALL_FOLD in folds:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected numbers such as 0,1,2,3,4 (--fold {ALL_FOLD} trains one network "
            "on every case)"
        )
    if not all(fold.isdecimal() for fold in folds):
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers separated by commas")
    folds = tuple(str(int(fold)) for fold in folds)
    if len(set(folds)) < len(folds):
        raise argparse.ArgumentTypeError(f"{text!r} names a fold twice")
    return folds


def main(args: argparse.Namespace) -> int:
    """Run the ``train`` command.

    Returns:
        0 when all folds are trained; 130 after Ctrl-C and 75 after another signal, when the same
        command without ``--restart`` goes on from there.
    """
    recipe = args.recipe or load_plans(args.workspace).recipe
    config = settings_from(args).over(recipe)
    with joined(config.device) as group:
        if not group.leads:
            logging.getLogger().setLevel(logging.WARNING)  # the leading process tells it all
        if group.count > 1 and args.gpus is not None:
            raise TrainingError(
                "--gpus gives each fold a GPU, torchrun all GPUs to one fold; use one of them"
            )
        gpus = None if args.gpus is None else gpu_list.find(args.gpus)
        waiting = []
        for fold in args.folds or (args.fold,):  # all are opened, so that they are refused now
            run = open_fold(
                args.workspace, args.configuration, fold, config, group, restart=args.restart
            )
            if not args.restart and is_finished(args.workspace, run):
                _log.info("%s, fold %s: finished already", args.configuration, fold)
                for name, new, old in changed_settings(run):
                    _log.warning("not with %s %s but %s; --restart trains anew", name, new, old)
            else:
                waiting.append(fold)
        if gpus is None:
            train = functools.partial(_train_here, args, config, group)
            return status_of(train_in_sequence(waiting, train, go_on=group.count == 1))
        return status_of(_train_on_gpus(args, waiting, gpus))


def train_in_sequence(
    folds: Sequence[str], train: Callable[[str], str], *, go_on: bool = True
) -> str:
    """Train folds one after another in this process.

    Args:
        folds: Names of the folds.
        train: Trains one fold; returns the name of the signal that ended it, empty if none did.
        go_on: Whether to train the other folds when one has failed. Processes that train together
            must not: only one of them may have failed.

    Returns:
        Empty when all were trained, else the name of the signal that came.

    Raises:
        TrainingError: Some failed; it names them.
    """
    failures: dict[str, str] = {}
    for fold in folds:
        try:
            if name := train(fold):
                return name
        except IchsegError as error:
            if len(folds) == 1 or not go_on:
                raise
            _log.error("fold %s failed: %s", fold, error)
            failures[fold] = str(error)
    if failures:
        reasons = "; ".join(f"fold {fold}: {reason}" for fold, reason in failures.items())
        raise TrainingError(f"{len(failures)} of {len(folds)} folds failed: {reasons}")
    return ""


def _train_on_gpus(args: argparse.Namespace, folds: Sequence[str], gpus: Sequence[str]) -> str:
    """Train folds side by side, each as a job on a GPU of its own; the signal that ended it."""
    if 0 < len(folds) < len(gpus):
        _log.info("folds for %d of %d GPUs: the others stay idle", len(folds), len(gpus))
    more = ["--recipe", args.recipe] if args.recipe else []
    more += ["--restart"] if args.restart else []
    settings = settings_from(args)
    jobs = [
        graph.training_job(args.workspace, args.configuration, fold, more, settings)
        for fold in folds
    ]
    with (
        board.shown() as watcher,
        local.ThisMachine(args.workspace, gpus, watcher.begins, watcher.hear) as place,
        Signals(lambda _: place.stop(), local.SIGNALS) as signals,
    ):
        queue.work(jobs, lambda _: "", place, watcher, stopped=signals.came)
    return signals.name


def _train_here(
    args: argparse.Namespace, config: TrainingConfig, group: ProcessGroup, fold: str
) -> str:
    """Train one fold in this process, which nobody else may train meanwhile."""
    with contextlib.ExitStack() as stack:
        if group.leads:
            folder = run_folder(args.workspace, args.configuration, fold)
            stack.enter_context(claimed(folder, "training this fold"))
            stack.enter_context(job_log.logged_to(folder / TRAIN_LOG))
        signals = _signals()
        done = run_fold(
            args.workspace,
            args.configuration,
            fold,
            config,
            restart=args.restart,
            group=group,
            signals=signals,
        )
        # the signal may have come to another process of the group
        return "" if group.all_done(done) else signals.name or signal.SIGTERM.name
