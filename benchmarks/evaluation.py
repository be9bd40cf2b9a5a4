"""Scoring masks, ours against google-deepmind's surface-distance 0.1, on the same masks.

    PYTHONPATH=. .venv/bin/python benchmarks/evaluation.py [--repeats N]

INSTANCE's four measures and HD95 of pairs of 512x512x32 masks, in one process, in pairs that take
turns in going first; medians. Then a whole case of ours, which reads its two files and finds the
lesions too, and the command for a folder, the start of Python included; these in seconds of a
processor, so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import surface_distance
from scipy import ndimage

from benchmarks.rows import Row, at_most, faster, report
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.scoring.measures import diagonal_mm, score_masks
from training.scoring.scores import Pair, score_pair

ROOT = Path(__file__).resolve().parent.parent
SHAPE, SPACING_MM = (32, 512, 512), (5.0, 0.45, 0.45)
COPIES = 4  # of each pair, in the folder that the command scores
Mask = npt.NDArray[np.bool_]


def main() -> int:
    """Print one table and one line of JSON; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="of each pair [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="each pair once")
    parser.add_argument("--rival-env", type=Path, help="not used: the rival is a dev requirement")
    args = parser.parse_args()
    repeats = 1 if args.quick else args.repeats
    rows, difference = [], 0.0
    with tempfile.TemporaryDirectory(prefix="bench-evaluation-") as scratch:
        folder = Path(scratch)
        for name, (prediction, reference) in make_pairs().items():
            found, apart = compare_measures(name, prediction, reference, repeats)
            difference = max(difference, apart)
            rows.append(found)
            rows.append(time_case(name, prediction, reference, folder, repeats))
        rows.append(time_command(folder, repeats))
    rows.append(at_most("largest difference of a measure", difference, "", 1e-6))
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {repeats} pairs of each")
    return report("evaluation", rows)


def make_pairs() -> dict[str, tuple[Mask, Mask]]:
    """Make predictions and references that take little and much time."""
    random = np.random.default_rng(1)
    large = _bleed(random, (16, 250, 220), 42, rough=0.1)
    drawn = _bleed(random, (16, 252, 222), 42, rough=0.1)
    far = large | _bleed(random, (2, 30, 30), 4, rough=0)
    specks = large | (ndimage.gaussian_filter(random.normal(size=SHAPE), (0, 1, 1)) > 0.9)
    return {
        "small bleed": (
            _bleed(random, (16, 250, 220), 8, rough=0.1),
            _bleed(random, (16, 255, 220), 8, rough=0.1),
        ),
        "large bleed": (large, drawn),
        "and one far away": (far, drawn),
        "and thousands of specks": (specks, drawn),
    }


def compare_measures(
    name: str, prediction: Mask, reference: Mask, repeats: int
) -> tuple[Row, float]:
    """Time both sides on one pair of masks; also their largest relative difference."""
    across = diagonal_mm(SHAPE, SPACING_MM)

    def ours() -> list[float]:
        scores = score_masks(
            prediction, reference, SPACING_MM, empty="instance", diagonal_mm=across
        )
        return list(dataclasses.astuple(scores))

    def rival() -> list[float]:
        return rival_measures(prediction, reference)

    apart = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours(), rival(), strict=True))
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for side in (0, 1) if repeat % 2 == 0 else (1, 0):
            seconds[side].append(_seconds((ours, rival)[side]))
        print(f"{name}: ours {seconds[0][-1]:.3g} s, rival {seconds[1][-1]:.3g} s", flush=True)
    medians = (statistics.median(times) for times in seconds)
    return faster(f"measures, {name}", *medians, "s", 1.5), apart


def rival_measures(prediction: Mask, reference: Mask) -> list[float]:
    """Take the same measures by the rival, whose Dice has no smoothing."""
    with warnings.catch_warnings():  # it uses SciPy by names of old
        warnings.simplefilter("ignore", DeprecationWarning)
        found = surface_distance.compute_surface_distances(reference, prediction, SPACING_MM)
    predicted, present = int(prediction.sum()), int(reference.sum())
    return [
        float(surface_distance.compute_dice_coefficient(reference, prediction)),
        abs(predicted - present) / present,
        float(surface_distance.compute_surface_dice_at_tolerance(found, 0.42)),
        float(surface_distance.compute_robust_hausdorff(found, 100)),
        float(surface_distance.compute_robust_hausdorff(found, 95)),
    ]


def time_case(name: str, prediction: Mask, reference: Mask, folder: Path, repeats: int) -> Row:
    """Time a whole case; its files stay in ``predictions`` and ``references``."""
    stem = name.replace(" ", "_")
    for copy in range(COPIES):
        for side, mask in (("predictions", prediction), ("references", reference)):
            path = folder / side / f"{stem}_{copy}.nii.gz"
            volume.write(Volume(mask.astype(np.uint8), SPACING_MM), path)
    file = f"{stem}_0.nii.gz"
    pair = Pair(stem, folder / "predictions" / file, folder / "references" / file)
    times = []
    for _ in range(repeats):
        began = time.process_time()
        score_pair(pair, None, "instance")
        times.append(time.process_time() - began)
    return at_most(f"whole case, {name}", statistics.median(times), "CPU s", 1)


def time_command(folder: Path, repeats: int) -> Row:
    """Time ``evaluate`` on all files; the seconds a case."""
    # One worker: the time of others, which are no children of the command, would not be counted.
    command = [sys.executable, "-m", "training", "evaluate", "--workers", "1"]
    for side in ("predictions", "references", "out"):
        command += [f"--{side}", str(folder / side)]
    began = _seconds_of_children()
    for _ in range(repeats):
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    count = len(list((folder / "references").iterdir()))
    each = (_seconds_of_children() - began) / repeats / count
    return at_most(f"command, one worker, {count} cases, each", each, "CPU s", 1)


def _bleed(
    random: np.random.Generator, centre: tuple[int, int, int], radius_mm: float, *, rough: float
) -> Mask:
    """Make a ball with bumps of a few millimetres."""
    bumps = ndimage.gaussian_filter(random.normal(size=SHAPE), (0.7, 4, 4))
    reach = radius_mm * (1 + rough * bumps / bumps.std())
    z, y, x = (
        (index - place) * spacing
        for index, place, spacing in zip(np.ogrid[:32, :512, :512], centre, SPACING_MM, strict=True)
    )
    inside: Mask = z**2 + y**2 + x**2 < reach**2
    return inside


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
