"""Preprocess a whole dataset for one configuration into the store, in parallel over cases."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichseg.errors import DatasetError, PlansError
from ichseg.files import UNFINISHED, remove_unfinished, replacing
from ichseg.model import strict_json
from ichseg.model.plans import Configuration, Normalisation, Plans, Resampling
from ichseg.predict import prepare
from ichseg.predict.prepare import Placement, place
from ichseg.scan.volume import Volume
from training.data.dataset import (
    Case,
    Dataset,
    add_workspace_argument,
    describe_failure,
    load_dataset,
    read_case,
)
from training.data.parallel import each_case, with_progress, workers_for
from training.data.sources import digest_cases, digest_sources
from training.data.workspace import plans_file, preprocessed_folder
from training.planning.planned import load_plans
from training.store import chunks

# Hidden, so that it cannot be the name of a case.
_RECORD_FILE = ".preprocessing.json"
# What a worker holds: its libraries; and at the peak, per voxel of each channel, the image as read
# and in float32, and the result, which may have some more voxels. Labels and masks come on top.
_BYTES_OF_A_WORKER = 400_000_000
_BYTES_PER_CHANNEL_VOXEL, _BYTES_PER_VOXEL = 14, 4

_ABSENT = "has not been preprocessed"
_ALL = (1, 1)  # the one share of all cases

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Record:
    """What decides the stored voxels."""

    store_version: int
    dimensions: int
    spacing_mm: tuple[float, float, float]
    orientation: str
    transpose: tuple[int, int, int]
    normalise_first: bool
    normalisations: tuple[Normalisation, ...]
    resampling: Resampling
    crop: str = strict_json.optional("nonzero")
    ignore_label: int | None = strict_json.optional(None)


@dataclass(frozen=True, slots=True)
class _Job:
    """A case to preprocess, and the digest of its files."""

    case: Case
    source: str


def preprocess_dataset(
    dataset: Dataset,
    plans: Plans,
    configuration_name: str,
    workspace: Path,
    workers: int,
    share: tuple[int, int] = _ALL,
) -> int:
    """Preprocess the labelled cases that the store does not hold yet, or whose files have changed.

    Args:
        dataset: The cases.
        plans: Their plans.
        configuration_name: Which of its configurations.
        workspace: Results go to its ``preprocessed/<configuration>``.
        workers: Parallel processes.
        share: Number of a share of the cases, from 1, and of how many; the others may be done
            elsewhere meanwhile.

    Returns:
        How many cases were preprocessed; those that are stored as their files are now are not
        done again.

    Raises:
        DatasetError: The folder was made with other plans, or cases failed: each failure is
            logged and the other cases are done all the same.
        PlansError: There is no such configuration, or the plans are for other channels or labels.
    """
    _refuse_other_dataset(dataset, plans)
    configuration = plans.configuration(configuration_name)
    folder = preprocessed_folder(workspace, configuration_name)
    _claim(folder, _record_of(dataset, plans, configuration))
    if share == _ALL:
        remove_unfinished(folder)  # of a run that was killed; shares may be at work on others
    cases = _of_share(dataset.labelled, share)
    digests = digest_cases(workspace, cases)  # before files are read: a later change is noticed
    waiting = _waiting(folder, cases, digests)
    if len(waiting) < len(cases):
        _log.info("%d of %d cases are finished already", len(cases) - len(waiting), len(cases))
    if plans.sources not in ("", digest_sources(workspace, dataset)):
        _log.warning(
            "%s: cases have changed since they were planned for; `plan` takes their intensities "
            "and sizes anew",
            plans_file(workspace),
        )
    failures = []
    # The largest files first, or one of them may keep a worker busy when all others have ended.
    jobs = [_Job(case, digests[case.name]) for case in sorted(waiting, key=_bytes_of, reverse=True)]
    shared = (dataset.labels, dataset.ignore_label, plans, configuration, folder)
    results = each_case(_preprocess_case, jobs, *shared, workers=workers)
    for job, failure in with_progress(results, len(waiting), f"preprocess {configuration_name}"):
        if failure is not None:
            failures.append(describe_failure(job.case, failure))
            _log.error("%s", failures[-1])
    if failures:
        raise DatasetError(
            f"{len(failures)} of {len(cases)} cases failed, the first: {failures[0]}"
        )
    return len(waiting)


def is_preprocessed(
    dataset: Dataset,
    plans: Plans,
    configuration_name: str,
    workspace: Path,
    share: tuple[int, int] = _ALL,
) -> bool:
    """Whether the store holds the labelled cases as they are now, made with these plans.

    Args:
        dataset: The cases.
        plans: Their plans.
        configuration_name: Whose store it is.
        workspace: The workspace.
        share: See ``preprocess_dataset``; by default all cases are asked for.
    """
    folder = preprocessed_folder(workspace, configuration_name)
    wanted = _record_of(dataset, plans, plans.configuration(configuration_name))
    if _recorded(folder / _RECORD_FILE) != wanted:
        return False
    cases = _of_share(dataset.labelled, share)
    return not _stale(folder, cases, digest_cases(workspace, cases))


def require_current(
    workspace: Path, dataset: Dataset, plans: Plans, configuration_name: str, names: Sequence[str]
) -> None:
    """Refuse a store made with other plans, or in which cases are missing or are not as they are.

    Args:
        workspace: The workspace with the store.
        dataset: Its cases.
        plans: Their plans.
        configuration_name: Whose store it is.
        names: The cases that are needed.

    Raises:
        DatasetError: Some are missing or no longer fit; names the command that makes them.
        PlansError: The plans are for other channels or labels.
    """
    _refuse_other_dataset(dataset, plans)
    folder = preprocessed_folder(workspace, configuration_name)
    cases = [case for case in dataset.labelled if case.name in names]
    path = folder / _RECORD_FILE
    wanted = _record_of(dataset, plans, plans.configuration(configuration_name))
    if path.exists() and _recorded(path) != wanted:
        raise _made_otherwise(folder)
    stale = _stale(folder, cases, digest_cases(workspace, cases))
    if stale:
        name, reason = next(iter(stale.items()))
        raise DatasetError(
            f"{folder}: {len(stale)} of {len(cases)} cases cannot be used, such as {name}, which "
            f"{reason}; run `preprocess {configuration_name}` first"
        )


def default_workers(dataset: Dataset) -> int:
    """How many processes the cores and the memory allow, going by the images' headers."""
    images = [case.images[0] for case in dataset.labelled]  # all channels are of one size
    per_voxel = _BYTES_PER_CHANNEL_VOXEL * len(dataset.channels) + _BYTES_PER_VOXEL
    return workers_for(images, per_voxel, _BYTES_OF_A_WORKER)


