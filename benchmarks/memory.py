"""Peak memory of a command with all the processes that it starts (Linux)."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class Peak:
    """The most resident memory, in MB.

    Attributes:
        largest_mb: The peak of the largest process, by the kernel's own account (VmHWM).
        together_mb: The peak of all processes at once, what they share counted once (the sum of
            Pss), as seen every 50 ms.
    """

    largest_mb: float
    together_mb: float


def peak(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path | None = None
) -> Peak:
    """Run a command and follow it; what it says on stderr goes to ``log``.

    Raises:
        SystemExit: The command failed.
    """
    largest, together = 0, 0
    with (
        Path(log or os.devnull).open("w", encoding="utf-8") as said,
        subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=said
        ) as process,
    ):
        while process.poll() is None:
            family = _family(process.pid)
            largest = max([largest, *(_kilobytes(pid, "status", "VmHWM:") for pid in family)])
            together = max(together, sum(_kilobytes(pid, "smaps_rollup", "Pss:") for pid in family))
            time.sleep(_EVERY_S)
    if process.returncode != 0:
        raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}")
    return Peak(largest * 1024 / 1e6, together * 1024 / 1e6)


def _family(pid: int) -> list[int]:
    """The process and all its descendants."""
    found = [pid]
    for parent in found:  # grows while it is gone through
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue  # the thread has ended
    return found


def _kilobytes(pid: int, file: str, key: str) -> int:
    """One figure of a process; 0 when it has ended."""
    try:
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
