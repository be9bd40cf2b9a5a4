import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.transform import resize

from ichseg import resample

SHAPES = [
    ((28, 48, 48), (28, 37, 61)),
    ((9, 33, 40), (15, 64, 31)),
    ((8, 8, 8), (5, 5, 5)),
    ((1, 5, 7), (3, 9, 7)),
    ((5, 1, 6), (5, 4, 3)),
]


@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_equals_scikit_image(old, new, order):
    image = np.random.default_rng(1).normal(size=old).astype(np.float32)
    ours = resample.resize_image(image, new, order=order, apart=None)
    reference = resize(
        image.astype(np.float64), new, order=order, mode="edge", anti_aliasing=False, clip=True
    )
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * np.ptp(image))


def test_the_axis_apart_takes_nearest_slices_each_clipped_to_its_own_range():
    image = np.random.default_rng(2).normal(size=(4, 20, 20)).astype(np.float32)
    image[1] *= 10
    ours = resample.resize_image(image, (7, 30, 25), order=3, apart=0)
    slices = [
        resize(s.astype(np.float64), (30, 25), order=3, mode="edge", anti_aliasing=False)
        for s in image
    ]
    # centres of 7 output slices in units of input slices: 0.29 0.86 1.43 2 2.57 3.14 3.71
    expected = np.stack([slices[i] for i in (0, 0, 1, 2, 2, 3, 3)])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_a_cubic_overshoot_is_clipped():
    step = np.zeros((1, 1, 16), np.float32)
    step[..., 8:] = 1
    ours = resample.resize_image(step, (1, 1, 64), order=3, apart=None)
    assert ours.min() == 0
    assert ours.max() == 1


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, 1, 3]))
@settings(max_examples=60, deadline=None)
def test_rows_sum_to_one_so_a_constant_stays_constant(size_in, size_out, order):
    np.testing.assert_allclose(resample.axis_matrix(size_in, size_out, order).sum(1), 1, atol=1e-5)


def test_a_linear_ramp_stays_linear_away_from_the_border():
    matrix = resample.axis_matrix(20, 33, 1)
    position = (np.arange(33) + 0.5) * 20 / 33 - 0.5
    inner = (position >= 0) & (position <= 19)
    np.testing.assert_allclose((matrix @ np.arange(20.0))[inner], position[inner], atol=1e-5)


def test_labels_nearest_by_hand():
    labels = np.array([[[1, 1, 2, 2]]], np.uint8)
    # halves: output centres at 0.5 and 2.5, ties go up
    np.testing.assert_array_equal(
        resample.resize_labels(labels, (1, 1, 2), order=0, apart=None), [[[1, 2]]]
    )
    np.testing.assert_array_equal(
        resample.resize_labels(labels, (1, 1, 8), order=0, apart=None), [[[1] * 4 + [2] * 4]]
    )


def test_labels_linear_take_the_larger_share():
    labels = np.array([[[0, 0, 3, 3, 3, 0]]], np.uint8)
    # 6 -> 4: centres 0.25 1.75 3.25 4.75; shares of label 3: 0, 0.75, 1, 0.25
    np.testing.assert_array_equal(
        resample.resize_labels(labels, (1, 1, 4), order=1, apart=None), [[[0, 3, 3, 0]]]
    )


@given(st.integers(0, 1_000), st.sampled_from([0, 1]))
@settings(max_examples=30, deadline=None)
def test_no_label_appears_that_was_not_there(seed, order):
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, 2, 5], np.int8), size=tuple(rng.integers(1, 9, 3)))
    shape = tuple(int(s) for s in rng.integers(1, 12, 3))
    assert set(np.unique(resample.resize_labels(labels, shape, order=order, apart=None))) <= set(
        np.unique(labels)
    )


@pytest.mark.parametrize("apart", [None, 0, 1, 2])
def test_slabs_together_are_the_whole(apart):
    scores = torch.randn(2, 9, 12, 10, generator=torch.Generator().manual_seed(0))
    shape = (14, 20, 7)
    slabs = [
        resample.resize_scores_slab(scores, shape, slice(a, a + 4), order=1, apart=apart)
        for a in range(0, 14, 4)
    ]
    whole = np.stack(
        [resample.resize_image(s.numpy(), shape, order=1, apart=apart) for s in scores]
    )
    np.testing.assert_allclose(torch.cat(slabs, 1).numpy(), whole, atol=1e-6)


@pytest.mark.parametrize(
    ("spacing", "target", "expected"),
    [
        ((5, 0.5, 0.5), (5, 1, 1), 0),
        ((1, 1, 1), (1, 1, 6), 2),
        ((3, 1, 1), (3, 1, 1), None),  # exactly three times is not more
        ((4, 4, 1), (4, 4, 1), None),  # the largest spacing is shared
        ((0.5, 0.5, 5), (1, 1, 1), 2),
    ],
)
def test_separate_z_rule(spacing, target, expected):
    assert resample.coarse_axis(spacing, target, 3.0) == expected


def test_resampled_shape_by_hand():
    # 29 * 5/5, 512 * 0.45/0.9, 511 * 0.45/0.9 = 255.5 -> 256 (half to even)
    assert resample.resampled_shape((29, 512, 511), (5, 0.45, 0.45), (5, 0.9, 0.9)) == (
        29,
        256,
        256,
    )
    assert resample.resampled_shape((1, 1, 1), (1, 1, 1), (9, 9, 9)) == (1, 1, 1)


def test_impossible_sizes_and_orders_are_refused():
    with pytest.raises(ValueError, match="cannot resize 0 to 4"):
        resample.axis_matrix(0, 4, 1)
    with pytest.raises(ValueError, match="order 2"):
        resample.axis_matrix(3, 4, 2)
