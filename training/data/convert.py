"""Bring a dataset, in whichever layout, into a new workspace.

WORKSPACE/dataset.json              names, channels, labels and file names of the cases
WORKSPACE/raw/images/<case>_0000.nii.gz, _0001 ...   one file per channel
WORKSPACE/raw/labels/<case>.nii.gz
WORKSPACE/groups.csv                if given: which cases belong together
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichseg.errors import DatasetError
from ichseg.files import make_folder, remove_unfinished, replacing, sha256, suffix_of
from ichseg.scan import volume
from ichseg.wording import duration
from training.data import parallel, regions, splits
from training.data.dataset import (
    Case,
    Dataset,
    add_workspace_argument,
    describe_failure,
    save_dataset,
)
from training.data.layouts import Source, read_source
from training.data.workspace import (
    dataset_file,
    fingerprint_file,
    groups_file,
    plans_file,
    preprocessed_root,
    raw_images_folder,
    raw_labels_folder,
    runs_root,
)

# 4D voxels as stored and as converted, at most eight bytes each, and the libraries
_BYTES_PER_VOXEL, _BYTES_BESIDE = 16, 200_000_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Move:
    """A case where it lies and where it goes; ``masks`` as in ``Source``."""

    name: str
    source: Case
    target: Case
    masks: bool = False

    @property
    def splits_channels(self) -> bool:
        return len(self.source.images) < len(self.target.images)


def convert(
    source: Path,
    workspace: Path,
    *,
    labels: tuple[str, ...] = (),
    groups: Path | None = None,
    workers: int | None = None,
) -> Dataset:
    """Bring a dataset into a new workspace.

    Files are hard-linked where source and workspace share a file system and copied elsewhere; 4D
    images are split into one file a channel, an ``.mhd`` with its voxels becomes an ``.mha``, and
    masks of 0 and 255 become labels. The source is never altered. Test images are left out:
    they need no workspace to be predicted. A conversion that was cut off can be run again.

    Args:
        source: Folder in one of the layouts of ``training.data.layouts``.
        workspace: Made if need be; must not hold a dataset or the results of one.
        labels: Names of the labels' values, for layouts that do not name them.
        groups: Table of the cases that belong together, see ``splits.read_groups``.
        workers: Parallel processes that split images; None for as many as cores and memory allow.

    Raises:
        DatasetError: The source cannot be used, the workspace is taken, or cases failed (each is
            logged).
    """
    refuse_taken(workspace)
    if workspace.resolve().is_relative_to(source.resolve()):
        raise DatasetError(f"{workspace}: lies in the dataset {source}, which stays as it is")
    found = read_source(source, labels)
    moves = [
        _Move(case.name, case, placed(case, len(found.channels), workspace), found.masks)
        for case in found.cases
    ]
    targets = tuple(move.target for move in moves)
    declared = found.declared
    dataset = Dataset(
        found.name,
        found.channels,
        declared.labels,
        targets,
        declared.ignore_label,
        declared.regions,
        declared.region_labels,
    )
    for sentence in regions.rewritten(declared.regions, declared.region_labels):
        _log.warning("%s: %s, by the last region that holds it", source, sentence)
    table = None if groups is None else _read_table(groups, workspace, dataset)
    _log.info("%s: %s, %d cases", source, found.layout, len(found.cases))
    failures = []
    if not (found.masks or any(move.splits_channels for move in moves)):
        workers = 1  # links and copies wait for the disk, not for a core
    elif workers is None:
        images = [image for case in found.cases for image in case.images]
        workers = parallel.workers_for(images, _BYTES_PER_VOXEL, _BYTES_BESIDE)
    results = parallel.each_case(_bring_case, moves, workers=workers)
    for move, failure in parallel.with_progress(results, len(moves), "convert"):
        if isinstance(failure, Exception):
            failures.append(describe_failure(move.source, failure))
            _log.error("%s", failures[-1])
    if failures:
        raise DatasetError(
            f"{len(failures)} of {len(moves)} cases failed, the first: {failures[0]}"
        )
    if table is not None:
        with replacing(groups_file(workspace)) as temporary:
            temporary.write_bytes(table)
    save_dataset(dataset, workspace)  # last: it marks a finished conversion
    return dataset


def changed_at_source(source: Source, kept: Dataset, converted_ns: int) -> list[Path]:
    """Files of a dataset that have been replaced or changed since it was brought to a workspace.

    Hard links and equal copies are the same. Of what was not copied as it is, such as 4D images,
    which were split, only the time counts.

    Args:
        source: The dataset where it lies.
        kept: The same cases in the workspace.
        converted_ns: When they were brought there, in nanoseconds; files not younger that are as
            large as their copy count as the same.
    """
    found = []
    for case, copy in zip(source.cases, kept.cases, strict=True):
        split = len(case.images) < len(copy.images)
        pairs = list(zip(case.images, copy.images[:1] if split else copy.images, strict=True))
        if case.label is not None and copy.label is not None:
            pairs.append((case.label, copy.label))
        for theirs, ours in pairs:
            there, here = theirs.stat(), ours.stat()
            newer = there.st_mtime_ns > converted_ns
            made = suffix_of(theirs) != suffix_of(ours) or (source.masks and theirs == case.label)
            if made or (split and theirs in case.images):
                differs = newer
            elif (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                differs = False
            else:
                differs = there.st_size != here.st_size or (
                    newer and sha256(theirs) != sha256(ours)
                )
            if differs:
                found.append(theirs)
    return found


def refuse_taken(workspace: Path) -> None:
    """Refuse a workspace that holds a dataset already, or what was made from one.

    What a run that was killed left unfinished is removed.

    Raises:
        DatasetError: It does.
    """
    for path in (
        dataset_file(workspace),
        fingerprint_file(workspace),
        plans_file(workspace),
        preprocessed_root(workspace),
        runs_root(workspace),
    ):
        if path.exists():
            raise DatasetError(f"{path}: exists; expected a workspace that holds no dataset yet")
    if workspace.exists() and not workspace.is_dir():
        raise DatasetError(f"{workspace}: is a file, expected a folder")
    for folder in (raw_images_folder(workspace), raw_labels_folder(workspace)):
        remove_unfinished(folder)


def bring(source: Path, target: Path) -> None:
    """Hard-link or copy a file.

    Raises:
        DatasetError: There is no such file.
        OutputError: It cannot be copied.
    """
    if not source.is_file():
        raise DatasetError(f"{source}: no such file")
    make_folder(target.parent)
    # a conversion that was cut off may have left this name, perhaps as a hard link: it is replaced
    # and never written into, which would alter the source
    target.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another file system, or links not allowed
        os.link(source.resolve(), target)
        return
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def placed(case: Case, channels: int, workspace: Path) -> Case:
    """The same case under the names that it gets in a workspace."""
    as_they_are = len(case.images) == channels
    suffixes = [_kept(p) for p in case.images] if as_they_are else [".nii.gz"] * channels
    images = tuple(
        raw_images_folder(workspace) / f"{case.name}_{channel:04d}{suffix}"
        for channel, suffix in enumerate(suffixes)
    )
    label = case.label and raw_labels_folder(workspace) / f"{case.name}{_kept(case.label)}"
    return Case(case.name, images, label)


def _kept(path: Path) -> str:
    """The suffix that a file gets in a workspace: its own, or for one in two files another."""
    return ".mha" if suffix_of(path) == ".mhd" else suffix_of(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``convert`` command."""
    parser.add_argument(
        "dataset",
        type=Path,
        metavar="DATASET",
        help="an MSD task, an nnU-Net v1 or v2 raw folder, images/ beside labels/, or the download "
        "of INSTANCE 2022, BHSD or CT-ICH; the layout is recognised",
    )
    add_workspace_argument(parser)
    add_choices(parser)
    parser.add_argument(
        "--workers",
        type=int,
        help="parallel processes that split 4D images [one a core, fewer if memory is short]",
    )


