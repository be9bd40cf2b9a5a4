"""Which engine runs the networks, by the device that is asked for and what the machine has."""

from __future__ import annotations

import dataclasses

from ichseg.engine import gpus
from ichseg.engine.engine import Engine
from ichseg.engine.machine import cpu_threads
from ichseg.errors import DeviceError

DEVICES = ("auto", "cpu", "cuda", "torch-cpu")
PRECISIONS = ("auto", "float32", "bfloat16")


def choose_engine(device: str, precision: str = "auto", threads: int = 0) -> Engine:
    """The engine for a device; neither torch nor OpenVINO is imported where the other one runs.

    Args:
        device: ``auto`` (CUDA if there is a GPU and torch can use it, else ``cpu``), ``cpu``
            (OpenVINO; torch if that is not installed), ``cuda``, or ``torch-cpu`` (the reference).
        precision: Of convolutions. ``auto`` is float16 on CUDA, float32 by torch on the CPU, and by
            OpenVINO bfloat16 on processors that compute it themselves, else float32.
        threads: How many threads of the CPU run it; 0 takes as many as this process may use.

    Raises:
        DeviceError: Another word; or CUDA was asked for and is not usable; or torch on the CPU was
            asked for bfloat16.
    """
    for word, given, known in (("device", device, DEVICES), ("precision", precision, PRECISIONS)):
        if given not in known:
            raise DeviceError(f"{word} {given!r}, expected one of {', '.join(known)}")
    notes = []
    if device == "cuda" or (device == "auto" and gpu_is_there()):
        from ichseg.engine import torch_device, torch_engine

        reason = torch_device.why_unusable()
        if device == "cuda" or reason is None:
            try:
                return torch_engine.engine_on(torch_device.choose_device("cuda"), precision)
            except DeviceError as error:
                if device == "cuda":
                    raise
                reason = str(error)
        notes.append(f"; the GPU is NOT used: {reason}")
    if device != "torch-cpu":
        from ichseg.engine import openvino_engine

        try:
            return _noted(openvino_engine.engine(threads or cpu_threads(), precision), notes)
        except ImportError as error:
            notes.append(f"; not by OpenVINO, which cannot be loaded ({error})")
    from ichseg.engine import torch_device, torch_engine

    return _noted(
        torch_engine.engine_on(torch_device.choose_device("cpu"), precision, threads), notes
    )


def gpu_is_there() -> bool:
    """Whether NVIDIA's driver sees a GPU; it is asked itself, as torch takes seconds to import."""
    return gpus.count() > 0


def _noted(engine: Engine, notes: list[str]) -> Engine:
    """The engine, whose name says what else might have been."""
    return dataclasses.replace(engine, name="".join([engine.name, *notes]))
