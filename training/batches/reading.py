"""Reading what was drawn of a batch from the store, and augmenting it where the host does that.

Worker processes run ``make_patches`` (the host augments) or ``read_regions`` (the training device
does); what becomes of their results is the business of ``stream``. Nothing here imports torch: a
worker that only draws starts in a fraction of the time, and takes a fraction of the memory.
"""

from __future__ import annotations

import math
import signal
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ichseg.errors import DatasetError
from ichseg.workers import end_with_parent
from training.batches.augment_cascade import corrupt
from training.batches.augmentation import OUTSIDE, AugmentationConfig, Shape, Warp
from training.batches.sampling import BatchKey, BatchSpec, Draw, draw_batch, stored_case
from training.store.chunks import StoredArray, StoredCase


class Patches(NamedTuple):
    """This process' share of a batch, augmented on the host.

    Attributes:
        data: float32 ``(B, C, *tile)``.
        labels: int8 ``(B, L, *tile)``: targets and, in a cascade, previous labels; -1 is outside.
    """

    data: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int8]


class Voxels(NamedTuple):
    """Regions of equal size as they are stored; beyond a case images are 0 and targets -1.

    Attributes:
        multiples: Whole numbers ``(B, C, *size)`` that times ``steps`` are intensities.
        steps: float32 ``(B, C)``.
        target: int8 ``(B, *size)``.
    """

    multiples: npt.NDArray[np.integer]
    steps: npt.NDArray[np.float32]
    target: npt.NDArray[np.int8]


class Regions(NamedTuple):
    """This process' share of a batch, for the device to augment: alike in size, nothing applied.

    Attributes:
        names: The case of each sample.
        lowers: First voxel of each region.
        size: Voxels ``(z, y, x)`` of each region: what the furthest reaching warp reads.
        augmentation: What else may be done to the samples.
        classes: Labels are below this.
        warps: The spatial change of each sample, or None.
        rngs: The source of each sample's further draws.
        voxels: None if they lie on the device.
        previous: Labels of the first stage, int8 ``(B, *size)``; None without a cascade.
    """

    names: tuple[str, ...]
    lowers: tuple[Shape, ...]
    size: Shape
    augmentation: AugmentationConfig
    classes: int
    warps: tuple[Warp | None, ...]
    rngs: tuple[np.random.Generator, ...]
    voxels: Voxels | None
    previous: npt.NDArray[np.int8] | None


