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
import selectors
import signal
import subprocess
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

import torch

from ichseg.errors import IchsegError, TrainingError
from training.crossval.validate import is_validated
from training.data.workspace import ALL_FOLD, LATEST_CHECKPOINT, LOCK_FILE, fold_of
from training.fit import schedule
from training.fit.fold_run import FoldRun, load_checkpoint
from training.fit.schedule import ScheduleState

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
        TrainingError: No numbers, one given twice, or no such GPU.
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


def is_finished(workspace: Path, run: FoldRun) -> bool:
    """Whether a fold has been trained to its end, as these settings define it, and validated."""
    if not (run.folder / LATEST_CHECKPOINT).exists():
        return False
    raw = load_checkpoint(run.folder / LATEST_CHECKPOINT, run.configuration)
    state = ScheduleState(**raw["schedule"])
    if raw["finished"] is None or not schedule.end_reason(
        run.config.rules, state, raw["elapsed_s"]
    ):
        return False
    wanted = run.config.validation and fold_of(run.folder) != ALL_FOLD
    return not wanted or is_validated(workspace, run, raw["network"])


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from training the same fold meanwhile.

    Raises:
        TrainingError: One does already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(f"{folder}: another process is training this fold") from error
        except OSError:  # a file system without locks
            _log.debug("%s: cannot be locked", folder)
        yield  # closing the file gives it back, however this process ends


def train_in_sequence(folds: Sequence[str], train: Callable[[str], bool]) -> bool:
    """Train folds one after another in this process.

    Args:
        folds: Their names.
        train: Trains one; False when a signal ended it.

    Returns:
        Whether all were trained; False after a signal.

    Raises:
        TrainingError: Some failed; it names them. The others are trained all the same.
    """
    failures: dict[str, str] = {}
    for fold in folds:
        try:
            if not train(fold):
                return False
        except IchsegError as error:
            if len(folds) == 1:
                raise
            _log.error("fold %s failed: %s", fold, error)
            failures[fold] = str(error)
    _report(failures, len(folds))
    return True


def train_on_gpus(
    folds: Sequence[str],
    gpus: Sequence[str],
    command: Callable[[str], Sequence[str]],
    stream: TextIO | None = None,
) -> bool:
    """Train folds side by side, one a GPU; whichever GPU is free takes the next.

    Args:
        folds: Their names.
        gpus: As ``CUDA_VISIBLE_DEVICES`` takes them, one a process.
        command: The command line that trains a fold.
        stream: Where all that the processes say goes, each line after its fold; stderr by default.

    Returns:
        Whether all were trained; False after SIGINT, SIGTERM or SIGHUP, when each process was told
        and has ended.

    Raises:
        TrainingError: Some failed; it names them. The others are trained all the same.
    """
    stream = sys.stderr if stream is None else stream
    waiting, free = deque(folds), deque(gpus)
    if 0 < len(waiting) < len(free):
        _log.info("folds for %d of %d GPUs: the others stay idle", len(waiting), len(free))
    failures: dict[str, str] = {}
    with _Children() as children, selectors.DefaultSelector() as ready:
        while children.running or (waiting and not children.stopping):
            while waiting and free and not children.stopping:
                child = children.start(waiting[0], free.popleft(), command(waiting.popleft()))
                _log.info("fold %s: begins on GPU %s", child.fold, child.gpu)
                ready.register(child.output, selectors.EVENT_READ, child)
            for key, _ in ready.select():
                child = key.data
                for line in child.read():
                    stream.write(f"fold {child.fold}: {line}\n")
                stream.flush()
                if child.ended:
                    ready.unregister(child.output)
                    if reason := children.bury(child):
                        failures[child.fold] = reason
                    free.append(child.gpu)
        if children.stopping:
            _log.info("stopped by %s; the same command goes on from here", children.stopping)
            return False
    _report(failures, len(folds))
    return True


def _report(failures: dict[str, str], count: int) -> None:
    if failures:
        reasons = "; ".join(f"fold {fold}: {reason}" for fold, reason in failures.items())
        raise TrainingError(f"{len(failures)} of {count} folds failed: {reasons}")


@dataclass(slots=True, eq=False)
class _Child:
    """A fold's process.

    Attributes:
        fold, gpu: What it trains, and where.
        process: It.
        rest: Of its output, the line that has not ended yet.
        said: Its last line.
        ended: Whether its output has ended.
        told: Whether it has been told to end.
    """

    fold: str
    gpu: str
    process: subprocess.Popen[bytes]
    rest: bytes = b""
    said: str = ""
    ended: bool = False
    told: bool = False

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def read(self) -> list[str]:
        """The whole lines that have come since."""
        data = os.read(self.output.fileno(), 1 << 16)
        self.ended = not data
        *lines, self.rest = (self.rest + data).split(b"\n")
        if self.ended and self.rest:
            lines, self.rest = [*lines, self.rest], b""
        texts = [line.decode(errors="replace") for line in lines]
        self.said = next((text for text in reversed(texts) if text.strip()), self.said)
        return texts

    def stop(self) -> None:
        self.told = True
        self.process.terminate()


class _Children:
    """The processes that run, each told to end when this one is; entered while there are any.

    They are sessions of their own, so that Ctrl-C reaches them once, from here, and not from the
    terminal besides: a second signal ends a training without its checkpoint.
    """

    def __init__(self) -> None:
        self.running: list[_Child] = []
        self.stopping = ""  # the signal that came
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Children:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.running:  # whatever went wrong here
            child.stop()
        for child in list(self.running):
            self.bury(child)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, fold: str, gpu: str, command: Sequence[str]) -> _Child:
        process = subprocess.Popen(
            command,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        child = _Child(fold, gpu, process)
        self.running.append(child)
        if self.stopping and not child.told:  # the signal came in between
            child.stop()
        return child

    def bury(self, child: _Child) -> str:
        """Wait for its end; why it failed, empty if it did not."""
        status = child.process.wait()
        child.output.close()
        self.running.remove(child)
        if status == 0:
            return ""
        if status < 0:
            hint = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-status).name}{hint}"
        if status == _INTERRUPTED:
            return "was interrupted"
        return child.said.removeprefix("error: ") or f"ended with status {status}"

    def _note(self, number: int, _: types.FrameType | None) -> None:
        if self.stopping:  # a second time: at once
            signal.signal(number, self._before[signal.Signals(number)])
        self.stopping = signal.Signals(number).name
        for child in self.running:
            child.stop()
