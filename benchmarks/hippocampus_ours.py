"""Our side of benchmarks that time training; takes the arguments of ``training train``.

    PYTHONPATH=. .venv/bin/python benchmarks/hippocampus_ours.py 3d_fullres --workspace W --fold 0

The training loop itself, held up between blocks: reads a number of iterations a line, lets it go on
for as many, and answers each with one line of JSON. The other side: ``hippocampus_rival.py``, step
``blocks``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import Any

import torch

from training.batches.stream import open_batches
from training.fit import loop
from training.jobs import train

WARM_UP = 3  # iterations that are not timed


class HeldStream:
    """A stream of batches that gives as many as a line of the input says, then answers."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self._stream = open_batches(*arguments, **more)
        self._left = WARM_UP
        self._began: dict[str, float] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> HeldStream:
        self._stream.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(*error)

    def __next__(self) -> Any:
        if not self._left:  # the iteration before this call was the block's last
            self._answer()
            line = sys.stdin.readline()
            if not line:
                raise SystemExit(0)
            self._left, self._began = int(line), self._now()
        self._left -= 1
        return next(self._stream)

    def _answer(self) -> None:
        answer: dict[str, float] = {"ready": True}
        if self._began is not None:
            now = self._now()
            answer = {key: now[key] - self._began[key] for key in now}
        print(json.dumps(answer), file=sys.__stdout__, flush=True)

    def _now(self) -> dict[str, float]:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        clocks = {"seconds": time.perf_counter(), "cpu": time.process_time()}
        return {**clocks, "wait": self._stream.waited_s}


def main() -> int:
    """Answer requests until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    train.add_arguments(parser)
    loop.open_batches = HeldStream  # type: ignore[assignment, misc]
    with contextlib.redirect_stdout(sys.stderr):
        return train.main(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
