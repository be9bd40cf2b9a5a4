"""Find where a fold's network errs on its own training cases, for it to train on more often.

A network segments the stored training cases, without mirrorings. A lesion that it finds where the
case has none, or that it misses, becomes an example; one that it finds in part does not: patches
on foreground show it those anyway.
"""

from __future__ import annotations

import argparse
import fnmatch
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ichseg.engine.engine import Network
from ichseg.errors import TrainingError
from ichseg.predict.prepare import plan_axes
from ichseg.scan import volume
from ichseg.wording import clock, counted
from training.batches import hard_examples
from training.batches.hard_examples import HardExample
from training.batches.sampling import stored_case
from training.crossval.validate import load_network, predict_scores, with_first_stage
from training.data import dataset
from training.data.dataset import Case
from training.data.workspace import LATEST_CHECKPOINT, hard_examples_file
from training.fit.checkpoint import load_checkpoint
from training.fit.configuration import TrainingConfig
from training.fit.fold_run import FoldRun, open_run
from training.scoring.lesions import number_lesions
from training.store.chunks import StoredCase
from training.store.preprocess import require_current

SMALLEST_ML = 0.05
_TELL_EVERY_S = 30.0

Mask = npt.NDArray[np.bool_]

_log = logging.getLogger(__name__)


def find_hard_examples(
    workspace: Path,
    run: FoldRun,
    smallest_ml: float = SMALLEST_ML,
    patterns: Sequence[str] = ("*",),
) -> tuple[HardExample, ...]:
    """Segment a fold's training cases by its latest weights and list the lesions that are wrong.

    Args:
        workspace: The folder that lists the cases.
        run: A fold that has been trained.
        smallest_ml: Smaller lesions are passed over.
        patterns: Names of the cases to look at, in which ``*`` stands for anything.

    Raises:
        TrainingError: No training case has such a name, or the fold has no weights, or they are of
            other plans or cases.
        DatasetError: A stored case is missing or damaged, or not as its files are now.
        InputError: An image of a 2D configuration's case cannot be read.
    """
    names = [name for name in run.spec.train if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if not names:
        raise TrainingError(
            f"no training case of fold {run.fold} is named {' or '.join(patterns)}; they are "
            f"{run.spec.train[0]} and others"
        )
    data = dataset.load_dataset(workspace)
    require_current(workspace, data, run.plans, run.configuration.name, names)
    cases = {case.name: case for case in data.labelled}
    path = run.folder / LATEST_CHECKPOINT
    weights = load_checkpoint(path, run.plans, run.configuration, run.cases)["network"]
    network = load_network(run, weights)
    found: list[HardExample] = []
    began = told = time.monotonic()
    for number, name in enumerate(names, start=1):
        case = stored_case(run.spec.folder, name)
        voxel_ml = _voxel_ml(cases[name], run)
        found += errors_of(case, _segment(case, run, network), run, voxel_ml, smallest_ml)
        now = time.monotonic()
        if now - told >= _TELL_EVERY_S or number == len(names):
            left = (now - began) / number * (len(names) - number)
            _log.info(
                "hard examples: %d/%d cases, %d found  ETA %s",
                number,
                len(names),
                len(found),
                clock(left),
            )
            told = now
    return tuple(found)


def errors_of(
    case: StoredCase, found: Sequence[Mask], run: FoldRun, voxel_ml: float, smallest_ml: float
) -> list[HardExample]:
    """The false and the missed lesions of a case, as an evaluation counts them.

    Args:
        case: The case, with its target.
        found: For each foreground label or region where it was found, ``(z, y, x)``.
        run: The fold, whose plans name the labels.
        voxel_ml: The volume of a stored voxel.
        smallest_ml: Smaller lesions are passed over.
    """
    target = case.target[:]
    untold = np.zeros(target.shape, bool)
    if run.ignore_label is not None:
        untold = target == run.ignore_label
    examples = []
    for region, ours in zip(run.plans.foreground, found, strict=True):
        theirs = region.mask(target) & ~untold
        # what touches voxels that nobody can tell may belong to a lesion there
        for kind, lesions, other in (
            ("false", ours, theirs | untold),
            ("missed", theirs, ours),
        ):
            examples += [
                HardExample(case.name, kind, voxel, target.shape, voxels * voxel_ml)
                for voxel, voxels in _untouched(lesions, other, smallest_ml / voxel_ml)
            ]
    return examples


def _voxel_ml(case: Case, run: FoldRun) -> float:
    """The volume of a stored voxel; for a 2D configuration each case keeps its own slices."""
    z, y, x = run.configuration.spacing_mm
    if run.configuration.architecture.dimensions == 2:
        image = volume.read(case.images[0])
        z = image.spacing_mm[plan_axes(image, run.plans).permutation[0]]
    return z * y * x / 1000


def _untouched(
    mask: Mask, other: Mask, least_voxels: float
) -> list[tuple[tuple[int, int, int], int]]:
    """A voxel near the middle, and how many there are, of each lesion that touches no other."""
    numbers, sizes, shared = number_lesions(mask, other)
    boxes = ndimage.find_objects(numbers)
    result = []
    for index in np.flatnonzero((shared == 0) & (sizes >= least_voxels)):
        voxels = np.argwhere(numbers[boxes[index]] == index + 1)
        nearest = np.square(voxels - voxels.mean(0)).sum(1).argmin()
        z, y, x = (
            int(v) + part.start for v, part in zip(voxels[nearest], boxes[index], strict=True)
        )
        result.append(((z, y, x), int(sizes[index])))
    return result


def _segment(case: StoredCase, run: FoldRun, network: Network) -> list[Mask]:
    """For each foreground label or region where the network finds it, in the stored grid."""
    data = case.data[:]
    if run.spec.previous_labels:
        data = with_first_stage(data, case, run)
    scores = predict_scores(data, run, network, mirror_axes=())
    if run.plans.regions:
        return list((scores > 0).cpu().numpy())
    likeliest = scores.argmax(0).cpu().numpy()
    return [likeliest == label for label in range(1, len(scores))]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the ``hard-examples`` command."""
    parser.add_argument("configuration", metavar="CONFIGURATION", help="such as 3d_fullres")
    dataset.add_workspace_argument(parser)
    parser.add_argument("--fold", required=True, metavar="K", help="a fold that has been trained")
    parser.add_argument(
        "--smallest-ml",
        type=float,
        default=SMALLEST_ML,
        metavar="ML",
        help="pass over smaller lesions [%(default)g]",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["*"],
        metavar="NAME",
        help="only cases of these names, in which * stands for anything [all]",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [%(default)s]")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="threads on the CPU; 0 takes all [%(default)s]",
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``hard-examples`` command."""
    try:
        config = TrainingConfig(device=args.device, threads=args.threads)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    run = open_run(args.workspace, args.configuration, args.fold, config)
    found = find_hard_examples(args.workspace, run, args.smallest_ml, args.cases)
    path = hard_examples_file(run.folder)
    hard_examples.write(path, found)
    for kind in hard_examples.KINDS:
        of_kind = [each for each in found if each.kind == kind]
        cases = len({each.case for each in of_kind})
        lesions = f"{counted(len(of_kind), 'lesion')} in {counted(cases, 'case')}"
        _log.info("%s: %s", kind, lesions)
    _log.info("wrote %s; `train` draws from it by --hard-fraction", path)
    return 0
