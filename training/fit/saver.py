"""Writes the checkpoints of a training beside it, so that it need not wait for the disk."""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from training.data.workspace import BEST_CHECKPOINT, LATEST_CHECKPOINT
from training.fit.checkpoint import checkpoint_of, require_sound, write
from training.fit.fold_run import FoldRun
from training.fit.step import TrainingState

EVERY_S = 180.0  # between two checkpoints: what a kill may cost, beside the epoch in hand

_log = logging.getLogger(__name__)


class Saver:
    """Writes a run's checkpoints beside the training, every few minutes and at its end.

    A checkpoint of a large network takes as long as many steps, most of it the disk's. So the state
    is copied to the host, and a thread writes the copy while the next epoch goes on. Leaving the
    saver waits for that. Where several processes train together, the leading one does it.
    """

    def __init__(self, run: FoldRun) -> None:
        self._run = run
        self._best: dict[str, Any] | None = None  # that is not yet on the disk
        self._began = -math.inf  # to write the last ones, by time.monotonic()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Saver:
        """Nothing is written yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for what is being written.

        Raises:
            OutputError: It cannot be written, and nothing else has failed.
        """
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            _log.warning("warning: %s", error)  # beside what ends the training
        finally:
            self._thread.shutdown()

    def epoch(self, state: TrainingState, *, last: bool) -> None:
        """Keep the state after an epoch: as the best one if it is, and on the disk if it is time.

        Args:
            state: The state; it may go on at once.
            last: Whether the training has come to its end, and all is to be written.

        Raises:
            TrainingError: There is nothing good to save; the old checkpoints stay.
            OutputError: What was being written could not be.
        """
        if not self._run.group.leads:
            return
        has_dice = state.history[-1].pseudo_dice is not None  # else the average is of before it
        if has_dice and state.best_dice == state.average_dice:
            self._best = _copied_state(self._run, state)
        if last or time.monotonic() - self._began >= EVERY_S:
            self.save(state)

    def save(self, state: TrainingState) -> None:
        """Begin to write the state, and the best one if that is not on the disk yet.

        Raises:
            TrainingError: There is nothing good to save; the old checkpoints stay.
            OutputError: What was being written could not be.
        """
        if not self._run.group.leads:
            return
        self.wait()
        self._began = time.monotonic()
        # the latest goes last: what a kill before it leaves out is done again
        files = [] if self._best is None else [(self._best, BEST_CHECKPOINT)]
        files.append((_copied_state(self._run, state), LATEST_CHECKPOINT))
        self._best = None
        self._writing = self._thread.submit(self._write, files)

    def wait(self) -> None:
        """Wait until what is being written is on the disk.

        Raises:
            OutputError: It cannot be written; the old checkpoint stays.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, files: list[tuple[dict[str, Any], str]]) -> None:
        for checkpoint, name in files:
            write(self._run, checkpoint, name)


def _copied_state(run: FoldRun, state: TrainingState) -> dict[str, Any]:
    """A checkpoint of its own memory on the host.

    Raises:
        TrainingError: There is nothing good to save.
    """
    require_sound(run, state)
    copied: dict[str, Any] = _copied(checkpoint_of(run, state))
    if run.device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    return copied


def _copied(tree: Any) -> Any:
    """A tree of plain values whose tensors are copied to the host."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", non_blocking=True, copy=True)
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copied(value) for value in tree)
    return tree
