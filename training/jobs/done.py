"""What shows in a workspace that a job is done, for each command.

A job that is done says so in a few words; an empty text means that its command has to be run.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from ichseg.errors import DatasetError, PlansError, TrainingError, WeightsError
from ichseg.model import bundle, plans
from ichseg.model.folder import MODEL_FILE
from ichseg.report import PAGE_FILE
from ichseg.wording import counted
from training.bundle import export
from training.crossval import merge, selection
from training.data import convert, layouts, verify
from training.data.dataset import Dataset, load_dataset
from training.data.layouts import Source
from training.data.sources import corrected_since, digest_cases
from training.data.splits import read_groups
from training.data.workspace import (
    DATASET_FILE,
    LATEST_CHECKPOINT,
    VALIDATION_FILE,
    dataset_file,
    evaluation_folder,
    evaluation_root,
    groups_file,
    plans_file,
    preprocessed_folder,
    report_folder,
    run_folder,
    selection_file,
)
from training.fit.checkpoint import load_checkpoint
from training.fit.fold_run import FoldRun, changed_settings, open_run
from training.jobs import train
from training.jobs.choices import SELECTED, Choices, Scope
from training.jobs.job import Job
from training.planning.recipes import RECIPES
from training.scoring import summary
from training.store import preprocess

_log = logging.getLogger(__name__)


def of_opening(choices: Choices, job: Job) -> str:
    """What shows that a job up to the plans need not be run; empty if it must be.

    Raises:
        IchsegError: The workspace is of another dataset, or of other plans than the flags say.
    """
    return _OPENING[job.command](choices)


def of_closing(scope: Scope, job: Job) -> str:
    """What shows that a job after the plans need not be run; empty if it must be.

    Raises:
        IchsegError: What it depends on is missing or damaged.
    """
    return _CLOSING[job.command](scope, job)


def _converted(choices: Choices) -> str:
    """The dataset may be gone from where it was; while it is there, it must be the same."""
    path = dataset_file(choices.workspace)
    if not path.exists():
        return ""
    _require_groups(choices)
    if choices.dataset.exists():
        source = layouts.read_source(choices.dataset, choices.labels)
        kept = load_dataset(choices.workspace)
        names = sorted(case.name for case in source.cases)
        if (source.name, names) != (kept.name, [case.name for case in kept.cases]):
            raise DatasetError(
                f"{choices.workspace}: holds {kept.name} with {len(kept.cases)} cases, but "
                f"{choices.dataset} is {source.name} with {len(names)}, or they have other names; "
                "expected the same dataset, or a new workspace"
            )
        _require_declared(choices, source, kept)
        if choices.labels not in ((), kept.labels):
            raise DatasetError(
                f"{choices.workspace}: its labels are {','.join(kept.labels)}, but --labels is "
                f"{','.join(choices.labels)}; leave the flag out, or take another workspace"
            )
        corrected = convert.changed_at_source(source, kept, path.stat().st_mtime_ns)
        if corrected:
            _log.warning(
                "%s: no longer as in %s: %s, such as %s; what lies in the workspace is used: if it "
                "is the dataset that was corrected, copy its files there, or begin a new workspace",
                choices.dataset,
                choices.workspace,
                counted(len(corrected), "file"),
                corrected[0],
            )
    return f"{path} is there"


def _require_declared(choices: Choices, source: Source, kept: Dataset) -> None:
    """Refuse a dataset whose description names other channels or labels than the workspace has.

    Layouts without a description are left to ``--labels``, which an earlier run may have had.

    Raises:
        DatasetError: It does; says which.
    """
    described = choices.dataset / DATASET_FILE
    if not described.is_file():
        return
    for name, theirs, ours in (
        ("channels", source.channels, kept.channels),
        ("labels", source.declared.labels, kept.labels),
        ("label to ignore", source.declared.ignore_label, kept.ignore_label),
        ("regions_class_order", source.declared.regions, kept.regions),
        ("labels of regions", source.declared.region_labels, kept.region_labels),
    ):
        if theirs != ours:
            raise DatasetError(
                f"{described}: the {name} are {theirs}, but {dataset_file(choices.workspace)} has "
                f"{ours}; expected the same dataset, or a new workspace"
            )


def _require_groups(choices: Choices) -> None:
    """Refuse a table of groups that the workspace was not made with: folds would go without it.

    The table may be gone from where it was.

    Raises:
        DatasetError: The workspace has none, or another; says what to do.
    """
    given, kept = choices.groups, groups_file(choices.workspace)
    if given is None:
        return
    names = [case.name for case in load_dataset(choices.workspace).labelled]
    if not kept.exists():
        what = "missing, so that the folds go without groups"
    elif given.exists() and read_groups(given, names) != read_groups(kept, names):
        what = "has other groups"
    else:
        return
    raise DatasetError(
        f"{kept}: {what}, but --groups is {given}; copy it there before a fold is trained, or take "
        "another workspace"
    )


def _verified(choices: Choices) -> str:
    dataset = load_dataset(choices.workspace)
    if not verify.is_verified(choices.workspace, dataset):
        return ""
    return f"no errors in {len(dataset.labelled)} cases, which have not changed since"


def _planned(choices: Choices) -> str:
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


def _preprocessed(scope: Scope, job: Job) -> str:
    workspace = scope.choices.workspace
    dataset = load_dataset(workspace)
    share = preprocess.parse_share(job.part.replace(" of ", "/")) if job.part else (1, 1)
    if not preprocess.is_preprocessed(dataset, scope.plans, job.target, workspace, share):
        return ""
    cases = f"cases {job.part}" if job.part else "all cases"
    return f"{preprocessed_folder(workspace, job.target)} holds {cases}"


def _trained(scope: Scope, job: Job) -> str:
    workspace = scope.choices.workspace
    folder = run_folder(workspace, job.target, job.part)
    if not (folder / LATEST_CHECKPOINT).exists():
        return ""
    run = _opened(scope, job.target, job.part)
    if not train.is_finished(workspace, run):
        return ""
    others = changed_settings(dataclasses.replace(run, config=scope.config))
    words = [f"not with {name} {new} but {old}" for name, new, old in others]
    seen = load_checkpoint(folder / LATEST_CHECKPOINT, run.plans, run.configuration, run.cases)
    cases = load_dataset(workspace).labelled
    changed = corrected_since(seen["sources"], digest_cases(workspace, cases))
    if changed:
        words.append(
            f"but with {counted(len(changed), 'case')} whose image or label has been corrected "
            f"since, such as {changed[0]}: to train it anew, "
            f"`train {job.target} --fold {job.part} --restart`"
        )
    return ", ".join([f"{folder} is finished", *words])


def _opened(scope: Scope, name: str, fold: str) -> FoldRun:
    """A fold's run, to look at: this process need not have the GPU that it was trained on."""
    config = dataclasses.replace(scope.config, device="cpu", precision="auto")
    return open_run(scope.choices.workspace, name, fold, config)


