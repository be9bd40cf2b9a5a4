"""Scores a weights bundle on the fixed held-out phantoms and on the sample cases.

# needs: an hour for --preset full on two cores, so `make bench` leaves it out

    PYTHONPATH=. .venv/bin/python benchmarks/default_weights.py --preset balanced

The held-out set is `training synthesize --cases 20 --seed 20221 --balanced --negatives 0`: four
cases of each kind of bleed. It is made in FOLDER if it is not there. Each finished case is kept
in FOLDER, so a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from ichseg.predict.dice import dice_of_masks
from ichseg.predict.ensemble import Ensemble
from ichseg.scan import volume
from ichseg.scan.volume import Volume

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "test" / "sample"
MEAN_DICE_BAR = 0.75
SAMPLE_BARS = {"ge_intraparenchymal.mha": 0.7, "synthetic_subdural.nii.gz": 0.6}
NEGATIVE, NEGATIVE_BAR_ML = "ge_negative.mha", 1.0


def main() -> int:
    """Print one table and one line of JSON; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "heldout")
    parser.add_argument("--preset", choices=["full", "balanced", "fast"], default="full")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples-only", action="store_true", help="leave the held-out set out")
    args = parser.parse_args()
    ensemble = Ensemble.load(args.weights, args.device)
    rows = score_samples(ensemble, args.preset)
    if not args.samples_only:
        rows = score_heldout(ensemble, args.preset, args.folder) + rows
    for row in rows:
        verdict = "" if row["ok"] is None else ("ok" if row["ok"] else "MISSED")
        print(f"{row['row']:42} {row['ours']:8.3f} {row['unit']:5} {verdict}")
    print(json.dumps({"benchmark": "default_weights", "preset": args.preset, "rows": rows}))
    return 0 if all(row["ok"] is not False for row in rows) else 1


def score_heldout(ensemble: Ensemble, preset: str, folder: Path) -> list[dict[str, object]]:
    """Score the held-out phantoms: all, each kind of bleed, and bleeds under 1 mL."""
    data = folder / "dataset"
    if not data.exists():
        command = ["-m", "training", "synthesize", "--out", str(data), "--cases", "20"]
        command += ["--seed", "20221", "--balanced", "--negatives", "0"]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    scores: dict[str, list[float]] = defaultdict(list)
    seconds = []
    with (data / "cases.csv").open() as stream:
        cases = list(csv.DictReader(stream))
    for case in cases:
        image = volume.read(data / "imagesTr" / f"{case['case']}.nii.gz")
        reference = volume.read(data / "labelsTr" / f"{case['case']}.nii.gz").voxels != 0
        mask, took = segment(ensemble, image, preset, folder / preset / f"{case['case']}.nii.gz")
        score = dice_of_masks(mask.voxels != 0, reference)
        size_ml = float(reference.sum() * image.voxel_ml)
        seconds.append(took)
        for group in ("all", case["kinds"], "under 1 mL" if size_ml < 1 else "1 mL and more"):
            scores[group].append(score)
        print(
            f"{case['case']} {case['kinds']:18} {size_ml:7.2f} mL, found "
            f"{mask.voxels.sum() * image.voxel_ml:7.2f} mL, Dice {score:.3f}, {took:.0f} s",
            flush=True,
        )
    rows = []
    for group, values in scores.items():
        bar = MEAN_DICE_BAR if group == "all" else None
        name = f"held-out Dice, {group} (n={len(values)})"
        rows.append(make_row(name, float(np.mean(values)), "", bar, at_least=True))
    rows.append(make_row("held-out, seconds a case (median)", float(np.median(seconds)), "s", None))
    return rows


def score_samples(ensemble: Ensemble, preset: str) -> list[dict[str, object]]:
    """Score the sample cases: Dice where there is a bleed, and the volume found where not."""
    rows = []
    for name, bar in SAMPLE_BARS.items():
        found = ensemble.segment(volume.read(SAMPLES / "input" / name), preset)
        reference = volume.read(SAMPLES / "reference" / name).voxels != 0
        score = dice_of_masks(found.mask.voxels != 0, reference)
        rows.append(make_row(f"sample {name}, Dice", score, "", bar, at_least=True))
        rows.append(make_row(f"sample {name}, time", found.seconds["total"], "s", None))
    found = ensemble.segment(volume.read(SAMPLES / "input" / NEGATIVE), preset)
    rows.append(make_row(f"sample {NEGATIVE}, found", found.volume_ml, "mL", NEGATIVE_BAR_ML))
    return rows


def segment(ensemble: Ensemble, image: Volume, preset: str, path: Path) -> tuple[Volume, float]:
    """Segment a scan, unless an earlier run left its mask in ``path``; mask and seconds."""
    note = path.with_name(path.name + ".seconds")
    if not note.exists():
        found = ensemble.segment(image, preset)
        volume.write(found.mask, path)
        note.write_text(str(found.seconds["total"]))
    return volume.read(path), float(note.read_text())


def make_row(
    name: str, ours: float, unit: str, bar: float | None, *, at_least: bool = False
) -> dict[str, object]:
    """One row of the result; there is no rival here, only bars."""
    ok = None if bar is None else bool(ours >= bar if at_least else ours < bar)
    return {"row": name, "ours": round(ours, 4), "rival": None, "unit": unit, "ratio": None,
            "bar": bar, "ok": ok}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
