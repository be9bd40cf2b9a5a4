"""Each operation worked by hand, in both engines."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch

from training.batches.augment_device import augment_batch
from training.batches.augment_host import augment
from training.batches.augmentation import (
    NNUNETV2,
    NO_AUGMENTATION,
    AugmentationConfig,
    Warp,
    draw_warp,
)

PATCH = (4, 16, 20)
LINEAR = dataclasses.replace(NO_AUGMENTATION, image_order=1)
ALWAYS = AugmentationConfig(
    elastic_probability=1,
    rotation_probability=1,
    scaling_probability=1,
    gamma_probability=0,
    mirror_probability=0,
    image_order=1,
)


def on_device(data, labels, warp, patch, config, rng, *, in_plane=False):
    """The device engine in the host engine's terms."""
    images, moved = augment_batch(
        torch.from_numpy(data[None].copy()),
        torch.from_numpy(labels[None].copy()),
        [warp],
        patch,
        config,
        [rng],
        classes=int(labels.max()) + 1,
        in_plane=in_plane,
    )
    return images[0].numpy(), moved[0].numpy()


@pytest.fixture(params=[augment, on_device], ids=["host", "device"])
def engine(request):
    return request.param


def rng(seed=0):
    return np.random.default_rng(seed)


def only(**changes):
    return dataclasses.replace(LINEAR, **changes)


def box(size):
    """An image and its label map: a box off the centre, in every slice another one."""
    labels = np.zeros((1, *size), np.int8)
    for z in range(size[0]):
        labels[0, z, size[1] // 4 : size[1] // 2, size[2] // 3 + z : size[2] // 2 + 3 + z] = 1
    return labels.astype(np.float32), labels


def changed(engine, image, config, *, in_plane=False, seed=0):
    """An image ``(Z, Y, X)`` or ``(C, Z, Y, X)`` after changes without a warp."""
    data = np.asarray(image, np.float32)
    data = data[None] if data.ndim == 3 else data
    labels = np.zeros((1, *data.shape[1:]), np.int8)
    before = data.copy()
    new, moved = engine(data, labels, None, data.shape[1:], config, rng(seed), in_plane=in_plane)
    assert not moved.any()
    np.testing.assert_array_equal(data, before)  # the input stays
    return new[0] if np.ndim(image) == 3 else new


def test_without_anything_drawn_nothing_changes(engine):
    data, labels = box(PATCH)
    new, moved = engine(data, labels, None, PATCH, NO_AUGMENTATION, rng())
    np.testing.assert_array_equal(new, data)
    np.testing.assert_array_equal(moved, labels)


@pytest.mark.parametrize("in_plane", [True, False])
def test_a_warp_never_looks_beyond_its_reach(engine, in_plane):
    """Reading outside would mix in zeros; the margin for elastic displacement holds, too."""
    source = rng(3)
    for _ in range(20):
        warp = draw_warp(source, ALWAYS, PATCH, in_plane=in_plane)
        size = warp.reach(PATCH)
        data, labels = np.ones((1, *size), np.float32), np.ones((1, *size), np.int8)
        new, moved = engine(data, labels, warp, PATCH, LINEAR, source)
        np.testing.assert_allclose(new, 1, atol=1e-5)
        assert moved.min() == 1


@pytest.mark.parametrize("turns", [1, -1, 2])
def test_quarter_turns_are_rot90(engine, turns):
    patch = (3, 16, 16)
    warp = Warp(None, (turns * math.pi / 2,), 1.0)
    size = warp.reach(patch)
    data, labels = box(size)
    edge = (size[1] - 16) // 2
    inner = (0, slice(None), slice(edge, edge + 16), slice(edge, edge + 16))
    new, moved = engine(data, labels, warp, patch, LINEAR, rng())
    expected = np.rot90(labels[inner], -turns, (1, 2))
    np.testing.assert_array_equal(moved[0], expected)
    np.testing.assert_allclose(new[0], expected, atol=1e-4)


def test_3d_rotations_turn_about_each_axis(engine):
    patch = (9, 9, 9)
    for axis, plane in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        angles = [0.0, 0.0, 0.0]
        angles[axis] = math.pi / 2
        warp = Warp(None, tuple(angles), 1.0)
        size = warp.reach(patch)
        labels = (rng(axis).random((1, *size)) > 0.5).astype(np.int8)
        edge = (size[0] - 9) // 2
        new, moved = engine(labels.astype(np.float32), labels, warp, patch, LINEAR, rng())
        inner = labels[0, edge:-edge, edge:-edge, edge:-edge]
        np.testing.assert_array_equal(moved[0], np.rot90(inner, -1, plane))
        np.testing.assert_allclose(new[0], np.rot90(inner, -1, plane), atol=1e-4)


def test_scaling_samples_that_much_further_out(engine):
    """A plane stays a plane, and doubling the scale doubles its slope about the centre."""
    patch = (4, 10, 12)
    for scale in (0.5, 1.25, 2.0):
        warp = Warp(None, (0.0, 0.0, 0.0), scale)
        size = warp.reach(patch)
        z, y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in size), indexing="ij")
        data = (3 * z + 5 * y - 7 * x)[None].astype(np.float32)
        new, _ = engine(data, np.zeros((1, *size), np.int8), warp, patch, LINEAR, rng())
        z, y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in patch), indexing="ij")
        np.testing.assert_allclose(new[0], scale * (3 * z + 5 * y - 7 * x), atol=1e-4)


