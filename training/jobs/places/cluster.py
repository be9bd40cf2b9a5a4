"""A Ray cluster as a place for jobs: each runs on a node that has room for what it needs.

An actor begins the job's command on its node and keeps the log, as a thread does on this machine. A
thread here waits for what the actor has heard. When an actor or its node is gone, so is the job's
process, and the job is begun anew on another: each command goes on where it was stopped, a training
from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from ichseg import cluster
from ichseg.cluster import Node
from ichseg.errors import DeviceError
from ichseg.wording import byte_size, counted
from training.data.workspace import job_log
from training.jobs import command
from training.jobs.command import INTERRUPTED, Ending
from training.jobs.graph import Machines
from training.jobs.job import Job, Need
from training.jobs.places.local import ROOT, take_ended

MOST_GOES = 5  # of a job whose nodes are lost
_BATCH_S = 0.1  # for lines that follow each other
_LEAVE_S = 120.0  # for trainings to write their checkpoints
_PAUSE_S = 2.0  # before a job is begun anew

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def joined(
    address: str,
    workspace: Path,
    files: Sequence[Path],
    begins: Callable[[Job, str], None],
    hear: Callable[[Job, str], None],
) -> Iterator[tuple[Cluster, Machines]]:
    """A cluster, until the block ends; so do the jobs that still run.

    Args:
        address: See ``ichseg.cluster.joined``.
        workspace: Where the logs of the jobs go.
        files: What all nodes have to see, beside the workspace and the program.
        begins: Called with a job and the name of its node, from several threads.
        hear: Called with each line that a job says, from several threads.

    Yields:
        The cluster; and what the graph has to know of it.

    Raises:
        DeviceError: There is no such cluster, or its nodes do not see or have the same.
        OutputError: The workspace cannot be written.
    """
    seen = [Path(ROOT) / "training" / "__main__.py", *files]
    with cluster.joined(address) as ray, cluster.probe(workspace, seen) as expected:
        nodes = cluster.nodes(ray)
        if not nodes:
            raise DeviceError(f"--ray {address}: no node of the cluster has a core to give away")
        expected["root"] = ROOT
        cluster.require_alike(ray, nodes, expected)
        cores, gpus = (sum(getattr(node, kind) for node in nodes) for kind in ("cores", "gpus"))
        _log.info(
            "%s with %s and %s", *map(counted, (len(nodes), cores, gpus), ("node", "core", "GPU"))
        )
        with Cluster(ray, workspace, expected, begins, hear) as place:
            yield place, machines_of(nodes)


def machines_of(nodes: Sequence[Node]) -> Machines:
    """What the graph has to know: a share of the cases for each node, small enough for all."""
    return Machines(
        gpus=any(node.gpus for node in nodes),
        shares=len(nodes),
        cores=min(node.cores for node in nodes),
    )


def room_for(need: Need, nodes: Sequence[Node]) -> Need:
    """What to ask Ray for: what a job needs, or as much of it as the largest node has.

    Raises:
        DeviceError: No node has a GPU for a job that needs one.
    """
    fitting = [node for node in nodes if node.gpus >= need.gpus]
    if not fitting:
        raise DeviceError(f"no node of the cluster has {counted(need.gpus, 'GPU')}")
    cores = min(need.cores, max(node.cores for node in fitting))
    with_cores = [node for node in fitting if node.cores >= cores]
    memory = min(need.memory_bytes, max(node.memory_bytes for node in with_cores))
    return Need(need.gpus, cores, memory)


class Cluster:
    """The nodes of a Ray cluster, with an actor a job."""

    def __init__(
        self,
        ray: Any,
        workspace: Path,
        expected: Mapping[str, Any],
        begins: Callable[[Job, str], None],
        hear: Callable[[Job, str], None],
    ) -> None:
        """Prepare to run jobs.

        Args:
            ray: The module, see ``ichseg.cluster.joined``.
            workspace: Where the logs of the jobs go.
            expected: What nodes have to see, see ``ichseg.cluster.look``.
            begins: Called with a job and the name of its node, from several threads.
            hear: Called with each line that a job says, from several threads.
        """
        self._ray, self._workspace, self._expected = ray, workspace, expected
        self._begins, self._hear = begins, hear
        for module in (command, sys.modules[__name__]):
            ray.cloudpickle.register_pickle_by_value(module)
        self._futures: dict[Future[Ending], Job] = {}
        self._actors: dict[Any, bool] = {}  # whether each has begun its job
        self._stopped = False
        # a signal may come while its handler holds it already
        self._lock = threading.RLock()

    def __enter__(self) -> Cluster:
        """Begin nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever still runs."""
        self.stop()
        wait(self._futures, _LEAVE_S)
        for actor in list(self._actors):
            self._ray.kill(actor)

    def submit(self, job: Job) -> None:
        """Run a job as soon as there is room for it."""
        future = Future[Ending]()
        self._futures[future] = job

        def run() -> None:
            try:
                future.set_result(self._run(job))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()

    def wait(self) -> list[tuple[Job, Ending]]:
        """Wait for jobs to end, but not for long."""
        return take_ended(self._futures)

    def stop(self) -> None:
        """Tell all jobs that run to end, and begin no other."""
        with self._lock:
            self._stopped = True
            for actor, has_begun in self._actors.items():
                if has_begun:
                    actor.stop.remote()
                else:
                    self._ray.kill(actor)  # it waits for room

    def _run(self, job: Job) -> Ending:
        """What a thread does for a job, on one node after another until it has ended on one."""
        lost = ""
        for go in range(MOST_GOES):
            if go and not self._stopped:
                self._hear(job, f"{lost}; the job is begun anew")
                time.sleep(_PAUSE_S)
            try:
                need = room_for(job.need, cluster.nodes(self._ray))
            except DeviceError as error:
                return Ending(1, str(error))
            if need.memory_bytes < job.need.memory_bytes:
                wanted, most = byte_size(job.need.memory_bytes), byte_size(need.memory_bytes)
                self._hear(job, f"warning: takes {wanted} by estimate, and no node has over {most}")
            with self._lock:
                if self._stopped:
                    return Ending(INTERRUPTED, "was not begun" if not go else "was interrupted")
                actor = self._ray.remote(
                    num_cpus=need.cores,
                    num_gpus=need.gpus,
                    memory=need.memory_bytes or None,
                    max_restarts=0,
                    max_task_retries=0,
                    max_concurrency=2,  # `stop` beside `hear`
                )(_Runner).remote()
                self._actors[actor] = False
            try:
                lost = self._refusal(actor)
                if not lost:
                    return self._follow(actor, job)
            except self._ray.exceptions.RayError as error:
                lost = cluster.reason_of(error)
            finally:
                with self._lock:
                    del self._actors[actor]
                self._ray.kill(actor)
        return Ending(1, f"begun {MOST_GOES} times in vain, the last: {lost}")

    def _refusal(self, actor: Any) -> str:
        """Why an actor's node cannot do the job; empty if it can."""
        return str(self._ray.get(actor.look.remote(cluster.look, self._expected)))

    def _follow(self, actor: Any, job: Job) -> Ending:
        """Begin a job and hear it until it has ended."""
        log = str(job_log(self._workspace, job.name))
        with self._lock:
            if self._stopped:
                return Ending(INTERRUPTED, "was not begun")
            begun = actor.begin.remote((job.command, *job.words), ROOT, log)
            self._actors[actor] = True
        self._begins(job, self._ray.get(begun))
        while True:
            lines, ended = self._ray.get(actor.hear.remote())
            for line in lines:
                self._hear(job, line)
            if ended is not None:
                return Ending(*ended)


