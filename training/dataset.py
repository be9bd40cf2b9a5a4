"""Training datasets: what the cases are called and where their files lie.

``convert`` brings a dataset into a workspace, a folder that can be moved as a whole:

    WORKSPACE/dataset.json              names, channels, labels and file names of the cases
    WORKSPACE/raw/images/<case>_0000.nii.gz, _0001 ...   one file per channel
    WORKSPACE/raw/labels/<case>.nii.gz
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ichseg import schema, volume
from ichseg.errors import DatasetError, IchsegError
from ichseg.volume import Volume

SCHEMA_VERSION = 1
DATASET_FILE = "dataset.json"

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Case:
    """One patient scan.

    Attributes:
        name: Unique within the dataset; file names are made from it.
        images: One file per channel.
        label: The file of the reference segmentation, or None when there is none.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True, slots=True)
class Dataset:
    """The cases of one task.

    Attributes:
        name: Name of the task.
        channels: Modality of each channel, such as ``CT``.
        labels: Names by voxel value; ``labels[0]`` is the background.
        cases: Sorted by name.
    """

    name: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    cases: tuple[Case, ...]

    def __post_init__(self) -> None:
        if not self.channels:
            raise DatasetError(f"dataset {self.name}: no channels")
        if len(self.labels) < 2:
            raise DatasetError(
                f"dataset {self.name}: labels {self.labels}, expected a background and one more"
            )
        names = [case.name for case in self.cases]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DatasetError(f"dataset {self.name}: case names given twice: {twice}")
        for case in self.cases:
            if not case.name or case.name.startswith(".") or "/" in case.name:
                raise DatasetError(f"dataset {self.name}: case name {case.name!r} is no file name")
            if len(case.images) != len(self.channels):
                raise DatasetError(
                    f"case {case.name}: {len(case.images)} images, expected one for each of "
                    f"{self.channels}"
                )

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The cases that have a reference segmentation: those to train on."""
        return tuple(case for case in self.cases if case.label is not None)


@dataclass(frozen=True, slots=True)
class _CaseEntry:
    """A case in dataset.json; paths are relative to the workspace, or absolute."""

    name: str
    images: tuple[str, ...]
    label: str | None


@dataclass(frozen=True, slots=True)
class _DatasetFile:
    """The layout of dataset.json."""

    schema_version: int
    name: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    cases: tuple[_CaseEntry, ...]

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"dataset schema {self.schema_version}, this code reads {SCHEMA_VERSION}"
            )


def is_ct(channel: str) -> bool:
    """Whether a channel's modality is CT."""
    return channel.strip().casefold() == "ct"


def load_dataset(workspace: Path) -> Dataset:
    """Read ``WORKSPACE/dataset.json``.

    Raises:
        DatasetError: The workspace has no dataset, or the cases contradict one another.
        PlansError: The file does not have the schema this code reads.
    """
    path = workspace / DATASET_FILE
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; make it with `convert DATASET --workspace ...`")
    raw = schema.load(_DatasetFile, path)
    cases = tuple(
        Case(
            name=entry.name,
            images=tuple(workspace / image for image in entry.images),
            label=None if entry.label is None else workspace / entry.label,
        )
        for entry in raw.cases
    )
    ordered = tuple(sorted(cases, key=lambda case: case.name))
    return Dataset(name=raw.name, channels=raw.channels, labels=raw.labels, cases=ordered)


def save_dataset(dataset: Dataset, workspace: Path) -> None:
    """Write ``WORKSPACE/dataset.json``; files inside the workspace are named relative to it."""
    cases = tuple(
        _CaseEntry(
            name=case.name,
            images=tuple(_portable(image, workspace) for image in case.images),
            label=None if case.label is None else _portable(case.label, workspace),
        )
        for case in dataset.cases
    )
    content = _DatasetFile(SCHEMA_VERSION, dataset.name, dataset.channels, dataset.labels, cases)
    with volume.replacing(workspace / DATASET_FILE) as temporary:
        temporary.write_text(schema.dumps(content), encoding="utf-8")