def begin_worker() -> None:
    """What a worker process does first: Ctrl-C is its parent's, without which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def make_patches(spec: BatchSpec, key: BatchKey) -> Patches:
    """Draw, read and augment one batch; all of the host engine's work.

    Raises:
        DatasetError: A case is missing or damaged.
    """
    from training.batches.augment_host import (
        augment,  # here: who only reads regions need not load it
    )

    samples = []
    for draw in draw_batch(spec, key)[spec.mine]:
        size = spec.tile if draw.warp is None else draw.warp.reach(spec.tile)
        lower, case = centred(draw.lower, spec.tile, size), stored_case(spec.folder, draw.name)
        labels = [read_region(case.target, lower, size, outside=OUTSIDE)]
        if spec.previous_labels:
            labels.append(_read_previous(spec, key, draw, lower, size))
        samples.append(
            augment(
                read_region(case.data, lower, size),
                np.stack(labels),
                draw.warp,
                spec.tile,
                spec.augmentation_of(key),
                draw.rng,
                in_plane=spec.in_plane,
            )
        )
    return Patches(
        np.stack([data for data, _ in samples]), np.stack([labels for _, labels in samples])
    )


def read_regions(spec: BatchSpec, key: BatchKey, *, cached: bool = False) -> Regions:
    """Draw one batch and read what its warps will need; all of the host's work for the device.

    Args:
        spec: What batches have in common.
        key: The batch to make.
        cached: Images and targets lie on the device (``gpu_cache``) and need not be read.

    Raises:
        DatasetError: A case is missing or damaged.
    """
    draws = draw_batch(spec, key)
    # of the whole batch, so that a sample does not depend on which process makes it
    reaches = [draw.warp.reach(spec.tile) for draw in draws if draw.warp is not None]
    z, y, x = (max(sizes) for sizes in zip(spec.tile, *reaches, strict=True))
    size, draws = (z, y, x), draws[spec.mine]
    lowers = tuple(centred(draw.lower, spec.tile, size) for draw in draws)
    cases = [stored_case(spec.folder, draw.name) for draw in draws]
    where = list(zip(cases, lowers, strict=True))
    voxels = previous = None
    if not cached:
        voxels = Voxels(
            np.stack([read_region(c.data, low, size, multiples=True) for c, low in where]),
            np.array([case.data.steps for case in cases], np.float32),
            np.stack([read_region(c.target, low, size, outside=OUTSIDE) for c, low in where]),
        )
    if spec.previous_labels:
        previous = np.stack(
            [
                _read_previous(spec, key, draw, lower, size)
                for draw, lower in zip(draws, lowers, strict=True)
            ]
        )
    return Regions(
        names=tuple(draw.name for draw in draws),
        lowers=lowers,
        size=size,
        augmentation=spec.augmentation_of(key),
        classes=1 + max(spec.previous_labels, *(_highest_label(case) for case in cases)),
        warps=tuple(draw.warp for draw in draws),
        rngs=tuple(draw.rng for draw in draws),
        voxels=voxels,
        previous=previous,
    )


def centred(lower: Shape, patch: Shape, size: Shape) -> Shape:
    """First voxel of a region of ``size`` about the same centre; sizes differ by even numbers."""
    z, y, x = (low - (s - p) // 2 for low, p, s in zip(lower, patch, size, strict=True))
    return z, y, x


def overlap(shape: Shape, lower: Shape, size: Shape) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Which part of a case a region covers, and where in the region that lies; empty if nowhere.

    Args:
        shape: Voxels of the case ``(z, y, x)``.
        lower: First voxel of the region, maybe outside.
        size: Voxels of the region ``(z, y, x)``.
    """
    source: list[slice] = []
    sink: list[slice] = []
    for n, low, wanted in zip(shape, lower, size, strict=True):
        start = max(low, 0)
        stop = max(min(low + wanted, n), start)
        source.append(slice(start, stop))
        sink.append(slice(start - low, stop - low) if start < stop else slice(0, 0))
    return tuple(source), tuple(sink)


def read_region(
    array: StoredArray,
    lower: Shape,
    size: Shape,
    *,
    outside: int = 0,
    multiples: bool = False,
) -> npt.NDArray[Any]:
    """Copy a region of an array ``(..., Z, Y, X)``.

    Args:
        array: An array of a stored case.
        lower: First voxel of the region, maybe outside.
        size: Voxels of the region ``(z, y, x)``.
        outside: Value beyond the array.
        multiples: Copy the whole numbers on disk instead of what they mean.

    Returns:
        ``(..., *size)``.
    """
    *leading, z, y, x = array.shape
    source, sink = overlap((z, y, x), lower, size)
    every: tuple[slice, ...] = (slice(None),) * len(leading)
    found = array.multiples(every + source) if multiples else array[every + source]
    region = np.full((*leading, *size), outside, found.dtype)
    region[every + sink] = found
    return region


def _highest_label(case: StoredCase) -> int:
    """The highest value that a case's target may have."""
    return max(max(case.foreground, default=0), case.ignore_label or 0)


def _read_previous(
    spec: BatchSpec, key: BatchKey, draw: Draw, lower: Shape, size: Shape
) -> npt.NDArray[np.int8]:
    """Labels of the first stage, spoiled as in training; background outside the case."""
    case = stored_case(spec.folder, draw.name)
    if case.previous is None:
        raise DatasetError(
            f"{spec.folder}: case {draw.name} has no labels of the first stage; train that first"
        )
    previous = read_region(case.previous, lower, size)
    if key.validation:
        return previous
    return corrupt(
        previous,
        spec.previous_labels,
        draw.rng,
        spec.augmentation,
        patch_voxels=math.prod(spec.tile),
    )