class _Runner:
    """A job on its node; sent by value, so that ``look`` comes before anything of ours."""

    def look(
        self, look: Callable[[Mapping[str, Any]], tuple[str, float]], expected: Mapping[str, Any]
    ) -> str:
        """What differs on this node; empty if nothing does."""
        return look(expected)[0]

    def begin(self, words: Sequence[str], root: str, log: str) -> str:
        """Begin the job's command, in a thread.

        Returns:
            The name of the node.
        """
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[str] | None = None
        self._ended: tuple[int, str] = (1, "")
        begun = threading.Event()

        def run() -> None:  # the process ends with the thread that begins it
            try:
                self._process = command.begin(words, root, {})
                begun.set()
                ending = command.follow(self._process, log, self._lines.put)
                self._ended = (ending.status, ending.reason)
            except OSError as error:
                self._ended = (1, f"{log}: cannot write ({error.strerror})")
            begun.set()
            self._lines.put(None)

        threading.Thread(target=run, daemon=True).start()
        begun.wait()
        return os.uname().nodename

    def hear(self) -> tuple[list[str], tuple[int, str] | None]:
        """Wait for what the job says.

        Returns:
            Lines; and once it has ended its exit status and, if it failed, the reason.
        """
        found = [self._lines.get()]
        with contextlib.suppress(queue.Empty):
            while found[-1] is not None:
                found.append(self._lines.get(timeout=_BATCH_S))
        lines = [line for line in found if line is not None]
        return lines, self._ended if found[-1] is None else None

    def stop(self) -> None:
        """Tell the job to end."""
        if self._process is not None:
            self._process.terminate()
