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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg.errors import DatasetError, PlansError, TrainingError, WeightsError
from ichseg.model import bundle, plans
from ichseg.model.plans import Plans
from ichseg.report import page
from training.crossval import merge, selection
from training.data import layouts, splits, verify
from training.data.dataset import add_workspace_argument, load_dataset
from training.data.workspace import (
    LATEST_CHECKPOINT,
    VALIDATION_FILE,
    bundles_folder,
    dataset_file,
    evaluation_folder,
    evaluation_root,
    plans_file,
    preprocessed_folder,
    report_folder,
    run_folder,
    selection_file,
)
from training.fit import configuration as config
from training.fit import progress
from training.fit.configuration import TrainingConfig
from training.fit.fold_run import open_run
from training.jobs import queue, train
from training.planning import overrides as planner_overrides
from training.planning.recipes import RECIPES as PLANNER_RECIPES
from training.scoring import summary
from training.store import preprocess

SELECTED = "selected"  # the bundle of what was selected

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """One command.

    Attributes:
        words: Of its command line, after ``python -m training``.
        done: What shows that it need not be run; empty if it must be.
    """

    words: tuple[str, ...]
    done: str = ""


def run(args: argparse.Namespace, execute: Callable[[Sequence[str]], int]) -> int:
    """Run all steps in their order, but for those that are done.

    Args:
        args: Of the ``run`` command.
        execute: Runs one command line; its exit status.

    Returns:
        0, or the status of the first step that failed: the others are not begun.

    Raises:
        IchsegError: The workspace is of another dataset, or of other plans than the flags say.
    """
    for number, (stage, steps) in enumerate(STAGES.items(), start=1):
        for step in steps(args):  # each is looked at when those before it are done
            line = f"{_python()} -m training {shlex.join(step.words)}"
            if step.done:
                _log.info("== %d of %d, %s: done, %s", number, len(STAGES), stage, step.done)
                continue
            _log.info("\n== %d of %d, %s:\n%s", number, len(STAGES), stage, line)
            if status := execute(step.words):
                return status
    if _judged(args):
        names = " + ".join(selection.load(args.workspace).configurations)
        _log.info(
            "selected were %s, their weights are in %s", names, _bundle_folder(args, SELECTED)
        )
        return 0
    for name in _plans(args).with_first_stages(args.configurations):
        _log.info("the weights of %s are in %s", name, _bundle_folder(args, name))
    return 0


def _convert(args: argparse.Namespace) -> Iterator[Step]:
    words = ["convert", str(args.dataset), *_workspace(args)]
    if args.groups is not None:
        words += ["--groups", str(args.groups)]
    path = dataset_file(args.workspace)
    if path.exists():
        _refuse_other_dataset(args)
    yield Step(tuple(words), f"{path} is there" if path.exists() else "")


def _verify(args: argparse.Namespace) -> Iterator[Step]:
    dataset = load_dataset(args.workspace)
    done = verify.is_verified(args.workspace, dataset)
    found = f"no errors in {len(dataset.labelled)} cases, which have not changed since"
    yield Step(("verify", *_workspace(args)), found if done else "")


def _plan(args: argparse.Namespace) -> Iterator[Step]:
    words = ["plan", *_workspace(args)]
    if args.recipe in PLANNER_RECIPES:  # the others are the trainer's alone
        words += ["--recipe", args.recipe]
    if args.architecture is not None:
        words += ["--architecture", args.architecture]
    for name, value in _overrides(args).items():
        flags = {"yes": f"--{name}", "no": f"--no-{name}"}
        words.append(flags.get(value, f"--{name}={value}"))
    path = plans_file(args.workspace)
    if path.exists():
        _refuse_other_plans(args, path)
    yield Step(tuple(words), f"{path} is there" if path.exists() else "")


def _preprocess(args: argparse.Namespace) -> Iterator[Step]:
    dataset, planned = load_dataset(args.workspace), _plans(args)
    for name in planned.with_first_stages(args.configurations):
        done = preprocess.is_preprocessed(dataset, planned, name, args.workspace)
        folder = preprocessed_folder(args.workspace, name)
        yield Step(
            ("preprocess", name, *_workspace(args)), f"{folder} holds all cases" if done else ""
        )


