import dataclasses
import math

import numpy as np
import pytest

from training.augment import NO_AUGMENTATION, AugmentationConfig, Warp, augment, draw_warp

PATCH = (4, 16, 20)
LINEAR = dataclasses.replace(NO_AUGMENTATION, image_order=1)
ALWAYS = AugmentationConfig(
    elastic_probability=1, rotation_probability=1, scaling_probability=1, gamma_probability=1
)


def rng(seed=0):
    return np.random.default_rng(seed)


def box(size):
    """An image and its target: a box off the centre, in every slice another one."""
    target = np.zeros(size, np.int8)
    for z in range(size[0]):
        target[z, size[1] // 4 : size[1] // 2, size[2] // 3 + z : size[2] // 2 + 3 + z] = 1
    return target[None].astype(np.float32), target


def test_without_anything_drawn_nothing_changes():
    data, target = box(PATCH)
    warp = draw_warp(rng(), NO_AUGMENTATION, PATCH, in_plane=True)
    assert warp is None
    new, moved = augment(data.copy(), target, warp, PATCH, NO_AUGMENTATION, rng())
    np.testing.assert_array_equal(new, data)
    np.testing.assert_array_equal(moved, target)


def test_draws_are_as_often_and_as_far_as_the_recipe_says():
    source, config = rng(1), AugmentationConfig()
    warps = [draw_warp(source, config, (16, 32, 32), in_plane=False) for _ in range(5000)]
    drawn = [warp for warp in warps if warp is not None]
    assert 1 - len(drawn) / 5000 == pytest.approx(0.8**3, abs=0.02)
    elastic = [warp.elastic for warp in drawn if warp.elastic]
    turned = [warp.angles for warp in drawn if any(warp.angles)]
    scales = np.array([warp.scale for warp in drawn if warp.scale != 1])
    for group in (elastic, turned, scales):
        assert len(group) / 5000 == pytest.approx(0.2, abs=0.02)
    alpha, sigma = np.array(elastic).T
    assert 0 <= alpha.min() < 20 < 880 < alpha.max() <= 900
    assert 9 <= sigma.min() < 9.1 < 12.9 < sigma.max() <= 13
    assert np.shape(turned)[1] == 3
    assert 14 < math.degrees(np.abs(turned).max()) <= 15
    assert 0.85 <= scales.min() < 0.86 < 1.24 < scales.max() <= 1.25
    assert np.mean(scales < 1) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    ("patch", "in_plane", "limit"),
    [((4, 16, 16), True, 180), ((16, 16), False, 180), ((16, 25), False, 15)],
)
def test_in_plane_warps_turn_about_one_axis(patch, in_plane, limit):
    config = AugmentationConfig(rotation_probability=1, elastic_probability=1)
    source = rng(2)
    warps = [draw_warp(source, config, patch, in_plane=in_plane) for _ in range(300)]
    assert {len(warp.angles) for warp in warps} == {1}
    degrees = np.degrees([warp.angles[0] for warp in warps])
    assert 0.95 * limit < np.abs(degrees).max() <= limit
    assert max(warp.elastic[0] for warp in warps) <= 200


def test_reach_by_hand():
    # a quarter turn swaps the half sizes 7.5 and 9.5: 2 more rows on either side, and the spline's
    quarter = Warp(None, (math.pi / 2,), 1.0)
    assert quarter.reach((4, 16, 20)) == (4, 16 + 2 * (2 + 1), 20 + 2 * 1)
    # 7.5 * 1.2 = 9, 9.5 * 1.2 = 11.4
    assert Warp(None, (0.0,), 1.2).reach((4, 16, 20)) == (4, 16 + 2 * 3, 20 + 2 * 3)
    assert Warp(None, (0.0, 0.0, 0.0), 0.9).reach((4, 16, 20)) == (6, 18, 22)


@pytest.mark.parametrize("in_plane", [True, False])
def test_a_warp_never_looks_beyond_its_reach(in_plane):
    """Reading outside would mix in zeros; the margin for elastic displacement holds, too."""
    source = rng(3)
    for _ in range(25):
        warp = draw_warp(source, ALWAYS, PATCH, in_plane=in_plane)
        size = warp.reach(PATCH)
        data, target = np.ones((1, *size), np.float32), np.ones(size, np.int8)
        new, moved = augment(data, target, warp, PATCH, LINEAR, source)
        np.testing.assert_allclose(new, 1, atol=1e-6)
        assert moved.min() == 1


@pytest.mark.parametrize("turns", [1, -1, 2])
def test_quarter_turns_are_rot90(turns):
    patch = (3, 16, 16)
    warp = Warp(None, (turns * math.pi / 2,), 1.0)
    size = warp.reach(patch)
    data, target = box(size)
    edge = (size[1] - 16) // 2
    inner = (slice(None), slice(edge, edge + 16), slice(edge, edge + 16))
    new, moved = augment(data, target, warp, patch, LINEAR, rng())
    expected = np.rot90(target[inner], -turns, (1, 2))
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_allclose(new[0], expected, atol=1e-6)


