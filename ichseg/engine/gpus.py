"""The GPUs of this machine, as NVIDIA's driver counts them; torch takes seconds to import."""

from __future__ import annotations

import contextlib
import ctypes
import os

from ichseg.errors import DeviceError


def count() -> int:
    """How many GPUs this process sees, within ``CUDA_VISIBLE_DEVICES``."""
    found = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(found)) == 0:
            return found.value
    return 0


def find(text: str) -> tuple[str, ...]:
    """The GPUs of ``--gpus``, as ``CUDA_VISIBLE_DEVICES`` takes them.

    Args:
        text: Numbers separated by commas. If the variable is set, they count along its entries.

    Raises:
        DeviceError: There are no numbers, one is given twice, or there is no such GPU.
    """
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise DeviceError(f"--gpus {text}: expected numbers separated by commas, such as 0,1")
    chosen = [int(number) for number in numbers]
    if len(set(chosen)) < len(chosen):
        raise DeviceError(f"--gpus {text}: names a GPU twice")
    there, visible = count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if max(chosen) >= there:
        has = f"this machine has {there}, counted from 0" if there else "no GPU works here"
        raise DeviceError(f"--gpus {text}: no GPU {max(chosen)}; {has}")
    entries = [entry.strip() for entry in visible.split(",")] if visible else None
    return tuple(str(number) if entries is None else entries[number] for number in chosen)
