"""From a dataset to weights bundles in one command: each job that is not done yet, in its order.

Each job is a command of its own, said before it runs. What a job leaves in the workspace tells
whether it is done, so the same command goes on wherever it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from ichseg.engine import gpus as gpu_list
from ichseg.errors import TrainingError
from training.crossval import merge, selection
from training.data import convert
from training.data.dataset import add_workspace_argument
from training.fit import progress
from training.fit.configuration import TRAINING_RECIPES, add_settings
from training.jobs import board, done, graph, queue
from training.jobs.choices import SELECTED, Choices, Scope, choices_from, find_scope
from training.jobs.claim import claimed
from training.jobs.graph import ONE_MACHINE, Machines
from training.jobs.places import cluster, local
from training.jobs.queue import Place, Watcher
from training.jobs.signals import Signals, status_of
from training.jobs.train import parse_folds
from training.planning import overrides

_log = logging.getLogger(__name__)


def run(
    choices: Choices,
    place: Place,
    watcher: Watcher,
    machines: Machines = ONE_MACHINE,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Do all jobs of a run, but for those that are done.

    Args:
        choices: What the user chose.
        place: Where jobs run.
        watcher: Is told how they stand.
        machines: What the graph has to know of the place.
        stopped: Whether a signal has come.

    Returns:
        Whether all are done; False after a signal.

    Raises:
        TrainingError: Some jobs failed; it names them.
        IchsegError: The workspace is of another dataset, or of other plans than the flags say.
    """
    with claimed(choices.workspace, "at work on this workspace"):
        work = functools.partial(queue.work, place=place, watcher=watcher, stopped=stopped)
        if not work(graph.opening(choices), functools.partial(done.of_opening, choices)):
            return False
        scope = find_scope(choices)
        if not work(graph.closing(scope, machines), functools.partial(done.of_closing, scope)):
            return False
    _say_bundles(scope)
    return True


def _say_bundles(scope: Scope) -> None:
    for name in scope.bundles:
        folder = scope.choices.bundle_folder(name)
        if name == SELECTED:
            names = " + ".join(selection.load(scope.choices.workspace).configurations)
            _log.info("selected: %s; the weights are in %s", names, folder)
        else:
            _log.info("the weights of %s are in %s", name, folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``run`` command: its own, and those of the commands it stands for."""
    parser.usage = "python -m training run DATASET --workspace W [options]"
    parser.add_argument(
        "dataset", type=Path, metavar="DATASET", help="a dataset's folder, as `convert` takes it"
    )
    add_workspace_argument(parser)
    parser.add_argument(
        "--configurations",
        type=merge.parse_names,
        default=("3d_fullres",),
        metavar="NAME,...",
        help="2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres, if planned [3d_fullres]",
    )
    parser.add_argument("--folds", type=parse_folds, metavar="K,K,...", help="which to train [all]")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--gpus", metavar="N,N,...", help="train folds side by side, one on each of these GPUs"
    )
    where.add_argument(
        "--ray",
        metavar="HOST:PORT|auto",
        help="run the jobs on the nodes of a Ray cluster, which see the same files; auto is the "
        "cluster of this machine (docs/cluster.md)",
    )
    parser.add_argument(
        "--processes",
        type=_parse_processes,
        default=1,
        metavar="N",
        help="with --ray: train each fold with so many processes, a GPU or cores of a node each "
        "[1]",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the bundle `selected` comes to lie, or one a configuration where only some "
        "folds are trained [W/bundles]",
    )
    convert.add_choices(parser)
    parser.add_argument(
        "--recipe",
        choices=TRAINING_RECIPES,
        help="what plans and trains: the paper that this project implements, nnU-Net v2, or, for "
        "`train` alone, a short training on few CPU cores [msd2018, or what the plans have]",
    )
    overrides.add_architecture_argument(parser)
    overrides.add_override_arguments(parser)
    add_settings(parser)


def main(args: argparse.Namespace) -> int:
    """Run the ``run`` command.

    Returns:
        0 when all jobs are done; 130 after Ctrl-C and 75 after another signal, when the same
        command goes on from there.
    """
    if args.ray is not None:
        _make_absolute(args)
    elif args.processes > 1:
        raise TrainingError(
            f"--processes {args.processes} goes with --ray; on one machine, "
            f"`torchrun --nproc-per-node {args.processes} -m training train` trains a fold so"
        )
    choices = choices_from(args)
    # refuse now what would only be refused after hours
    progress.require_boards(choices.settings.over(choices.recipe or "msd2018"))
    with (
        board.shown() as watcher,
        _place(args, choices, watcher) as (place, machines),
        Signals(lambda _: place.stop(), local.SIGNALS) as signals,
    ):
        run(choices, place, watcher, machines, stopped=signals.came)
    if signals.name:
        _log.info("stopped by %s; the same command goes on from here", signals.name)
    return status_of(signals.name)


@contextlib.contextmanager
def _place(
    args: argparse.Namespace, choices: Choices, watcher: board.Board
) -> Iterator[tuple[Place, Machines]]:
    """Where the jobs run: on this machine, or on a cluster."""
    if args.ray is not None:
        files = [path for path in (choices.dataset, choices.groups) if path is not None]
        told = watcher.begins, watcher.hear
        with cluster.joined(args.ray, choices.workspace, files, *told) as (there, machines):
            yield there, dataclasses.replace(machines, processes=args.processes)
        return
    gpus = () if args.gpus is None else gpu_list.find(args.gpus)
    with local.ThisMachine(choices.workspace, gpus, watcher.begins, watcher.hear) as place:
        yield place, ONE_MACHINE


def _parse_processes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of at least 1")
    return int(text)


def _make_absolute(args: argparse.Namespace) -> None:
    """Name all files so that they are the same from any folder of any node."""
    for name in ("dataset", "workspace", "out", "groups"):
        if (path := getattr(args, name)) is not None:
            setattr(args, name, path.absolute())
    if args.pretrained is not None:
        args.pretrained = str(Path(args.pretrained).absolute())
