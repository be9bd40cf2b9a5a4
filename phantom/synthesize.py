"""``synthesize``: head-CT phantoms with bleeds, as a dataset in the Decathlon's layout."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import logging
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from ichseg.engine import machine
from ichseg.errors import DatasetError, InputError, OutputError
from ichseg.files import make_folder, remove_unfinished, unfinished_folder
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from ichseg.wording import times
from ichseg.workers import end_with_parent
from phantom import check
from phantom.background import IGNORE_LABEL, find_backgrounds
from phantom.cases import SynthesisConfig, make_case

Row = dict[str, object]  # of cases.csv

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``python -m training synthesize``."""
    parser.add_argument(
        "--out",
        type=Path,
        help="dataset folder to make, which does not exist or is empty; with --check the picture "
        "to write [synthesize-check.png]",
    )
    parser.add_argument(
        "--cases",
        type=int,
        help="how many [100; with --background FOLDER one for each of its scans]",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed makes other phantoms [%(default)s]"
    )
    parser.add_argument(
        "--name",
        default="ICH",
        help="phantoms are called NAME_0001 and so on, so that several sets can be joined [ICH]",
    )
    parser.add_argument(
        "--workers", type=int, default=machine.cpus(), help="parallel processes [one a core]"
    )
    parser.add_argument(
        "--negatives",
        type=float,
        default=0.1,
        help="fraction of scans without a bleed [%(default)s]",
    )
    parser.add_argument(
        "--balanced", action="store_true", help="the five kinds of bleeds in turn, one kind a case"
    )
    parser.add_argument(
        "--findings",
        action="store_true",
        help="phantoms also show what makes heads hard to read: hydrocephalus, fresh blood in old "
        "subdural collections, layers along the tentorium, calcified dura, dense veins, scalp "
        "haematomas, fractures, surgical material, contrast medium, mouth and neck",
    )
    parser.add_argument(
        "--background",
        type=Path,
        metavar="SCAN|FOLDER",
        help="real scan to draw the bleeds into, instead of a phantom, or a dataset of such scans; "
        "their own labels are kept",
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="CT",
        help="compare six phantoms with this scan, in a table and a picture, and make no dataset",
    )


def main(args: argparse.Namespace) -> int:
    """Make the dataset, or with ``--check`` the comparison; 0 when all is well."""
    if args.check is not None:
        return check.check(args.check, seed=args.seed, picture=args.out)
    if args.out is None:
        raise DatasetError("synthesize needs --out DIR (or --check CT)")
    backgrounds = find_backgrounds(args.background) if args.background else ()
    if backgrounds and args.findings:
        raise DatasetError("--findings are drawn into phantoms alone, not with --background")
    config = SynthesisConfig(
        100,
        args.seed,
        args.negatives,
        args.balanced,
        backgrounds,
        findings=args.findings,
        name=args.name,
    )
    every = len(backgrounds) if config.draws_into_dataset else config.cases
    config = dataclasses.replace(config, cases=every if args.cases is None else args.cases)
    write_dataset(config, args.out, workers=args.workers)
    return 0


