"""The ``report`` command: the page of a workspace, or of any folder of masks that was evaluated.

``WORKSPACE/report/index.html`` opens from a disk without a network; its folder can be copied.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ichseg.errors import DatasetError, TrainingError
from ichseg.wording import byte_size
from training.data.workspace import report_folder
from training.report import cross_validation, draw
from training.report.draw import CaseVolumes
from training.report.evaluation_page import Context
from training.scoring import summary
from training.scoring.found import masks_by_name


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
    if (args.workspace is None) == (args.evaluation is None):
        raise TrainingError("give a workspace, or --evaluation with --images and so on")
    page = _of_workspace(args) if args.workspace else _of_evaluation(args)
    size = sum(path.stat().st_size for path in page.parent.rglob("*") if path.is_file())
    sys.stdout.write(f"wrote {page}, {byte_size(size)} with its cases; open it in a browser\n")
    return 0


def _of_workspace(args: argparse.Namespace) -> Path:
    others = (args.images, args.predictions, args.references, args.not_ct, args.title)
    if any(others):
        raise TrainingError(
            "--images, --predictions, --references, --title and --not-ct go "
            "with --evaluation, not with a workspace"
        )
    out = args.out or report_folder(args.workspace)
    return cross_validation.write(args.workspace, args.configuration, out, args.workers)


def _of_evaluation(args: argparse.Namespace) -> Path:
    folders = (args.images, args.predictions, args.references)
    if not all(folders) or args.out is None or args.configuration:
        raise TrainingError(
            "--evaluation needs --images, --predictions, --references and "
            "--out, and no --configuration"
        )
    evaluation = summary.load(args.evaluation)
    names = [case.name for case in evaluation.cases]
    images, predictions, references = (find_volumes(folder, names) for folder in folders)
    volumes = [
        CaseVolumes(n, images[n], predictions[n], references[n], evaluation.ignore_label)
        for n in names
    ]
    title = args.title or f"Evaluation: {args.predictions.name}"
    context = Context(title, subtitle=f"{len(names)} cases")
    return draw.write(
        evaluation, volumes, args.out, context, is_ct=not args.not_ct, workers=args.workers
    )


def find_volumes(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The file of each case below a folder: its name, or for images its name and ``_0000``.

    Raises:
        DatasetError: The file of a case is missing, or a name stands twice.
    """
    there = masks_by_name(folder)
    found = {name: there.get(name) or there.get(f"{name}_0000") for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise DatasetError(f"{folder}: no volume of case {missing[0]} ({len(missing)} missing)")
    return {name: path for name, path in found.items() if path is not None}
