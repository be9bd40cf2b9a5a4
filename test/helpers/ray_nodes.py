"""Real nodes of a Ray cluster on this machine: each is a `ray start`, and can be killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_RAY = str(Path(sys.executable).with_name("ray"))
_PATIENCE_S = 180
_LESS = (  # nothing of what only people look at
    "--disable-usage-stats", "--include-log-monitor=false", "--object-store-memory=80000000",
    "--num-gpus=0", "--block",
)  # fmt: skip
# A node that is gone is known to be gone after five seconds; one that is slow is waited for.
_CONFIG = (
    '{"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, '
    '"health_check_timeout_ms": 20000, "health_check_failure_threshold": 5}'
)


class Nodes:
    """The nodes of a cluster, by name; the first is the head, all have their own folders.

    With one folder for several, nodes that begin at the same time take each other's sockets.

    Attributes:
        address: Where the cluster is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._processes = folder, dict[str, subprocess.Popen[bytes]]()
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.address = f"127.0.0.1:{port}"

    def add(self, name: str, cores: int = 1) -> None:
        """Begin to start a node."""
        where = [f"--address={self.address}"]
        if not self._processes:
            port = self.address.rpartition(":")[2]
            where = ["--head", f"--port={port}", f"--system-config={_CONFIG}", "--no-monitor",
                     "--include-dashboard=false"]  # fmt: skip
        place = self._folder / name
        place.mkdir()
        with self._said(name).open("w") as said:
            self._processes[name] = subprocess.Popen(
                [_RAY, "start", *where, *_LESS, f"--num-cpus={cores}", f"--temp-dir={place}"],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "RAY_raylet_start_wait_time_s": str(_PATIENCE_S),  # on a busy machine
                },
            )  # fmt: skip

    def wait(self) -> None:
        """Wait until all nodes have been started."""
        until = time.monotonic() + _PATIENCE_S
        for name, process in self._processes.items():
            while "Ray runtime started" not in (said := self._said(name).read_text()):
                if process.poll() is not None or time.monotonic() > until:
                    raise TimeoutError(f"{name} has not been started: {said}")
                time.sleep(0.1)

    def kill(self, name: str) -> None:
        """End all processes of a node at once, as when its power is cut."""
        process = self._processes.pop(name)
        for pid in _session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """End all nodes."""
        for name in list(self._processes):
            self.kill(name)

    def processes(self, name: str) -> list[int]:
        """The processes of a node."""
        return _session(self._processes[name].pid)

    def _said(self, name: str) -> Path:
        return self._folder / f"{name}.said"


@contextlib.contextmanager
def started(count: int) -> Iterator[Nodes]:
    """A cluster of so many nodes with a core each: ``head``, ``node1``, ``node2`` and so on."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets have short names
    nodes = Nodes(folder)
    # a package that comes with others of requirements-dev.txt, and with which `import ray` takes
    # four times as long in each process of each node
    (folder / "rfc3987_syntax.py").write_text("raise ImportError('not wanted here')")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    try:
        for number in range(count):
            nodes.add(f"node{number}" if number else "head")
        nodes.wait()
        yield nodes
    finally:
        nodes.stop()
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
        shutil.rmtree(folder, ignore_errors=True)


def _session(leader: int) -> list[int]:
    """The processes of a session: all that `ray start` began, and what those began."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                found.append(int(path.parent.name))
    return found
