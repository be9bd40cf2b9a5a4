"""A page of an evaluation: how well a training did, the worst cases first, each to look at.

``WORKSPACE/report/index.html`` opens from a disk without a network; its folder can be copied.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg.errors import DatasetError, IchsegError, TrainingError
from ichseg.files import is_named_as_scan, stem_of
from ichseg.report.case_files import write_case
from ichseg.scan import volume
from ichseg.wording import byte_size
from training.crossval import merge, selection
from training.crossval.selection import Selection
from training.data import dataset, parallel, splits
from training.data.workspace import (
    PROGRESS_TABLE,
    evaluation_folder,
    evaluation_root,
    fold_of,
    report_folder,
    run_folders,
    selection_file,
)
from training.fit.history import EpochRow
from training.report import evaluation_page
from training.report.evaluation_page import Context
from training.scoring import summary
from training.scoring.summary import Evaluation

# Peak of one worker: an image as float, two masks, their copies; and the libraries.
_BYTES_PER_VOXEL, _BYTES_BESIDE = 24, 400_000_000


@dataclass(frozen=True, slots=True)
class Files:
    """What is shown of one case.

    Attributes:
        name: Of the case.
        image, prediction, reference: Volumes in one grid.
    """

    name: str
    image: Path
    prediction: Path
    reference: Path


def of_workspace(
    workspace: Path, configuration: str | None, out: Path, workers: int | None
) -> Path:
    """The page of a cross-validation.

    Args:
        workspace: With validated folds and what ``cross-validate`` wrote.
        configuration: Whose; None for the selected one, or else the one with the highest Dice.
        out: Folder of the page.
        workers: Processes; None for as many as cores and memory allow.

    Raises:
        TrainingError: There is no evaluation, or it is not of the cases that are there now.
        IchsegError: A file cannot be read or written.
    """
    found = dataset.load_dataset(workspace)
    selected = _selection(workspace)
    name = configuration or _best(workspace, selected)
    evaluation = summary.load(evaluation_folder(workspace, name))
    masks = merge.validated_masks(workspace, name)
    cases = {case.name: case for case in found.labelled}
    files = [
        Files(case, cases[case].images[0], mask, cases[case].label or Path())
        for case, mask in masks.items()
    ]
    context = Context(
        title=f"{found.name}: cross-validation of {name}",
        subtitle=f"{len(files)} cases, each segmented by the fold that had not seen it",
        curves=read_curves(workspace, name),
        folds=_folds(workspace, list(masks)),
        selection=selected,
    )
    return write(
        evaluation, files, out, context, is_ct=dataset.is_ct(found.channels[0]), workers=workers
    )


def write(
    evaluation: Evaluation,
    files: Sequence[Files],
    out: Path,
    context: Context,
    *,
    is_ct: bool,
    workers: int | None = None,
) -> Path:
    """The page of any evaluation.

    Args:
        evaluation: Scores.
        files: Of the same cases.
        out: Folder, made if need be.
        context: What else there is to say.
        is_ct: Whether images are in HU.
        workers: Processes; None for as many as cores and memory allow.

    Raises:
        TrainingError: The cases are not the same.
        IchsegError: A file cannot be read or written.
    """
    scored, there = {case.name for case in evaluation.cases}, {case.name for case in files}
    if scored != there:
        odd = sorted(scored ^ there)
        where = "evaluation" if odd[0] in scored else "files"
        raise TrainingError(
            f"the evaluation has {len(scored)} cases and there are files of {len(there)}; "
            f"{odd[0]} is only in the {where}: evaluate them again"
        )
    if workers is None:
        voxels = max(_voxels(case.image) for case in files)
        size = _BYTES_BESIDE + voxels * _BYTES_PER_VOXEL
        workers = min(len(files), parallel.default_workers(size))
    results = parallel.each_case(draw_case, files, out, is_ct, workers=workers)
    for case, result in parallel.with_progress(results, len(files), "report"):
        if isinstance(result, IchsegError):
            raise result
        if isinstance(result, Exception):
            raise TrainingError(f"{case.name}: {type(result).__name__}: {result}") from result
    return evaluation_page.write(out, evaluation, context)


def draw_case(case: Files, out: Path, is_ct: bool) -> None:
    """Pictures and volumes of one case.

    Raises:
        InputError: A file cannot be read.
        DatasetError: Sizes differ.
    """
    image = volume.read(case.image)
    masks = {}
    for name, path in (("reference", case.reference), ("prediction", case.prediction)):
        masks[name] = volume.read(path)
        if masks[name].voxels.shape != image.voxels.shape:
            raise DatasetError(
                f"{path}: shape {masks[name].voxels.shape}, expected {image.voxels.shape} as of "
                f"{case.image}"
            )
    write_case(out, case.name, image, masks, is_ct=is_ct)


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


def find_volumes(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The file of each case below a folder: its name, or for images that and ``_0000``.

    Raises:
        DatasetError: One is missing.
    """
    there = {
        stem_of(path): path
        for path in sorted(folder.rglob("*"))
        if is_named_as_scan(path) and path.is_file()
    }
    found = {name: there.get(name) or there.get(f"{name}_0000") for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise DatasetError(f"{folder}: no volume of case {missing[0]} ({len(missing)} missing)")
    return {name: path for name, path in found.items() if path is not None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``report`` command."""
    add = parser.add_argument
    add(
        "workspace",
        type=Path,
        nargs="?",
        metavar="WORKSPACE",
        help="with what `cross-validate` wrote",
    )
    add(
        "--configuration",
        metavar="NAME",
        help="whose cross-validation [the selected one, else that with the highest Dice]",
    )
    add(
        "--evaluation",
        type=Path,
        metavar="DIR",
        help="instead of a workspace: what `evaluate` wrote, with the next three",
    )
    add("--images", type=Path, metavar="DIR", help="folder of the scans")
    add("--predictions", type=Path, metavar="DIR", help="folder of the masks that were scored")
    add("--references", type=Path, metavar="DIR", help="folder of their references")
    add("--title", help="heading of the page [from the data]")
    add("--not-ct", action="store_true", help="with --evaluation: the scans are not in HU")
    add("--out", type=Path, metavar="DIR", help="folder of the page [WORKSPACE/report]")
    add("--workers", type=int, metavar="N", help="processes [as many as cores and memory allow]")


def main(args: argparse.Namespace) -> int:
    """Run the ``report`` command."""
    folders = (args.images, args.predictions, args.references)
    if (args.workspace is None) == (args.evaluation is None):
        raise TrainingError("give a workspace, or --evaluation with --images and so on")
    if args.workspace is not None:
        if any(folders) or args.not_ct or args.title:
            raise TrainingError(
                "--images, --predictions, --references, --title and --not-ct go "
                "with --evaluation, not with a workspace"
            )
        out = args.out or report_folder(args.workspace)
        page = of_workspace(args.workspace, args.configuration, out, args.workers)
    else:
        if not all(folders) or args.out is None or args.configuration:
            raise TrainingError(
                "--evaluation needs --images, --predictions, --references and "
                "--out, and no --configuration"
            )
        evaluation = summary.load(args.evaluation)
        names = [case.name for case in evaluation.cases]
        images, predictions, references = (find_volumes(f, names) for f in folders)
        files = [Files(n, images[n], predictions[n], references[n]) for n in names]
        context = Context(
            title=args.title or f"Evaluation of {args.predictions.name}",
            subtitle=f"{len(names)} cases",
        )
        page = write(
            evaluation, files, args.out, context, is_ct=not args.not_ct, workers=args.workers
        )
    size = sum(path.stat().st_size for path in page.parent.rglob("*") if path.is_file())
    sys.stdout.write(f"wrote {page}, {byte_size(size)} with its cases; open it in a browser\n")
    return 0


def _selection(workspace: Path) -> Selection | None:
    there = selection_file(workspace).is_file()
    return selection.load(workspace) if there else None


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


def _folds(workspace: Path, names: Sequence[str]) -> Mapping[str, str]:
    """Which fold a case was held out by."""
    labelled = [case.name for case in dataset.load_dataset(workspace).labelled]
    return {
        name: str(number)
        for number, split in enumerate(splits.load_or_make_splits(workspace, labelled))
        for name in split.validation
        if name in names
    }


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


def _voxels(path: Path) -> int:
    z, y, x = volume.stored_shape(path)[-3:]
    return z * y * x
