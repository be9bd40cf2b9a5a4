"""How sure a mean is, whether two differ, and how well two sets of volumes agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

RESAMPLES = 10_000
_BATCH = 1_000  # resamples at once, so that memory stays small
NORMAL_95 = 1.959964  # deviations of a normal distribution within which 95 % lie


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval.

    Attributes:
        mean: The mean; None without values.
        low: The lower end of the interval; None with fewer than two values.
        high: The upper end; None with fewer than two values.
        count: How many values there are.
    """

    mean: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True, slots=True)
class VolumeAgreement:
    """How found volumes agree with those of the reference (Bland and Altman 1986).

    Attributes:
        bias_ml: The mean of found less reference.
        low_ml: The lower 95 % limit of the differences, the bias less 1.96 deviations; None with
            fewer than two cases.
        high_ml: The upper limit, the bias plus 1.96 deviations; None likewise.
        correlation: The intraclass correlation ICC(2,1), two-way random, absolute agreement, of
            single measurements (Shrout and Fleiss 1979). None where it is not defined.
    """

    bias_ml: float | None
    low_ml: float | None
    high_ml: float | None
    correlation: float | None


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of finite values, and its 95 % interval by the bootstrap.

    The interval lies between percentiles of 10,000 resampled means; the same values and seed give
    the same interval.
    """
    found = np.asarray(values, np.float64)
    if not len(found):
        return Interval(None, None, None, 0)
    if len(found) == 1:
        return Interval(float(found[0]), None, None, 1)
    random = np.random.default_rng(seed)
    means = np.concatenate(
        [
            found[random.integers(len(found), size=(_BATCH, len(found)))].mean(axis=1)
            for _ in range(RESAMPLES // _BATCH)
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(found.mean()), float(low), float(high), len(found))


def wilcoxon(differences: Sequence[float]) -> float | None:
    """The two-sided p of Wilcoxon's signed-rank test that paired differences are centred on 0.

    Differences of 0 are left out, as Wilcoxon did; None if no other is left.
    """
    found = np.asarray(differences, np.float64)
    found = found[found != 0]
    return float(stats.wilcoxon(found).pvalue) if len(found) else None


def volume_agreement(found_ml: Sequence[float], reference_ml: Sequence[float]) -> VolumeAgreement:
    """How paired volumes agree, one pair for each case."""
    pairs = np.column_stack([found_ml, reference_ml]).astype(np.float64)
    if not len(pairs):
        return VolumeAgreement(None, None, None, None)
    differences = pairs[:, 0] - pairs[:, 1]
    bias = float(differences.mean())
    if len(pairs) == 1:
        return VolumeAgreement(bias, None, None, None)
    reach = NORMAL_95 * float(differences.std(ddof=1))
    correlation = intraclass_correlation(pairs)
    return VolumeAgreement(
        bias, bias - reach, bias + reach, None if math.isnan(correlation) else correlation
    )


def intraclass_correlation(ratings: npt.NDArray[np.float64]) -> float:
    """The ICC(2,1) of ``n`` subjects that each of ``k`` raters measured once.

    Args:
        ratings: What was measured, shape ``(n, k)``, both at least 2.

    Returns:
        1 for perfect agreement; NaN when all ratings are equal.
    """
    n, k = ratings.shape
    total = ratings.mean()
    rows, columns = ratings.mean(axis=1), ratings.mean(axis=0)
    between = k * float(((rows - total) ** 2).sum()) / (n - 1)
    raters = n * float(((columns - total) ** 2).sum()) / (k - 1)
    rest = ratings - rows[:, None] - columns[None] + total
    error = float((rest**2).sum()) / ((n - 1) * (k - 1))
    divisor = between + (k - 1) * error + k * (raters - error) / n
    return (between - error) / divisor if divisor else math.nan


def wilson(hits: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share, here ``hits / of`` (Wilson 1927); of nothing it is 0 to 1."""
    if of == 0:
        return 0.0, 1.0
    z, share = NORMAL_95, hits / of
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    reach = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, centre - reach), min(1.0, centre + reach)
