"""The stages of ``run`` as a table: the command of each, and what shows that it is done.

A stage that is done says so in a few words; an empty text means that its command has to be run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg.errors import DatasetError, PlansError, TrainingError, WeightsError
from ichseg.model import bundle, plans
from ichseg.model.folder import MODEL_FILE
from ichseg.report import page
from training.crossval import selection
from training.data import convert, layouts, verify
from training.data.dataset import load_dataset
from training.data.workspace import (
    LATEST_CHECKPOINT,
    VALIDATION_FILE,
    dataset_file,
    evaluation_folder,
    evaluation_root,
    plans_file,
    preprocessed_folder,
    report_folder,
    run_folder,
    selection_file,
)
from training.fit.fold_run import open_run
from training.jobs import train
from training.jobs.choices import Choices
from training.planning.recipes import RECIPES
from training.scoring import summary
from training.store import preprocess

_log = logging.getLogger(__name__)

SELECTED = "selected"  # the bundle of what was selected


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of ``run``, which may be needed once, once a configuration, or not at all.

    Attributes:
        command: The command.
        targets: What it is run for: one empty name, or names of configurations or of a bundle.
        words: The words that follow the command, for a target.
        done: What shows that it need not be run for a target; empty if it must be.
    """

    command: str
    targets: Callable[[Choices], Sequence[str]]
    words: Callable[[Choices, str], Sequence[str]]
    done: Callable[[Choices, str], str]


def _once(_: Choices) -> Sequence[str]:
    return ("",)


def _each_trained(choices: Choices) -> Sequence[str]:
    return choices.trained()


def _once_compared(choices: Choices) -> Sequence[str]:
    return ("",) if choices.compared() else ()


def bundles(choices: Choices) -> Sequence[str]:
    """The bundles to write: the one of what was selected, or one a configuration."""
    return (SELECTED,) if choices.compared() else choices.trained()


def _workspace(choices: Choices) -> list[str]:
    return ["--workspace", str(choices.workspace)]


def _convert(choices: Choices, _: str) -> Sequence[str]:
    groups = [] if choices.groups is None else ["--groups", str(choices.groups)]
    return [str(choices.dataset), *_workspace(choices), *groups]


def _converted(choices: Choices, _: str) -> str:
    """The dataset may be gone from where it was; while it is there, it must be the same."""
    path = dataset_file(choices.workspace)
    if not path.exists():
        return ""
    if choices.dataset.exists():
        source, kept = layouts.read_source(choices.dataset), load_dataset(choices.workspace)
        names = sorted(case.name for case in source.cases)
        if (source.name, names) != (kept.name, [case.name for case in kept.cases]):
            raise DatasetError(
                f"{choices.workspace}: holds {kept.name} with {len(kept.cases)} cases, but "
                f"{choices.dataset} is {source.name} with {len(names)}, or they have other names; "
                "expected the same dataset, or a new workspace"
            )
        corrected = convert.corrected_since(source, kept, path.stat().st_mtime_ns)
        if corrected:
            _log.warning(
                "%d files have changed since they were brought to %s, such as %s; what lies in the "
                "workspace is used: copy them there, or begin a new one",
                len(corrected),
                choices.workspace,
                corrected[0],
            )
    return f"{path} is there"


def _verify(choices: Choices, _: str) -> Sequence[str]:
    return [*_workspace(choices), "--note"]


def _verified(choices: Choices, _: str) -> str:
    dataset = load_dataset(choices.workspace)
    if not verify.is_verified(choices.workspace, dataset):
        return ""
    return f"no errors in {len(dataset.labelled)} cases, which have not changed since"


def _plan(choices: Choices, _: str) -> Sequence[str]:
    words = _workspace(choices)
    if choices.recipe in RECIPES:  # the others are the trainer's alone
        words += ["--recipe", choices.recipe]
    if choices.architecture is not None:
        words += ["--architecture", choices.architecture]
    for name, value in choices.overrides.items():
        flags = {"yes": f"--{name}", "no": f"--no-{name}"}
        words.append(flags.get(value, f"--{name}={value}"))
    return words


def _planned(choices: Choices, _: str) -> str:
    """Flags of an earlier run may be left out, but none may say otherwise."""
    path = plans_file(choices.workspace)
    if not path.exists():
        return ""
    found = plans.load(path)
    there = {override.name: override.chosen for override in found.overrides}
    there |= {"recipe": found.recipe, "architecture": found.architecture}
    wanted = dict(choices.overrides)
    if choices.recipe in RECIPES:
        wanted["recipe"] = choices.recipe
    if choices.architecture is not None:
        wanted["architecture"] = choices.architecture
    for name, value in wanted.items():
        if there.get(name) != value:
            raise PlansError(
                f"{path}: made with {name} {there.get(name, 'as the data say')}, but --{name} is "
                f"{value}; leave the flag out, or take another workspace"
            )
    return f"{path} is there"