def write_dataset(config: SynthesisConfig, out: Path, *, workers: int = 1) -> None:
    """Write all cases; the folder appears whole or not at all.

    Raises:
        DatasetError: ``out`` exists and holds something, or a setting is out of range.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out}: exists already, expected a new or empty folder")
    if not re.fullmatch(r"[A-Za-z0-9]{1,40}", config.name):
        raise DatasetError(f"--name is {config.name[:60]!r}, expected up to 40 letters and digits")
    if config.cases < 1 or not 0 <= config.negatives <= 1 or workers < 1:
        raise DatasetError(
            f"cases {config.cases}, negatives {config.negatives}, workers {workers}: "
            "expected at least 1, a fraction from 0 to 1, at least 1"
        )
    make_folder(out.parent)
    remove_unfinished(out.parent)
    try:
        with unfinished_folder(out.parent) as beside:
            building = beside / out.name
            for name in ("imagesTr", "labelsTr"):
                (building / name).mkdir(parents=True)
            rows = _write_cases(config, workers, building)
            _write_tables(config, rows, building)
            if out.exists():
                out.rmdir()
            building.rename(out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error.strerror})") from error


def _write_cases(config: SynthesisConfig, workers: int, folder: Path) -> list[Row]:
    """Make and write the cases; a row of the table of cases for each.

    Raises:
        DatasetError: None of the real scans has room for a bleed.
    """
    rows = []
    for row in _run([(config, index, folder) for index in range(config.cases)], workers):
        if isinstance(row, str):
            logger.warning("left out: %s", row)
            continue
        rows.append(row)
        logger.info("%s: %s", row["case"], row["kinds"] or "no bleed")
    if not rows:
        raise DatasetError("none of the real scans has room for a bleed")
    return rows


def _run(jobs: list[tuple[SynthesisConfig, int, Path]], workers: int) -> Iterator[Row | str]:
    """Make the cases, in order; with one thread each, on which their last bits depend."""
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield from map(_write_case, jobs)
        torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        try:
            yield from pool.map(_write_case, jobs)
        except BrokenProcessPool as error:
            raise DatasetError(
                "a worker process was killed, perhaps for want of memory; try fewer --workers"
            ) from error
        finally:  # interrupted: the cases that have not begun never do
            pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    end_with_parent()


def _write_case(job: tuple[SynthesisConfig, int, Path]) -> Row | str:
    """Make one case and write its files; its row of ``cases.csv``.

    Of several real scans one without room for a bleed is left out: why comes back instead.
    """
    config, index, folder = job
    try:
        case = make_case(config, index)
    except InputError as error:
        if not config.draws_into_dataset:
            raise
        return str(error)
    name, _ = _name_and_group(config, index)
    for part, voxels in (("imagesTr", case.voxels), ("labelsTr", case.mask)):
        # packed at the lowest level: noise does not compress anyway, and this is fast
        volume.write(Volume(voxels, case.spacing_mm), folder / part / f"{name}.nii.gz", level=1)
    volumes = ";".join(f"{kind}={ml:.3f}" for kind, ml in case.volumes_ml.items())
    return {
        "case": name, "kinds": ";".join(case.volumes_ml),
        "lesions": len(case.lesions), "volume_ml": volumes,
        "spacing_mm": times(case.spacing_mm), "seed": config.seed,
    } | ({"findings": ";".join(case.findings.names)} if config.findings else {})  # fmt: skip


def _name_and_group(config: SynthesisConfig, index: int) -> tuple[str, str]:
    """What a case is called, and whose it is: a scan drawn into is its patient's."""
    if not config.draws_into_dataset:
        name = f"{config.name}_{index + 1:04d}"
        return name, config.backgrounds[0].group if config.backgrounds else name
    again, which = divmod(index, len(config.backgrounds))
    background = config.backgrounds[which]
    return f"{background.name}_bled{again + 1 if again else ''}", background.group


def _write_tables(config: SynthesisConfig, rows: list[Row], folder: Path) -> None:
    training = [
        {"image": f"./imagesTr/{row['case']}.nii.gz", "label": f"./labelsTr/{row['case']}.nii.gz"}
        for row in rows
    ]
    real = config.draws_into_dataset
    ignore = {str(IGNORE_LABEL): "ignore"} if real else {}  # of the backgrounds' own labels
    description = {
        "name": "SyntheticHeadCT",
        "description": f"Head-CT phantoms with intracranial bleeds, seed {config.seed}"
        if not real
        else f"Real head CT with synthetic intracranial bleeds, seed {config.seed}",
        "reference": "anatomy: MNI Colin 27 and ICBM152, see phantom/atlas/README.md",
        "licence": "Apache-2.0" if not real else "that of the real scans",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "hemorrhage"} | ignore,
        "numTraining": len(training),
        "numTest": 0,
        "training": training,
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
    with (folder / "cases.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if config.backgrounds:
        with (folder / "groups.csv").open("w", newline="") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(("case", "group"))
            groups = dict(_name_and_group(config, index) for index in range(config.cases))
            table.writerows((row["case"], groups[str(row["case"])]) for row in rows)
