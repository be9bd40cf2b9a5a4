"""The device engine against the host's, sample by sample, and what it has to itself."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from training.batches.augment_device import augment_batch, smooth
from training.batches.augmentation import MSD2018, NNUNETV2, Warp, draw_warp

# odd sizes: at a lower resolution no voxel lies halfway between two, where the engines may differ
PATCHES = [((5, 25, 27), True), ((15, 17, 13), False), ((1, 25, 27), True)]
ALL = {f.name: 1 for f in dataclasses.fields(NNUNETV2) if f.name.endswith("_probability")}
# all but the fields that each engine fills itself
EVERYTHING = dataclasses.replace(
    NNUNETV2,
    **ALL | {"mirror_probability": 0.5, "elastic_probability": 0, "noise_probability": 0},
)


def rng(seed):
    return np.random.default_rng(seed)


def augment(*arguments, **more):
    """The host engine's, which needs batchgenerators; what needs a GPU does without."""
    from training.batches import augment_host

    return augment_host.augment(*arguments, **more)


def make_batch(patch, config, *, in_plane, samples=4, seed=0):
    """Regions as large as the furthest reaching warp reads, of two channels and two label maps."""
    rngs = [rng([seed, index]) for index in range(samples)]
    warps = [draw_warp(r, config, patch, in_plane=in_plane) for r in rngs]
    size = np.max([patch if warp is None else warp.reach(patch) for warp in warps], 0)
    source = rng(seed)
    data = source.normal(size=(samples, 2, *size)).astype(np.float32)
    data = gaussian_filter(data, (0, 0, 1, 1, 1))
    labels = np.digitize(data, [-0.3, 0, 0.2]).astype(np.int8) - 1
    return data, labels, warps, rngs


def on_device(data, labels, warps, patch, config, rngs, *, in_plane, device="cpu"):
    images, moved = augment_batch(
        torch.from_numpy(data).to(device),
        torch.from_numpy(labels).to(device),
        warps,
        patch,
        config,
        rngs,
        classes=3,
        in_plane=in_plane,
    )
    assert images.device.type == device
    return images.cpu().numpy(), moved.cpu().numpy()


