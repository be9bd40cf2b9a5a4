"""Which configurations to ship together, and what to drop of what they find.

Judged by the cross-validation alone: the mean foreground Dice over all training cases, each
segmented by networks that had not seen it. A case without a bleed counts 1 where nothing was
marked and nearly 0 where anything was (INSTANCE's smoothed Dice), so false alarms are paid for.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.errors import PlansError, TrainingError
from ichseg.files import replacing
from ichseg.model import plans, strict_json
from ichseg.model.plans import Plans
from ichseg.predict import components, prepare
from ichseg.predict.components import ComponentRule
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.crossval import merge, probabilities, rules
from training.crossval.rules import Trial
from training.data import dataset, parallel
from training.data.dataset import Case, add_workspace_argument
from training.data.workspace import (
    VALIDATION_FILE,
    fold_of,
    plans_file,
    probabilities_file,
    probabilities_folder,
    run_folder,
    run_folders,
    selection_file,
)
from training.scoring.measures import SMOOTHING

SCHEMA_VERSION = 1

_BYTES_PER_VOXEL, _BYTES_BESIDE = 16, 500_000_000
_log = logging.getLogger(__name__)
Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Candidate:
    """Configurations whose mean decides, with the cross-validated Dice.

    Attributes:
        configurations: One or two.
        mean_dice: Over labels, of ``dice``.
        dice: Of each foreground label, over all cases.
    """

    configurations: tuple[str, ...]
    mean_dice: float
    dice: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """The layout of ``selection.json``.

    Attributes:
        schema_version: Of the file.
        cases: How many cases judged.
        labels: Names of the foreground labels.
        configurations: The chosen.
        rules: Those adopted.
        mean_dice: Of the chosen with the rules.
        candidates: All that were compared, the simplest first.
        trials: Rules that were tried.
    """

    schema_version: int
    cases: int
    labels: tuple[str, ...]
    configurations: tuple[str, ...]
    rules: tuple[ComponentRule, ...]
    mean_dice: float
    candidates: tuple[Candidate, ...]
    trials: tuple[Trial, ...]

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"selection schema {self.schema_version}, this code reads {SCHEMA_VERSION}"
            )


@dataclass(frozen=True, slots=True)
class Task:
    """One case, with the fold that validated it and its mask of each configuration."""

    case: Case
    fold: str
    masks: dict[str, Path]


def select(
    workspace: Path,
    configurations: Sequence[str],
    *,
    keep_probabilities: bool = False,
    workers: int | None = None,
) -> Selection:
    """Choose configurations and rules by the cross-validation, and write ``selection.json``.

    Compared are the configurations, the simpler ones first as they are given, and then all their
    pairs, by means of the probabilities that validation has stored; a later one must be better by
    0.0001. Then each rule is tried on what the chosen found; of each label the best is adopted, if
    the label's mean Dice rises by as much. A rule changes its own label only, so no other gets
    worse.

    Args:
        workspace: With the validations of all folds.
        configurations: Which to choose from.
        keep_probabilities: Whether stored probabilities stay when all is done.
        workers: Processes; None for as many as cores and memory allow.

    Raises:
        TrainingError: Validations or stored probabilities are missing.
    """
    planned = plans.load(plans_file(workspace))
    tasks = _tasks(workspace, configurations)
    pairs = tuple(itertools.combinations(configurations, 2))
    combinations: list[tuple[str, ...]] = [*((name,) for name in configurations), *pairs]
    if pairs:
        _require_probabilities(workspace, tasks, configurations)
    if workers is None:
        size = max(_voxels(task.case) for task in tasks)
        workers = min(len(tasks), parallel.default_workers(_BYTES_BESIDE + size * _BYTES_PER_VOXEL))
    dice = _each(
        compare_case, tasks, workspace, planned, tuple(combinations), workers=workers, what="select"
    )
    candidates = tuple(
        _candidate(names, dice[:, index]) for index, names in enumerate(combinations)
    )
    chosen = _best(candidates)
    tried = rules.to_try(len(planned.labels) - 1)
    ruled = _each(
        try_rules, tasks, workspace, planned, chosen.configurations, tried,
        workers=workers, what="rules",
    )  # fmt: skip
    before = dice[:, combinations.index(chosen.configurations)]
    trials = rules.judge(tried, before, ruled, planned.labels[1:])
    adopted = tuple(trial.rule for trial in trials if trial.adopted)
    by_label = list(chosen.dice)
    for trial in trials:
        if trial.adopted:
            by_label[trial.rule.label - 1] = trial.dice
    selection = Selection(
        schema_version=SCHEMA_VERSION,
        cases=len(tasks),
        labels=planned.labels[1:],
        configurations=chosen.configurations,
        rules=adopted,
        mean_dice=float(np.mean(by_label)),
        candidates=candidates,
        trials=trials,
    )
    with replacing(selection_file(workspace)) as temporary:
        temporary.write_text(strict_json.dumps(selection), encoding="utf-8")
    if not keep_probabilities:
        for name in merge.trained_configurations(workspace):
            for folder in map(probabilities_folder, run_folders(workspace, name)):
                if folder.is_dir():
                    shutil.rmtree(folder)
    return selection


def load(workspace: Path) -> Selection:
    """Read ``selection.json``.

    Raises:
        TrainingError: There is none, or not of this version.
    """
    path = selection_file(workspace)
    if not path.is_file():
        raise TrainingError(f"{path}: no such file; `select` makes it")
    try:
        return strict_json.load(Selection, path)
    except PlansError as error:
        raise TrainingError(str(error)) from error


def compare_case(
    task: Task, workspace: Path, planned: Plans, combinations: Sequence[tuple[str, ...]]
) -> tuple[tuple[float, ...], ...]:
    """Dice of each label by each combination of configurations."""
    reference = volume.read(task.case.label or Path())
    image = volume.read(task.case.images[0])
    result = []
    for names in combinations:
        labels = found_labels(task, image, workspace, planned, names)
        result.append(_dice(labels, reference.voxels, len(planned.labels)))
    return tuple(result)


def try_rules(
    task: Task,
    workspace: Path,
    planned: Plans,
    names: tuple[str, ...],
    tried: Sequence[ComponentRule],
) -> tuple[tuple[float, ...], ...]:
    """Dice of each label with each rule alone."""
    reference = volume.read(task.case.label or Path())
    image = volume.read(task.case.images[0])
    labels = found_labels(task, image, workspace, planned, names)
    return tuple(
        _dice(
            components.apply_rules(labels, [rule], image.voxel_ml),
            reference.voxels,
            len(planned.labels),
        )
        for rule in tried
    )


def found_labels(
    task: Task, image: Volume, workspace: Path, planned: Plans, names: Sequence[str]
) -> Labels:
    """What these configurations found together in a case they had not seen, ``(z, y, x)``."""
    if len(names) == 1:
        return np.asarray(volume.read(task.masks[names[0]]).voxels, np.uint8)
    parts = []
    for name in names:
        path = probabilities_file(run_folder(workspace, name, task.fold), task.case.name)
        placement = prepare.place([image], planned, planned.configuration(name))
        parts.append((probabilities.load(path), placement))
    return prepare.restore(parts, planned)


def describe(selection: Selection) -> str:
    """What the terminal shows."""
    lines = [f"mean foreground Dice of {selection.cases} cross-validated cases"]
    for candidate in selection.candidates:
        mark = "*" if candidate.configurations == selection.configurations else " "
        lines.append(f"{mark} {candidate.mean_dice:.4f}  {' + '.join(candidate.configurations)}")
    lines += ["", "rules, each on what these found"]
    for trial in selection.trials:
        mark = "*" if trial.adopted else " "
        label = selection.labels[trial.rule.label - 1]
        lines.append(f"{mark} {trial.dice:.4f}  {label}: {rules.words(trial.rule)}: {trial.reason}")
    lines += ["", f"selected: {' + '.join(selection.configurations)}, {len(selection.rules)} rules"]
    return "\n".join(lines) + "\n"


def _tasks(workspace: Path, configurations: Sequence[str]) -> list[Task]:
    masks = {name: merge.validated_masks(workspace, name) for name in configurations}
    first = masks[configurations[0]]
    return [
        Task(
            case,
            fold_of(first[case.name].parent.parent),
            {name: found[case.name] for name, found in masks.items()},
        )
        for case in dataset.load_dataset(workspace).labelled
    ]


def _require_probabilities(
    workspace: Path, tasks: Sequence[Task], configurations: Sequence[str]
) -> None:
    for name in configurations:
        folds = sorted(
            {
                task.fold
                for task in tasks
                if not probabilities_file(
                    run_folder(workspace, name, task.fold), task.case.name
                ).is_file()
            }
        )
        if folds:
            folder = run_folder(workspace, name, folds[0])
            raise TrainingError(
                f"{probabilities_folder(folder)}: no probabilities of all its cases, which pairs "
                f"are judged by (an earlier selection removes them); delete "
                f"{folder / VALIDATION_FILE} and "
                f"run `train {name} --fold {folds[0]}`, which then only validates"
            )


def _each(
    function: object,
    tasks: Sequence[Task],
    *shared: object,
    workers: int,
    what: str,
) -> npt.NDArray[np.float64]:
    """Results of all cases in their order, ``(case, combination or rule, label)``."""
    assert callable(function)
    results = parallel.each_case(function, tasks, *shared, workers=workers)
    found: dict[str, object] = {}
    for task, result in parallel.with_progress(results, len(tasks), what):
        if isinstance(result, Exception):
            raise result
        found[task.case.name] = result
    return np.array([found[task.case.name] for task in tasks], np.float64)


def _candidate(names: tuple[str, ...], dice: npt.NDArray[np.float64]) -> Candidate:
    by_label = tuple(float(value) for value in dice.mean(axis=0))
    return Candidate(names, float(np.mean(by_label)), by_label)


def _best(candidates: Sequence[Candidate]) -> Candidate:
    """The highest mean Dice; of those within ``LEAST_GAIN`` of it the first, which is simplest."""
    highest = max(candidate.mean_dice for candidate in candidates)
    return next(c for c in candidates if c.mean_dice >= highest - rules.LEAST_GAIN)


def _dice(
    found: npt.NDArray[np.generic], reference: npt.NDArray[np.generic], labels: int
) -> tuple[float, ...]:
    """INSTANCE's Dice of each foreground label."""
    result = []
    for label in range(1, labels):
        mine, theirs = found == label, reference == label
        shared = np.count_nonzero(mine & theirs)
        both = np.count_nonzero(mine) + np.count_nonzero(theirs)
        result.append((2 * shared + SMOOTHING) / (both + SMOOTHING))
    return tuple(result)


def _voxels(case: Case) -> int:
    z, y, x = volume.stored_shape(case.images[0])
    return z * y * x


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``select`` command."""
    add_workspace_argument(parser)
    parser.add_argument(
        "--configurations",
        type=merge.parse_names,
        metavar="NAME,...",
        help="to choose from, the simplest first [all that have been trained]",
    )
    parser.add_argument(
        "--keep-probabilities",
        action="store_true",
        help="leave what validation stored for pairs, to select again with more configurations",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes [as many as cores and memory allow]"
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``select`` command."""
    names = merge.chosen_configurations(args.workspace, args.configurations)
    selection = select(
        args.workspace,
        names,
        keep_probabilities=args.keep_probabilities,
        workers=args.workers,
    )
    for line in describe(selection).splitlines():
        _log.info("%s", line)
    _log.info("wrote %s", selection_file(args.workspace))
    return 0
