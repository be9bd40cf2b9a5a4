"""What cutting to the head costs and saves: two trainings whose plans differ only in that field.

# needs: two trained workspaces, see docs/decisions/0012-cut-to-the-head.md

    export PYTHONPATH=. OPENBLAS_NUM_THREADS=1  # as process.py does
    .venv/bin/python benchmarks/head_crop.py PLAIN HEAD SCAN... --folds 0

PLAIN was planned with `--crop nonzero`, HEAD with `--crop head`. Dice is that of the folds'
validation, case by case. On each scan the first of these folds is run from both bundles in turns,
without mirrors, and each once more as a process of its own for its peak memory. Scans are files.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import memory
from benchmarks.rows import Row, report, smaller
from ichseg.errors import PlansError
from ichseg.model import plans, strict_json
from ichseg.model.plans import Configuration, Plans
from ichseg.predict import presets, sliding_window
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.prepare import place
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.scoring import compare, evaluate
from training.scoring.statistics import bootstrap_mean

ROOT = Path(__file__).resolve().parent.parent
NAME = "3d_fullres"
ARMS = ("nonzero", "head")
STEPS = ("prepare", "predict", "restore", "total")


def main() -> int:
    """Print the table and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plain", type=Path, help="workspace planned with --crop nonzero")
    parser.add_argument("head", type=Path, help="workspace planned with --crop head")
    parser.add_argument("scans", type=Path, nargs="*", help=".mha or .nii.gz")
    parser.add_argument("--folds", default="0", help="with commas [%(default)s]")
    parser.add_argument("--repeats", type=int, default=3, help="of each scan [%(default)s]")
    args = parser.parse_args()
    spaces, folds = (args.plain, args.head), args.folds.split(",")
    planned = [plans.load(space / "plans.json") for space in spaces]
    check(*planned)
    print("'ours' is cut to the head, 'rival' is not\n")
    rows = [*dice(spaces, folds), *sizes(spaces)]
    scans = {path.name: volume.read(path) for path in args.scans}
    wide = benchmark_plans()
    for name, scan in scans.items():
        rows += tiles(f"{name}: tiles of {_times(wide.configuration(NAME).patch)}", scan, wide)
    with tempfile.TemporaryDirectory() as folder:
        bundles = [export(space, folds[0], Path(folder) / arm) for space, arm in _arms(spaces)]
        for path in args.scans:
            rows += inference(path, scans[path.name], bundles, args.repeats)
    return report("head_crop", rows)


def check(plain: Plans, head: Plans) -> None:
    """See that two plans differ in the crop and what it brings with it alone.

    Raises:
        SystemExit: They differ in more.
    """

    def rest(planned: Plans) -> object:
        configuration = planned.configuration(NAME)
        return dataclasses.replace(
            planned,
            crop="nonzero",
            overrides=(),
            configurations=(dataclasses.replace(configuration, median_shape=(1, 1, 1)),),
        )

    if (plain.crop, head.crop) != ARMS or rest(plain) != rest(head):
        raise SystemExit("error: the plans are not nonzero and head, or differ in more than that")


def dice(spaces: Sequence[Path], folds: Sequence[str]) -> list[Row]:
    """Compare the validation Dice of both: the means, and the paired difference."""
    rows, gathered = [], []
    for fold in folds:
        evaluations = []
        for space in spaces:
            run = space / "runs" / NAME / f"fold_{fold}"
            with tempfile.TemporaryDirectory() as out:
                references = references_of(space, run / "validation", Path(out) / "references")
                evaluations.append(
                    evaluate.evaluate(run / "validation", references, Path(out) / "out", workers=1)
                )
        found = next(d for d in compare.compare(*evaluations) if d.measure == "dice")
        print(
            f"fold {fold}: Dice {found.mean_a:.4f} nonzero, {found.mean_b:.4f} head in "
            f"{found.pairs} cases; head better in {found.better}, worse in {found.worse}, equal in "
            f"{found.equal}; p {found.p}"
        )
        plain, head = ([c.labels[0].scores.dice for c in e.cases] for e in evaluations)
        gathered += [b - a for a, b in zip(plain, head, strict=True) if None not in (a, b)]
        rows.append(_pair(f"fold {fold}: mean Dice", found.mean_b, found.mean_a, ""))
    found = bootstrap_mean(gathered)
    print(f"Dice, head less nonzero: {found.mean:+.4f}, 95 % {found.low:+.4f} to {found.high:+.4f}")
    return [*rows, Row("difference of Dice, mean", found.mean, None, "", None, None, None)]


