"""OpenVINO on the CPU: the engine that needs no torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ichseg.engine.arrays import FloatArray
from ichseg.engine.engine import Engine, LoadedNetwork, NetworkSpec
from ichseg.engine.openvino_graph import build, import_openvino
from ichseg.wording import counted


def engine(threads: int, precision: str = "auto") -> Engine:
    """The engine, with so many threads.

    Args:
        threads: Threads of one tile.
        precision: Of convolutions: ``float32``, ``bfloat16``, or ``auto`` for the faster of the two
            on this processor, which OpenVINO is asked for.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    openvino: Any = import_openvino()
    version = openvino.__version__.split("-")[0]
    core = openvino.Core()
    if precision == "auto":
        precision = "bfloat16" if computes_bfloat16(openvino, core) else "float32"
    return Engine(
        name=f"OpenVINO {version} on the CPU, {counted(threads, 'thread')}, {precision}",
        place=lambda data: data,
        load=functools.partial(_load, core, threads, precision),
        kind="openvino",
        keep=lambda data: data,
        precision=precision,
        free_bytes=lambda: None,
    )


def computes_bfloat16(openvino: Any, core: Any) -> bool:
    """Whether the processor multiplies matrices in bfloat16 itself (AVX512_BF16, AMX)."""
    return bool(core.get_property("CPU", "INFERENCE_PRECISION_HINT") == openvino.Type.bf16)


def _load(
    core: Any,
    threads: int,
    precision: str,
    spec: NetworkSpec,
    state: Mapping[str, FloatArray],
) -> LoadedNetwork:
    """Compile one fold's network for tiles of its static shape, one at a time; nothing is cached.

    More tiles at a time are no faster, and less of them fits the processor's caches.
    """
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # of all that the graph does not say
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # the cores may be shared with others
    }
    request = core.compile_model(
        build(spec, state, precision), "CPU", settings
    ).create_infer_request()
    two_dimensional = spec.architecture.dimensions == 2

    def run(tiles: FloatArray) -> FloatArray:
        inputs = tiles[:, :, 0] if two_dimensional else tiles
        found = []
        for index in range(len(inputs)):
            one = np.ascontiguousarray(inputs[index : index + 1])
            (scores,) = request.infer([one], share_inputs=True, share_outputs=True).values()
            found.append(scores if len(inputs) == 1 else scores.copy())
        scores = found[0] if len(found) == 1 else np.concatenate(found)
        return scores[:, :, None] if two_dimensional else scores

    return LoadedNetwork(run, batch=1)
