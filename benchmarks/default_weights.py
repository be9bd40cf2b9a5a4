"""Scores a weights bundle: real patients out of fold, trauma scans, phantoms, the sample cases.

# needs: an hour on two cores with a workspace, so `make bench` leaves it out

    PYTHONPATH=. .venv/bin/python benchmarks/default_weights.py --weights W/bundles/B \
        --workspace W --ct-ich-table CT-ICH/hemorrhage_diagnosis.csv

With the workspace of a training on what `training real-heads` made (and `export` made a bundle of),
each patient is segmented by the networks of the fold that has not seen them, and by no other; folds
that the bundle does not have are left out. Without it, these rows are. The held-out phantoms are
`training synthesize --cases 20 --seed 20221 --balanced --negatives 0`, four cases of each kind of
bleed, made in FOLDER if they are not there.

Each finished scan is kept in FOLDER, so a run that was cut off goes on where it was; a scan whose
networks or files have changed is segmented anew. FOLDER/cases.csv has a line for each.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.default_weights_cases import (
    MADE,
    PATIENT,
    TRAUMA,
    Found,
    Wanted,
    bleeding_patients,
    draw,
    load,
    of_fold,
    out_of_fold,
    segment,
    wanted_of,
    write_table,
)
from ichseg.errors import IchsegError
from ichseg.predict.ensemble import Ensemble
from training.data import dataset, splits
from training.scoring.roc import area_under_roc

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "test" / "sample"
ROWS = ("patients", "stripped", "trauma", "heldout", "samples")
OF_WORKSPACE = ("patients", "stripped", "trauma")
SAMPLE_BARS = {"ge_intraparenchymal.mha": 0.95, "synthetic_subdural.nii.gz": 0.90}
NEGATIVE, NEGATIVE_BARS_ML = "ge_negative.mha", {"balanced": 0.05, "fast": 0.1}
SECONDS_BARS = {"balanced": 12.0, "fast": 3.0}
Row = dict[str, object]


def main() -> int:
    """Print one table and one line of JSON; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights")
    parser.add_argument("--workspace", type=Path, metavar="W", help="whose folds the weights are")
    parser.add_argument("--ct-ich-table", type=Path, metavar="CSV",
                        help="CT-ICH's hemorrhage_diagnosis.csv, for the trauma scans")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "default-weights")
    parser.add_argument("--preset", choices=["full", "balanced", "fast"], default="balanced")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="of OpenVINO; 0 for all cores")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, metavar="ROW",
                        help=f"some of {', '.join(ROWS)}")  # fmt: skip
    parser.add_argument("--pictures", action="store_true",
                        help="draw every scan in FOLDER/pictures, the worst first")  # fmt: skip
    args = parser.parse_args()
    try:
        rows = score(args)
    except IchsegError as error:
        print(error, file=sys.stderr)
        return 2
    for row in rows:
        verdict = "" if row["ok"] is None else ("ok" if row["ok"] else "MISSED")
        bar = "" if row["bar"] is None else f"{row['bar']:g}"
        print(f"{row['row']:58} {row['ours']:8.3f} {row['unit']:5} {bar:>6} {verdict}".rstrip())
    print(json.dumps({"benchmark": "default_weights", "preset": args.preset, "rows": rows}))
    return 0 if all(row["ok"] is not False for row in rows) else 1


