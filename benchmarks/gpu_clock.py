"""Seconds and memory of what runs on a GPU, which goes on after its call has come back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from benchmarks.rows import Row, informs

Found = TypeVar("Found")


def settle() -> None:
    """Wait for what the GPU has been given; without one there is nothing to wait for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(call: Callable[[], Found]) -> tuple[float, Found]:
    """Seconds that a call takes with all that it gives to the GPU, and its result."""
    settle()
    began = time.perf_counter()
    found = call()
    settle()
    return time.perf_counter() - began, found


def forget_peak(device: str) -> None:
    """Measure the memory's peak from now on, where the device is ``cuda``."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(name: str, device: str) -> Iterator[Row]:
    """The memory's peak, where the device is ``cuda``."""
    if device == "cuda":
        yield informs(f"{name}, peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
