"""Whether a network stored in fp16 still segments as the one that was trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ichseg.errors import TrainingError
from ichseg.scan import volume
from ichseg.wording import counted
from training.crossval.validate import dice_of_labels, load_network, prepare_case, segment_case
from training.data.dataset import Dataset
from training.fit.fold_run import FoldRun

MAX_DICE_CHANGE = 1e-3  # of a label's mean Dice over the checked cases, up or down
FEW_VOXELS = 10  # whose change counts for nothing: the Dice of a small lesion hangs on one of them

_log = logging.getLogger(__name__)


class RoundingError(TrainingError):
    """A network that segments otherwise in fp16 than as it was trained."""


def check_rounding(
    data: Dataset,
    run: FoldRun,
    weights: Mapping[str, Tensor],
    most_cases: int,
) -> int:
    """Score a fold on some of its validation cases, with its weights as trained and in fp16.

    Cases without any reference label are passed over: one voxel more or less takes their Dice from
    undefined to 0. So is what rounding does to a case where it changes ten voxels or fewer.

    Args:
        data: The dataset of the workspace.
        run: The fold.
        weights: Its network as trained, fp32.
        most_cases: How many validation cases to score at most.

    Returns:
        How many cases were scored.

    Raises:
        RoundingError: The mean Dice of a label changes by more than 0.001, or is defined only
            before or only after rounding.
    """
    if most_cases == 0:
        return 0
    cases = {case.name: case for case in data.labelled}
    rounded = {key: value.half().float() for key, value in weights.items()}
    networks = [load_network(run, state) for state in (weights, rounded)]
    pairs: dict[str, list[tuple[float, float]]] = {}
    checked = 0
    for name in run.spec.validation:
        if checked == most_cases:
            break
        case = cases[name]
        reference = volume.read(case.reference).voxels
        if not np.isin(reference, range(1, len(run.plans.labels))).any():
            continue
        checked += 1
        given = prepare_case(case, run)
        labels = [segment_case(given, run, network) for network in networks]
        changed = int(np.count_nonzero(labels[0] != labels[1]))
        before, after = (
            dice_of_labels(found, reference, run.plans, data.ignore_label) for found in labels
        )
        _log.info(
            "%s fold %s, case %s: Dice %s as trained, %s in fp16; %s",
            run.configuration.name,
            run.fold,
            name,
            _text(before),
            _text(after),
            f"{counted(changed, 'voxel')} changed",
        )
        if changed <= FEW_VOXELS:
            after = before
        for label, old in before.items():
            new = after[label]
            if (old is None) != (new is None):
                raise RoundingError(
                    f"{run.folder}: Dice of {label} in case {name} is {old} as trained, {new} in "
                    f"fp16; expected a number from both or none from both"
                )
            if old is not None and new is not None:
                pairs.setdefault(label, []).append((old, new))
    for label, scores in pairs.items():
        _require_same_mean(run, label, scores)
    return checked


def _text(scores: Mapping[str, float | None]) -> str:
    """The Dice of each label, finer than the change that is allowed; a dash where there is none."""
    numbers = {label: "-" if dice is None else f"{dice:.4f}" for label, dice in scores.items()}
    return ", ".join(f"{label} {number}" for label, number in numbers.items())


def _require_same_mean(run: FoldRun, label: str, scores: list[tuple[float, float]]) -> None:
    old, new = (sum(values) / len(scores) for values in zip(*scores, strict=True))
    if abs(old - new) > MAX_DICE_CHANGE:
        raise RoundingError(
            f"{run.folder}: mean Dice of {label} in {counted(len(scores), 'case')} is {old:.4f} as "
            f"trained, {new:.4f} in fp16; expected a change of at most {MAX_DICE_CHANGE}"
        )
