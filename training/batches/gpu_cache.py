"""The preprocessed cases of a fold in the memory of the training device.

A small data set fits beside the network. Then nothing is read, inflated or copied any more while
training: the host draws which part of which case a patch is, and the device cuts it out. Images
stay the whole numbers that the store holds, two bytes a voxel, so a patch has the same bytes as one
that was read from there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ichseg.engine import machine, torch_device
from ichseg.errors import TrainingError
from ichseg.wording import byte_size
from training.batches.augmentation import OUTSIDE, Shape
from training.batches.reading import overlap
from training.store.chunks import open_case

_RESERVE_BYTES = 8 * 2**30  # for the training itself, at least: what the reference plans for
_SHARE = 0.4  # of what is free beyond that

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CachedCase:
    """One case on the device.

    Attributes:
        multiples: Whole numbers ``(C, Z, Y, X)`` that times ``steps`` are intensities.
        steps: float32 ``(C,)``.
        target: int8 ``(Z, Y, X)``.
    """

    multiples: Tensor
    steps: Tensor
    target: Tensor


GpuCache = dict[str, CachedCase]


def fill_cache(
    folder: Path,
    names: Sequence[str],
    device: torch.device,
    mode: str,
    training_bytes: int = 0,
) -> GpuCache | None:
    """Bring all cases to the device if they are to be there; says in the log what was done.

    Args:
        folder: The preprocessed cases of one configuration.
        names: Names of the cases.
        device: The device that trains.
        mode: ``yes``, ``no``, or ``auto``, which keeps them on CUDA only, and only where they leave
            enough memory for the training.
        training_bytes: What the training is estimated to take; 0 where nobody knows.

    Returns:
        The cases by name, or None when they are to be read from the store.

    Raises:
        TrainingError: ``yes``, but they do not fit.
    """
    if mode == "no" or (mode == "auto" and device.type != "cuda"):
        return None
    cases = [open_case(folder, name) for name in sorted(set(names))]
    need = sum(case.data.nbytes + case.target.nbytes for case in cases)
    free = _free_bytes(device)
    reserve = max(_RESERVE_BYTES, training_bytes)
    most = free if mode == "yes" else int(_SHARE * max(0, free - reserve))
    memory = "GPU memory" if device.type == "cuda" else "memory"
    if need > most:
        if mode == "yes":
            raise TrainingError(
                f"{folder}: the {len(cases)} cases need {byte_size(need)} of {memory}, "
                f"{byte_size(free)} are free; leave --gpu-cache at auto"
            )
        _log.info(
            "not kept in %s: the %d cases need %s, %s are to spare",
            memory,
            len(cases),
            byte_size(need),
            byte_size(most),
        )
        return None
    cache = {
        case.name: CachedCase(
            torch.from_numpy(case.data.multiples(...)).to(device),
            torch.from_numpy(case.data.steps).to(device),
            torch.from_numpy(case.target[...]).to(device),
        )
        for case in cases
    }
    _log.info("all %d cases are in %s, %s", len(cases), memory, byte_size(need))
    return cache


def cut_regions(
    cases: GpuCache, names: Sequence[str], lowers: Sequence[Shape], size: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """Regions of cases; beyond a case the image is 0 and the target -1.

    Args:
        cases: What ``fill_cache`` has brought to the device.
        names: The case of each region.
        lowers: First voxel ``(z, y, x)`` of each region.
        size: Voxels ``(z, y, x)`` of all regions.

    Returns:
        Whole numbers ``(B, C, *size)``, their steps ``(B, C)``, and targets int8 ``(B, *size)``.
    """
    chosen = [cases[name] for name in names]
    dtype = functools.reduce(torch.promote_types, (case.multiples.dtype for case in chosen))
    first = chosen[0].multiples
    multiples = first.new_zeros((len(chosen), len(first), *size), dtype=dtype)
    target = chosen[0].target.new_full((len(chosen), *size), OUTSIDE)
    for index, (case, lower) in enumerate(zip(chosen, lowers, strict=True)):
        z, y, x = case.target.shape
        source, sink = overlap((z, y, x), lower, size)
        multiples[index][:, *sink] = case.multiples[:, *source]
        target[index][sink] = case.target[source]
    return multiples, torch.stack([case.steps for case in chosen]), target


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch_device.free_bytes(device) or 0
    return machine.free_memory_bytes() or 0
