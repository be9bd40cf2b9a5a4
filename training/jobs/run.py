"""From a dataset to weights bundles in one command: each step that is not done yet, in its order.

Each step is a command of its own, said before it runs. What a step leaves in the workspace tells
whether it is done, so the same command goes on wherever it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ichseg.model import plans
from training.crossval import merge, selection
from training.data.dataset import add_workspace_argument
from training.fit import progress
from training.fit.configuration import TRAINING_RECIPES, add_settings
from training.jobs import queue, stages
from training.jobs.choices import Choices, choices_from
from training.jobs.stages import STAGES
from training.planning import overrides

_log = logging.getLogger(__name__)


def run(choices: Choices, execute: Callable[[Sequence[str]], int]) -> int:
    """Run all stages in their order, but for those that are done.

    Args:
        choices: What the user chose.
        execute: Runs one command, given the words of its line; returns its exit status.

    Returns:
        0, or the status of the first command that failed: the others are not begun.

    Raises:
        IchsegError: The workspace is of another dataset, or of other plans than the flags say.
    """
    for number, stage in enumerate(STAGES, start=1):
        place = f"{number} of {len(STAGES)}, {stage.command}"
        for target in stage.targets(choices):  # looked at when the stages before it are done
            if done := stage.done(choices, target):
                _log.info("== %s: done, %s", place, done)
                continue
            words = (stage.command, *stage.words(choices, target))
            _log.info("\n== %s:\n%s -m training %s", place, _python(), shlex.join(words))
            if status := execute(words):
                return status
    for name in stages.bundles(choices):
        folder = choices.bundle_folder(name)
        if name == stages.SELECTED:
            names = " + ".join(selection.load(choices.workspace).configurations)
            _log.info("selected were %s, their weights are in %s", names, folder)
        else:
            _log.info("the weights of %s are in %s", name, folder)
    return 0


def _python() -> str:
    """The interpreter, as a person here would name it."""
    path = Path(sys.executable)
    here = Path.cwd()
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(here) else str(path))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``run`` command: its own, and those of the commands it stands for."""
    parser.usage = "python -m training run DATASET --workspace W [options]"
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="a folder for `convert`")
    add_workspace_argument(parser)
    parser.add_argument(
        "--configurations",
        type=merge.parse_names,
        default=("3d_fullres",),
        metavar="NAME,...",
        help="2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres, if planned [3d_fullres]",
    )
    parser.add_argument(
        "--folds", type=queue.parse_folds, metavar="K,K,...", help="which to train [all]"
    )
    parser.add_argument(
        "--gpus", metavar="N,N,...", help="train folds side by side, one on each of these GPUs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="for the bundle `selected`, or one a configuration where only some folds are "
        "trained [W/bundles]",
    )
    parser.add_argument("--groups", type=Path, metavar="CSV", help="of `convert`")
    parser.add_argument(
        "--recipe",
        choices=TRAINING_RECIPES,
        help="of `plan` and `train`; one that `plan` does not have is for `train` alone "
        "[msd2018, or what the plans have]",
    )
    parser.add_argument("--architecture", choices=plans.ARCHITECTURES, help="of `plan` [plain]")
    overrides.add_override_arguments(parser)
    add_settings(parser)


def main(args: argparse.Namespace) -> int:
    """Run the ``run`` command; the status of the step that failed, 0 if none did."""
    from training.__main__ import main as command

    choices = choices_from(args)
    # refuse now what would only be refused after hours
    settings = choices.settings.over(choices.recipe or "msd2018")
    if settings.tensorboard:
        progress.require_tensorboard()
    if choices.gpus is not None:
        queue.find_gpus(choices.gpus)
    return run(choices, command)
