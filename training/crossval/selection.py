"""Which configurations to ship together, and which components of what they find to drop.

The cross-validation alone judges: the mean foreground Dice over all training cases, each segmented
by networks that had not seen it. A case without a bleed counts 1 where nothing was marked and
nearly 0 where anything was (INSTANCE's smoothed Dice), so false alarms are paid for.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.errors import IchsegError, PlansError, TrainingError
from ichseg.files import replacing
from ichseg.model import strict_json
from ichseg.model.plans import Plans
from ichseg.model.rules import ComponentRule
from ichseg.wording import counted
from training.crossval import merge, rules, unseen
from training.crossval.rules import Trial
from training.crossval.unseen import UnseenCase
from training.data import parallel
from training.data.dataset import add_workspace_argument
from training.data.workspace import (
    probabilities_folder,
    run_folders,
    selection_file,
)
from training.planning.planned import load_plans

SCHEMA_VERSION = 1

_BYTES_PER_VOXEL, _BYTES_BESIDE = 16, 500_000_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One or two configurations whose mean decides, and how they did in the cross-validation.

    Attributes:
        configurations: Their names.
        mean_dice: The mean of ``dice`` over the foreground labels.
        dice: The Dice of each foreground label, averaged over all cases.
    """

    configurations: tuple[str, ...]
    mean_dice: float
    dice: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """The layout of ``selection.json``.

    Attributes:
        schema_version: The version of this layout.
        cases: How many cases were judged.
        labels: The names of the foreground labels, or of the regions.
        configurations: The names of the chosen configurations.
        rules: The component rules that were adopted.
        mean_dice: The mean foreground Dice of the chosen configurations with these rules.
        candidates: All candidates that were compared, the simplest first.
        trials: All component rules that were tried.
        made_from: For each configuration that was compared a digest of its folds' weights, see
            ``merge.digest_of_folds``; None in files of earlier versions.
    """

    schema_version: int
    cases: int
    labels: tuple[str, ...]
    configurations: tuple[str, ...]
    rules: tuple[ComponentRule, ...]
    mean_dice: float
    candidates: tuple[Candidate, ...]
    trials: tuple[Trial, ...]
    made_from: Mapping[str, str] | None = strict_json.optional(None)

    def __post_init__(self) -> None:
        strict_json.check_schema("selection", self.schema_version, SCHEMA_VERSION)


def select(
    workspace: Path,
    configurations: Sequence[str],
    *,
    most_ml: float | None = None,
    drop_probabilities: bool = False,
    workers: int | None = None,
) -> Selection:
    """Choose configurations and rules by the cross-validation, and write ``selection.json``.

    The configurations are compared by themselves, in the order in which they are given, and then in
    pairs, by means of the probabilities that validation has stored. A later candidate must be
    better by 0.0001. Then each component rule is tried on what the chosen candidate found. Of each
    label's rules the best is adopted, if the label's mean Dice rises by as much. A rule changes its
    own label only, so no other gets worse. Of regions, which share labels, none is tried.

    Args:
        workspace: The folder with the validations of all folds.
        configurations: The names to choose from, the simplest first.
        most_ml: The volume of the largest part that a rule may drop, where small lesions matter
            more than a mean Dice tells; None for any.
        drop_probabilities: Whether to remove the stored probabilities when all is done. Without
            them a configuration that is trained later cannot be paired with these.
        workers: How many processes to use; None for as many as cores and memory allow.

    Raises:
        TrainingError: Validations or stored probabilities are missing.
    """
    planned = load_plans(workspace)
    cases = unseen.unseen_cases(workspace, configurations)
    # before masks and references are read: a later change is noticed
    made_from = {name: merge.digest_of_folds(workspace, name) for name in configurations}
    combinations = _combinations(configurations)
    if len(configurations) > 1:
        unseen.require_probabilities(
            workspace, cases, configurations, regions=bool(planned.regions)
        )
    if workers is None:
        images = [task.case.images[0] for task in cases]
        workers = parallel.workers_for(images, _BYTES_PER_VOXEL, _BYTES_BESIDE)
    dice = _each(
        unseen.compare_case, cases, workspace, planned, combinations,
        workers=workers, what="select",
    )  # fmt: skip
    candidates = tuple(_candidate(names, dice[:, i]) for i, names in enumerate(combinations))
    chosen = _best(candidates)
    plain = dice[:, combinations.index(chosen.configurations)]
    trials = _try_rules(workspace, planned, cases, chosen, plain, most_ml, workers)
    by_label = list(chosen.dice)
    for trial in trials:
        if trial.adopted:
            by_label[trial.rule.label - 1] = trial.dice
    selection = Selection(
        schema_version=SCHEMA_VERSION,
        cases=len(cases),
        labels=tuple(region.name for region in planned.foreground),
        configurations=chosen.configurations,
        rules=tuple(trial.rule for trial in trials if trial.adopted),
        mean_dice=float(np.mean(by_label)),
        candidates=candidates,
        trials=trials,
        made_from=made_from,
    )
    with replacing(selection_file(workspace)) as temporary:
        temporary.write_text(strict_json.dumps(selection), encoding="utf-8")
    if drop_probabilities:
        _remove_probabilities(workspace)
    return selection


def load(workspace: Path) -> Selection:
    """Read ``selection.json``.

    Raises:
        TrainingError: The file is missing, damaged or of another version.
    """
    path = selection_file(workspace)
    if not path.is_file():
        raise TrainingError(f"{path}: no such file; `select` makes it")
    try:
        return strict_json.load(Selection, path)
    except PlansError as error:
        raise TrainingError(str(error)) from error


