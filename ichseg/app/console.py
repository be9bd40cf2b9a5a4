"""What a run says: plain lines on stderr, the last of which tells why it failed if it did.

The platform keeps 500 lines, so a case takes a few, however long it takes. At a terminal a progress
line is rewritten in place.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from ichseg.wording import duration

_CLEAR = "\r\x1b[K"  # a progress line that stands there
_MOST_LINES = 20  # of progress, for each case, where lines stay
_EVERY_S = 60.0
_FORETOLD_AFTER_S = 1.0  # a single pass may take several times as long as the next
_sink: Callable[[str], object] | None = None
_writing = threading.Lock()


def divert(sink: Callable[[str], object] | None) -> None:
    """Give each line of this process to a function, in place of writing it; None writes again."""
    global _sink
    _sink = sink


def say(text: str) -> None:
    """Write one plain line.

    Whatever would not print is escaped: a file name may hold a line break, with which it could
    forge a line, or bytes that are no text.
    """
    plain = _plain(text)
    if _sink is not None:
        _sink(plain)
        return
    with _writing:
        _write_line(plain)


def fail(reason: str) -> int:
    """Say why a run fails, as its last line.

    Returns:
        The exit status.
    """
    say(f"error: {reason.strip()}")
    return 1


def end_with(reason: str, status: int) -> NoReturn:
    """Say why the process ends, as its last line, and end it, whatever its threads are at."""
    _writing.acquire(timeout=1.0)  # and never released: what they would say comes too late
    _write_line(_plain(f"error: {reason.strip()}"))
    os._exit(status)


def say_traceback() -> None:
    """Write where the exception that is being handled came from: it is a fault of ours."""
    for line in traceback.format_exc().splitlines():
        say(f"  | {line}")


class Progress:
    """Forward passes done and time left: rewritten each second at a terminal, else a few lines.

    Args:
        budget_s: After which no more of them run.
    """

    def __init__(self, budget_s: float | None = None) -> None:
        self.began = self.said = time.monotonic()
        self.until = None if budget_s is None else self.began + budget_s
        self.first = 0  # passes done when the clock began: the first ones also warm up
        self.last = 0  # passes done when last told
        self.share = 0.0  # of the passes, when it was last said
        self.foretold = False  # whether it has been said how long they will take

    def __call__(self, done: int, total: int) -> None:
        """Say how long it will take once some of them tell it, then how far it is."""
        now = time.monotonic()
        if self.first == 0 or done < self.last:  # at first, or begun anew on another device
            self.began, self.first, self.last, self.share = now, done, done, 0.0
            self.foretold = False
            return
        self.last = done
        left_s = (now - self.began) / (done - self.first) * (total - done)
        planned = ""
        if self.until is not None and now + left_s > self.until:
            left_s, planned = max(self.until - now, 0.0), " planned, as many as the budget allows"
        if not self.foretold and now - self.began >= _FORETOLD_AFTER_S and done < total:
            self.said, self.foretold = now, True
            say(f"  {total} forward passes{planned}, about {duration(left_s)}")
        text = f"  {done}/{total} forward passes, {duration(left_s)} left"
        if _is_terminal():
            if done == total or now - self.said >= 1:
                self.said = now
                _write(_CLEAR + (text if done < total else ""))
        elif now - self.said >= _EVERY_S and done / total - self.share >= 1 / _MOST_LINES:
            self.said, self.share = now, done / total
            say(text)


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _is_terminal() -> bool:
    return _sink is None and sys.stderr is not None and sys.stderr.isatty()


def _write_line(plain: str) -> None:
    _write((_CLEAR if _is_terminal() else "") + plain + "\n")


def _write(text: str) -> None:
    """To stderr; a log whose disk is full or whose reader has gone costs nobody a mask."""
    if sys.stderr is None:  # closed before this process began
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        with contextlib.suppress(OSError):  # what is buffered would fail again at the exit
            nowhere, number = os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno()
            if nowhere != number:  # else it was closed: what is opened next must not get its number
                os.dup2(nowhere, number)
                os.close(nowhere)
