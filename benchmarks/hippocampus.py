"""Training against nnunetv2 2.8.1: fold 0 of the Decathlon's Hippocampus.

    PYTHONPATH=. .venv/bin/python benchmarks/hippocampus.py --data TASK04 --work FOLDER

Recipe ``nnunetv2`` and nnunetv2 itself: same split, plan, number of iterations, schedule and share
of foreground, three seeds each. The held-out cases are segmented at full volume with mirroring, and
scored here. Both sides train one seed at a time; what is done is kept in FOLDER, so that the same
command goes on after an interruption, or does one part of it:

    ... --only rival --seeds 0      one training
    ... --stage timing              seconds per iteration, in blocks that take turns
    ... --stage table               what is kept
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks import blocks as timing
from benchmarks import rivals
from benchmarks.blocks import Block
from benchmarks.fold_pair import SIDES, FoldPair, Settings, mean_dice
from benchmarks.rows import Row, report
from training.data import dataset

LEAST_DIFFERENCE = -0.01  # of the mean Dice, ours less the rival's
LARGEST_RATIO = 0.5  # of the seconds per iteration
STAGES = ("all", "accuracy", "timing", "table")


def main() -> int:
    """Print one table and one line of JSON; 1 if a bar is missed."""
    args = _arguments()
    settings = Settings(
        dataset="Dataset004_Hippocampus",
        batch=args.batch,
        features=args.features,
        epochs=args.epochs,
        batches=args.batches_per_epoch,
        validation_batches=args.validation_batches,
        device=args.device,
        precision=args.precision,
        threads=args.threads,
        workers=0,
        compile=args.compile,
    )
    pair = FoldPair(
        args.data.absolute(), args.work.absolute(), settings, rivals.python_of(args.rival_env)
    )
    pair.check_settings()
    pair.keep_settings()
    sides = (args.only,) if args.only else SIDES
    if args.stage in ("all", "accuracy"):
        for seed in args.seeds:
            for side in sides:
                pair.train(side, seed)
    if args.stage == "timing" or (args.stage == "all" and not args.only):
        time_both(pair, args.blocks, args.block_iterations, args.workers)
    if args.only:
        return 0
    return print_table(pair, args.seeds)


def time_both(pair: FoldPair, count: int, iterations: int, workers: int) -> None:
    """Measure seconds per iteration, and keep them."""
    pair.prepare_rival()
    pair.check_same(0)
    print(
        f"timing: {count} blocks of {iterations} iterations each, {pair.settings.threads} threads "
        f"and {workers} worker processes a side, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    ours, rival = timing.our_process(pair, workers), timing.rival_process(pair, workers)
    with ours, rival:
        found = timing.take_turns(ours, rival, blocks=count, iterations=iterations)
    timing.save(found, pair.folder / "timing.json")


def print_table(pair: FoldPair, seeds: tuple[int, ...]) -> int:
    """Print what is kept, against the bars; 1 if one is missed or something is not there yet."""
    rows: list[Row] = []
    missing = [
        f"{side}, seed {n}" for n in seeds for side in SIDES if not pair.done(side, n).exists()
    ]
    if not missing:
        rows += _accuracy_rows(pair, seeds)
    timed = pair.folder / "timing.json"
    if timed.exists():
        rows += _timing_rows(timing.load(timed))
    else:
        missing.append("timing")
    if missing:
        print(f"not there yet: {'; '.join(missing)}")
    if not rows:
        return 1
    print(f"\n{os.cpu_count()} cores, torch {torch.__version__}, {pair.settings}")
    return report("hippocampus", rows) or bool(missing)


def _accuracy_rows(pair: FoldPair, seeds: tuple[int, ...]) -> list[Row]:
    """Print the Dice of both by seed; the rows of the means over seeds."""
    for seed in seeds:
        pair.check_same(seed)
    labels = dataset.load_dataset(pair.workspace(seeds[0])).labels[1:]
    means = {side: mean_dice([pair.scores(side, seed) for seed in seeds]) for side in SIDES}
    cases = len(pair.fold(seeds[0]).validation)
    print(f"\nDice on {cases} held-out cases, mean over cases")
    print(f"{'':6} {'seed':>9}" + "".join(f"{label:>14}" for label in (*labels, "mean")))
    for side in SIDES:
        for seed, found in zip(seeds, means[side], strict=True):
            figures = (*found, found.mean())
            print(f"{side:6} {seed:9}" + "".join(f"{value:14.4f}" for value in figures))
        by_seed = np.column_stack((means[side], means[side].mean(axis=1)))
        for name, figures in (("mean", by_seed.mean(axis=0)), ("deviation", _deviation(by_seed))):
            print(f"{side:6} {name:>9}" + "".join(f"{value:14.4f}" for value in figures))
    rows = [
        _difference(f"Dice {label}", means["ours"][:, i], means["rival"][:, i], None)
        for i, label in enumerate(labels)
    ]
    return [*rows, _difference("Dice, mean", means["ours"], means["rival"], LEAST_DIFFERENCE)]


def _deviation(by_seed: np.ndarray) -> np.ndarray:
    """The deviation over seeds; NaN where there is one seed."""
    return by_seed.std(axis=0, ddof=1) if len(by_seed) > 1 else np.full(by_seed.shape[1], np.nan)


def _difference(row: str, ours: np.ndarray, rival: np.ndarray, bar: float | None) -> Row:
    """A row in which ours less the rival's stands where other rows have their ratio."""
    mine, its = float(ours.mean()), float(rival.mean())
    reached = None if bar is None else mine - its >= bar
    return Row(f"{row} (difference)", mine, its, "", mine - its, bar, reached)


