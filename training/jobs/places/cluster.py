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
import socket
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

    Of several processes no more than the nodes hold at once, as they wait for each other.

    Raises:
        DeviceError: No node has a GPU for a job that needs one.
    """
    fitting = [node for node in nodes if node.gpus >= need.gpus]
    if not fitting:
        raise DeviceError(f"no node of the cluster has {counted(need.gpus, 'GPU')}")
    cores = min(need.cores, max(node.cores for node in fitting))
    with_cores = [node for node in fitting if node.cores >= cores]
    memory = min(need.memory_bytes, max(node.memory_bytes for node in with_cores))
    room = sum(
        min(
            node.cores // cores,
            node.gpus // need.gpus if need.gpus else node.cores,
            node.memory_bytes // memory if memory else node.cores,
        )
        for node in with_cores
    )
    return Need(need.gpus, cores, memory, min(need.processes, max(1, room)))


class Cluster:
    """The nodes of a Ray cluster, with an actor for each process of a job."""

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
            self._say_what_lacks(job, need)
            with self._lock:
                if self._stopped:
                    return Ending(INTERRUPTED, "was not begun" if not go else "was interrupted")
                group, actors = self._actors_for(need)
                self._actors |= dict.fromkeys(actors, False)
            try:
                lost = self._refusal(actors)
                if not lost:
                    return self._follow(actors, job)
            except self._ray.exceptions.RayError as error:
                lost = cluster.reason_of(error)
            finally:
                for actor in actors:
                    with self._lock:
                        del self._actors[actor]
                    self._ray.kill(actor)
                if group is not None:
                    self._ray.util.remove_placement_group(group)
        return Ending(1, f"begun {MOST_GOES} times in vain, the last: {lost}")

    def _say_what_lacks(self, job: Job, need: Need) -> None:
        if need.memory_bytes < job.need.memory_bytes:
            wanted, most = byte_size(job.need.memory_bytes), byte_size(need.memory_bytes)
            self._hear(job, f"warning: takes {wanted} by estimate, and no node has over {most}")
        if need.processes < job.need.processes:
            room = counted(need.processes, "process", "processes")
            self._hear(job, f"{job.need.processes} processes wanted, there is room for {room}")

    def _actors_for(self, need: Need) -> tuple[Any, list[Any]]:
        """An actor for each process, none of which begins before there is room for all.

        Returns:
            What keeps the room for them, None for one process; and the actors.
        """
        each = {"CPU": need.cores, "GPU": need.gpus, "memory": need.memory_bytes}
        runner = self._ray.remote(
            num_cpus=need.cores,
            num_gpus=need.gpus,
            memory=need.memory_bytes or None,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,  # `stop` beside `hear`
        )(_Runner)
        if need.processes == 1:
            return None, [runner.remote()]
        group = self._ray.util.placement_group(
            [{name: count for name, count in each.items() if count}] * need.processes
        )
        within = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        return group, [
            runner.options(scheduling_strategy=within(group, number)).remote()
            for number in range(need.processes)
        ]

    def _refusal(self, actors: Sequence[Any]) -> str:
        """Why a node of these actors cannot do the job; empty if all can."""
        look = [actor.look.remote(cluster.look, self._expected) for actor in actors]
        return next(filter(None, map(str, self._ray.get(look))), "")

    def _follow(self, actors: Sequence[Any], job: Job) -> Ending:
        """Begin a job in each actor and hear them until all have ended.

        Returns:
            How the first of them ended that failed, if any did; then the others may still run.
        """
        get = self._ray.get
        meeting = get(actors[0].meeting.remote()) if len(actors) > 1 else None
        begun = []
        with self._lock:
            if self._stopped:
                return Ending(INTERRUPTED, "was not begun")
            for rank, actor in enumerate(actors):
                log = job_log(self._workspace, f"{job.name} process {rank}" if rank else job.name)
                begun.append(
                    actor.begin.remote(
                        (job.command, *job.words),
                        ROOT,
                        str(log),
                        {} if meeting is None else _as_torchrun(meeting, rank, len(actors)),
                    )
                )
                self._actors[actor] = True
        self._begins(job, ", ".join(get(begun)))
        heard = {actor.hear.remote(): rank for rank, actor in enumerate(actors)}
        endings: list[Ending] = []
        while heard:
            patience = _LEAVE_S if any(ending.status for ending in endings) else None
            answered = self._ray.wait(list(heard), timeout=patience)[0]
            if not answered:
                break  # the others wait for one that has failed
            for each in answered:
                rank = heard.pop(each)
                lines, ended = get(each)
                for line in lines:
                    self._hear(job, f"process {rank}: {line}" if rank else line)
                if ended is None:
                    heard[actors[rank].hear.remote()] = rank
                else:
                    endings.append(Ending(*ended))
        return next((ending for ending in endings if ending.status), endings[0])


def _as_torchrun(meeting: tuple[str, int], rank: int, count: int) -> dict[str, str]:
    """The variables by which processes find each other; each has a GPU of its own, its first."""
    host, port = meeting
    return {
        "MASTER_ADDR": host, "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count),
        "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
    }  # fmt: skip


class _Runner:
    """A job on its node; sent by value, so that ``look`` comes before anything of ours."""

    def look(
        self, look: Callable[[Mapping[str, Any]], tuple[str, float]], expected: Mapping[str, Any]
    ) -> str:
        """What differs on this node; empty if nothing does."""
        return look(expected)[0]

    def meeting(self) -> tuple[str, int]:
        """Where the processes of a job can meet: this node's address, and a port that is free."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as found:
            found.bind((host, 0))
            return host, found.getsockname()[1]

    def begin(
        self, words: Sequence[str], root: str, log: str, environment: Mapping[str, str]
    ) -> str:
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
                self._process = command.begin(words, root, environment)
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
