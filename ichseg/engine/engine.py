"""Who runs the networks: OpenVINO on the CPU, torch on CUDA, or torch on the CPU.

All take one fold's tensors and give a callable on tiles; neither torch nor OpenVINO is imported
before one of them is chosen.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.errors import DeviceError
from ichseg.model.plans import Architecture
from ichseg.predict.resample import Grid

DEVICES = ("auto", "cpu", "cuda", "torch-cpu")
MOST_THREADS = 32  # more share too little work
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """What an engine has to know of a network, beside its tensors.

    Attributes:
        architecture: From the plan's configuration.
        input_channels: Of the tiles.
        scores: Of each voxel: K.
        tile: Voxels ``(z, y, x)``; for a 2D network one slice thick.
        average: ``probabilities`` (the engine applies the softmax) or ``logits``.
    """

    architecture: Architecture
    input_channels: int
    scores: int
    tile: tuple[int, int, int]
    average: str


@dataclass(frozen=True, slots=True)
class LoadedNetwork:
    """One fold's network, ready to run.

    Attributes:
        run: Tiles ``(B, C, *tile)`` to scores ``(B, K, *tile)``, float32, any B; where
            ``Engine.place`` puts things. The scores hold until the next call.
        batch: The B that it likes best.
    """

    run: Callable[[Grid], Grid]
    batch: int


@dataclass(frozen=True, slots=True)
class Engine:
    """Who runs the networks.

    Attributes:
        name: For the log and for ``results.json``, such as ``OpenVINO 2026.4.1 on the CPU, 2
            threads``.
        place: Puts a prepared case ``(C, Z, Y, X)`` where the networks run.
        load: A network from its tensors. At most one should be alive at a time. Raises
            ``ValueError`` where the tensors do not fit.
        kind: ``openvino``, ``torch-cpu`` or ``cuda``.
        keep: Like ``place``, but on the host, where scores are then added up as well: slower, for
            volumes that a GPU's memory does not hold.
        free_bytes: Of a GPU's memory; None for the CPU.
        memory_full: What is raised where a GPU's memory is; none for OpenVINO.
        guard: Around all that touches the device. A GPU that is lost is a ``DeviceError`` at its
            end, since CUDA tells of it at whichever call comes next.
    """

    name: str
    place: Callable[[FloatArray], Grid]
    load: Callable[[NetworkSpec, Mapping[str, FloatArray]], LoadedNetwork]
    kind: str
    keep: Callable[[FloatArray], Grid]
    free_bytes: Callable[[], int | None]
    memory_full: tuple[type[Exception], ...] = ()
    guard: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


def choose(device: str) -> Engine:
    """The engine for a device.

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


def _noted(engine: Engine, notes: list[str]) -> Engine:
    """The engine, whose name says what else might have been."""
    return dataclasses.replace(engine, name="".join([engine.name, *notes]))


def gpu_is_there() -> bool:
    """Whether NVIDIA's driver sees a GPU; it is asked itself, as torch takes seconds to import."""
    count = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value > 0
    return False


def cpu_threads() -> int:
    """CPUs that this process may really use, at most 32.

    torch and OpenVINO count the machine's cores; a container may be allowed fewer by affinity or by
    its cgroup's quota, and more threads than that only get in each other's way.
    """
    return max(1, min(len(os.sched_getaffinity(0)), cgroup_cpus(), MOST_THREADS))


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole CPUs that the cgroup's quota allows (version 2 or 1); a large number without one."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (root / "cpu.max").read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu" / "cpu.cfs_period_us").read_text())
        if quota_us > 0:
            return max(1, math.ceil(quota_us / period_us))
    return 1_000_000
