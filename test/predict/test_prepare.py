import dataclasses
import itertools

import numpy as np
import pytest
import skimage.transform
import torch
from conftest import CONFIGURATION, PLANS
from helpers.resampling import resize_image
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ichseg.errors import InputError
from ichseg.model.plans import Normalisation, Plans
from ichseg.predict import prepare, resample
from ichseg.predict.prepare import place, plan_axes
from ichseg.predict.restore import restore
from ichseg.scan.orientation import nonzero_box, orient_axes
from ichseg.scan.volume import Volume

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
    st.sampled_from(["LPS", "RAS", "as_stored"]),
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
    placement = place([volume], plans, CONFIGURATION)
    own = dataclasses.replace(CONFIGURATION, spacing_mm=placement.spacing_mm)  # no resampling
    case = prepare.prepare([volume], plans, own)
    grid = prepare.prepare_labels(volume.with_voxels(labels), case.placement, plans)
    assert case.data.shape[1:] == grid.shape == case.placement.crop_shape
    back = restore([(as_scores(grid, 2), case.placement)], plans, slab_voxels=50)
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
    np.testing.assert_array_equal(orient_axes(volume).apply(volume.voxels), canonical)
    transposed = dataclasses.replace(PLANS, transpose=(2, 0, 1))
    np.testing.assert_array_equal(
        plan_axes(volume, transposed).apply(volume.voxels), canonical.transpose(2, 0, 1)
    )


def test_an_oblique_scan_goes_to_the_nearest_axes():
    angle = np.deg2rad(20)
    tilt = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, -1]]
    )
    volume = Volume(np.zeros((2, 3, 4)), (1.0, 1.0, 1.0), direction=tuple(tilt.ravel()))
    axes = orient_axes(volume)
    assert axes.permutation == (0, 1, 2)
    assert axes.flips == (False, False, True)


def test_ct_normalisation_by_hand():
    scheme = Normalisation("ct", clip_low=0, clip_high=100, mean=40, deviation=20)
    values = np.array([[[-1000, 0, 60, 3000]]], np.float32)
    np.testing.assert_allclose(prepare.normalise(values, scheme), [[[-2, -2, 1, 3]]])


def test_zscore_by_hand_and_masked():
    values = np.array([[[0, 0]], [[1, 3]]], np.float32)
    np.testing.assert_allclose(
        prepare.normalise(values.copy(), Normalisation("zscore")),
        (values - 1) / np.sqrt(1.5),
        rtol=1e-6,
    )
    outside = values == 0
    masked = Normalisation("zscore", masked=True)
    np.testing.assert_allclose(
        prepare.normalise(values.copy(), masked, outside), [[[0, 0]], [[-1, 1]]]
    )
    everywhere = np.ones_like(outside)  # nothing to measure: no division by zero
    np.testing.assert_array_equal(prepare.normalise(values.copy(), masked, everywhere), 0)


def test_zscore_of_a_constant_and_of_a_far_mean():
    constant = np.full((2, 3, 4), 7, np.float32)
    np.testing.assert_array_equal(prepare.normalise(constant, Normalisation("zscore")), 0)
    far = np.random.default_rng(0).normal(30_000, 2, (3, 40, 40)).astype(np.float32)
    exact = (far.astype(np.float64) - far.mean(dtype=np.float64)) / far.std(dtype=np.float64)
    np.testing.assert_allclose(
        prepare.normalise(far.copy(), Normalisation("zscore")), exact, atol=2e-3
    )


def test_crop_is_the_box_of_nonzero_in_any_channel():
    first, second = np.zeros((2, 6, 7, 8), np.int16)
    first[2, 3, 4] = -5
    second[4, 1, 4] = 7
    assert nonzero_box([first, second]) == ((2, 5), (1, 4), (4, 5))
    assert nonzero_box([np.zeros((2, 3, 4))]) == ((0, 2), (0, 3), (0, 4))


@given(st.integers(0, 100_000), st.integers(1, 3), st.sampled_from([0.02, 0.1, 0.5]))
@settings(deadline=None)
def test_nonzero_box_is_that_of_all_places(seed, channels, filled):
    rng = np.random.default_rng(seed)
    stack = (rng.random((channels, *rng.integers(1, 8, 3))) < filled).astype(np.int16)
    places = np.argwhere(stack.any(axis=0))
    if len(places) == 0:
        places = np.argwhere(np.ones(stack.shape[1:]))
    expected = zip(places.min(axis=0), places.max(axis=0) + 1, strict=True)
    assert nonzero_box(list(stack)) == tuple((int(a), int(b)) for a, b in expected)


