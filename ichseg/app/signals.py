"""What ends a run from outside, raised in the main thread where files can be cleaned up."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


class Stopped(BaseException):
    """A signal asks for the end; nothing that goes on after a failed case may catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM (a time-out of the platform) and SIGINT (Ctrl-C) raise ``Stopped``, once."""
    signals = (signal.SIGTERM, signal.SIGINT)

    def stop(number: int, _: FrameType | None) -> NoReturn:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)  # the end is near, and not to be disturbed
        raise Stopped(number)

    before = [signal.signal(each, stop) for each in signals]
    yield
    for each, handler in zip(signals, before, strict=True):
        signal.signal(each, handler)
