"""The page of a workspace: its cross-validation, with the curves of its folds."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from ichseg.errors import TrainingError
from training.crossval import merge, selection
from training.crossval.selection import Selection
from training.crossval.unseen import unseen_cases
from training.data import dataset
from training.data.workspace import (
    PROGRESS_TABLE,
    evaluation_folder,
    evaluation_root,
    fold_of,
    run_folders,
)
from training.fit.history import EpochRow
from training.report import draw
from training.report.draw import CaseVolumes
from training.report.evaluation_page import Context
from training.scoring import summary


def write(workspace: Path, configuration: str | None, out: Path, workers: int | None) -> Path:
    """Write the page of a cross-validation.

    Args:
        workspace: A workspace with validated folds and what ``cross-validate`` wrote.
        configuration: The name of the configuration to show; None for the selected one, or else
            the one with the highest Dice.
        out: The folder of the page.
        workers: How many processes draw; None for as many as cores and memory allow.

    Returns:
        The path of the page.

    Raises:
        TrainingError: There is no evaluation, or it or what was selected is not of the cases or
            the weights that are there now.
        IchsegError: A file cannot be read or written.
    """
    found = dataset.load_dataset(workspace)
    selected = selection.current(workspace)
    name = configuration or _best(workspace, selected)
    evaluation = summary.load(evaluation_folder(workspace, name))
    if evaluation.made_from and evaluation.made_from != merge.digest_of_folds(workspace, name):
        raise TrainingError(
            f"{evaluation_folder(workspace, name)}: of other weights, images or labels than the "
            f"folds have now; run `cross-validate --configurations {name}` again"
        )
    unseen = unseen_cases(workspace, [name])
    context = Context(
        title=f"{found.name}: cross-validation of {name}",
        subtitle=f"{len(unseen)} cases, each segmented by the fold that had not seen it",
        curves=read_curves(workspace, name),
        folds={each.case.name: each.fold for each in unseen},
        selection=selected,
    )
    volumes = [
        CaseVolumes(
            each.case.name,
            each.case.images[0],
            each.masks[name],
            each.case.reference,
            found.ignore_label,
        )
        for each in unseen
    ]
    is_ct = dataset.is_ct(found.channels[0])
    return draw.write(evaluation, volumes, out, context, is_ct=is_ct, workers=workers)


def read_curves(workspace: Path, configuration: str) -> dict[str, tuple[EpochRow, ...]]:
    """What ``progress.csv`` says, by fold; folds without an epoch are left out.

    Raises:
        TrainingError: A table has other columns or values.
    """
    curves = {}
    for folder in run_folders(workspace, configuration):
        path = folder / PROGRESS_TABLE
        if not path.is_file():
            continue
        with path.open(newline="", encoding="utf-8") as stream:
            try:
                rows = tuple(_epoch(row) for row in csv.DictReader(stream))
            except (KeyError, ValueError, TypeError) as error:
                raise TrainingError(f"{path}: not the table of a training ({error!r})") from error
        if rows:
            curves[fold_of(folder)] = rows
    return curves


def _best(workspace: Path, selected: Selection | None) -> str:
    """The evaluated configuration to show: of those selected, or of all, the one with most Dice."""
    names = merge.trained_configurations(workspace)
    if selected is not None:
        names = selected.configurations
    scores: dict[str, float] = {}
    for name in names:
        folder = evaluation_folder(workspace, name)
        if (folder / summary.EVALUATION_FILE).is_file():
            found = [label.measures[0].mean or 0.0 for label in summary.load(folder).summaries]
            scores[name] = sum(found) / len(found)
    if not scores:
        raise TrainingError(
            f"{evaluation_root(workspace)}: no evaluation; `cross-validate` makes it"
        )
    return max(scores, key=lambda name: scores[name])


def _epoch(row: Mapping[str, str]) -> EpochRow:
    return EpochRow(
        epoch=int(row["epoch"]),
        train_loss=float(row["train_loss"]),
        validation_loss=float(row["validation_loss"]),
        pseudo_dice=float(row["pseudo_dice"]) if row["pseudo_dice"] else None,
        lr=float(row["lr"]),
        seconds=float(row["seconds"]),
        data_wait_s=float(row["data_wait_s"]),
    )