def convert(source: Path, workspace: Path) -> Dataset:
    """Bring a dataset in Medical Segmentation Decathlon layout into a new workspace.

    Files are hard-linked where source and workspace share a file system and copied elsewhere; the
    source is never altered. Test images are left out: they need no workspace to be predicted.

    Args:
        source: Folder with ``dataset.json``, ``imagesTr`` and ``labelsTr``.
        workspace: Made if need be; must not hold a dataset yet.

    Raises:
        DatasetError: The source is not of this layout, or the workspace already holds a dataset.
    """
    if (workspace / DATASET_FILE).exists():
        raise DatasetError(
            f"{workspace / DATASET_FILE}: exists; expected a workspace that holds no dataset yet"
        )
    if workspace.resolve().is_relative_to(source.resolve()):
        raise DatasetError(f"{workspace}: lies in the dataset {source}, which stays as it is")
    found = _read_msd(source)
    cases = []
    for case in found.cases:
        images = tuple(
            _bring(image, workspace / "raw" / "images", f"{case.name}_{channel:04d}")
            for channel, image in enumerate(case.images)
        )
        label = None
        if case.label is not None:
            label = _bring(case.label, workspace / "raw" / "labels", case.name)
        cases.append(Case(case.name, images, label))
    dataset = Dataset(found.name, found.channels, found.labels, tuple(cases))
    save_dataset(dataset, workspace)  # last: it marks a finished conversion
    return dataset


def read_case(case: Case, labels: Sequence[str]) -> tuple[tuple[Volume, ...], Volume]:
    """Read a labelled case: its channels and its reference, checked against one another.

    Raises:
        DatasetError: No reference, sizes that differ, or label values that are not declared.
        InputError: A file cannot be read as a volume.
    """
    if case.label is None:
        raise DatasetError(f"case {case.name}: no reference segmentation")
    images = tuple(volume.read(path) for path in case.images)
    reference = volume.read(case.label)
    for path, image in zip(case.images, images, strict=True):
        if image.voxels.shape != reference.voxels.shape:
            raise DatasetError(
                f"{path}: shape {image.voxels.shape}, but its reference has "
                f"{reference.voxels.shape}"
            )
    low, high = float(reference.voxels.min()), float(reference.voxels.max())
    integral = reference.voxels.dtype.kind in "iub" or bool(
        np.array_equal(reference.voxels, np.rint(reference.voxels))
    )
    if low < 0 or high >= len(labels) or not integral:
        raise DatasetError(
            f"{case.label}: values {low:g}..{high:g}"
            f"{'' if integral else ' that are not all whole'}, expected whole labels "
            f"0..{len(labels) - 1}"
        )
    return images, reference


def each_case(
    function: Callable[..., T],
    cases: Sequence[Case],
    *shared: object,
    workers: int,
    initialize: Callable[[], None] | None = None,
) -> Iterator[tuple[Case, T | Exception]]:
    """Run ``function(case, *shared)`` over all cases in parallel processes, in order of completion.

    A case that fails yields its exception in place of a result and stops no other. With one worker
    everything runs in this process.

    Raises:
        DatasetError: A worker process was killed, most often for want of memory.
    """
    if workers < 1:
        raise DatasetError(f"{workers} workers, expected at least 1")
    if workers == 1:
        for case in cases:
            try:
                yield case, function(case, *shared)
            except Exception as error:  # whatever it is, the other cases go on
                yield case, error
        return
    # forkserver: no copy of this process' threads and memory, and torch is imported only once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ichseg.preprocess", function.__module__])
    with ProcessPoolExecutor(
        min(workers, max(1, len(cases))), mp_context=context, initializer=initialize
    ) as pool:
        waiting: dict[Future[T], Case] = {
            pool.submit(function, case, *shared): case for case in cases
        }
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    case, failure = waiting.pop(future), future.exception()
                    if isinstance(failure, BrokenProcessPool):
                        raise DatasetError(
                            "a worker process was killed, perhaps for want of memory; "
                            "try fewer --workers"
                        ) from failure
                    yield case, failure if isinstance(failure, Exception) else future.result()
        finally:  # interrupted: the cases that have not begun never do
            pool.shutdown(wait=False, cancel_futures=True)


def describe_failure(case: Case, error: Exception) -> str:
    """One line that names the case and says what went wrong."""
    text = str(error) if isinstance(error, IchsegError) else f"{type(error).__name__}: {error}"
    return f"case {case.name}: {text}"


def default_workers() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_workspace_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that every command of the training package takes."""
    parser.add_argument(
        "--workspace",
        type=Path,
        required=True,
        metavar="W",
        help="folder that holds everything about one dataset",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the ``convert`` command."""
    parser.add_argument(
        "dataset",
        type=Path,
        metavar="DATASET",
        help="folder in Medical Segmentation Decathlon layout: dataset.json, imagesTr, labelsTr",
    )
    add_workspace_argument(parser)


