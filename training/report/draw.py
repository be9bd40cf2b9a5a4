"""Every case of an evaluation is drawn, several at a time, and then the page is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichseg.errors import DatasetError, IchsegError, TrainingError
from ichseg.report.case_files import write_case
from ichseg.scan import volume
from training.data import parallel
from training.report import evaluation_page
from training.report.evaluation_page import Context
from training.scoring.ignored import leave_out
from training.scoring.scores import CaseScore
from training.scoring.summary import Evaluation

# The peak of one worker: an image as float, two masks, their copies; and the libraries.
_BYTES_PER_VOXEL, _BYTES_BESIDE = 24, 400_000_000
_SAME_VOLUME = 1e-6  # relative, of the masks of a case


@dataclass(frozen=True, slots=True)
class CaseVolumes:
    """The files of one case, all in one grid.

    Attributes:
        name: The case's name.
        image: The scan.
        prediction: The mask that was scored.
        reference: The mask that it was scored by.
        ignore_label: The value of the reference's voxels that nobody could tell; they are not
            drawn.
    """

    name: str
    image: Path
    prediction: Path
    reference: Path
    ignore_label: int | None = None


def write(
    evaluation: Evaluation,
    volumes: Sequence[CaseVolumes],
    out: Path,
    context: Context,
    *,
    is_ct: bool,
    workers: int | None = None,
) -> Path:
    """Draw all cases of an evaluation and write its page.

    Args:
        evaluation: The scores.
        volumes: The files of the same cases.
        out: The folder of the page, made if need be.
        context: What else there is to say.
        is_ct: Whether the scans are in HU.
        workers: How many processes draw; None for as many as cores and memory allow.

    Returns:
        The path of the page.

    Raises:
        TrainingError: The cases are not the same.
        IchsegError: A file cannot be read or written.
    """
    _require_same_cases(evaluation, volumes)
    if workers is None:
        images = [case.image for case in volumes]
        workers = parallel.workers_for(images, _BYTES_PER_VOXEL, _BYTES_BESIDE)
    scored_ml = {case.name: _scored_ml(case) for case in evaluation.cases}
    results = parallel.each_case(draw_case, volumes, out, is_ct, scored_ml, workers=workers)
    for case, result in parallel.with_progress(results, len(volumes), "report"):
        if isinstance(result, IchsegError):
            raise result
        if isinstance(result, Exception):
            raise TrainingError(f"{case.name}: {type(result).__name__}: {result}") from result
    return evaluation_page.write(out, evaluation, context)


def draw_case(
    case: CaseVolumes, out: Path, is_ct: bool, scored_ml: Mapping[str, tuple[float, float]]
) -> None:
    """Write the pictures and volumes of one case.

    Args:
        case: The case's files.
        out: The folder of the page.
        is_ct: Whether the scan is in HU.
        scored_ml: By the case's name the volumes of its prediction and its reference that were
            scored, which the files have to have.

    Raises:
        InputError: A file cannot be read.
        DatasetError: Their sizes differ, or a mask is not the one that was scored.
    """
    image = volume.read(case.image)
    masks = {}
    for name, path in (("reference", case.reference), ("prediction", case.prediction)):
        masks[name] = volume.read(path)
        if masks[name].voxels.shape != image.voxels.shape:
            raise DatasetError(
                f"{path}: shape {masks[name].voxels.shape}, expected {image.voxels.shape} as of "
                f"{case.image}"
            )
    found, told = leave_out(
        masks["prediction"].voxels, masks["reference"].voxels, case.ignore_label
    )
    paths, voxel_ml = (case.prediction, case.reference), masks["reference"].voxel_ml
    for path, labels, expected in zip(paths, (found, told), scored_ml[case.name], strict=True):
        volume_ml = np.count_nonzero(labels) * voxel_ml
        if not math.isclose(volume_ml, expected, rel_tol=_SAME_VOLUME):
            raise DatasetError(
                f"{path}: {volume_ml:.6g} mL are labelled, expected the mask that was scored, "
                f"with {expected:.6g} mL; evaluate again if it has changed"
            )
    masks["reference"] = masks["reference"].with_voxels(
        told.astype(masks["reference"].voxels.dtype)
    )
    write_case(out, case.name, image, masks, is_ct=is_ct)


def _require_same_cases(evaluation: Evaluation, volumes: Sequence[CaseVolumes]) -> None:
    scored, there = ({case.name for case in cases} for cases in (evaluation.cases, volumes))
    if scored != there:
        odd = sorted(scored ^ there)
        where = "evaluation" if odd[0] in scored else "files"
        raise TrainingError(
            f"the evaluation has {len(scored)} cases and there are files of {len(there)}; "
            f"{odd[0]} is only in the {where}: evaluate them again"
        )


def _scored_ml(case: CaseScore) -> tuple[float, float]:
    """The volumes of all labels in a case's prediction and in its reference."""
    return (
        sum(score.predicted_ml for score in case.disjoint),
        sum(score.reference_ml for score in case.disjoint),
    )
