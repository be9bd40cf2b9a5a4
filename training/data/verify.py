"""Check a whole dataset before anything long starts: one table of all that is wrong or odd."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichseg.errors import DatasetError, IchsegError, PlansError
from ichseg.files import is_named_as_scan, replacing
from ichseg.model import strict_json
from ichseg.scan import volume
from ichseg.wording import counted, duration
from training.data import convert, parallel, splits
from training.data.dataset import (
    Case,
    Dataset,
    add_workspace_argument,
    describe_failure,
    is_ct,
    load_dataset,
    save_dataset,
)
from training.data.examine import ERROR, WARNING, CaseFacts, Finding, examine_case, shown
from training.data.sources import digest_sources
from training.data.workspace import (
    DATASET_FILE,
    GROUPS_FILE,
    SPLITS_FILE,
    raw_images_folder,
    raw_labels_folder,
    verified_file,
)

SCHEMA_VERSION = 1
# A spacing this many times larger or smaller than the dataset's median is odd.
ODD_SPACING_FACTOR = 5.0
# Peak of one worker: the inflated file and its voxels, at most eight bytes each, and the libraries.
_BYTES_PER_VOXEL, _BYTES_BESIDE = 16, 200_000_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Verified:
    """The layout of verified.json: of which files no error was found."""

    schema_version: int
    sources: str


def verify_dataset(workspace: Path, dataset: Dataset, workers: int) -> list[Finding]:
    """Read every file once, in parallel, and compare.

    Returns:
        Everything found: first what concerns the whole dataset, then case by case.

    Raises:
        DatasetError: A worker process was killed.
    """
    findings: list[Finding] = []
    facts: list[CaseFacts] = []
    results = parallel.each_case(
        examine_case,
        dataset.cases,
        workspace,
        dataset.labels,
        dataset.ignore_label,
        all(map(is_ct, dataset.channels)),
        workers=workers,
    )
    for case, found in parallel.with_progress(results, len(dataset.cases), "verify"):
        if isinstance(found, Exception):
            text = describe_failure(case, found).removeprefix(f"case {case.name}: ")
            findings.append(Finding(ERROR, case.name, "-", text))
        else:
            facts.append(found)
            findings += found.findings
    facts.sort(key=lambda found: found.name)
    findings += _duplicates(facts)
    findings += _odd_spacings(facts)
    findings += _unused_labels(facts, dataset)
    findings += _left_over(workspace, dataset)
    findings += _folds(workspace, dataset)
    return sorted(findings, key=lambda found: (found.case != "-", found.case))


def is_verified(workspace: Path, dataset: Dataset) -> bool:
    """Whether ``verify`` has found no error in the files of the labelled cases as they are now."""
    try:
        found = strict_json.load(_Verified, verified_file(workspace))
    except PlansError:
        return False
    return found == _Verified(SCHEMA_VERSION, digest_sources(workspace, dataset))


def fix_headers(
    workspace: Path, dataset: Dataset, findings: Sequence[Finding], target: Path, workers: int
) -> int:
    """Make a new workspace in which the repairable differences of geometry are gone.

    Files that have one are written anew with the first channel's geometry, voxels unchanged; all
    others are linked or copied. The folds and the table of groups are copied. The workspace stays
    as it is.

    Returns:
        How many files were written anew.

    Raises:
        DatasetError: The target is taken, or cases failed (each is logged).
    """
    convert.refuse_taken(target)
    if target.resolve().is_relative_to(workspace.resolve()):
        raise DatasetError(f"{target}: lies in the workspace {workspace}, which stays as it is")
    mended = frozenset((found.case, found.file) for found in findings if found.repairable)
    results = parallel.each_case(
        _fix_case, dataset.cases, workspace, target, mended, workers=workers
    )
    cases, failures = [], []
    for case, found in parallel.with_progress(results, len(dataset.cases), "fix headers"):
        if isinstance(found, Exception):
            failures.append(describe_failure(case, found))
            _log.error("%s", failures[-1])
        else:
            cases.append(found)
    if failures:
        raise DatasetError(
            f"{len(failures)} of {len(dataset.cases)} cases failed, the first: {failures[0]}"
        )
    for name in (SPLITS_FILE, GROUPS_FILE):
        if (workspace / name).exists():  # copied: these are edited, a linked one in both places
            with replacing(target / name) as temporary:
                shutil.copyfile(workspace / name, temporary)
    cases.sort(key=lambda case: case.name)
    save_dataset(dataclasses.replace(dataset, cases=tuple(cases)), target)
    return len(mended)


def table(findings: Sequence[Finding]) -> str:
    """The findings in columns; an empty text for none."""
    if not findings:
        return ""
    rows = [("", "case", "file", "finding")]
    rows += [(found.severity, found.case, found.file, found.text) for found in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row[:3], widths, strict=True))
        + f"  {row[3]}\n"
        for row in rows
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``verify`` command."""
    add_workspace_argument(parser)
    parser.add_argument(
        "--workers", type=int, help="parallel processes [one a core, fewer if memory is short]"
    )
    parser.add_argument(
        "--note",
        action="store_true",
        help="note in the workspace whether errors were found, so that `run` need not look again "
        "until a file changes",
    )
    parser.add_argument(
        "--fix-headers",
        type=Path,
        metavar="NEW",
        help="make a new workspace in which small differences between the headers of one case "
        "are gone; this one stays as it is",
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``verify`` command: 1 if errors remain, 0 if there are warnings at most."""
    started = time.monotonic()
    dataset = load_dataset(args.workspace)
    if args.fix_headers is not None:  # rather than after all files have been read
        convert.refuse_taken(args.fix_headers)
    workers = args.workers
    if workers is None:
        images = [image for case in dataset.cases for image in case.images]
        workers = parallel.workers_for(images, _BYTES_PER_VOXEL, _BYTES_BESIDE)
    # before the files are read: a later change is noticed
    sources = digest_sources(args.workspace, dataset) if args.note else ""
    findings = verify_dataset(args.workspace, dataset, workers)
    count = Counter(found.severity for found in findings)
    if args.note:
        _note_verified(args.workspace, sources, verified=not count[ERROR])
    sys.stdout.write(
        f"{table(findings)}{dataset.name}: {len(dataset.cases)} cases in "
        f"{duration(time.monotonic() - started)}: {counted(count[ERROR], 'error')}, "
        f"{counted(count[WARNING], 'warning')}\n"
    )
    repairable = sum(found.repairable for found in findings)
    if args.fix_headers is None:
        if repairable:
            sys.stdout.write(
                f"--fix-headers NEW mends {repairable} of the errors, small differences between "
                "headers, in a new workspace\n"
            )
        return 1 if count[ERROR] else 0
    if not repairable:
        sys.stdout.write(f"no header to mend: {args.fix_headers} was not made\n")
        return 1 if count[ERROR] else 0
    files = fix_headers(args.workspace, dataset, findings, args.fix_headers, workers)
    left = count[ERROR] - repairable
    sys.stdout.write(
        f"{counted(files, 'file')} with a mended header, {counted(left, 'error')} left -> "
        f"{args.fix_headers}\n"
    )
    return 1 if left else 0


def _note_verified(workspace: Path, sources: str, *, verified: bool) -> None:
    path = verified_file(workspace)
    if not verified:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        content = strict_json.dumps(_Verified(SCHEMA_VERSION, sources))
        temporary.write_text(content, encoding="utf-8")


def _duplicates(facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    """Equal voxels under two names: in two folds they make the score too good."""
    seen: dict[str, tuple[str, str, bool]] = {}
    for case in facts:
        for found in case.files:
            if found.digest is None:
                continue
            is_label = found is case.label
            name, file, was_label = seen.setdefault(found.digest, (case.name, found.file, is_label))
            if (name, file) != (case.name, found.file):
                # one patient's scans in one grid may share a reference
                severity = WARNING if is_label and was_label else ERROR
                text = f"the same voxels as {file} of case {name}"
                yield Finding(severity, case.name, found.file, text)


def _odd_spacings(facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    """Cases far from the others; sizes are compared in order, since axes may be permuted."""
    first = [(case.name, case.images[0]) for case in facts if case.images]
    if not first:
        return
    sizes = np.array([sorted(found.grid.spacing_mm) for _, found in first])
    median = np.median(sizes, axis=0)
    for (name, found), size in zip(first, sizes, strict=True):
        if np.max(np.abs(np.log(size / median))) > np.log(ODD_SPACING_FACTOR):
            here = ", ".join(f"{value:.4g}" for value in size)
            usual = ", ".join(f"{value:.4g}" for value in median)
            text = f"spacing {here} mm (in order of size), the dataset's median is {usual}"
            yield Finding(WARNING, name, found.file, text)


def _unused_labels(facts: Sequence[CaseFacts], dataset: Dataset) -> Iterator[Finding]:
    present = {label for case in facts for label in case.present}
    for label, name in enumerate(dataset.labels):
        if label > 0 and label not in present:
            text = f"label {label} ({name}) occurs in no reference"
            yield Finding(WARNING, "-", DATASET_FILE, text)


def _left_over(workspace: Path, dataset: Dataset) -> Iterator[Finding]:
    """Images and labels in the workspace that belong to no case."""
    listed = {path for case in dataset.cases for path in case.files}
    folders = ((raw_images_folder(workspace), "label"), (raw_labels_folder(workspace), "image"))
    for folder, other in folders:
        for path in sorted(folder.glob("*")):
            if is_named_as_scan(path) and path not in listed:
                text = f"{DATASET_FILE} does not list it, so it has no {other}"
                yield Finding(ERROR, "-", shown(path, workspace), text)


def _folds(workspace: Path, dataset: Dataset) -> Iterator[Finding]:
    """Whether the cross-validation's folds can be had."""
    try:
        splits.find_splits(workspace, [case.name for case in dataset.labelled])
    except IchsegError as error:
        yield Finding(ERROR, "-", "-", str(error))


def _fix_case(
    case: Case, workspace: Path, target: Path, mended: frozenset[tuple[str, str]]
) -> Case:
    """Bring one case to the new workspace; returns it with its new paths."""
    new = convert.placed(case, len(case.images), target)
    pairs = list(zip(case.images, new.images, strict=True))
    if case.label is not None and new.label is not None:
        pairs.append((case.label, new.label))
    for old_path, new_path in pairs:
        if (case.name, shown(old_path, workspace)) in mended:
            expected = volume.read_channels(case.images[0])[0]
            found = volume.read_channels(old_path)[0]
            volume.write(expected.with_voxels(found.voxels), new_path)
        else:
            convert.bring(old_path, new_path)
    return new
