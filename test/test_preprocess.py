import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import CONFIGURATION, PLANS
from hypothesis import given, settings
from hypothesis import strategies as st

from ichseg import preprocess
from ichseg.errors import InputError
from ichseg.plans import Normalisation, Plans
from ichseg.volume import Volume

DIRECTIONS = [
    np.eye(3)[:, order] * np.array(signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def as_scores(labels: np.ndarray, classes: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy((labels == k).astype(np.float32)) for k in range(classes)])


@given(
    st.sampled_from(range(len(DIRECTIONS))),
    st.permutations([0, 1, 2]),
    st.sampled_from(["LPS", "as_stored"]),
    st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_restore_undoes_prepare_for_every_orientation_transpose_and_crop(
    d, order, orientation, seed
):
    rng = np.random.default_rng(seed)
    shape = tuple(int(s) for s in rng.integers(4, 12, 3))
    image, labels = np.zeros(shape, np.int16), np.zeros(shape, np.uint8)
    box = tuple(slice(int(rng.integers(0, 2)), int(s - rng.integers(0, 2))) for s in shape)
    image[box] = rng.integers(1, 90, image[box].shape)
    labels[box] = rng.integers(0, 2, labels[box].shape)
    volume = Volume(image, (2.0, 1.0, 1.5), direction=tuple(DIRECTIONS[d].ravel()))
    plans = dataclasses.replace(PLANS, orientation=orientation, transpose=tuple(order))
    placement = preprocess.place([volume], plans, CONFIGURATION)
    own = dataclasses.replace(CONFIGURATION, spacing_mm=placement.spacing_mm)  # no resampling
    case = preprocess.prepare([volume], plans, own)
    grid = preprocess.prepare_labels(volume.with_voxels(labels), case.placement, plans)
    assert case.data.shape[1:] == grid.shape == case.placement.crop_shape
    back = preprocess.restore([(as_scores(grid, 2), case.placement)], plans, slab_voxels=50)
    np.testing.assert_array_equal(back, labels)


@pytest.mark.parametrize("d", range(len(DIRECTIONS)))
def test_every_orientation_gives_the_network_the_same_data(d):
    """A head stored in any axis order is the same head once oriented."""
    canonical = np.arange(4 * 5 * 6).reshape(4, 5, 6).astype(np.int16) + 1
    matrix = DIRECTIONS[d]
    axes = [int(np.argmax(abs(matrix[:, column]))) for column in range(3)]
    stored = canonical.transpose(axes)
    flips = [column for column in range(3) if matrix[axes[column], column] < 0]
    volume = Volume(np.flip(stored, flips), (1.0, 1.0, 1.0), direction=tuple(matrix.ravel()))
    np.testing.assert_array_equal(preprocess.orient_axes(volume).apply(volume.voxels), canonical)
    transposed = dataclasses.replace(PLANS, transpose=(2, 0, 1))
    np.testing.assert_array_equal(
        preprocess.plan_axes(volume, transposed).apply(volume.voxels), canonical.transpose(2, 0, 1)
    )


def test_an_oblique_scan_goes_to_the_nearest_axes():
    angle = np.deg2rad(20)
    tilt = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, -1]]
    )
    volume = Volume(np.zeros((2, 3, 4)), (1.0, 1.0, 1.0), direction=tuple(tilt.ravel()))
    axes = preprocess.orient_axes(volume)
    assert axes.permutation == (0, 1, 2)
    assert axes.flips == (False, False, True)


def test_ct_normalisation_by_hand():
    scheme = Normalisation("ct", clip_low=0, clip_high=100, mean=40, deviation=20)
    values = np.array([-1000, 0, 60, 3000], np.float32)
    np.testing.assert_allclose(preprocess.normalise(values, scheme), [-2, -2, 1, 3])


def test_zscore_by_hand_and_masked():
    values = np.array([0, 0, 1, 3], np.float32)
    np.testing.assert_allclose(
        preprocess.normalise(values, Normalisation("zscore")),
        (values - 1) / np.sqrt(1.5),
        rtol=1e-6,
    )
    inside = np.array([False, False, True, True])
    np.testing.assert_allclose(
        preprocess.normalise(values, Normalisation("zscore", masked=True), inside), [0, 0, -1, 1]
    )


def test_crop_is_the_box_of_nonzero_in_any_channel():
    first, second = np.zeros((2, 6, 7, 8), np.int16)
    first[2, 3, 4] = -5
    second[4, 1, 4] = 7
    assert preprocess.nonzero_box([first, second]) == ((2, 5), (1, 4), (4, 5))
    assert preprocess.nonzero_box([np.zeros((2, 3, 4))]) == ((0, 2), (0, 3), (0, 4))


def test_background_outside_the_filled_nonzero_region_becomes_minus_one():
    image = np.zeros((3, 7, 7), np.int16)
    image[:, 1:6, 1:6] = 9
    image[1, 3, 3] = 0  # a hole, filled
    image[:, 1, 1] = 0  # a corner of the box, outside
    volume = Volume(image, CONFIGURATION.spacing_mm)
    placement = preprocess.place([volume], PLANS, CONFIGURATION)
    labels = np.zeros(image.shape, np.uint8)
    labels[2, 1, 1] = 1  # outside, yet annotated: stays
    outside = preprocess.outside_nonzero([volume], placement)
    grid = preprocess.prepare_labels(volume.with_voxels(labels), placement, PLANS, outside)
    expected = np.zeros((3, 5, 5), np.int8)
    expected[:, 0, 0] = (-1, -1, 1)
    np.testing.assert_array_equal(grid, expected)


def test_order_of_steps_is_the_plans(scan):
    """Normalise-first clips before the spline, so its result stays within the clip limits."""
    first = dataclasses.replace(PLANS, normalise_first=True)
    coarse = dataclasses.replace(CONFIGURATION, spacing_mm=(5.0, 0.5, 0.5))
    a = preprocess.prepare([scan], first, coarse).data
    b = preprocess.prepare([scan], PLANS, coarse).data
    assert a.shape == b.shape
    assert not np.allclose(a, b)
    flat = preprocess.prepare([scan.with_voxels(np.full_like(scan.voxels, 60))], PLANS, coarse).data
    np.testing.assert_allclose(flat, (60 - 50) / 20, rtol=1e-5)


def test_restore_averages_the_parts_of_an_ensemble(scan):
    placement = preprocess.place([scan], PLANS, CONFIGURATION)
    sure = torch.zeros(2, *placement.grid_shape)
    sure[1] = 1.0
    unsure = torch.zeros(2, *placement.grid_shape)
    unsure[0] = 0.6
    both = preprocess.restore([(sure, placement), (unsure, placement)], PLANS)
    assert both.shape == scan.voxels.shape
    assert both.min() == 1  # (1 + 0) / 2 beats (0 + 0.6) / 2
    assert preprocess.restore([(unsure, placement)], PLANS).max() == 0


def test_wrong_channels_are_refused(scan):
    with pytest.raises(InputError, match="2 channels given, expected 1"):
        preprocess.place([scan, scan], PLANS, CONFIGURATION)
    two = Plans(
        **{
            **{f.name: getattr(PLANS, f.name) for f in dataclasses.fields(PLANS)},
            "channels": ("a", "b"),
            "normalisations": PLANS.normalisations * 2,
        }
    )
    other = Volume(np.zeros((2, 2, 2)), (1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="channels differ in shape"):
        preprocess.place([scan, other], two, CONFIGURATION)
