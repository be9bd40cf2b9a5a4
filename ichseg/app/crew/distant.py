"""The desk as a worker has it that is in another process, perhaps on another machine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Distant:
    """Has the desk's methods; each call goes to the desk, and its answer comes back.

    Threads may use it side by side.
    """

    def __init__(self, ask: Callable[[str, tuple[Any, ...]], Any]) -> None:
        """Prepare to ask.

        Args:
            ask: Takes the name of a method and its arguments, and gives what it returns; one call
                at a time.
        """
        self._ask, self._lock = ask, threading.Lock()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A method of the desk."""

        def call(*args: Any) -> Any:
            with self._lock:
                return self._ask(name, args)

        return call
