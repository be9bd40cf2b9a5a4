"""Batches of a few keys, made by either engine, and what they are compared by."""

from __future__ import annotations

import torch

from training.batches.sampling import BatchKey, BatchSpec
from training.batches.stream import Batch, BatchStream, StreamOptions, open_batches

CPU = torch.device("cpu")
VALIDATION = BatchKey(0, 0, validation=True)
KEYS = [BatchKey(0, 0), BatchKey(0, 1), VALIDATION, BatchKey(1, 0)]


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
