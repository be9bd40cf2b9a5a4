"""Batches as tensors on the training device, made ahead of their use.

Two engines augment. ``host``: worker processes make whole patches. ``device``: they only draw and
read (or only draw, when all cases are in the device's memory) and the device augments. Either way
one thread of this process brings batches to the device, on a CUDA stream of its own, while the
network is busy with an earlier one. A batch counts as ready when it is there, so the seconds spent
in ``next`` are all that training waits for data.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from ichseg.errors import TrainingError
from training.batches.augment_device import augment_batch
from training.batches.augmentation import OUTSIDE
from training.batches.gpu_cache import GpuCache, cut_regions, fill_cache
from training.batches.reading import (
    Patches,
    Regions,
    begin_worker,
    make_patches,
    read_regions,
)
from training.batches.sampling import BatchKey, BatchSpec


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Who makes batches, and how far ahead.

    Attributes:
        engine: Who augments: ``host`` (the workers), ``device``, or ``auto`` (the device where that
            is a GPU).
        workers: Processes that make batches; with 0 they are made in between.
        prefetch: Batches made ahead.
        gpu_cache: Whether all cases are kept on the device that augments: ``yes``, ``no``, or
            ``auto`` (on a GPU where they leave it enough for training).
    """

    engine: str = "auto"
    workers: int = 1
    prefetch: int = 4
    gpu_cache: str = "auto"


class Batch(NamedTuple):
    """``data`` float32 ``(B, C, *patch)`` and ``target`` int8 ``(B, *patch)``, labels from 0.

    The label above the last one marks voxels to be ignored, where a dataset has such.

    In a cascade's second stage C counts the image's channels, then one for each foreground class of
    the first stage: 1 where it was found.
    """

    data: Tensor
    target: Tensor


def open_batches(
    spec: BatchSpec,
    keys: Iterator[BatchKey],
    options: StreamOptions,
    device: torch.device,
    layout: torch.memory_format = torch.contiguous_format,
) -> BatchStream:
    """Batches in the order of their keys, on the device.

    Args:
        spec: What the batches have in common.
        keys: The batches to make, in this order; may be endless.
        options: Who makes the batches, and how far ahead.
        device: Where the batches are wanted.
        layout: Memory format of the data.

    Raises:
        IchsegError: Cases are missing, or are to stay on the device and don't fit.
    """
    make: Callable[[BatchKey], Patches | Regions]
    finish: Callable[[Any], Batch]
    if choose_engine(options.engine, device) == "host":
        if options.gpu_cache == "yes":
            raise TrainingError(
                f"gpu_cache is yes, but on {device.type} the workers augment; add "
                "--augmentation-engine device"
            )
        make = functools.partial(make_patches, spec)
        finish = functools.partial(_place_patches, spec, device, layout)
    else:
        names = spec.train + spec.validation
        cases = fill_cache(spec.folder, names, device, options.gpu_cache, spec.training_bytes)
        make = functools.partial(read_regions, spec, cached=cases is not None)
        finish = functools.partial(_augment_regions, spec, device, layout, cases)
    return BatchStream(
        make, finish, keys, device, workers=options.workers, prefetch=options.prefetch
    )


def choose_engine(wanted: str, device: torch.device) -> str:
    """``host`` or ``device``: which of them augments where ``wanted`` may also be ``auto``."""
    if wanted != "auto":
        return wanted
    return "device" if device.type == "cuda" else "host"


