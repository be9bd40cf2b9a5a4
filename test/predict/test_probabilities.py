"""Probabilities of each label from scores, and what a threshold makes of them."""

import dataclasses

import numpy as np
import pytest
from conftest import CONFIGURATION, PLANS, make_bundle
from scipy.special import expit, softmax

from ichseg.errors import InputError
from ichseg.predict import prepare
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.restore import restore
from ichseg.scan.volume import Volume

LABELS = ("background", "one", "two", "three")
SEVERAL = dataclasses.replace(PLANS, labels=LABELS)
REGIONS = dataclasses.replace(PLANS, labels=("background", "one", "two"), regions=(1, 2))
# In the networks' grid, so that nothing is resampled.
SCAN = Volume(np.random.default_rng(0).integers(0, 80, (4, 16, 16)).astype(np.int16), (5, 1, 1))


def restored(scores, plans, *, dtype=np.float16, parts=1, **options):
    """Labels, foreground and probabilities of scores ``(K, 4, 16, 16)``, a part for each first."""
    case = prepare.prepare([SCAN], plans, CONFIGURATION)
    foreground = np.zeros(SCAN.voxels.shape, np.uint8)
    labels = len(plans.regions) or len(plans.labels) - 1
    each = np.zeros((labels, *SCAN.voxels.shape), dtype)
    given = [
        (np.asarray(part, np.float32), case.placement)
        for part in (scores if parts > 1 else [scores])
    ]
    found = restore(given, plans, foreground=foreground, probabilities=each, **options)
    return found, foreground, each


def random_logits(channels, seed=1):
    return np.random.default_rng(seed).normal(0, 3, (channels, *SCAN.voxels.shape))


@pytest.mark.parametrize("plans", [PLANS, SEVERAL], ids=["one label", "three labels"])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_they_are_the_softmax(plans, average):
    logits = random_logits(len(plans.labels))
    expected = softmax(logits, 0)
    given = logits if average == "logits" else expected
    labels, foreground, each = restored(given, plans, average=average)
    np.testing.assert_allclose(each, expected[1:], atol=1e-3)
    np.testing.assert_allclose(foreground / 255, 1 - expected[0], atol=0.51 / 255)
    np.testing.assert_array_equal(labels, expected.argmax(0))
    _, _, steps = restored(given, plans, average=average, dtype=np.uint8)
    np.testing.assert_allclose(steps / 255, expected[1:], atol=0.51 / 255)


def test_of_two_configurations_they_are_the_mean():
    both = [random_logits(4, seed) for seed in (1, 2)]
    expected = (softmax(both[0], 0) + softmax(both[1], 0)) / 2
    _, _, each = restored(both, SEVERAL, average="logits", parts=2)
    np.testing.assert_allclose(each, expected[1:], atol=1e-3)


@pytest.mark.parametrize("average", ["logits"])
def test_of_regions_each_is_its_own(average):
    logits = random_logits(2)
    labels, foreground, each = restored(logits, REGIONS, average=average)
    np.testing.assert_allclose(each, expit(logits), atol=1e-3)
    np.testing.assert_allclose(foreground / 255, expit(logits).max(0), atol=0.51 / 255)
    lower, _, _ = restored(logits, REGIONS, average=average, threshold=0.2)
    expected = np.where(expit(logits[1]) > 0.2, 2, np.where(expit(logits[0]) > 0.2, 1, 0))
    np.testing.assert_array_equal(lower, expected)
    assert (lower != labels).any()


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8])
def test_above_the_threshold_the_likeliest_label_counts(threshold):
    probabilities = softmax(random_logits(4), 0)
    found, _, _ = restored(probabilities, SEVERAL, threshold=threshold)
    chance = probabilities[1:].sum(0)
    clear = abs(chance - threshold) > 1e-5
    expected = np.where(chance > threshold, probabilities[1:].argmax(0) + 1, 0)
    np.testing.assert_array_equal(found[clear], expected[clear])


def test_for_one_label_a_half_is_what_counts_without(tmp_path, scan):
    make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "cpu")
    predicted = ensemble.predict(ensemble.prepare(ensemble.plan(scan, "fast")))
    plain, half, low, high = (
        ensemble.finish(predicted, threshold=t) for t in (None, 0.5, 0.3, 0.7)
    )
    assert 0.05 < plain.mask.voxels.mean() < 0.95
    assert np.mean(plain.mask.voxels != half.mask.voxels) < 1e-4
    assert low.volume_ml > plain.volume_ml > high.volume_ml
    assert (low.ran["threshold"], "threshold" in plain.ran) == (0.3, False)
    assert plain.probabilities is None
    for wrong in (0, 0.5e-2, 1, float("nan")):
        with pytest.raises(InputError, match=r"expected a number from 0\.01 to 0\.99"):
            ensemble.finish(predicted, threshold=wrong)


def test_outside_of_what_networks_saw_they_are_0(tmp_path, scan):
    make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "cpu")
    air = scan.with_voxels(np.full_like(scan.voxels, -1000))
    found = ensemble.finish(
        ensemble.predict(ensemble.prepare(ensemble.plan(air, "fast"))), probabilities="uint8"
    )
    assert found.probabilities.shape == (1, *scan.voxels.shape)
    assert not found.probabilities.any()