def test_scaling_above_one_shrinks_what_is_seen(engine):
    patch = (1, 16, 16)
    sizes = {}
    for scale in (0.8, 1.25):
        warp = Warp(None, (0.0,), scale)
        size = warp.reach(patch)
        labels = np.zeros((1, *size), np.int8)
        centre = [s // 2 for s in size]
        labels[0, :, centre[1] - 4 : centre[1] + 4, centre[2] - 4 : centre[2] + 4] = 1
        data = labels.astype(np.float32)
        sizes[scale] = int(engine(data, labels, warp, patch, LINEAR, rng())[1].sum())
    assert sizes == {0.8: 100, 1.25: 36}  # (8 / 0.8)^2, (8 / 1.25)^2 = 41 rounded to whole voxels


@pytest.mark.parametrize("in_plane", [True, False])
def test_image_and_both_label_maps_move_together(engine, in_plane):
    source = rng(4)
    for _ in range(10):
        warp = draw_warp(source, ALWAYS, PATCH, in_plane=in_plane)
        data, labels = box(warp.reach(PATCH))
        both = np.concatenate([labels, 2 * labels[:, :, ::-1]])
        image = np.concatenate([data, data[:, :, ::-1]])
        config = only(mirror_probability=0.5)
        new, moved = engine(image, both, warp, PATCH, config, source, in_plane=in_plane)
        assert set(np.unique(moved)) == {0, 1, 2}
        for channel, label in enumerate((1, 2)):
            sure = np.abs(new[channel] - 0.5) > 1e-4
            found = moved[channel] == label
            np.testing.assert_array_equal((new[channel] > 0.5)[sure], found[sure])


def test_dummy_2d_gives_every_slice_and_channel_the_same_change(engine):
    warp = draw_warp(rng(5), ALWAYS, PATCH, in_plane=True)
    _, height, width = warp.reach(PATCH)
    image = rng(6).random((height, width)).astype(np.float32)
    data = np.broadcast_to(image, (2, PATCH[0], height, width)).copy()
    labels = np.zeros((1, PATCH[0], height, width), np.int8)
    new, _ = engine(data, labels, warp, PATCH, LINEAR, rng())
    assert new.shape == (2, *PATCH)
    assert new.std() > 0.1
    np.testing.assert_array_equal(new, np.broadcast_to(new[0, 0], new.shape))


def test_the_largest_share_of_a_voxel_names_it(engine):
    """Where four labels meet, the one with 3 of 8 voxels wins, though it is no majority."""
    labels = np.full((1, 4, 4, 4), 7, np.int8)
    labels[0, 1:3, 1:3, 1:3] = np.array([1, 2, 2, 3, 3, 1, 2, 0]).reshape(2, 2, 2)
    warp = Warp(None, (0.0, 0.0, 0.0), 0.0)  # all of the patch looks at the centre
    _, moved = engine(labels.astype(np.float32), labels, warp, (2, 2, 2), LINEAR, rng())
    assert (moved == 2).all()


def test_outside_stays_minus_one_and_zero(engine):
    warp = Warp(None, (0.0,), 1.0)
    size = warp.reach(PATCH)
    data, labels = np.full((1, *size), 9, np.float32), np.ones((1, *size), np.int8)
    data[..., : size[2] // 2], labels[..., : size[2] // 2] = 0, -1
    new, moved = engine(data, labels, warp, PATCH, LINEAR, rng())
    assert set(np.unique(moved)) == {-1, 1}
    np.testing.assert_array_equal(new[moved == -1].round(), 0)


def test_what_lies_beyond_the_region_is_outside(engine):
    data, labels = np.ones((1, *PATCH), np.float32), np.ones((1, *PATCH), np.int8)
    new, moved = engine(data, labels, Warp(None, (0.0,), 2.0), PATCH, LINEAR, rng())
    assert (moved[:, :, 0] == -1).all()
    assert (moved[:, :, 8, 10] == 1).all()
    assert not new[0, :, 0].any()


def test_order_0_takes_the_nearest_voxel(engine):
    config = only(image_order=0, target_order=0)
    warp = Warp(None, (0.3,), 1.1)
    size = warp.reach(PATCH)
    labels = rng(7).integers(0, 3, (1, *size)).astype(np.int8)
    new, moved = engine(labels.astype(np.float32), labels, warp, PATCH, config, rng())
    assert len(np.unique(moved)) == 3
    np.testing.assert_array_equal(new, moved)


def test_noise_has_the_drawn_deviation_and_channels_their_own(engine):
    config = only(noise_probability=1, noise_deviation=(0.5, 0.5))
    noise = changed(engine, np.full((2, 20, 20, 20), 3), config) - 3
    assert noise.mean((1, 2, 3)) == pytest.approx([0, 0], abs=0.03)
    assert noise.std((1, 2, 3)) == pytest.approx([0.5, 0.5], rel=0.03)
    assert np.mean(noise**4) / np.mean(noise**2) ** 2 == pytest.approx(3, abs=0.2)  # normal
    assert abs(np.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.05
    again = changed(engine, np.full((2, 20, 20, 20), 3), config, seed=1) - 3
    assert abs(np.corrcoef(noise.ravel(), again.ravel())[0, 1]) < 0.05


def test_blur_spreads_a_voxel_by_a_gaussian(engine):
    config = only(blur_probability=1, blur_channel_probability=1, blur_sigma=(0.8, 0.8))
    image = np.zeros((9, 9, 9))
    image[4, 4, 4] = 1
    taps = np.exp(-0.5 * (np.arange(-3, 4) / 0.8) ** 2)  # 4 * 0.8 + 0.5 = 3.7
    taps = np.pad(taps / taps.sum(), 1)
    expected = taps[:, None, None] * taps[:, None] * taps
    np.testing.assert_allclose(changed(engine, image, config), expected, atol=1e-6)
    # at the edge nothing gets lost, and a single slice does not change across
    image = np.zeros((1, 1, 9))
    image[0, 0, 0] = 1
    line = changed(engine, image, config)[0, 0]
    np.testing.assert_allclose(line[:3], taps[4:7] + taps[5:8], atol=1e-6)
    assert line.sum() == pytest.approx(1, abs=1e-6)


def test_brightness_multiplies(engine):
    image = rng(8).normal(size=(2, 3, 4))
    for factor in (0.8, 1.2):
        config = only(brightness_probability=1, brightness=(factor, factor))
        np.testing.assert_allclose(changed(engine, image, config), factor * image, rtol=1e-5)


def test_contrast_keeps_mean_and_range(engine):
    image = [[[0, 1, 2, 3]]]  # mean 1.5
    more = changed(engine, image, only(contrast_probability=1, contrast=(1.25, 1.25)))
    np.testing.assert_allclose(more, [[[0, 0.875, 2.125, 3]]], rtol=1e-6)
    less = changed(engine, image, only(contrast_probability=1, contrast=(0.5, 0.5)))
    np.testing.assert_allclose(less, [[[0.75, 1.25, 1.75, 2.25]]], rtol=1e-6)


def test_low_resolution_by_hand(engine):
    config = only(
        low_resolution_probability=1,
        low_resolution_channel_probability=1,
        low_resolution=(0.5, 0.5),
    )
    # of four the second and the fourth stay, and are spread linearly: centres at 0.5 and 2.5
    line = changed(engine, [[[7, 1, 7, 9]] * 2], config)[0, 0]
    np.testing.assert_allclose(line, [1, 3, 7, 9], rtol=1e-6)
    image = rng(9).normal(size=(6, 8, 8))
    alone = changed(engine, image, config, in_plane=True)
    for z in range(6):  # slices stay apart
        np.testing.assert_allclose(
            alone[z], changed(engine, image[z : z + 1], config)[0], atol=1e-6
        )


def test_gamma_by_hand(engine):
    image = np.array([[[0.0, 1, 2, 4]]])  # mean 1.75
    squared = np.array([0, 0.25, 1, 4])  # 4 * (image / 4)^2
    expected = (squared - squared.mean()) / squared.std() * image.std() + 1.75
    new = changed(engine, image, only(gamma_probability=1, gamma=(2.0, 2.0)))
    np.testing.assert_allclose(new[0, 0], expected, rtol=1e-5, atol=1e-6)
    # from the other end: 4 - 4 * (1 - image / 4)^2
    squared = 4 - 4 * (1 - image[0, 0] / 4) ** 2
    expected = (squared - squared.mean()) / squared.std() * image.std() + 1.75
    new = changed(engine, image, only(inverted_gamma_probability=1, gamma=(2.0, 2.0)))
    np.testing.assert_allclose(new[0, 0], expected, rtol=1e-5, atol=1e-6)


def test_gamma_leaves_a_constant_image_alone(engine):
    image = np.full((2, 3, 4), 5.0)
    config = only(gamma_probability=1, inverted_gamma_probability=1)
    np.testing.assert_allclose(changed(engine, image, config), image, rtol=1e-6)


def test_changes_come_in_the_references_order(engine):
    """Contrast clips to the range that brightness has made, and gamma comes last."""
    image = np.array([[[0.0, 1, 2, 3]]])
    config = only(
        brightness_probability=1, brightness=(2.0, 2.0), contrast_probability=1,
        contrast=(1.25, 1.25), gamma_probability=1, gamma=(2.0, 2.0),
    )  # fmt: skip
    before = np.array([0, 1.75, 4.25, 6])
    squared = before**2
    expected = (squared - squared.mean()) / squared.std() * before.std() + before.mean()
    np.testing.assert_allclose(changed(engine, image, config)[0, 0], expected, rtol=1e-5, atol=1e-5)


def test_mirrors_image_and_labels_along_the_drawn_axes(engine):
    config = only(mirror_probability=0.5)
    data = rng(10).random((1, 2, 3, 8)).astype(np.float32)
    labels = rng(11).integers(-1, 3, (2, 2, 3, 8)).astype(np.int8)
    source, seen = rng(12), set()
    for _ in range(60):
        new, moved = engine(data, labels, None, (2, 3, 8), config, source)
        where = np.argwhere(new[0] == data[0, 0, 0, 0])[0]
        axes = tuple(axis + 1 for axis in range(3) if where[axis] > 0)
        np.testing.assert_array_equal(new, np.flip(data, axes))
        np.testing.assert_array_equal(moved, np.flip(labels, axes))
        seen.add(axes)
    assert len(seen) == 8


@pytest.mark.parametrize("in_plane", [True, False])
def test_only_the_given_generator_matters(engine, in_plane):
    everything = {
        f.name: 1 for f in dataclasses.fields(NNUNETV2) if f.name.endswith("_probability")
    }
    config = dataclasses.replace(NNUNETV2, **everything)
    warp = draw_warp(rng(13), config, PATCH, in_plane=in_plane)
    data, labels = box(warp.reach(PATCH))

    def run(seed):
        new, moved = engine(data, labels, warp, PATCH, config, rng(seed), in_plane=in_plane)
        return new.tobytes() + moved.tobytes()

    first = run(1)
    np.random.seed(99)  # noqa: NPY002
    random.seed(99)
    torch.manual_seed(99)
    before = [np.random.get_state()[1].copy(), torch.get_rng_state().numpy()]  # noqa: NPY002
    python_state = random.getstate()
    assert run(1) == first
    assert run(2) != first
    after = [np.random.get_state()[1], torch.get_rng_state().numpy()]  # noqa: NPY002
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1], before[1])
    assert random.getstate() == python_state
