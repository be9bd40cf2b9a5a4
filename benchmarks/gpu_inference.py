"""How fast inference is on a GPU, and whether it finds what the CPU finds; parts of ``gpu.py``.

Five networks with random weights, eight mirrorings, a scan of 28x512x512 without air: 27 tiles of
16x320x320, 1080 forward passes. All is in memory, and ours is timed the second time: loading and
cuDNN's search for algorithms are in the first. The plain one, which does not load, has those and
compiling in a first tile.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_cases, gpu_plain
from benchmarks.gpu_cases import CONFIGURATION, MIRRORINGS, SAMPLES, Place
from benchmarks.gpu_clock import Found, forget_peak, peak, timed
from benchmarks.inference_data import gflop
from benchmarks.rows import LeftOutError, Row, informs
from ichseg.engine import openvino_graph
from ichseg.engine.engine import NetworkSpec
from ichseg.engine.machine import cpus
from ichseg.model import bundle
from ichseg.model.bundle import Model
from ichseg.model.default_weights import default_weights
from ichseg.predict import sliding_window
from ichseg.predict.dice import dice_of_masks
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.many import segment_many

_MASK_FILE = "mask.npy"  # what ours has found, for the plain one to be held against
_FOLDER_OF = 5
_PRESET = "balanced"  # with which the stored masks were made
LEAST_DICE = 0.999


def measure_ours(place: Place, rate_tflops: float | None) -> Iterator[Row]:
    """Segment one case, then five in a row.

    Args:
        place: Where, and on what.
        rate_tflops: The card's measured rate of bf16 matrix products; None on the CPU.
    """
    weights = gpu_cases.weights(place)
    model, scan = bundle.load_model(weights), gpu_cases.scan(place)
    forget_peak(place.device)
    ensemble = Ensemble.load(weights, place.device)
    print(ensemble.engine.name, flush=True)
    segment = functools.partial(ensemble.segment, scan)
    first_s, found = timed(segment)
    yield informs("inference, ours, one case, the first time", first_s, "s")
    seconds, found = _again(segment, place, first_s, found)
    print({"ran": dict(found.ran), "seconds": dict(found.seconds)}, flush=True)
    np.save(place.work / _MASK_FILE, found.mask.voxels)
    name = "inference, ours, one case"
    yield from _rows(name, seconds, place, model, rate_tflops)
    networks_s = found.seconds["predict"]  # without what the host does with the scores
    yield from _rows(f"{name}, networks alone", networks_s, place, model, rate_tflops)
    yield from peak("inference, ours", place.device)
    scans = [gpu_cases.scan(place, seed) for seed in range(2 if place.tiny else _FOLDER_OF)]
    seconds, outcomes = timed(lambda: list(segment_many(ensemble, scans)))
    failed = [outcome.error for outcome in outcomes if outcome.error]
    if failed:
        raise failed[0]
    name = f"inference, ours, a case of {len(scans)}"
    yield from _rows(name, seconds / len(scans), place, model, rate_tflops)


def measure_plain(place: Place, rate_tflops: float | None, *, compiled: bool) -> Iterator[Row]:
    """Segment the same case in plain torch, as nnunetv2 does it.

    Args:
        place: Where, and on what.
        rate_tflops: See ``measure_ours``.
        compiled: Whether the network is compiled; it segments the case as it is before that, so
            that there is a figure if compiling fails or takes too long.
    """
    torch.backends.cudnn.benchmark = True  # as nnunetv2 sets it
    weights = gpu_cases.weights(place)
    model, scan = bundle.load_model(weights), gpu_cases.scan(place)
    device = torch.device(place.device)
    plan = gpu_cases.as_json(model.plans)
    folds = [
        {name: torch.from_numpy(array) for name, array in state.items()}
        for state in (bundle.load_state(weights, member) for member in model.members)
    ]
    predictor = gpu_plain.Predictor(plan, device)
    tile = scan.voxels[tuple(slice(size) for size in predictor.patch)]

    def measured(name: str) -> Iterator[Row]:
        first_s, _ = timed(functools.partial(predictor.segment, tile, folds[:1]))
        yield informs(f"{name}, a tile before it", first_s, "s")
        segment = functools.partial(predictor.segment, scan.voxels, folds)
        seconds, (labels, passes) = timed(segment)
        if passes != forward_passes(place, model):
            raise SystemExit(f"error: {passes} passes, ours has {forward_passes(place, model)}")
        yield from _rows(name, seconds, place, model, rate_tflops)
        ours = place.work / _MASK_FILE
        if ours.exists():
            share = 100 * float((np.load(ours) != labels).mean())
            yield informs(f"{name}, labels unlike ours", share, "% of voxels")

    yield from measured("inference, plain torch, one case")
    if compiled:
        predictor.compile()
        yield from measured("inference, plain torch compiled, one case")


def segment_samples(place: Place) -> Iterator[Row]:
    """Segment the sample scans by the default weights, and hold the masks against the CPU's."""
    ensemble = Ensemble.load(default_weights(), place.device)
    paths = sorted((SAMPLES / "input").iterdir())
    for path in paths[:1] if place.tiny else paths:
        scan, expected = (gpu_cases.read(SAMPLES / of / path.name) for of in ("input", "expected"))
        segment = functools.partial(ensemble.segment, scan, _PRESET)
        first_s, found = timed(segment)
        yield informs(f"samples, {path.name}, the first time", first_s, "s")
        seconds, found = _again(segment, place, first_s, found)
        yield informs(f"samples, {path.name}", seconds, "s")
        dice = dice_of_masks(found.mask.voxels > 0, expected.voxels > 0)
        dice = 1.0 if np.isnan(dice) else float(dice)  # both are empty
        name = f"samples, {path.name}, Dice with the CPU's mask"
        yield Row(name, dice, None, "", None, LEAST_DICE, dice >= LEAST_DICE)
        apart = int((found.mask.voxels != expected.voxels).sum())
        yield informs(f"samples, {path.name}, voxels that differ", apart, "")


