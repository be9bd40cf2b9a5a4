"""What an engine is: it takes one fold's tensors and gives a callable on tiles."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ichseg.engine.arrays import FloatArray, Grid, stack
from ichseg.model.architecture import Architecture

BATCH_VOXELS = 1_200_000  # 8 tiles of 16x96x96: small tiles alone leave torch's convolutions idle


# Tiles (C, *tile), one after another, to their scores (B, K, *tile), float32, in the same order and
# as many at a time as the engine likes; each holds until the next ones are asked for. An engine's
# networks take and give arrays of the kind that its ``place`` makes.
Network = Callable[[Iterable[Any]], Generator[Any]]
# Tiles (B, C, *tile) to scores (B, K, *tile), float32, for any B.
OnBatches = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """What an engine has to know of a network, beside its tensors.

    Attributes:
        architecture: The network's shape, from the plan's configuration.
        input_channels: Channels of a tile.
        scores: Scores of each voxel, K.
        tile: Voxels of a tile ``(z, y, x)``; for a 2D network one slice thick.
        average: ``probabilities`` (the engine applies the softmax) or ``logits``.
    """

    architecture: Architecture
    input_channels: int
    scores: int
    tile: tuple[int, int, int]
    average: str


@dataclass(frozen=True, slots=True)
class Engine:
    """Who runs the networks.

    Attributes:
        name: For the log and for ``results.json``, such as ``OpenVINO 2026.4.1 on the CPU, 2
            threads``.
        place: Puts a prepared case ``(C, Z, Y, X)`` where the networks run.
        load: Makes a network of its tensors, which takes several times their memory. Raises
            ``ValueError`` where the tensors do not fit.
        kind: ``openvino``, ``torch-cpu`` or ``cuda``.
        keep: Like ``place``, but on the host, where scores are then added up as well: slower, for
            volumes that a GPU's memory does not hold.
        precision: What its convolutions are computed in: ``float32``, ``bfloat16`` or ``float16``.
        device_bytes: Gives the bytes of a GPU's memory that this process can have in all, what its
            tensors take among them; None for the CPU.
        batch_of: Gives how many tiles go through a network at once, as a batch or side by side.
        guard: A context around all that touches the device. A GPU whose memory is full is a
            ``DeviceFullError`` at its end, one that is lost a ``DeviceError``, since CUDA tells of
            it at whichever call comes next.
    """

    name: str
    place: Callable[[FloatArray], Grid]
    load: Callable[[NetworkSpec, Mapping[str, FloatArray]], Network]
    kind: str
    keep: Callable[[FloatArray], Grid]
    precision: str
    device_bytes: Callable[[], int | None]
    batch_of: Callable[[NetworkSpec], int]
    guard: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


def in_batches(run: OnBatches, size: int) -> Network:
    """A network that runs on batches, for tiles that come one after another.

    Args:
        run: Maps ``(B, C, *tile)`` to ``(B, K, *tile)``.
        size: How many tiles it is given at once; of the last ones fewer.
    """

    def network(tiles: Iterable[Grid]) -> Generator[Grid]:
        waiting = iter(tiles)
        while batch := list(itertools.islice(waiting, size)):
            yield run(stack(batch))

    return network


def tiles_at_once(tile: Sequence[int]) -> int:
    """How many tiles of these sizes torch on the CPU runs fastest on together."""
    return max(1, BATCH_VOXELS // math.prod(tile))