def test_scaling_above_one_shrinks_what_is_seen():
    patch = (1, 16, 16)
    sizes = {}
    for scale in (0.8, 1.25):
        warp = Warp(None, (0.0,), scale)
        size = warp.reach(patch)
        target = np.zeros(size, np.int8)
        centre = [s // 2 for s in size]
        target[:, centre[1] - 4 : centre[1] + 4, centre[2] - 4 : centre[2] + 4] = 1
        data = target[None].astype(np.float32)
        sizes[scale] = int(augment(data, target, warp, patch, LINEAR, rng())[1].sum())
    assert sizes == {0.8: 100, 1.25: 36}  # (8 / 0.8)^2, (8 / 1.25)^2 = 41 rounded to whole voxels


def test_3d_rotations_turn_about_each_axis():
    patch = (9, 9, 9)
    for axis, plane in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        angles = [0.0, 0.0, 0.0]
        angles[axis] = math.pi / 2
        warp = Warp(None, tuple(angles), 1.0)
        size = warp.reach(patch)
        target = (rng(axis).random(size) > 0.5).astype(np.int8)
        edge = (size[0] - 9) // 2
        _, moved = augment(target[None].astype(np.float32), target, warp, patch, LINEAR, rng())
        inner = target[edge:-edge, edge:-edge, edge:-edge]
        np.testing.assert_array_equal(moved, np.rot90(inner, -1, plane))


@pytest.mark.parametrize("in_plane", [True, False])
def test_image_and_target_move_together(in_plane):
    source = rng(4)
    for _ in range(20):
        warp = draw_warp(source, ALWAYS, PATCH, in_plane=in_plane)
        data, target = box(warp.reach(PATCH))
        mirrored = dataclasses.replace(LINEAR, mirror_probability=0.5)
        new, moved = augment(data, target, warp, PATCH, mirrored, source)
        sure = np.abs(new[0] - 0.5) > 1e-6
        np.testing.assert_array_equal((new[0] > 0.5)[sure], (moved == 1)[sure])


def test_dummy_2d_gives_every_slice_and_channel_the_same_change():
    warp = draw_warp(rng(5), ALWAYS, PATCH, in_plane=True)
    _, height, width = warp.reach(PATCH)
    image = rng(6).random((height, width)).astype(np.float32)
    data = np.broadcast_to(image, (2, PATCH[0], height, width)).copy()
    target = np.zeros((PATCH[0], height, width), np.int8)
    new, _ = augment(data, target, warp, PATCH, NO_AUGMENTATION, rng())
    assert new.shape == (2, *PATCH)
    np.testing.assert_array_equal(new, np.broadcast_to(new[0, 0], new.shape))


def test_outside_stays_minus_one_and_zero():
    warp = Warp(None, (0.0,), 1.0)
    size = warp.reach(PATCH)
    data, target = np.full((1, *size), 9, np.float32), np.ones(size, np.int8)
    data[..., : size[2] // 2], target[..., : size[2] // 2] = 0, -1
    new, moved = augment(data, target, warp, PATCH, NO_AUGMENTATION, rng())
    assert set(np.unique(moved)) == {-1, 1}
    np.testing.assert_array_equal(new[0][moved == -1].round(), 0)


def test_what_lies_beyond_the_region_is_outside():
    data, target = np.ones((1, *PATCH), np.float32), np.ones(PATCH, np.int8)
    new, moved = augment(data, target, Warp(None, (0.0,), 2.0), PATCH, LINEAR, rng())
    assert (moved[:, 0] == -1).all()
    assert (moved[:, 8, 10] == 1).all()
    assert not new[0, :, 0].any()


def test_gamma_keeps_mean_and_deviation_of_each_channel():
    config = dataclasses.replace(NO_AUGMENTATION, gamma_probability=1)
    data = rng(7).normal([[[[0]]], [[[50]]]], 3, (2, *PATCH)).astype(np.float32)
    target = np.zeros(PATCH, np.int8)
    new, _ = augment(data.copy(), target, None, PATCH, config, rng(8))
    assert np.abs(new - data).max() > 0.05
    np.testing.assert_allclose(new.mean((1, 2, 3)), data.mean((1, 2, 3)), atol=1e-3)
    np.testing.assert_allclose(new.std((1, 2, 3)), data.std((1, 2, 3)), rtol=1e-3)


def test_mirrors_each_axis_half_of_the_time():
    config = dataclasses.replace(NO_AUGMENTATION, mirror_probability=0.5)
    data, target = box((2, 3, 8))
    data = rng(9).random(data.shape).astype(np.float32)
    seen = [0, 0, 0]
    source = rng(10)
    for _ in range(400):
        new, _ = augment(data, target, None, (2, 3, 8), config, source)
        where = np.argwhere(new[0] == data[0, 0, 0, 0])[0]
        for axis in range(3):
            seen[axis] += int(where[axis] > 0)
    assert np.array(seen) / 400 == pytest.approx([0.5] * 3, abs=0.1)


def test_only_the_given_generator_matters():
    warp = Warp((40.0, 9.0), (0.3,), 1.1)
    data, target = box(warp.reach(PATCH))
    config = AugmentationConfig(gamma_probability=1)

    def run(seed):
        return augment(data.copy(), target, warp, PATCH, config, rng(seed))[0].tobytes()

    first = run(1)
    np.random.seed(99)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert run(1) == first
    assert run(2) != first
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma_probability": 1.5}, "gamma_probability is 1.5, expected 0 to 1"),
        ({"scaling": (1.2, 0.8)}, "scaling is 1.2 to 0.8, expected a range"),
        ({"image_order": 2}, "orders 2 and 1"),
    ],
)
def test_refuses_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**changes)
