"""What ``--lesion-fraction`` and ``--top-k-fraction`` do for small lesions, in a set made here.

    PYTHONPATH=. .venv/bin/python benchmarks/small_lesions.py --work FOLDER

Twenty volumes of noise, each with one large bleed and four of a few voxels. Trained are fold 0 by
recipe ``nnunetv2``, with neither option, with each, and with both, three seeds each, one at a time
on one thread of the CPU. There is no rival. What is done is kept in FOLDER, so that the same
command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy import ndimage

from benchmarks import small_set
from benchmarks.fold_pair import CONFIGURATION, FoldPair, Settings
from benchmarks.rows import Row, report
from ichseg.predict.dice import dice_of_masks
from ichseg.scan import volume
from training.data import dataset
from training.scoring.lesions import find_lesions

CASES, SHAPE, SPACING_MM = 20, (16, 48, 48), (2.0, 1.0, 1.0)
SMALL_ML = 0.2
OPTIONS: dict[str, tuple[object, ...]] = {
    "neither": (),
    "lesions": ("--lesion-fraction", 0.5),
    "top-k": ("--top-k-fraction", 0.1),
    "both": ("--lesion-fraction", 0.5, "--top-k-fraction", 0.1),
}


def main() -> int:
    """Print the means over seeds of each option, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="what is done is kept here")
    parser.add_argument("--seeds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--epochs", type=int, default=10, help="[%(default)s]")
    parser.add_argument("--batches-per-epoch", type=int, default=20, help="[%(default)s]")
    args = parser.parse_args()
    settings = Settings(
        dataset="Dataset778_SmallLesions",
        batch=2,
        features=(8, 16, 32, 64),
        epochs=args.epochs,
        batches=args.batches_per_epoch,
        validation_batches=2,
        device="cpu",
        precision="fp32",
        threads=1,
        workers=0,
    )
    work = args.work.absolute()
    small_set.write(
        work / "source",
        make_case,
        seed=11,
        cases=CASES,
        spacing_mm=SPACING_MM,
        labels={"background": 0, "bleed": 1},
    )
    rows = []
    for name, flags in OPTIONS.items():
        pair = FoldPair(work / "source", work / name, settings, Path())
        pair.check_settings()
        pair.keep_settings()
        found = np.array([measure(pair, seed, flags) for seed in range(args.seeds)])
        for what, values in zip(("Dice", "small lesions found", "false lesions a scan"), found.T,
                                strict=True):  # fmt: skip
            print(f"{name}: {what} {', '.join(f'{value:.3f}' for value in values)}", flush=True)
            rows.append(Row(f"{name}: {what}", float(values.mean()), None, "", None, None, None))
    return report("small_lesions", rows)


def measure(pair: FoldPair, seed: int, flags: tuple[object, ...]) -> tuple[float, float, float]:
    """Train, unless that is done; Dice, sensitivity for small lesions, false lesions a scan."""
    kept = pair.done("ours", seed)
    if not kept.exists():
        pair.prepare_ours(seed)
        pair.call_ours("train", *pair.our_flags(seed), "--workers", 0, *flags)
        kept.write_text(json.dumps(_scores(pair, seed)))
    dice, sensitivity, false = json.loads(kept.read_text())
    return dice, sensitivity, false


def _scores(pair: FoldPair, seed: int) -> tuple[float, float, float]:
    workspace = pair.workspace(seed)
    masks = workspace / "runs" / CONFIGURATION / "fold_0" / "validation"
    cases = {case.name: case for case in dataset.load_dataset(workspace).labelled}
    small = found = false = 0
    dice = []
    names = pair.fold(seed).validation
    for name in names:
        mask = volume.read(masks / f"{name}.nii.gz").voxels > 0
        reference = volume.read(cases[name].reference)
        truth = reference.voxels > 0
        dice.append(dice_of_masks(mask, truth))
        for lesion in find_lesions(truth, mask, reference.voxel_ml):
            small += lesion.volume_ml < SMALL_ML
            found += lesion.volume_ml < SMALL_ML and lesion.overlaps
        false += sum(not x.overlaps for x in find_lesions(mask, truth, reference.voxel_ml))
    return float(np.mean(dice)), found / small, false / len(names)


def make_case(
    rng: np.random.Generator,
) -> tuple[np.ndarray[tuple[int, ...], np.dtype], np.ndarray[tuple[int, ...], np.dtype]]:
    """One image in HU and its labels, both ``(z, y, x)``: a large bleed and four small ones."""
    labels = np.zeros(SHAPE, np.uint8)
    grid = np.indices(SHAPE, np.float32) * np.array(SPACING_MM, np.float32)[:, None, None, None]
    extent = np.array(SHAPE) * np.array(SPACING_MM)
    for radius in (rng.uniform(8, 11), *rng.uniform(2, 3, 4)):
        centre = rng.uniform(radius, extent - radius)
        distance = np.sqrt((((grid.T - centre) / radius) ** 2).sum(-1)).T
        labels[distance < 1] = 1
    noise = ndimage.gaussian_filter(rng.normal(size=SHAPE), 0.7) * 24
    return (32 + 20 * labels + noise).round().astype(np.int16), labels


if __name__ == "__main__":
    sys.exit(main())
