"""Write finished folds as a weights bundle: tensors in fp16 and ``model.json``, nothing pickled.

``export`` may be run again whenever one more fold has finished: what is in the bundle already comes
out byte for byte the same and is not checked again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ichseg.errors import TrainingError, WeightsError
from ichseg.files import make_folder, remove_unfinished, unfinished_folder
from ichseg.model import bundle, strict_json
from ichseg.model.bundle import Member, Model
from ichseg.model.plans import Plans
from ichseg.model.rules import ComponentRule
from training.bundle import model_card
from training.bundle.identity import (
    BY_DEFAULT,
    Identity,
    add_identity_arguments,
    identity_from,
    warn_of_channels,
)
from training.bundle.rounding import RoundingError, check_rounding
from training.crossval import cascade_labels, selection
from training.data import dataset, splits
from training.data.dataset import Dataset
from training.data.workspace import (
    ALL_FOLD,
    BEST_CHECKPOINT,
    CONFIG_FILE,
    LATEST_CHECKPOINT,
    run_folder,
    selection_file,
)
from training.fit.checkpoint import digest_of, load_checkpoint, weights_digest
from training.fit.configuration import load_settings
from training.fit.fold_run import FoldRun, open_run
from training.planning.planned import load_plans

CHECKPOINTS = {"latest": LATEST_CHECKPOINT, "best": BEST_CHECKPOINT}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """A fold that has finished training.

    Attributes:
        run: The fold's run.
        fold: ``0``, ``1``, ... or ``all``.
        checkpoint: The contents of the checkpoint whose weights are exported.
    """

    run: FoldRun
    fold: str
    checkpoint: dict[str, Any]


def export(
    workspace: Path,
    configurations: Sequence[str],
    folds: Sequence[str],
    out: Path,
    *,
    rules: Sequence[ComponentRule] = (),
    checkpoint: str = "latest",
    check_cases: int = 2,
    identity: Identity = BY_DEFAULT,
    card_notes: str = "",
) -> Model:
    """Write the bundle of those folds that have finished training, and its model card.

    Args:
        workspace: The folder with the runs.
        configurations: Names of the configurations whose mean decides. The first stage of a
            cascade comes along with its second and is not named.
        folds: The folds that are wanted; unfinished ones are left out, with a line in the log.
        out: The bundle's folder.
        rules: Which components the bundle drops from the labels it finds.
        checkpoint: Whose weights to take, ``latest`` or ``best``.
        check_cases: How many validation cases of each fold to score before and after rounding.
        identity: What the bundle is called; without a name or a description the dataset and the
            plans give them.
        card_notes: Markdown that the model card ends with, see ``model_card.write``.

    Returns:
        What was written to ``model.json``.

    Raises:
        TrainingError: No fold of a configuration has finished.
        RoundingError: Rounding changes a mean Dice by more than 0.001.
    """
    planned = load_plans(workspace)
    trained = [
        part
        for configuration in planned.with_first_stages(configurations)
        for part in _finished(workspace, configuration, folds, checkpoint)
    ]
    data = dataset.load_dataset(workspace)
    warn_of_channels(data.channels)
    known = _checked_cases(out)
    checked: list[int] = []
    make_folder(out)
    remove_unfinished(out)
    with unfinished_folder(out) as beside:
        members = []
        for part in trained:
            weights = part.checkpoint["network"]
            name = part.run.configuration.name
            member = bundle.save_member(beside, name, part.fold, weights)
            enough = min(check_cases, len(part.run.spec.validation))
            if known.get(member, -1) < enough:
                checked.append(check_rounding(data, part.run, weights, check_cases))
            else:
                checked.append(known[member])
            members.append(member)
        for member in members:
            (beside / member.file).replace(out / member.file)
    stages = {part.run.configuration.previous_stage for part in trained}
    planned = trained[0].run.plans
    model = Model(
        schema_version=bundle.SCHEMA_VERSION,
        name=identity.name or f"{planned.dataset}-{'+'.join(configurations)}",
        version=identity.version,
        description=identity.description or describe_plans(planned),
        input_slug=identity.input_slug,
        output_slug=identity.output_slug,
        licence=identity.licence,
        average=trained[0].run.average,
        mirror_axes=_mirror_axes(trained),
        plans=dataclasses.replace(planned, sources=""),
        members=tuple(members),
        provenance=_provenance(data, trained, checked, checkpoint),
        rules=tuple(rules),
        averages=tuple(configurations) if stages & set(configurations) else (),
    )
    model_card.write(model, workspace, out, card_notes)
    bundle.save_model(out, model)  # last, as a folder that has it counts as a bundle
    _remove_others(out, members)
    return model


def is_of_checkpoint(model: Model, run: FoldRun) -> bool:
    """Whether a bundle holds the weights that a fold has now, whatever the times of the files say.

    Bundles of earlier versions do not tell, and count as holding others.
    """
    file = CHECKPOINTS[model.provenance.get("checkpoint", "latest")]
    now = digest_of(run.folder / file, run.plans, run.configuration, run.cases)
    held = model.provenance.get("folds", {}).get(
        splits.fold_key(run.configuration.name, run.fold), {}
    )
    return bool(held.get("weights") == now)


def describe_plans(planned: Plans) -> str:
    """Say what a bundle is for and what not, by its plans."""
    names = ", ".join(region.name for region in planned.foreground)
    return f"Segments {names}. Trained on {planned.dataset}. For research, not for diagnosis."


def _wanted_folds(workspace: Path, text: str | None) -> list[str]:
    """The folds that ``--folds`` names, or all into which the cases are split.

    Raises:
        TrainingError: There is no such fold.
    """
    names = [case.name for case in dataset.load_dataset(workspace).labelled]
    every = [str(number) for number in range(len(splits.find_splits(workspace, names)))]
    if text is None:
        return every
    named = [fold.strip() for fold in text.split(",")]
    for fold in named:
        if fold not in (*every, ALL_FOLD):
            raise TrainingError(f"--folds {fold}, expected 0 to {every[-1]}, or {ALL_FOLD}")
    if len(set(named)) < len(named):
        raise TrainingError(f"--folds {text} names a fold twice")
    return named


def _finished(
    workspace: Path, configuration: str, folds: Sequence[str], checkpoint: str
) -> list[Trained]:
    """Those of a configuration's folds that have finished."""
    finished = []
    for fold in folds:
        path = run_folder(workspace, configuration, fold)
        if not (path / LATEST_CHECKPOINT).exists() or not (path / CONFIG_FILE).exists():
            _log.info("%s fold %s: not trained yet, left out", configuration, fold)
            continue
        config = load_settings(path / CONFIG_FILE)
        # the weights are wanted, and a few predictions: wherever and however it was trained
        here = dataclasses.replace(config, device="auto", precision="auto")
        run = dataclasses.replace(open_run(workspace, configuration, fold, here), config=config)
        its = run.plans, run.configuration, run.cases
        raw = load_checkpoint(path / LATEST_CHECKPOINT, *its)
        if raw["finished"] is None:
            _log.info("%s fold %s: training has not ended, left out", configuration, fold)
            continue
        wanted = path / CHECKPOINTS[checkpoint]
        if wanted.name != LATEST_CHECKPOINT:
            raw = load_checkpoint(wanted, *its)
        cascade_labels.require_same_first_stage(
            workspace, run.plans, run.configuration, wanted, raw
        )
        finished.append(Trained(run, fold, raw))
    if not finished:
        raise TrainingError(
            f"{run_folder(workspace, configuration, '*')}: none of the folds {', '.join(folds)} "
            "has finished; `train` them first"
        )
    return finished


