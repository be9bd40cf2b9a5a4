"""The folds' validations as one evaluation, in which every training case stands once.

Each case was segmented by the fold that did not train on it, so the table says what an unseen case
may expect of one network.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ichseg.errors import PlansError, TrainingError
from ichseg.files import make_folder, suffix_of
from ichseg.model import strict_json
from training.crossval import cascade_labels, record
from training.data import dataset, splits
from training.data.dataset import add_workspace_argument
from training.data.sources import digest_cases, digest_sources
from training.data.workspace import (
    LATEST_CHECKPOINT,
    VALIDATION_FILE,
    evaluation_folder,
    mask_file,
    run_folder,
    splits_file,
    trained_runs,
)
from training.fit.checkpoint import digest_of, load_checkpoint
from training.planning.planned import load_plans
from training.scoring import evaluate, summary, tables
from training.scoring.measures import EMPTY_POLICIES
from training.scoring.summary import Evaluation

_log = logging.getLogger(__name__)


def cross_validate(
    workspace: Path, configuration: str, *, empty: str = "instance", workers: int | None = None
) -> Evaluation:
    """Score what the folds of a configuration found in their validation cases.

    Writes ``metrics.json``, ``evaluation.json`` and ``cases.csv`` to the evaluation folder of the
    configuration.

    Args:
        workspace: The folder with the validated folds.
        configuration: The name of the configuration, such as ``3d_fullres``.
        empty: The policy for empty masks, see ``training.scoring.measures``.
        workers: How many processes to use; None for as many as cores and memory allow.

    Raises:
        TrainingError: A fold has not segmented all of its cases with its latest weights.
        IchsegError: A mask cannot be read, or does not fit its reference.
    """
    masks = validated_masks(workspace, configuration)
    data = dataset.load_dataset(workspace)
    cases = {case.name: case for case in data.labelled}
    foreground = load_plans(workspace).foreground
    out = evaluation_folder(workspace, configuration)
    make_folder(out)
    with tempfile.TemporaryDirectory(prefix="cross-validate-") as beside:
        predictions, references = Path(beside) / "predictions", Path(beside) / "references"
        for name, mask in masks.items():
            for folder, path in ((predictions, mask), (references, cases[name].reference)):
                # a folder each: beside `x.nii.gz`, `x_probability.nii.gz` would be no case
                link = folder / name / f"{name}{suffix_of(path)}"
                link.parent.mkdir(parents=True)
                link.symlink_to(path.absolute())
        return evaluate.evaluate(
            predictions,
            references,
            out,
            names=tuple(region.name for region in foreground),
            held=tuple(region.labels for region in foreground),
            empty=empty,
            ignore_label=data.ignore_label,
            made_from=digest_of_folds(workspace, configuration),
            workers=workers,
        )


def validated_masks(workspace: Path, configuration: str) -> dict[str, Path]:
    """The mask file of each labelled case, made by the fold that had not seen the case.

    Cases that no fold validates are left out, which is logged.

    Raises:
        TrainingError: Masks are missing; names their fold, and the command that makes them. Or a
            cascade's first stage has been replaced since its second was trained.
    """
    every = load_plans(workspace)
    planned = every.configuration(configuration)
    labelled = dataset.load_dataset(workspace).labelled
    names = [case.name for case in labelled]
    sources = digest_cases(workspace, labelled)
    changed: list[str] = []
    masks: dict[str, Path] = {}
    for number, split in enumerate(splits.find_splits(workspace, names)):
        folder = run_folder(workspace, configuration, str(number))
        again = f"`train {configuration} --fold {number}` goes on with it"
        path = folder / LATEST_CHECKPOINT
        if not path.exists():
            raise TrainingError(
                f"{path}: no such file; run `train {configuration} --fold {number}` first, or "
                f"leave {configuration} out by --configurations"
            )
        checkpoint = load_checkpoint(path, every, planned, split)
        cascade_labels.require_same_first_stage(workspace, every, planned, path, checkpoint)
        seen = checkpoint["sources"]
        changed += [n for n in split.validation if seen.get(n) and sources[n] not in ("", seen[n])]
        try:
            found = strict_json.load(record.Validation, folder / VALIDATION_FILE)
        except PlansError as error:
            raise TrainingError(f"{folder}: not validated yet; {again}") from error
        weights = digest_of(path, every, planned, split)
        made_now = (found.weights, found.padding) == (weights, every.padding)
        done = set(found.dice) if made_now else set()
        paths = {name: mask_file(folder, name) for name in split.validation}
        missing = [name for name, path in paths.items() if name not in done or not path.is_file()]
        if missing:
            raise TrainingError(
                f"{folder}: {len(missing)} of {len(paths)} validation cases have not been "
                f"segmented with its latest weights, such as {missing[0]}; {again}"
            )
        several = sorted(set(masks) & set(paths))
        if several:
            raise TrainingError(
                f"{splits_file(workspace)}: several folds validate on {several[0]}, expected one "
                "for each case: which of its masks is to be scored?"
            )
        masks |= paths
    if len(masks) < len(names):
        left_out = sorted(set(names) - set(masks))
        _log.warning(
            "%s: no fold validates %d of %d cases, such as %s; they are left out",
            configuration,
            len(left_out),
            len(names),
            left_out[0],
        )
    if changed:
        _log.warning(
            "%s: images or labels of %d cases have been corrected since its folds were "
            "trained, such as %s; what is scored against the label as it is now may be the mask of "
            "the earlier image",
            configuration,
            len(changed),
            changed[0],
        )
    return masks


def digest_of_folds(workspace: Path, configuration: str) -> str:
    """A digest of the latest weights of all folds of a configuration, and of the cases' files.

    Evaluations and selections keep it, so that none is taken for one of other weights, of a
    validation in another way, or of labels that have been corrected since.

    Raises:
        TrainingError: A fold has no checkpoint, or one of other plans or cases.
    """
    every = load_plans(workspace)
    planned = every.configuration(configuration)
    data = dataset.load_dataset(workspace)
    names = [case.name for case in data.labelled]
    digest = hashlib.sha256(digest_sources(workspace, data).encode())
    for number, split in enumerate(splits.find_splits(workspace, names)):
        folder = run_folder(workspace, configuration, str(number))
        digest.update(digest_of(folder / LATEST_CHECKPOINT, every, planned, split).encode())
        with contextlib.suppress(PlansError):  # not validated, as far as is known
            found = strict_json.load(record.Validation, folder / VALIDATION_FILE)
            digest.update(f"{found.mirrored} {found.padding}".encode())
    return digest.hexdigest()


def trained_configurations(workspace: Path) -> tuple[str, ...]:
    """The configurations of which a fold has weights, in the order of the plans."""
    trained = {run.parent.name for run in trained_runs(workspace)}
    return tuple(c.name for c in load_plans(workspace).configurations if c.name in trained)


def parse_names(text: str) -> tuple[str, ...]:
    """Parse names that are separated by commas, as an argparse type."""
    names = tuple(part.strip() for part in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}, expected different names between commas")
    return names


def chosen_configurations(workspace: Path, given: Sequence[str] | None) -> tuple[str, ...]:
    """The configurations that were given, or all that have been trained.

    Raises:
        TrainingError: No configuration has been trained.
    """
    names = tuple(given) if given is not None else trained_configurations(workspace)
    if not names:
        raise TrainingError(f"{workspace}: no configuration has been trained; run `train` first")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the ``cross-validate`` command."""
    add_workspace_argument(parser)
    parser.add_argument(
        "--configurations",
        type=parse_names,
        metavar="NAME,...",
        help="which [all that have been trained]",
    )
    parser.add_argument(
        "--empty",
        choices=EMPTY_POLICIES,
        default="instance",
        help="what an empty mask scores, as of `evaluate` [%(default)s]",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes [as many as cores and memory allow]"
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``cross-validate`` command."""
    for name in chosen_configurations(args.workspace, args.configurations):
        found = cross_validate(args.workspace, name, empty=args.empty, workers=args.workers)
        sys.stdout.write(f"{name}\n{tables.describe(found)}\n")
        sys.stdout.write(
            f"wrote {evaluate.METRICS_FILE}, {summary.EVALUATION_FILE} and {summary.CASES_FILE} "
            f"to {evaluation_folder(args.workspace, name)}\n\n"
        )
    return 0
