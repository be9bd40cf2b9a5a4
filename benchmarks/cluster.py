"""Scans over a Ray cluster of this machine: speed of two workers, what Ray costs, and its memory.

    PYTHONPATH=. .venv/bin/python benchmarks/cluster.py [--quick] [--row NAME ...]

Needs requirements-cluster.txt and two idle cores; its nodes are real (test/helpers/ray_nodes.py).

speed     24 copies of a sample scan with the default weights, two single-threaded workers
          against one
overhead  time a case of tiny scans with one worker, against one process without Ray
many      10,000 tiny scans: memory of the driver, and time a case at the end and at the beginning;
          processor time of the driver and of Ray's head a case
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import Row, at_most, faster, informs, report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "test"))
from helpers import ray_nodes  # noqa: E402
from helpers.cluster_runs import make_scans, segment, start  # noqa: E402

SAMPLE = ROOT / "test" / "sample" / "input" / "synthetic_subdural.nii.gz"
TINY = (6, 24, 24)
WARM_UP = 20  # cases that do not count where the time of one is measured


@dataclass(frozen=True, slots=True)
class Done:
    """A case when its mask had been written.

    Attributes:
        at_s: When the program said so.
        driver_mb: What the program's first process held then.
        driver_cpu_s: Processor time that it had taken.
    """

    at_s: float
    driver_mb: float
    driver_cpu_s: float


def follow(process, note: Callable[[int], None] = lambda _: None) -> tuple[float, list[Done]]:
    """Hear a run to its end: when it began on its cases, and each of them.

    Args:
        process: The run.
        note: Called after each case with how many have been done.

    Raises:
        SystemExit: It failed.
    """
    began_s, done, said = 0.0, [], []
    for line in process.stdout:
        said.append(line)
        if ", preset " in line and not began_s:
            began_s = time.monotonic()
        if " -> " in line:
            done.append(Done(time.monotonic(), _resident_mb(process.pid), _cpu_s(process.pid)))
            note(len(done))
    if process.wait() != 0 or not done:
        raise SystemExit("".join(["error: the run failed\n", *said[-20:]]))
    return began_s, done


def speed(place: Path, quick: bool) -> list[Row]:
    """Two workers against one."""
    count = 4 if quick else 24
    (place / "in").mkdir()
    for number in range(count):
        shutil.copy(SAMPLE, place / "in" / f"{number:02d}.nii.gz")

    def seconds(name: str, address: str) -> float:
        words = ["--input", place / "in", "--output", place / name, "--preset", "fast"]
        words += ["--device", "cpu", "--ray", address, "--ray-cpus", "1"]
        began_s, done = follow(start("process.py", *words))
        return done[-1].at_s - began_s

    with ray_nodes.started(1) as nodes:
        one = seconds("one", nodes.address)
        nodes.add("other")
        two = seconds("two", nodes.address)
    return [faster(f"{count} scans by two workers, by one", two, one, "s", 1.8)]


def overhead(place: Path, quick: bool) -> list[Row]:
    """What a case costs more with Ray than without."""
    _make_tiny(place, 2 * WARM_UP if quick else 400)

    def seconds_a_case(*more: str) -> float:
        _, done = follow(segment(place, f"out{len(more)}", *more))
        return (done[-1].at_s - done[WARM_UP].at_s) / (len(done) - WARM_UP - 1)

    alone = seconds_a_case()
    with ray_nodes.started(1) as nodes:
        by_ray = seconds_a_case("--ray", nodes.address, "--ray-cpus", "1")
    return [at_most("overhead a case", 1000 * (by_ray - alone), "ms", 50)]


def many(place: Path, quick: bool) -> list[Row]:
    """Whether memory and time stay as they are over many cases."""
    part = 100 if quick else 1000
    count = 3 * part if quick else 10 * part
    marks = (WARM_UP, part, count - part + WARM_UP, count)
    cpu_s: dict[int, float] = {}  # by then, of all that work on the cases
    _make_tiny(place, count)
    with ray_nodes.started(2) as nodes:
        (ray_head,) = _named(nodes.processes("head"), "gcs_server")
        before_s = _cpu_s(ray_head)
        run = segment(place, "out", "--ray", nodes.address, "--ray-cpus", "1")

        def note(number: int) -> None:
            if number in marks:
                pids = [*nodes.processes("head"), *nodes.processes("node1")]
                all_of_it = [run.pid, ray_head, *_named(pids, "ray::_Actor")]
                cpu_s[number] = sum(map(_cpu_s, all_of_it))

        _, done = follow(run, note)
        head_s = _cpu_s(ray_head) - before_s
    growth = max(case.driver_mb for case in done) - done[WARM_UP].driver_mb
    begin, first, last, end = (done[mark - 1].at_s for mark in marks)
    cpu_begin, cpu_first, cpu_last, cpu_end = (cpu_s[mark] for mark in marks)
    driver_s = done[-1].driver_cpu_s - done[WARM_UP].driver_cpu_s
    file_bytes = (place / "out" / "results.json").stat().st_size
    against = f"last {part} scans against the first"
    return [
        at_most(f"growth of the driver over {count} scans", growth, "MB", 100),
        at_most(against, (end - last) / (first - begin), "times", 1.1),
        at_most(
            f"{against}, processor time",
            (cpu_end - cpu_last) / (cpu_first - cpu_begin),
            "times",
            1.1,
        ),
        informs("time a case", 1000 * (end - begin) / (count - WARM_UP), "ms"),
        informs("driver's processor time a case", 1000 * driver_s / (count - WARM_UP - 1), "ms"),
        informs("head's processor time a case", 1000 * head_s / count, "ms"),
        informs("results.json, of each case", file_bytes / count, "bytes"),
    ]


ROWS: dict[str, Callable[[Path, bool], list[Row]]] = {
    "speed": speed,
    "overhead": overhead,
    "many": many,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the line of JSON; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few scans: whether it works at all")
    parser.add_argument("--row", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args(argv)
    rows = []
    for name in args.row:
        with tempfile.TemporaryDirectory() as place:
            rows += ROWS[name](Path(place), args.quick)
    return report("cluster", rows)


def _make_tiny(place: Path, count: int) -> None:
    make_scans(place, count, TINY)
    (place / "in" / "bad.mha").unlink()


def _resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def _cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _named(pids: Sequence[int], name: str) -> list[int]:
    """Those of these processes whose names begin so."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if Path(f"/proc/{pid}/comm").read_text().startswith(name):
                found.append(pid)
    return found


if __name__ == "__main__":
    sys.exit(main())