def _mirror_axes(trained: Sequence[Trained]) -> tuple[int, ...]:
    """The axes that every network's training mirrored; of a 2D network the first is not asked."""
    runs = [part.run for part in trained]
    dimensions = [run.configuration.architecture.dimensions for run in runs]
    return tuple(
        axis
        for axis in range(3 - max(dimensions), 3)
        if all(
            axis in run.mirror_axes or axis < 3 - count
            for run, count in zip(runs, dimensions, strict=True)
        )
    )


def _provenance(
    data: Dataset, trained: Sequence[Trained], checked: Sequence[int], checkpoint: str
) -> dict[str, Any]:
    """From what the bundle was made, for people and for the model card."""
    folds = {
        splits.fold_key(part.run.configuration.name, part.fold): {
            "epochs": part.checkpoint["schedule"]["epoch"],
            "minutes": round(part.checkpoint["elapsed_s"] / 60, 3),
            "ended": part.checkpoint["finished"] or "best checkpoint",
            "checked_cases": count,
            "trained_on": splits.digest_names(part.run.cases.train),
            "weights": weights_digest(part.checkpoint["network"]),
            "config": strict_json.to_json(part.run.config),
        }
        for part, count in zip(trained, checked, strict=True)
    }
    return {
        "dataset": data.name,
        "cases": len({name for part in trained for name in part.run.cases.train}),
        "recipe": trained[0].run.config.recipe,
        "checkpoint": checkpoint,
        "folds": folds,
        "torch": torch.__version__,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    }


