"""This machine as a place for jobs: one at a time, or a fold on each of several GPUs."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue

import training
from training.data.workspace import job_log
from training.jobs import command
from training.jobs.command import INTERRUPTED, Ending
from training.jobs.job import Job

ROOT = str(Path(training.__file__).parents[1])  # of the package, for the processes
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # that end all jobs
_LOOK_AROUND_S = 0.5


class ThisMachine:
    """The cores and GPUs of this machine, with a process a job.

    Trainings take a GPU each, if there are any to share; all other jobs run one at a time.
    """

    def __init__(
        self,
        workspace: Path,
        gpus: Sequence[str],
        begins: Callable[[Job, str], None],
        hear: Callable[[Job, str], None],
    ) -> None:
        """Prepare to run jobs.

        Args:
            workspace: Where the logs of the jobs go.
            gpus: GPUs, named as ``CUDA_VISIBLE_DEVICES`` takes them; empty for a job at a time,
                which sees what this process sees.
            begins: Called with a job and the name of its place, from several threads.
            hear: Called with each line that a job says, from several threads.
        """
        self._workspace, self._begins, self._hear = workspace, begins, hear
        self._free = SimpleQueue[str]()
        for gpu in gpus:
            self._free.put(gpu)
        # a thread begins when it is first needed, so that a GPU too many costs nothing
        self._host = ThreadPoolExecutor(1, "job")
        self._trainers = ThreadPoolExecutor(len(gpus), "training") if gpus else None
        self._futures: dict[Future[Ending], Job] = {}
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False
        # held while a process begins, so that none is missed when all are told to end; a signal may
        # come while its handler holds it already
        self._lock = threading.RLock()

    def __enter__(self) -> ThisMachine:
        """Begin nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever still runs."""
        self.stop()
        for threads in (self._host, self._trainers):
            if threads is not None:
                threads.shutdown(cancel_futures=True)

    def submit(self, job: Job) -> None:
        """Run a job as soon as there is room for it."""
        on_gpu = self._trainers is not None and job.command == "train"
        threads = self._trainers if on_gpu and self._trainers is not None else self._host
        self._futures[threads.submit(self._run, job, on_gpu=on_gpu)] = job

    def wait(self) -> list[tuple[Job, Ending]]:
        """Wait for jobs to end, but not for long."""
        return take_ended(self._futures)

    def stop(self) -> None:
        """Tell all jobs that run to end, and begin no other."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _run(self, job: Job, *, on_gpu: bool) -> Ending:
        gpu = self._free.get() if on_gpu else ""
        try:
            with self._lock:
                if self._stopped:
                    return Ending(INTERRUPTED, "was not begun")
                environment = {"CUDA_VISIBLE_DEVICES": gpu} if on_gpu else {}
                process = command.begin((job.command, *job.words), ROOT, environment)
                self._running.add(process)
            self._begins(job, f"GPU {gpu}" if on_gpu else "")
            try:
                log = job_log(self._workspace, job.name)
                return command.follow(process, str(log), lambda line: self._hear(job, line))
            except OSError as error:
                return Ending(1, f"{log}: cannot write ({error.strerror})")
            finally:
                with self._lock:
                    self._running.discard(process)
        finally:
            if on_gpu:
                self._free.put(gpu)


def take_ended(futures: dict[Future[Ending], Job]) -> list[tuple[Job, Ending]]:
    """Wait a moment for jobs to end, and take those that have from ``futures``."""
    ended = wait(futures, _LOOK_AROUND_S, return_when=FIRST_COMPLETED).done
    return [(futures.pop(future), future.result()) for future in ended]
