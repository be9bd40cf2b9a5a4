import dataclasses

import numpy as np
import pytest
from conftest import PLANS
from helpers.batches import spec_of
from helpers.workspaces import BUSY, make_workspace

from ichseg.errors import DatasetError, TrainingError
from training.batches.augmentation import NO_AUGMENTATION
from training.batches.reading import centred, make_patches, overlap, read_region, read_regions
from training.batches.sampling import (
    BatchKey,
    draw_batch,
    draw_lower,
    is_oversampled,
    merge_samples,
)
from training.store.chunks import write_case

FULL_JITTER = {"on_foreground": True, "jitter": 1.0}
KEYS = [BatchKey(0, 0), BatchKey(0, 1), BatchKey(0, 0, validation=True), BatchKey(1, 0)]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    workspace = make_workspace(tmp_path_factory.mktemp("sampling"))
    return spec_of(workspace / "preprocessed" / "3d_fullres")


def raw(patches):
    return patches.data.tobytes() + patches.labels.tobytes()


def test_the_last_third_of_a_batch_is_oversampled():
    """Of 2 the second, of 3 the last, of 12 the last four."""
    for batch, chosen in ((2, [1]), (3, [2]), (12, [8, 9, 10, 11])):
        assert [i for i in range(batch) if is_oversampled(None, i, batch, 0.33)] == chosen


def test_of_batches_of_one_a_third_is_oversampled():
    """Drawn, as there is no last third of one: 1000 of 3000, deviation 26."""
    rng = np.random.default_rng(0)
    assert sum(is_oversampled(rng, 0, 1, 1 / 3) for _ in range(3000)) == pytest.approx(1000, abs=99)
    assert not any(is_oversampled(rng, 0, 1, 0.0) for _ in range(99))
    assert all(is_oversampled(rng, 0, 1, 1.0) for _ in range(99))


def test_a_batch_of_one_depends_on_its_numbers_only(spec):
    own = dataclasses.replace(spec, batch=1, foreground_fraction=0.5)
    first = [raw(make_patches(own, key)) for key in KEYS]
    assert [raw(make_patches(own, key)) for key in reversed(KEYS)] == first[::-1]
    always = dataclasses.replace(own, foreground_fraction=1.0)
    assert all((make_patches(always, BatchKey(0, n)).labels == 1).any() for n in range(10))


def test_other_patches_lie_anywhere_inside():
    rng = np.random.default_rng(0)
    lowers = {draw_lower(rng, (5, 9, 16), {}, (4, 8, 16), on_foreground=False) for _ in range(100)}
    assert lowers == {(z, y, 0) for z in (0, 1) for y in (0, 1)}


def test_a_case_smaller_than_the_patch_is_centred():
    rng = np.random.default_rng(0)
    foreground = {1: np.array([[0, 1, 3]])}
    for on_foreground in (False, True):
        lower = draw_lower(rng, (3, 9, 8), foreground, (8, 16, 8), on_foreground=on_foreground)
        assert lower == (-3, -4, 0)  # along z 3 voxels of padding before, 2 after


def test_oversampled_patches_are_centred_on_foreground_and_stay_inside():
    rng = np.random.default_rng(1)
    one = {1: np.array([[10, 10, 10]])}
    assert draw_lower(rng, (20, 20, 20), one, (4, 6, 8), on_foreground=True) == (8, 7, 6)
    corner = {1: np.array([[0, 19, 1]])}
    assert draw_lower(rng, (20, 20, 20), corner, (4, 6, 8), on_foreground=True) == (0, 14, 0)


def test_classes_are_drawn_alike_however_large():
    rng = np.random.default_rng(2)
    foreground = {
        1: np.full((1000, 3), 5),
        2: np.full((1, 3), 15),
        3: np.empty((0, 3), int),
        -1: np.full((9, 3), 9),
    }
    lowers = [
        draw_lower(rng, (20,) * 3, foreground, (2,) * 3, on_foreground=True) for _ in range(400)
    ]
    assert set(lowers) == {(4, 4, 4), (14, 14, 14)}
    assert np.mean([lower == (4, 4, 4) for lower in lowers]) == pytest.approx(0.5, abs=0.08)


