"""Asks nnunetv2's own planners for the numbers that the planner's tests compare with.

    PYTHONPATH=. .venv/bin/python benchmarks/nnunetv2_plans.py --hippocampus FOLDER

Runs in the rival's environment (``rivals.py``), on fingerprints written by hand, which is all that
the planners look at; FOLDER is the Decathlon's Task04, whose fingerprint nnunetv2's extractor
takes. Writes ``test/helpers/nnunetv2_plans.json``; a minute on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLANNERS = (
    "ExperimentPlanner",
    "nnUNetPlannerResEncM",
    "nnUNetPlannerResEncL",
    "nnUNetPlannerResEncXL",
)
NAME = "Dataset001_Planned"


@dataclass(frozen=True)
class Task:
    """What is planned for; one spacing and shape ``(z, y, x)`` per case, or one for all.

    Attributes:
        about: Why the task is here.
        cases: How many cases it has.
        spacings_mm: The voxel sizes, as stored in the files.
        shapes: The sizes in voxels after the crop.
        channels: The names of the channels.
        labels: How many labels there are, background included.
    """

    about: str
    cases: int
    spacings_mm: Sequence[Sequence[float]]
    shapes: Sequence[Sequence[int]]
    channels: Sequence[str] = ("CT",)
    labels: int = 2


def made_tasks() -> dict[str, Task]:
    """All tasks but the Hippocampus."""
    fine = (5.0, 0.45, 0.45)
    found = {
        f"instance_{slices}": Task(
            f"head CT of {slices} slices, the spacing of INSTANCE",
            100,
            [fine],
            [(slices, 512, 512)],
        )
        for slices in (28, 29, 30)
    }
    found["instance_32"] = Task("finer in-plane", 100, [(5.0, 0.42, 0.42)], [(32, 512, 512)])
    found["isotropic_ct"] = Task("a cascade", 100, [(0.8, 0.8, 0.8)], [(400, 512, 512)])
    found["anisotropic_ct"] = Task(
        "a cascade whose fine axes go first", 100, [(2.5, 0.7, 0.7)], [(160, 512, 512)]
    )
    found["mixed"] = mixed_task()
    found["coarse_second_axis"] = Task("a transpose", 60, [(0.9, 4.0, 0.9)], [(208, 42, 230)])
    found["few_cases"] = Task("batches capped by the dataset", 4, [fine], [(28, 512, 512)])
    found["four_channels"] = Task(
        "multi-channel MR, four labels", 200, [(1.0, 1.0, 1.0)], [(138, 171, 137)],
        ("FLAIR", "T1", "T1gd", "T2"), 4,
    )  # fmt: skip
    return found


def mixed_task() -> Task:
    """A task over INSTANCE's ranges, in which the 10th percentile of the slices counts."""
    draw = random.Random(2022)
    spacings, shapes = [], []
    for _ in range(100):
        slice_mm = draw.choice((4.4, 4.8, 5.0, 5.0, 5.0, 5.5, 6.0, 7.5, 10.0))
        in_plane = round(draw.uniform(0.37, 0.60), 3)
        spacings.append((slice_mm, in_plane, in_plane))
        shapes.append((draw.randint(24, 40), draw.choice((512, 512, 512, 540, 560)),
                       draw.choice((430, 484, 512, 512, 512))))  # fmt: skip
    return Task("mixed spacings, seed 2022", 100, spacings, shapes)


def make_all(hippocampus: Path, out: Path, command: str) -> None:
    """Plan every task with every planner; runs in the rival's environment."""
    found: dict[str, Any] = {
        "made_by": {
            "nnunetv2": importlib.metadata.version("nnunetv2"),
            "torch": importlib.metadata.version("torch").split("+")[0],
            "command": command,
            "how": (
                "plan_experiment() of each planner, on dataset.json and dataset_fingerprint.json "
                "written by hand (hippocampus: the fingerprint is of nnunetv2's extractor), on "
                "torch's meta device, which spares the networks' weights and no layer. One "
                "entry in spacings_mm or shapes stands for all cases. Axes are (z, y, x), in "
                "configurations after transpose. encoder: convolutions per level, of ResEnc "
                "residual blocks; decoder: convolutions per level."
            ),
        },
        "tasks": {},
    }
    for name, task in (made_tasks() | {"hippocampus": None}).items():
        with tempfile.TemporaryDirectory() as scratch:
            for folder in ("raw", "preprocessed", "results"):
                os.environ[f"nnUNet_{folder}"] = f"{scratch}/{folder}"
            if task is None:
                task = extract_hippocampus(Path(scratch), hippocampus)
            else:
                write_fingerprint(Path(scratch), task)
            planners = {planner: run_planner(planner, name, Path(scratch)) for planner in PLANNERS}
        entry = {
            "about": task.about,
            "cases": task.cases,
            "channels": task.channels,
            "labels": task.labels,
            "spacings_mm": task.spacings_mm,
            "shapes": task.shapes,
            "planners": planners,
        }
        found["tasks"][name] = entry
        out.write_text(dumps(found) + "\n", encoding="utf-8")


