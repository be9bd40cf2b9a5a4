"""Slices out of their order, of two scans in turn, or of more than a head are told or refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from ichseg.errors import InputError
from ichseg.scan import plausibility, slices, volume
from ichseg.scan.volume import Volume

SAMPLES = sorted((Path(__file__).parents[1] / "sample" / "input").iterdir())
PATH = Path("case.mha")


@pytest.fixture(scope="module")
def head():
    return volume.read(SAMPLES[0])


def in_order(head, numbers):
    return Volume(head.voxels[list(numbers)], head.spacing_mm, direction=head.direction)


def test_slices_stacked_by_the_names_of_their_files_are_told(head):
    """1, 10, 11 and so on, 2, 20, 21 and so on."""
    by_name = sorted(range(len(head.voxels)), key=lambda number: str(number + 1))
    (warning,) = slices.check(in_order(head, by_name), PATH)
    assert warning.startswith("2 slices of 29 are less like those beside them than like others")


def test_many_slices_out_of_order_are_refused(head):
    count = len(head.voxels)
    shuffled = np.random.default_rng(0).permutation(count)
    for numbers in ([*range(0, count, 2), *range(1, count, 2)], shuffled):
        with pytest.raises(InputError, match=r"case.mha: \d+ slices of 29 .* in their order"):
            plausibility.check(in_order(head, numbers), PATH)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_it_is_the_head_s_length_that_is_looked_along(head, axes):
    """However the volume is stored."""
    turned = np.random.default_rng(0).permutation(len(head.voxels))
    direction = np.reshape(head.direction, (3, 3))[:, axes]
    stored = Volume(
        head.voxels[turned].transpose(axes),
        tuple(head.spacing_mm[axis] for axis in axes),
        direction=tuple(direction.ravel()),
    )
    with pytest.raises(InputError, match="of one scan"):
        slices.check(stored, PATH)


def test_two_scans_in_turn_are_refused(head):
    """Of one head that has moved, or of two heads."""
    both = np.empty((2 * len(head.voxels), *head.voxels.shape[1:]), head.voxels.dtype)
    both[::2], both[1::2] = head.voxels, np.roll(head.voxels, (14, 14), (1, 2))
    z, y, x = head.spacing_mm
    with pytest.raises(InputError, match="of one scan"):
        slices.check(Volume(both, (z / 2, y, x), direction=head.direction), PATH)


def test_thin_and_noisy_slices_are_in_order(head):
    z, y, x = head.spacing_mm
    thin = ndimage.zoom(head.voxels[:, ::4, ::4].astype(np.float32), (6, 1, 1), order=1)
    thin += np.random.default_rng(0).normal(0, 40, thin.shape)
    assert slices.check(Volume(thin, (z / 6, 4 * y, 4 * x), direction=head.direction), PATH) == []


def test_a_head_without_its_skull_is_in_order(head):
    """Its lowest and highest slices are nearly empty, and so is one where the tool has failed."""
    brain = np.where((head.voxels > 0) & (head.voxels < 80), head.voxels, -1000)
    brain[[0, 3, 20, -1]] = -1000
    assert slices.check(head.with_voxels(brain), PATH) == []


def test_a_ball_is_in_order():
    """Whose slices are there twice, one on each side of its middle."""
    z, y, x = np.mgrid[-1:1:24j, -1:1:80j, -1:1:80j]
    r = np.sqrt(z**2 + y**2 + x**2) / 0.95
    hu = np.select([r < 0.82, r < 0.92, r < 1], [33, 900, -90], -1000).astype(np.float32)
    hu += np.random.default_rng(0).normal(0, 6, hu.shape)
    ball = Volume(hu, (6.0, 2.0, 2.0))
    assert slices.check(ball, PATH) == []
    shuffled = np.random.default_rng(1).permutation(24)
    with pytest.raises(InputError, match="in their order"):
        slices.check(in_order(ball, shuffled), PATH)


def test_a_slice_that_is_there_twice_is_no_disorder_but_is_told(head):
    (warning,) = slices.check(in_order(head, [*range(8), 7, 7, *range(8, 29)]), PATH)
    assert warning.startswith("2 slices of 31 show the same as the one below, voxel by voxel, such "
                              "as number 9 from below")  # fmt: skip


def test_copies_in_the_place_of_other_slices_are_told(head):
    """Ten slices of an export were the pixels of the first of them, and the mask said nothing."""
    (warning,) = slices.check(in_order(head, [*range(10), *[10] * 10, *range(20, 29)]), PATH)
    assert warning.startswith("9 slices of 29 show the same")


def test_slices_of_air_or_of_one_value_are_no_copies(head):
    voxels = head.voxels.copy()
    voxels[:5] = -1000
    voxels[-3:] = -900
    assert slices.check(Volume(voxels, head.spacing_mm, direction=head.direction), PATH) == []


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ((1, 2, 2), "tissue of up to 11.. cm2 in a slice, where a head has 200 to 300: other par"),
        ((3, 1, 1), "what could be a head and its neck is 4.. mm high; are the voxel sizes right"),
        ((1, 0.5, 0.5), "tissue of 7. cm2 in a slice at most, where a head has 200 to 300"),
    ],
)
def test_a_head_of_another_size_is_told(head, factors, words):
    spacing_mm = tuple(f * mm for f, mm in zip(factors, head.spacing_mm, strict=True))
    found = Volume(head.voxels, spacing_mm, direction=head.direction)
    warnings = slices.check(found, PATH)
    assert len(warnings) == 1
    assert re.match(words, warnings[0])


def test_two_heads_beside_each_other_are_told(head):
    both = Volume(np.concatenate([head.voxels] * 2, 2), head.spacing_mm, direction=head.direction)
    (warning,) = slices.check(both, PATH)
    assert warning.startswith("tissue of up to 574 cm2")


def test_a_window_that_hides_the_air_is_no_larger_head(head):
    for low, high in ((-20, 100), (0, 80)):
        assert slices.check(head.with_voxels(np.clip(head.voxels, low, high)), PATH) == []
