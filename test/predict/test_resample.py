import numpy as np
import pytest
import torch
from helpers.resampling import resize_image
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.transform import resize

from ichseg.predict import resample
from ichseg.predict.restore import resize_margins

SHAPES = [
    ((28, 48, 48), (28, 37, 61)),
    ((9, 33, 40), (15, 64, 31)),
    ((8, 8, 8), (5, 5, 5)),
    ((1, 5, 7), (3, 9, 7)),
    ((5, 1, 6), (5, 4, 3)),
    ((7, 5, 90), (7, 5, 101)),
]


@pytest.fixture(params=[None, 500], ids=["one slab", "many slabs"])
def slabs(request, monkeypatch):
    """Volumes resized at once, and in slabs of a slice or few."""
    if request.param is not None:
        monkeypatch.setattr(resample, "_SLAB_VOXELS", request.param)
        monkeypatch.setattr(resample, "_VOTE_VOXELS", request.param)


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_equals_scikit_image(old, new, order):
    image = np.random.default_rng(1).normal(size=old).astype(np.float32)
    ours = resize_image(image, new, order=order, separate_axis=None)
    reference = resize(
        image.astype(np.float64), new, order=order, mode="edge", anti_aliasing=False, clip=True
    )
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * np.ptp(image))


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("separate_axis", [None, 0, 1, 2])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, ">f4", np.float64])
def test_any_type_and_any_view_is_resized_as_its_float_copy(separate_axis, dtype):
    stored = np.random.default_rng(3).integers(0, 900, (20, 18, 9)).astype(dtype)
    view = stored.transpose(2, 0, 1)[:, ::-1, 1:]
    copy = np.ascontiguousarray(view, np.float32)
    expected = resize_image(copy, (12, 31, 15), order=3, separate_axis=separate_axis)
    found = resize_image(view, (12, 31, 15), order=3, separate_axis=separate_axis)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("separate_axis", [0, 1, 2])
def test_the_axis_apart_takes_nearest_slices_each_clipped_to_its_own_range(order, separate_axis):
    image = np.random.default_rng(2).normal(size=(4, 20, 20)).astype(np.float32)
    image[1] *= 10
    shape = [30, 25]
    shape.insert(separate_axis, 7)
    ours = resize_image(
        np.moveaxis(image, 0, separate_axis), shape, order=order, separate_axis=separate_axis
    )
    slices = [
        resize(s.astype(np.float64), (30, 25), order=order, mode="edge", anti_aliasing=False)
        for s in image
    ]
    # centres of 7 output slices in units of input slices: 0.29 0.86 1.43 2 2.57 3.14 3.71
    expected = np.stack([slices[i] for i in (0, 0, 1, 2, 2, 3, 3)], axis=separate_axis)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_a_cubic_overshoot_is_clipped():
    step = np.zeros((1, 1, 16), np.float32)
    step[..., 8:] = 1
    ours = resize_image(step, (1, 1, 64), order=3, separate_axis=None)
    assert ours.min() == 0
    assert ours.max() == 1


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, 1, 3]))
@settings(max_examples=60, deadline=None)
def test_rows_sum_to_one_so_a_constant_stays_constant(size_in, size_out, order):
    np.testing.assert_allclose(resample.axis_matrix(size_in, size_out, order).sum(1), 1, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 70), st.integers(1, 150))
def test_a_spline_s_matrix_is_scipy_s_zoom_of_unit_vectors(size_in, size_out):
    zoom = (size_out / size_in, 1)
    expected = ndimage.zoom(np.eye(size_in), zoom, order=3, mode="nearest", grid_mode=True)
    found = resample.axis_matrix(size_in, size_out, 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.5e-7)


def test_a_linear_ramp_stays_linear_away_from_the_border():
    matrix = resample.axis_matrix(20, 33, 1)
    position = (np.arange(33) + 0.5) * 20 / 33 - 0.5
    inner = (position >= 0) & (position <= 19)
    np.testing.assert_allclose((matrix @ np.arange(20.0))[inner], position[inner], atol=1e-5)


def test_labels_nearest_by_hand():
    labels = np.array([[[1, 1, 2, 2]]], np.uint8)
    # halves: output centres at 0.5 and 2.5, ties go up
    np.testing.assert_array_equal(
        resample.resize_labels(labels, (1, 1, 2), order=0, separate_axis=None), [[[1, 2]]]
    )
    np.testing.assert_array_equal(
        resample.resize_labels(labels, (1, 1, 8), order=0, separate_axis=None),
        [[[1] * 4 + [2] * 4]],
    )


def test_labels_linear_take_the_larger_share():
    labels = np.array([[[0, 0, 3, 3, 3, 0]]], np.uint8)
    # 6 -> 4: centres 0.25 1.75 3.25 4.75; shares of label 3: 0, 0.75, 1, 0.25
    np.testing.assert_array_equal(
        resample.resize_labels(labels, (1, 1, 4), order=1, separate_axis=None), [[[0, 3, 3, 0]]]
    )


