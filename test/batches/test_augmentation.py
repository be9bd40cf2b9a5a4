import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from training.batches.augmentation import (
    MSD2018,
    NNUNETV2,
    NO_AUGMENTATION,
    AugmentationConfig,
    Warp,
    draw_changes,
    draw_warp,
)

REFERENCE = json.loads(
    (Path(__file__).parents[1] / "helpers" / "nnunetv2_augmentation.json").read_text()
)
PATCH = (16, 32, 32)
DRAWS = 4000
PER_CHANNEL = ("noise", "blur", "brightness", "contrast", "low_resolution", "inverted_gamma",
               "gamma")  # fmt: skip


def rng(seed=0):
    return np.random.default_rng(seed)


def draw_many(config, patch=PATCH, *, in_plane=False, seed=1):
    source = rng(seed)
    warps = [draw_warp(source, config, patch, in_plane=in_plane) for _ in range(DRAWS)]
    return [warp for warp in warps if warp is not None]


def share(found):
    return len(found) / DRAWS


def test_warps_of_the_2018_recipe():
    """C19: each of the three in a fifth of the samples."""
    drawn = draw_many(MSD2018)
    assert 1 - share(drawn) == pytest.approx(0.8**3, abs=0.025)
    elastic = [warp.elastic for warp in drawn if warp.elastic]
    turned = [warp.angles for warp in drawn if any(warp.angles)]
    scales = np.array([warp.scale for warp in drawn if warp.scale != 1])
    for group in (elastic, turned, scales):
        assert share(group) == pytest.approx(0.2, abs=0.02)
    alpha, sigma = np.array(elastic).T
    assert 0 <= alpha.min() < 20 < 880 < alpha.max() <= 900
    assert 9 <= sigma.min() < 9.1 < 12.9 < sigma.max() <= 13
    assert np.shape(turned)[1] == 3
    assert 14.8 < math.degrees(np.abs(turned).max()) <= 15
    assert 0.85 <= scales.min() < 0.86 < 1.24 < scales.max() <= 1.25
    assert np.mean(scales < 1) == pytest.approx(0.5, abs=0.06)


def test_warps_of_nnunetv2():
    drawn = draw_many(NNUNETV2)
    assert 1 - share(drawn) == pytest.approx(0.8**2, abs=0.025)
    assert not any(warp.elastic for warp in drawn)
    degrees = np.degrees([warp.angles for warp in drawn if any(warp.angles)])
    scales = np.array([warp.scale for warp in drawn if warp.scale != 1])
    assert share(degrees) == pytest.approx(0.2, abs=0.02)
    assert share(scales) == pytest.approx(0.2, abs=0.02)
    assert 29.8 < np.abs(degrees).max() <= 30
    assert (np.abs(degrees).max(0) > 29).all()  # about each axis
    assert 0.7 <= scales.min() < 0.71 < 1.39 < scales.max() <= 1.4
    assert np.mean(scales < 1) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("config", [MSD2018, NNUNETV2], ids=["msd2018", "nnunetv2"])
@pytest.mark.parametrize(
    ("patch", "in_plane", "limit"),
    [
        ((4, 16, 16), True, 180),
        ((16, 16), False, 180),
        ((16, 24), False, 180),
        ((16, 25), False, 15),
    ],
)
def test_in_plane_warps_turn_about_one_axis(config, patch, in_plane, limit):
    config = dataclasses.replace(config, rotation_probability=1, elastic_probability=1)
    warps = draw_many(config, patch, in_plane=in_plane)
    assert {len(warp.angles) for warp in warps} == {1}
    degrees = np.degrees([warp.angles[0] for warp in warps])
    assert 0.99 * limit < np.abs(degrees).max() <= limit
    assert 195 < max(warp.elastic[0] for warp in warps) <= 200


def test_probabilities_are_nnunetv2s():
    """As its own trainer sets up its transforms."""
    wanted = REFERENCE["probabilities"]
    for name, probability in wanted.items():
        assert getattr(NNUNETV2, f"{name}_probability") == probability, name
    fields = {f.name for f in dataclasses.fields(NNUNETV2) if f.name.endswith("_probability")}
    assert fields == {f"{name}_probability" for name in (*wanted, "mirror")}


