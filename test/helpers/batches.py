"""Batches of a few keys, made by either engine, and what they are compared by."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.workspaces import BUSY

from training.batches.sampling import BatchKey, BatchSpec
from training.batches.stream import Batch, BatchStream, StreamOptions, open_batches

CPU = torch.device("cpu")
VALIDATION = BatchKey(0, 0, validation=True)
KEYS = [BatchKey(0, 0), BatchKey(0, 1), VALIDATION, BatchKey(1, 0)]


def spec_of(folder: Path, **changes: object) -> BatchSpec:
    """Batches of the six cases of ``make_workspace``, two of which are for validation."""
    names = tuple(f"case_{index}" for index in range(6))
    usual: dict[str, object] = {
        "train": names[:4], "validation": names[4:], "patch": (4, 16, 16), "batch": 2,
        "in_plane": True, "masked": (False,), "foreground_fraction": 0.33, "augmentation": BUSY,
        "seed": 3, "fold": 1,
    }  # fmt: skip
    return BatchSpec(folder=folder, **(usual | changes))


def opened(
    spec: BatchSpec, keys: list[BatchKey], engine: str = "host", **options: object
) -> BatchStream:
    """A stream of these batches on the CPU, without workers unless options say otherwise."""
    chosen = StreamOptions(engine, **({"workers": 0} | options))
    return open_batches(spec, iter(keys), chosen, CPU)


def made(
    spec: BatchSpec, keys: list[BatchKey], engine: str = "host", **options: object
) -> list[Batch]:
    """All of these batches."""
    with opened(spec, keys, engine, **options) as stream:
        return list(stream)


def raw(batches: list[Batch]) -> list[bytes]:
    """The bytes of each batch."""
    return [batch.data.numpy().tobytes() + batch.target.numpy().tobytes() for batch in batches]