def parse_share(text: str) -> tuple[int, int]:
    """An argparse type: ``2/3`` as ``(2, 3)``, the second of three shares of the cases."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a share such as 1/3, 2/3 or 3/3")
    return int(number), int(count)


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
        "--workers", type=int, help="parallel processes [one a core, as far as memory suffices]"
    )
    parser.add_argument(
        "--share",
        type=parse_share,
        default=_ALL,
        metavar="I/N",
        help="the I-th of N shares of the cases, so that N machines do all of them [1/1]",
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``preprocess`` command."""
    started = time.monotonic()
    dataset = load_dataset(args.workspace)
    plans = load_plans(args.workspace)
    workers = default_workers(dataset) if args.workers is None else args.workers
    done = preprocess_dataset(
        dataset, plans, args.configuration, args.workspace, workers, args.share
    )
    sys.stdout.write(
        f"{done} cases preprocessed in {time.monotonic() - started:.0f} s, "
        f"{len(_of_share(dataset.labelled, args.share))} stored "
        f"-> {preprocessed_folder(args.workspace, args.configuration)}\n"
    )
    return 0


def _refuse_other_dataset(dataset: Dataset, plans: Plans) -> None:
    """Refuse plans whose channels, labels or regions are not the dataset's."""
    planned, found = (plans.channels, plans.labels), (dataset.channels, dataset.labels)
    if planned != found:
        raise PlansError(
            f"the plans are for channels {', '.join(plans.channels)} and labels "
            f"{', '.join(plans.labels)}, but the dataset has channels "
            f"{', '.join(dataset.channels)} and labels {', '.join(dataset.labels)}; `plan` anew"
        )
    regions = (plans.regions, plans.region_labels), (dataset.regions, dataset.region_labels)
    if regions[0] != regions[1]:
        raise PlansError(
            f"the plans are for regions that write {plans.regions} and hold {plans.region_labels}, "
            f"but those of the dataset write {dataset.regions} and hold {dataset.region_labels}; "
            "`plan` anew"
        )


def _bytes_of(case: Case) -> int:
    """How large the case's images are, as files; 0 if one cannot be read, which is told later."""
    try:
        return sum(path.stat().st_size for path in case.images)
    except OSError:
        return 0


