"""Seconds per iteration of both sides, in short blocks that take turns."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fold_pair import HERE, ROOT, SIDES, FoldPair

# Between blocks, so that each begins with a full queue and alone on the machine.
PAUSE_S = 3.0


@dataclass(frozen=True, slots=True)
class Block:
    """What some iterations of one side took.

    Attributes:
        iterations: How many iterations they were.
        seconds: The seconds that they took, waiting for data included.
        wait: The seconds of these that were spent waiting for data.
        cpu: Processor time of the training process, that of its data workers not included; on a
            busy machine steadier than ``seconds``.
    """

    iterations: int
    seconds: float
    wait: float
    cpu: float


class BlockProcess:
    """A process that trains on as many iterations as it is told, and says how long they took."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None, log: Path
    ) -> None:
        self._log = log
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream,
                env=environment, cwd=ROOT, text=True,
            )  # fmt: skip

    def __enter__(self) -> BlockProcess:
        self._answer()  # the one that says it is ready
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, which ends it

    def block(self, iterations: int) -> Block:
        """Train on so many batches.

        Raises:
            SystemExit: The process died.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{iterations}\n")
        self._process.stdin.flush()
        return Block(iterations, **self._answer())

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: a side died while it was timed, see {self._log}")
        return json.loads(line)


def take_turns(
    ours: BlockProcess, rival: BlockProcess, *, blocks: int, iterations: int
) -> dict[str, list[Block]]:
    """Time both sides; block i of one stands beside block i of the other.

    Args:
        ours: Our process, ready to train.
        rival: The rival's process, ready to train.
        blocks: How many blocks each side trains.
        iterations: How many iterations a block has.
    """
    processes = dict(zip(SIDES, (ours, rival), strict=True))
    found: dict[str, list[Block]] = {side: [] for side in SIDES}
    for number in range(blocks):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            time.sleep(PAUSE_S)
            block = processes[side].block(iterations)
            found[side].append(block)
            print(
                f"  block {number + 1} of {blocks}, {side}: {block.seconds / iterations:.3f} s "
                f"per iteration, {block.wait / iterations:.3f} of it waiting",
                flush=True,
            )
    return found


def our_process(pair: FoldPair, workers: int) -> BlockProcess:
    """Start our training, with so many processes that make batches."""
    command = [sys.executable, str(HERE / "hippocampus_ours.py")]
    # another fold than the one that is scored, and no end of the epoch within a block
    command += [*map(str, pair.our_flags(0, fold=1)), "--workers", str(workers)]
    command += ["--batches-per-epoch", "1000000", "--restart"]
    return BlockProcess(command, pair.our_environment(), pair.folder / "blocks-ours.log")


def rival_process(pair: FoldPair, workers: int) -> BlockProcess:
    """Start nnunetv2's training, with so many processes that make batches."""
    environment = pair.rival_environment(None, workers)
    log = pair.folder / "blocks-rival.log"
    return BlockProcess(pair.rival_command("blocks"), environment, log)


def save(blocks: Mapping[str, Sequence[Block]], path: Path) -> None:
    """Keep what was measured."""
    kept = {side: [dataclasses.asdict(block) for block in blocks[side]] for side in SIDES}
    path.write_text(json.dumps(kept, indent=1))


def load(path: Path) -> dict[str, list[Block]]:
    """Read what was kept."""
    kept = json.loads(path.read_text())
    return {side: [Block(**block) for block in kept[side]] for side in SIDES}


def median_of(blocks: Sequence[Block], what: str) -> float:
    """The median ``seconds`` or ``cpu`` of one iteration."""
    return statistics.median(getattr(block, what) / block.iterations for block in blocks)


def median_ratio(kept: Mapping[str, Sequence[Block]], what: str) -> float:
    """The median of ours over the rival's, pair by pair, so that a change of load falls on both."""
    pairs = zip(*(kept[side] for side in SIDES), strict=True)
    return statistics.median(getattr(mine, what) / getattr(its, what) for mine, its in pairs)


def median_wait(blocks: Sequence[Block]) -> float:
    """The share of the time that is spent waiting for data, in percent."""
    return statistics.median(100 * block.wait / block.seconds for block in blocks)
