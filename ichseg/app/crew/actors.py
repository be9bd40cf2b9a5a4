"""Workers on a Ray cluster: an actor for each of its GPUs, or for each share of its cores.

The desk stays in the process of the driver. A thread there waits for what an actor wants to ask the
desk, and brings the answer with its next call; when an actor or its node is gone, so is the call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pickle
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ichseg import cluster
from ichseg.app.console import say
from ichseg.app.crew.desk import Desk
from ichseg.app.crew.worker import MOST_STARTS, Setting
from ichseg.cluster import Node
from ichseg.errors import DeviceError
from ichseg.wording import counted

MOST_CORES = 4  # of an actor, unless the user says otherwise
_LOOK_S = 0.2
_COUNT_S = 10.0  # between looks for nodes that have come
_LEAVE_S = 4.0


@dataclass(frozen=True, slots=True)
class Share:
    """What each actor has of its node.

    Attributes:
        cores: CPU cores.
        gpus: GPUs, none or one.
    """

    cores: int
    gpus: int

    def count(self, nodes: Sequence[Node]) -> int:
        """How many actors have room on the nodes."""
        return sum(
            min(node.cores // self.cores, node.gpus if self.gpus else node.cores) for node in nodes
        )


def share_of(nodes: Sequence[Node], device: str, cores: int | None) -> Share:
    """What an actor gets: a GPU where there are any, and some cores.

    Args:
        nodes: The nodes.
        device: See ``choose_engine``.
        cores: Cores of an actor; None for four, or fewer where a node has fewer for each.

    Raises:
        DeviceError: No node has as much.
    """
    gpus = int(device in ("auto", "cuda") and any(node.gpus for node in nodes))
    if device == "cuda" and not gpus:
        raise DeviceError("--ray: no node of the cluster has a GPU; --device cpu does without")
    useful = [node for node in nodes if node.gpus or not gpus]
    if not useful:
        raise DeviceError("--ray: no node of the cluster has a core to give away")
    if cores is None:
        least = min(node.cores // max(1, node.gpus * gpus) for node in useful)
        return Share(max(1, min(MOST_CORES, least)), gpus)
    if all(node.cores < cores for node in useful):
        raise DeviceError(
            f"--ray-cpus {cores}: no node has so many; the largest has "
            f"{max(node.cores for node in useful)}"
        )
    return Share(cores, gpus)


@contextlib.contextmanager
def begun(
    setting: Setting, address: str, cores: int | None, files: Sequence[Path]
) -> Iterator[tuple[Desk, Callable[[], None]]]:
    """Actors with a worker each, which end with the block.

    Args:
        setting: What the workers are made with.
        address: Where the cluster is, as ``cluster.joined`` takes it.
        cores: Cores of an actor; None leaves it to ``share_of``.
        files: What all nodes have to see, beside the output folder.

    Yields:
        Their desk; and what waits a moment, begins others in the place of those that have died, and
        more when nodes have come.

    Raises:
        DeviceError: There is no cluster, or its nodes do not see or have the same.
    """
    with (
        cluster.joined(address) as ray,
        cluster.probe(setting.options.output, files) as expected,
    ):
        nodes = cluster.nodes(ray)
        share = share_of(nodes, setting.device, cores)
        cluster.require_alike(ray, nodes, expected)
        device = "cuda" if share.gpus else "cpu" if setting.device == "auto" else setting.device
        crew = _Crew(ray, dataclasses.replace(setting, device=device), share, expected)
        each = f"{share.gpus} GPU and " * share.gpus + counted(share.cores, "core")
        say(
            f"{counted(share.count(nodes), 'worker')} on {counted(len(nodes), 'node')}, {each} each"
        )
        try:
            crew.grow(share.count(nodes))
            yield crew.desk, crew.look_after
        finally:
            crew.end()


class _Crew:
    """The actors of a run, as their driver has them."""

    def __init__(
        self, ray: Any, setting: Setting, share: Share, expected: Mapping[str, Any]
    ) -> None:
        self.desk = Desk()
        self._ray, self._setting, self._share, self._expected = ray, setting, share, expected
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self._begin = ray.remote(
            num_cpus=share.cores, num_gpus=share.gpus, max_restarts=0, max_task_retries=0
        )(_Actor)
        self._numbers, self._fruitless = itertools.count(1), Counter[int]()
        self._running: dict[Future[str], tuple[Any, int, int]] = {}  # actor, place and number
        self._places, self._counted = 0, time.monotonic()

    def grow(self, places: int) -> None:
        """Begin actors until there are so many places for one."""
        for place in range(self._places, places):
            self._fill(place)
        self._places = max(self._places, places)

    def look_after(self) -> None:
        """Wait a moment, begin anew what has died, and more where nodes have come."""
        for future in wait(self._running, _LOOK_S, FIRST_COMPLETED).done:
            actor, place, number = self._running.pop(future)
            self._ray.kill(actor)  # it may be at work behind a connection that has broken
            fruitful = self.desk.lose(number, future.result())
            self._fruitless[place] = 0 if fruitful else self._fruitless[place] + 1
            if self._fruitless[place] < MOST_STARTS and not self.desk.is_done():
                self._fill(place)
        if not self._running:
            self.desk.give_up()
        if time.monotonic() - self._counted > _COUNT_S and not self.desk.is_done():
            self.grow(self._share.count(cluster.nodes(self._ray)))
            self._counted = time.monotonic()

    def end(self) -> None:
        """End all actors."""
        for actor, _, _ in self._running.values():
            self._ray.kill(actor)
        wait(self._running, _LEAVE_S)

    def _fill(self, place: int) -> None:
        actor, number = self._begin.remote(), next(self._numbers)
        future = Future[str]()
        self._running[future] = (actor, place, number)

        def serve() -> None:
            future.set_result(self._serve(actor, number))

        threading.Thread(target=serve, daemon=True).start()

    def _serve(self, actor: Any, number: int) -> str:
        """What a thread does for an actor until that has ended; why it has."""
        get = self._ray.get
        try:
            refusal = get(actor.look.remote(cluster.look, self._expected))
            if refusal:
                return str(refusal)
            get(actor.begin.remote(number, self._share.cores, pickle.dumps(self._setting)))
            answer = None
            while (call := get(actor.exchange.remote(answer))) is not None:
                name, args = call
                answer = (getattr(self.desk, name)(*args),)
        except Exception as error:
            return cluster.reason_of(error)
        return "it has left"


class _Actor:
    """A worker as Ray begins it: sent by value, so that ``look`` comes before anything of ours."""

    def look(
        self, look: Callable[[Mapping[str, Any]], tuple[str, float]], expected: Mapping[str, Any]
    ) -> str:
        """What differs on this node; empty if nothing does."""
        return look(expected)[0]

    def begin(self, number: int, cores: int, pickled: bytes) -> None:
        """Begin to work, in a thread."""
        os.environ["OMP_NUM_THREADS"] = str(cores)  # before the networks' libraries are loaded
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._fault = ""
        threading.Thread(target=self._work, args=(number, pickled), daemon=True).start()

    def exchange(self, answer: tuple[Any] | None) -> tuple[str, tuple[Any, ...]] | None:
        """Take the answer to what was asked last, and wait for what the worker asks next.

        Returns:
            A method of the desk and its arguments; None when the worker has ended.
        """
        if answer is not None:
            self._answers.put(answer[0])
        call = self._calls.get()
        if self._fault:
            raise RuntimeError(self._fault)
        return call

    def _work(self, number: int, pickled: bytes) -> None:
        from ichseg.app.crew.distant import Distant
        from ichseg.app.crew.worker import work
        from ichseg.app.start import tame_libraries

        def ask(name: str, args: tuple[Any, ...]) -> Any:
            self._calls.put((name, args))
            return self._answers.get()

        try:
            tame_libraries()
            work(pickle.loads(pickled), Distant(ask), number)  # type: ignore[arg-type]
        except BaseException as error:  # it is the driver that says it
            self._fault = f"{type(error).__name__}: {error}"
        self._calls.put(None)
