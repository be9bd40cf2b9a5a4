"""Pieces of a mask, slab by slab, against scipy's of the whole mask at once."""

import numpy as np
import pytest
from scipy import ndimage

from ichseg import pieces


def noise(seed):
    """A mask of two labels, values and steps; from nearly empty to nearly full."""
    random = np.random.default_rng(seed)
    shape = random.integers(1, 14, 3)
    labels = (random.random(shape) < random.choice([0.05, 0.15, 0.3, 0.6])).astype(np.uint8)
    labels *= random.integers(1, 3, shape).astype(np.uint8)
    values = random.integers(-100, 100, shape).astype(np.int16)
    return labels, values, random.integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("slices", [1, 2, 3, 99])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_pieces_are_those_of_the_whole_mask_in_the_same_order(monkeypatch, slices, label):
    several = 0
    for seed in range(40):
        labels, values, steps = noise(seed)
        monkeypatch.setattr(pieces, "_SLAB_VOXELS", slices * labels[0].size)
        monkeypatch.setattr(pieces, "_MEASURED_VOXELS", 2 * labels[0].size)
        inside = labels == label if label else labels != 0
        whole, count = ndimage.label(inside, np.ones((3, 3, 3)))
        found = pieces.measure(labels, label, values, steps)
        assert len(found) == count
        several += count > 1
        if count == 0:
            continue
        index = np.arange(1, count + 1)
        np.testing.assert_array_equal(found.voxels, np.bincount(whole.ravel())[1:])
        np.testing.assert_array_equal(found.most, ndimage.maximum(steps, whole, index))
        measured = [ndimage.sum(each, whole, index) for each in (*np.indices(whole.shape),)]
        measured += [ndimage.sum(each, whole, index) for each in (values, steps)]
        np.testing.assert_array_equal(found.sums, measured)
        boxes = ndimage.find_objects(whole)
        for number, box in enumerate(boxes):
            assert tuple(map(slice, found.low[:, number], found.end[:, number])) == box
            own = pieces.one(labels, label, found, number)
            np.testing.assert_array_equal(own, whole[box] == number + 1)
        kept = np.random.default_rng(seed).random(count) < 0.5
        rest = labels.copy()
        pieces.keep(rest, label, found, kept)
        dropped = np.concatenate(([False], ~kept))[whole]
        np.testing.assert_array_equal(rest, np.where(dropped, 0, labels))
    assert several > 10


def test_a_snake_through_all_slabs_is_one_piece(monkeypatch):
    """It leaves each slab twice, so that its parts meet only at the far end."""
    labels = np.zeros((9, 3, 7), np.uint8)
    labels[:, 1, ::2] = 1
    labels[0, 1, 1::4] = labels[8, 1, 3::4] = 1
    monkeypatch.setattr(pieces, "_SLAB_VOXELS", labels[:2].size)
    found = pieces.measure(labels, 1)
    np.testing.assert_array_equal(found.voxels, [labels.sum()])
    assert not found.most.any()
    assert not found.sums[3:].any()
