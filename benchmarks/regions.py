"""Training on regions against nnunetv2 2.8.1: bleeds with a core, in a small set made here.

    PYTHONPATH=. .venv/bin/python benchmarks/regions.py --work FOLDER

Twenty volumes of noise with bleeds of two labels, of which two overlapping regions are trained: all
of the bleed, and its core. Both sides have the same plan, split, length and schedule (recipe
``nnunetv2``), three seeds each, one at a time on one thread of the CPU. What is done is kept in
FOLDER, so that the same command goes on after an interruption. First the loss and its gradient are
held against nnunetv2's own on random numbers; ``--only-loss`` ends there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from benchmarks import rivals, small_set
from benchmarks.fold_pair import SIDES, FoldPair, Settings, mean_dice
from benchmarks.rows import Row, at_most, report
from ichseg.model.plans import Region
from training.fit.losses import dice_cross_entropy

CASES, SHAPE, SPACING_MM = 20, (16, 48, 48), (2.0, 1.0, 1.0)
NAMES = ("bleed", "core")
IGNORE = 3


def main() -> int:
    """Print the Dice of each seed and one line of JSON; 1 if ours is worse by a deviation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="what is done is kept here")
    parser.add_argument("--seeds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--epochs", type=int, default=10, help="[%(default)s]")
    parser.add_argument("--batches-per-epoch", type=int, default=25, help="[%(default)s]")
    parser.add_argument("--only-loss", action="store_true", help="train nothing")
    rivals.add_arguments(parser)
    args = parser.parse_args()
    work = args.work.absolute()
    python = rivals.python_of(args.rival_env)
    losses = compare_losses(work, python)
    if args.only_loss:
        return report("regions", losses)
    settings = Settings(
        dataset="Dataset777_Regions",
        batch=2,
        features=(8, 16, 32, 64),
        epochs=args.epochs,
        batches=args.batches_per_epoch,
        validation_batches=5,
        device="cpu",
        precision="fp32",
        threads=1,
        workers=0,
    )
    pair = FoldPair(work / "source", work, settings, python)
    pair.check_settings()
    pair.keep_settings()
    small_set.write(
        pair.source,
        make_case,
        seed=7,
        cases=CASES,
        spacing_mm=SPACING_MM,
        labels={"background": 0, "bleed": [1, 2], "core": 2},
        regions_class_order=[1, 2],
    )
    for seed in range(args.seeds):
        for side in SIDES:
            pair.train(side, seed)
        pair.check_same(seed)
    return report("regions", [*losses, *dice_rows(pair, args.seeds)])


def compare_losses(work: Path, python: Path) -> list[Row]:
    """The largest differences of loss and gradient, relative, on random logits and labels."""
    work.mkdir(parents=True, exist_ok=True)
    given, theirs = work / "loss-given.npz", work / "loss-rival.npz"
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (2, 2, 4, 16, 16)).astype(np.float32)
    target = rng.integers(0, IGNORE + 1, (2, 4, 16, 16)).astype(np.int8)
    np.savez(given, logits=logits, target=target)
    script = Path(__file__).with_name("regions_rival.py")
    subprocess.run([python, script, given, theirs], check=True)
    regions = (Region("bleed", 1, (1, 2)), Region("core", 2, (2,)))
    rows = []
    with np.load(theirs) as found:
        for name in ("00", "01", "10", "11"):
            batch_dice, ignoring = name[0] == "1", name[1] == "1"
            ours = torch.from_numpy(logits).requires_grad_()
            loss = dice_cross_entropy(
                ours,
                torch.from_numpy(target if ignoring else target.clip(max=IGNORE - 1)),
                batch_dice=batch_dice,
                regions=regions,
                ignore_label=IGNORE if ignoring else None,
            )
            loss.backward()
            what = f"{'batch' if batch_dice else 'sample'} Dice{', ignoring' * ignoring}"
            for kind, value in (("loss", loss.detach().numpy()), ("gradient", ours.grad.numpy())):
                rival = found[f"{kind}{name}"]
                off = float(np.abs(value - rival).max() / np.abs(rival).max())
                rows.append(at_most(f"{kind}, {what}: relative difference", off, "", 1e-5))
    return rows


def dice_rows(pair: FoldPair, seeds: int) -> list[Row]:
    """Print both sides by seed; the rows of the means. Ours may be worse by a deviation."""
    means = {side: mean_dice([pair.scores(side, n) for n in range(seeds)]) for side in SIDES}
    print(f"\nDice on {len(pair.fold(0).validation)} held-out cases, mean over cases")
    print(f"{'':6} {'seed':>9}" + "".join(f"{name:>10}" for name in NAMES))
    for side in SIDES:
        for seed, found in enumerate(means[side]):
            print(f"{side:6} {seed:9}" + "".join(f"{value:10.4f}" for value in found))
    rows = []
    for i, name in enumerate(NAMES):
        ours, rival = means["ours"][:, i], means["rival"][:, i]
        difference = float(ours.mean() - rival.mean())
        deviation = float(rival.std(ddof=1)) if seeds > 1 else 0.0
        rows += [
            Row(f"Dice of the {name} (difference)", float(ours.mean()), float(rival.mean()), "",
                difference, -deviation, difference >= -deviation),
            Row(f"  its deviation over {seeds} seeds", float(ours.std(ddof=min(1, seeds - 1))),
                deviation, "", None, None, None),
        ]  # fmt: skip
    return rows


def make_case(
    rng: np.random.Generator,
) -> tuple[np.ndarray[tuple[int, ...], np.dtype], np.ndarray[tuple[int, ...], np.dtype]]:
    """One image in HU and its labels, both ``(z, y, x)``: one to three bleeds, each with a core.

    Bleed and core exceed the brain by as much as the noise deviates, so that voxels alone do not
    tell them apart.
    """
    labels = np.zeros(SHAPE, np.uint8)
    grid = np.indices(SHAPE, np.float32) * np.array(SPACING_MM, np.float32)[:, None, None, None]
    for _ in range(rng.integers(1, 4)):
        centre = np.array([rng.uniform(8, 24), rng.uniform(12, 36), rng.uniform(12, 36)])
        radii = rng.uniform(4, 10, 3)
        distance = np.sqrt((((grid.T - centre) / radii) ** 2).sum(-1)).T
        distance += ndimage.gaussian_filter(rng.normal(size=SHAPE), 2) * 2
        labels[(distance < 1) & (labels == 0)] = 1
        labels[distance < 0.55] = 2
    noise = ndimage.gaussian_filter(rng.normal(size=SHAPE), 0.7) * 24
    image = 32 + np.choose(labels, (0, 14, 28)) + noise
    return image.round().astype(np.int16), labels


if __name__ == "__main__":
    sys.exit(main())