def cut(region, size):
    """The centred part of ``(..., Z, Y, X)``."""
    starts = [(n - s) // 2 for n, s in zip(region.shape[-3:], size, strict=True)]
    return region[(..., *(slice(a, a + s) for a, s in zip(starts, size, strict=True)))]


@pytest.mark.parametrize(("patch", "in_plane"), PATCHES)
def test_both_engines_do_the_same_for_the_same_draws(patch, in_plane):
    for seed in range(3):
        data, labels, warps, rngs = make_batch(patch, EVERYTHING, in_plane=in_plane, seed=seed)
        again = make_batch(patch, EVERYTHING, in_plane=in_plane, seed=seed)[3]
        images, moved = on_device(data, labels, warps, patch, EVERYTHING, rngs, in_plane=in_plane)
        for index, warp in enumerate(warps):
            size = warp.reach(patch)
            region, maps = cut(data[index], size), cut(labels[index], size)
            image, found = augment(
                region, maps, warp, patch, EVERYTHING, again[index], in_plane=in_plane
            )
            np.testing.assert_allclose(images[index], image, atol=2e-4)
            np.testing.assert_array_equal(moved[index], found)
            assert len(np.unique(found)) == 4
            assert rngs[index].random() == again[index].random()  # and have drawn as much


def test_without_warps_the_host_engine_is_met_within_rounding():
    """Nothing is interpolated then: labels and unchanged channels stay bit for bit."""
    config = dataclasses.replace(EVERYTHING, rotation_probability=0, scaling_probability=0)
    patch = (7, 9, 13)
    data, labels, warps, rngs = make_batch(patch, config, in_plane=False)
    again = make_batch(patch, config, in_plane=False)[3]
    assert warps == [None] * 4
    images, moved = on_device(data, labels, warps, patch, config, rngs, in_plane=False)
    for index in range(4):
        image, found = augment(data[index], labels[index], None, patch, config, again[index])
        np.testing.assert_allclose(images[index], image, atol=1e-4)
        np.testing.assert_array_equal(moved[index], found)


@pytest.mark.parametrize(("patch", "in_plane"), PATCHES)
def test_a_sample_does_not_depend_on_its_batch(patch, in_plane):
    """Half of the samples warped; alone, a region is as small as its own warp lets it be."""
    config = dataclasses.replace(
        EVERYTHING, rotation_probability=0.5, scaling_probability=0, noise_probability=1
    )
    data, labels, warps, rngs = make_batch(patch, config, in_plane=in_plane, samples=8)
    again = make_batch(patch, config, in_plane=in_plane, samples=8)[3]
    assert 0 < sum(warp is None for warp in warps) < 8
    images, moved = on_device(data, labels, warps, patch, config, rngs, in_plane=in_plane)
    for index, warp in enumerate(warps):
        size = patch if warp is None else warp.reach(patch)
        one = slice(index, index + 1)
        image, found = on_device(
            cut(data[one], size), cut(labels[one], size), [warp], patch, config, [again[index]],
            in_plane=in_plane,
        )  # fmt: skip
        np.testing.assert_allclose(images[index], image[0], atol=2e-4)
        np.testing.assert_array_equal(moved[index], found[0])


def test_two_runs_are_alike_bit_for_bit():
    config = dataclasses.replace(EVERYTHING, elastic_probability=1, noise_probability=1)
    patch = (15, 17, 13)
    runs = []
    for _ in range(2):
        data, labels, warps, rngs = make_batch(patch, config, in_plane=False)
        runs.append(on_device(data, labels, warps, patch, config, rngs, in_plane=False))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_the_input_stays():
    data, labels, warps, rngs = make_batch((15, 17, 13), EVERYTHING, in_plane=False)
    before = data.copy(), labels.copy()
    on_device(data, labels, warps, (15, 17, 13), EVERYTHING, rngs, in_plane=False)
    np.testing.assert_array_equal(data, before[0])
    np.testing.assert_array_equal(labels, before[1])


@pytest.mark.parametrize("shape", [(30, 41), (5, 17, 60)])
def test_smoothing_is_scipys(shape):
    field = rng(1).uniform(-1, 1, shape)
    found = smooth(torch.from_numpy(field), 9.3)
    np.testing.assert_allclose(found, gaussian_filter(field, 9.3, mode="constant"), atol=1e-12)


@pytest.mark.parametrize(("patch", "in_plane"), PATCHES[:2])
def test_elastic_displacements_are_as_long_as_the_hosts(patch, in_plane):
    """Seen in images whose intensity is a voxel's place: what comes out is where it looked."""
    angles, alpha = ((0.0,), 150.0) if in_plane else ((0.0,) * 3, 900.0)
    warp, plain = Warp((alpha, 9.0), angles, 1.6), Warp(None, angles, 1.6)
    size = warp.reach(patch)
    places = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij")).astype(np.float32)
    labels = np.zeros((1, *size), np.int8)
    config = dataclasses.replace(MSD2018, gamma_probability=0, mirror_probability=0, image_order=1)
    still, _ = augment(places, labels, plain, patch, config, rng(0))
    lengths = {"host": [], "device": []}
    for seed in range(40):
        host, _ = augment(places, labels, warp, patch, config, rng(seed))
        device, _ = on_device(
            places[None], labels[None], [warp], patch, config, [rng(seed)], in_plane=in_plane
        )
        for name, image in (("host", host), ("device", device[0])):
            lengths[name].append(cut(image - still, (1, 3, 3)))
    host, device = (np.array(lengths[name]) for name in ("host", "device"))
    for axis in range(3):
        if in_plane and axis == 0:
            assert np.abs(device[:, axis]).max() < 1e-5
            continue
        assert abs(device[:, axis].mean()) < 0.6 * host[:, axis].std()
        assert 0.7 < device[:, axis].std() / host[:, axis].std() < 1.4
    # axes are drawn apart
    assert abs(np.corrcoef(device[:, 1].ravel(), device[:, 2].ravel())[0, 1]) < 0.5


@pytest.mark.gpu
@pytest.mark.parametrize(("patch", "in_plane"), PATCHES)
def test_cuda_does_what_the_cpu_does(patch, in_plane):
    data, labels, warps, rngs = make_batch(patch, EVERYTHING, in_plane=in_plane)
    again = make_batch(patch, EVERYTHING, in_plane=in_plane)[3]
    images, moved = on_device(data, labels, warps, patch, EVERYTHING, rngs, in_plane=in_plane)
    faster, found = on_device(
        data, labels, warps, patch, EVERYTHING, again, in_plane=in_plane, device="cuda"
    )
    np.testing.assert_allclose(faster, images, atol=2e-4)
    assert np.mean(found != moved) < 1e-3


@pytest.mark.gpu
def test_cuda_is_never_waited_for():
    config = dataclasses.replace(EVERYTHING, elastic_probability=1, noise_probability=1)
    data, labels, warps, rngs = make_batch((15, 17, 13), config, in_plane=False)
    tensors = torch.from_numpy(data).cuda(), torch.from_numpy(labels).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment_batch(*tensors, warps, (15, 17, 13), config, rngs, classes=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
