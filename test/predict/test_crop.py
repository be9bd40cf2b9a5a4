"""The box around the head, and all that follows from cutting to it."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import CONFIGURATION, PLANS, make_bundle
from helpers.heads import BOX, HEAD, SPACING_MM, head_in_air
from hypothesis import given, settings
from hypothesis import strategies as st

from ichseg.model.plans import Configuration
from ichseg.predict import prepare, presets, sliding_window
from ichseg.predict.crop import MARGIN_MM, crop_box, head_box
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.prepare import place
from ichseg.predict.restore import restore
from ichseg.scan.orientation import nonzero_box
from ichseg.scan.volume import Volume

CUT = dataclasses.replace(PLANS, crop="head")
AXES = list(itertools.permutations(range(3)))
SIGNS = list(itertools.product((1, -1), repeat=3))


def index(box):
    return tuple(slice(*bounds) for bounds in box)


def stored(canonical: np.ndarray, spacing_mm, order, signs) -> Volume:
    """A volume whose voxels, once oriented, are these."""
    direction = np.eye(3)[:, order] * np.array(signs)
    flips = [axis for axis in range(3) if signs[axis] < 0]
    return Volume(
        np.flip(canonical.transpose(order), flips),
        tuple(spacing_mm[axis] for axis in order),
        direction=tuple(direction.ravel()),
    )


def test_box_by_hand():
    """Every third voxel is looked at in-plane: 21 to 69 along y and 30 to 63 along x are head.

    The headrest is 4 mm thick and vanishes. 10 mm are added to either side, 2 slices of 5 mm.
    """
    assert head_box([head_in_air()], SPACING_MM) == BOX


def test_the_margin_is_at_least_what_is_said():
    for (start, stop), head, size, full in zip(
        BOX, HEAD, SPACING_MM, head_in_air().shape, strict=True
    ):
        spare = 2 / size if size < 3 else 0  # what lies between the voxels that are looked at
        assert start == 0 or MARGIN_MM - 2 <= size * (head.start - start) <= MARGIN_MM + spare
        assert stop == full or MARGIN_MM - 2 <= size * (stop - head.stop) <= MARGIN_MM + spare


@given(st.integers(1, 3), st.sampled_from([(0, 1), (0, 2), (1, 2)]), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_head_turned_by_quarters_has_its_box_turned(quarters, plane, seed):
    rng = np.random.default_rng(seed)
    radii, centre = rng.uniform(30, 45, 3), rng.uniform(55, 65, 3)
    grid = np.indices((61, 61, 61)) * 2.0
    distance = (((grid.T - centre) / radii) ** 2).sum(-1).T
    voxels = np.where(distance < 1, 40, -1000).astype(np.int16)
    box = head_box([voxels], (2.0, 2.0, 2.0))
    assert np.all(distance[index(box)].shape < np.array([61, 61, 61]))
    assert not (distance < 1)[index(box)].sum() < (distance < 1).sum()
    marked = np.zeros(voxels.shape, np.uint8)
    marked[index(box)] = 1
    turned = head_box([np.rot90(voxels, quarters, plane)], (2.0, 2.0, 2.0))
    assert turned == nonzero_box([np.rot90(marked, quarters, plane)])


def test_every_way_to_store_a_scan_gives_the_same_box():
    voxels = head_in_air()[:, :99, :98]  # no multiples of what is looked at
    found = {
        place([stored(voxels, SPACING_MM, order, signs)], CUT, CONFIGURATION).box
        for order in AXES
        for signs in SIGNS
    }
    assert found == {head_box([voxels], SPACING_MM)}
    assert found != {nonzero_box([voxels])}


@pytest.mark.parametrize(
    "voxels",
    [
        np.full((12, 100, 100), -1000, np.int16),
        np.full((1, 1, 1), 40, np.int16),
        np.zeros((12, 100, 100), np.int16)[:, :10, :10],
        head_in_air()[5:6, 30:40, 30:40],
    ],
    ids=["air", "a voxel", "zeros", "a corner of brain"],
)
def test_without_a_head_nothing_is_cut(voxels):
    assert head_box([voxels], SPACING_MM) is None
    assert crop_box([voxels], SPACING_MM, "head") == nonzero_box([voxels])


def test_the_headrest_alone_is_no_head():
    voxels = head_in_air()
    voxels[HEAD] = -1000
    assert head_box([voxels], SPACING_MM) is None


def test_a_head_with_a_gap_stays_whole():
    voxels = head_in_air()
    voxels[7] = -1000  # a slice is lost
    assert head_box([voxels], SPACING_MM) == BOX


def test_a_larger_table_does_not_push_the_head_out():
    voxels = head_in_air()
    voxels[:, 84:] = 100
    (_, z), (y, end), _ = head_box([voxels], SPACING_MM)
    assert (z, y, end) == (12, BOX[1][0], 100)


def test_crumbs_do_not_count():
    """A piece of 4 x 4 voxels of 3 mm in one slice, 0.7 mL, is below 2 % of the head's 64 mL."""
    voxels = head_in_air()
    voxels[4, 3:15, 3:15] = 100
    assert head_box([voxels], SPACING_MM) == BOX