def test_a_2d_patch_draws_its_slice_first():
    """Slice 2 has 999 voxels of the class, slice 7 one: either is as likely."""
    rng = np.random.default_rng(3)
    voxels = np.array([[2, 5, 5]] * 999 + [[7, 5, 5]])
    lowers = [
        draw_lower(rng, (9, 20, 20), {1: voxels}, (1, 4, 4), on_foreground=True) for _ in range(400)
    ]
    assert set(lowers) == {(2, 3, 3), (7, 3, 3)}
    assert np.mean([lower[0] == 2 for lower in lowers]) == pytest.approx(0.5, abs=0.08)


def test_with_full_jitter_a_chosen_voxel_lies_anywhere_in_its_patch():
    """Of a patch of 5 x 4 x 1 each of the 20 places, alike: 200 of 4000 draws, deviation 14."""
    rng = np.random.default_rng(4)
    one = {1: np.array([[50, 60, 70]])}
    places = [
        tuple(np.array([50, 60, 70]) - draw_lower(rng, (99,) * 3, one, (5, 4, 1), **FULL_JITTER))
        for _ in range(4000)
    ]
    found, counts = np.unique(places, axis=0, return_counts=True)
    assert found.tolist() == [[z, y, 0] for z in range(5) for y in range(4)]
    assert counts.min() > 200 - 5 * 14
    assert counts.max() < 200 + 5 * 14


def test_half_jitter_goes_half_of_the_way_to_the_border():
    """9 voxels have 4 on either side of the centre, 8 have 4 before and 3 after it; 2 have 1, 0."""
    rng = np.random.default_rng(5)
    one = {1: np.array([[50, 60, 70]])}
    lowers = [
        draw_lower(rng, (99,) * 3, one, (9, 8, 2), on_foreground=True, jitter=0.5)
        for _ in range(300)
    ]
    z, y, x = (set(axis) for axis in zip(*lowers, strict=True))
    assert {50 - low for low in z} == {2, 3, 4, 5, 6}
    assert {60 - low for low in y} == {2, 3, 4, 5}
    assert {70 - low for low in x} == {1}


def test_jitter_never_loses_the_voxel_nor_the_case():
    rng = np.random.default_rng(6)
    for _ in range(2000):
        shape, patch = rng.integers(1, 12, 3), rng.integers(1, 12, 3)
        voxel = rng.integers(shape)
        jitter = rng.random()
        lower = draw_lower(
            rng, tuple(shape), {1: voxel[None]}, tuple(patch), on_foreground=True, jitter=jitter
        )
        for low, v, p, n in zip(lower, voxel, patch, shape, strict=True):
            assert low <= v < low + p
            assert (0 <= low <= n - p) if n >= p else low == (n - p) // 2


def test_without_jitter_no_random_number_is_spent_on_it():
    """Only the class and the voxel are drawn: batches are as they were before there was jitter."""
    first, second = np.random.default_rng(7), np.random.default_rng(7)
    draw_lower(first, (20,) * 3, {1: np.full((6, 3), 9)}, (4, 6, 8), on_foreground=True, jitter=0)
    second.integers(1)  # the class
    second.integers(6)  # the voxel
    assert first.random() == second.random()


def test_a_larger_region_keeps_the_centre():
    assert centred((3, 5, 7), (4, 16, 16), (4, 20, 22)) == (3, 3, 4)


def test_overlap_by_hand():
    """Along z one voxel before the case, along y one beyond it, along x all of it."""
    source, sink = overlap((2, 3, 4), (-1, 2, 0), (2, 2, 4))
    assert source == (slice(0, 1), slice(2, 3), slice(0, 4))
    assert sink == (slice(1, 2), slice(0, 1), slice(0, 4))


def test_outside_the_case_is_padding():
    data = np.arange(1, 9, dtype=np.float32).reshape(1, 2, 2, 2)
    region = read_region(data, (-1, 1, 0), (2, 2, 3))
    assert region.dtype == np.float32
    np.testing.assert_array_equal(region[0], [[[0, 0, 0], [0, 0, 0]], [[3, 4, 0], [0, 0, 0]]])
    target = np.ones((2, 2, 2), np.int8)
    expected = [[[-1, -1, -1], [-1, -1, -1]], [[1, 1, -1], [-1, -1, -1]]]
    np.testing.assert_array_equal(read_region(target, (-1, 1, 0), (2, 2, 3), outside=-1), expected)
    for far in ((5, 0, 0), (-9, 0, 0), (0, 2, 0)):
        assert not read_region(data, far, (2, 2, 2)).any()
        assert (read_region(target, far, (2, 2, 2), outside=-1) == -1).all()


