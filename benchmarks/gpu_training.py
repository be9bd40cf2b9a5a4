"""How fast training is on a GPU, in milliseconds an iteration; parts of ``gpu.py``.

What is timed is the loop of the ``train`` command with all that it does in an epoch: drawing, cases
on the card, augmentation, loss, update, reading the loss. ``plain`` is what nnunetv2 does, in plain
torch (``gpu_plain.py``); that one is spared all work with data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_cases, gpu_plain
from benchmarks.gpu_cases import CONFIGURATION, Place
from benchmarks.gpu_clock import forget_peak, peak, settle, timed
from benchmarks.gpu_pack import HIPPOCAMPUS
from benchmarks.rows import LeftOutError, Row, informs
from ichseg.model import plans
from ichseg.model.network import build_network
from ichseg.predict.dice import dice_of_masks
from training.batches.stream import BatchStream, open_batches
from training.crossval.validate import load_network
from training.data.workspace import LATEST_CHECKPOINT
from training.fit import loop
from training.fit.checkpoint import load_checkpoint
from training.fit.configuration import TRAINING_RECIPES, TrainingConfig
from training.fit.fold_run import FoldRun, open_run
from training.store import chunks

WARM_UP, BLOCKS, ITERATIONS = 8, 3, 20
_AROUND_S = 40  # before the training on the Hippocampus, and after it for the Dice
MOST_WORKERS = 12  # nnunetv2's default


class _MeasuredError(Exception):
    """All blocks are timed, and the training need not go on."""


class TimedStream:
    """A stream of batches that takes the time of blocks of iterations, then ends the training.

    Before each block some iterations pass that are not timed: by then what was told of the last one
    holds nothing up, and no more batches lie ready than usual.

    Attributes:
        seconds: The seconds of one iteration, of each block.
        waits: The share of them that was spent waiting for a batch, in percent.
        first: When the first block began; None before.
    """

    def __init__(
        self, stream: BatchStream, lengths: tuple[int, int, int], tell: Callable[[], None]
    ) -> None:
        """Prepare to take the time.

        Args:
            stream: The stream.
            lengths: Iterations before a block, blocks, iterations of a block.
            tell: Called after each block.
        """
        self._stream, self._tell = stream, tell
        self._warm_up, self._blocks, self._iterations = lengths
        self._count = 0
        self._began = (0.0, 0.0)
        self.seconds: list[float] = []
        self.waits: list[float] = []
        self.first: float | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> TimedStream:
        self._stream.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(*error)

    def __next__(self) -> Any:
        place = self._count % (self._warm_up + self._iterations)
        if place == self._warm_up:
            self._began = self._now()
            self.first = self.first or self._began[0]
        elif place == 0 and self._count:
            self._end_block()
        self._count += 1
        return next(self._stream)

    def _now(self) -> tuple[float, float]:
        settle()
        return time.perf_counter(), self._stream.waited_s

    def _end_block(self) -> None:
        now = self._now()
        took = now[0] - self._began[0]
        self.seconds.append(took / self._iterations)
        self.waits.append(100 * (now[1] - self._began[1]) / took)
        self._tell()
        if len(self.seconds) == self._blocks:
            raise _MeasuredError


def measure_ours(
    place: Place,
    rate_tflops: float | None,
    tell: Callable[[Row], None],
    *,
    layout: str,
    precision: str,
    compiled: bool,
) -> None:
    """Time our training.

    Args:
        place: Where, and on what.
        rate_tflops: The card's measured rate of bf16 matrix products; None on the CPU.
        tell: Takes all figures after each block anew, of the blocks so far.
        layout: ``contiguous`` or ``channels_last``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        compiled: Whether the network is compiled.
    """
    config = dataclasses.replace(
        _config(place), memory_format=layout, precision=precision, compile=compiled
    )
    # fold 1: the fold that is scored elsewhere is 0
    run = open_run(gpu_cases.workspace(place), CONFIGURATION, "1", config)
    shutil.rmtree(run.folder, ignore_errors=True)
    tflop = _tflop(run.plans, rate_tflops)
    complaints = _Complaints()
    logging.getLogger("training.fit.compiling").addHandler(complaints)
    streams: list[TimedStream] = []

    def opened(*arguments: Any, **more: Any) -> TimedStream:
        stream = open_batches(*arguments, **more)
        streams.append(TimedStream(stream, _lengths(place), after_block))
        return streams[-1]

    def after_block() -> None:
        (stream,) = streams
        name = f"training, ours, {layout} {precision}{' compiled' if compiled else ''}"
        if complaints.said:
            name += " (NOT COMPILED, it failed)"
        for row in _rows(name, stream.seconds, rate_tflops, tflop, place):
            tell(row)
        tell(informs(f"{name}, data wait", statistics.median(stream.waits), "%"))
        assert stream.first is not None
        tell(informs(f"{name}, until the first timed iteration", stream.first - began, "s"))

    loop.open_batches = opened  # type: ignore[assignment]
    forget_peak(place.device)
    began = time.perf_counter()
    with contextlib.suppress(_MeasuredError):
        loop.train_fold(run)


def measure_plain(place: Place, rate_tflops: float | None, *, compiled: bool) -> Iterator[Row]:
    """Time the same training in plain torch, as nnunetv2 does it.

    Args:
        place: Where, and on what.
        rate_tflops: See ``measure_ours``.
        compiled: Whether the network is compiled; one block comes before that, so that there is a
            figure if compiling fails or takes too long.

    Yields:
        All figures after each block anew, of the blocks so far.
    """
    torch.backends.cudnn.benchmark = True  # as nnunetv2 sets it
    plan = gpu_cases.planned(place)
    tflop = _tflop(plan, rate_tflops)
    trainer = gpu_plain.Trainer(gpu_cases.as_json(plan), torch.device(place.device))
    warm_up, blocks, iterations = _lengths(place)

    def block() -> None:
        for _ in range(iterations):
            trainer.step()

    def measured(name: str, blocks: int) -> Iterator[Row]:
        forget_peak(place.device)
        for _ in range(warm_up):
            trainer.step()
        seconds: list[float] = []
        for _ in range(blocks):
            seconds.append(timed(block)[0] / iterations)
            yield from _rows(name, seconds, rate_tflops, tflop, place)

    name = "training, plain torch, fp16"
    yield from measured(name, 1 if compiled else blocks)
    if compiled:
        trainer.compile()
        yield from measured(f"{name} compiled", blocks)


def train_hippocampus(place: Place, seconds: float) -> Iterator[Row]:
    """Train fold 0 of the Hippocampus by its automatic plan, for what time is left.

    Its Dice is that of the held-out cases at full volume, in the grid of the network, which is that
    of the scans.

    Args:
        place: Where, and on what. A tiny one takes made cases if there are none.
        seconds: How long all of it may take.
    """
    source = HIPPOCAMPUS
    if seconds < 2 * _AROUND_S and not place.tiny:
        raise LeftOutError(f"{seconds:.0f} s are too few")
    if not source.exists():
        if not place.tiny:
            raise LeftOutError("no Hippocampus was taken along, see gpu_pack.py")
        source = gpu_cases.workspace(place)
    folder = place.work / "hippocampus"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "preprocessed").symlink_to(source / "preprocessed")
    for name in ("dataset.json", "plans.json"):
        shutil.copy(source / name, folder)
    minutes = 0.05 if place.tiny else (seconds - _AROUND_S) / 60
    config = dataclasses.replace(
        _config(place), minutes=minutes, batches_per_epoch=100, compile=False
    )
    config = dataclasses.replace(config, validation_batches=1 if place.tiny else 10)
    run = open_run(folder, CONFIGURATION, "0", config)
    began = time.perf_counter()
    loop.train_fold(run)
    latest = run.folder / LATEST_CHECKPOINT
    trained = load_checkpoint(latest, run.plans, run.configuration, run.cases)
    history = trained["history"]
    yield informs("Hippocampus, training", (time.perf_counter() - began) / 60, "min")
    yield informs("Hippocampus, whole epochs of 100 iterations", len(history), "")
    scores = _held_out_dice(run, trained["network"])
    for label, dice in zip(run.plans.labels[1:], np.nanmean(scores, 0), strict=True):
        yield informs(f"Hippocampus, Dice of {label}, {len(scores)} cases", float(dice), "")


def operations(plan: plans.Plans) -> float:
    """Count the floating-point operations of one iteration's convolutions, there and back."""
    chosen = plan.configuration(CONFIGURATION)
    channels = len(plan.channels)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build_network(chosen.architecture, channels, len(plan.labels)).train()
        logits = network(torch.empty(chosen.batch, channels, *chosen.patch))
        sum(scores.sum() for scores in logits).backward()
    return float(counter.get_total_flops())


