"""What is no CT in HU is repaired, told or refused; a plausible one is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ichseg.errors import InputError
from ichseg.scan import plausibility, volume
from ichseg.scan.volume import Volume

SAMPLES = sorted((Path(__file__).parents[1] / "sample" / "input").iterdir())
PATH = Path("case.mha")


@pytest.fixture(scope="module")
def head():
    return volume.read(SAMPLES[0])


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_samples_pass_untouched(path):
    found = volume.read(path)
    same, warnings = plausibility.check(found, path)
    assert same is found
    assert warnings == ()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
def test_an_offset_is_taken_off_and_told(head, dtype):
    raised = np.maximum(head.voxels.astype(np.int32), -1024) + 1024
    found, warnings = plausibility.check(head.with_voxels(raised.astype(dtype)), PATH)
    np.testing.assert_array_equal(found.voxels, np.maximum(head.voxels, -1024))
    assert warnings == ("stored with 1024 added to HU, which was taken off",)


def padded(voxels, value):
    voxels = voxels.copy()
    voxels[:, :60] = voxels[:, -60:] = value
    return voxels


def one_below(voxels):
    voxels = voxels.copy()
    voxels[3, 4, 5] = -1
    return voxels


def noisy(voxels):
    return voxels + np.random.default_rng(0).normal(0, 9, voxels.shape)


def brain_alone(voxels, beside):
    return np.where((voxels > 0) & (voxels < 90), voxels, beside)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
@pytest.mark.parametrize(
    "raised",
    [
        lambda v: padded(v + 1024, -2000),
        lambda v: padded(v + 1024, -1000),
        lambda v: padded(v + 1024, -3024),
        lambda v: one_below(v + 1024),
        lambda v: np.maximum(v, -1000) + 1024,
        lambda v: brain_alone(v, 0) + 1024,
        lambda v: np.where((v > 0) & (v < 90), v + 1024, 0),
        lambda v: np.clip(v, -20, 100) + 1024,
        lambda v: (v + 1024.25).astype(np.float32),
    ],
)
def test_an_offset_is_taken_off_whatever_pads_the_scan(path, raised):
    """One voxel below 0, or padding, does not make HU of what was never rescaled."""
    scan = volume.read(path)
    stored = raised(scan.voxels.astype(np.int32))
    found, warnings = plausibility.check(scan.with_voxels(stored), PATH)
    np.testing.assert_array_equal(found.voxels, stored - 1024)
    assert "stored with 1024 added to HU, which was taken off" in warnings


def test_padding_far_below_air_is_nothing_special(head):
    padded = head.voxels.astype(np.int16)
    padded[:, :60], padded[:, -60:] = -2000, -3024
    assert plausibility.check(head.with_voxels(padded), PATH)[1] == ()


def test_a_head_without_skull_is_told(head):
    """0 outside the brain, as skull stripping leaves it."""
    brain = np.where((head.voxels > 0) & (head.voxels < 90), head.voxels, 0)
    _, (warning,) = plausibility.check(head.with_voxels(brain.astype(np.int16)), PATH)
    assert "no air around the head, and 0 instead: is the skull removed?" in warning


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: np.full_like(v, -1000), "every voxel is -1000, expected a head CT in HU"),
        (
            lambda v: (np.clip((v + 20.0) / 120, 0, 1) * 255).astype(np.uint8),
            "whole numbers from 0 to 255, expected HU",
        ),
        (
            lambda v: np.round(np.clip((v + 20.0) / 120, 0, 1) * 255).astype(np.float32),
            "this seems to be a picture of 8 bits",
        ),
        (
            lambda v: np.where(v < -500, -1000, 2000 + v).astype(np.int16),
            "only 0.00 % of it have the density of tissue",
        ),
    ],
)
def test_what_is_not_in_hu_is_refused(head, change, reason):
    with pytest.raises(InputError, match=reason):
        plausibility.check(head.with_voxels(change(head.voxels.astype(np.int16))), PATH)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_a_window_whose_lowest_value_was_called_0_is_told(path):
    """Grey levels of -20 to 100 HU, counted from 0 on: blood's 65 HU are 85, brain's 30 are 50."""
    scan = volume.read(path)
    shown = np.clip(scan.voxels, -20, 100)
    assert not any(
        "is it in HU?" in w for w in plausibility.check(scan.with_voxels(shown), PATH)[1]
    )
    warnings = plausibility.check(scan.with_voxels(shown + 20), PATH)[1]
    assert any("where brain is 20 to 45; is it in HU?" in warning for warning in warnings)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v * 10, "most of what could be tissue lies near|have the density of tissue"),
        (lambda v: v * 2, "lie below -1200, where air is -1000|air lies near -2000"),
        (lambda v: -v, "most of what could be tissue lies near -"),
        (lambda v: -np.clip(v, -20, 100), "most of what could be tissue lies near -"),
        (lambda v: (v - v.min()) / np.ptp(v), "values from 0 to (1|0.9[0-9]*), expected HU"),
        (lambda v: 0.2 * (v / 1000 + 1), "values from 0 to 0.57"),  # attenuation per cm
        (lambda v: 20.0 * (v / 1000 + 1), "tissue lies within 2 of 2"),  # per m
        (lambda v: (v - v.mean()) / v.std(), "values from .* expected HU"),  # z-scores
        (lambda v: (v - 35) / 15.0, "lies near|within 2 of"),  # of the brain alone
        (lambda v: v + 1000, "as if about 1000 had been added to HU; expected HU, or HU . 1024"),
        (lambda v: padded(v + 1000, -2000), "as if about 1000 had been added"),
        (lambda v: v + 500, "expected a head CT in HU"),
        (lambda v: v - 100, "most of what could be tissue lies near -5"),
        (lambda v: (v + 1024) * 0.5, "values gather near .*, and none are air's"),
        (lambda v: v.astype(np.int16).view(np.uint16), "% of it lie above 5000"),
        (lambda v: np.clip(noisy(v) + 1024, -20, 100), "have the highest value, as if tissue"),
    ],
)
def test_values_of_another_scale_are_refused(path, change, reason):
    scan = volume.read(path)
    with pytest.raises(InputError, match=f"{PATH}: .*({reason})"):
        plausibility.check(scan.with_voxels(change(scan.voxels.astype(np.int32))), PATH)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
@pytest.mark.parametrize(
    "change",
    [
        lambda v: np.clip(v, -20, 100),
        lambda v: np.clip(v, 0, 80),
        lambda v: brain_alone(v, -20),
        lambda v: brain_alone(v, -1000),
        lambda v: v + np.random.default_rng(0).normal(0, 20, v.shape),
        lambda v: np.clip(v, -1000, 1000).astype(np.float32),
        lambda v: np.where(v > 300, 3071, v),
    ],
)
def test_windows_noise_and_backgrounds_of_one_value_are_let_through(path, change):
    scan = volume.read(path)
    given = scan.with_voxels(change(scan.voxels.astype(np.int32)))
    found, warnings = plausibility.check(given, PATH)
    assert found is given
    assert all(warning.startswith("no air around the head") for warning in warnings)


def test_unusual_tissue_is_told(head):
    """Multiplied by 0.4, in a window that hides the air."""
    found = np.clip(head.voxels * 0.4, -20, 100)
    _, warnings = plausibility.check(head.with_voxels(found), PATH)
    (warning,) = [w for w in warnings if "tissue" in w]
    assert warning.startswith("most tissue lies near 12 HU, where brain is 20 to 45")


def test_bone_that_has_wrapped_around_is_told(head):
    """As where 12 bits without a sign are called signed: 1,024 HU becomes -3,072."""
    wrapped = np.where(head.voxels > 1023, head.voxels - 4096, head.voxels)
    _, warnings = plausibility.check(head.with_voxels(wrapped), PATH)
    assert len(warnings) == 1
    assert "values below -1200 lie all along bone" in warnings[0]
    padded = head.voxels.copy()  # padding that cuts through the skull is no such thing
    padded[:, :, : padded.shape[2] // 4] = -2000
    assert plausibility.check(head.with_voxels(padded), PATH)[1] == ()


def test_a_small_field_of_view_is_told():
    rng = np.random.default_rng(0)
    voxels = rng.integers(-900, 100, (10, 40, 40)).astype(np.int16)
    voxels[5:] = rng.integers(20, 40, (5, 40, 40))
    _, (warning,) = plausibility.check(Volume(voxels, (5.0, 1.0, 1.0)), PATH)
    assert warning == "a field of view of 50x40x40 mm, less than a head"


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3])
def test_sizes_in_another_unit_are_refused(head, factor):
    odd = Volume(head.voxels, tuple(factor * mm for mm in head.spacing_mm))
    with pytest.raises(InputError, match="expected a head in millimetres, are the sizes in anothe"):
        plausibility.check(odd, PATH)


def test_a_head_of_metres_is_told(head):
    large = Volume(head.voxels, tuple(3 * mm for mm in head.spacing_mm))
    _, (warning,) = plausibility.check(large, PATH)
    assert warning.endswith("are the voxel sizes right?")


def test_voxels_of_a_millimetre_are_nothing_special():
    voxels = np.full((160, 200, 180), -1000, np.int16)
    voxels[20:140, 20:180, 20:160] = 30
    voxels[20:140, 20:25, 20:160] = 900
    voxels += np.random.default_rng(0).integers(-3, 4, voxels.shape, np.int16)
    assert plausibility.check(Volume(voxels, (1.0, 1.0, 1.0)), PATH)[1] == ()