def test_patches_have_the_right_shape_and_labels(spec):
    made = make_patches(spec, KEYS[0])
    assert made.data.shape == (2, 1, 4, 16, 16)
    assert made.data.dtype == np.float32
    assert made.labels.shape == (2, 1, 4, 16, 16)
    for index in range(10):
        made = make_patches(spec, BatchKey(0, index))
        assert set(np.unique(made.labels)) <= {-1, 0, 1}
        assert (made.labels[1] == 1).any()  # the oversampled one
    flat = dataclasses.replace(spec, patch=(16, 16), in_plane=False)
    assert make_patches(flat, KEYS[0]).data.shape == (2, 1, 1, 16, 16)


def test_a_batch_depends_on_its_numbers_only(spec):
    first = [raw(make_patches(spec, key)) for key in KEYS]
    assert [raw(make_patches(spec, key)) for key in reversed(KEYS)] == first[::-1]
    assert len(set(first)) == len(KEYS)
    for changed in (dataclasses.replace(spec, seed=4), dataclasses.replace(spec, fold=2)):
        assert raw(make_patches(changed, KEYS[0])) != first[0]


def test_validation_batches_are_not_augmented(spec):
    changed = dataclasses.replace(spec, augmentation=dataclasses.replace(BUSY, gamma=(2.0, 3.0)))
    assert raw(make_patches(changed, KEYS[2])) == raw(make_patches(spec, KEYS[2]))
    assert raw(make_patches(changed, KEYS[0])) != raw(make_patches(spec, KEYS[0]))


def test_validation_draws_differ_from_training_draws(spec):
    same = dataclasses.replace(spec, validation=spec.train, augmentation=NO_AUGMENTATION)
    assert raw(make_patches(same, KEYS[0])) != raw(make_patches(same, KEYS[2]))


def test_regions_hold_what_each_warp_of_the_whole_batch_reaches(spec):
    spec = dataclasses.replace(spec, batch=4)
    for number in range(5):
        draws = draw_batch(spec, BatchKey(0, number))
        reaches = [draw.warp.reach(spec.tile) for draw in draws if draw.warp is not None]
        for rank in (0, 1):
            part = dataclasses.replace(spec, share=(rank, 2))
            regions = read_regions(part, BatchKey(0, number))
            assert regions.size == tuple(np.max([spec.tile, *reaches], axis=0))
            assert regions.voxels.target.shape == (2, *regions.size)
            assert regions.names == tuple(draw.name for draw in draws[part.mine])
    validation = read_regions(spec, KEYS[2])
    assert validation.size == spec.tile
    assert validation.warps == (None,) * 4


def test_oversampled_samples_are_counted_over_all_processes(spec):
    """Half of 4 are oversampled: the first process makes none of them, the second nothing else."""
    spec = dataclasses.replace(spec, batch=4, foreground_fraction=0.5, centre_jitter=1.0)
    absent = 0
    for number in range(20):
        first, second = (
            make_patches(dataclasses.replace(spec, share=(rank, 2)), BatchKey(0, number, True))
            for rank in (0, 1)
        )
        assert all((sample == 1).any() for sample in second.labels)
        absent += sum(not (sample == 1).any() for sample in first.labels)
    assert absent > 0


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ((0, 5), "a batch of 4 over 5 processes, expected at most 4"),
        ((2, 2), "share 2 of 2 processes, expected 0 to 1"),
    ],
)
def test_refuses_an_impossible_share(spec, share, message):
    with pytest.raises(TrainingError, match=message):
        dataclasses.replace(spec, batch=4, share=share)


