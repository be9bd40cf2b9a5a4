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


def engine(threads: int) -> Engine:
    """The engine, with so many threads.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    openvino: Any = import_openvino()
    version = openvino.__version__.split("-")[0]
    return Engine(
        name=f"OpenVINO {version} on the CPU, {counted(threads, 'thread')}, float32",
        place=lambda data: data,
        load=functools.partial(_load, openvino.Core(), threads),
        kind="openvino",
        keep=lambda data: data,
        free_bytes=lambda: None,
    )


def _load(
    core: Any, threads: int, spec: NetworkSpec, state: Mapping[str, FloatArray]
) -> LoadedNetwork:
    """Compile one fold's network for tiles of its static shape, one at a time; nothing is cached.

    More tiles at a time are no faster, and less of them fits the processor's caches.
    """
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # the cores may be shared with others
    }
    request = core.compile_model(build(spec, state), "CPU", settings).create_infer_request()
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
