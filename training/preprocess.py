"""Preprocess a whole dataset for one configuration into the store, in parallel over cases."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ichseg import plans as plans_module
from ichseg import preprocess, schema, volume
from ichseg.errors import DatasetError
from ichseg.plans import Configuration, Normalisation, Plans, Resampling
from training.dataset import (
    Case,
    Dataset,
    add_workspace_argument,
    default_workers,
    describe_failure,
    each_case,
    load_dataset,
    read_case,
)
from training.store import is_complete, write_case

PLANS_FILE = "plans.json"
# Hidden, so that it cannot be the name of a case.
_RECORD_FILE = ".preprocessing.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Record:
    """Those parts of the plans that decide the stored voxels."""

    dimensions: int
    spacing_mm: tuple[float, float, float]
    orientation: str
    transpose: tuple[int, int, int]
    normalise_first: bool
    normalisations: tuple[Normalisation, ...]
    resampling: Resampling


def folder_of(workspace: Path, configuration_name: str) -> Path:
    """Where the preprocessed cases of a configuration lie."""
    return workspace / "preprocessed" / configuration_name


def preprocess_dataset(
    dataset: Dataset, plans: Plans, configuration_name: str, workspace: Path, workers: int
) -> int:
    """Preprocess all labelled cases that the store does not hold yet.

    Args:
        dataset: The cases.
        plans: Their plans.
        configuration_name: Which of its configurations.
        workspace: Results go to its ``preprocessed/<configuration>``.
        workers: Parallel processes.

    Returns:
        How many cases were preprocessed; those found finished are not done again.

    Raises:
        DatasetError: The folder was made with other plans, or cases failed: each failure is
            logged and the other cases are done all the same.
        PlansError: There is no such configuration.
    """
    configuration = plans.configuration(configuration_name)
    folder = folder_of(workspace, configuration_name)
    _claim(folder, plans, configuration)
    cases = dataset.labelled
    waiting = [case for case in cases if not is_complete(folder, case.name)]
    if len(waiting) < len(cases):
        _log.info("%d of %d cases are finished already", len(cases) - len(waiting), len(cases))
    started = time.monotonic()
    failures = []
    results = each_case(
        _preprocess_case,
        waiting,
        dataset.labels,
        plans,
        configuration,
        folder,
        workers=workers,
        initialize=_use_one_thread,
    )
    for done, (case, found) in enumerate(results, start=1):
        if isinstance(found, Exception):
            failures.append(describe_failure(case, found))
            _log.error("[%d/%d] %s", done, len(waiting), failures[-1])
            continue
        elapsed = time.monotonic() - started
        _log.info(
            "[%d/%d] %s: %s voxels, about %.0f s left",
            done,
            len(waiting),
            case.name,
            "x".join(str(size) for size in found),
            elapsed / done * (len(waiting) - done),
        )
    if failures:
        raise DatasetError(
            f"{len(failures)} of {len(cases)} cases failed, the first: {failures[0]}"
        )
    return len(waiting)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``preprocess`` command."""
    parser.add_argument(
        "configuration",
        nargs="?",
        default="3d_fullres",
        help="a configuration of the plans [%(default)s]",
    )
    add_workspace_argument(parser)
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="parallel processes [%(default)s]"
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``preprocess`` command."""
    started = time.monotonic()
    dataset = load_dataset(args.workspace)
    plans = plans_module.load(args.workspace / PLANS_FILE)
    done = preprocess_dataset(dataset, plans, args.configuration, args.workspace, args.workers)
    sys.stdout.write(
        f"{done} cases preprocessed in {time.monotonic() - started:.0f} s, "
        f"{len(dataset.labelled)} stored -> {folder_of(args.workspace, args.configuration)}\n"
    )
    return 0


def _claim(folder: Path, plans: Plans, configuration: Configuration) -> None:
    """Record what the folder is made with; refuse one that was made otherwise."""
    record = _Record(
        dimensions=configuration.architecture.dimensions,
        spacing_mm=configuration.spacing_mm,
        orientation=plans.orientation,
        transpose=plans.transpose,
        normalise_first=plans.normalise_first,
        normalisations=plans.normalisations,
        resampling=plans.resampling,
    )
    path = folder / _RECORD_FILE
    for unfinished in folder.glob(".writing-*"):  # of a run that was killed
        unfinished.unlink(missing_ok=True)
    if not path.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise DatasetError(
                f"{folder}: holds files of unknown origin; delete the folder and preprocess again"
            )
        with volume.replacing(path) as temporary:
            temporary.write_text(schema.dumps(record), encoding="utf-8")
    elif schema.load(_Record, path) != record:
        raise DatasetError(
            f"{folder}: was preprocessed with other plans (spacing, intensities or resampling "
            "differ); delete the folder and preprocess again"
        )


def _preprocess_case(
    case: Case, labels: Sequence[str], plans: Plans, configuration: Configuration, folder: Path
) -> tuple[int, ...]:
    """Read, prepare and store one case; returns its shape in the new grid."""
    images, reference = read_case(case, labels)
    prepared = preprocess.prepare(images, plans, configuration)
    outside = preprocess.outside_nonzero(images, prepared.placement)
    target = preprocess.prepare_labels(reference, prepared.placement, plans, outside)
    write_case(folder, case.name, prepared.data, target)
    return target.shape


def _use_one_thread() -> None:
    """Cases run in parallel, so that threads within a case would only wait for each other."""
    torch.set_num_threads(1)