def test_a_thin_slab_of_a_head_is_found():
    """Two slices of 1.5 mm are one where it is looked; beyond the volume the head goes on."""
    y, x = np.indices((100, 100)) * 2.0
    disc = np.where((y - 100) ** 2 + (x - 100) ** 2 < 80**2, 40, -1000).astype(np.int16)
    assert head_box([np.stack([disc] * 2)], (1.5, 2.0, 2.0)) == ((0, 2), (6, 95), (6, 95))


def test_padding_of_zeros_only_shifts_the_box():
    voxels = np.pad(head_in_air(), ((1, 2), (3, 4), (5, 0)))
    shifted = tuple((a + by, b + by) for (a, b), by in zip(BOX, (1, 3, 5), strict=True))
    assert crop_box([voxels], SPACING_MM, "head") == shifted


def test_tissue_of_either_channel_counts():
    first, second = head_in_air(), head_in_air()
    first[:, :, 48:] = -1000
    second[:, :, :48] = -1000
    assert head_box([first, second], SPACING_MM) == BOX
    assert head_box([second], SPACING_MM) != BOX


@given(st.sampled_from(AXES), st.sampled_from(SIGNS), st.permutations([0, 1, 2]))
@settings(max_examples=10, deadline=None)
def test_restoring_is_the_exact_inverse_and_background_outside(order, signs, transpose):
    labels = np.random.default_rng(0).integers(0, 2, (12, 100, 100)).astype(np.uint8)
    scan = stored(head_in_air(), SPACING_MM, order, signs)
    reference = stored(labels, SPACING_MM, order, signs)
    plans = dataclasses.replace(CUT, transpose=tuple(transpose))
    own = dataclasses.replace(
        CONFIGURATION, spacing_mm=place([scan], plans, CONFIGURATION).spacing_mm
    )
    case = prepare.prepare([scan], plans, own)
    assert sorted(case.data.shape[1:]) == sorted(stop - start for start, stop in BOX)
    grid = torch.from_numpy(prepare.prepare_labels(reference, case.placement, plans))
    scores = torch.stack([(grid == label).float() for label in (0, 1)])
    back = restore([(scores, case.placement)], plans, slab_voxels=5000)
    expected = np.zeros_like(labels)
    expected[index(BOX)] = labels[index(BOX)]
    np.testing.assert_array_equal(back, stored(expected, SPACING_MM, order, signs).voxels)
    assert back.flags.c_contiguous


def test_stages_of_a_cascade_share_the_box():
    scan = Volume(head_in_air(), SPACING_MM)
    coarse: Configuration = dataclasses.replace(CONFIGURATION, spacing_mm=(5.0, 2.5, 2.5))
    first, second = (place([scan], CUT, c) for c in (coarse, CONFIGURATION))
    assert first.box == second.box == BOX
    assert first.grid_shape != second.grid_shape == (11, 69, 54)


def test_tiles_that_are_skipped_are_of_air():
    voxels = head_in_air()
    scan = Volume(voxels, SPACING_MM)
    placement = place([scan], CUT, CONFIGURATION)
    assert placement.box == BOX
    tile = (4, 8, 8)  # less than the margin
    tiles = presets.skip_air(
        sliding_window.cover(placement.grid_shape, tile), [scan], placement, CUT
    )
    assert len(tiles.skipped) > 5
    cut = voxels[placement.slices]
    for corner in itertools.product(*tiles.starts):
        part = cut[tuple(slice(a, a + n) for a, n in zip(corner, tile, strict=True))]
        assert (corner in tiles.skipped) == bool((part < presets.AIR_HU).all())


def test_the_network_sees_what_a_scan_cut_by_hand_would_show_it(tmp_path):
    voxels = head_in_air()
    scan = Volume(voxels, SPACING_MM)
    make_bundle(tmp_path / "head", folds=1, plans=CUT)
    make_bundle(tmp_path / "plain", folds=1)
    found = Ensemble.load(tmp_path / "head", "torch-cpu").segment(scan, "fast")
    plain = Ensemble.load(tmp_path / "plain", "torch-cpu")
    by_hand = plain.segment(Volume(voxels[index(BOX)].copy(), SPACING_MM), "fast")
    expected = np.zeros_like(found.mask.voxels)
    expected[index(BOX)] = by_hand.mask.voxels
    assert 0.02 < by_hand.mask.voxels.mean() < 0.98
    np.testing.assert_array_equal(found.mask.voxels, expected)
    assert found.ran["tiles"] == by_hand.ran["tiles"]
    assert found.ran["tiles"] != plain.segment(scan, "fast").ran["tiles"]
