"""Whether a scan shows a bleed at all: how well a case's score tells those that do from the others.

The area under the ROC curve is the chance that a scan with a bleed scores higher than one without;
equal scores count half. Its 95 % interval is DeLong's (1988), computed from midranks as Sun and Xu
do (2014).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn import metrics

from training.scoring.statistics import NORMAL_95


@dataclass(frozen=True, slots=True)
class Area:
    """The area under an ROC curve.

    Attributes:
        value: The area; None unless there are scans of both kinds.
        low: The lower end of its 95 % interval; None with fewer than two scans of a kind, and where
            no two scans of different kinds stand in the wrong order, or all do: DeLong's variance
            is 0 then and says nothing.
        high: The upper end of the interval; None likewise.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class RocPoint:
    """Shares of scans that score a threshold or more.

    Attributes:
        threshold: The threshold; None for the curve's first point, above all scores.
        false_positive_rate: The share of the scans without a bleed that score so much.
        sensitivity: The share of the scans with a bleed that score so much.
    """

    threshold: float | None
    false_positive_rate: float
    sensitivity: float


def area_under_roc(positive: Sequence[bool], scores: Sequence[float]) -> Area:
    """The area under the ROC curve with DeLong's 95 % interval.

    Args:
        positive: For each scan whether it shows a bleed.
        scores: For each scan a score, higher where a bleed is likelier.

    Raises:
        ValueError: The lengths differ, or a score is not finite.
    """
    is_positive, values = _checked(positive, scores)
    with_bleed, without = values[is_positive], values[~is_positive]
    count_with, count_without = len(with_bleed), len(without)
    if not count_with or not count_without:
        return Area(None, None, None)
    ranks = stats.rankdata(np.concatenate([with_bleed, without]))
    # each scan's share of the scans of the other kind that stand on the right side of it
    of_with = (ranks[:count_with] - stats.rankdata(with_bleed)) / count_without
    of_without = 1 - (ranks[count_with:] - stats.rankdata(without)) / count_with
    area = float(of_with.mean())
    if min(count_with, count_without) < 2:
        return Area(area, None, None)
    variance = of_with.var(ddof=1) / count_with + of_without.var(ddof=1) / count_without
    if variance < 1e-15:
        return Area(area, None, None)
    reach = NORMAL_95 * math.sqrt(variance)
    return Area(area, max(0.0, area - reach), min(1.0, area + reach))


def roc_curve(positive: Sequence[bool], scores: Sequence[float]) -> tuple[RocPoint, ...]:
    """The ROC curve from nothing called positive to everything; scans of both kinds are needed.

    Args:
        positive: As for ``area_under_roc``.
        scores: As for ``area_under_roc``.

    Raises:
        ValueError: The lengths differ, a score is not finite, or all scans are of one kind.
    """
    is_positive, values = _checked(positive, scores)
    if is_positive.all() or not is_positive.any():
        raise ValueError(f"{len(is_positive)} scans of one kind, expected some with and without")
    false_rates, sensitivities, thresholds = metrics.roc_curve(is_positive, values)
    return tuple(
        RocPoint(None if math.isinf(threshold) else threshold, false_rate, sensitivity)
        for threshold, false_rate, sensitivity in zip(
            thresholds.tolist(), false_rates.tolist(), sensitivities.tolist(), strict=True
        )
    )


def _checked(
    positive: Sequence[bool], scores: Sequence[float]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    is_positive, values = np.asarray(positive, bool), np.asarray(scores, np.float64)
    if is_positive.shape != values.shape:
        raise ValueError(f"{len(is_positive)} scans and {len(values)} scores")
    if not np.isfinite(values).all():
        raise ValueError("a score that is not finite")
    return is_positive, values
