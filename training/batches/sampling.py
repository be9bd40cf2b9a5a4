"""Which part of which case a batch is made of, and reading it from the store.

Batch i of an epoch depends on (seed, fold, epoch, i) only: its generator is made from
these four numbers, so neither the number of workers nor what was drawn before changes a byte of it.
Worker processes run ``make_patches`` (the host augments) or ``read_regions`` (the training device
does); what becomes of their results is the business of ``batches``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ichseg.errors import DatasetError, TrainingError
from training.batches.augment_cascade import corrupt
from training.batches.augmentation import (
    NO_AUGMENTATION,
    OUTSIDE,
    AugmentationConfig,
    Warp,
    draw_warp,
)
from training.store.chunks import StoredArray, StoredCase, open_case

Foreground = Mapping[int, npt.NDArray[np.integer]]
Shape = tuple[int, int, int]


class BatchKey(NamedTuple):
    """Which batch: the ``number``-th training or validation batch of an epoch."""

    epoch: int
    number: int
    validation: bool = False


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """All that batches of one fold have in common.

    Attributes:
        folder: Preprocessed cases of one configuration.
        train, validation: Names of the fold's cases.
        patch: The network's patch, two or three axes.
        batch: Samples per batch, of all processes together.
        in_plane: Spatial augmentation leaves the slice axis alone.
        masked: For each channel whether it is zero outside the nonzero region.
        foreground_fraction: Share of a batch that is centred on foreground (foreground
            oversampling).
        augmentation: How training batches are augmented; validation batches never are.
        seed, fold: First words of every batch's seed.
        centre_jitter: How far the chosen foreground may lie from a patch's centre, see
            ``draw_lower``.
        previous_labels: Foreground classes of a cascade's first stage, which become channels.
        share: Number of this process and how many there are: each makes its part of each batch.
    """

    folder: Path
    train: tuple[str, ...]
    validation: tuple[str, ...]
    patch: tuple[int, ...]
    batch: int
    in_plane: bool
    masked: tuple[bool, ...]
    foreground_fraction: float
    augmentation: AugmentationConfig
    seed: int
    fold: int
    centre_jitter: float = 0.0
    previous_labels: int = 0
    share: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        rank, world = self.share
        if not 0 <= rank < world:
            raise TrainingError(f"share {rank} of {world} processes, expected 0 to {world - 1}")
        if self.batch % world:
            raise TrainingError(
                f"a batch of {self.batch} over {world} processes, expected a multiple of {world}"
            )

    @property
    def tile(self) -> Shape:
        """The patch as three axes; a 2D patch is one slice thick."""
        z, y, x = (1,) * (3 - len(self.patch)) + self.patch
        return z, y, x

    def augmentation_of(self, key: BatchKey) -> AugmentationConfig:
        """How samples of this batch are augmented: not at all if it is for validation."""
        return NO_AUGMENTATION if key.validation else self.augmentation

    @property
    def mine(self) -> slice:
        """The samples of a batch that this process makes."""
        rank, world = self.share
        count = self.batch // world
        return slice(rank * count, (rank + 1) * count)


class Draw(NamedTuple):
    """One sample as drawn, before anything is read.

    Attributes:
        name: The case's name.
        lower: First voxel ``(z, y, x)`` of the patch, were it not warped.
        warp: The sample's spatial change, or None.
        rng: Source of all further draws.
    """

    name: str
    lower: Shape
    warp: Warp | None
    rng: np.random.Generator


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
        lower, case = centred(draw.lower, spec.tile, size), _open(spec.folder, draw.name)
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
    cases = [_open(spec.folder, draw.name) for draw in draws]
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


def _highest_label(case: StoredCase) -> int:
    """The highest value that a case's target may have."""
    return max(max(case.foreground, default=0), case.ignore_label or 0)


def draw_batch(spec: BatchSpec, key: BatchKey) -> list[Draw]:
    """Draw all samples of a batch, also those of other processes."""
    words = [spec.seed, spec.fold, key.epoch, key.number]
    rng = np.random.default_rng([*words, 1] if key.validation else words)
    return [
        _draw_sample(spec, key, index, child) for index, child in enumerate(rng.spawn(spec.batch))
    ]


