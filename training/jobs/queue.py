"""Several folds: one after another in this process, or a queue of them over GPUs.

On GPUs each fold has a process of its own, which sees its GPU alone; a fold that fails stops no
other, and a signal reaches them all.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TextIO

import torch

from ichseg.errors import IchsegError, TrainingError
from training.data.workspace import ALL_FOLD, LOCK_FILE
from training.jobs.signals import Signals

_INTERRUPTED = 130  # exit status of a command that a signal ended

_log = logging.getLogger(__name__)


def parse_folds(text: str) -> tuple[str, ...]:
    """An argparse type: ``0,1,4`` as ``("0", "1", "4")``."""
    folds = tuple(part.strip() for part in text.split(","))
    if ALL_FOLD in folds:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected numbers such as 0,1,2,3,4 (--fold {ALL_FOLD} trains one network "
            "on every case)"
        )
    if not all(fold.isdecimal() for fold in folds):
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers separated by commas")
    folds = tuple(str(int(fold)) for fold in folds)
    if len(set(folds)) < len(folds):
        raise argparse.ArgumentTypeError(f"{text!r} names a fold twice")
    return folds


def find_gpus(text: str) -> tuple[str, ...]:
    """The GPUs of ``--gpus``, as ``CUDA_VISIBLE_DEVICES`` takes them.

    Args:
        text: Numbers separated by commas. If the variable is set, they count along its entries.

    Raises:
        TrainingError: There are no numbers, one is given twice, or there is no such GPU.
    """
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise TrainingError(f"--gpus {text}: expected numbers separated by commas, such as 0,1")
    chosen = [int(number) for number in numbers]
    if len(set(chosen)) < len(chosen):
        raise TrainingError(f"--gpus {text}: names a GPU twice")
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if max(chosen) >= count:
        there = f"this machine has {count}, counted from 0" if count else "no GPU works here"
        raise TrainingError(f"--gpus {text}: no GPU {max(chosen)}; {there}")
    entries = [entry.strip() for entry in visible.split(",")] if visible else None
    return tuple(str(number) if entries is None else entries[number] for number in chosen)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from training the same fold meanwhile.

    Raises:
        TrainingError: Another process trains it already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(f"{folder}: another process is training this fold") from error
        except OSError as error:  # a file system without locks
            _log.warning(
                "warning: %s cannot be locked (%s); see to it that no other process trains this "
                "fold meanwhile",
                folder,
                error.strerror,
            )
        yield  # closing the file gives it back, however this process ends


def train_in_sequence(
    folds: Sequence[str], train: Callable[[str], bool], *, go_on: bool = True
) -> bool:
    """Train folds one after another in this process.

    Args:
        folds: Names of the folds.
        train: Trains one fold; returns False when a signal ended it.
        go_on: Whether to train the other folds when one has failed. Processes that train together
            must not: only one of them may have failed.

    Returns:
        Whether all were trained; False after a signal.

    Raises:
        TrainingError: Some failed; it names them.
    """
    failures: dict[str, str] = {}
    for fold in folds:
        try:
            if not train(fold):
                return False
        except IchsegError as error:
            if len(folds) == 1 or not go_on:
                raise
            _log.error("fold %s failed: %s", fold, error)
            failures[fold] = str(error)
    _report(failures, folds)
    return True


def train_on_gpus(
    folds: Sequence[str],
    gpus: Sequence[str],
    command: Callable[[str], Sequence[str]],
    stream: TextIO | None = None,
) -> bool:
    """Train folds side by side, one a GPU; whichever GPU is free takes the next.

    Args:
        folds: Names of the folds.
        gpus: The GPUs, one a process, named as ``CUDA_VISIBLE_DEVICES`` takes them.
        command: The command line that trains a fold.
        stream: Where all that the processes say goes, each line after its fold; stderr by default.

    Returns:
        Whether all were trained; False after SIGINT, SIGTERM or SIGHUP, when each process was told
        and has ended.

    Raises:
        TrainingError: Some failed; it names them. The others are trained all the same.
    """
    out = sys.stderr if stream is None else stream
    waiting = deque(folds)
    if 0 < len(folds) < len(gpus):
        _log.info("folds for %d of %d GPUs: the others stay idle", len(folds), len(gpus))
    failures: dict[str, str] = {}
    children = _Children()

    def serve(gpu: str) -> None:
        """Train one fold after another on this GPU, in a thread of its own."""
        while waiting:
            try:
                fold = waiting.popleft()
            except IndexError:  # another GPU has taken the last one meanwhile
                return
            process = children.start(command(fold), gpu)
            if process is None:
                return
            _log.info("fold %s: begins on GPU %s", fold, gpu)
            if reason := children.follow(process, f"fold {fold}: ", out):
                failures[fold] = reason

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with (
        Signals(lambda _: children.stop(), numbers) as signals,
        ThreadPoolExecutor(max(1, len(gpus))) as threads,
    ):
        served = [threads.submit(serve, gpu) for gpu in gpus[: len(folds)]]
        try:
            wait(served, return_when=FIRST_EXCEPTION)
            for future in served:
                if future.done():
                    future.result()
        except BaseException:  # whatever went wrong here, the processes end with this one
            children.stop()
            raise
    if signals.name:
        _log.info("stopped by %s; the same command goes on from here", signals.name)
        return False
    _report(failures, folds)
    return True


def _report(failures: dict[str, str], folds: Sequence[str]) -> None:
    if failures:
        reasons = "; ".join(f"fold {fold}: {failures[fold]}" for fold in folds if fold in failures)
        raise TrainingError(f"{len(failures)} of {len(folds)} folds failed: {reasons}")


class _Children:
    """The processes that run; all of them can be told to end, and then none begins any more.

    They are sessions of their own, so that Ctrl-C reaches them once, from here, and not from the
    terminal besides: a second signal ends a training without its checkpoint.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False
        # held while a process begins, so that none is missed when all are told to end; a signal may
        # come while its handler holds it already
        self._lock = threading.RLock()

    def start(self, command: Sequence[str], gpu: str) -> subprocess.Popen[str] | None:
        """Begin a process that sees this GPU alone; None when all were told to end."""
        with self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(
                command,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            self._running.add(process)
        return process

    def follow(self, process: subprocess.Popen[str], prefix: str, stream: TextIO) -> str:
        """Pass on each line that a process says; why it failed, empty if it did not."""
        said = ""
        assert process.stdout is not None
        try:
            for line in process.stdout:
                text = line.rstrip("\n")
                stream.write(f"{prefix}{text}\n")
                stream.flush()
                said = text if text.strip() else said
        except BaseException:
            process.terminate()
            raise
        finally:
            status = process.wait()
            process.stdout.close()
            with self._lock:
                self._running.discard(process)
        if status == 0:
            return ""
        if status < 0:
            hint = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-status).name}{hint}"
        if status == _INTERRUPTED:
            return "was interrupted"
        return said.removeprefix("error: ") or f"ended with status {status}"

    def stop(self) -> None:
        """Tell all processes to end."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()
