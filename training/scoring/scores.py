"""Two files of labels, a prediction and its reference, become the scores of one case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.errors import DatasetError, InputError
from ichseg.model import strict_json
from ichseg.model.plans import Region
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.data.dataset import wrong_labels
from training.data.examine import compare, grid_of
from training.scoring.ignored import leave_out
from training.scoring.lesions import Lesion, find_lesions
from training.scoring.measures import Scores, diagonal_mm, score_masks
from training.scoring.surface import bounding_box

Labels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

HIGHEST_LABEL = 63  # 64 labels are what the platform takes for a segmentation, more an image


@dataclass(frozen=True, slots=True)
class Pair:
    """The files of one case.

    Attributes:
        name: The case's name.
        prediction: The file of the label volume to score.
        reference: The file of the reference label volume.
    """

    name: str
    prediction: Path
    reference: Path


@dataclass(frozen=True, slots=True)
class LabelScore:
    """How one label of one case was found.

    Attributes:
        label: The label's name.
        scores: How well the two masks agree.
        reference_ml: The volume of the label in the reference.
        predicted_ml: The volume of the label in the prediction.
        overlap_ml: The volume that both share.
        reference_lesions: The connected pieces of the reference, largest first.
        predicted_lesions: The connected pieces of the prediction, largest first.
    """

    label: str
    scores: Scores
    reference_ml: float
    predicted_ml: float
    overlap_ml: float
    reference_lesions: tuple[Lesion, ...]
    predicted_lesions: tuple[Lesion, ...]

    @property
    def missed(self) -> bool:
        """Whether the reference has the label and the prediction shares not a voxel with it."""
        return self.reference_ml > 0 and self.overlap_ml == 0

    @property
    def hits(self) -> int:
        """How many lesions of the reference were found."""
        return sum(lesion.overlaps for lesion in self.reference_lesions)

    @property
    def false_lesions(self) -> int:
        """How many lesions were found that are none."""
        return sum(not lesion.overlaps for lesion in self.predicted_lesions)


@dataclass(frozen=True, slots=True)
class CaseScore:
    """The scores of all labels of one case.

    Attributes:
        name: The case's name.
        prediction: The name of the file that was scored.
        reference: The name of the reference file.
        labels: One score for each label, in the order of the label values.
        ignored_ml: The volume of the reference's voxels that were left out.
        whole: The score of all foreground together, where regions share labels; else None.
    """

    name: str
    prediction: str
    reference: str
    labels: tuple[LabelScore, ...]
    ignored_ml: float = strict_json.optional(0.0)
    whole: LabelScore | None = strict_json.optional(None)  # noqa: RUF009

    @property
    def disjoint(self) -> tuple[LabelScore, ...]:
        """Scores that share no voxel: those of the labels, or where regions overlap that of all."""
        return self.labels if self.whole is None else (self.whole,)


def score_pair(
    pair: Pair,
    names: tuple[str, ...] | None,
    empty: str,
    ignore_label: int | None = None,
    held: tuple[tuple[int, ...], ...] = (),
) -> CaseScore:
    """Read a case's two files, see that they fit each other, and score each label.

    Args:
        pair: The case's two files.
        names: The names of the labels 1, 2, ...; or None to score, under their numbers, the labels
            that either file has.
        empty: The policy for empty masks, see ``training.scoring.measures``.
        ignore_label: The value of the reference's voxels that are left out of all scores, the one
            above all labels; None if there are none.
        held: For each name the labels that it stands for, where these are not 1, 2, ...

    Raises:
        InputError: A file is not a volume of labels.
        DatasetError: The files differ in size or place.
    """
    highest = HIGHEST_LABEL if names is None else highest_label(names, held)
    if ignore_label is not None:
        highest = ignore_label - 1
    reference = read_labels(pair.reference, highest if ignore_label is None else ignore_label)
    prediction = read_labels(pair.prediction, highest)
    for difference, _ in compare(grid_of(prediction), grid_of(reference)):
        raise DatasetError(f"{pair.prediction}: {difference} as {pair.reference}")
    found, expected = leave_out(prediction.voxels, reference.voxels, ignore_label)
    labels = score_labels(
        np.asarray(found, np.uint8),
        np.asarray(expected, np.uint8),
        reference.spacing_mm,
        names=names,
        empty=empty,
        held=held,
    )
    ignored_ml = 0.0
    if ignore_label is not None:
        ignored_ml = float(np.count_nonzero(reference.voxels == ignore_label) * reference.voxel_ml)
    whole = None
    if held:
        every = tuple(range(1, highest + 1))
        (whole,) = score_labels(
            np.asarray(found, np.uint8),
            np.asarray(expected, np.uint8),
            reference.spacing_mm,
            names=["whole"],
            empty=empty,
            held=[every],
        )
    return CaseScore(
        pair.name, pair.prediction.name, pair.reference.name, labels, ignored_ml, whole
    )


def score_labels(
    prediction: Labels,
    reference: Labels,
    spacing_mm: tuple[float, float, float],
    *,
    names: Sequence[str] | None,
    empty: str,
    held: Sequence[tuple[int, ...]] = (),
) -> tuple[LabelScore, ...]:
    """Score each label of two label arrays.

    Args:
        prediction: The labels to score, shape ``(z, y, x)``.
        reference: The reference labels, of the same shape.
        spacing_mm: The voxel size, ``(z, y, x)``.
        names: As for ``score_pair``.
        empty: As for ``score_pair``.
        held: As for ``score_pair``.
    """
    across = diagonal_mm(reference.shape, spacing_mm)
    box = bounding_box((prediction | reference) != 0)
    prediction, reference = prediction[box], reference[box]
    if names is None:
        counts = np.bincount(prediction.ravel()), np.bincount(reference.ravel())
        values = sorted({int(v) for c in counts for v in np.flatnonzero(c)} - {0})
        regions = [Region(str(value), value, (value,)) for value in values]
    else:
        regions = regions_of(names, held)
    return tuple(
        _score_label(
            region.name,
            region.mask(prediction),
            region.mask(reference),
            spacing_mm,
            empty,
            across,
        )
        for region in regions
    )


def regions_of(names: Sequence[str], held: Sequence[tuple[int, ...]] = ()) -> list[Region]:
    """What is scored under each name: the labels that it stands for, by default 1, 2, ..."""
    labels = held or [(label,) for label in range(1, len(names) + 1)]
    return [Region(name, own[0], own) for name, own in zip(names, labels, strict=True)]


def highest_label(names: Sequence[str], held: Sequence[tuple[int, ...]] = ()) -> int:
    """The highest label that masks may have where these are scored."""
    return max(max(region.labels) for region in regions_of(names, held))


def absent(label: str, empty: str) -> LabelScore:
    """The score of a label that neither file has."""
    nothing = np.zeros((1, 1, 1), np.uint8)
    (score,) = score_labels(nothing, nothing, (1.0, 1.0, 1.0), names=[label], empty=empty)
    return score


def read_labels(path: Path, highest: int) -> Volume:
    """Read a volume whose voxels are whole numbers from 0 on.

    Args:
        path: The file.
        highest: The highest label that may occur.

    Raises:
        InputError: The file cannot be read, or has other values.
    """
    found = volume.read(path)
    wrong = wrong_labels(found, highest)
    if wrong is not None:
        raise InputError(f"{path}: {wrong}")
    return found.with_voxels(found.voxels.astype(np.uint8))


def _score_label(
    label: str,
    prediction: Mask,
    reference: Mask,
    spacing_mm: tuple[float, float, float],
    empty: str,
    across_mm: float,
) -> LabelScore:
    voxel_ml = math.prod(spacing_mm) / 1000.0
    return LabelScore(
        label=label,
        scores=score_masks(prediction, reference, spacing_mm, empty=empty, diagonal_mm=across_mm),
        reference_ml=int(np.count_nonzero(reference)) * voxel_ml,
        predicted_ml=int(np.count_nonzero(prediction)) * voxel_ml,
        overlap_ml=int(np.count_nonzero(prediction & reference)) * voxel_ml,
        reference_lesions=find_lesions(reference, prediction, voxel_ml),
        predicted_lesions=find_lesions(prediction, reference, voxel_ml),
    )
