"""How much memory a case will take: said before the work, not by a kill.

The platform limits a job by its cgroup and, per process, by ``RLIMIT_DATA``; the first kills with
status 137 and no word. So what a case needs is added up from its shapes before it is prepared. The
constants are measured; ``benchmarks/large_volume.py`` compares sums with peaks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ichseg.engine.engine import tiles_at_once
from ichseg.model.plans import Configuration, Plans
from ichseg.predict import sliding_window
from ichseg.predict.prepare import Placement

GB = 1e9
_MB = 2**20
_FLOAT = 4  # bytes
_RUNTIME = 55 * _MB  # of OpenVINO, with whatever number of networks
_WORKSPACE = 512 * _MB  # of cuDNN and cuBLAS on a GPU; not measured


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a case takes, beside what the program takes without any.

    Attributes:
        opening: What it takes while it is read and prepared.
        predicting: What it takes while the networks run on it.
        writing: What it takes while it is restored, measured and written.
        network: What the networks take that stay from the first case on: the largest, or all.
        device: What it takes of a GPU's memory; more is taken where there is more, for larger
            batches.
        keeps_networks: Whether all networks stay, so that the next case need not load them.
    """

    opening: int
    predicting: int
    writing: int
    network: int
    device: int = 0
    keeps_networks: bool = False

    @property
    def alone(self) -> int:
        """What the case takes with no other one under way."""
        return max(self.opening, self.network + max(self.predicting, self.writing))


@dataclass(frozen=True, slots=True)
class Part:
    """What one configuration does for a case.

    Attributes:
        configuration: The configuration.
        placement: Where the case lies in its grid.
        weights: The bytes of one of its networks as fp32.
        sums: How many volumes of scores are held at once: one, or two where several networks or
            passes add up.
        networks: How many networks run.
    """

    configuration: Configuration
    placement: Placement
    weights: int
    sums: int
    networks: int


def estimate(
    kind: str,
    plans: Plans,
    parts: Sequence[Part],
    *,
    on_host: bool = False,
    keeps_networks: bool = False,
    file_bytes: int,
    scan_bytes: int,
) -> Need:
    """What a case will take.

    Args:
        kind: The kind of the engine, see ``Engine.kind``.
        plans: Say how many channels and labels there are.
        parts: The configurations, those of a cascade in order.
        on_host: Whether the scores are added up on the host though the networks run on a GPU.
        keeps_networks: Whether all networks stay in memory, and not only the largest.
        file_bytes: The size of the scan on disk; it is read whole, checked and inflated.
        scan_bytes: The size of its voxels in memory.
    """
    on_gpu = kind == "cuda" and not on_host
    data = scores = running = device = largest = together = resting = 0
    for part in parts:
        shape, configuration = part.placement.grid_shape, part.configuration
        grid = math.prod(shape)
        padded = math.prod(sliding_window.cover(shape, configuration.tile).padded)
        data += _FLOAT * len(plans.channels) * grid
        channels = plans.input_channels(configuration)
        joined = _FLOAT * channels * grid * (2 if configuration.previous_stage else 0)
        own = joined + (_FLOAT * channels * padded if padded != grid else 0)
        summed = _FLOAT * plans.scores * padded
        at_once = own + part.sums * summed + (part.networks * padded if part.networks > 1 else 0)
        host, on_device = network_bytes(kind, configuration, part.weights)
        largest = max(largest, host)
        together += max(host - _RUNTIME, 0) * part.networks
        resting += resting_bytes(kind, configuration, part.weights) * part.networks
        if on_gpu:
            device = max(device, scores + _FLOAT * channels * grid + at_once + on_device)
            running = max(running, joined)
        else:
            device = max(device, on_device)
            running = max(running, scores + at_once)
        scores += summed
    if kind == "cuda":
        device += resting if keeps_networks else 0
    held = 0 if on_gpu else scores
    voxels = math.prod(parts[0].placement.full_shape)
    return Need(
        opening=scan_bytes + max(2 * file_bytes + scan_bytes, data + 30 * _MB),
        predicting=scan_bytes + data + running,
        # labels, and again in the scan's order; or components where their box is half of it; and
        # the foreground's probability
        writing=scan_bytes + max(held + 3 * voxels, 5 * voxels) + 30 * _MB,
        network=together + _RUNTIME if keeps_networks and kind == "openvino" else largest,
        device=device,
        keeps_networks=keeps_networks,
    )


def resting_bytes(kind: str, configuration: Configuration, weights: int) -> int:
    """Bytes that a loaded network takes while another one runs; on a GPU those of its memory."""
    return weights if kind == "cuda" else network_bytes(kind, configuration, weights)[0]


def network_bytes(kind: str, configuration: Configuration, weights: int) -> tuple[int, int]:
    """Bytes on the host and on the GPU of one network with its activations.

    Measured for U-Nets with 8 to 32 first features, of two and three dimensions; on CUDA not, and
    there for one tile, since a batch takes what is free.
    """
    channel = _FLOAT * math.prod(configuration.tile)
    first = configuration.architecture.features[0]
    if kind == "openvino":
        loading = 3.05 * weights + _RUNTIME
        return int(max(loading, 2.05 * weights + _RUNTIME + (3 * first + 5) * channel)), 0
    activations = (8 * first + 10) * channel
    if kind == "cuda":
        return 2 * weights, int(1.5 * weights + activations + _WORKSPACE)
    batch = tiles_at_once(configuration.tile)
    return weights + 70 * _MB + activations * batch, 0
