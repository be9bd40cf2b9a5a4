"""Intensities of all foreground voxels, and of nnunetv2's sample of them: docs/decisions/0004.

# needs: a dataset in a workspace, so `make bench` leaves it out

    PYTHONPATH=. .venv/bin/python benchmarks/clip_limits.py WORKSPACE

nnunetv2 draws as many voxels from each case, 10^8 in all, with replacement; its sample is drawn
here as it does it, from the generator with its seed. First channel only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from training.data.dataset import load_dataset, read_case
from training.planning.fingerprint import Counts, Intensities, count_values, summarise

DRAWS, SEED = 10**8, 1234


def main() -> int:
    """Print a table of three rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workspace", type=Path)
    dataset = load_dataset(parser.parse_args().workspace)
    cases = dataset.labelled
    whole, sample = [], []
    for case in cases:
        images, reference = read_case(case, dataset.labels, dataset.ignore_label)
        voxels = images[0].voxels[reference.voxels > 0]
        if voxels.size:
            whole.append(count_values(voxels))
            drawn = np.random.RandomState(SEED).choice(voxels, DRAWS // len(cases))
            values, counts = np.unique(drawn, return_counts=True)
            sample.append(Counts(values.astype(np.float64), counts))
    sizes = np.sort([np.sum(c.counts) if isinstance(c, Counts) else c.size for c in whole])
    share = sizes[-max(1, len(cases) // 10) :].sum() / sizes.sum()
    print(
        f"{len(cases)} cases, {len(whole)} with foreground: {sizes[0]}, {int(np.median(sizes))} "
        f"and {sizes[-1]} voxels (smallest, median, largest); the largest tenth of all cases "
        f"holds {100 * share:.0f} % of them"
    )
    print("                    0.5 %   median   99.5 %     mean   deviation")
    show("all voxels", summarise(whole))
    show("nnunetv2's sample", summarise(sample))
    return 0


def show(name: str, found: Intensities) -> None:
    """Print one row."""
    print(
        f"{name:<17} {found.percentile_00_5:>7.5g} {found.median:>8.5g} "
        f"{found.percentile_99_5:>8.5g} {found.mean:>8.5g} {found.deviation:>11.5g}"
    )


if __name__ == "__main__":
    sys.exit(main())
