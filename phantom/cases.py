"""``synthesize``: head-CT phantoms with bleeds, as a dataset in the Decathlon's layout."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
import torch
from scipy import ndimage

from ichseg.errors import DatasetError, InputError
from ichseg.scan.volume import Volume, read
from phantom import bleeds, scanner
from phantom import head as phantom
from phantom.anatomy import Anatomy, enlarge

logger = logging.getLogger(__name__)

SMALLEST_ML, LARGEST_ML = 0.2, 155.0
_KIND_CHANCE = (0.34, 0.18, 0.18, 0.12, 0.18)  # in the order of bleeds.KINDS
_COMPANIONS = {
    "intraparenchymal": ("intraventricular", "subarachnoid", "intraparenchymal"),
    "intraventricular": ("intraparenchymal", "subarachnoid"),
    "subdural": ("subarachnoid", "intraparenchymal", "subdural"),
    "epidural": ("intraparenchymal", "subdural"),
    "subarachnoid": ("intraventricular", "intraparenchymal", "subdural"),
}
_COARSE_MM = (2.5, 1.9)  # slice and in-plane step of the grid that bleeds are drawn on


@dataclass(frozen=True, slots=True)
class SynthesisConfig:
    """What the user chose."""

    cases: int
    seed: int
    negatives: float = 0.1
    """Fraction of scans without a bleed."""
    balanced: bool = False
    """One kind a case, the five in turn, instead of drawing kinds and companions by their
    frequency."""
    background: Path | None = None
    """A real scan to draw the bleeds into."""
    shrink: int = 1
    """Divides the in-plane matrix; above 1 for tests."""


@dataclass(frozen=True)
class Case:
    """One synthetic scan; ``lesions`` holds kind and wanted volume of each bleed."""

    voxels: npt.NDArray[np.int16]
    mask: npt.NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]
    lesions: tuple[tuple[str, float], ...]
    volumes_ml: dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``python -m training synthesize``."""
    parser.add_argument(
        "--out", type=Path, help="dataset folder to make; must not exist or be empty"
    )
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--negatives", type=float, default=0.1, help="fraction of scans without a bleed"
    )
    parser.add_argument(
        "--balanced", action="store_true", help="the five kinds in turn, one a case"
    )
    parser.add_argument(
        "--background", type=Path, help="real scan to draw the bleeds into, instead of a phantom"
    )
    parser.add_argument(
        "--check", type=Path, metavar="CT", help="compare the phantoms with this scan, and stop"
    )


def main(args: argparse.Namespace) -> int:
    """Make the dataset, or with ``--check`` the comparison; 0 when all is well."""
    if args.check is not None:
        from phantom import check

        return check.check(args.check, seed=args.seed, picture=args.out)
    if args.out is None:
        raise DatasetError("synthesize needs --out DIR (or --check CT)")
    config = SynthesisConfig(args.cases, args.seed, args.negatives, args.balanced, args.background)
    write_dataset(config, args.out, workers=args.workers)
    return 0


