"""Hands jobs to a place as soon as what they wait for is done.

A job that fails stops those that wait for it and no other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from graphlib import TopologicalSorter
from typing import Protocol

from ichseg.errors import IchsegError, TrainingError
from ichseg.wording import counted
from training.jobs.command import Ending
from training.jobs.job import Job

_log = logging.getLogger(__name__)


class Place(Protocol):
    """Where jobs run."""

    def submit(self, job: Job) -> None:
        """Run a job as soon as there is room for it."""

    def wait(self) -> Sequence[tuple[Job, Ending]]:
        """Wait for jobs to end; there may be none yet, so that the caller can look around."""

    def stop(self) -> None:
        """Tell all jobs that run to end, and begin no other; may be called by a signal handler."""


class Watcher(Protocol):
    """Who is told how jobs stand."""

    def waits(self, jobs: Sequence[Job]) -> None:
        """These are to be done, some of which may be done already."""

    def is_done(self, job: Job, words: str) -> None:
        """A job need not be run; the words say why."""

    def is_ready(self, job: Job) -> None:
        """A job is handed to its place."""

    def ended(self, job: Job, ending: Ending) -> None:
        """A job has ended."""


def work(
    jobs: Sequence[Job],
    done: Callable[[Job], str],
    place: Place,
    watcher: Watcher,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Do all jobs, each after those that it waits for.

    Args:
        jobs: In an order in which they could be done one by one; names in their ``after`` that are
            not among them count as done.
        done: What shows that a job need not be run, asked when those before it are done; empty if
            it must be.
        place: Where they run.
        watcher: Is told.
        stopped: Whether a signal has come; then nothing is begun, and what runs is waited for.

    Returns:
        Whether all are done; False after a signal.

    Raises:
        TrainingError: Some failed; it names them. All that wait for none of these are done.
        IchsegError: ``done`` refused something; what runs is told to end and waited for.
    """
    by_name = {job.name: job for job in jobs}
    order = {name: position for position, name in enumerate(by_name)}
    sorter = TopologicalSorter(
        {job.name: [name for name in job.after if name in by_name] for job in jobs}
    )
    sorter.prepare()
    watcher.waits(jobs)
    failures: dict[str, str] = {}
    running = 0
    finished = 0
    try:
        while sorter.is_active():
            passed_over = False
            for name in sorted(sorter.get_ready(), key=order.__getitem__):
                if stopped():
                    continue
                job = by_name[name]
                if words := done(job):
                    watcher.is_done(job, words)
                    sorter.done(name)
                    finished, passed_over = finished + 1, True
                else:
                    watcher.is_ready(job)
                    place.submit(job)
                    running += 1
            if passed_over:
                continue
            if not running:
                break
            for job, ending in place.wait():
                running -= 1
                watcher.ended(job, ending)
                if ending.status == 0:
                    sorter.done(job.name)
                    finished += 1
                else:
                    failures[job.name] = ending.reason
    except BaseException as error:
        place.stop()
        while running and isinstance(error, IchsegError):
            running -= len(place.wait())
        raise
    if stopped():
        return False
    if failures:
        left = len(jobs) - finished - len(failures)
        more = f"; {counted(left, 'job')} not begun" if left else ""
        reasons = "; ".join(f"{n}: {failures[n]}" for n in by_name if n in failures)
        raise TrainingError(
            f"{len(failures)} of {counted(len(jobs), 'job')} failed: {reasons}{more}"
        )
    return True