def _train(args: argparse.Namespace) -> Iterator[Step]:
    planned = _plans(args)
    chosen = config.config_from(args, args.recipe or planned.recipe)
    words = [*_workspace(args), "--folds", ",".join(_folds(args))]
    if args.gpus is not None:
        words += ["--gpus", args.gpus]
    if args.recipe is not None:
        words += ["--recipe", args.recipe]
    words += config.flags_from(args)
    for name in planned.with_first_stages(args.configurations):
        done = all(_is_trained(args, name, fold, chosen) for fold in _folds(args))
        yield Step(
            ("train", name, *words), f"folds {', '.join(_folds(args))} of {name}" if done else ""
        )


def _cross_validate(args: argparse.Namespace) -> Iterator[Step]:
    names = _judged(args)
    if not names:
        return
    done = all(_is_newer(args, name, _evaluation(args, name)) for name in names)
    words = ("cross-validate", *_workspace(args), "--configurations", ",".join(names))
    folder = evaluation_root(args.workspace)
    yield Step(words, f"{folder} holds {', '.join(names)}" if done else "")


def _select(args: argparse.Namespace) -> Iterator[Step]:
    names = _judged(args)
    if not names:
        return
    path = selection_file(args.workspace)
    done = _selected_from(args) == names and all(_is_newer(args, name, path) for name in names)
    words = ("select", *_workspace(args), "--configurations", ",".join(names))
    yield Step(words, f"{path} is there" if done else "")


def _export(args: argparse.Namespace) -> Iterator[Step]:
    words = ["--folds", ",".join(_folds(args))]
    if args.threads:
        words += ["--threads", str(args.threads)]
    if _judged(args):
        out = _bundle_folder(args, SELECTED)
        chosen = selection.load(args.workspace)
        made = selection_file(args.workspace).stat().st_mtime_ns
        done = _is_exported(args, chosen.configurations, out, made)
        yield Step(
            ("export", *_workspace(args), "--out", str(out), *words),
            f"{out} holds what was selected" if done else "",
        )
        return
    for name in _plans(args).with_first_stages(args.configurations):
        out = _bundle_folder(args, name)
        done = _is_exported(args, (name,), out, 0)
        yield Step(
            ("export", *_workspace(args), "--configuration", name, "--out", str(out), *words),
            f"{out} holds these folds" if done else "",
        )


def _report(args: argparse.Namespace) -> Iterator[Step]:
    if not _judged(args):
        return
    path = report_folder(args.workspace) / page.FILE
    chosen = selection_file(args.workspace)
    done = path.is_file() and path.stat().st_mtime_ns >= chosen.stat().st_mtime_ns
    yield Step(("report", str(args.workspace)), f"{path} is there" if done else "")


# In order. Each gives the commands that it takes, with what shows which of them are done.
STAGES: dict[str, Callable[[argparse.Namespace], Iterator[Step]]] = {
    "convert": _convert,
    "verify": _verify,
    "plan": _plan,
    "preprocess": _preprocess,
    "train": _train,
    "cross-validate": _cross_validate,
    "select": _select,
    "export": _export,
    "report": _report,
}


def _refuse_other_dataset(args: argparse.Namespace) -> None:
    """The dataset may be gone from where it was; while it is there, it must be the same."""
    if not args.dataset.exists():
        return
    source, kept = layouts.read_source(args.dataset), load_dataset(args.workspace)
    names = sorted(case.name for case in source.cases)
    if (source.name, names) != (kept.name, [case.name for case in kept.cases]):
        raise DatasetError(
            f"{args.workspace}: holds {kept.name} with {len(kept.cases)} cases, but {args.dataset} "
            f"is {source.name} with {len(names)}, or they have other names; expected the same "
            "dataset, or a new workspace"
        )


def _refuse_other_plans(args: argparse.Namespace, path: Path) -> None:
    """Flags of an earlier run may be left out, but none may say otherwise."""
    found = plans.load(path)
    there = {override.name: override.chosen for override in found.overrides}
    there |= {"recipe": found.recipe, "architecture": found.architecture}
    wanted = _overrides(args)
    if args.recipe in PLANNER_RECIPES:
        wanted["recipe"] = args.recipe
    if args.architecture is not None:
        wanted["architecture"] = args.architecture
    for name, value in wanted.items():
        if there.get(name) != value:
            raise PlansError(
                f"{path}: made with {name} {there.get(name, 'as the data say')}, but --{name} is "
                f"{value}; leave the flag out, or take another workspace"
            )


