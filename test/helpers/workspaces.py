"""A tiny training workspace: a few cases with a bright box, planned by hand and preprocessed."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import torch
from conftest import CONFIGURATION, PLANS

from ichseg.model import strict_json
from ichseg.model.plans import Configuration, Plans
from ichseg.predict import prepare
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.batches.augmentation import AugmentationConfig
from training.data import dataset
from training.data.dataset import Case, Dataset
from training.data.sources import digest_cases
from training.fit.configuration import TrainingConfig
from training.store import chunks

# every kind of augmentation in nearly every sample, small warps for small patches
BUSY = AugmentationConfig(
    elastic_probability=0.7,
    elastic_alpha_2d=(0, 50),
    rotation_probability=0.7,
    scaling_probability=0.7,
    gamma_probability=0.7,
)
QUICK = TrainingConfig(
    epochs=2,
    batches_per_epoch=3,
    validation_batches=2,
    learning_rate=1e-3,
    augmentation=BUSY,
    device="cpu",
    threads=1,
    workers=0,
    validation=False,
)


def planned(**changes: object) -> Plans:
    """The tiny plans with another configuration."""
    configuration = dataclasses.replace(CONFIGURATION, **changes)
    return dataclasses.replace(PLANS, configurations=(configuration,))


def make_workspace(
    folder: Path, *, cases: int = 6, shape: tuple[int, int, int] = (6, 24, 24), plans: Plans = PLANS
) -> Path:
    """A workspace as ``convert``, ``plan`` and ``preprocess`` leave it."""
    configuration: Configuration = plans.configurations[0]
    rng = np.random.default_rng(7)
    listed = []
    for index in range(cases):
        name = f"case_{index}"
        reference = np.zeros(shape, np.uint8)
        z, y, x = (int(rng.integers(size // 3)) for size in shape)
        reference[z : z + shape[0] // 2, y : y + shape[1] // 3, x : x + shape[2] // 3] = 1
        voxels = (rng.normal(35, 3, shape) + 35 * reference).astype(np.float32)
        image = Volume(voxels, configuration.spacing_mm)
        label = image.with_voxels(reference)
        case = Case(name, (folder / "raw" / f"{name}.nii.gz",), folder / "raw" / f"{name}_l.nii.gz")
        write_source(image, case.images[0])
        write_source(label, case.label)
        prepared = prepare.prepare([image], plans, configuration)
        target = prepare.prepare_labels(label, prepared.placement, plans)
        stored = folder / "preprocessed" / configuration.name
        source = digest_cases(folder, [case], remember=False)[name]
        chunks.write_case(stored, name, prepared.data, target, plans.normalisations, source=source)
        listed.append(case)
    dataset.save_dataset(Dataset("tiny", plans.channels, plans.labels, tuple(listed)), folder)
    (folder / "plans.json").write_text(strict_json.dumps(plans))
    return folder


def write_source(scan: Volume, path: Path) -> None:
    """A case's file; without SimpleITK some bytes in its place: training reads the store alone."""
    if importlib.util.find_spec("SimpleITK"):
        volume.write(scan, path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(scan.voxels.tobytes())


def same_run(first: dict, second: dict) -> None:
    """Weights, optimiser, schedule and logged losses of two checkpoints are equal to the bit."""
    for part in ("network", "optimiser", "scaler"):
        assert leaves(first[part]) == leaves(second[part])
    assert first["schedule"] == second["schedule"]
    timing = {"seconds", "data_wait_s"}
    rows = [
        [{k: v for k, v in row.items() if k not in timing} for row in run["history"]]
        for run in (first, second)
    ]
    assert rows[0] == rows[1]


def leaves(tree: object) -> object:
    """A tree of tensors with their bytes in their place."""
    if isinstance(tree, dict):
        return {key: leaves(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [leaves(value) for value in tree]
    return tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree
