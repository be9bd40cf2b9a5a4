"""Many scans through one ensemble: while networks run on one, others are read and written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ichseg.errors import DeviceError, IchsegError, InputError, WeightsError
from ichseg.overlap import overlapping
from ichseg.predict import memory
from ichseg.predict.components import Segmentation
from ichseg.predict.ensemble import Ensemble, Kept, Predicted, Prepared, of_scan
from ichseg.predict.memory import Need
from ichseg.predict.restore import check_threshold
from ichseg.scan import images
from ichseg.scan.reader import Scan


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one of many scans.

    Attributes:
        image: The scan as it was given.
        found: What was found; None if it could not be segmented.
        error: Why not; None if it was.
    """

    image: Any
    found: Segmentation | None
    error: IchsegError | None = None

    @classmethod
    def of(cls, image: Any, ended: Segmentation | IchsegError) -> Outcome:
        """The outcome of a scan that has ended."""
        return cls(image, None, ended) if isinstance(ended, IchsegError) else cls(image, ended)


@dataclass(frozen=True, slots=True)
class _Opened:
    """One of many scans, read and prepared."""

    scan: Scan
    need: Need
    prepared: Prepared


def segment_many(
    ensemble: Ensemble,
    scans: Iterable[Any],
    preset: str = "full",
    progress: Callable[[int, int, int], None] | None = None,
    *,
    save: Callable[[Any, Segmentation], object] | None = None,
    spacing_mm: Sequence[float] | None = None,
    axes: str = "zyx",
    probabilities: bool = False,
    threshold: float | None = None,
) -> Iterator[Outcome]:
    """Segment one scan after another; while networks run on one, others are read and written.

    Results come in the order of the scans. One that cannot be segmented does not stop the
    others: its outcome has an error. Leave the loop to stop, or raise in ``progress``.

    Args:
        ensemble: The networks.
        scans: What ``segment`` takes, of any kinds: paths, volumes, images of nibabel and
            SimpleITK, arrays. Of an iterator at most three are taken that have no result yet.
        preset: ``full``, ``balanced`` or ``fast``.
        progress: Called with (number of the scan from 0, forward passes done, all of its
            forward passes) after each.
        save: Called with what was given and what was found, in a thread that writes while
            the networks go on.
        spacing_mm: The voxel size of every numpy array, along each axis in its order; arrays of
            different sizes are given as a ``Volume`` each.
        axes: The order of every numpy array, ``zyx`` or ``xyz``, see ``images.as_scan``.
        probabilities: Whether results have the probabilities of each label, as float16.
        threshold: See ``finish``.

    Raises:
        InputError: ``scans`` is a single scan, or the threshold is none.
        WeightsError: A network's file is not finite or does not fit its plan.
        DeviceError: A GPU's memory does not even hold one tile, or the GPU is lost.
    """
    if images.is_one(scans):
        raise InputError(f"one {type(scans).__name__}, expected several scans, such as a list")
    check_threshold(threshold)
    base = ensemble.program_bytes()
    kept: Kept | None = "float16" if probabilities else None

    @_or_error
    def open_one(numbered: tuple[int, Any]) -> _Opened:
        _, image = numbered
        name = images.name_of(image)
        is_array = isinstance(image, np.ndarray)  # other kinds say their spacing themselves
        scan = images.as_scan(
            image,
            spacing_mm=spacing_mm if is_array else None,
            axes=axes,
            check_size=lambda n: memory.refuse_beyond_memory(name, base + 2 * n, "voxels"),
        )
        scan = ensemble.in_hu(scan, name)
        plan = ensemble.plan(scan, preset)
        need = ensemble.need(
            plan, file_bytes=images.bytes_of(image), probabilities=kept, singly=False
        )
        memory.refuse_beyond_memory(name, base + need.alone, scan.grid)
        return _Opened(scan, need, ensemble.prepare(plan))

    @_or_error
    def run(numbered: tuple[int, Any], opened: _Opened) -> tuple[Scan, Predicted]:
        count = functools.partial(progress, numbered[0]) if progress else None
        return opened.scan, ensemble.predict(opened.prepared, count, need=opened.need)

    @_or_error
    def finish(numbered: tuple[int, Any], done: tuple[Scan, Predicted]) -> Segmentation:
        scan, predicted = done
        found = of_scan(ensemble.finish(predicted, probabilities=kept, threshold=threshold), scan)
        predicted.parts.clear()  # the scores' memory is of use to others
        if save is not None:
            save(numbered[1], found)
        return found

    def may_open(
        following: tuple[int, Any], now: tuple[int, Any], need: Need | None, behind: Need | None
    ) -> bool:
        size, following_size = images.bytes_of(now[1]), images.bytes_of(following[1])
        return memory.may_open(need, behind, base, file_bytes=size, next_bytes=following_size)

    yield from overlapping(
        enumerate(scans),
        open_one=open_one,
        run=run,
        finish=lambda numbered, done: Outcome.of(numbered[1], finish(numbered, done)),
        weigh=lambda opened: opened.need if isinstance(opened, _Opened) else None,
        may_open=may_open,
        beside=lambda need: need is None or memory.gpu_holds_two(need, ensemble.engine),
    )


def _or_error(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give back what goes wrong with one scan, and hand it on; what concerns all is raised."""

    @functools.wraps(function)
    def guarded(numbered: tuple[int, Any], *given: Any) -> Any:
        if given and isinstance(given[0], IchsegError):
            return given[0]
        try:
            return function(numbered, *given)
        except (WeightsError, DeviceError):
            raise
        except IchsegError as error:
            return error
        except MemoryError:
            return InputError(f"{images.name_of(numbered[1])}: out of memory")

    return guarded
