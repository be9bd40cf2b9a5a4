"""SIGTERM and Ctrl-C, taken as a wish to end after this step."""

from __future__ import annotations

import logging
import signal
import threading
import types
from typing import Any

_log = logging.getLogger(__name__)


class Signals:
    """While entered, the first SIGTERM or Ctrl-C is only noted; a second acts as it always does.

    Attributes:
        name: Of the signal that came, or empty.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: types.FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._before[signal.Signals(number)])
        _log.info("%s: ending after this step with a checkpoint", self.name)
