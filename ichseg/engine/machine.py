"""What the machine allows this process: CPUs and memory, within all limits that are set.

A container may be allowed less than the machine has, by affinity, by the quotas and limits of its
cgroup and of all cgroups above it, and by resource limits; a batch system such as Slurm sets such
limits too, some levels down.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOST_THREADS = 32  # more share too little work
_NO_LIMIT = 1 << 60  # version 1 of cgroups writes 2**63 less a page
_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """How much memory the process may hold.

    Attributes:
        total: What its resident memory may become, in bytes.
        by: What sets that, such as ``the cgroup`` or ``RLIMIT_DATA``.
    """

    total: int
    by: str


def cpu_threads() -> int:
    """Threads to compute with: ``cpus()``, at most 32, and no more than ``OMP_NUM_THREADS``.

    Whoever runs several processes side by side says with that variable what each may take; torch
    goes by it, too.
    """
    wished = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    least = [int(wished)] if wished.isdecimal() and int(wished) else []
    return min(cpus(), MOST_THREADS, *least)


def cpus(root: Path = _ROOT) -> int:
    """CPUs that this process may really use.

    torch and OpenVINO count the machine's cores; a container may be allowed fewer by affinity or by
    a cgroup's quota, and more threads than that only get in each other's way.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return max(1, min([allowed, *_cgroup_cpus(root)]))


def free_memory_bytes(root: Path = _ROOT) -> int | None:
    """How much more memory this process may take, in bytes, without swapping; None if unknown.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    rooms = _memory_rooms(root)
    return max(0, min(rooms)[0]) if rooms else None


def memory_limit(root: Path = _ROOT) -> MemoryLimit | None:
    """The tightest of all limits: cgroups (version 2 or 1), resource limits, free memory.

    Args:
        root: Where ``proc`` and ``sys`` are.

    Returns:
        None where none can be found out, as on another system than Linux.
    """
    rooms = _memory_rooms(root)
    if not rooms:
        return None
    room, by = min(rooms)
    return MemoryLimit(resident_bytes(root) + max(room, 0), by)


def resident_bytes(root: Path = _ROOT) -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    return _sizes(root / "proc/self/status").get("VmRSS", 0)


def _memory_rooms(root: Path) -> list[tuple[int, str]]:
    """How many more bytes each limit allows, and what sets it."""
    status = _sizes(root / "proc/self/status")
    rooms = list(_cgroup_rooms(root))
    for name, kind, used in (
        ("RLIMIT_DATA", resource.RLIMIT_DATA, status.get("VmData", 0)),
        ("RLIMIT_AS", resource.RLIMIT_AS, status.get("VmSize", 0)),
    ):
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY:
            rooms.append((soft - used, name))
    free = _sizes(root / "proc/meminfo").get("MemAvailable")
    if free is not None:
        rooms.append((free, "the free memory"))
    return rooms


def _cgroup_folders(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """Version and folder of each cgroup that this process is in, the innermost first.

    In a container the path that the kernel names may be the host's; then the mount's top is ours.
    """
    top = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                version, base = 2, top
            elif controller in controllers.split(","):
                version, base = 1, top / controller
            else:
                continue
            folder = base / path.lstrip("/")
            for place in dict.fromkeys((folder, *folder.parents)):
                if place == base or base in place.parents:
                    yield version, place


def _cgroup_cpus(root: Path) -> Iterator[int]:
    """Whole CPUs that each cgroup's quota allows, rounded up."""
    for version, place in _cgroup_folders(root, "cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no file, or "max"
            if version == 2:
                quota, period = map(int, (place / "cpu.max").read_text().split())
            else:
                quota = int((place / "cpu.cfs_quota_us").read_text())
                period = int((place / "cpu.cfs_period_us").read_text())
            if quota > 0:  # version 1 writes -1 for none
                yield max(1, math.ceil(quota / period))


def _cgroup_rooms(root: Path) -> Iterator[tuple[int, str]]:
    """How many more bytes each cgroup allows; caches of files do not count as used."""
    for version, place in _cgroup_folders(root, "memory"):
        most, used, prefix = "memory.max", "memory.current", ""
        if version == 1:
            most, used, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max"
            allowed = int((place / most).read_text())
            if allowed >= _NO_LIMIT:
                continue
            taken = int((place / used).read_text())
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            caches = sum(
                int(stat.get(prefix + kind, 0)) for kind in ("inactive_file", "active_file")
            )
            yield allowed - max(taken - caches, 0), "the cgroup"


def _sizes(path: Path) -> dict[str, int]:
    """The sizes in a file of ``/proc``, in bytes; nothing where there is no such file."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            parts = value.split()
            if len(parts) == 2 and parts[1] == "kB":
                found[key] = int(parts[0]) * 1024
    return found