def vote(labels, shape):
    """Each label's indicator by scikit-image in double precision; ties go to the nearest voxel."""

    def share(array, order):
        return resize(array.astype(float), shape, order, mode="edge", anti_aliasing=False)

    values = np.unique(labels)
    shares = np.stack([share(labels == value, 1) for value in values])
    shares[abs(shares - shares.max(0)) < 1e-9] += 1  # the top ones
    shares += 1e-3 * (values[:, None, None, None] == share(labels, 0))
    return values[shares.argmax(0)]


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize(
    ("old", "new"), [*SHAPES, ((6, 8, 10), (3, 4, 5)), ((6, 8, 10), (12, 16, 15))]
)
def test_labels_linear_equal_a_vote_by_scikit_image(old, new):
    """Halves and doubles have ties at every border."""
    rng = np.random.default_rng(5)
    labels = rng.choice(np.array([-1, 0, 0, 1, 4], np.int8), size=old)
    labels[:, : old[1] // 2] = 0  # and slabs with one label only
    ours = resample.resize_labels(labels, new, order=1, separate_axis=None)
    assert ours.dtype == np.int8
    np.testing.assert_array_equal(ours, vote(labels, new))


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("around", [0, 2])
@pytest.mark.parametrize("new", [(7, 30, 31), (3, 9, 8), (5, 18, 40), (5, 4, 3)])
def test_what_is_small_among_one_label_votes_as_far_as_it_reaches(new, around):
    labels = np.full((5, 18, 20), around, np.int8)
    labels[2:4, 5:9, 11:13] = np.array([[[1, 0]], [[3, 3]]])
    labels[0, 17, 0] = 1  # in the corner
    ours = resample.resize_labels(labels, new, order=1, separate_axis=None)
    np.testing.assert_array_equal(ours, vote(labels, new))


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(("size_in", "size_out"), [(9, 9), (9, 14), (14, 9), (20, 3)])
def test_rows_reached_are_all_that_change_with_the_input(size_in, size_out, order):
    matrix = resample.axis_matrix(size_in, size_out, order)
    for start, stop in [(0, 1), (2, 5), (size_in - 1, size_in)]:
        rows = resample.rows_reached(size_in, size_out, order, start, stop)
        changed = np.flatnonzero(matrix[:, start:stop].any(1))
        np.testing.assert_array_equal(np.arange(size_out)[rows], changed)


def test_labels_apart_vote_within_the_slice():
    labels = np.random.default_rng(6).integers(-1, 3, (4, 9, 11)).astype(np.int8)
    ours = resample.resize_labels(labels, (7, 13, 6), order=1, separate_axis=0)
    slices = [vote(labels[i : i + 1], (1, 13, 6))[0] for i in (0, 0, 1, 2, 2, 3, 3)]
    np.testing.assert_array_equal(ours, slices)


def test_a_tie_goes_to_the_nearest_voxel_unless_it_has_lost():
    for pair in ([1, 2], [2, 1]):  # the middle: half and half, and the upper voxel is the nearest
        labels = np.array([[pair]], np.int8)
        assert resample.resize_labels(labels, (1, 1, 1), order=1, separate_axis=None) == pair[1]
    corners = np.array([3, 1, 1, 1, 2, 2, 2, 3], np.int8).reshape(2, 2, 2)
    # shares 3/8, 3/8, 2/8; the nearest is a 3
    assert resample.resize_labels(corners, (1, 1, 1), order=1, separate_axis=None) == 1


@pytest.mark.parametrize("order", [0, 1])
def test_empty_labels_stay_empty(order):
    empty = np.zeros((4, 9, 9), np.int8)
    assert not resample.resize_labels(empty, (6, 5, 20), order=order, separate_axis=None).any()


@given(st.integers(0, 1_000), st.sampled_from([0, 1]))
@settings(max_examples=30, deadline=None)
def test_no_label_appears_that_was_not_there(seed, order):
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, 2, 5], np.int8), size=tuple(rng.integers(1, 9, 3)))
    shape = tuple(int(s) for s in rng.integers(1, 12, 3))
    assert set(
        np.unique(resample.resize_labels(labels, shape, order=order, separate_axis=None))
    ) <= set(np.unique(labels))


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("shape", [(14, 20, 7), (9, 12, 31), (14, 12, 10)])
@pytest.mark.parametrize("separate_axis", [None, 0, 1, 2])
@pytest.mark.parametrize("order", [0, 1])
def test_slabs_of_leads_together_are_the_differences_of_the_resized_scores(
    separate_axis, order, shape, kind
):
    scores = np.random.default_rng(0).normal(size=(3, 9, 12, 10)).astype(np.float32)
    slabs = [
        resize_margins(
            kind(scores), shape, slice(a, a + 4), order=order, separate_axis=separate_axis
        )
        for a in range(0, shape[0], 4)
    ]
    whole = np.stack(
        [resize_image(s, shape, order=order, separate_axis=separate_axis) for s in scores]
    )
    np.testing.assert_allclose(np.concatenate(slabs, 1), whole[1:] - whole[:1], atol=1e-5)


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
