"""SIGTERM, Ctrl-C and their like, taken as a wish to end in good order.

Schedulers of clusters send SIGTERM, or SIGUSR1 some minutes before their limit. What they end says
so by its exit status, 75, which asks for another go: the same command goes on from there.
"""

from __future__ import annotations

import signal
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

from training.jobs.command import GO_ON_LATER, INTERRUPTED


class Signals:
    """While entered, the first signal is only noted and told; a second acts as it always does.

    Outside the main thread, where Python takes no signals, nothing is noted.

    Attributes:
        name: Name of the signal that came, such as ``SIGTERM``; empty until one does.
    """

    def __init__(
        self,
        then: Callable[[str], None] = lambda _: None,
        numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1),
    ) -> None:
        """Prepare to take signals.

        Args:
            then: Called with the name of the first signal, when it comes.
            numbers: The signals to take.
        """
        self.name = ""
        self._then, self._numbers = then, numbers
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        """Take the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the signals to whoever had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def came(self) -> bool:
        """Whether a signal has come."""
        return bool(self.name)

    def _note(self, number: int, _: types.FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._before[signal.Signals(number)])
        self._then(self.name)


def status_of(name: str) -> int:
    """The exit status of what a signal of this name has ended; 0 where the name is empty."""
    if not name:
        return 0
    return INTERRUPTED if name == signal.SIGINT.name else GO_ON_LATER