def test_where_voxels_are_to_be_ignored_patches_are_centred_on_others():
    rng = np.random.default_rng(4)
    annotated = np.array([[10, 10, 10], [5, 6, 7]])
    foreground = {1: np.array([[3, 3, 3]])}

    def lowers(foreground, patch, **options):
        drawn = (
            draw_lower(rng, (20,) * 3, foreground, patch, annotated=annotated, **options)
            for _ in range(50)
        )
        return set(drawn)

    assert lowers(foreground, (2,) * 3, on_foreground=False) == {(9, 9, 9), (4, 5, 6)}
    assert lowers(foreground, (2,) * 3, on_foreground=True) == {(2, 2, 2)}
    assert lowers({}, (2,) * 3, on_foreground=True) == {(9, 9, 9), (4, 5, 6)}
    assert lowers({}, (1, 2, 2), on_foreground=False) == {(10, 9, 9), (5, 5, 6)}


def test_a_region_is_drawn_and_then_any_of_its_voxels():
    """Of label 1 a hundredth is listed, of label 2 all; merged, a hundredth of each is."""
    one, two = np.full((100, 3), 1), np.full((5000, 3), 2)
    merged = merge_samples([one, two], [10_000, 5000])
    assert len(merged) == 100 + 50
    assert (merged[:, 0] == 2).sum() == 50
    whole = merge_samples([one, two], [100, 5000])
    assert len(whole) == 5100
    assert merge_samples([two], [9999]) is not two
    assert len(merge_samples([two], [9999])) == 5000


def stored(folder, target, **more):
    """A store of one case without intensities."""
    data = np.zeros((1, *target.shape), np.float32)
    write_case(folder, "a", data, target, PLANS.normalisations, **more)
    return folder


def middles(spec, count=200):
    """The voxels in the middle of the second samples, which lie on foreground."""
    half = np.array(spec.tile) // 2
    draws = [draw_batch(spec, BatchKey(0, number))[1] for number in range(count)]
    return [tuple(int(v) for v in np.array(draw.lower) + half) for draw in draws]


def test_half_of_the_patches_are_centred_on_each_of_two_regions(spec, tmp_path):
    """The core is a hundredth of the bleed, yet it is in the middle of half of the patches."""
    target = np.zeros((10, 40, 40), np.int8)
    target[2:7, 10:30, 10:30] = 1
    target[4, 18:22, 18:23] = 2
    folder = stored(tmp_path / "store", target)
    own = dataclasses.replace(
        spec, folder=folder, train=("a",), patch=(2, 4, 4), augmentation=NO_AUGMENTATION,
        regions=((1, 2), (2,)),
    )  # fmt: skip
    found = [target[place] for place in middles(own)]
    assert np.mean(np.array(found) == 2) == pytest.approx(0.505, abs=0.1)
    assert set(found) == {1, 2}
    nearly_all = dataclasses.replace(own, regions=((1, 2), (1,)))
    assert np.mean([target[place] == 2 for place in middles(nearly_all)]) < 0.05


def test_small_lesions_are_drawn_as_often_as_large_ones(spec, tmp_path):
    """One of 2000 voxels and one of 8: by voxels the small one is hardly ever drawn."""
    target = np.zeros((10, 40, 40), np.int8)
    target[2:7, 4:24, 4:24] = 1
    target[7:9, 32:34, 32:34] = 1
    folder = stored(tmp_path / "store", target)
    own = dataclasses.replace(
        spec, folder=folder, train=("a",), patch=(2, 4, 4), augmentation=NO_AUGMENTATION
    )
    for fraction, share in ((0.0, 0.004), (0.5, 0.252), (1.0, 0.5)):
        places = middles(dataclasses.replace(own, lesion_fraction=fraction))
        small = np.mean([y > 30 for _, y, _ in places])
        assert small == pytest.approx(share, abs=0.02 if not fraction else 0.1)


def test_a_store_without_lesions_says_so(spec, tmp_path):
    folder = stored(tmp_path / "store", np.ones((4, 8, 8), np.int8))
    path = folder / "a.foreground.npz"
    with np.load(path) as file:
        kept = {key: file[key] for key in file.files if key != "lesions"}
    np.savez_compressed(path, **kept)
    own = dataclasses.replace(
        spec, folder=folder, train=("a",), patch=(2, 4, 4), lesion_fraction=0.5
    )
    with pytest.raises(DatasetError, match=r"case a was stored by a version .* preprocess again"):
        middles(own)
