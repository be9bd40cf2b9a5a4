"""Which engine runs the networks, by the device that is asked for and what the machine has."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses

from ichseg.engine.engine import Engine
from ichseg.engine.machine import cpu_threads
from ichseg.errors import DeviceError

DEVICES = ("auto", "cpu", "cuda", "torch-cpu")


def choose_engine(device: str) -> Engine:
    """The engine for a device; neither torch nor OpenVINO is imported where the other one runs.

    Args:
        device: ``auto`` (CUDA if there is a GPU and torch can use it, else ``cpu``), ``cpu``
            (OpenVINO; torch if that is not installed), ``cuda``, or ``torch-cpu`` (the reference).

    Raises:
        DeviceError: Another word; or CUDA was asked for and is not usable.
    """
    if device not in DEVICES:
        raise DeviceError(f"device {device!r}, expected one of {', '.join(DEVICES)}")
    notes = []
    if device == "cuda" or (device == "auto" and gpu_is_there()):
        from ichseg.engine import torch_engine

        if device == "cuda" or torch_engine.cuda_is_usable():
            return torch_engine.engine_on(torch_engine.choose_device("cuda"))
        notes.append("; there is a GPU, but torch cannot use it, see --device cuda")
    if device != "torch-cpu":
        from ichseg.engine import openvino_engine

        try:
            return _noted(openvino_engine.engine(cpu_threads()), notes)
        except ImportError as error:
            notes.append(f"; not by OpenVINO, which cannot be loaded ({error})")
    from ichseg.engine import torch_engine

    return _noted(torch_engine.engine_on(torch_engine.choose_device("cpu")), notes)


def gpu_is_there() -> bool:
    """Whether NVIDIA's driver sees a GPU; it is asked itself, as torch takes seconds to import."""
    count = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value > 0
    return False


def _noted(engine: Engine, notes: list[str]) -> Engine:
    """The engine, whose name says what else might have been."""
    return dataclasses.replace(engine, name="".join([engine.name, *notes]))