def test_background_outside_the_filled_nonzero_region_becomes_minus_one():
    image = np.zeros((3, 7, 7), np.int16)
    image[:, 1:6, 1:6] = 9
    image[1, 3, 3] = 0  # a hole, filled
    image[:, 1, 1] = 0  # a corner of the box, outside
    volume = Volume(image, CONFIGURATION.spacing_mm)
    placement = place([volume], PLANS, CONFIGURATION)
    labels = np.zeros(image.shape, np.uint8)
    labels[2, 1, 1] = 1  # outside, yet annotated: stays
    outside = prepare.outside_nonzero([volume], placement)
    grid = prepare.prepare_labels(volume.with_voxels(labels), placement, PLANS, outside)
    expected = np.zeros((3, 5, 5), np.int8)
    expected[:, 0, 0] = (-1, -1, 1)
    np.testing.assert_array_equal(grid, expected)


def test_order_of_steps_is_the_plans(scan):
    """Normalise-first clips before the spline, so its result stays within the clip limits."""
    first = dataclasses.replace(PLANS, normalise_first=True)
    coarse = dataclasses.replace(CONFIGURATION, spacing_mm=(5.0, 0.5, 0.5))
    a = prepare.prepare([scan], first, coarse).data
    b = prepare.prepare([scan], PLANS, coarse).data
    assert a.shape == b.shape
    assert not np.allclose(a, b)
    flat = prepare.prepare([scan.with_voxels(np.full_like(scan.voxels, 60))], PLANS, coarse).data
    np.testing.assert_allclose(flat, (60 - 50) / 20, rtol=1e-5)


def test_restore_averages_the_parts_of_an_ensemble(scan):
    placement = place([scan], PLANS, CONFIGURATION)
    sure = torch.zeros(2, *placement.grid_shape)
    sure[1] = 1.0
    unsure = torch.zeros(2, *placement.grid_shape)
    unsure[0] = 0.6
    both = restore([(sure, placement), (unsure, placement)], PLANS)
    assert both.shape == scan.voxels.shape
    assert both.min() == 1  # (1 + 0) / 2 beats (0 + 0.6) / 2
    assert restore([(unsure, placement)], PLANS).max() == 0


