"""Cases kept in the memory of the training device."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from helpers.batches import CPU, KEYS, made, raw
from helpers.workspaces import BUSY

from ichseg.errors import TrainingError
from ichseg.model.plans import Normalisation
from training.batches import gpu_cache
from training.batches.gpu_cache import cut_regions, fill_cache
from training.batches.sampling import BatchSpec
from training.store.chunks import write_case


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """Three cases of two channels: larger than the patch, smaller, and one stored in 32 bits."""
    folder = tmp_path_factory.mktemp("cached")
    rng = np.random.default_rng(1)
    shapes = {"large": (6, 30, 28), "small": (3, 12, 14), "wide": (5, 20, 20)}
    for name, shape in shapes.items():
        data = rng.normal(size=(2, *shape)).astype(np.float32)
        data *= 1e4 if name == "wide" else 1
        target = rng.integers(-1, 3, shape).astype(np.int8)
        write_case(folder, name, data, target, (Normalisation("zscore"),) * 2)
    return BatchSpec(
        folder, tuple(shapes), tuple(shapes), (4, 16, 16), 3, True, (True, False), 0.33, BUSY, 0, 0
    )


def test_patches_have_the_same_bytes_as_from_the_store(spec, caplog):
    caplog.set_level(logging.INFO)
    for patch in ((4, 16, 16), (16, 16)):
        spec = dataclasses.replace(spec, patch=patch)
        kept = raw(made(spec, KEYS, "device", gpu_cache="yes"))
        assert kept == raw(made(spec, KEYS, "device", gpu_cache="no"))
    # (6 * 30 * 28 + 3 * 12 * 14) * (2 * 2 + 1) + 5 * 20 * 20 * (2 * 4 + 1) bytes
    assert "all 3 cases are in memory, 45.7 kB" in caplog.text


def test_a_region_by_hand():
    case = gpu_cache.CachedCase(
        torch.arange(1, 9, dtype=torch.int16).reshape(1, 2, 2, 2),
        torch.tensor([0.5]),
        torch.ones(2, 2, 2, dtype=torch.int8),
    )
    multiples, steps, target = cut_regions(
        {"c": case}, ["c", "c"], [(1, 1, 0), (-5, 0, 0)], (1, 2, 2)
    )
    assert multiples.tolist() == [[[[[7, 8], [0, 0]]]], [[[[0, 0], [0, 0]]]]]
    assert target.tolist() == [[[[1, 1], [-1, -1]]], [[[-1, -1], [-1, -1]]]]
    assert steps.tolist() == [[0.5], [0.5]]


def test_auto_keeps_cases_on_a_gpu_only(spec):
    assert fill_cache(spec.folder, spec.train, CPU, "auto") is None
    assert fill_cache(spec.folder, spec.train, torch.device("cuda"), "no") is None


@pytest.mark.parametrize(
    ("training_bytes", "reserve"),
    [(0, 8 * 2**30), (7 * 2**30, 8 * 2**30), (24 * 10**9, 24 * 10**9)],
)
def test_auto_leaves_the_training_its_memory(spec, monkeypatch, caplog, training_bytes, reserve):
    """8 GiB are reserved, or what it takes; of the rest 0.4 may be taken: 40 of 100 kB."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(gpu_cache, "_free_bytes", lambda _: reserve + 100_000)
    there = (spec.folder, spec.train, torch.device("cuda"), "auto")
    assert fill_cache(*there, training_bytes) is None
    assert "not kept in GPU memory: the 3 cases need 45.7 kB, 40.0 kB are to spare" in caplog.text


def test_refuses_what_does_not_fit(spec, monkeypatch):
    monkeypatch.setattr(gpu_cache, "_free_bytes", lambda _: 45_000)
    with pytest.raises(TrainingError, match=r"3 cases need 45\.7 kB of memory, 45\.0 kB are free"):
        fill_cache(spec.folder, spec.train, CPU, "yes")