def require_current(workspace: Path, selection: Selection) -> None:
    """Refuse a selection of which a configuration that was compared has other weights by now.

    One that was not chosen may be gone.

    Raises:
        TrainingError: It was made from other weights; says what to do.
    """
    made_from = selection.made_from or {}
    there = [name for name in merge.trained_configurations(workspace) if name in made_from]
    for name in dict.fromkeys((*selection.configurations, *there)):
        if made_from.get(name) != merge.digest_of_folds(workspace, name):
            raise TrainingError(
                f"{selection_file(workspace)}: made from other weights, images or labels than the "
                f"folds of {name} have now; run `cross-validate` and `select` again"
            )


def current(workspace: Path) -> Selection | None:
    """The selection of the folds as they are now, if there is one; says why one is passed over."""
    if not selection_file(workspace).is_file():
        return None
    try:
        found = load(workspace)
        require_current(workspace, found)
    except IchsegError as error:
        _log.warning("%s; it is left out here", error)
        return None
    return found


def describe(selection: Selection) -> str:
    """What the terminal shows of a selection."""
    lines = [f"mean foreground Dice of {selection.cases} cross-validated cases"]
    for candidate in selection.candidates:
        mark = "*" if candidate.configurations == selection.configurations else " "
        lines.append(f"{mark} {candidate.mean_dice:.4f}  {' + '.join(candidate.configurations)}")
    tried = "each on what these found" if selection.trials else "none, which regions do not have"
    lines += ["", f"rules, {tried}"]
    for trial in selection.trials:
        mark = "*" if trial.adopted else " "
        label = selection.labels[trial.rule.label - 1]
        lines.append(f"{mark} {trial.dice:.4f}  {label}: {rules.words(trial.rule)}: {trial.reason}")
    names, adopted = " + ".join(selection.configurations), len(selection.rules)
    lines += ["", f"selected: {names}, {counted(adopted, 'rule')}"]
    return "\n".join(lines) + "\n"


def _combinations(configurations: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Each configuration by itself, then each pair."""
    return (*((name,) for name in configurations), *itertools.combinations(configurations, 2))


def _candidate(names: tuple[str, ...], dice: npt.NDArray[np.float64]) -> Candidate:
    """A candidate from its Dice, ``(case, label)``."""
    by_label = tuple(float(value) for value in dice.mean(axis=0))
    return Candidate(names, float(np.mean(by_label)), by_label)


def _best(candidates: Sequence[Candidate]) -> Candidate:
    """The highest mean Dice; of those within ``LEAST_GAIN`` of it the first, which is simplest."""
    highest = max(candidate.mean_dice for candidate in candidates)
    return next(c for c in candidates if c.mean_dice >= highest - rules.LEAST_GAIN)


def _try_rules(
    workspace: Path,
    planned: Plans,
    cases: Sequence[UnseenCase],
    chosen: Candidate,
    plain: npt.NDArray[np.float64],
    most_ml: float | None,
    workers: int,
) -> tuple[Trial, ...]:
    """Try each component rule on what the chosen candidate found; ``plain`` is its Dice without."""
    if planned.regions:
        return ()
    known = not unseen.without_probabilities(workspace, cases, chosen.configurations, regions=False)
    tried = rules.to_try(len(planned.labels) - 1, probabilities=known, most_ml=most_ml)
    if not tried:
        return ()
    ruled = _each(
        unseen.try_rules, cases, workspace, planned, chosen.configurations, tried,
        workers=workers, what="rules",
    )  # fmt: skip
    return rules.judge(tried, plain, ruled, planned.labels[1:])


def _each(
    function: Callable[..., object],
    cases: Sequence[UnseenCase],
    *shared: object,
    workers: int,
    what: str,
) -> npt.NDArray[np.float64]:
    """Results of all cases in their order, ``(case, combination or rule, label)``."""
    results = parallel.each_case(function, cases, *shared, workers=workers)
    found: dict[str, object] = {}
    for task, result in parallel.with_progress(results, len(cases), what):
        if isinstance(result, Exception):
            raise result
        found[task.case.name] = result
    return np.array([found[task.case.name] for task in cases], np.float64)


def _remove_probabilities(workspace: Path) -> None:
    for name in merge.trained_configurations(workspace):
        for folder in map(probabilities_folder, run_folders(workspace, name)):
            if folder.is_dir():
                shutil.rmtree(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the ``select`` command."""
    add_workspace_argument(parser)
    parser.add_argument(
        "--configurations",
        type=merge.parse_names,
        metavar="NAME,...",
        help="to choose from, the simplest first [all that have been trained]",
    )
    parser.add_argument(
        "--drop-at-most-ml",
        type=float,
        metavar="ML",
        help="try no rule that may drop a larger part, where to miss a small lesion is worse than "
        "to mark what is none [any]",
    )
    parser.add_argument(
        "--drop-probabilities",
        action="store_true",
        help="remove what validation stored for pairs; a configuration that is trained later "
        "cannot be paired with these then",
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
        most_ml=args.drop_at_most_ml,
        drop_probabilities=args.drop_probabilities,
        workers=args.workers,
    )
    for line in describe(selection).splitlines():
        _log.info("%s", line)
    _log.info("wrote %s", selection_file(args.workspace))
    return 0
