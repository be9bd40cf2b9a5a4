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
_PATIENCE_S = 300
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
    """The nodes of a cluster, by name; the first is the head.

    Attributes:
        address: Where the cluster is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._processes = folder, dict[str, subprocess.Popen[bytes]]()
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{found.getsockname()[1]}"

    def __len__(self) -> int:
        return len(self._processes)

    def add(self, *names: str) -> None:
        """Start nodes side by side, each several times if need be.

        A node ends if its agents, Python processes, have not begun within fifteen seconds, as on a
        busy machine.
        """
        until = time.monotonic() + _PATIENCE_S
        places = {}
        for name in names:
            places[name] = self._folder / name
            self._begin(name, places[name])
        while places:
            time.sleep(0.1)
            for name, place in list(places.items()):
                state = self._state_of(name, place)
                if state == "up":
                    del places[name]
                elif time.monotonic() > until:
                    raise TimeoutError(f"{name} has not been started: {self._said(place)}")
                elif state == "dead":
                    self.kill(name)
                    places[name] = place.with_name(f"{place.name}-again")
                    self._begin(name, places[name])

    def _begin(self, name: str, place: Path) -> None:
        where = [f"--address={self.address}"]
        if not self._processes:
            port = self.address.rpartition(":")[2]
            where = ["--head", f"--port={port}", f"--system-config={_CONFIG}", "--no-monitor",
                     "--include-dashboard=false"]  # fmt: skip
        place.mkdir()
        with place.with_suffix(".said").open("w") as said:
            self._processes[name] = subprocess.Popen(
                [_RAY, "start", *where, *_LESS, "--num-cpus=1", f"--temp-dir={place}"],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "RAY_raylet_start_wait_time_s": str(_PATIENCE_S),
                    "RAY_agent_register_timeout_ms": str(1000 * _PATIENCE_S),
                },
            )  # fmt: skip

    def _state_of(self, name: str, place: Path) -> str:
        """``up``, ``dead``, or empty as long as it is neither."""
        if "Ray runtime started" in self._said(place):
            return "up"
        logs = place.glob("session_*/logs/raylet*.out")
        failed = any("Check failed" in log.read_text(errors="replace") for log in logs)
        return "dead" if failed or self._processes[name].poll() is not None else ""

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

    @staticmethod
    def _said(place: Path) -> str:
        return place.with_suffix(".said").read_text()


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
        nodes.add("head")
        nodes.add(*(f"node{number}" for number in range(1, count)))
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
