"""Asks nnunetv2's own augmentation for the numbers that the augmentation's tests compare with.

    PYTHONPATH=. .venv/bin/python benchmarks/nnunetv2_augmentation.py

Runs in the rival's environment (``rivals.py``): how likely each transform of nnunetv2 is, and, each
of them alone and always, how the numbers of ``test/helpers/augmented.py`` are distributed after it.
Writes ``test/helpers/nnunetv2_augmentation.json``; a minute.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "test"))
from helpers.augmented import INTENSITY, PATCHES, SPATIAL, measure, phantom  # noqa: E402

COMMAND = "PYTHONPATH=. .venv/bin/python benchmarks/nnunetv2_augmentation.py"
HOW = (
    "probabilities: as nnunetv2's default trainer sets its transforms. quantiles: 0, 0.025 ... 1 "
    "of what test/helpers/augmented.py measures after one transform alone, applied always, in "
    "2000 samples."
)
SAMPLES = 2000
MARGIN = 20  # voxels of the region beyond the patch, in-plane or along all axes
TRANSFORMS = {
    "noise": "GaussianNoiseTransform",
    "blur": "GaussianBlurTransform",
    "brightness": "MultiplicativeBrightnessTransform",
    "contrast": "ContrastTransform",
    "low_resolution": "SimulateLowResolutionTransform",
    "inverted_gamma": "GammaTransform",
    "gamma": "GammaTransform",
}
CASCADE = {
    "morphology": "ApplyRandomBinaryOperatorTransform",
    "removal": "RemoveRandomConnectedComponentFromOneHotEncodingTransform",
}
IN_PLANE = ("rotation", "scaling", "low_resolution")  # what is done otherwise in-plane


def make_transforms(patch: tuple[int, ...], *, cascaded: bool) -> tuple[list[Any], bool]:
    """The default trainer's transforms without mirroring, and whether they work in-plane."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainer = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=patch), print_to_log_file=lambda *_: None
    )
    configure = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size
    rotation, in_plane, _, _ = configure(trainer)
    composed = nnUNetTrainer.get_training_transforms(
        patch, rotation, None, (), in_plane, is_cascaded=cascaded, foreground_labels=(1, 2)
    )
    return composed.transforms, in_plane


def find(transforms: list[Any]) -> dict[str, Any]:
    """Find the transforms that happen at random, by our names, and the spatial one."""
    found = {}
    for transform in transforms:
        inner = getattr(transform, "transform", transform)
        kind = type(inner).__name__
        if kind == "SpatialTransform":
            found["spatial"] = inner
        elif kind == "GammaTransform":
            found["inverted_gamma" if inner.p_invert_image else "gamma"] = transform
        else:
            named = {**TRANSFORMS, **CASCADE}.items()
            found |= {name: transform for name, wanted in named if wanted == kind}
    assert found.keys() >= {"spatial", *TRANSFORMS}
    return found


def probabilities(found: dict[str, Any]) -> dict[str, float]:
    """How likely each transform is, and each channel or label where that is asked again."""
    spatial = found["spatial"]
    likely = {
        "elastic": spatial.p_elastic_deform,
        "rotation": spatial.p_rotation,
        "scaling": spatial.p_scaling,
    }
    for name in (*TRANSFORMS, *CASCADE):
        likely[name] = found[name].apply_probability
    for name in CASCADE:
        likely[f"{name}_label"] = found[name].transform.p_per_label
    for name in ("blur", "low_resolution"):
        likely[f"{name}_channel"] = found[name].transform.p_per_channel
    return likely


def sample(operation: str, in_plane: bool) -> dict[str, list[float]]:
    """The quantiles of all numbers after one operation alone."""
    import torch

    patch = PATCHES[in_plane]
    transforms, flat = make_transforms(patch, cascaded=False)
    assert flat == in_plane
    found = find(transforms)
    found["spatial"].p_rotation = float(operation == "rotation")
    found["spatial"].p_scaling = float(operation == "scaling")
    for name in TRANSFORMS:
        found[name].apply_probability = float(operation == name)
    z, y, x = (n + (0 if in_plane and axis == 0 else MARGIN) for axis, n in enumerate(patch))
    data, labels = phantom((z, y, x), in_plane=in_plane)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    rows = []
    for _ in range(SAMPLES):
        done = {
            "image": torch.from_numpy(data[None].copy()),
            "segmentation": torch.from_numpy(labels[None].astype(np.int16)),
        }
        for transform in transforms:
            done = transform(**done)
        new, moved = done["image"][0].numpy(), done["segmentation"][0].numpy()
        rows.append(measure(new, moved.astype(np.int8), in_plane=in_plane))
    names = SPATIAL[:2] if operation in ("rotation", "scaling") else INTENSITY
    levels = np.linspace(0, 1, 41)
    return {
        name: [round(float(q), 3) for q in np.quantile([row[name] for row in rows], levels)]
        for name in names
    }


def write(out: Path) -> None:
    """Make the file; runs in the rival's environment."""
    made_by = {
        "nnunetv2": importlib.metadata.version("nnunetv2"),
        "batchgeneratorsv2": importlib.metadata.version("batchgeneratorsv2"),
        "command": COMMAND,
        "how": HOW,
    }
    likely = probabilities(find(make_transforms(PATCHES[False], cascaded=True)[0]))
    rows = []
    for in_plane in (False, True):
        for operation in IN_PLANE if in_plane else ("rotation", "scaling", *TRANSFORMS):
            found = sample(operation, in_plane)
            rows.append({"operation": operation, "in_plane": in_plane, "quantiles": found})
            print(f"{operation}{', in-plane' if in_plane else ''}", flush=True)
    inner = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in rows)
    out.write_text(
        f'{{\n "made_by": {json.dumps(made_by)},\n "probabilities": {json.dumps(likely)},\n'
        f' "distributions": [\n{inner}\n ]\n}}\n'
    )
    print(f"{len(rows)} distributions -> {out}", flush=True)


def main() -> int:
    """Find the rival's environment and run this file there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "test" / "helpers" / "nnunetv2_augmentation.json"
    )
    parser.add_argument("--rival-env", type=Path, metavar="FOLDER", help="see rivals.py")
    parser.add_argument("--in-rival", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_rival:
        write(args.out)
        return 0
    from benchmarks import rivals

    python = rivals.python_of(args.rival_env or rivals.DEFAULT_ENV)
    single = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, *sys.argv, "--in-rival"], env=single, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
