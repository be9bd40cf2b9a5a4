"""Hands cases out to workers as they ask for them, the largest first, and takes in what came of it.

What a worker that dies had in its hands is done by another; a case with which several workers died
fails alone. A worker holds only the few cases that it works on, so what a run takes of memory does
not grow with the number of its scans.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from ichseg.app.one_case import Task
from ichseg.app.pipeline import Facts
from ichseg.app.results import CaseResult
from ichseg.errors import DeviceError, IchsegError, InputError, WeightsError
from ichseg.wording import counted

MOST_DEATHS = 3  # of workers that had the same case in their hands
SUSPECT = 2  # deaths after which a case is done alone, so that no other shares the blame


@dataclass(frozen=True, slots=True)
class News:
    """What has happened since it was last asked for.

    Attributes:
        facts: What runs the networks, once a worker has loaded them.
        said: Lines to say.
        ended: Cases with what came of them, each once.
        failure: Why the run cannot go on, if so.
        workers: How many workers are at work.
        over: Whether all cases have ended.
    """

    facts: Facts | None
    said: list[str]
    ended: list[tuple[Task, CaseResult]]
    failure: IchsegError | None
    workers: int
    over: bool


class Desk:
    """The cases of a run. Threads may use it side by side.

    Workers are known by numbers, none of which is used again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Task] = deque()
        self._held: dict[int, dict[str, Task]] = {}  # by worker and by name
        self._gone: set[int] = set()
        self._deaths = Counter[str]()
        self._finished = Counter[int]()  # cases, by worker
        self._last_reason = ""
        self._left: int | None = None  # cases that have not ended; none before there are any
        self._facts: Facts | None = None
        self._failure: IchsegError | None = None
        self._said: list[str] = []
        self._ended: list[tuple[Task, CaseResult]] = []

    def open(self, tasks: Sequence[Task]) -> None:
        """Begin to hand out cases."""
        with self._lock:  # the largest first, else one of them may be the last
            self._waiting = deque(sorted(tasks, key=_bytes_of, reverse=True))
            self._left = len(tasks)

    def begin(self, worker: int, facts: Facts) -> None:
        """Take a worker on that has loaded its networks, unless its masks would be others."""
        with self._lock:
            if self._facts is None:
                self._facts = facts
            if facts.made_from != self._facts.made_from:
                self._failure = DeviceError(
                    f"the workers would not make the same masks: one has {self._facts.name}, "
                    f"another {facts.name}; --device and --precision make them alike"
                )
            elif worker not in self._gone:
                self._held[worker] = {}
                self._said.append(f"worker {worker} has loaded the networks, {facts.name}")

    def take(self, worker: int) -> Task | None:
        """The next case for a worker; None if it has to finish first what it has, or there is none.

        None, too, for a worker that is taken for dead.
        """
        with self._lock:
            held = self._held.get(worker)
            if held is None or not self._waiting:
                return None
            if held and any(
                self._deaths[name] >= SUSPECT for name in (*held, self._waiting[0].name)
            ):
                return None
            task = self._waiting.popleft()
            held[task.name] = task
            return task

    def end(self, worker: int, name: str, result: CaseResult, said: Sequence[str]) -> None:
        """Take in what came of a case; of a worker that was taken for dead nothing is."""
        with self._lock:
            task = self._held.get(worker, {}).pop(name, None)
            if task is not None:
                self._finished[worker] += 1
                self._said += said
                self._note(task, result)

    def fail(self, worker: int, error: IchsegError) -> None:
        """Hear from a worker that it cannot go on; the run cannot either if none could.

        A device that fails while others work is the loss of one worker.
        """
        with self._lock:
            if self._facts is None or isinstance(error, WeightsError):
                self._failure = error
        self.lose(worker, str(error))

    def lose(self, worker: int, reason: str) -> bool:
        """Take a worker for dead: others do what it had.

        Returns:
            Whether it had finished any case.
        """
        with self._lock:
            if worker not in self._gone and self._left != 0:
                self._gone.add(worker)
                held = list(self._held.pop(worker, {}).values())
                again = f"; others do the {counted(len(held), 'case')} that it had" if held else ""
                self._said.append(f"worker {worker} died ({reason}){again}")
                self._last_reason = reason
                for task in held:
                    self._put_back(task, reason)
            return self._finished[worker] > 0

    def give_up(self) -> None:
        """End the run, as there is no worker and none can be begun, unless all is done."""
        with self._lock:
            if self._left != 0 and self._failure is None:
                self._failure = DeviceError(f"no worker is left, the last: {self._last_reason}")

    def is_over(self, worker: int) -> bool:
        """Whether a worker may leave: all cases have ended, or it is not wanted any more."""
        with self._lock:
            return self._left == 0 or worker not in self._held or self._failure is not None

    def is_done(self) -> bool:
        """Whether all cases have ended."""
        with self._lock:
            return self._left == 0

    def collect(self) -> News:
        """What has happened since the last time."""
        with self._lock:
            news = News(
                self._facts, self._said, self._ended, self._failure, len(self._held),
                self._left == 0,
            )  # fmt: skip
            self._said, self._ended = [], []
            return news

    def _put_back(self, task: Task, reason: str) -> None:
        self._deaths[task.name] += 1
        if self._deaths[task.name] < MOST_DEATHS:
            self._waiting.appendleft(task)
            return
        why = f"{task.case.image}: {MOST_DEATHS} workers died with it, the last: {reason}"
        self._note(task, CaseResult(task.case.name, None, why, {}))

    def _note(self, task: Task, result: CaseResult) -> None:
        assert self._left is not None
        self._left -= 1
        self._ended.append((task, result))


def _bytes_of(task: Task) -> int:
    try:
        return task.stamp["bytes"]
    except InputError:  # which will be said when it is read
        return 0
