"""Compares the masks in one folder with the stored ones; test.sh runs it inside the image.

    python compare.py EXPECTED OUT

Every file of EXPECTED must be in OUT and agree: uint8, labels 0 and 1 only, the same geometry,
and a Dice of at least 0.98; where the stored mask is under 0.1 mL, volumes within 0.1 mL instead
(there one voxel moves Dice). Beside them OUT holds results.json and nothing else. Exits 1 when
anything differs, and says what.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

MIN_DICE = 0.98
SMALL_ML = 0.1
RESULT_FILE = "results.json"


def find_differences(expected: sitk.Image, found: sitk.Image) -> tuple[str, list[str]]:
    """What the two masks measure, in words, and every way in which they differ too much."""
    differences = []
    if found.GetPixelID() != sitk.sitkUInt8:
        differences.append(f"type is {found.GetPixelIDTypeAsString()}, not 8-bit unsigned integer")
    for name in ("Size", "Spacing", "Origin", "Direction"):
        ours, theirs = getattr(found, f"Get{name}")(), getattr(expected, f"Get{name}")()
        if ours != theirs:
            differences.append(f"{name.lower()} is {ours}, not {theirs}")
    if found.GetSize() != expected.GetSize():
        return "not comparable", differences

    stored, mask = sitk.GetArrayViewFromImage(expected), sitk.GetArrayViewFromImage(found)
    labels = np.unique(mask)
    if not np.isin(labels, (0, 1)).all():
        differences.append(f"labels are {labels.tolist()[:8]}, not 0 and 1")
    voxel_ml = float(np.prod(expected.GetSpacing())) / 1000.0
    stored_ml, mask_ml = (np.count_nonzero(m) * voxel_ml for m in (stored, mask))
    overlap_ml = np.count_nonzero((stored != 0) & (mask != 0)) * voxel_ml
    measured = f"stored {stored_ml:.2f} mL, found {mask_ml:.2f} mL"
    if stored_ml < SMALL_ML:
        if abs(mask_ml - stored_ml) > SMALL_ML:
            differences.append(f"volumes differ by more than {SMALL_ML} mL")
        return measured, differences
    dice = 2 * overlap_ml / (stored_ml + mask_ml)
    if dice < MIN_DICE:
        differences.append(f"Dice is under {MIN_DICE}")
    return f"{measured}, Dice {dice:.4f}", differences


def refuse_constant(name: str) -> Any:
    """Called for NaN and Infinity, which are no JSON."""
    raise ValueError(f"{name} is not JSON")


def check_results(path: Path, cases: int) -> list[str]:
    """Every way in which the result file is not strict JSON with one entry a case."""
    try:
        entries = json.loads(path.read_text(), parse_constant=refuse_constant)
    except (OSError, ValueError) as error:
        return [f"cannot be read: {error}"]
    if not isinstance(entries, list) or len(entries) != cases:
        return [f"does not have one entry for each of {cases} cases"]
    return []


def main(expected_dir: Path, found_dir: Path) -> int:
    """Print a line a file; return 1 when anything differs."""
    expected = {path.name for path in expected_dir.iterdir()}
    found = {str(path.relative_to(found_dir)) for path in found_dir.rglob("*") if path.is_file()}
    if not expected:
        print(f"{expected_dir}: no stored masks to compare with", file=sys.stderr)
        return 1

    report: dict[str, tuple[str, list[str]]] = {}
    for name in sorted(expected & found):
        pair = sitk.ReadImage(str(expected_dir / name)), sitk.ReadImage(str(found_dir / name))
        report[name] = find_differences(*pair)
    report |= {name: ("", ["missing"]) for name in sorted(expected - found)}
    report |= {name: ("", ["not expected"]) for name in sorted(found - expected - {RESULT_FILE})}
    report[RESULT_FILE] = ("", check_results(found_dir / RESULT_FILE, len(expected)))

    for name, (measured, differences) in report.items():
        verdict = "DIFFERS: " + "; ".join(differences) if differences else "ok"
        print(f"  {name}: {measured}{', ' if measured else ''}{verdict}")
    return int(any(differences for _, differences in report.values()))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: compare.py EXPECTED OUT")
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
