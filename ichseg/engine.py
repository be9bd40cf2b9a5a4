"""Who runs the network: torch on CUDA, or torch on CPU."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import torch

from ichseg.errors import DeviceError
from ichseg.sliding_window import Network


def choose_device(name: str) -> torch.device:
    """The device for ``auto`` (CUDA if it works, else CPU), ``cpu`` or ``cuda``.

    Raises:
        DeviceError: CUDA was asked for and is not usable.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            f"--device cuda: no usable GPU (torch {torch.__version__} is built for CUDA "
            f"{torch.version.cuda or 'none'}); check nvidia-smi, or use --device cpu"
        )
    return torch.device("cuda")


def describe(device: torch.device) -> str:
    """One phrase for the log."""
    if device.type == "cuda":
        return f"torch on {torch.cuda.get_device_name(device)}"
    return f"torch on CPU, {torch.get_num_threads()} threads"


def use_available_cpus() -> int:
    """Set torch's threads to the CPUs this process may really use, and return the number.

    torch counts the machine's cores; a container may be allowed fewer by affinity or by its
    cgroup's quota, and more threads than that only get in each other's way.
    """
    threads = max(1, min(len(os.sched_getaffinity(0)), cgroup_cpus()))
    torch.set_num_threads(threads)
    return threads


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


def torch_engine(network: torch.nn.Module, device: torch.device, *, average: str) -> Network:
    """A network as a callable on tiles: ``(B, C, Z, Y, X)`` to float32 scores ``(B, K, Z, Y, X)``.

    A 2D network gets its one-slice tile without the slice axis. On CUDA it runs in fp16 autocast,
    and a tile whose logits are not finite is redone in fp32.

    Args:
        network: A ``UNet`` with its weights; moved to ``device`` and set to evaluation.
        device: Where to run.
        average: ``probabilities`` (softmax is applied here) or ``logits``.
    """
    two_dimensional = next(p for p in network.parameters() if p.ndim > 2).ndim == 4
    layout = torch.channels_last if two_dimensional else torch.channels_last_3d
    network = network.to(device).eval().to(memory_format=layout)  # type: ignore[call-overload]

    def run(tile: torch.Tensor) -> torch.Tensor:
        x = tile.squeeze(2) if two_dimensional else tile
        with torch.inference_mode():
            with torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):
                logits = network(x.contiguous(memory_format=layout)).float()
            if device.type == "cuda" and not torch.isfinite(logits).all():
                logits = network(x).float()
            if two_dimensional:
                logits = logits.unsqueeze(2)
            scores: torch.Tensor = logits.softmax(1) if average == "probabilities" else logits
            return scores

    return run