def test_changes_of_nnunetv2_are_as_often_and_as_far_as_it_says():
    source = rng(2)
    drawn = [draw_changes(source, NNUNETV2, 2, PATCH, in_plane=False) for _ in range(DRAWS)]
    often = {"noise": 0.1, "blur": 0.2 * 0.5, "brightness": 0.15, "contrast": 0.15,
             "low_resolution": 0.25 * 0.5, "inverted_gamma": 0.1, "gamma": 0.3}  # fmt: skip
    ranges = {"noise": (0, 0.1), "blur": (0.5, 1), "brightness": (0.75, 1.25),
              "contrast": (0.75, 1.25), "low_resolution": (0.5, 1), "inverted_gamma": (0.7, 1.5),
              "gamma": (0.7, 1.5)}  # fmt: skip
    for name in PER_CHANNEL:
        for channel in range(2):
            found = [getattr(changes, name)[channel] for changes in drawn]
            found = np.array([value for value in found if value is not None])
            assert share(found) == pytest.approx(often[name], abs=0.025), name
            low, high = ranges[name]
            edge = 0.03 * (high - low)
            assert low <= found.min() < low + edge, name
            assert high - edge < found.max() <= high, name
            if low < 1 < high:
                assert np.mean(found < 1) == pytest.approx(0.5, abs=0.07), name
    for axis in range(3):
        count = sum(axis in changes.mirrored for changes in drawn)
        assert count / DRAWS == pytest.approx(0.5, abs=0.03)
    assert len({changes.seed for changes in drawn}) > 0.99 * DRAWS


def test_channels_are_drawn_apart_except_for_noise():
    source = rng(3)
    always = dataclasses.replace(
        NNUNETV2, **{f"{name}_probability": 1 for name in PER_CHANNEL},
        blur_channel_probability=1, low_resolution_channel_probability=1,
    )  # fmt: skip
    drawn = draw_changes(source, always, 2, PATCH, in_plane=False)
    assert drawn.noise[0] == drawn.noise[1]
    for name in PER_CHANNEL[1:]:
        first, second = getattr(drawn, name)
        assert first != second, name
    assert len(set(drawn.blur[0])) == 3  # along each axis another one


def test_the_2018_recipe_changes_only_gamma():
    source = rng(4)
    drawn = [draw_changes(source, MSD2018, 1, PATCH, in_plane=False) for _ in range(DRAWS)]
    for name in PER_CHANNEL[:-1]:
        assert {getattr(changes, name) for changes in drawn} == {(None,)}
    gammas = [changes.gamma[0] for changes in drawn if changes.gamma[0] is not None]
    assert share(gammas) == pytest.approx(0.3, abs=0.02)
    assert 0.7 <= min(gammas) < 0.71 < 1.49 < max(gammas) <= 1.5


def test_without_augmentation_nothing_is_drawn():
    source = rng(5)
    for _ in range(50):
        assert draw_warp(source, NO_AUGMENTATION, PATCH, in_plane=False) is None
        drawn = draw_changes(source, NO_AUGMENTATION, 1, PATCH, in_plane=False)
        assert all(getattr(drawn, name) == (None,) for name in PER_CHANNEL)
        assert drawn.mirrored == ()


@pytest.mark.parametrize(
    ("patch", "in_plane", "first"), [(PATCH, False, 0), (PATCH, True, 1), ((1, 32, 32), False, 1)]
)
def test_dummy_2d_keeps_the_resolution_between_slices(patch, in_plane, first):
    assert draw_changes(rng(), NNUNETV2, 1, patch, in_plane=in_plane).zoomed == first


def test_reach_by_hand():
    # a quarter turn swaps the half sizes 7.5 and 9.5: 2 more rows on either side, and the spline's
    quarter = Warp(None, (math.pi / 2,), 1.0)
    assert quarter.reach((4, 16, 20)) == (4, 16 + 2 * (2 + 1), 20 + 2 * 1)
    # 7.5 * 1.2 = 9, 9.5 * 1.2 = 11.4
    assert Warp(None, (0.0,), 1.2).reach((4, 16, 20)) == (4, 16 + 2 * 3, 20 + 2 * 3)
    assert Warp(None, (0.0, 0.0, 0.0), 0.9).reach((4, 16, 20)) == (6, 18, 22)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma_probability": 1.5}, "gamma_probability is 1.5, expected 0 to 1"),
        ({"blur_channel_probability": -1}, "blur_channel_probability is -1, expected 0 to 1"),
        ({"scaling": (1.2, 0.8)}, "scaling is 1.2 to 0.8, expected a range"),
        ({"noise_deviation": (-0.1, 0.1)}, "noise_deviation is -0.1 to 0.1, expected a range"),
        ({"low_resolution": (0.0, 1.0)}, "low_resolution is 0.0 to 1.0, expected above 0 to 1"),
        ({"image_order": 2}, "orders 2 and 1"),
    ],
)
def test_refuses_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**changes)
