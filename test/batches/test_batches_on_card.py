"""Batches made on a GPU, by a pretended one: see ``helpers.card``."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import card
from helpers.batches import KEYS, made, spec_of

from training.batches.augmentation import NNUNETV2
from training.batches.stream import Batch, BatchStream, StreamOptions, open_batches
from training.store.chunks import open_case, write_previous

ALL = {f.name: 1 for f in dataclasses.fields(NNUNETV2) if f.name.endswith("_probability")}
# every change to every sample, by small warps for small patches
EVERYTHING = dataclasses.replace(
    NNUNETV2, **ALL, elastic_alpha=(0, 50), elastic_alpha_2d=(0, 50), scaling=(0.9, 1.1)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The store of a cascade's second stage."""
    from helpers.workspaces import make_workspace

    folder = make_workspace(tmp_path_factory.mktemp("card")) / "preprocessed" / "3d_fullres"
    for index in range(6):
        name = f"case_{index}"
        write_previous(folder, name, np.maximum(open_case(folder, name).target[...], 0), "")
    return folder


@pytest.mark.parametrize("cached", ["yes", "no"])
@pytest.mark.parametrize("kind", ["3D", "2D", "in-plane cascade"])
def test_the_card_makes_the_batches_of_the_cpu_and_is_waited_for_once_each(
    folder, monkeypatch, kind, cached
):
    changes = {"in_plane": kind != "3D", "augmentation": EVERYTHING, "masked": (True,)}
    if kind == "2D":
        changes["patch"] = (16, 16)
    if kind == "in-plane cascade":
        changes["previous_labels"] = 1
    spec = spec_of(folder, **changes)
    expected = made(spec, KEYS, "device", gpu_cache=cached)
    layout = torch.channels_last if kind == "2D" else torch.channels_last_3d
    options = StreamOptions(workers=0, gpu_cache=cached)
    with card.pretended(monkeypatch) as there:
        found = []
        with open_batches(spec, iter(KEYS), options, torch.device("cuda"), layout) as stream:
            before = len(there.waits)
            for batch in stream:
                waits = there.waits[before:]
                assert len(waits) == 1
                assert "synchronize (stream.py" in waits[0]
                assert batch.data.is_contiguous(memory_format=layout)
                used = [part.clone() for part in batch]  # beside it, as a step does
                del batch
                found.append([part.cpu() for part in used])
                before = len(there.waits)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("device", "expected"), [("cuda", 2), ("cuda:1", 1)])
def test_the_thread_that_brings_batches_is_on_the_gpu_of_its_process(monkeypatch, device, expected):
    """Else each process of several takes half a GB of the first GPU."""
    seen = []

    def finish(_):
        seen.append(torch.cuda.current_device())
        return Batch(torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda"))

    with card.pretended(monkeypatch):
        torch.cuda.set_device(2)  # as in the third process
        with BatchStream(
            abs, finish, iter([1, 2]), torch.device(device), workers=1, prefetch=1
        ) as stream:
            list(stream)
    assert seen == [expected] * 2