def _checked_cases(out: Path) -> dict[Member, int]:
    """What an earlier export has written, and on how many cases it has checked the rounding."""
    try:
        model = bundle.load_model(out)
    except WeightsError:
        return {}
    folds = model.provenance.get("folds", {})
    return {
        member: folds.get(splits.fold_key(member.configuration, member.fold), {}).get(
            "checked_cases", 0
        )
        for member in model.members
    }


def _read_notes(path: Path | None) -> str:
    """The notes for the model card; none without a file."""
    try:
        return "" if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: cannot read as text ({error})") from error


def _remove_others(out: Path, members: Sequence[Member]) -> None:
    """Remove weights of an earlier bundle that ``model.json`` no longer names."""
    for path in out.glob("*.safetensors"):
        if path.name not in {member.file for member in members}:
            path.unlink()


def _unchecked(args: argparse.Namespace) -> str:
    """The command that exports the same networks unchecked; `run` has no flag that would say so."""
    words = ["export", "--workspace", str(args.workspace)]
    if args.configuration is not None:
        words += ["--configuration", args.configuration]
    words += ["--out", str(args.out)]
    if args.folds is not None:
        words += ["--folds", args.folds]
    return shlex.join([*words, "--checkpoint", args.checkpoint, "--check-cases", "0"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the ``export`` command."""
    dataset.add_workspace_argument(parser)
    parser.add_argument(
        "--configuration",
        metavar="NAME",
        help="this one, without post-processing [what `select` has selected, with its rules]",
    )
    parser.add_argument(
        "--folds",
        metavar="K,K,...",
        help="those of these that are finished [all folds of the workspace]",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the bundle's folder"
    )
    parser.add_argument(
        "--checkpoint", choices=CHECKPOINTS, default="latest", help="which weights [%(default)s]"
    )
    parser.add_argument(
        "--check-cases",
        type=int,
        default=4,
        metavar="N",
        help="validation cases of a fold scored before and after rounding [%(default)s]",
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="of torch; 0 leaves it to torch [0]"
    )
    parser.add_argument(
        "--card-notes",
        type=Path,
        metavar="FILE",
        help="Markdown that the model card ends with: sources, figures, what is not known",
    )
    add_identity_arguments(
        parser,
        name="the dataset's and the configurations'",
        description="the labels, the dataset, for research",
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``export`` command."""
    if args.threads:
        torch.set_num_threads(args.threads)
    card_notes = _read_notes(args.card_notes)
    configurations: tuple[str, ...] = (args.configuration,)
    rules: tuple[ComponentRule, ...] = ()
    if args.configuration is None:
        if not selection_file(args.workspace).is_file():
            raise TrainingError(
                f"{args.workspace}: nothing has been selected; `cross-validate` and `select`, "
                "or name a --configuration"
            )
        selected = selection.load(args.workspace)
        selection.require_current(args.workspace, selected)
        configurations, rules = selected.configurations, selected.rules
    try:
        model = export(
            args.workspace,
            configurations,
            _wanted_folds(args.workspace, args.folds),
            args.out,
            rules=rules,
            checkpoint=args.checkpoint,
            check_cases=args.check_cases,
            identity=identity_from(args),
            card_notes=card_notes,
        )
    except RoundingError as error:
        raise TrainingError(
            f"{error}. A network that has hardly learned is often undecided, and rounding decides: "
            f"train it longer, or write the bundle regardless with `{_unchecked(args)}`"
        ) from error
    names = ", ".join(f"{member.configuration} fold {member.fold}" for member in model.members)
    _log.info("%s: %s", args.out, names)
    return 0
