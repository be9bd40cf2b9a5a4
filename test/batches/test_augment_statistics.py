"""Distributions after each operation alone: one engine, the other, and nnunetv2's own.

``nnunetv2_augmentation.json`` holds what nnunetv2's transforms did to the phantom of
``augmented.py``; ``benchmarks/nnunetv2_augmentation.py`` makes it.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.augmented import INTENSITY, PATCHES, SPATIAL, measure, phantom
from scipy.stats import ks_2samp

from training.batches.augment_device import augment_batch
from training.batches.augment_host import augment
from training.batches.augmentation import MSD2018, NNUNETV2, NO_AUGMENTATION, draw_warp

ROWS = json.loads(
    (Path(__file__).parents[1] / "helpers" / "nnunetv2_augmentation.json").read_text()
)
REFERENCE = {(row["operation"], row["in_plane"]): row["quantiles"] for row in ROWS["distributions"]}
SAMPLES, SAMPLES_WARPED = 300, 120  # a warp about all axes takes longest
# nnunetv2's blur does not repeat the voxel at the edge, which moves the mean by up to 0.004
LEFT_OUT = {("blur", "mean")}


def only(operation, config, **changes):
    """The operation alone and always, linearly interpolated as nnunetv2 does."""
    off = {
        f.name: 0
        for f in dataclasses.fields(NO_AUGMENTATION)
        if f.name.endswith("_probability") and "channel" not in f.name
    }
    on = {f"{operation}_probability": 1, "image_order": 1}
    return dataclasses.replace(config, **(off | on | changes))


def sample(engine, config, *, in_plane, seed):
    """The phantom's numbers after augmentation, ``{name: as many values as samples}``."""
    patch, rows = PATCHES[in_plane], []
    warped = config.elastic_probability + config.rotation_probability + config.scaling_probability
    for index in range(SAMPLES_WARPED if warped and not in_plane else SAMPLES):
        rng = np.random.default_rng([seed, index])
        warp = draw_warp(rng, config, patch, in_plane=in_plane)
        size = patch if warp is None else warp.reach(patch)
        image, labels = phantom(size, in_plane=in_plane)
        arguments = image[None], labels[None]
        if engine == "host":
            new, moved = augment(*arguments, warp, patch, config, rng, in_plane=in_plane)
        else:
            batch = [torch.from_numpy(array)[None] for array in arguments]
            new, moved = (
                result[0].numpy()
                for result in augment_batch(
                    *batch, [warp], patch, config, [rng], classes=3, in_plane=in_plane
                )
            )
        rows.append(measure(new[0], moved[0], in_plane=in_plane))
    return {name: np.array([row[name] for row in rows]) for name in (*SPATIAL, *INTENSITY)}


@functools.cache
def sampled(engine, operation, in_plane):
    config = MSD2018 if operation == "elastic" else NNUNETV2
    seed = 1 if engine == "host" else 2
    return sample(engine, only(operation, config), in_plane=in_plane, seed=seed)


def excess(one, other):
    """Kolmogorov-Smirnov distance, as a multiple of what one in 10,000 equal pairs exceeds."""
    return ks_2samp(one, other).statistic / (2.22 * np.sqrt(1 / len(one) + 1 / len(other)))


def excess_over_nnunetv2(found, quantiles):
    """The same with 41 quantiles of 2000 samples, which may be off by a quantile."""
    distance = ks_2samp(found, quantiles).statistic
    return distance / (2.22 * np.sqrt(1 / len(found) + 1 / 2000) + 1 / 41)


@pytest.mark.parametrize(
    ("operation", "in_plane"), [*REFERENCE, ("elastic", False), ("elastic", True)]
)
def test_engines_agree(operation, in_plane):
    host, device = (sampled(engine, operation, in_plane) for engine in ("host", "device"))
    for name in (*SPATIAL, *INTENSITY):
        assert excess(host[name], device[name]) < 1, name


@pytest.mark.parametrize("engine", ["host", "device"])
@pytest.mark.parametrize(("operation", "in_plane"), REFERENCE)
def test_engines_agree_with_nnunetv2(engine, operation, in_plane):
    found = sampled(engine, operation, in_plane)
    for name, quantiles in REFERENCE[operation, in_plane].items():
        if (operation, name) not in LEFT_OUT:
            assert excess_over_nnunetv2(found[name], quantiles) < 1, name


@pytest.mark.parametrize(
    ("operation", "in_plane", "changes"),
    [
        ("rotation", False, {"rotation_degrees": 15.0}),
        ("rotation", True, {"rotation_degrees_2d": 90.0}),
        ("scaling", True, {"scaling": (0.85, 1.25)}),
        ("noise", False, {"noise_deviation": (0.0, 0.1**0.5)}),
        ("blur", False, {"blur_sigma": (0.5, 1.5)}),
        ("blur", False, {"blur_channel_probability": 1.0}),
        ("brightness", False, {"brightness": (0.9, 1.1)}),
        ("contrast", False, {"contrast": (0.5, 1.5)}),
        ("low_resolution", False, {"low_resolution": (0.25, 0.75)}),
        ("low_resolution", False, {"low_resolution_channel_probability": 1.0}),
        ("inverted_gamma", False, {"gamma": (0.5, 2.0)}),
        ("gamma", False, {"gamma": (0.85, 1.2)}),
    ],
)
def test_a_wrong_range_is_noticed(operation, in_plane, changes):
    config = only(operation, NNUNETV2, **changes)
    found = sample("host", config, in_plane=in_plane, seed=3)
    device = sampled("device", operation, in_plane)
    names = [n for n in REFERENCE[operation, in_plane] if (operation, n) not in LEFT_OUT]
    reference = REFERENCE[operation, in_plane]
    assert max(excess_over_nnunetv2(found[name], reference[name]) for name in names) > 1
    assert max(excess(found[name], device[name]) for name in names) > 1


def test_gamma_from_the_wrong_end_is_noticed():
    found, wanted = sampled("host", "gamma", False), REFERENCE["inverted_gamma", False]
    assert excess_over_nnunetv2(found["skewness"], wanted["skewness"]) > 1