def _draw_sample(spec: BatchSpec, key: BatchKey, index: int, rng: np.random.Generator) -> Draw:
    names = spec.validation if key.validation else spec.train
    name = names[int(rng.integers(len(names)))]
    case = _open(spec.folder, name)
    z, y, x = case.target.shape
    lower = draw_lower(
        rng,
        (z, y, x),
        case.foreground,
        spec.tile,
        on_foreground=is_oversampled(index, spec.batch, spec.foreground_fraction),
        annotated=case.annotated,
        jitter=spec.centre_jitter,
    )
    warp = draw_warp(rng, spec.augmentation_of(key), spec.patch, in_plane=spec.in_plane)
    return Draw(name, lower, warp, rng)


def is_oversampled(index: int, batch: int, fraction: float) -> bool:
    """Whether this sample of a batch is centred on foreground: the last ones are, rounded."""
    return index >= round(batch * (1 - fraction))


def draw_lower(
    rng: np.random.Generator,
    shape: Shape,
    foreground: Foreground,
    patch: Shape,
    *,
    on_foreground: bool,
    annotated: npt.NDArray[np.integer] | None = None,
    jitter: float = 0.0,
) -> Shape:
    """First voxel of a patch; negative along an axis where the case is smaller and gets centred.

    On foreground: a class that the case has is drawn uniformly, then one of its voxels, which
    becomes the centre as far as the patch stays in the case. A slice (patch one thick) is first
    drawn among the slices with that class, so a slice with much of it is no likelier. Otherwise, or
    where the case has no foreground, the patch lies anywhere, uniformly; but where voxels are to be
    ignored, it is centred on one that is not.

    Args:
        rng: Source of the draw.
        shape: Voxels of the case ``(z, y, x)``.
        foreground: Voxels ``(n, 3)`` of each class.
        patch: Size ``(z, y, x)``.
        on_foreground: Whether to centre the patch on foreground (foreground oversampling).
        annotated: Voxels ``(n, 3)`` that are not to be ignored; None where none is.
        jitter: How far from the centre that voxel may lie, uniformly along each axis, as a fraction
            of the way to the patch's border: 0 is the centre always (the reference's way), with 1
            it may lie anywhere in the patch.
    """
    span = [size - p for size, p in zip(shape, patch, strict=True)]
    classes = sorted(label for label, voxels in foreground.items() if label > 0 and len(voxels))
    voxels = annotated
    if on_foreground and classes:
        voxels = foreground[classes[int(rng.integers(len(classes)))]]
    if voxels is not None and len(voxels):
        if patch[0] == 1:
            slices = np.unique(voxels[:, 0])
            voxels = voxels[voxels[:, 0] == slices[int(rng.integers(len(slices)))]]
        centre = voxels[int(rng.integers(len(voxels)))]
        wanted = [int(c) - _draw_offset(rng, p, jitter) for c, p in zip(centre, patch, strict=True)]
    else:
        wanted = [int(rng.integers(max(s, 0) + 1)) for s in span]
    z, y, x = (min(max(w, 0), s) if s >= 0 else s // 2 for w, s in zip(wanted, span, strict=True))
    return z, y, x


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


def _draw_offset(rng: np.random.Generator, size: int, jitter: float) -> int:
    """Where along an axis of the patch the chosen voxel lies."""
    before, after = size // 2, size - 1 - size // 2
    return before + int(rng.integers(-int(jitter * before), int(jitter * after) + 1))


def _read_previous(
    spec: BatchSpec, key: BatchKey, draw: Draw, lower: Shape, size: Shape
) -> npt.NDArray[np.int8]:
    """Labels of the first stage, spoiled as in training; background outside the case."""
    case = _open(spec.folder, draw.name)
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


@functools.lru_cache(maxsize=1024)
def _open(folder: Path, name: str) -> StoredCase:
    return open_case(folder, name)
