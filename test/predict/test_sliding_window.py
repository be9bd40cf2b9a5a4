import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ichseg.engine.engine import in_batches
from ichseg.predict import sliding_window
from ichseg.predict.sliding_window import (
    average,
    cover,
    mirrorings,
    pad,
    predict_tiled,
    sum_tiles,
    tile_starts,
)


def tiled(network, data, tile, **options):
    """``predict_tiled`` of a network that is a function of batches."""
    return predict_tiled(in_batches(network, 3), data, tile, **options)


def two_classes(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x, 1 - x), 1)


def test_tile_starts_by_hand():
    assert tile_starts(110, 64, 0.5) == [0, 23, 46]
    assert tile_starts(64, 64) == [0]
    assert tile_starts(3, 1) == [0, 1, 2]
    assert tile_starts(28, 16) == [0, 6, 12]
    assert tile_starts(512, 320) == [0, 96, 192]


@given(st.integers(1, 60), st.integers(0, 200))
@settings(deadline=None)
def test_tiles_cover_every_voxel_and_overlap_by_about_half(tile, extra):
    starts = tile_starts(tile + extra, tile)
    assert starts[0] == 0
    assert starts[-1] == extra
    covered = np.zeros(tile + extra, bool)
    for start in starts:
        covered[start : start + tile] = True
    assert covered.all()
    assert all(b - a <= tile / 2 + 1 for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_padding_is_numpys(kind):
    """Thinner than a tile by an odd number, by an even one, and not at all; two channels."""
    data = np.random.default_rng(0).normal(size=(2, 1, 5, 3)).astype(np.float32)
    tiles = cover(data.shape[1:], (4, 3, 7))
    widths = ((0, 0), (1, 2), (0, 0), (2, 2))
    for padding, mode in (("zero", "constant"), ("nearest", "edge")):
        found = pad(kind(data), tiles, padding)
        np.testing.assert_array_equal(np.asarray(found), np.pad(data, widths, mode))


def test_too_small_an_image_is_refused():
    with pytest.raises(ValueError, match="image 5, tile 8"):
        tile_starts(5, 8)
    with pytest.raises(ValueError, match="step fraction 0"):
        tile_starts(9, 8, 0)


def test_importance_is_the_reference_gaussian():
    tile = (16, 24, 20)
    delta = np.zeros(tile)
    delta[8, 12, 10] = 1
    reference = ndimage.gaussian_filter(delta, [t / 8 for t in tile], mode="constant")
    reference /= reference.max()
    weights = [sliding_window.axis_importance(t) for t in tile]
    ours = np.einsum("i,j,k->ijk", *weights)
    assert ours.min() > 0
    np.testing.assert_allclose(ours[reference > 0], reference[reference > 0], rtol=1e-4)


@given(st.tuples(*[st.integers(1, 20)] * 3), st.integers(0, 1))
@settings(max_examples=40, deadline=None)
def test_constant_logits_stay_constant_up_to_the_corners(shape, mirrored):
    scores = tiled(
        lambda x: torch.full_like(x, 3.5),
        torch.zeros(1, *shape),
        (4, 8, 6),
        mirror_axes=(0, 1, 2) if mirrored else (),
    )
    assert scores.shape == (1, *shape)
    np.testing.assert_allclose(scores.numpy(), 3.5, rtol=1e-5)


def test_the_identity_gives_the_image_back_mirrored_or_not():
    data = torch.randn(1, 9, 17, 13, generator=torch.Generator().manual_seed(0))
    for axes in ((), (2,), (0, 1, 2)):
        scores = tiled(two_classes, data, (4, 8, 8), mirror_axes=axes)
        np.testing.assert_allclose(scores[0], data[0], atol=1e-5)
        np.testing.assert_allclose(scores[1], 1 - data[0], atol=1e-5)


def test_a_small_volume_lies_in_the_middle_of_its_tile():
    seen = []
    tiled(lambda x: seen.append(x) or x, torch.ones(1, 1, 8, 5), (4, 8, 8))
    assert seen[0].sum((0, 1, 3, 4)).tolist() == [0, 40, 0, 0]
    assert seen[0].sum((0, 1, 2, 3)).tolist() == [0, 8, 8, 8, 8, 8, 0, 0]


def test_mirroring_averages_over_all_subsets_of_the_axes():
    """A network that answers with the column index is symmetric after averaging over x flips."""

    def column(x: torch.Tensor) -> torch.Tensor:
        return torch.arange(x.shape[-1], dtype=torch.float32).expand_as(x)

    data = torch.zeros(1, 4, 8, 8)
    plain = tiled(column, data, (4, 8, 8))
    assert plain[0, 0, 0].tolist() == pytest.approx(list(range(8)))
    mirrored = tiled(column, data, (4, 8, 8), mirror_axes=(2,))
    assert mirrored[0, 0, 0].tolist() == pytest.approx([3.5] * 8)
    assert len(sliding_window.mirrorings((0, 1, 2))) == 8
    assert len(set(sliding_window.mirrorings((0, 1, 2)))) == 8


def test_a_central_voxel_is_predicted_64_times():
    """Paper, section 2.4: "up to 64 predictions": 8 overlapping tiles x 8 mirrorings."""
    count = torch.zeros(8, 8, 8)
    data = torch.arange(512.0).reshape(1, 8, 8, 8)

    def counting(x: torch.Tensor) -> torch.Tensor:
        count.view(-1).index_add_(0, x.long().flatten(), torch.ones(x.numel()))
        return x

    tiled(counting, data, (4, 4, 4), mirror_axes=(0, 1, 2))
    assert count[3, 3, 3] == 64
    assert count[0, 0, 0] == 8
    assert count.max() == 64


def test_arrays_and_tensors_are_predicted_alike():
    data = np.random.default_rng(3).normal(size=(2, 3, 17, 13)).astype(np.float32)
    original = data.copy()

    def running(x):
        return x.cumsum(-1) * 0.1

    found = tiled(running, data, (4, 8, 8), mirror_axes=(0, 2))
    expected = tiled(running, torch.from_numpy(data), (4, 8, 8), mirror_axes=(0, 2))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    np.testing.assert_array_equal(data, original)


def test_networks_are_averaged_by_adding_up():
    data = np.random.default_rng(4).normal(size=(1, 9, 17, 13)).astype(np.float32)
    tiles, mirrors = cover(data.shape[1:], (4, 8, 8)), mirrorings((1, 2))
    total = sum(
        sum_tiles(
            in_batches(lambda x, f=factor: x * f, 3), pad(data, tiles), tiles, mirrors=mirrors
        )
        for factor in (1, 2, 6)
    )
    np.testing.assert_allclose(average(total, tiles, 3 * len(mirrors)), 3 * data, atol=1e-5)


def test_skipped_tiles_are_not_predicted_and_are_background():
    """Two tiles of eight voxels along x, from 0 and 4 on; the second is skipped."""
    data = np.arange(12, dtype=np.float32).reshape(1, 1, 1, 12)
    tiles = dataclasses.replace(cover((1, 1, 12), (1, 1, 8)), skipped=frozenset({(0, 0, 4)}))
    seen = []
    total = sum_tiles(
        in_batches(lambda x: seen.append(x[0, 0, 0, 0].tolist()) or np.concatenate((x, x), 1), 4),
        data, tiles, mirrors=[()],
    )  # fmt: skip
    assert seen == [list(range(8))]
    scores = average(total, tiles, 1, [5.0, -5.0])
    np.testing.assert_array_equal(scores[:, 0, 0, 4:], [[5.0] * 8, [-5.0] * 8])
    none = dataclasses.replace(tiles, skipped=frozenset({(0, 0, 0), (0, 0, 4)}))
    with pytest.raises(ValueError, match="every tile is skipped"):
        sum_tiles(in_batches(lambda x: x, 1), data, none, mirrors=[()])


def test_the_total_is_the_number_of_tiles_predicted():
    calls = []
    tiled(lambda x: calls.append(len(x)) or x, torch.zeros(1, 9, 30, 3), (4, 8, 8))
    assert sum(calls) == sliding_window.cover((9, 30, 3), (4, 8, 8)).total == 4 * 7


def test_the_batch_size_changes_nothing():
    """A network that mixes the voxels of a tile, but not tiles with each other."""
    data = torch.randn(1, 9, 17, 13, generator=torch.Generator().manual_seed(1))

    def ranked(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).cumsum(1).reshape(x.shape)

    masks = [
        predict_tiled(in_batches(ranked, size), data, (4, 8, 8), mirror_axes=(0, 2))
        for size in (1, 3, 1000)
    ]
    torch.testing.assert_close(masks[0], masks[1])
    torch.testing.assert_close(masks[0], masks[2])