def _of_share(cases: Sequence[Case], share: tuple[int, int]) -> Sequence[Case]:
    """Every n-th case: neighbours in the list are often alike in size."""
    number, count = share
    return cases[number - 1 :: count]


def _waiting(folder: Path, cases: Sequence[Case], digests: Mapping[str, str]) -> list[Case]:
    """The cases to preprocess; says of those that are stored why they are done again."""
    stale = _stale(folder, cases, digests)
    for name, reason in stale.items():
        if reason != _ABSENT:
            _log.warning("case %s %s; it is done again", name, reason)
    return [case for case in cases if case.name in stale]


def _stale(folder: Path, cases: Sequence[Case], digests: Mapping[str, str]) -> dict[str, str]:
    """Why stored cases cannot be used, by name; those that can are left out."""
    found = {}
    for case in cases:
        if not chunks.is_complete(folder, case.name):
            found[case.name] = _ABSENT
            continue
        try:
            source = chunks.load_meta(folder, case.name).source
        except PlansError:
            found[case.name] = "is damaged, or of another version"
            continue
        if not source:
            found[case.name] = "was stored by a version that did not note what it was made from"
        elif digests[case.name] not in ("", source):  # empty: its files are gone, the store stays
            found[case.name] = "has changed since it was stored"
    return found


def _claim(folder: Path, record: _Record) -> None:
    """Record what the folder is made with; refuse one that was made otherwise."""
    path = folder / _RECORD_FILE
    there = [] if not folder.is_dir() else list(folder.iterdir())
    if not path.exists():  # looked for last: another share may be beginning, and then it is there
        if any(not each.name.startswith(UNFINISHED) for each in there):
            raise DatasetError(
                f"{folder}: holds files of unknown origin; delete the folder and preprocess again"
            )
        with replacing(path) as temporary:
            temporary.write_text(strict_json.dumps(record), encoding="utf-8")
    elif _recorded(path) != record:
        raise _made_otherwise(folder)


def _made_otherwise(folder: Path) -> DatasetError:
    """The error for a store that does not fit the plans."""
    return DatasetError(
        f"{folder}: was preprocessed with other plans (spacing, intensities, crop or resampling "
        "differ), another label to ignore, or by another version; delete the folder and preprocess "
        "again"
    )


def _refuse_beyond(reference: Volume, placement: Placement, ignore_label: int | None) -> None:
    """Refuse a case that loses foreground to the cut to the head."""
    foreground = placement.axes.apply(reference.voxels) != 0
    if ignore_label is not None:
        foreground &= placement.axes.apply(reference.voxels) != ignore_label
    lost = np.count_nonzero(foreground) - np.count_nonzero(foreground[placement.slices])
    if lost:
        raise DatasetError(
            f"{lost} foreground voxels lie outside of the head that is found, which no network "
            "would see; correct the case, or plan with --crop nonzero"
        )


def _record_of(dataset: Dataset, plans: Plans, configuration: Configuration) -> _Record:
    return _Record(
        store_version=chunks.SCHEMA_VERSION,
        dimensions=configuration.architecture.dimensions,
        spacing_mm=configuration.spacing_mm,
        orientation=plans.orientation,
        transpose=plans.transpose,
        normalise_first=plans.normalise_first,
        normalisations=plans.normalisations,
        resampling=plans.resampling,
        crop=plans.crop,
        ignore_label=dataset.ignore_label,
    )


def _recorded(path: Path) -> _Record | None:
    try:
        return strict_json.load(_Record, path)
    except PlansError:  # missing, or of another version
        return None


def _preprocess_case(
    job: _Job,
    labels: Sequence[str],
    ignore_label: int | None,
    plans: Plans,
    configuration: Configuration,
    folder: Path,
) -> None:
    """Read, prepare and store one case."""
    images, reference = read_case(job.case, labels, ignore_label)
    placement = place(images, plans, configuration)
    if plans.crop == "head":
        _refuse_beyond(reference, placement, ignore_label)
    outside = prepare.outside_nonzero(images, placement)
    target = prepare.prepare_labels(reference, placement, plans, outside)
    del reference, outside  # memory, before what needs most of it
    data = prepare.to_grid(images, plans, placement)
    del images
    chunks.write_case(
        folder,
        job.case.name,
        data,
        target,
        plans.normalisations,
        source=job.source,
        ignore_label=ignore_label,
    )