def write_fingerprint(scratch: Path, task: Task) -> None:
    """Write the two files that a planner reads, and no image."""
    explicit = {"case": {"images": ["case_0000.nii.gz"], "label": "case.nii.gz"}}
    write_dataset(scratch, task.channels, task.labels, task.cases, explicit)
    spacings, shapes = list(task.spacings_mm), list(task.shapes)
    intensities = {
        "mean": 60.0, "median": 60.0, "std": 12.0, "min": 0.0, "max": 120.0,
        "percentile_00_5": 20.0, "percentile_99_5": 95.0,
    }  # fmt: skip
    fingerprint = {
        "spacings": spacings if len(spacings) > 1 else spacings * task.cases,
        "shapes_after_crop": shapes if len(shapes) > 1 else shapes * task.cases,
        "foreground_intensity_properties_per_channel": {
            str(channel): intensities for channel in range(len(task.channels))
        },
        "median_relative_size_after_cropping": 1.0,
    }
    folder = scratch / "preprocessed" / NAME
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))


def extract_hippocampus(scratch: Path, source: Path) -> Task:
    """Read the dataset where it lies, its fingerprint taken by nnunetv2."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset

    msd = json.loads((source / "dataset.json").read_text())
    explicit = {}
    for entry in msd["training"]:
        name = Path(entry["image"]).name.removesuffix(".nii.gz")
        explicit[name] = {
            "images": [str(source / entry["image"])],
            "label": str(source / entry["label"]),
        }
    channels = tuple(msd["modality"].values())
    write_dataset(scratch, channels, len(msd["labels"]), len(explicit), explicit)
    found = extract_fingerprint_dataset(1, num_processes=2, show_progress_bar=False)
    spacings = [tuple(float(value) for value in spacing) for spacing in found["spacings"]]
    shapes = [tuple(int(value) for value in shape) for shape in found["shapes_after_crop"]]
    return Task(
        f"{msd['name']} of the Medical Segmentation Decathlon, {len(explicit)} cases, "
        "in order of names",
        len(explicit),
        spacings if len(set(spacings)) > 1 else spacings[:1],
        shapes,
        channels,
        len(msd["labels"]),
    )


def write_dataset(
    scratch: Path, channels: Sequence[str], labels: int, cases: int, explicit: dict[str, Any]
) -> None:
    """Write dataset.json in nnunetv2's layout, with the files of each case named."""
    names = ("background", *(f"label{index}" for index in range(1, labels)))
    dataset = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": {name: index for index, name in enumerate(names)},
        "numTraining": cases,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        "dataset": explicit,
    }
    (scratch / "raw" / NAME).mkdir(parents=True)
    (scratch / "preprocessed" / NAME).mkdir(parents=True)
    (scratch / "raw" / NAME / "dataset.json").write_text(json.dumps(dataset))


def run_planner(planner: str, task: str, scratch: Path) -> dict[str, Any]:
    """Run a planner; what it writes, less what is the same for all."""
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    began = time.monotonic()
    with torch.device("meta"):  # networks are made for their layers' sizes: spare their weights
        identifier = plan_experiments([1], planner)
    plans = json.loads((scratch / "preprocessed" / NAME / f"{identifier}.json").read_text())
    manager = PlansManager(plans)  # resolves what the cascade inherits
    configurations = {
        name: describe(manager.get_configuration(name).configuration)
        for name in plans["configurations"]
    }
    print(f"== {task}, {planner}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return {"transpose": plans["transpose_forward"], "configurations": configurations}


def describe(configuration: dict[str, Any]) -> dict[str, Any]:
    """The decisions of one configuration."""
    network = configuration["architecture"]["arch_kwargs"]
    encoder = "n_conv_per_stage" if "n_conv_per_stage" in network else "n_blocks_per_stage"
    return {
        "spacing_mm": configuration["spacing"],
        "median_shape": configuration["median_image_size_in_voxels"],
        "patch": configuration["patch_size"],
        "batch": configuration["batch_size"],
        "batch_dice": configuration["batch_dice"],
        "previous_stage": configuration.get("previous_stage"),
        "network": configuration["architecture"]["network_class_name"].rsplit(".", 1)[-1],
        "features": network["features_per_stage"],
        "strides": network["strides"],
        "kernels": network["kernel_sizes"],
        "encoder": network[encoder],  # convolutions per level, or residual blocks
        "decoder": network["n_conv_per_stage_decoder"],
    }


def dumps(value: Any, indent: int = 0) -> str:
    """JSON with mappings spread over lines, down to one line for each configuration."""
    if not isinstance(value, dict) or "patch" in value:
        return json.dumps(value, separators=(",", ":"))
    inner = " " * (indent + 1)
    lines = (f"{inner}{json.dumps(key)}: {dumps(item, indent + 1)}" for key, item in value.items())
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


def main() -> int:
    """Find the rival's environment and run this file there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hippocampus", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "test" / "helpers" / "nnunetv2_plans.json"
    )
    parser.add_argument("--rival-env", type=Path, metavar="FOLDER", help="see rivals.py")
    parser.add_argument("--in-rival", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    command = "PYTHONPATH=. .venv/bin/python benchmarks/nnunetv2_plans.py --hippocampus FOLDER"
    if args.in_rival:
        make_all(args.hippocampus.resolve(), args.out, command)
        return 0
    from benchmarks import rivals

    python = rivals.python_of(args.rival_env or rivals.DEFAULT_ENV)
    return subprocess.run([python, *sys.argv, "--in-rival"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