def chances(scores, *, average, plans=PLANS, parts=1):
    """The foreground in steps of 1/255, of a row of voxels with these scores ``(K, n)``."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    row = Volume(np.ones((1, 1, scores.shape[1])), (5.0, 1.0, 1.0))
    placement = place([row], plans, CONFIGURATION)
    found = np.zeros((1, 1, scores.shape[1]), np.uint8)
    given = (scores.reshape(len(scores), 1, 1, -1), placement)
    restore([given] * parts, plans, average=average, foreground=found)
    return found[0, 0] / 255


@pytest.mark.parametrize("parts", [1, 2])
def test_the_foreground_is_what_the_background_leaves(parts):
    given = [[0.7, 0.2, 0.0], [0.2, 0.3, 0.5], [0.1, 0.5, 0.5]]
    np.testing.assert_allclose(
        chances(given, average="probabilities", parts=parts), [0.3, 0.8, 1], atol=0.003
    )
    logits = np.array([[1.0, -2, 30], [0, 4, -30], [-1, 2, 0]])
    expected = 1 - np.exp(logits[0]) / np.exp(logits).sum(0)
    np.testing.assert_allclose(chances(logits, average="logits", parts=parts), expected, atol=0.003)


@pytest.mark.parametrize("parts", [1, 2])
def test_of_regions_the_likeliest_is_the_foreground(parts):
    plans = dataclasses.replace(PLANS, labels=("background", "a", "b"), regions=(1, 2))
    given = np.array([[0.0, 3, -9], [-2, 1, -4]])
    expected = 1 / (1 + np.exp(-given.max(0)))
    found = chances(given, average="logits", plans=plans, parts=parts)
    np.testing.assert_allclose(found, expected, atol=0.003)


@pytest.mark.parametrize(
    ("separate_z", "expected"), [(("score",), [1, 1, 0, 0]), ((), [1, 0, 0, 0])]
)
def test_scores_take_nearest_slices_of_a_coarse_axis_if_planned(separate_z, expected):
    """Slice 1 lies a quarter of the way from the first grid slice to the second."""
    resampling = dataclasses.replace(PLANS.resampling, separate_z=separate_z)
    plans = dataclasses.replace(PLANS, resampling=resampling)
    thick = dataclasses.replace(CONFIGURATION, spacing_mm=(10.0, 1.0, 1.0))
    placement = place([Volume(np.ones((4, 3, 3)), (5.0, 1.0, 1.0))], plans, thick)
    scores = torch.zeros(2, 2, 3, 3)
    scores[1, 0], scores[1, 1] = 1, -10
    labels = restore([(scores, placement)], plans)
    np.testing.assert_array_equal(labels, np.array(expected)[:, None, None] * np.ones((4, 3, 3)))


def test_the_largest_score_wins_and_the_lower_label_on_a_tie():
    row = Volume(np.ones((1, 1, 7)), (5.0, 1.0, 1.0))
    placement = place([row], PLANS, CONFIGURATION)
    scores = torch.tensor(
        [[2, 1, 1, 3, 0, -5, 5], [2, 2, 1, 3, 1, -4, 1], [1, 2, 3, 3, 2, -6, 3.0]]
    )
    labels = restore([(scores.reshape(3, 1, 1, 7), placement)], PLANS)
    np.testing.assert_array_equal(labels, [[[0, 1, 2, 0, 2, 1, 0]]])


def test_wrong_channels_are_refused(scan):
    with pytest.raises(InputError, match="2 channels given, expected 1"):
        place([scan, scan], PLANS, CONFIGURATION)
    two = Plans(
        **{
            **{f.name: getattr(PLANS, f.name) for f in dataclasses.fields(PLANS)},
            "channels": ("a", "b"),
            "normalisations": PLANS.normalisations * 2,
        }
    )
    other = Volume(np.zeros((2, 2, 2)), (1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="channels differ in shape"):
        place([scan, other], two, CONFIGURATION)


def resized(image, shape):
    """Each slice by scikit-image: what a coarse first axis that keeps its slices comes to."""
    return np.stack(
        [
            skimage.transform.resize(
                part.astype(np.float64), shape, order=3, mode="edge", anti_aliasing=False
            )
            for part in image
        ]
    )


@pytest.mark.parametrize("normalise_first", [False, True])
def test_either_order_equals_the_same_steps_by_scikit_image(normalise_first):
    voxels = np.random.default_rng(2).integers(-200, 200, (4, 20, 16)).astype(np.int16) | 1
    plans = dataclasses.replace(PLANS, normalise_first=normalise_first)
    finer = dataclasses.replace(CONFIGURATION, spacing_mm=(5.0, 0.8, 0.8))
    found = prepare.prepare([Volume(voxels, (5.0, 1.0, 1.0))], plans, finer).data[0]

    def normalised(values):
        return (np.clip(values, 0, 100) - 50) / 20

    expected = (
        resized(normalised(voxels), (25, 20))
        if normalise_first
        else normalised(resized(voxels, (25, 20)))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_slab_by_slab_is_the_whole_normalised_before(dtype, monkeypatch):
    """And the volume that was given stays as it was."""
    voxels = np.random.default_rng(5).integers(-200, 200, (30, 12, 14)).astype(dtype)
    before = voxels.copy()
    plans = dataclasses.replace(PLANS, normalise_first=True)
    finer = dataclasses.replace(CONFIGURATION, spacing_mm=(0.7, 1.0, 0.9))
    monkeypatch.setattr(resample, "_SLAB_VOXELS", 500)
    scan = Volume(voxels, (1.0, 1.0, 1.0))
    found = prepare.prepare([scan], plans, finer)
    normal = prepare.normalise(before.astype(np.float32), plans.normalisations[0])
    expected = resize_image(normal, found.data.shape[1:], order=3, separate_axis=None)
    np.testing.assert_array_equal(found.data[0], expected)
    np.testing.assert_array_equal(voxels, before)


@pytest.mark.parametrize("normalise_first", [False, True])
def test_channels_have_one_crop_and_each_its_own_normalisation(normalise_first):
    rng = np.random.default_rng(3)
    ct, mr = np.zeros((4, 12, 14), np.int16), np.zeros((4, 12, 14), np.float32)
    ct[:, 2:9, 3:10] = rng.integers(1, 90, (4, 7, 7))
    mr[:, 3:11, 4:12] = rng.normal(500, 30, (4, 8, 8))
    plans = dataclasses.replace(
        PLANS,
        channels=("CT", "MR"),
        normalisations=(PLANS.normalisations[0], Normalisation("zscore", masked=True)),
        normalise_first=normalise_first,
    )
    spacing = CONFIGURATION.spacing_mm
    case = prepare.prepare([Volume(ct, spacing), Volume(mr, spacing)], plans, CONFIGURATION)
    box = np.s_[:, 2:11, 3:12]
    assert case.placement.box == ((0, 4), (2, 11), (3, 12))
    np.testing.assert_allclose(case.data[0], (ct[box] - 50) / 20, rtol=1e-5)
    head = (ct[box] != 0) | (mr[box] != 0)  # of either channel
    values = mr[box][head].astype(np.float64)
    expected = np.where(head, (mr[box] - values.mean()) / values.std(), 0)
    np.testing.assert_allclose(case.data[1], expected, atol=1e-5)


def test_a_masked_zscore_measures_before_or_after_resampling_as_planned():
    image = np.zeros((4, 16, 16), np.float32)
    image[:, 4:, 4:] = np.random.default_rng(4).normal(300, 20, (4, 12, 12))
    image[:, 0, 0] = image[:, -1, 0] = image[:, 0, -1] = 300  # the crop is the whole
    volume = Volume(image, (5.0, 1.0, 1.0))
    finer = dataclasses.replace(CONFIGURATION, spacing_mm=(5.0, 0.5, 0.5))
    scheme = (Normalisation("zscore", masked=True),)
    plans = dataclasses.replace(PLANS, normalisations=scheme)
    placement = place([volume], plans, finer)
    outside = prepare.outside_nonzero([volume], placement)
    assert outside is not None
    np.testing.assert_array_equal(outside, image == 0)

    after = prepare.prepare([volume], plans, finer).data[0]
    grid_outside = outside.repeat(2, 1).repeat(2, 2)
    large = resized(image, (32, 32))
    kept = large[~grid_outside]
    expected = np.where(grid_outside, 0, (large - kept.mean()) / kept.std())
    np.testing.assert_allclose(after, expected, atol=1e-4)

    first = dataclasses.replace(plans, normalise_first=True)
    before = prepare.prepare([volume], first, finer).data[0]
    kept = image[~outside].astype(np.float64)
    expected = resized(np.where(outside, 0, (image - kept.mean()) / kept.std()), (32, 32))
    np.testing.assert_allclose(before, expected, atol=1e-4)


@given(st.integers(0, 100_000), st.sampled_from([0.5, 0.8, 0.95]))
@settings(deadline=None)
def test_outside_is_what_a_flood_from_the_border_reaches(seed, filled):
    rng = np.random.default_rng(seed)
    same_as_a_flood(rng.random(rng.integers(1, 7, 3)) < filled)


@pytest.mark.parametrize("depth", [0, 1, 30, 49, 50, 51, 90])
def test_outside_is_found_however_deep_it_goes(depth):
    """Noise that touches the border ends soon, a canal does not."""
    full = np.random.default_rng(depth).random((12, 40, 100)) < 0.95
    full[6, 20, :depth] = False
    same_as_a_flood(full)


def same_as_a_flood(full):
    image = np.where(full, 7, 0).astype(np.int16)
    volume = Volume(image, (5.0, 1.0, 1.0))
    placement = place([volume], PLANS, CONFIGURATION)
    cropped = np.pad(~full[placement.slices], 1, constant_values=True)
    reached = ndimage.label(cropped)[0] == 1  # the border's, which comes first
    found = prepare.outside_nonzero([volume], placement)
    expected = reached[1:-1, 1:-1, 1:-1]
    assert (found is not None) or not expected.any()
    np.testing.assert_array_equal(expected if found is None else found, expected)


@given(
    st.sampled_from(range(len(DIRECTIONS))),
    st.permutations([0, 1, 2]),
    st.sampled_from(["LPS", "RAS", "as_stored"]),
    st.tuples(*[st.floats(0.4, 2.5)] * 3),
    st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_what_fills_the_grid_fills_the_crop_whatever_the_spacing(
    d, order, orientation, spacing, seed
):
    """Geometry with resampling: shape and crop come back exactly, a plane stays where it was."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(s) for s in rng.integers(5, 12, 3))
    image = np.zeros(shape, np.int16)
    box = tuple(slice(int(rng.integers(0, 3)), int(s - rng.integers(0, 3))) for s in shape)
    image[box] = 1
    volume = Volume(image, spacing, direction=tuple(DIRECTIONS[d].ravel()))
    plans = dataclasses.replace(PLANS, orientation=orientation, transpose=tuple(order))
    placement = prepare.prepare([volume], plans, CONFIGURATION).placement
    scores = torch.zeros(2, *placement.grid_shape)
    scores[1] = 1
    labels = restore([(scores, placement)], plans)
    np.testing.assert_array_equal(labels, image)
    axis = int(rng.integers(3))  # scores that grow along it, 0 in the middle of the crop
    grid, crop = placement.grid_shape[axis], placement.crop_shape[axis]
    along = torch.arange(grid) / grid + 0.5 / grid - 0.5
    scores[1] = along.reshape([-1 if a == axis else 1 for a in range(3)])
    labels = restore([(scores, placement)], plans)
    inner = np.moveaxis(placement.axes.apply(labels)[placement.slices], axis, 0)
    position = np.arange(crop) / crop + 0.5 / crop - 0.5
    assert inner[position > 1 / grid].all()
    assert not inner[position < -1 / grid].any()
