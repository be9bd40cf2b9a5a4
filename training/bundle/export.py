"""Write finished folds as a weights bundle: tensors in fp16 and ``model.json``, nothing pickled.

May be run again whenever one more fold has finished: what is in the bundle already comes out byte
for byte the same and is not checked again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ichseg.errors import TrainingError, WeightsError
from ichseg.files import UNFINISHED
from ichseg.model import bundle, plans, strict_json
from ichseg.model.bundle import Member, Model
from ichseg.model.plans import Plans
from ichseg.predict.components import ComponentRule
from ichseg.scan import volume
from training.bundle import model_card
from training.crossval import selection
from training.crossval.validate import score_labels, segment_case
from training.data import dataset
from training.data.workspace import (
    BEST_CHECKPOINT,
    CONFIG_FILE,
    LATEST_CHECKPOINT,
    plans_file,
    run_folder,
    selection_file,
)
from training.fit.checkpoint import load_checkpoint
from training.fit.configuration import TrainingConfig
from training.fit.fold_run import FoldRun, open_run

INPUT_SLUG, OUTPUT_SLUG = "head-ct", "intracranial-hemorrhage-segmentation"
CHECKPOINTS = {"latest": LATEST_CHECKPOINT, "best": BEST_CHECKPOINT}
MAX_DICE_CHANGE = 1e-3  # that rounding the weights may cost or gain in any checked case

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """A fold that has finished: its run and a checkpoint of it."""

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
    name: str | None = None,
    version: str = "1",
    description: str | None = None,
    input_slug: str = INPUT_SLUG,
    output_slug: str = OUTPUT_SLUG,
) -> Model:
    """Write the bundle of those folds that have finished training, and its model card.

    Args:
        workspace: With the runs.
        configurations: Those whose mean decides; of a cascade the second stage, the first one
            comes with it.
        folds: Those wanted; unfinished ones are left out, with a line in the log.
        out: The bundle's folder.
        rules: What is dropped of the labels found.
        checkpoint: ``latest`` or ``best``.
        check_cases: Validation cases of each fold to score before and after rounding.
        name: Of the bundle; None for that of the dataset and the configurations.
        version: Of the bundle.
        description: What it is and is not for; None for what the plans tell.
        input_slug: Grand Challenge socket of the CT.
        output_slug: And of the mask.

    Raises:
        TrainingError: No fold of a configuration has finished, or rounding changes a mean Dice by
            more than 0.001.
    """
    trained = [
        part
        for configuration in _with_first_stages(workspace, configurations)
        for part in _finished(workspace, configuration, folds, checkpoint)
    ]
    known = _known_members(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=UNFINISHED) as beside:
        members = []
        for part in trained:
            weights = part.checkpoint["network"]
            member = bundle.save_member(
                Path(beside), part.run.configuration.name, part.fold, weights
            )
            if member not in known:
                check_rounding(workspace, part.run, part.fold, weights, check_cases)
            members.append(member)
        for member in members:
            (Path(beside) / member.file).replace(out / member.file)
    model = _describe(workspace, trained, members, checkpoint, version)
    stages = {part.run.configuration.previous_stage for part in trained}
    model = dataclasses.replace(
        model,
        name=name or f"{model.plans.dataset}-{'+'.join(configurations)}",
        description=description or describe_plans(model.plans),
        input_slug=input_slug,
        output_slug=output_slug,
        rules=tuple(rules),
        averages=tuple(configurations) if stages & set(configurations) else (),
    )
    bundle.save_model(out, model)
    model_card.write(model, workspace, out)
    _remove_others(out, members)
    return model


def describe_plans(planned: Plans) -> str:
    """What a bundle is and is not for, by its plans."""
    return (
        f"Segments {', '.join(planned.labels[1:])}. Trained on {planned.dataset}. "
        "For research, not for diagnosis."
    )


def _with_first_stages(workspace: Path, configurations: Sequence[str]) -> tuple[str, ...]:
    planned = plans.load(plans_file(workspace))
    names: list[str] = []
    for name in configurations:
        previous = planned.configuration(name).previous_stage
        names += [previous, name] if previous is not None else [name]
    return tuple(dict.fromkeys(names))


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
        config = strict_json.load(TrainingConfig, path / CONFIG_FILE)
        run = open_run(workspace, configuration, fold, config)
        reason = load_checkpoint(path / LATEST_CHECKPOINT, run.configuration)["finished"]
        if reason is None:
            _log.info("%s fold %s: training has not ended, left out", configuration, fold)
            continue
        raw = load_checkpoint(path / CHECKPOINTS[checkpoint], run.configuration)
        finished.append(Trained(run, fold, raw))
    if not finished:
        raise TrainingError(
            f"{run_folder(workspace, configuration, '*')}: none of the folds {', '.join(folds)} "
            "has finished; `train` them first"
        )
    return finished


def check_rounding(
    workspace: Path, run: FoldRun, fold: str, weights: dict[str, Tensor], check_cases: int
) -> None:
    """Score the fold on some of its validation cases with the weights as trained and as stored.

    Cases without any reference label are passed over: their Dice is 0 or undefined by one voxel.

    Raises:
        TrainingError: The mean Dice of a label changes by more than 0.001, or is undefined for one
            of the two.
    """
    rounded = {key: value.half().float() for key, value in weights.items()}
    cases = {case.name: case for case in dataset.load_dataset(workspace).labelled}
    scores: dict[str, list[tuple[float, float]]] = {}
    left = check_cases
    for name in run.spec.validation:
        reference = volume.read(cases[name].label or Path()).voxels
        if left == 0 or not reference.any():
            continue
        left -= 1
        before = score_labels(segment_case(cases[name], run, weights), reference, run.plans)
        after = score_labels(segment_case(cases[name], run, rounded), reference, run.plans)
        _log.info("fold %s, case %s: Dice %s as trained, %s in fp16", fold, name, before, after)
        for label, old in before.items():
            new = after[label]
            if (old is None) != (new is None):
                raise TrainingError(
                    f"fold {fold}, case {name}: Dice of {label} is {old} as trained, {new} in fp16"
                )
            if old is not None and new is not None:
                scores.setdefault(label, []).append((old, new))
    for label, pairs in scores.items():
        old, new = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        if abs(old - new) > MAX_DICE_CHANGE:
            raise TrainingError(
                f"fold {fold}: mean Dice of {label} in {len(pairs)} cases is {old:.4f} as trained, "
                f"{new:.4f} in fp16; expected a change of at most {MAX_DICE_CHANGE}"
            )


def _describe(
    workspace: Path,
    trained: Sequence[Trained],
    members: Sequence[Member],
    checkpoint: str,
    version: str,
) -> Model:
    run = trained[0].run
    data = dataset.load_dataset(workspace)
    dimensions = max(part.run.configuration.architecture.dimensions for part in trained)
    folds = {
        f"{part.run.configuration.name} fold {part.fold}": {
            "epochs": part.checkpoint["schedule"]["epoch"],
            "minutes": round(part.checkpoint["elapsed_s"] / 60, 1),
            "ended": part.checkpoint["finished"] or "best checkpoint",
            "config": strict_json.to_json(part.run.config),
        }
        for part in trained
    }
    return Model(
        schema_version=bundle.SCHEMA_VERSION,
        name=run.plans.dataset,
        version=version,
        description=describe_plans(run.plans),
        input_slug=INPUT_SLUG,
        output_slug=OUTPUT_SLUG,
        average="probabilities",
        mirror_axes=tuple(range(3 - dimensions, 3)),
        plans=run.plans,
        members=tuple(members),
        provenance={
            "dataset": data.name,
            "cases": len(data.labelled),
            "recipe": run.config.recipe,
            "checkpoint": checkpoint,
            "folds": folds,
            "torch": torch.__version__,
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        },
    )


def _known_members(out: Path) -> tuple[Member, ...]:
    """What an earlier export has written and checked."""
    try:
        return bundle.load_model(out).members
    except WeightsError:
        return ()


def _remove_others(out: Path, members: Sequence[Member]) -> None:
    """Weights of an earlier bundle that ``model.json`` no longer names."""
    for path in out.glob("*.safetensors"):
        if path.name not in {member.file for member in members}:
            path.unlink()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``export`` command."""
    dataset.add_workspace_argument(parser)
    parser.add_argument(
        "--configuration",
        metavar="NAME",
        help="this one, without post-processing [what `select` has selected, with its rules]",
    )
    parser.add_argument(
        "--folds",
        default="0,1,2,3,4",
        metavar="K,K,...",
        help="the finished of these [%(default)s]",
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
    parser.add_argument("--name", help="[the dataset's and the configurations']")
    parser.add_argument("--model-version", default="1", help="[%(default)s]")
    parser.add_argument(
        "--description", help="what it is and is not for [the labels, the dataset, for research]"
    )
    parser.add_argument(
        "--input-slug",
        default=INPUT_SLUG,
        metavar="SLUG",
        help="Grand Challenge socket [%(default)s]",
    )
    parser.add_argument(
        "--output-slug", default=OUTPUT_SLUG, metavar="SLUG", help="the mask's socket [%(default)s]"
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``export`` command."""
    if args.threads:
        torch.set_num_threads(args.threads)
    configurations: tuple[str, ...] = (args.configuration,)
    rules: tuple[ComponentRule, ...] = ()
    if args.configuration is None:
        if not selection_file(args.workspace).is_file():
            raise TrainingError(
                f"{args.workspace}: nothing has been selected; `cross-validate` and `select`, "
                "or name a --configuration"
            )
        selected = selection.load(args.workspace)
        configurations, rules = selected.configurations, selected.rules
    model = export(
        args.workspace,
        configurations,
        [fold.strip() for fold in args.folds.split(",")],
        args.out,
        rules=rules,
        checkpoint=args.checkpoint,
        check_cases=args.check_cases,
        name=args.name,
        version=args.model_version,
        description=args.description,
        input_slug=args.input_slug,
        output_slug=args.output_slug,
    )
    names = ", ".join(f"{member.configuration} fold {member.fold}" for member in model.members)
    _log.info("%s: %s", args.out, names)
    return 0
