"""What a process needs before its work: streams, signals, quiet libraries, room in memory."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from ichseg.errors import DeviceError
from ichseg.wording import byte_size

# What the libraries take before any scan is read. With less OpenBLAS aborts, or tries for ever.
_LEAST = (
    ("RLIMIT_AS (ulimit -v)", resource.RLIMIT_AS, 650_000_000),
    ("RLIMIT_DATA (ulimit -d)", resource.RLIMIT_DATA, 250_000_000),
)


class Stopped(BaseException):
    """A signal asks for the end; nothing that goes on after a failed case may catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def ensure_streams() -> None:
    """Give the process the standard streams that it was started without.

    Otherwise the next file that is opened would get the number of a stream, and whatever a library
    writes to stderr would end in a mask.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)


def tame_libraries() -> None:
    """Set what libraries look at while they load.

    Their warnings are for those who call them, and would be in a log that is for those who wait for
    masks; ``python -W`` brings them back.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # beside busy networks more threads of numpy wait for each other, up to seconds
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@contextlib.contextmanager
def loading_libraries() -> Iterator[None]:
    """Import in this block without looking for garbage, of which imports make none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def refuse_too_little_memory() -> None:
    """Refuse limits under which not even the libraries load.

    Raises:
        DeviceError: The process may take less than they need.
    """
    for name, kind, least in _LEAST:
        allowed = resource.getrlimit(kind)[0]
        if allowed != resource.RLIM_INFINITY and allowed < least:
            raise DeviceError(
                f"{name} allows {byte_size(allowed)}, expected at least {byte_size(least)}: the "
                "libraries alone take that"
            )


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Have what asks for the end raise ``Stopped``, once.

    That is SIGTERM (a time-out of the platform), SIGINT (Ctrl-C) and SIGHUP (the terminal has
    gone), but for those that the process was started to ignore, as by ``nohup``. What was done with
    them before comes back only where nothing was raised: otherwise the end is near.
    """
    signals = [
        number
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    ]

    def stop(number: int, _: FrameType | None) -> NoReturn:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)  # the end is near, and not to be disturbed
        raise Stopped(number)

    before = [signal.signal(each, stop) for each in signals]
    yield
    for each, handler in zip(signals, before, strict=True):
        signal.signal(each, handler)