class BatchStream:
    """Batches in the order of their keys, made ahead by worker processes, or on demand by none.

    Use as a context manager: leaving it ends the workers. They also end by themselves when this
    process is killed, and leave Ctrl-C to it.

    Attributes:
        waited_s: Seconds spent in ``next`` so far.
    """

    def __init__(
        self,
        make: Callable[[BatchKey], Any],
        finish: Callable[[Any], Batch],
        keys: Iterator[BatchKey],
        device: torch.device,
        *,
        workers: int,
        prefetch: int,
    ) -> None:
        """Prepare to make batches.

        Args:
            make: Draws and reads a batch; runs in the workers.
            finish: Makes a batch on the device of what ``make`` returned; runs in this process.
            keys: The batches to make, in this order; may be endless.
            device: Where the batches are wanted.
            workers: Processes that run ``make``; with 0 it runs in this one.
            prefetch: Batches made ahead.
        """
        self.waited_s = 0.0
        self._make, self._finish, self._keys = make, finish, keys
        self._ahead: deque[tuple[Future[Any], Future[Batch]]] = deque()
        self._depth = max(1, prefetch)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool: ProcessPoolExecutor | None = None
        if workers > 0:
            # spawn: a fork would copy this process' threads' locks (OpenMP, autograd) in any state
            self._pool = ProcessPoolExecutor(
                workers, mp_context=multiprocessing.get_context("spawn"), initializer=begin_worker
            )
            gpu: int | None = None
            if device.type == "cuda":
                gpu = torch.cuda.current_device() if device.index is None else device.index
            self._thread = ThreadPoolExecutor(
                1, initializer=_begin_thread, initargs=(torch.get_num_threads(), gpu)
            )

    def __enter__(self) -> BatchStream:
        """Workers start with the first batch."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers, see ``close``."""
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        """The stream itself: batches are used once."""
        return self

    def __next__(self) -> Batch:
        """The next batch; waits for it if need be."""
        began = time.perf_counter()
        try:
            batch = self._next()
        finally:
            self.waited_s += time.perf_counter() - began
        if self._stream is not None:  # its memory must not be used anew before the network is done
            for tensor in batch:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return batch

    def _next(self) -> Batch:
        if self._pool is None:
            return self._bring(self._make(next(self._keys)))
        self._fill()
        if not self._ahead:
            raise StopIteration
        batch = self._ahead.popleft()[1].result()
        self._fill()  # so that the workers go on while this batch is being used
        return batch

    def _fill(self) -> None:
        assert self._pool is not None
        while len(self._ahead) < self._depth and (key := next(self._keys, None)) is not None:
            made = self._pool.submit(self._make, key)
            self._ahead.append((made, self._thread.submit(self._receive, made)))

    def _receive(self, made: Future[Any]) -> Batch:
        return self._bring(made.result())

    def _bring(self, made: Any) -> Batch:
        """What a worker made, as a batch that is ready on the device."""
        if self._stream is None:
            return self._finish(made)
        with torch.cuda.stream(self._stream):
            batch = self._finish(made)
            self._stream.synchronize()  # the device goes on with the network meanwhile
        return batch

    def restart(self, keys: Iterator[BatchKey]) -> None:
        """Forget the batches made ahead and go on with these."""
        for made, ready in self._ahead:
            ready.cancel()
            made.cancel()
        self._ahead.clear()
        self._keys = keys

    def close(self) -> None:
        """End the workers; waits for the batches in hand."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._thread.shutdown(wait=True, cancel_futures=True)


def _begin_thread(threads: int, gpu: int | None) -> None:
    """Give a thread what torch keeps for each: its number of threads, and the current GPU.

    The latter begins as the first one, on which each of several processes would open a context.
    """
    torch.set_num_threads(threads)
    if gpu is not None:
        torch.cuda.set_device(gpu)


def _place_patches(
    spec: BatchSpec, device: torch.device, layout: torch.memory_format, made: Patches
) -> Batch:
    """Finish what the host has augmented."""
    return _finish(spec, layout, _send(made.data, device), _send(made.labels, device))


def _augment_regions(
    spec: BatchSpec,
    device: torch.device,
    layout: torch.memory_format,
    cases: GpuCache | None,
    made: Regions,
) -> Batch:
    """Augment on the device what has been read, or lies there."""
    if made.voxels is not None:
        multiples, steps, target = (_send(array, device) for array in made.voxels)
    else:
        assert cases is not None
        multiples, steps, target = cut_regions(cases, made.names, made.lowers, made.size)
    data = multiples.to(torch.float32).mul_(steps[:, :, None, None, None])
    labels = [target] if made.previous is None else [target, _send(made.previous, device)]
    patches = augment_batch(
        data,
        torch.stack(labels, 1),
        made.warps,
        spec.tile,
        made.augmentation,
        made.rngs,
        classes=made.classes,
        in_plane=spec.in_plane,
    )
    return _finish(spec, layout, *patches)


def _finish(spec: BatchSpec, layout: torch.memory_format, data: Tensor, labels: Tensor) -> Batch:
    """Masked channels, channels of the first stage, and the patch's own axes.

    Args:
        spec: What the batches have in common.
        layout: Memory format of the result.
        data: ``(B, C, *tile)``; altered.
        labels: int8 ``(B, L, *tile)``.
    """
    target = labels[:, 0]
    for channel, masked in enumerate(spec.masked):
        if masked:
            data[:, channel].masked_fill_(target == OUTSIDE, 0)
    if spec.previous_labels:
        found = [labels[:, 1] == label for label in range(1, spec.previous_labels + 1)]
        data = torch.cat([data, torch.stack(found, 1).to(data.dtype)], 1)
    shape = spec.patch
    data = data.reshape(*data.shape[:2], *shape).contiguous(memory_format=layout)
    return Batch(data, target.clamp(min=0).reshape(-1, *shape))


def _send(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device; through pinned memory, from where CUDA copies in the background."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