def references_of(space: Path, predictions: Path, folder: Path) -> Path:
    """Make a folder of links to the references of these predictions, by their names."""
    folder.mkdir()
    labels = {path.name.split(".")[0]: path for path in (space / "raw" / "labels").iterdir()}
    for mask in predictions.glob("*.nii.gz"):
        (folder / mask.name).symlink_to(labels[mask.name.split(".")[0]].resolve())
    return folder


def sizes(spaces: Sequence[Path]) -> list[Row]:
    """Compare voxels of the stored cases, size of the store, and median case of the plans."""
    stored, disk, medians = [], [], []
    for space in spaces:
        folder = space / "preprocessed" / NAME
        shapes = [
            strict_json.load_object(path)["shape"] for path in sorted(folder.glob("[!.]*.json"))
        ]
        stored.append(float(np.mean(np.prod(shapes, axis=1))))
        disk.append(sum(path.stat().st_size for path in folder.iterdir()) / 1e6)
        medians.append(plans.load(space / "plans.json").configuration(NAME).median_shape)
    print("median case: " + " and ".join(map(_times, medians)) + " voxels")
    return [
        smaller("voxels of a stored case, mean", stored[1], stored[0], "", None),
        smaller("store on disk", disk[1], disk[0], "MB", None),
    ]


def benchmark_plans() -> Plans:
    """The plan of benchmarks/plans/compact.json: tiles of 16 x 192 x 192 at 0.45 mm."""
    return plans.load(ROOT / "benchmarks" / "plans" / "compact.json")


def tiles(row: str, scan: Volume, planned: Plans) -> list[Row]:
    """Count the tiles that a network would see with and without the cut, air left out."""
    configuration: Configuration = planned.configuration(NAME)
    counts = []
    for crop in ARMS:
        cut = dataclasses.replace(planned, crop=crop)
        placement = place([scan], cut, configuration)
        cover = sliding_window.cover(placement.grid_shape, configuration.tile)
        cover = presets.skip_air(cover, [scan], placement, cut)
        counts.append(cover.total - len(cover.skipped))
    return [smaller(row, counts[1], counts[0], "", None)]


def export(space: Path, fold: str, out: Path) -> Path:
    """Export one fold as a bundle."""
    command = [
        sys.executable, "-m", "training", "export", "--workspace", str(space),
        "--configuration", NAME, "--folds", fold, "--check-cases", "1", "--out", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return out


def inference(path: Path, scan: Volume, bundles: Sequence[Path], repeats: int) -> list[Row]:
    """Measure tiles, passes, seconds and memory of one scan."""
    ensembles = [Ensemble.load(bundle, "cpu") for bundle in bundles]
    found = [[ensemble.segment(scan, "fast") for ensemble in ensembles] for _ in range(repeats)]
    rows = []
    plain, head = found[0]
    rows.append(_pair(f"{path.name}: found", head.volume_ml, plain.volume_ml, "mL"))
    for key in ("tiles", "forward_passes"):
        rows.append(_pair(f"{path.name}: {key}", head.ran[key], plain.ran[key], ""))
    for step in STEPS:
        ours, rival = (
            statistics.median(pair[arm].seconds[step] for pair in found) for arm in (1, 0)
        )
        rows.append(_pair(f"{path.name}: {step}", ours, rival, "s"))
    ours, rival = (peak(path, bundle) for bundle in reversed(bundles))
    return [*rows, _pair(f"{path.name}: peak memory", ours, rival, "MB")]


def peak(path: Path, bundle: Path) -> float:
    """The peak memory in MB of ``process.py`` on one scan."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in").mkdir()
        shutil.copy(path, Path(folder) / "in")
        command = [
            sys.executable, str(ROOT / "process.py"), "--input", f"{folder}/in",
            "--output", f"{folder}/out", "--weights", str(bundle), "--preset", "fast",
        ]  # fmt: skip
        return memory.peak(command, os.environ, ROOT).largest_mb


def _pair(row: str, ours: float, rival: float, unit: str) -> Row:
    """A row whose rival may be 0."""
    ratio = ours / rival if rival else None
    return Row(row, ours, rival, unit, ratio, None, None)


def _arms(spaces: Sequence[Path]) -> list[tuple[Path, str]]:
    return list(zip(spaces, ARMS, strict=True))


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PlansError as error:
        raise SystemExit(f"error: {error}") from error