def _preprocess(choices: Choices, name: str) -> Sequence[str]:
    return [name, *_workspace(choices)]


def _preprocessed(choices: Choices, name: str) -> str:
    dataset = load_dataset(choices.workspace)
    if not preprocess.is_preprocessed(dataset, choices.plans(), name, choices.workspace):
        return ""
    return f"{preprocessed_folder(choices.workspace, name)} holds all cases"


def _train(choices: Choices, name: str) -> Sequence[str]:
    words = [name, *_workspace(choices), "--folds", ",".join(choices.chosen_folds())]
    if choices.gpus is not None:
        words += ["--gpus", choices.gpus]
    if choices.recipe is not None:
        words += ["--recipe", choices.recipe]
    return [*words, *choices.settings.flags()]


def _trained(choices: Choices, name: str) -> str:
    config, folds = choices.config(), choices.chosen_folds()
    for fold in folds:
        if not (run_folder(choices.workspace, name, fold) / LATEST_CHECKPOINT).exists():
            return ""
        run = open_run(choices.workspace, name, fold, config)
        if not train.is_finished(choices.workspace, run):
            return ""
    return f"folds {', '.join(folds)} of {name}"


def _compare(choices: Choices, _: str) -> Sequence[str]:
    return [*_workspace(choices), "--configurations", ",".join(choices.compared())]


def _cross_validated(choices: Choices, _: str) -> str:
    names = choices.compared()
    for name in names:
        table = evaluation_folder(choices.workspace, name) / summary.EVALUATION_FILE
        if not _is_newer_than_validation(choices, name, table):
            return ""
    return f"{evaluation_root(choices.workspace)} holds {', '.join(names)}"


def _selected(choices: Choices, _: str) -> str:
    path, names = selection_file(choices.workspace), choices.compared()
    try:
        found = selection.load(choices.workspace)
    except TrainingError:
        return ""
    alone = tuple(c.configurations[0] for c in found.candidates if len(c.configurations) == 1)
    if alone != names:
        return ""
    newer = all(_is_newer_than_validation(choices, name, path) for name in names)
    return f"{path} is there" if newer else ""


def _export(choices: Choices, target: str) -> Sequence[str]:
    words = _workspace(choices)
    if target != SELECTED:
        words += ["--configuration", target]
    words += ["--out", str(choices.bundle_folder(target))]
    words += ["--folds", ",".join(choices.chosen_folds())]
    if threads := choices.settings.training.get("threads"):
        words += ["--threads", str(threads)]
    return words


def _exported(choices: Choices, target: str) -> str:
    """Whether the bundle holds all folds, and none has been trained further or chosen since."""
    out, chosen_ns = choices.bundle_folder(target), 0
    names: tuple[str, ...] = (target,)
    if target == SELECTED:
        names = selection.load(choices.workspace).configurations
        chosen_ns = selection_file(choices.workspace).stat().st_mtime_ns
    try:
        members = {(member.configuration, member.fold) for member in bundle.load_model(out).members}
    except WeightsError:
        return ""
    made_ns = (out / MODEL_FILE).stat().st_mtime_ns
    if made_ns < chosen_ns:
        return ""
    for name in names:
        for fold in choices.chosen_folds():
            latest = run_folder(choices.workspace, name, fold) / LATEST_CHECKPOINT
            if (name, fold) not in members or latest.stat().st_mtime_ns > made_ns:
                return ""
    return f"{out} holds {'what was selected' if target == SELECTED else 'these folds'}"


def _report(choices: Choices, _: str) -> Sequence[str]:
    return [str(choices.workspace)]


def _reported(choices: Choices, _: str) -> str:
    path, chosen = report_folder(choices.workspace) / page.FILE, selection_file(choices.workspace)
    newer = path.is_file() and path.stat().st_mtime_ns >= chosen.stat().st_mtime_ns
    return f"{path} is there" if newer else ""


def _is_newer_than_validation(choices: Choices, name: str, path: Path) -> bool:
    """Whether a file is there, and no fold has been validated since it was written."""
    if not path.is_file():
        return False
    folders = (run_folder(choices.workspace, name, fold) for fold in choices.chosen_folds())
    made_ns = path.stat().st_mtime_ns
    return all((folder / VALIDATION_FILE).stat().st_mtime_ns <= made_ns for folder in folders)


STAGES = (
    Stage("convert", _once, _convert, _converted),
    Stage("verify", _once, _verify, _verified),
    Stage("plan", _once, _plan, _planned),
    Stage("preprocess", _each_trained, _preprocess, _preprocessed),
    Stage("train", _each_trained, _train, _trained),
    Stage("cross-validate", _once_compared, _compare, _cross_validated),
    Stage("select", _once_compared, _compare, _selected),
    Stage("export", bundles, _export, _exported),
    Stage("report", _once_compared, _report, _reported),
)
