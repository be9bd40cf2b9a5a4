"""ROC and its area: worked by hand, and against DeLong's definition and scikit-learn."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from training.scoring.roc import area_under_roc, roc_curve


def delong_by_definition(positive, scores):
    """DeLong, DeLong and Clarke-Pearson 1988: every pair is looked at."""
    xs = [s for p, s in zip(positive, scores, strict=True) if p]
    ys = [s for p, s in zip(positive, scores, strict=True) if not p]

    def kernel(x, y):
        return 1.0 if y < x else 0.5 if y == x else 0.0

    v10 = [sum(kernel(x, y) for y in ys) / len(ys) for x in xs]
    v01 = [sum(kernel(x, y) for x in xs) / len(xs) for y in ys]
    area = sum(v10) / len(xs)
    s10 = sum((v - area) ** 2 for v in v10) / (len(xs) - 1)
    s01 = sum((v - area) ** 2 for v in v01) / (len(ys) - 1)
    return area, math.sqrt(s10 / len(xs) + s01 / len(ys))


def test_area_worked_by_hand():
    # of 2 x 2 pairs: 0.9 > 0.5, 0.9 > 0.1, 0.3 < 0.5, 0.3 > 0.1
    found = area_under_roc([True, False, True, False], [0.9, 0.5, 0.3, 0.1])
    assert found.value == 0.75
    # shares of the scans with a bleed 1 and 1/2, of those without 1/2 and 1: variance 2 * 0.125 / 2
    assert found.low == pytest.approx(0.75 - 1.959964 * math.sqrt(0.125))
    assert found.high == 1.0
    assert area_under_roc([True, False], [0.4, 0.4]).value == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_area_is_delongs_by_definition_ties_included(seed):
    random = np.random.default_rng(seed)
    positive = random.random(60) < 0.4
    scores = np.round(random.normal(positive * 0.8, 1), 1)  # tenths: many ties
    area, deviation = delong_by_definition(positive.tolist(), scores.tolist())
    found = area_under_roc(positive, scores)
    assert found.value == pytest.approx(area, abs=1e-12)
    assert found.value == pytest.approx(metrics.roc_auc_score(positive, scores), abs=1e-12)
    u = stats.mannwhitneyu(scores[positive], scores[~positive]).statistic
    assert found.value == pytest.approx(u / positive.sum() / (~positive).sum(), abs=1e-12)
    reach = stats.norm.ppf(0.975) * deviation
    assert found.low == pytest.approx(area - reach, abs=1e-6)
    assert found.high == pytest.approx(min(1, area + reach), abs=1e-6)


def test_interval_is_near_that_of_a_bootstrap():
    random = np.random.default_rng(1)
    ill, well = random.normal(1, 1, 120), random.normal(0, 1, 150)
    found = area_under_roc([True] * 120 + [False] * 150, [*ill, *well])
    areas = [
        metrics.roc_auc_score(
            [1] * 120 + [0] * 150, [*random.choice(ill, 120), *random.choice(well, 150)]
        )
        for _ in range(300)
    ]
    low, high = np.percentile(areas, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.015)
    assert found.high == pytest.approx(high, abs=0.015)


def test_an_area_without_an_interval():
    assert area_under_roc([True, True], [1, 2]).value is None
    assert area_under_roc([], []).value is None
    alone = area_under_roc([True, False, False], [2, 1, 3])
    assert (alone.value, alone.low) == (0.5, None)
    apart = area_under_roc([True, True, False, False], [4, 3, 2, 1])
    assert (apart.value, apart.low, apart.high) == (1.0, None, None)


def test_curve_worked_by_hand():
    points = roc_curve([True, False, True, False], [0.9, 0.5, 0.3, 0.1])
    assert [(p.false_positive_rate, p.sensitivity) for p in points] == [
        (0, 0), (0, 0.5), (0.5, 0.5), (0.5, 1), (1, 1),
    ]  # fmt: skip
    assert [p.threshold for p in points] == [None, 0.9, 0.5, 0.3, 0.1]


def test_refusals():
    with pytest.raises(ValueError, match="2 scans and 1 scores"):
        area_under_roc([True, False], [1.0])
    with pytest.raises(ValueError, match="not finite"):
        area_under_roc([True, False], [1.0, math.nan])
    with pytest.raises(ValueError, match="2 scans of one kind"):
        roc_curve([False, False], [0.1, 0.2])
