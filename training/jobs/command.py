"""A command as a process of its own, whose lines are heard and kept.

Uses nothing but Python's own library: a node of a cluster gets this file's functions by value.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERRUPTED = 130  # exit status of a command that Ctrl-C ended
GO_ON_LATER = os.EX_TEMPFAIL  # 75: a signal ended it; the same command goes on from there
_PARENT = "ICHSEG_JOB_PARENT"  # names the process with which a job has to end
_PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    Attributes:
        status: The exit status; 0 if it succeeded.
        reason: Why it failed, in a line; empty if it did not.
    """

    status: int
    reason: str = ""


def begin(words: Sequence[str], root: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Begin ``python -m training``, with both of its streams in a pipe.

    It is a session of its own, so that Ctrl-C reaches it once, from here, and not from the terminal
    besides: a second signal ends a training without its checkpoint. It ends when this process does,
    however that ends, lest it go on beside another that is started in its place.

    Args:
        words: The command and what follows it.
        root: The folder that holds the package ``training``, whatever lies in the current one.
        environment: Variables in place of this process' own.
    """
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    own = {_PARENT: str(os.getpid()), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "training", *words],
        env={**os.environ, **own, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def follow(process: subprocess.Popen[str], log: str, hear: Callable[[str], None]) -> Ending:
    """Keep each line that a process says, with the time of day, until it ends.

    Args:
        process: From ``begin``.
        log: The file that the lines are appended to; its folder is made.
        hear: Called with each line.
    """
    said, status = "", None
    assert process.stdout is not None
    try:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with Path(log).open("a", encoding="utf-8") as stream:
            for line in process.stdout:
                text = line.rstrip("\n")
                stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
                stream.flush()
                hear(text)
                said = text if text.strip() else said
        status = process.wait()
    finally:
        if status is None:  # something went wrong here: it has nobody to tell
            process.terminate()
            process.wait()
        process.stdout.close()
    return Ending(status, _reason(status, said))


def end_with_parent() -> None:
    """Have this process end, if it is a job, as soon as the process that began it is gone."""
    parent = os.environ.pop(_PARENT, "")
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # gone before that was set
            os._exit(1)


def _reason(status: int, said: str) -> str:
    if status == 0:
        return ""
    if status < 0:
        hint = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-status).name}{hint}"
    if status in (INTERRUPTED, GO_ON_LATER):
        return "was interrupted"
    return said.removeprefix("error: ") or f"ended with status {status}"