def _cross_validated(scope: Scope, _: Job) -> str:
    for name in scope.compared:
        folder = evaluation_folder(scope.choices.workspace, name)
        if not _is_newer_than_validation(scope, name, folder / summary.EVALUATION_FILE):
            return ""
        made_from = summary.load(folder).made_from
        if made_from != merge.digest_of_folds(scope.choices.workspace, name):
            return ""
    return f"{evaluation_root(scope.choices.workspace)} holds {', '.join(scope.compared)}"


def _selected(scope: Scope, _: Job) -> str:
    """Whether the choice was made among these configurations as all of them are now."""
    workspace = scope.choices.workspace
    path = selection_file(workspace)
    try:
        found = selection.load(workspace)
        now = {name: merge.digest_of_folds(workspace, name) for name in scope.compared}
    except TrainingError:
        return ""
    if found.made_from != now:
        return ""
    alone = tuple(c.configurations[0] for c in found.candidates if len(c.configurations) == 1)
    if alone != scope.compared:
        return ""
    newer = all(_is_newer_than_validation(scope, name, path) for name in scope.compared)
    return f"{path} is there" if newer else ""


def _exported(scope: Scope, job: Job) -> str:
    """Whether the bundle holds these folds alone, and none was trained further or chosen since."""
    workspace, out, chosen_ns = scope.choices.workspace, scope.choices.bundle_folder(job.target), 0
    try:
        model = bundle.load_model(out)
    except WeightsError:
        return ""
    members = {(member.configuration, member.fold) for member in model.members}
    names: tuple[str, ...] = (job.target,)
    if job.target == SELECTED:
        found = selection.load(workspace)
        if (model.averaged, model.rules) != (found.configurations, found.rules):
            return ""
        names = found.configurations
        chosen_ns = selection_file(workspace).stat().st_mtime_ns
    made_ns = (out / MODEL_FILE).stat().st_mtime_ns
    if made_ns < chosen_ns:
        return ""
    stages, folds = scope.plans.with_first_stages(names), scope.chosen_folds
    if members != {(name, fold) for name in stages for fold in folds}:
        return ""
    for name, fold in members:
        latest = run_folder(workspace, name, fold) / LATEST_CHECKPOINT
        if latest.stat().st_mtime_ns > made_ns:
            return ""
        # a copy of the workspace, or a checkpoint that was put back, has other times
        if not export.is_of_checkpoint(model, _opened(scope, name, fold)):
            return ""
    return f"{out} holds {'what was selected' if job.target == SELECTED else 'these folds'}"


def _reported(scope: Scope, _: Job) -> str:
    workspace = scope.choices.workspace
    path, chosen = report_folder(workspace) / PAGE_FILE, selection_file(workspace)
    newer = path.is_file() and path.stat().st_mtime_ns >= chosen.stat().st_mtime_ns
    return f"{path} is there" if newer else ""


def _is_newer_than_validation(scope: Scope, name: str, path: Path) -> bool:
    """Whether a file is there, and no fold has been validated since it was written."""
    if not path.is_file():
        return False
    folders = (run_folder(scope.choices.workspace, name, fold) for fold in scope.chosen_folds)
    made_ns = path.stat().st_mtime_ns
    return all((folder / VALIDATION_FILE).stat().st_mtime_ns <= made_ns for folder in folders)


_OPENING: Mapping[str, Callable[[Choices], str]] = {
    "convert": _converted,
    "verify": _verified,
    "plan": _planned,
}
_CLOSING: Mapping[str, Callable[[Scope, Job], str]] = {
    "preprocess": _preprocessed,
    "train": _trained,
    "cross-validate": _cross_validated,
    "select": _selected,
    "export": _exported,
    "report": _reported,
}
