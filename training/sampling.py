"""Patches from preprocessed cases, batch by batch.

Batch i of an epoch depends on (seed, fold, epoch, i) only: its generator is made from
these four numbers, so neither the number of workers nor what was drawn before changes a byte of it.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from training import parallel
from training.augment import NO_AUGMENTATION, OUTSIDE, AugmentationConfig, augment, draw_warp
from training.store import StoredCase, open_case

Foreground = Mapping[int, npt.NDArray[np.integer]]
Shape = tuple[int, int, int]


class BatchKey(NamedTuple):
    """Which batch: the ``number``-th training or validation batch of an epoch."""

    epoch: int
    number: int
    validation: bool = False


class Batch(NamedTuple):
    """``data`` float32 ``(B, C, *patch)`` and ``target`` int8 ``(B, *patch)``, labels from 0."""

    data: npt.NDArray[np.float32]
    target: npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """All that batches of one fold have in common.

    Attributes:
        folder: Preprocessed cases of one configuration.
        train, validation: Names of the fold's cases.
        patch: The network's patch, two or three axes.
        batch: Samples per batch.
        in_plane: Spatial augmentation leaves the slice axis alone.
        masked: For each channel whether it is zero outside the nonzero region.
        foreground_fraction: Share of a batch that is centred on foreground.
        augmentation: Of training batches; validation batches have none.
        seed, fold: First words of every batch's seed.
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

    @property
    def tile(self) -> Shape:
        """The patch as three axes; a 2D patch is one slice thick."""
        z, y, x = (1,) * (3 - len(self.patch)) + self.patch
        return z, y, x


def make_batch(spec: BatchSpec, key: BatchKey) -> Batch:
    """Draw, read and augment one batch."""
    words = [spec.seed, spec.fold, key.epoch, key.number]
    rng = np.random.default_rng([*words, 1] if key.validation else words)
    samples = [
        make_sample(spec, key.validation, index, child)
        for index, child in enumerate(rng.spawn(spec.batch))
    ]
    return Batch(
        np.stack([data for data, _ in samples]), np.stack([target for _, target in samples])
    )