def scale_openvino(place: Place) -> Iterator[Row]:
    """How many tiles a second OpenVINO computes on this machine's cores, by streams and threads.

    Raises:
        LeftOutError: OpenVINO is not installed.
    """
    try:
        openvino: Any = openvino_graph.import_openvino()
    except ImportError as error:
        raise LeftOutError(f"no OpenVINO here ({error})") from error
    model = bundle.load_model(default_weights())
    configuration = model.plans.configuration(model.members[0].configuration)
    spec = NetworkSpec(
        configuration.architecture, 1, model.plans.scores, configuration.tile, model.average
    )
    state = bundle.load_state(default_weights(), model.members[0])
    tile = np.random.default_rng(0).normal(size=(1, 1, *configuration.tile)).astype(np.float32)
    core = openvino.Core()
    for precision in ("float32",) if place.tiny else ("float32", "bfloat16"):
        graph = openvino_graph.build(spec, state, precision)
        for streams, threads in _shares(cpus(), place.tiny):
            settings = {
                "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False,
            }  # fmt: skip
            compiled = core.compile_model(graph, "CPU", settings)
            rate = _tiles_a_second(openvino, compiled, tile, streams, 0.2 if place.tiny else 1.5)
            name = f"OpenVINO, {precision}, {threads} threads in {streams} streams"
            yield informs(name, rate, "tiles/s")


def forward_passes(place: Place, model: Model) -> int:
    """How many forward passes one case takes."""
    tile = model.plans.configuration(CONFIGURATION).tile
    return len(sliding_window.cover(place.shape, tile).corners()) * len(model.members) * MIRRORINGS


def _rows(
    name: str, seconds: float, place: Place, model: Model, rate_tflops: float | None
) -> Iterator[Row]:
    yield informs(name, seconds, "s")
    passes = forward_passes(place, model)
    cost = gflop(model.plans.configuration(CONFIGURATION), 1, model.plans.scores) / 1000
    rate = passes * cost / seconds
    yield informs(f"{name}, rate of {passes} passes", rate, "TFLOP/s")
    if rate_tflops:
        yield informs(f"{name}, share of the bf16 rate", 100 * rate / rate_tflops, "%")


def _shares(cores: int, tiny: bool) -> list[tuple[int, int]]:
    """Streams and threads: all counts of threads in one stream, then all cores in more streams."""
    if tiny:
        return [(1, 1)]
    threads = [n for n in (1, 2, 4, 8, 16, 32) if n < cores] + [cores]
    streams = [n for n in (2, 4, 8, 16, 32) if n <= cores]
    return [(1, n) for n in threads] + [(n, cores) for n in streams]


def _tiles_a_second(
    openvino: Any, compiled: Any, tile: np.ndarray[Any, Any], streams: int, seconds: float
) -> float:
    queue = openvino.AsyncInferQueue(compiled, streams + 1)
    for _ in range(streams + 1):
        queue.start_async([tile])
    queue.wait_all()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        queue.start_async([tile])  # waits for a free request
        count += 1
    queue.wait_all()
    return count / (time.perf_counter() - began)


def _again(
    call: Callable[[], Found], place: Place, first_s: float, found: Found
) -> tuple[float, Found]:
    """Seconds of the second call, and what that gave; a tiny one is not made a second time."""
    return (first_s, found) if place.tiny else timed(call)