def _overrides(args: argparse.Namespace) -> dict[str, str]:
    """What replaces the planner's choice, as its command line takes it."""
    given = planner_overrides.record(planner_overrides.overrides_from(args), None, 0.0)
    return {override.name: override.chosen for override in given}


def _folds(args: argparse.Namespace) -> tuple[str, ...]:
    if args.folds is not None:
        return tuple(args.folds)
    names = [case.name for case in load_dataset(args.workspace).labelled]
    return tuple(str(fold) for fold in range(len(splits.find_splits(args.workspace, names))))


def _is_trained(args: argparse.Namespace, name: str, fold: str, chosen: TrainingConfig) -> bool:
    if not (run_folder(args.workspace, name, fold) / LATEST_CHECKPOINT).exists():
        return False
    return train.is_finished(args.workspace, open_run(args.workspace, name, fold, chosen))


def _judged(args: argparse.Namespace) -> tuple[str, ...]:
    """Configurations to choose from: none where not all folds are trained and validated.

    A cascade's first stage is a choice of its own only where it was asked for.
    """
    planned = _plans(args)
    chosen = config.config_from(args, args.recipe or planned.recipe)
    names = [case.name for case in load_dataset(args.workspace).labelled]
    every = {str(fold) for fold in range(len(splits.find_splits(args.workspace, names)))}
    if not chosen.validation or set(_folds(args)) != every:
        return ()
    order = [configuration.name for configuration in planned.configurations]
    return tuple(sorted(args.configurations, key=order.index))


def _evaluation(args: argparse.Namespace, name: str) -> Path:
    return evaluation_folder(args.workspace, name) / summary.EVALUATION_FILE


def _is_newer(args: argparse.Namespace, name: str, path: Path) -> bool:
    """Whether a file is there, and no fold has been validated since it was written."""
    if not path.is_file():
        return False
    records = (run_folder(args.workspace, name, f) / VALIDATION_FILE for f in _folds(args))
    return all(record.stat().st_mtime_ns <= path.stat().st_mtime_ns for record in records)


def _selected_from(args: argparse.Namespace) -> tuple[str, ...]:
    """What an earlier selection chose from."""
    try:
        found = selection.load(args.workspace)
    except TrainingError:
        return ()
    return tuple(c.configurations[0] for c in found.candidates if len(c.configurations) == 1)


def _is_exported(
    args: argparse.Namespace, names: Sequence[str], out: Path, selected_ns: int
) -> bool:
    """Whether the bundle holds all folds, and none has been trained further or chosen since."""
    try:
        members = {(member.configuration, member.fold) for member in bundle.load_model(out).members}
    except WeightsError:
        return False
    made = (out / bundle.MODEL_FILE).stat().st_mtime_ns
    return made >= selected_ns and all(
        (name, fold) in members
        and (run_folder(args.workspace, name, fold) / LATEST_CHECKPOINT).stat().st_mtime_ns <= made
        for name in names
        for fold in _folds(args)
    )


def _bundle_folder(args: argparse.Namespace, name: str) -> Path:
    return (bundles_folder(args.workspace) if args.out is None else args.out) / name


def _plans(args: argparse.Namespace) -> Plans:
    return plans.load(plans_file(args.workspace))


def _workspace(args: argparse.Namespace) -> tuple[str, str]:
    return "--workspace", str(args.workspace)


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
        choices=config.TRAINING_RECIPES,
        help="of `plan` and `train`; one that `plan` does not have is for `train` alone "
        "[msd2018, or what the plans have]",
    )
    parser.add_argument("--architecture", choices=plans.ARCHITECTURES, help="of `plan` [plain]")
    planner_overrides.add_override_arguments(parser)
    config.add_settings(parser)


def main(args: argparse.Namespace) -> int:
    """Run the ``run`` command; the status of the step that failed, 0 if none did."""
    from training.__main__ import main as command

    # refuse now what would only be refused after hours
    chosen = config.config_from(args, args.recipe or "msd2018")
    planner_overrides.overrides_from(args)
    if chosen.tensorboard:
        progress.require_tensorboard()
    if args.gpus is not None:
        queue.find_gpus(args.gpus)
    return run(args, command)