def _rows(
    name: str, seconds: list[float], rate_tflops: float | None, tflop: float, place: Place
) -> Iterator[Row]:
    middle = statistics.median(seconds)
    yield informs(f"{name}, one iteration", 1000 * middle, "ms")
    if len(seconds) > 1:
        spread = 100 * (max(seconds) - min(seconds)) / middle
        yield informs(f"{name}, blocks differ by", spread, "%")
    if rate_tflops:
        yield informs(f"{name}, share of the bf16 rate", 100 * tflop / middle / rate_tflops, "%")
    yield from peak(name, place.device)


def _tflop(plan: plans.Plans, rate_tflops: float | None) -> float:
    """What an iteration computes; 0 where there is no rate to hold it against."""
    return operations(plan) / 1e12 if rate_tflops else 0.0


def _config(place: Place) -> TrainingConfig:
    return dataclasses.replace(
        TRAINING_RECIPES["nnunetv2"],
        device=place.device,
        precision="fp32" if place.device == "cpu" else "auto",
        memory_format="channels_last",
        augmentation_engine="device",  # as on a GPU by itself
        epochs=1_000_000,
        batches_per_epoch=1_000_000,  # no end of an epoch within a block
        validation_batches=1,
        validation=False,
        workers=1 if place.tiny else min(MOST_WORKERS, os.cpu_count() or 1),
    )


def _lengths(place: Place) -> tuple[int, int, int]:
    return (1, 2, 1) if place.tiny else (WARM_UP, BLOCKS, ITERATIONS)


def _held_out_dice(run: FoldRun, weights: Any) -> np.ndarray[Any, Any]:
    """The Dice ``(cases, labels)`` of the held-out cases; NaN where neither mask has the label."""
    from ichseg.predict import sliding_window

    network = load_network(run, weights)
    found = []
    for name in run.spec.validation:
        case = chunks.open_case(run.spec.folder, name)
        scores = sliding_window.predict_tiled(
            network,
            torch.from_numpy(case.data[:]).to(run.device),
            run.configuration.tile,
            mirror_axes=(0, 1, 2),
        )
        mask, reference = scores.argmax(0).cpu().numpy(), case.target[:]
        labels = range(1, len(run.plans.labels))
        found.append([dice_of_masks(mask == label, reference == label) for label in labels])
    return np.array(found)


class _Complaints(logging.Handler):
    """What the compiler could not do."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what was said, and print it."""
        self.said.append(record.getMessage())
        print(self.said[-1], flush=True)
