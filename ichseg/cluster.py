"""A Ray cluster: joined where the user asks for one, and its nodes are asked what they see.

Ray is imported in here, and only when it is asked for. What runs on a node is sent there by value,
since it is to find out whether the node has the same ``ichseg`` at all: it uses nothing but
Python's own library.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ichseg import __version__
from ichseg.errors import DeviceError, OutputError

AUTO = "auto"
_CONNECT_S = 10.0
_ANSWER_S = 300.0  # for a node to begin a process and look around
_APPEAR_S = 15.0  # for a new file to be seen on a network file system
_MOST_APART_S = 10.0  # of clocks


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of a cluster on which something can run.

    Attributes:
        id: Ray's name of it.
        name: Its name for people.
        cores: CPU cores that Ray may give away.
        gpus: GPUs.
        memory_bytes: Memory.
    """

    id: str
    name: str
    cores: int
    gpus: int
    memory_bytes: int


@contextlib.contextmanager
def joined(address: str) -> Iterator[Any]:
    """Be a driver of a cluster until the block ends; what the driver began there ends with it.

    Args:
        address: ``HOST:PORT`` of the head node, or ``auto`` for the cluster of this machine.

    Yields:
        The module ``ray``.

    Raises:
        DeviceError: Ray is not installed, or there is no such cluster.
    """
    if importlib.util.find_spec("ray") is None:
        raise DeviceError("--ray needs the package ray, which is not installed: pip install ray")
    _require_reachable(address)
    import ray

    with _signals_kept():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (Exception, SystemExit) as error:
            reason = str(error).strip().splitlines()[:1]
            raise DeviceError(
                f"--ray {address}: {reason[0] if reason else 'no connection'} (is this machine a "
                "node of it? `ray start` makes it one)"
            ) from error
    try:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield ray
    finally:
        with _signals_kept():
            ray.shutdown()


def nodes(ray: Any) -> list[Node]:
    """The nodes that are alive and have at least one core to give away."""
    found = []
    for raw in ray.nodes():
        has = raw["Resources"]
        if raw["Alive"] and has.get("CPU", 0) >= 1:
            found.append(
                Node(
                    raw["NodeID"],
                    raw["NodeManagerHostname"],
                    int(has["CPU"]),
                    int(has.get("GPU", 0)),
                    int(has.get("memory", 0)),
                )
            )
    return found


@contextlib.contextmanager
def probe(folder: Path, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """What a node has to see as this one does, for ``look``.

    Args:
        folder: Gets a hidden folder with a file that nodes have to read, and another that they
            write; both go when the block ends.
        files: Other files that nodes have to see.

    Yields:
        It; ``root`` in it may be set to the folder from which ``ichseg`` has to be imported.

    Raises:
        OutputError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=folder, prefix=".probe-")
    except OSError as error:
        raise OutputError(f"{folder}: cannot write ({error.strerror})") from error
    with place as name:
        token = secrets.token_hex(16)
        (Path(name) / "token").write_text(token, encoding="ascii")
        sizes = {str(path): path.stat().st_size for path in files if path.is_file()}
        folders = [str(path) for path in files if path.is_dir()]
        yield {
            "version": __version__, "place": name, "token": token, "sizes": sizes,
            "folders": folders, "patience_s": _APPEAR_S, "root": "",
        }  # fmt: skip


def require_alike(ray: Any, found: Sequence[Node], expected: Mapping[str, Any]) -> None:
    """Ask each node whether it sees the same files, has the same ``ichseg`` and the same time.

    A node that is lost while it is asked is no node that differs.

    Args:
        ray: From ``joined``.
        found: The nodes.
        expected: From ``probe``.

    Raises:
        DeviceError: Some differ; it says how.
    """
    ask = ray.remote(num_cpus=0, max_retries=0)(look)
    on_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    began = time.time()
    asked = {
        ask.options(scheduling_strategy=on_node(node.id, soft=False)).remote(expected): node
        for node in found
    }
    wrong, left = dict[Node, str](), list(asked)
    until = time.monotonic() + _ANSWER_S
    while left and time.monotonic() < until:
        answered, left = ray.wait(left, timeout=1.0)
        for each in answered:
            try:
                reason, clock = ray.get(each)
            except ray.exceptions.RayError as error:
                reason, clock = reason_of(error), time.time()
            if not began - _MOST_APART_S < clock < time.time() + _MOST_APART_S:
                reason = reason or f"its clock is {_apart(clock - began)} this machine's"
            if reason:
                wrong[asked[each]] = reason
    wrong |= {asked[each]: f"no answer within {_ANSWER_S:.0f} s" for each in left}
    alive = {node.id for node in nodes(ray)} if wrong else set()
    differ = [f"{node.name}: {reason}" for node, reason in wrong.items() if node.id in alive]
    if differ:
        raise DeviceError(f"--ray: {len(differ)} of {len(found)} nodes differ: {'; '.join(differ)}")


def look(expected: Mapping[str, Any]) -> tuple[str, float]:
    """Look around on a node.

    Args:
        expected: From ``probe``.

    Returns:
        What differs, in words, or an empty string; and the time of its clock, as ``time.time``.
    """
    clock = time.time()
    if expected["root"]:
        sys.path.insert(0, expected["root"])
    try:
        from ichseg import __version__ as version
    except ImportError as error:
        return f"cannot import ichseg ({error}) with {sys.executable}", clock
    if version != expected["version"]:
        return f"has ichseg {version}, expected {expected['version']}", clock
    token, until = Path(expected["place"], "token"), time.monotonic() + expected["patience_s"]
    while not token.exists() and time.monotonic() < until:
        time.sleep(0.2)
    try:
        if token.read_text(encoding="ascii") != expected["token"]:
            return f"sees another {token.parent.parent}", clock
    except OSError as error:
        return (
            f"does not see {token.parent.parent} as this machine does ({error.strerror}); expected "
            "a file system that all nodes share",
            clock,
        )
    try:
        own = token.with_name(secrets.token_hex(8))
        own.write_text("seen", encoding="ascii")
        own.unlink()
    except OSError as error:
        return f"cannot write to {token.parent.parent} ({error.strerror})", clock
    for path, size in expected["sizes"].items():
        try:
            seen = os.stat(path).st_size  # noqa: PTH116
        except OSError as error:
            return f"does not see {path} ({error.strerror})", clock
        if seen != size:
            return f"sees {path} with {seen} bytes, expected {size}", clock
    for path in expected["folders"]:
        if not Path(path).is_dir():
            return f"does not see {path}", clock
    return "", clock


def reason_of(error: Exception) -> str:
    """Why a call to another node failed, in a line."""
    if type(error).__name__ in ("ActorDiedError", "RayActorError", "ActorUnavailableError"):
        return "its process or its node is gone"
    cause = getattr(error, "cause", None)
    lines = str(cause or error).strip().splitlines()
    return f"{type(cause or error).__name__}: {lines[0] if lines else ''}"


def _apart(seconds: float) -> str:
    return f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'}"


def _require_reachable(address: str) -> None:
    """Find out in seconds what takes Ray two minutes.

    Raises:
        DeviceError: Nobody answers.
    """
    if address == AUTO:
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise DeviceError(f"--ray {address}: expected {AUTO}, or HOST:PORT such as head:6379")
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except OSError as error:
        raise DeviceError(
            f"--ray {address}: nobody answers ({error.strerror or error}); expected the address "
            "that `ray start --head` says"
        ) from error


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Leave signals to whoever had them before: Ray takes SIGTERM for itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
