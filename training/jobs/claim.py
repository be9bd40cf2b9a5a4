"""A folder that one process at a time may work in, whichever machine it runs on.

A file says who it is, and changes every few seconds as long as that process lives. Locks of the
file system are not asked: on a network file system they may hold on each machine for itself, which
no machine can find out alone. On the same machine it is known at once whether the process still
lives; of another machine's process the file is watched for a while.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ichseg.errors import OutputError, TrainingError
from training.data.workspace import CLAIM_FILE

BEAT_S = 5.0
SILENT_S = 30.0  # after which the process of another machine is taken for dead
_MOMENT_S = 0.05

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed(folder: Path, doing: str) -> Iterator[None]:
    """Keep other processes from working in the same folder meanwhile.

    A process whose claim has been taken from it, as after having been stopped for long, ends by
    SIGTERM: another is at work in its place.

    Args:
        folder: The folder; it is made.
        doing: What is done there, such as ``training this fold``.

    Raises:
        TrainingError: Another process does it already.
        OutputError: The folder cannot be written.
    """
    path = folder / CLAIM_FILE
    own = {**_this_process(), "token": secrets.token_hex(8), "beat": 0}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not _create(path, own):
            _wait_for_its_end(path, folder, doing)
    except OSError as error:
        raise OutputError(f"{path}: cannot write ({error.strerror})") from error
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, own, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        found = _read(path)
        if found is not None and found.get("token") == own["token"]:
            path.unlink(missing_ok=True)


def _create(path: Path, own: dict[str, Any]) -> bool:
    """Write the claim if there is none; a link is made of a whole file, or not at all."""
    whole = path.with_name(f"{path.name}-{own['token']}")
    whole.write_text(json.dumps(own), encoding="utf-8")
    try:
        path.hardlink_to(whole)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        with contextlib.suppress(FileExistsError):
            with path.open("x", encoding="utf-8") as stream:
                stream.write(json.dumps(own))
            return True
        return False
    finally:
        whole.unlink(missing_ok=True)
    return True


def _wait_for_its_end(path: Path, folder: Path, doing: str) -> None:
    """Take away a claim whose process is gone.

    Raises:
        TrainingError: It is not gone.
    """
    first = _read(path)
    if first is None:
        return
    own = _this_process()
    who = f"process {first.get('pid')} on {first.get('host')}"
    here = [first.get(key) == own[key] for key in ("boot", "space")]
    if all(here) and first.get("began"):
        gone = not _lives(first)
    else:
        until = time.monotonic() + SILENT_S
        while time.monotonic() < until and _read(path) == first:
            time.sleep(min(BEAT_S / 5, SILENT_S / 10))
        gone = _read(path) == first
    if not gone:
        raise TrainingError(f"{folder}: another process is {doing}: {who}")
    # of several that see this, whoever makes the mark takes the claim away; the others would find,
    # and must not take, that of whoever was faster
    digest = hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()
    mark = path.with_name(f"{path.name}-after-{digest[:16]}")
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        time.sleep(_MOMENT_S)
        with contextlib.suppress(FileNotFoundError):  # its maker may have died just then
            if time.time() - mark.stat().st_mtime > SILENT_S:
                mark.unlink()
        return
    try:
        if _read(path) == first:
            path.unlink(missing_ok=True)
    finally:
        mark.unlink(missing_ok=True)


def _beat(path: Path, own: dict[str, Any], ended: threading.Event) -> None:
    """Change the file every few seconds."""
    beat = 0
    while not ended.wait(BEAT_S):
        found = _read(path)
        if found is not None and found.get("token") != own["token"]:
            _log.error("%s is claimed by another process by now, this one ends", path.parent)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        beat += 1
        temporary = path.with_name(f"{path.name}-{own['token']}")
        with contextlib.suppress(OSError):  # the disk may be full for a while
            temporary.write_text(json.dumps({**own, "beat": beat}), encoding="utf-8")
            temporary.replace(path)


def _this_process() -> dict[str, Any]:
    """By what this process is known again: machine, number, and when it began."""
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
        "space": _space(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
    }


def _lives(claim: dict[str, Any]) -> bool:
    """Whether the process of a claim of this machine lives; its number may be another's by now."""
    try:
        return _began(int(claim["pid"])) == claim["began"]
    except (KeyError, ValueError, TypeError):
        return False


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty if there is none."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _space() -> str:
    """In which space the number of this process counts: each container has its own."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8").strip()
    return ""


def _read(path: Path) -> dict[str, Any] | None:
    """The claim in a file; None if there is none, an empty one where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
