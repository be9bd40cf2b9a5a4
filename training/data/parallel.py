"""The same work on many cases: worker processes, how many of them, and how far they are."""

from __future__ import annotations

import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from pathlib import Path
from typing import TextIO, TypeVar

from ichseg.engine import machine
from ichseg.errors import DatasetError, InputError
from ichseg.wording import duration
from ichseg.workers import end_with_parent

_PLAIN_LINE_S = 10.0  # between two lines of progress in a log file
_MEMORY_SHARE = 0.8  # of what is free; the rest is for the parent process and the file cache

Item = TypeVar("Item")
T = TypeVar("T")


def load_early(module: str) -> None:
    """Have workers begin with this module loaded, and begin to load it at once.

    They are forked from a process that loads it a single time. It does so meanwhile, beside all
    that this process does before it has work for them.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([module])
    forkserver.ensure_running()


def each_case(
    function: Callable[..., T],
    cases: Sequence[Item],
    *shared: object,
    workers: int,
) -> Iterator[tuple[Item, T | Exception]]:
    """Run ``function(case, *shared)`` over all cases in parallel processes, in order of completion.

    A case that fails yields its exception in place of a result and stops no other. With one worker
    everything runs in this process. Workers end at once on Ctrl-C, and when this process is killed.

    Args:
        function: What to call; it must lie in a module that the workers can import.
        cases: What to call it with, one call each.
        shared: Further arguments, the same in all calls.
        workers: How many processes to run.

    Raises:
        DatasetError: A worker process was killed, most often for want of memory.
    """
    if workers < 1:
        raise DatasetError(f"{workers} workers, expected at least 1")
    if workers == 1:
        for case in cases:
            try:
                yield case, function(case, *shared)
            except Exception as error:  # whatever it is, the other cases go on
                yield case, error
        return
    # forkserver: no copy of this process' threads and memory, and its modules load only once
    load_early(function.__module__)
    with ProcessPoolExecutor(
        min(workers, max(1, len(cases))),
        mp_context=multiprocessing.get_context("forkserver"),
        initializer=_begin_worker,
    ) as pool:
        waiting: dict[Future[T], Item] = {
            pool.submit(function, case, *shared): case for case in cases
        }
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    case, failure = waiting.pop(future), future.exception()
                    if isinstance(failure, BrokenProcessPool):
                        raise DatasetError(
                            "a worker process was killed, perhaps for want of memory; "
                            "try fewer --workers"
                        ) from failure
                    yield case, failure if isinstance(failure, Exception) else future.result()
        finally:  # interrupted: the cases that have not begun never do
            # Waits, as the end of this process would in any case: the thread that manages the
            # workers closes its pipe when they have ended, and Python writes to it at its end.
            pool.shutdown(cancel_futures=True)


def workers_for(volumes: Sequence[Path], bytes_per_voxel: int, bytes_beside: int) -> int:
    """How many processes to run: one a core or a file, fewer where memory would not suffice.

    Args:
        volumes: The files to be worked on. Each process is taken to hold the largest, by its
            header; one that cannot be read does not count, since whoever reads it says so.
        bytes_per_voxel: Memory that a process holds for each voxel of a volume, at its peak.
        bytes_beside: Memory that it holds besides, libraries included.
    """
    most, free = min(machine.cpus(), len(volumes)), machine.free_memory_bytes()
    if free is not None and most > 1:
        largest = max(_stored_voxels(path) for path in volumes)
        needed = bytes_beside + largest * bytes_per_voxel
        most = min(most, int(_MEMORY_SHARE * free) // needed)
    return max(1, most)


def _stored_voxels(path: Path) -> int:
    from ichseg.scan import volume  # not above: it loads numpy, before a command sets its threads

    try:
        return math.prod(volume.stored_shape(path))
    except InputError:
        return 0


def with_progress(
    results: Iterator[T], total: int, doing: str, stream: TextIO | None = None
) -> Iterator[T]:
    """Pass results on and tell how many there are and how long the others will take.

    At a terminal that is one line, gone while a result is dealt with, so that whatever else is
    written stands on lines of its own. Elsewhere it is a plain line every ten seconds.

    Args:
        results: One result a case, as ``each_case`` yields them.
        total: How many results to expect.
        doing: What is being done, such as ``verify``.
        stream: Where to write; stderr by default.
    """
    stream = sys.stderr if stream is None else stream
    terminal = stream.isatty()
    started = told = time.monotonic()
    try:
        if terminal:
            stream.write(f"{doing}: 0 of {total} cases")
            stream.flush()
        for done, result in enumerate(results, start=1):
            if terminal:
                stream.write("\r\x1b[K")
            yield result
            now = time.monotonic()
            line = f"{doing}: {done} of {total} cases"
            if done < total:
                line += f", about {duration((now - started) / done * (total - done))} left"
            if terminal:
                stream.write(line)
                stream.flush()
            elif now - told >= _PLAIN_LINE_S:
                stream.write(line + "\n")
                stream.flush()
                told = now
    finally:
        if terminal:
            stream.write("\r\x1b[K")
            stream.flush()


def _begin_worker() -> None:
    # Ctrl-C reaches the workers too. They end without a traceback; files appear whole or not at all
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()
