"""Checks what a run wrote, against its input and the stored masks; test.sh runs it in the image.

    python check_output.py LAYOUT INPUT OUT EXPECTED

LAYOUT says where masks must lie and how they are called:

    flat       one a scan, of the same name; results.json beside them
    platform   one images/SOCKET/NAME.mha for the scan of INPUT/inputs.json (whose socket stands
               under `socket` or `interface`), or INPUT/images/SOCKET/ in the older layout; DICOM
               slices are one scan, called as their folder is; results.json beside images/
    challenge  one a scan, of the same name; no results.json

Nothing else may lie in OUT. Each mask must be uint8, 0 and 1 only, with the scan's size, spacing,
origin and direction (of DICOM to a micrometre), and agree with the mask in EXPECTED that has the
scan's original name: a Dice of at least 0.98, or volumes within 0.1 mL where the stored mask is
under 0.1 mL (there one voxel moves Dice). Exits 1 when anything differs, and says what.
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
SUFFIXES = (".mha", ".nii.gz", ".nii")
GEOMETRY = ("Size", "Spacing", "Origin", "Direction")


def find_scans(layout: str, folder: Path) -> dict[Path, str]:
    """Every scan of the input folder, and the name it had before it was laid there."""
    if layout != "platform":
        return {path: path.name for path in sorted(folder.iterdir())}
    if not (folder / "inputs.json").is_file():
        return {path: path.name for path in sorted(folder.glob("images/*/*"))}
    found = {}
    for entry in json.loads((folder / "inputs.json").read_text()):
        if entry["image"]:
            socket = folder / entry.get("socket", entry.get("interface"))["relative_path"]
            scans = sorted(socket.iterdir())
            if all(path.suffix == ".dcm" for path in scans):
                scans = [socket]
            found |= dict.fromkeys(scans, entry["image"]["name"])
    return found


def read(scan: Path) -> Any:
    """A volume from its file, or from the folder of its slices, which ITK puts in order."""
    if scan.is_dir():
        return sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(scan)))
    return sitk.ReadImage(str(scan))


def mask_name(layout: str, scan: Path, found: set[str]) -> str:
    """Where the scan's mask must lie in the output folder; on the platform, in any one socket."""
    if layout != "platform":
        return scan.name
    stem = next((scan.name.removesuffix(s) for s in SUFFIXES if scan.name.endswith(s)), scan.name)
    sockets = {name.split("/")[1] for name in found if name.startswith("images/")}
    return f"images/{sockets.pop() if len(sockets) == 1 else 'ONE SOCKET'}/{stem}.mha"


def find_differences(
    scan: Any, stored: Any, mask: Any, within: float = 0.0
) -> tuple[str, list[str]]:
    """What the two masks measure, in words, and everything that is wrong with the new one.

    Args:
        scan: The scan.
        stored: The mask that is expected.
        mask: The new one.
        within: By how much the numbers of its geometry may differ from the scan's.
    """
    differences = []
    if mask.GetPixelID() != sitk.sitkUInt8:
        differences.append(f"type is {mask.GetPixelIDTypeAsString()}, not 8-bit unsigned integer")
    for name in GEOMETRY:
        ours, theirs = getattr(mask, f"Get{name}")(), getattr(scan, f"Get{name}")()
        if len(ours) != len(theirs) or np.abs(np.subtract(ours, theirs)).max() > within:
            differences.append(f"{name.lower()} is {ours}, the scan's {theirs}")
    labels = np.unique(sitk.GetArrayViewFromImage(mask))
    if not np.isin(labels, (0, 1)).all():
        differences.append(f"labels are {labels.tolist()[:8]}, not 0 and 1")
    if mask.GetSize() != stored.GetSize():
        return "not comparable", [*differences, f"the stored mask's size is {stored.GetSize()}"]

    expected, found = (sitk.GetArrayViewFromImage(image) != 0 for image in (stored, mask))
    voxel_ml = float(np.prod(stored.GetSpacing())) / 1000.0
    stored_ml, found_ml = (np.count_nonzero(m) * voxel_ml for m in (expected, found))
    measured = f"stored {stored_ml:.2f} mL, found {found_ml:.2f} mL"
    if stored_ml < SMALL_ML:
        if abs(found_ml - stored_ml) > SMALL_ML:
            differences.append(f"volumes differ by more than {SMALL_ML} mL")
        return measured, differences
    dice = 2 * np.count_nonzero(expected & found) * voxel_ml / (stored_ml + found_ml)
    if dice < MIN_DICE:
        differences.append(f"Dice is under {MIN_DICE}")
    return f"{measured}, Dice {dice:.4f}", differences


def refuse_constant(name: str) -> Any:
    """Called for NaN and Infinity, which are no JSON."""
    raise ValueError(f"{name} is not JSON")


def check_results(path: Path, masks: set[str]) -> list[str]:
    """Everything that is wrong with the result file: strict JSON, one entry a mask, no errors."""
    try:
        entries = json.loads(path.read_text(), parse_constant=refuse_constant)
        named = sorted(output["filename"] for entry in entries for output in entry["outputs"])
        errors = [message for entry in entries for message in entry["error_messages"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        return [f"cannot be read: {error!r}"]
    differences = [f"error of a case: {message}" for message in errors]
    if named != sorted(masks) or len(entries) != len(masks):
        differences.append(f"names {named}, expected {sorted(masks)}")
    return differences


def check(layout: str, given: Path, out: Path, expected: Path) -> dict[str, tuple[str, list[str]]]:
    """Of each file what it measures, in words, and everything that is wrong with it."""
    entries = {str(path.relative_to(out)): path for path in out.rglob("*")}
    found = {name for name, path in entries.items() if path.is_symlink() or not path.is_dir()}
    report: dict[str, tuple[str, list[str]]] = {}
    for scan, name in find_scans(layout, given).items():
        mask = mask_name(layout, scan, found)
        if mask not in found:
            report[mask] = ("", ["missing"])
        elif not (expected / name).is_file():
            report[mask] = ("", [f"there is no stored mask {name} to compare it with"])
        else:
            images = (read(path) for path in (scan, expected / name, out / mask))
            report[mask] = find_differences(*images, within=1e-3 if scan.is_dir() else 0.0)
    masks = set(report)
    if layout != "challenge":
        report[RESULT_FILE] = ("", check_results(out / RESULT_FILE, masks))
    report |= {name: ("", ["not expected"]) for name in sorted(found - set(report))}
    if not masks:
        report[str(given)] = ("", ["no scans"])
    return report


def main(layout: str, *folders: str) -> int:
    """Print a line a file; return 1 when anything differs."""
    report = check(layout, *map(Path, folders))
    for name, (measured, differences) in report.items():
        verdict = "DIFFERS: " + "; ".join(differences) if differences else "ok"
        print(f"  {name}: {measured}{', ' if measured else ''}{verdict}")
    return int(any(differences for _, differences in report.values()))


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in ("flat", "platform", "challenge"):
        sys.exit("usage: check_output.py flat|platform|challenge INPUT OUT EXPECTED")
    sys.exit(main(*sys.argv[1:]))
