"""Intervals, tests and agreement: by hand and with published examples."""

import numpy as np
import pytest

from training.scoring.statistics import (
    Interval,
    VolumeAgreement,
    bootstrap_mean,
    intraclass_correlation,
    volume_agreement,
    wilcoxon,
)


def test_interval_of_two_values():
    # A resampled mean is 0, 0.5 or 1 with odds 1:2:1, so 2.5 % and 97.5 % are the ends.
    assert bootstrap_mean([0.0, 1.0]) == Interval(0.5, 0.0, 1.0, 2)


def test_interval_of_many_values_is_that_of_theory():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap_mean(values.tolist())
    reach = 1.96 * values.std() / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - reach, abs=0.02)
    assert found.high == pytest.approx(values.mean() + reach, abs=0.02)


def test_interval_is_repeatable_and_of_its_seed():
    values = np.random.default_rng(1).normal(size=30).tolist()
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values)


def test_too_little_for_an_interval():
    assert bootstrap_mean([]) == Interval(None, None, None, 0)
    assert bootstrap_mean([0.7]) == Interval(0.7, None, None, 1)


def test_wilcoxon_by_hand():
    # Five differences of one sign: 2 of the 2^5 ways to give signs are as far from the middle.
    assert wilcoxon([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 32)
    # Rank 1 against ranks 2 to 5: the rank sums 0 and 1 on either side.
    assert wilcoxon([-1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(4 / 32)
    assert wilcoxon([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.0]) == pytest.approx(2 / 32)
    assert wilcoxon([0.0, 0.0]) is None
    assert wilcoxon([]) is None


def test_bland_altman_by_hand():
    found = volume_agreement([11.0, 19.0, 33.0], [10.0, 20.0, 30.0])
    deviation = 2.0  # of 1, -1, 3
    assert found.bias_ml == pytest.approx(1.0)
    assert found.low_ml == pytest.approx(1.0 - 1.96 * deviation, abs=1e-3)
    assert found.high_ml == pytest.approx(1.0 + 1.96 * deviation, abs=1e-3)


def test_correlation_of_shrout_and_fleiss():
    """Their table 2: six targets, four judges; ICC(2,1) is .29."""
    ratings = np.array(
        [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float
    )
    assert intraclass_correlation(ratings) == pytest.approx(0.29, abs=0.005)


def test_correlation_sees_a_bias():
    reference = [1.0, 5.0, 20.0, 60.0]
    assert volume_agreement(reference, reference).correlation == pytest.approx(1.0)
    shifted = [volume + 10 for volume in reference]
    assert volume_agreement(shifted, reference).correlation < 0.95  # of Pearson's: 1


def test_too_little_for_agreement():
    assert volume_agreement([], []) == VolumeAgreement(None, None, None, None)
    assert volume_agreement([3.0], [1.0]) == VolumeAgreement(2.0, None, None, None)
    assert volume_agreement([0.0, 0.0], [0.0, 0.0]) == VolumeAgreement(0.0, 0.0, 0.0, None)
