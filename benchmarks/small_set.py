"""A small synthetic dataset in nnU-Net v2's layout, for trainings of both sides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ichseg.scan import volume
from ichseg.scan.volume import Volume

Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def write(
    folder: Path,
    make_case: Callable[[np.random.Generator], Arrays],
    *,
    seed: int,
    cases: int,
    spacing_mm: tuple[float, float, float],
    **described: object,
) -> None:
    """Write the set, unless it is there.

    Args:
        folder: The raw folder.
        make_case: Draws an image in HU and its labels, both ``(z, y, x)``.
        seed: All cases are drawn from it, each from random numbers of its own.
        cases: How many there are to be.
        spacing_mm: The voxels' size, ``(z, y, x)``.
        described: What else its ``dataset.json`` says, above all ``labels``.
    """
    if (folder / "dataset.json").exists():
        return
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(cases):
        image, labels = make_case(np.random.default_rng([seed, number]))
        grid = Volume(image, spacing_mm)
        volume.write(grid, folder / "imagesTr" / f"case_{number:02}_0000.nii.gz")
        volume.write(grid.with_voxels(labels), folder / "labelsTr" / f"case_{number:02}.nii.gz")
    fixed = {"channel_names": {"0": "CT"}, "numTraining": cases, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**fixed, **described}))
