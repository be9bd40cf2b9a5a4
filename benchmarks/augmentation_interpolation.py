"""Whether it matters that the device engine warps images linearly, where the paper's way is cubic.

    PYTHONPATH=. .venv/bin/python benchmarks/augmentation_interpolation.py --data TASK04 --work W

Pairs of short trainings of fold 0 of the Decathlon's Hippocampus with recipe ``msd2018``: the same
seed draws the same patches and the same changes, which the host engine applies with cubic splines
and the device engine linearly, on the CPU here. Both segment the held-out cases at full volume.
What is done is kept in W, so that the same command goes on after an interruption, with other
seeds too. ``ours`` is the device engine, ``rival`` the host engine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.rows import Row, report

HERE = Path(__file__).resolve().parent
CONFIGURATION = "3d_fullres"
ENGINES = ("device", "host")
LARGEST_DIFFERENCE = 0.005  # of the mean Dice
RESAMPLES = 10_000


def training(*words: object) -> None:
    """Run a command of the training half; end with its error if it has one."""
    line = [sys.executable, "-m", "training", *map(str, words)]
    if subprocess.run(line, cwd=HERE.parent, check=False).returncode:
        raise SystemExit(f"error: {' '.join(line)} failed")


def prepare(data: Path, work: Path, features: str, batch: int) -> Path:
    """Convert, plan and preprocess once, for all trainings."""
    shared = work / "shared"
    if not (shared / "prepared").exists():
        training("convert", data, "--workspace", shared)
        training("plan", "--workspace", shared, "--features", features, "--batch", batch)
        training("preprocess", CONFIGURATION, "--workspace", shared)
        (shared / "prepared").touch()
    return shared


def train(shared: Path, work: Path, engine: str, seed: int, args: argparse.Namespace) -> Path:
    """Train once, in a workspace of its own over the shared cases; the validation's record."""
    workspace = work / f"{engine}-seed{seed}"
    workspace.mkdir(parents=True, exist_ok=True)
    for entry in shared.iterdir():
        link = workspace / entry.name
        if entry.name != "runs" and not link.exists():
            link.symlink_to(entry.resolve())
    training(
        "train", CONFIGURATION, "--workspace", workspace, "--fold", 0, "--recipe", "msd2018",
        "--augmentation-engine", engine, "--seed", seed, "--device", "cpu", "--gpu-cache", "no",
        "--lr-schedule", "poly", "--learning-rate", 1e-3, "--epochs", args.epochs,
        "--batches-per-epoch", args.batches_per_epoch, "--validation-batches", 5,
        "--threads", args.threads, "--workers", args.workers, "--no-validation-mirrors",
        "--precision", "auto",
    )  # fmt: skip
    return workspace / "runs" / CONFIGURATION / "fold_0" / "validation.json"


def case_dice(record: Path) -> npt.NDArray[np.float64]:
    """The mean Dice over the labels of each held-out case, by name of the case."""
    found = json.loads(record.read_text())["dice"]
    return np.array(
        [np.mean([d for d in found[n].values() if d is not None]) for n in sorted(found)]
    )


def interval(differences: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of the mean of ``(seed, case)`` differences, by resampling both."""
    rng = np.random.default_rng(0)
    seeds, cases = differences.shape
    means = [
        differences[rng.integers(seeds, size=seeds)][:, rng.integers(cases, size=cases)].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def main() -> int:
    """Train all pairs; print one table and one line of JSON; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="TASK04", help="MSD layout")
    parser.add_argument("--work", type=Path, required=True, metavar="W", help="kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--features", default="8,16,32", help="of each level [%(default)s]")
    parser.add_argument("--batch", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--epochs", type=int, default=20, help="[%(default)s]")
    parser.add_argument("--batches-per-epoch", type=int, default=50, help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--workers", type=int, default=0, help="[%(default)s]")
    args = parser.parse_args()
    work = args.work.absolute()
    shared = prepare(args.data.absolute(), work, args.features, args.batch)
    found = {
        engine: np.stack(
            [case_dice(train(shared, work, engine, seed, args)) for seed in args.seeds]
        )
        for engine in ENGINES
    }  # (seed, case) each
    differences = found["device"] - found["host"]
    for seed, row in zip(args.seeds, differences, strict=True):
        print(f"seed {seed}: device less host {row.mean():+.4f}")
    low, high = interval(differences)
    device, host = (float(found[engine].mean()) for engine in ENGINES)
    apart = abs(device - host)
    ok = apart <= LARGEST_DIFFERENCE
    rows = [
        Row("mean Dice", device, host, "Dice", None, None, None),
        Row("device less host, lower limit", low, None, "Dice", None, None, None),
        Row("device less host, upper limit", high, None, "Dice", None, None, None),
        Row("difference of the mean Dice", apart, None, "Dice", None, LARGEST_DIFFERENCE, ok),
    ]
    return report("augmentation_interpolation", rows)


if __name__ == "__main__":
    sys.exit(main())