def score(args: argparse.Namespace) -> list[Row]:
    """All rows that were asked for; ``cases.csv`` and pictures are written beside."""
    ensemble = load(args.weights, args.device, args.threads)
    wanted: list[Wanted] = []
    of_workspace = [name for name in OF_WORKSPACE if name in args.only]
    if args.workspace is not None:
        wanted += find_patients(args.workspace, args.ct_ich_table, of_workspace)
    elif of_workspace:
        print(f"no --workspace: {', '.join(of_workspace)} are left out", file=sys.stderr)
    if "heldout" in args.only:
        wanted += find_heldout(args.folder / "heldout")
    networks = networks_of_folds(ensemble, args.workspace, wanted)
    wanted = [one for one in wanted if one.fold is None or one.fold in networks]
    found = [
        segment(one, ensemble if one.fold is None else networks[one.fold], args.preset, args.folder)
        for one in wanted
    ]
    rows: list[Row] = []
    for group, rows_of in (
        ("patients", patient_rows),
        ("stripped", patient_rows),
        ("trauma", trauma_rows),
        ("heldout", heldout_rows),
    ):
        of_group = [each for each in found if each.group == group]
        rows += rows_of(of_group) if of_group else []
    if "samples" in args.only:
        for preset in dict.fromkeys((args.preset, "fast")):
            samples = find_samples(preset)
            sampled = [segment(one, ensemble, preset, args.folder) for one in samples]
            rows += sample_rows(sampled, preset)
            wanted, found = [*wanted, *samples], [*found, *sampled]
    write_table(found, args.folder / "cases.csv")
    if args.pictures:
        draw(wanted, found, args.folder)
    return rows


def find_patients(workspace: Path, table: Path | None, groups: Sequence[str]) -> list[Wanted]:
    """The real scans of a workspace as they were published, for the rows that are asked for."""
    ignore_label = dataset.load_dataset(workspace).ignore_label
    cases = out_of_fold(workspace)
    real = [name for name in cases if not MADE.search(name)]
    wanted = []
    for group in groups:
        if group == "trauma":
            if table is None:
                print("no --ct-ich-table: trauma is left out", file=sys.stderr)
                continue
            bleeds = bleeding_patients(table)
            for name in (name for name in real if name.startswith(TRAUMA)):
                one = wanted_of(group, name, cases, ignore_label)
                kind = "bleed" if bleeds[name] else "no bleed"
                wanted.append(dataclasses.replace(one, label=None, kind=kind))
            continue
        for name in (name for name in real if name.startswith(PATIENT)):
            one = wanted_of(group, name, cases, ignore_label)
            wanted.append(dataclasses.replace(one, stripped=group == "stripped"))
    return wanted


def find_heldout(data: Path) -> list[Wanted]:
    """The held-out phantoms, which are made if they are not there."""
    if not (data / "cases.csv").exists():
        command = ["-m", "training", "synthesize", "--out", str(data), "--cases", "20"]
        command += ["--seed", "20221", "--balanced", "--negatives", "0"]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    with (data / "cases.csv").open() as stream:
        return [
            Wanted("heldout", row["case"], data / "imagesTr" / f"{row['case']}.nii.gz",
                   data / "labelsTr" / f"{row['case']}.nii.gz", kind=row["kinds"])
            for row in csv.DictReader(stream)
        ]  # fmt: skip


def find_samples(preset: str) -> list[Wanted]:
    """The sample scans; the one without a bleed has no reference."""
    images, references = SAMPLES / "input", SAMPLES / "reference"
    return [
        Wanted(f"samples-{preset}", name, images / name,
               references / name if name in SAMPLE_BARS else None)
        for name in (*SAMPLE_BARS, NEGATIVE)
    ]  # fmt: skip


def networks_of_folds(
    ensemble: Ensemble, workspace: Path | None, wanted: Sequence[Wanted]
) -> dict[str, Ensemble]:
    """The networks of each fold that is needed and that the bundle has."""
    folds = sorted({one.fold for one in wanted if one.fold is not None})
    if workspace is None or not folds:
        return {}
    names = [case.name for case in dataset.load_dataset(workspace).labelled]
    split = splits.find_splits(workspace, names)
    found = {}
    for fold in folds:
        networks = of_fold(ensemble, fold, split[int(fold)].train)
        if networks is None:
            left_out = sum(one.fold == fold for one in wanted)
            print(f"no networks of fold {fold}: {left_out} scans are left out", file=sys.stderr)
        else:
            found[fold] = networks
    return found


