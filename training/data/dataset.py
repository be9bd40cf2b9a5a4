"""Training datasets: what the cases are called and where their files lie.

``WORKSPACE/dataset.json`` lists them; ``convert`` writes it, and every later step reads it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichseg.errors import DatasetError, IchsegError
from ichseg.files import replacing
from ichseg.model import strict_json
from ichseg.model.plans import check_regions
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from ichseg.wording import repeated
from training.data.workspace import dataset_file

SCHEMA_VERSION = 1
HIGHEST_LABEL = 127  # of a stored target, int8; -1 is beyond the image
_SAME_AXES, _SAME_STEPS = 0.1, 0.05  # of cosines, and a share: headers are rounded


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

    @property
    def reference(self) -> Path:
        """The file of the reference segmentation, of a case that must have one.

        Raises:
            DatasetError: It has none.
        """
        if self.label is None:
            raise DatasetError(f"case {self.name} has no reference segmentation")
        return self.label

    @property
    def files(self) -> tuple[Path, ...]:
        """Its images, in order, and its reference if there is one."""
        return (*self.images, *([self.label] if self.label is not None else []))


@dataclass(frozen=True, slots=True)
class Dataset:
    """The cases of one task.

    Attributes:
        name: Name of the task.
        channels: Modality of each channel, such as ``CT``.
        labels: Names by voxel value; ``labels[0]`` is the background.
        cases: The cases, sorted by name.
        ignore_label: The value of voxels that nobody could tell, which count neither in training
            nor in scores; always the one above the last label. None if there are no such voxels.
        regions: The label that each region writes where labels are regions, see ``Plans``.
        region_labels: The labels that each region holds.
    """

    name: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    cases: tuple[Case, ...]
    ignore_label: int | None = None
    regions: tuple[int, ...] = ()
    region_labels: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.channels:
            raise DatasetError(f"dataset {self.name}: no channels")
        if len(self.labels) < 2:
            raise DatasetError(
                f"dataset {self.name}: labels {self.labels}, expected a background and one more"
            )
        if alike := repeated(self.labels):  # scores go by the names: one would replace the other
            raise DatasetError(
                f"dataset {self.name}: several labels are called {', '.join(alike)}, expected a "
                f"name of its own for each of {', '.join(self.labels)}"
            )
        if self.ignore_label not in (None, len(self.labels)):
            raise DatasetError(
                f"dataset {self.name}: the label to ignore is {self.ignore_label}, expected the "
                f"highest, {len(self.labels)}"
            )
        highest = self.ignore_label or len(self.labels) - 1
        if highest > HIGHEST_LABEL:
            raise DatasetError(
                f"dataset {self.name}: labels up to {highest}, expected up to {HIGHEST_LABEL}, "
                "which is what preprocessed cases can hold"
            )
        if len(self.region_labels) != len(self.regions):
            raise DatasetError(
                f"dataset {self.name}: {len(self.regions)} regions, and the labels of "
                f"{len(self.region_labels)}"
            )
        try:
            check_regions(len(self.labels) - 1, self.regions, self.region_labels)
        except ValueError as error:
            raise DatasetError(f"dataset {self.name}: {error}") from error
        if twice := repeated(case.name for case in self.cases):
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
    ignore_label: int | None = strict_json.optional(None)
    regions: tuple[int, ...] = strict_json.optional(())
    region_labels: tuple[tuple[int, ...], ...] = strict_json.optional(())

    def __post_init__(self) -> None:
        strict_json.check_schema("dataset", self.schema_version, SCHEMA_VERSION)


def is_ct(channel: str) -> bool:
    """Whether a channel's modality is CT."""
    return channel.strip().casefold() == "ct"


def load_dataset(workspace: Path) -> Dataset:
    """Read ``WORKSPACE/dataset.json``.

    Raises:
        DatasetError: The workspace has no dataset, or the cases contradict one another.
        PlansError: The file does not have the schema this code reads.
    """
    path = dataset_file(workspace)
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; make it with `convert DATASET --workspace ...`")
    raw = strict_json.load(_DatasetFile, path)
    cases = tuple(
        Case(
            name=entry.name,
            images=tuple(workspace / image for image in entry.images),
            label=None if entry.label is None else workspace / entry.label,
        )
        for entry in raw.cases
    )
    ordered = tuple(sorted(cases, key=lambda case: case.name))
    return Dataset(
        raw.name,
        raw.channels,
        raw.labels,
        ordered,
        raw.ignore_label,
        raw.regions,
        raw.region_labels,
    )


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
    content = _DatasetFile(
        SCHEMA_VERSION,
        dataset.name,
        dataset.channels,
        dataset.labels,
        cases,
        dataset.ignore_label,
        dataset.regions,
        dataset.region_labels,
    )
    with replacing(dataset_file(workspace)) as temporary:
        temporary.write_text(strict_json.dumps(content), encoding="utf-8")


def read_case(
    case: Case, labels: Sequence[str], ignore_label: int | None = None
) -> tuple[tuple[Volume, ...], Volume]:
    """Read a labelled case: its channels and its reference, checked against one another.

    Args:
        case: The case.
        labels: Names by voxel value.
        ignore_label: A further value that the reference may have, see ``Dataset``.

    Raises:
        DatasetError: No reference, sizes or axes that differ, or label values that are not
            declared.
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
        _refuse_turned(path, image, reference)
    wrong = wrong_labels(reference, len(labels) - 1 if ignore_label is None else ignore_label)
    if wrong is not None:
        raise DatasetError(f"{case.label}: {wrong}")
    return images, reference


def wrong_labels(mask: Volume, highest: int) -> str | None:
    """What is wrong with the values of a mask: not whole labels from 0 on; None if nothing is."""
    low, high = float(mask.voxels.min()), float(mask.voxels.max())
    whole = mask.voxels.dtype.kind in "iub" or bool(
        np.array_equal(mask.voxels, np.rint(mask.voxels))
    )
    if low >= 0 and high <= highest and whole:
        return None
    found = f"values {low:g}..{high:g}{'' if whole else ' that are not all whole'}"
    return f"{found}, expected whole labels 0..{highest}"


def _refuse_turned(path: Path, image: Volume, reference: Volume) -> None:
    """Refuse an image whose axes run otherwise than its reference's, or have other steps.

    Voxel by voxel they would not lie on each other. An origin that got lost is no harm, and for
    ``verify`` to tell.

    Raises:
        DatasetError: It is one.
    """
    turned = np.abs(np.subtract(image.direction, reference.direction)).max() > _SAME_AXES
    if turned or not np.allclose(image.spacing_mm, reference.spacing_mm, rtol=_SAME_STEPS, atol=0):
        raise DatasetError(
            f"{path}: its axes or voxel sizes are others than its reference's; `verify` says which"
        )


def describe_failure(case: Case, error: Exception) -> str:
    """One line that names the case and says what went wrong."""
    text = str(error) if isinstance(error, IchsegError) else f"{type(error).__name__}: {error}"
    return f"case {case.name}: {text}"


def add_workspace_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that every command of the training package takes."""
    parser.add_argument(
        "--workspace",
        type=Path,
        required=True,
        metavar="W",
        help="folder that holds everything about one dataset",
    )


def _portable(path: Path, workspace: Path) -> str:
    try:
        return path.relative_to(workspace).as_posix()
    except ValueError:
        return str(path.absolute())