def write_dataset(config: SynthesisConfig, out: Path, *, workers: int = 1) -> None:
    """Write all cases; the folder appears whole or not at all.

    Raises:
        DatasetError: ``out`` exists and holds something, or a setting is out of range.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out}: exists already, expected a new or empty folder")
    if config.cases < 1 or not 0 <= config.negatives <= 1 or workers < 1:
        raise DatasetError(
            f"cases {config.cases}, negatives {config.negatives}, workers {workers}: "
            "expected at least 1, a fraction from 0 to 1, at least 1"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        for name in ("imagesTr", "labelsTr"):
            (building / name).mkdir()
        jobs = [(config, index, building) for index in range(config.cases)]
        rows = []
        for row in _run(jobs, workers):
            rows.append(row)
            logger.info("%s: %s", row["case"], row["kinds"] or "no bleed")
        _write_tables(config, rows, building)
        building.chmod(0o755)
        if out.exists():
            out.rmdir()
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _run(
    jobs: list[tuple[SynthesisConfig, int, Path]], workers: int
) -> Iterator[dict[str, object]]:
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield from map(_write_case, jobs)
        torch.set_num_threads(threads)
        return
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap(_write_case, jobs)


def _write_case(job: tuple[SynthesisConfig, int, Path]) -> dict[str, object]:
    config, index, folder = job
    case = make_case(config, index)
    name = f"ICH_{index + 1:04d}"
    for part, voxels in (("imagesTr", case.voxels), ("labelsTr", case.mask)):
        _write_nifti(Volume(voxels, case.spacing_mm), folder / part / f"{name}.nii.gz")
    volumes = ";".join(f"{kind}={ml:.3f}" for kind, ml in case.volumes_ml.items())
    return {
        "case": name, "kinds": ";".join(case.volumes_ml),
        "lesions": len(case.lesions), "volume_ml": volumes,
        "spacing_mm": "x".join(f"{s:g}" for s in case.spacing_mm), "seed": config.seed,
    }  # fmt: skip


def _write_nifti(volume: Volume, path: Path) -> None:
    """Write packed at the lowest level: noise does not compress anyway, and this is fast."""
    image = sitk.GetImageFromArray(volume.voxels)
    image.SetSpacing(volume.spacing_mm[::-1])
    sitk.WriteImage(image, str(path), useCompression=True, compressionLevel=1)


def _write_tables(config: SynthesisConfig, rows: list[dict[str, object]], folder: Path) -> None:
    training = [
        {"image": f"./imagesTr/{row['case']}.nii.gz", "label": f"./labelsTr/{row['case']}.nii.gz"}
        for row in rows
    ]
    description = {
        "name": "SyntheticHeadCT",
        "description": f"Head-CT phantoms with intracranial bleeds, seed {config.seed}",
        "reference": "anatomy: MNI Colin 27 and ICBM152, see phantom/atlas/README.md",
        "licence": "Apache-2.0",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "hemorrhage"},
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


def make_case(config: SynthesisConfig, index: int) -> Case:
    """One scan, a function of the configuration and the case's number only."""
    rng = np.random.default_rng([config.seed, index])
    lesions = draw_lesions(config, index, rng)
    if config.background is not None:
        return _make_on_background(config.background, lesions, rng)
    head_parameters = phantom.draw_head(rng)
    scan = scanner.draw_scan(head_parameters, rng, shrink=config.shrink)
    return make_phantom(head_parameters, scan, lesions, rng)


def draw_lesions(
    config: SynthesisConfig, index: int, rng: np.random.Generator
) -> tuple[tuple[str, float], ...]:
    """Kind and volume of each bleed; volumes log-uniform, kinds by frequency or in turn."""
    if rng.random() < config.negatives:
        return ()
    total = float(np.exp(rng.uniform(np.log(SMALLEST_ML), np.log(LARGEST_ML))))
    if config.balanced:
        kind = bleeds.KINDS[index % len(bleeds.KINDS)]
        largest = bleeds.LARGEST_ML[kind]
        return ((kind, float(np.exp(rng.uniform(np.log(SMALLEST_ML), np.log(largest))))),)
    kind = str(rng.choice(bleeds.KINDS, p=_KIND_CHANCE))
    lesions = [(kind, total)]
    while len(lesions) < 4 and rng.random() < 0.33 and total > 0.6:
        share = float(rng.uniform(0.08, 0.5)) * lesions[0][1]
        if share < SMALLEST_ML:
            break
        lesions[0] = (kind, lesions[0][1] - share)
        lesions.append((str(rng.choice(_COMPANIONS[kind])), share))
    return tuple((name, min(volume, bleeds.LARGEST_ML[name])) for name, volume in lesions)