def patient_rows(found: Sequence[Found]) -> list[Row]:
    """Dice of patients with a bleed, mean and median."""
    stripped = found[0].group == "stripped"
    dice = [each.dice or 0.0 for each in found]
    errors = [abs(each.found_ml - (each.reference_ml or 0.0)) for each in found]
    name = f"{len(found)} patients{', skull removed' if stripped else ''}, out of fold"
    return [
        make_row(f"{name}: Dice, mean", np.mean(dice), "", 0.85 if stripped else 0.88, least=True),
        make_row(f"{name}: Dice, median", np.median(dice), "", None if stripped else 0.93,
                 least=True),
        make_row(f"{name}: error of the volume, mean", np.mean(errors), "mL", None),
    ]  # fmt: skip


def trauma_rows(found: Sequence[Found]) -> list[Row]:
    """Volumes in scans without a bleed, and how well the case score tells the two kinds apart."""
    quiet = [each.found_ml for each in found if each.kind == "no bleed"]
    rows = []
    if quiet:
        name = f"{len(quiet)} trauma scans without a bleed"
        under = sum(ml < 0.1 for ml in quiet)
        rows = [
            make_row(f"{name}: found, median", np.median(quiet), "mL", 0.05),
            make_row(f"{name}: found, most", max(quiet), "mL", 1.0),
            make_row(f"{name}: share under 0.1 mL", under / len(quiet), "", 20 / 23, least=True),
        ]
    area = area_under_roc([each.kind == "bleed" for each in found], [e.case_score for e in found])
    if area.value is not None:
        name = f"{len(found)} trauma scans: AUC of the case score"
        rows.append(make_row(name, area.value, "", 0.92, least=True))
        if area.low is not None and area.high is not None:
            rows.append(make_row(f"{name}, 95 % from", area.low, "", None))
            rows.append(make_row(f"{name}, 95 % to", area.high, "", None))
    return rows


def heldout_rows(found: Sequence[Found]) -> list[Row]:
    """Dice of the held-out phantoms: all, each kind of bleed, and by size."""
    groups = {"all": found}
    groups |= {
        kind: [e for e in found if e.kind == kind] for kind in sorted({e.kind for e in found})
    }
    groups["subdural and epidural"] = groups.get("subdural", []) + groups.get("epidural", [])
    groups["under 1 mL"] = [each for each in found if (each.reference_ml or 0) < 1]
    groups["1 mL and more"] = [each for each in found if (each.reference_ml or 0) >= 1]
    bars = {"all": 0.83, "subdural and epidural": 0.87, "under 1 mL": 0.60}
    rows = [
        make_row(f"held-out phantoms, Dice, {name} (n={len(of_group)})",
                 np.mean([each.dice or 0.0 for each in of_group]), "", bars.get(name), least=True)
        for name, of_group in groups.items()
        if of_group
    ]  # fmt: skip
    seconds = np.median([each.seconds for each in found])
    return [*rows, make_row("held-out phantoms, seconds a case (median)", seconds, "s", None)]


def sample_rows(found: Sequence[Found], preset: str) -> list[Row]:
    """The sample cases: Dice where there is a bleed, the volume found where not, and seconds."""
    rows = []
    for each in found:
        name = f"sample {each.name}, {preset}"
        if each.dice is not None:
            bar = None if preset == "fast" else SAMPLE_BARS[each.name]
            rows.append(make_row(f"{name}: Dice", each.dice, "", bar, least=True))
        else:
            bar = NEGATIVE_BARS_ML.get(preset)
            rows.append(make_row(f"{name}: found", each.found_ml, "mL", bar))
        rows.append(make_row(f"{name}: time", each.seconds, "s", None))
    seconds = np.median([each.seconds for each in found])
    name = f"a sample, {preset}: time (median)"
    return [*rows, make_row(name, seconds, "s", SECONDS_BARS.get(preset))]


def make_row(
    name: str, ours: float | np.floating, unit: str, bar: float | None, *, least: bool = False
) -> Row:
    """One row of the result; there is no rival here, only bars, to reach or else not to exceed."""
    ours = float(ours)
    ok = None if bar is None else bool(ours >= bar if least else ours <= bar)
    return {"row": name, "ours": round(ours, 4), "rival": None, "unit": unit, "ratio": None,
            "bar": bar, "ok": ok}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