def _timing_rows(kept: dict[str, list[Block]]) -> list[Row]:
    rows = []
    for row, what, bar in (
        ("one iteration", "seconds", LARGEST_RATIO),
        ("processor time of it", "cpu", None),
    ):
        ours, rival = (timing.median_of(kept[side], what) for side in SIDES)
        ratio = timing.median_ratio(kept, what)
        rows.append(Row(row, ours, rival, "s", ratio, bar, None if bar is None else ratio <= bar))
    waits = (timing.median_wait(kept[side]) for side in SIDES)
    return [*rows, Row("data wait", *waits, "%", None, None, None)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="TASK04", help="the Decathlon's Task04")
    add("--work", type=Path, required=True, metavar="FOLDER", help="what is done is kept here")
    add("--stage", choices=STAGES, default="all", help="[%(default)s]")
    add("--only", choices=SIDES, help="train this side alone, and print no table")
    add("--seeds", type=_numbers, default=(0, 1, 2), metavar="A,B", help="[0,1,2]")
    length = parser.add_argument_group("plan and length, of both sides")
    length.add_argument("--batch", type=int, default=2, help="0 leaves it to the planners [2]")
    length.add_argument(
        "--features", type=_numbers, default=(16, 32, 64, 128), metavar="A,B,..",
        help="of each level; 0 leaves them to the planners [16,32,64,128]",
    )  # fmt: skip
    length.add_argument("--epochs", type=int, default=20, help="[20]")
    length.add_argument("--batches-per-epoch", type=int, default=50, help="[50]")
    length.add_argument("--validation-batches", type=int, default=5, help="[5]")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    machine.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of our side; nnunetv2 takes fp32 on the CPU and fp16 on CUDA [%(default)s]",
    )  # fmt: skip
    machine.add_argument("--compile", action="store_true", help="our side compiles its network")
    machine.add_argument("--threads", type=int, default=1, help="of torch, a side [1]")
    machine.add_argument("--workers", type=int, default=1, help="of the timing, a side [1]")
    machine.add_argument("--blocks", type=int, default=8, help="of the timing, a side [8]")
    machine.add_argument("--block-iterations", type=int, default=10, help="of a block [10]")
    rivals.add_arguments(parser)
    args = parser.parse_args()
    args.batch = args.batch or None
    args.features = None if args.features == (0,) else args.features
    return args


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
