"""What a run shows: each line that a job says, and at a terminal a table of all jobs below them."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from ichseg.wording import clock, counted
from training.fit.progress import live_lines
from training.jobs.command import Ending
from training.jobs.job import Job

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

# What of a line tells how far a job is: an epoch or a case with its ETA, or a count of cases.
_HOW_FAR = (
    re.compile(r"(epoch \d+/\d+) .*(ETA [\d:]+)"),
    re.compile(r"(validation \d+/\d+) .*(ETA [\d:]+)"),
    re.compile(r"\w: (\d+ of \d+ cases)(?:, (about .* left))?"),
)

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    where: str
    began: float
    how_far: str = ""


class Board:
    """Who is told how jobs stand, and shows it. Its methods may be called from any thread."""

    def __init__(self, live: Live | None = None) -> None:
        """Prepare to show.

        Args:
            live: Where the table goes; None where there is no terminal.
        """
        self._live = live
        self._lock = threading.RLock()
        self._waiting: list[str] = []
        self._running: dict[str, _Running] = {}
        self._done, self._failed = 0, dict[str, str]()

    def waits(self, jobs: Sequence[Job]) -> None:
        """These are to be done."""
        with self._lock:
            self._waiting += [job.name for job in jobs]
        self._show()

    def is_done(self, job: Job, words: str) -> None:
        """A job need not be run."""
        with self._lock:
            self._waiting.remove(job.name)
            self._done += 1
        _log.info("== %s: done, %s", job.name, words)
        self._show()

    def is_ready(self, job: Job) -> None:
        """A job is handed to its place; its command can be run by hand as well."""
        _log.info("\n== %s:\n%s", job.name, job.line)

    def begins(self, job: Job, where: str) -> None:
        """A job begins; ``where`` is empty where there is one place only."""
        with self._lock:
            if job.name in self._waiting:
                self._waiting.remove(job.name)
            self._running[job.name] = _Running(where, time.monotonic())
        if where:
            _log.info("%s: begins on %s", job.name, where)
        self._show()

    def hear(self, job: Job, line: str) -> None:
        """A job has said something."""
        _log.info("%s: %s", job.name, line)
        found = how_far(line)
        with self._lock:
            if found and job.name in self._running:
                self._running[job.name].how_far = found
        if found:
            self._show()

    def ended(self, job: Job, ending: Ending) -> None:
        """A job has ended."""
        with self._lock:
            self._running.pop(job.name, None)
            if job.name in self._waiting:
                self._waiting.remove(job.name)
            if ending.status == 0:
                self._done += 1
            else:
                self._failed[job.name] = ending.reason
        if ending.status:
            _log.error("%s: failed: %s", job.name, ending.reason)
        self._show()

    def table(self) -> Table:
        """All jobs: what runs where, how far it is, what has failed, what waits."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, expand=False)
        for heading in ("job", "where", "since", "how far"):
            table.add_column(heading, no_wrap=True, overflow="ellipsis")
        with self._lock:
            now = time.monotonic()
            for name, running in self._running.items():
                table.add_row(
                    Text(name), Text(running.where), clock(now - running.began), running.how_far
                )
            for name, reason in self._failed.items():
                table.add_row(Text(name, style="red"), "failed", "", Text(reason))
            shown = ", ".join(self._waiting[:3]) + (" ..." if len(self._waiting) > 3 else "")
            table.caption = f"{counted(self._done, 'job')} done, {len(self._waiting)} waiting" + (
                f": {shown}" if shown else ""
            )
        return table

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self.table(), refresh=True)


@contextlib.contextmanager
def shown(stream: TextIO | None = None) -> Iterator[Board]:
    """A board whose table stands below the lines of the log, if the stream is a terminal."""
    with live_lines(sys.stderr if stream is None else stream) as live:
        yield Board(live)


def how_far(line: str) -> str:
    """What a line says of how far its job is; empty if nothing."""
    for pattern in _HOW_FAR:
        if found := pattern.search(line):
            return "  ".join(part for part in found.groups() if part)
    return ""
