"""What is decided of scores: numpy's on the host and tensors on their device must agree."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import CONFIGURATION, PLANS

from ichseg.predict.prepare import place
from ichseg.predict.restore import resize_margins, restore
from ichseg.scan.volume import Volume

SCAN = Volume(np.zeros((9, 20, 22), np.int16), (5.0, 0.8, 0.9))
THREE = dataclasses.replace(PLANS, labels=("background", "in", "around", "far"))
REGIONS = dataclasses.replace(THREE, regions=(2, 1, 3))


def scores_of(plans, shape, kind):
    rng = np.random.default_rng(5)
    values = rng.normal(size=(plans.scores, *shape)).astype(np.float32) * 3
    if kind == "logits":
        return values
    if plans.regions:
        return (np.tanh(values) + 1) / 2 - np.float32(0.5)
    shares = np.exp(values)
    return shares / shares.sum(0)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", ["probabilities", "logits"])
@pytest.mark.parametrize("plans", [PLANS, THREE, REGIONS], ids=["one", "three", "regions"])
def test_arrays_and_tensors_are_decided_alike(plans, kind, parts):
    placement = place([SCAN], plans, CONFIGURATION)
    scores = [scores_of(plans, placement.grid_shape, kind) * scale for scale in (1, 0.5)[:parts]]
    found = []
    for convert in (np.asarray, torch.from_numpy):
        foreground = np.zeros(SCAN.voxels.shape, np.uint8)
        given = [(convert(each), placement) for each in scores]
        labels = restore(given, plans, average=kind, foreground=foreground, slab_voxels=1000)
        assert labels.dtype == np.uint8
        found.append((labels, foreground))
    (labels, foreground), (others, chances) = found
    assert set(np.unique(labels)) == set(range(len(plans.labels)))
    assert np.mean(labels != others) < 2e-3
    assert np.abs(foreground.astype(int) - chances).max() <= 1
    assert np.ptp(foreground) > 50


def test_what_is_decided_by_hand():
    """Two labels in the grid itself: the larger score wins, the lower label on a tie."""
    plans = dataclasses.replace(PLANS, labels=("background", "in", "around"))
    scan = Volume(np.zeros((4, 16, 16), np.int16), (5.0, 1.0, 1.0))
    placement = place([scan], plans, CONFIGURATION)
    scores = np.zeros((3, 4, 16, 16), np.float32)
    scores[0] = 0.4
    scores[:, 0, 0, 0] = 0.2, 0.3, 0.5
    scores[:, 0, 0, 1] = 0.2, 0.4, 0.4
    scores[:, 0, 0, 2] = 0.4, 0.4, 0.2
    scores[:, 0, 0, 3] = 0.31, 0.4, 0.29
    for convert in (np.asarray, torch.from_numpy):
        foreground = np.zeros(scan.voxels.shape, np.uint8)
        labels = restore([(convert(scores), placement)], plans, foreground=foreground)
        assert labels[0, 0, :5].tolist() == [2, 1, 0, 1, 0]
        assert foreground[0, 0, :4].tolist() == [204, 204, 153, 176]  # 255 x (1 - background)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("separate_axis", [None, 0])
def test_cuda_resizes_scores_as_the_processor_does(separate_axis):
    image = np.random.default_rng(4).normal(size=(9, 70, 66)).astype(np.float32)
    scores = torch.from_numpy(np.stack([image, image[::-1] ** 2]))
    for order in (0, 1, 3):
        here, there = (
            resize_margins(s, (14, 99, 51), slice(3, 9), order=order, separate_axis=separate_axis)
            for s in (scores, scores.cuda())
        )
        np.testing.assert_allclose(there.cpu().numpy(), here.numpy(), atol=1e-5 * np.ptp(image))