def make_sample(
    spec: BatchSpec, validation: bool, index: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """The ``index``-th sample of a batch: ``(C, *patch)`` and ``(*patch)``."""
    names = spec.validation if validation else spec.train
    augmentation = NO_AUGMENTATION if validation else spec.augmentation
    case = _open(spec.folder, names[int(rng.integers(len(names)))])
    forced = is_forced(index, spec.batch, spec.foreground_fraction)
    z, y, x = case.target.shape
    lower = draw_lower(rng, (z, y, x), case.foreground, spec.tile, forced=forced)
    warp = draw_warp(rng, augmentation, spec.patch, in_plane=spec.in_plane)
    size = spec.tile if warp is None else warp.reach(spec.tile)
    data, target = read_patch(case, centred(lower, spec.tile, size), size)
    data, target = augment(
        data, target, warp, spec.tile, augmentation, rng, two_dimensional=len(spec.patch) == 2
    )
    for channel, masked in enumerate(spec.masked):
        if masked:
            data[channel][target == OUTSIDE] = 0
    np.maximum(target, 0, out=target)
    return data.reshape(-1, *spec.patch), target.reshape(spec.patch)


def is_forced(index: int, batch: int, fraction: float) -> bool:
    """Whether this sample of a batch is centred on foreground: the last ones are, rounded."""
    return index >= round(batch * (1 - fraction))


def draw_lower(
    rng: np.random.Generator, shape: Shape, foreground: Foreground, patch: Shape, *, forced: bool
) -> Shape:
    """First voxel of a patch; negative along an axis where the case is smaller and gets centred.

    Forced: a class that the case has, uniformly, then one of its voxels, which becomes the centre
    as far as the patch stays in the case. A slice (patch one thick) is first drawn among the slices
    with that class, so a slice with much of it is no likelier. Not forced, or no foreground:
    anywhere, uniformly.

    Args:
        rng: Source of the draw.
        shape: Of the case ``(z, y, x)``.
        foreground: Voxels ``(n, 3)`` of each class.
        patch: Size ``(z, y, x)``.
        forced: Whether to centre on foreground.
    """
    span = [size - p for size, p in zip(shape, patch, strict=True)]
    classes = sorted(label for label, voxels in foreground.items() if label > 0 and len(voxels))
    if forced and classes:
        voxels = foreground[classes[int(rng.integers(len(classes)))]]
        if patch[0] == 1:
            slices = np.unique(voxels[:, 0])
            voxels = voxels[voxels[:, 0] == slices[int(rng.integers(len(slices)))]]
        centre = voxels[int(rng.integers(len(voxels)))]
        wanted = [int(c) - p // 2 for c, p in zip(centre, patch, strict=True)]
    else:
        wanted = [int(rng.integers(max(s, 0) + 1)) for s in span]
    z, y, x = (min(max(w, 0), s) if s >= 0 else s // 2 for w, s in zip(wanted, span, strict=True))
    return z, y, x


def centred(lower: Shape, patch: Shape, size: Shape) -> Shape:
    """First voxel of a region of ``size`` about the same centre; sizes differ by even numbers."""
    z, y, x = (low - (s - p) // 2 for low, p, s in zip(lower, patch, size, strict=True))
    return z, y, x


def read_patch(
    case: StoredCase, lower: Shape, size: Shape
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Copy a region of a case; outside the case the image is 0 and the target -1.

    Returns:
        ``(C, *size)`` and ``size``.
    """
    data = np.zeros((case.data.shape[0], *size), np.float32)
    target = np.full(size, OUTSIDE, np.int8)
    bounds = [
        (max(low, 0), min(low + s, n))
        for low, s, n in zip(lower, size, case.target.shape, strict=True)
    ]
    if all(start < stop for start, stop in bounds):
        source = tuple(slice(start, stop) for start, stop in bounds)
        sink = tuple(
            slice(start - low, stop - low) for (start, stop), low in zip(bounds, lower, strict=True)
        )
        data[(slice(None), *sink)] = case.data[(slice(None), *source)]
        target[sink] = case.target[source]
    return data, target


class BatchStream:
    """Batches in the order of their keys, made ahead by worker processes, or on demand by none.

    Use as a context manager: leaving it ends the workers. They also end by themselves when this
    process is killed, and leave Ctrl-C to it.
    """

    def __init__(
        self, spec: BatchSpec, keys: Iterator[BatchKey], *, workers: int, prefetch: int
    ) -> None:
        self._spec = spec
        self._keys = keys
        self._ahead: deque[Future[Batch]] = deque()
        self._depth = max(1, prefetch)
        self._pool: ProcessPoolExecutor | None = None
        if workers > 0:
            # spawn: a fork would copy this process' threads' locks (OpenMP, autograd) in any state
            self._pool = ProcessPoolExecutor(
                workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker
            )

    def __enter__(self) -> BatchStream:
        """Workers start with the first batch."""
        return self

    def __exit__(self, *_: object) -> None:
        """See ``close``."""
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        """Itself: batches are used once."""
        return self

    def __next__(self) -> Batch:
        """The next batch; waits for it if need be."""
        if self._pool is None:
            return make_batch(self._spec, next(self._keys))
        self._fill()
        if not self._ahead:
            raise StopIteration
        batch = self._ahead.popleft().result()
        self._fill()  # so that the workers go on while this batch is being used
        return batch

    def _fill(self) -> None:
        assert self._pool is not None
        while len(self._ahead) < self._depth and (key := next(self._keys, None)) is not None:
            self._ahead.append(self._pool.submit(make_batch, self._spec, key))

    def restart(self, keys: Iterator[BatchKey]) -> None:
        """Forget the batches made ahead and go on with these."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._keys = keys

    def close(self) -> None:
        """End the workers; waits for the batches in hand."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


@functools.lru_cache(maxsize=1024)
def _open(folder: Path, name: str) -> StoredCase:
    return open_case(folder, name)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parallel.end_with_parent()
