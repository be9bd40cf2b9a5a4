"""Workers of this machine: a process for each of several GPUs."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from ichseg.app.crew.desk import Desk
from ichseg.app.crew.distant import Distant
from ichseg.app.crew.worker import MOST_STARTS, Setting, work
from ichseg.app.start import Stopped, stopped_by_signals, tame_libraries

_LOOK_S = 0.2
_LEAVE_S = 4.0  # for what is being written to end


@contextlib.contextmanager
def begun(
    setting: Setting, environments: Sequence[Mapping[str, str]]
) -> Iterator[tuple[Desk, Callable[[], None]]]:
    """Processes with a worker each, which end with the block.

    Args:
        setting: What the workers are made with.
        environments: Variables of each process in place of this one's, such as the GPU that it
            sees.

    Yields:
        Their desk; and what waits a moment and begins anew, in their places, those that have died.
    """
    context = multiprocessing.get_context("spawn")
    desk, numbers, fruitless = Desk(), itertools.count(1), Counter[int]()
    running: dict[int, tuple[BaseProcess, int, int]] = {}  # place and number, by the sentinel

    def begin(place: int) -> None:
        here, there = context.Pipe()
        number = next(numbers)
        process = context.Process(
            target=_work, args=(setting, there, number, dict(environments[place])), daemon=True
        )
        process.start()
        there.close()  # so that its end is seen when the process ends
        threading.Thread(target=_answer, args=(here, desk), daemon=True).start()
        running[process.sentinel] = (process, place, number)

    def look_after() -> None:
        for sentinel in wait(list(running), _LOOK_S):
            process, place, number = running.pop(cast(int, sentinel))
            process.join()
            fruitful = desk.lose(number, f"its process ended with status {process.exitcode}")
            fruitless[place] = 0 if fruitful else fruitless[place] + 1
            if fruitless[place] < MOST_STARTS and not desk.is_done():
                begin(place)
        if not running:
            desk.give_up()

    try:
        for place in range(len(environments)):
            begin(place)
        yield desk, look_after
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, _ in running.values():
            process.join(_LEAVE_S)
            process.kill()


def _answer(connection: Connection, desk: Desk) -> None:
    """What a thread does for a process, until that has ended."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            name, args = connection.recv()
            connection.send(getattr(desk, name)(*args))


def _work(
    setting: Setting, connection: Connection, number: int, environment: Mapping[str, str]
) -> None:
    """What a process does."""
    os.environ.update(environment)  # before a GPU is looked for
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that began this one
    tame_libraries()

    def ask(name: str, args: tuple[Any, ...]) -> Any:
        connection.send((name, args))
        return connection.recv()

    # SIGTERM from the process that began this one; its end of the pipe goes when it does
    with contextlib.suppress(Stopped, EOFError, ConnectionError), stopped_by_signals():
        work(setting, cast(Desk, Distant(ask)), number)