def make_phantom(
    head_parameters: phantom.HeadParameters,
    scan: scanner.ScanParameters,
    lesions: tuple[tuple[str, float], ...],
    rng: np.random.Generator,
) -> Case:
    """Scan a phantom with the given bleeds."""
    if any(kind == "intraventricular" and volume > 6 for kind, volume in lesions):
        growth = float(head_parameters.ventricle_growth_mm + rng.uniform(1.5, 3.5))
        head_parameters = _replace(head_parameters, ventricle_growth_mm=growth)
    head = phantom.make_head(head_parameters, rng)
    anatomy = coarse_anatomy(head, scan)
    drawn = [
        bleeds.draw_bleed(anatomy, kind=kind, volume_ml=volume, rng=rng) for kind, volume in lesions
    ]
    push = mass_effect(anatomy, drawn, scan, rng)

    shape = scanner.fine_shape(scan)
    axes = scanner.grid_axes_mm(scan, shape)
    fine = np.full(shape, scanner.AIR_HU, np.float32)
    blood = np.zeros(shape, np.float32)
    voxel_ml = float(np.prod(scan.spacing_mm)) * np.prod(scan.shape) / np.prod(shape) / 1000
    rows, columns = (_span(axis, half) for axis, half in zip(axes[1:], (118.0, 92.0), strict=True))
    at = phantom.atlas_position(head, (axes[0], axes[1][rows], axes[2][columns]), push)
    maps = phantom.sample(head.maps[:, [0, 1, 5]], at).numpy()
    outside_hu, inside, brain_hu = maps
    step_mm = tuple(float(axis[1] - axis[0]) for axis in axes)
    total = np.zeros_like(brain_hu)
    room = np.zeros(shape, bool)
    room[:, rows, columns] = (
        ndimage.minimum_filter(inside, (scan.parts, 3, 3)) > 0.9
    )  # clear of the skull's blur
    for bleed in drawn:
        fraction = bleeds.rasterise(bleed, shape, voxel_ml, room=room)[:, rows, columns]
        if bleed.oedema_mm:
            brain_hu -= bleeds.oedema(bleed, fraction, step_mm)  # type: ignore[arg-type]
        blood_hu = enlarge(bleed.hu, shape)[:, rows, columns]
        brain_hu += fraction * (blood_hu - brain_hu)
        total = np.maximum(total, fraction)
    fine[:, rows, columns] = outside_hu + inside * (brain_hu - outside_hu)
    blood[:, rows, columns] = total * np.clip((inside - 0.85) * 10, 0, 1)
    skin = np.flatnonzero((fine[: shape[0] // 2, :, columns] > -300).any(axis=(0, 2)))
    back = float(axes[1][skin[-1]]) if skin.size else 100.0
    fine = scanner.add_headrest(fine, scan, back)
    voxels = scanner.acquire(fine, scan, rng)
    image_blood = enlarge(
        blood.reshape(scan.shape[0], scan.parts, *shape[1:]).mean(axis=1), scan.shape
    )
    return _finish(voxels, image_blood, scan.spacing_mm, lesions, drawn)


def _finish(
    voxels: npt.NDArray[np.int16],
    blood: npt.NDArray[np.float32],
    spacing_mm: tuple[float, float, float],
    lesions: tuple[tuple[str, float], ...],
    drawn: list[bleeds.Bleed],
) -> Case:
    """Cut the label, off skull and air, and account for its volume by kind."""
    image_ml = float(np.prod(spacing_mm)) / 1000
    if drawn:
        blood = np.where(bleeds.cannot_be_blood(voxels, spacing_mm), 0, blood)
    wanted: dict[str, float] = {}
    for kind, volume in lesions:
        wanted[kind] = wanted.get(kind, 0.0) + volume
    if not drawn:
        return Case(voxels, np.zeros(voxels.shape, np.uint8), spacing_mm, lesions, {})
    reached = min(sum(wanted.values()), float(blood.sum()) * image_ml)
    mask = bleeds.label(blood, image_ml, reached)
    scale = mask.sum() * image_ml / max(sum(wanted.values()), 1e-9)
    return Case(
        voxels, mask, spacing_mm, lesions, {kind: volume * scale for kind, volume in wanted.items()}
    )


def coarse_anatomy(head: phantom.Head, scan: scanner.ScanParameters) -> Anatomy:
    """The head on the grid that bleeds are drawn on."""
    extent = [n * s for n, s in zip(scan.shape, scan.spacing_mm, strict=True)]
    shape = (
        scan.shape[0] * max(round(scan.spacing_mm[0] / _COARSE_MM[0]), 1),
        round(extent[1] / _COARSE_MM[1]),
        round(extent[2] / _COARSE_MM[1]),
    )
    at = phantom.atlas_position(head, scanner.grid_axes_mm(scan, shape))
    maps = phantom.sample(head.maps, at).numpy()
    side = -1 if head.parameters.mirrored else 1
    middle = at[..., 2].numpy() * np.float32(head.parameters.scale[2] * side)
    return Anatomy(
        spacing_mm=tuple(e / n for e, n in zip(extent, shape, strict=True)),  # type: ignore[arg-type]
        inside=maps[1] > 0.5,
        fluid=maps[3] * maps[1],
        ventricles=maps[4],
        middle_mm=middle,
    )


def mass_effect(
    anatomy: Anatomy,
    drawn: list[bleeds.Bleed],
    scan: scanner.ScanParameters,
    rng: np.random.Generator,
) -> npt.NDArray[np.float32] | None:
    """Brain pushed away from large bleeds, on the nodes of ``Head.bend_mm``; None for none."""
    pushing = [
        b
        for b in drawn
        if b.kind in ("intraparenchymal", "subdural", "epidural") and b.volume_ml > 2
    ]
    if not pushing:
        return None
    solid = np.maximum.reduce([(b.field > 0).astype(np.float32) for b in pushing])
    volume = sum(b.volume_ml for b in pushing)
    spread = 8.0 + 0.7 * bleeds.radius_mm(volume)
    potential = ndimage.gaussian_filter(
        solid, [spread / s for s in anatomy.spacing_mm], truncate=2.5
    )
    # tissue seen at p came from p + slope: towards the bleed
    slope = np.stack(np.gradient(potential, *anatomy.spacing_mm))
    most = min(0.55 * bleeds.radius_mm(volume), 13.0) * rng.uniform(0.4, 1.0)
    slope *= most / max(float(np.sqrt((slope**2).sum(0)).max()), 1e-9)
    slope *= np.clip((anatomy.depth_mm() - 1.0) / 12.0, 0, 1)
    axes = scanner.grid_axes_mm(scan, anatomy.inside.shape)  # type: ignore[arg-type]
    nodes = (np.arange(phantom.BEND_NODES) - (phantom.BEND_NODES - 1) / 2) * phantom.BEND_STEP_MM
    index = np.meshgrid(
        *((nodes - axis[0]) / (axis[1] - axis[0]) for axis in axes), indexing="ij"
    )  # node -> coarse voxel
    moved = [ndimage.map_coordinates(part, index, order=1, mode="constant") for part in slope]
    return np.stack(moved).astype(np.float32)


def _make_on_background(
    path: Path, lesions: tuple[tuple[str, float], ...], rng: np.random.Generator
) -> Case:
    """Draw the bleeds into a real scan, one after the other."""
    scan = read(path)
    if scan.voxels.min() > -500:
        raise InputError(
            f"{path}: lowest value {scan.voxels.min()}, expected HU with air around the head"
        )
    voxels = scan.voxels.astype(np.int16)
    mask = np.zeros(voxels.shape, np.uint8)
    volumes: dict[str, float] = {}
    for kind, volume in lesions:
        voxels, added = bleeds.insert_bleed(
            voxels, scan.spacing_mm, kind=kind, volume_ml=volume, rng=rng
        )
        volumes[kind] = volumes.get(kind, 0.0) + float((added & ~mask & 1).sum()) * scan.voxel_ml
        mask |= added
    return Case(voxels, mask, scan.spacing_mm, lesions, volumes)


def _span(axis: npt.NDArray[np.float32], half_mm: float) -> slice:
    """The part of an axis where a head can be."""
    within = np.flatnonzero(np.abs(axis) < half_mm)
    return slice(int(within[0]), int(within[-1]) + 1)


def _replace(parameters: phantom.HeadParameters, **changes: object) -> phantom.HeadParameters:
    return dataclasses.replace(parameters, **changes)  # type: ignore[arg-type]