def add_choices(parser: argparse.ArgumentParser) -> None:
    """What the user knows of a dataset, and its files do not say."""
    parser.add_argument(
        "--labels",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="NAME,NAME",
        help="names of the values 0, 1 and so on of a layout that does not name them [those of its "
        "authors, or background,hemorrhage]",
    )
    parser.add_argument(
        "--groups",
        type=Path,
        metavar="CSV",
        help="table with the header case,group: cases of one group, such as scans of one patient, "
        "go into the same fold [each case is a group]",
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``convert`` command."""
    started = time.monotonic()
    dataset = convert(
        args.dataset,
        args.workspace,
        labels=args.labels,
        groups=args.groups,
        workers=args.workers,
    )
    number = dataset.ignore_label
    ignored = "" if number is None else f" ({number} is left out of training and scores)"
    held = "".join(
        f"; region {dataset.labels[written]} is {' and '.join(map(str, labels))}"
        for written, labels in zip(dataset.regions, dataset.region_labels, strict=True)
    )
    sys.stdout.write(
        f"{dataset.name}: {len(dataset.cases)} cases, channels {', '.join(dataset.channels)}, "
        f"labels {', '.join(dataset.labels)}{ignored}{held} -> {args.workspace} "
        f"in {duration(time.monotonic() - started)}\n"
    )
    return 0


def _bring_case(move: _Move) -> None:
    if move.splits_channels:
        (image,) = move.source.images
        for channel, target in zip(volume.read_channels(image), move.target.images, strict=True):
            volume.write(channel, target)
    else:
        for image, target in zip(move.source.images, move.target.images, strict=True):
            _bring_volume(image, target)
    if move.source.label is not None and move.target.label is not None:
        _bring_volume(move.source.label, move.target.label, masks=move.masks)


def _bring_volume(source: Path, target: Path, *, masks: bool = False) -> None:
    """Bring a file as it is, unless it lies in two, or is a mask of 0 and 255."""
    if not masks and suffix_of(source) == suffix_of(target):
        bring(source, target)
        return
    (found,) = volume.read_channels(source)
    painted = masks and set(np.unique(found.voxels).tolist()) == {0, 255}
    if painted:
        found = found.with_voxels((found.voxels == 255).astype(np.uint8))
    if painted or suffix_of(source) != suffix_of(target):
        volume.write(found, target)
    else:
        bring(source, target)


def _read_table(groups: Path, workspace: Path, dataset: Dataset) -> bytes:
    """The bytes of a table of groups that fits the dataset."""
    splits.read_groups(groups, [case.name for case in dataset.labelled])
    content = groups.read_bytes()
    kept = groups_file(workspace)
    if kept.exists() and kept.read_bytes() != content:
        raise DatasetError(f"{kept}: exists and differs from {groups}")
    return content
