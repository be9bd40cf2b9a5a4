"""OpenVINO on the CPU: the engine that needs no torch."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ichseg.engine.arrays import FloatArray
from ichseg.engine.engine import Engine, Network, NetworkSpec
from ichseg.engine.openvino_graph import build, import_openvino
from ichseg.model.architecture import Architecture
from ichseg.wording import counted

# What the activations of all tiles may take that are computed at the same time.
STREAMS_BYTES = 128 * 2**20


def engine(threads: int, precision: str = "auto") -> Engine:
    """The engine, with so many threads.

    Args:
        threads: Threads of all tiles that are computed at the same time.
        precision: Of convolutions: ``float32``, ``bfloat16``, or ``auto`` for the faster of the two
            on this processor, which OpenVINO is asked for.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    openvino: Any = import_openvino()
    version = openvino.__version__.split("-")[0]
    core = _core()
    if precision == "auto":
        precision = "bfloat16" if computes_bfloat16(openvino, core) else "float32"
    return Engine(
        name=f"OpenVINO {version} on the CPU, {counted(threads, 'thread')}, {precision}",
        place=lambda data: data,
        load=functools.partial(_load, core, threads, precision),
        kind="openvino",
        keep=lambda data: data,
        precision=precision,
        device_bytes=lambda: None,
        batch_of=lambda spec: streams(threads, spec.architecture, spec.tile),
    )


def tile_bytes(architecture: Architecture, tile: Sequence[int]) -> int:
    """Bytes of one tile's activations, measured for U-Nets with 8 to 32 first features."""
    return 4 * (3 * architecture.features[0] + 5) * math.prod(tile)


def streams(threads: int, architecture: Architecture, tile: Sequence[int]) -> int:
    """How many tiles are computed at the same time, each by an equal share of the threads.

    Threads that share a small tile wait for each other at each of its layers: a thread a tile is
    faster (docs/decisions/0009). The gain is small for large tiles, and the memory is not.
    """
    most = min(threads, max(1, STREAMS_BYTES // tile_bytes(architecture, tile)))
    return max(count for count in range(1, most + 1) if threads % count == 0)


@functools.cache
def _core() -> Any:
    """The one core of this process, which stays to its end.

    OpenVINO gives the thread that begins it a stack for signals, and takes it away with the core.
    With two cores that end in the order in which they began, or with one that ends in another
    thread, signals are handled on memory that is gone: the next one is a segmentation fault.
    """
    return import_openvino().Core()


def computes_bfloat16(openvino: Any, core: Any) -> bool:
    """Whether the processor multiplies matrices in bfloat16 itself (AVX512_BF16, AMX)."""
    return bool(core.get_property("CPU", "INFERENCE_PRECISION_HINT") == openvino.Type.bf16)


def _load(
    core: Any,
    threads: int,
    precision: str,
    spec: NetworkSpec,
    state: Mapping[str, FloatArray],
) -> Network:
    """Compile one fold's network for tiles of its static shape; nothing is cached.

    While the scores of a tile are read, the next tiles are computed. A batch of tiles is no faster,
    and less of it fits the processor's caches. Scores come in the order of the tiles, and how many
    are under way changes none of their bytes.
    """
    at_once = streams(threads, spec.architecture, spec.tile)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # of all that the graph does not say
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": at_once,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # the cores may be shared with others
    }
    compiled = core.compile_model(build(spec, state, precision), "CPU", settings)
    requests = [compiled.create_infer_request() for _ in range(at_once + 1)]
    two_dimensional = spec.architecture.dimensions == 2

    def network(tiles: Iterable[FloatArray]) -> Generator[FloatArray]:
        free, running = deque(requests), deque[tuple[Any, FloatArray]]()

        def scores() -> Iterator[FloatArray]:
            request, _ = running.popleft()
            request.wait()
            found: FloatArray = request.get_output_tensor().data
            yield found[:, :, None] if two_dimensional else found
            free.append(request)

        try:
            for tile in tiles:
                given = np.ascontiguousarray(tile[:, 0] if two_dimensional else tile)[None]
                request = free.popleft()
                request.start_async([given], share_inputs=True)
                running.append((request, given))  # which is not copied, and has to stay
                if not free:
                    yield from scores()
            while running:
                yield from scores()
        finally:
            for request, _ in running:
                request.wait()

    return network