def main(args: argparse.Namespace) -> int:
    """Run the ``convert`` command."""
    dataset = convert(args.dataset, args.workspace)
    sys.stdout.write(
        f"{dataset.name}: {len(dataset.cases)} cases, channels {', '.join(dataset.channels)}, "
        f"labels {', '.join(dataset.labels)} -> {args.workspace}\n"
    )
    return 0


def _portable(path: Path, workspace: Path) -> str:
    try:
        return path.relative_to(workspace).as_posix()
    except ValueError:
        return str(path.absolute())


def _bring(source: Path, folder: Path, stem: str) -> Path:
    """Hard-link or copy a file into the workspace, under a name that keeps its suffix."""
    target = folder / (stem + volume.suffix_of(source))
    folder.mkdir(parents=True, exist_ok=True)
    # a conversion that was cut off may have left this name, perhaps as a hard link: it is replaced
    # and never written into, which would alter the source
    target.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another file system, or links not allowed
        os.link(source.resolve(), target)
        return target
    with volume.replacing(target) as temporary:
        shutil.copyfile(source, temporary)
    return target


def _read_msd(source: Path) -> Dataset:
    """The cases of a Medical Segmentation Decathlon folder, where they lie."""
    path = source / DATASET_FILE
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; expected an MSD dataset folder")
    raw = schema.load_object(path)
    if not isinstance(raw, Mapping):
        raise DatasetError(f"{path}: found {type(raw).__name__}, expected an object")
    channels = _msd_channels(raw, path)
    if str(raw.get("tensorImageSize", "3D")).upper() == "4D" or len(channels) > 1:
        raise DatasetError(
            f"{path}: 4D images with channels {channels}; only 3D images with one channel can be "
            "converted yet"
        )
    cases = tuple(sorted(_msd_cases(raw, source, path), key=lambda case: case.name))
    if not cases:
        raise DatasetError(f"{path}: lists no training cases")
    for case in cases:
        for file in (*case.images, *([case.label] if case.label else [])):
            if not file.is_file():
                raise DatasetError(f"case {case.name}: {file}: no such file")
            if not volume.suffix_of(file):
                raise DatasetError(
                    f"case {case.name}: {file}: unknown file type, expected one of "
                    f"{', '.join(volume.SUFFIXES)}"
                )
    name = str(raw.get("name") or source.resolve().name)
    return Dataset(name, channels, _msd_labels(raw, path), cases)


def _msd_channels(raw: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    table = raw.get("modality", raw.get("channel_names"))
    if not isinstance(table, Mapping) or not table:
        raise DatasetError(
            f"{path}: modality is {table!r}, expected an object such as {{'0': 'CT'}}"
        )
    return tuple(str(table[key]) for key in _consecutive(table, path, "modality"))


def _msd_labels(raw: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Label names by value; MSD writes value -> name, nnU-Net v2 name -> value."""
    table = raw.get("labels")
    if not isinstance(table, Mapping) or not table:
        raise DatasetError(
            f"{path}: labels is {table!r}, expected an object such as {{'0': 'background'}}"
        )
    if all(isinstance(value, int) for value in table.values()):
        table = {str(value): name for name, value in table.items()}
    return tuple(str(table[key]) for key in _consecutive(table, path, "labels"))


def _consecutive(table: Mapping[str, Any], path: Path, what: str) -> list[str]:
    """The keys "0", "1", ... in order."""
    keys = [str(i) for i in range(len(table))]
    if set(table) != set(keys):
        raise DatasetError(f"{path}: {what} has keys {sorted(table)}, expected {keys}")
    return keys


def _msd_cases(raw: Mapping[str, Any], source: Path, path: Path) -> Iterator[Case]:
    """The listed cases; hidden files (macOS leaves ``._name`` beside each) are passed over."""
    listed = raw.get("training")
    if not isinstance(listed, list):
        raise DatasetError(f"{path}: training is {listed!r}, expected a list of cases")
    for entry in listed:
        if not isinstance(entry, Mapping) or not {"image", "label"} <= entry.keys():
            raise DatasetError(f"{path}: training lists {entry!r}, expected image and label")
        image, label = source / str(entry["image"]), source / str(entry["label"])
        if not image.name.startswith("."):
            yield Case(volume.stem_of(image), (image,), label)
