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


def test_a_small_field_of_view_is_told():
    voxels = np.random.default_rng(0).integers(-900, 100, (10, 40, 40)).astype(np.int16)
    _, (warning,) = plausibility.check(Volume(voxels, (5.0, 1.0, 1.0)), PATH)
    assert warning == "a field of view of 50x40x40 mm, less than a head"


def test_a_head_of_metres_is_told(head):
    large = Volume(head.voxels, tuple(3 * mm for mm in head.spacing_mm))
    _, (warning,) = plausibility.check(large, PATH)
    assert warning.endswith("are the voxel sizes right?")


def test_voxels_of_a_millimetre_are_nothing_special():
    voxels = np.full((160, 200, 180), -1000, np.int16)
    voxels[20:140, 20:180, 20:160] = 30
    voxels[20:140, 20:25, 20:160] = 900
    assert plausibility.check(Volume(voxels, (1.0, 1.0, 1.0)), PATH)[1] == ()
