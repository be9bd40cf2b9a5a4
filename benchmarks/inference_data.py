"""What the inference benchmark runs on: networks and cases, the same for both sides."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import rivals
from ichseg.model import bundle, plans
from ichseg.model.architecture import Architecture
from ichseg.model.plans import Configuration, Plans
from ichseg.scan import volume
from ichseg.scan.volume import Volume

ROOT = Path(__file__).resolve().parent.parent
COMPACT = Path(__file__).resolve().parent / "plans" / "compact.json"
DATASET = "Dataset001_Compact"
SPACING_MM = (5.0, 0.45, 0.45)  # the plan's, so that nothing is resampled


@dataclass(frozen=True, slots=True)
class Network:
    """Networks of one configuration with the same weights on both sides.

    Attributes:
        configuration: The configuration of the plan ``compact.json``.
        weights: The folder of our bundle.
        results: The rival's folder of trained models.
    """

    configuration: Configuration
    weights: Path
    results: Path


@dataclass(frozen=True, slots=True)
class Cases:
    """The same scans, named by each side's rules."""

    ours: Path
    rival: Path
    names: tuple[str, ...]


def make_network(
    folder: Path, name: str, folds: int, rival_python: Path, plans_file: Path = COMPACT
) -> Network:
    """Make networks that the rival draws at random and saves, and that ``import-nnunet`` reads.

    Args:
        folder: The folder for all that is made.
        name: The name of the configuration.
        folds: How many networks to draw.
        rival_python: The Python of the rival's environment.
        plans_file: The file of a plan with that configuration.
    """
    planned = plans.load(plans_file)
    configuration = planned.configuration(name)
    model = folder / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{name}"
    model.mkdir(parents=True)
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {label: value for value, label in enumerate(planned.labels)},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (model / "dataset.json").write_text(json.dumps(dataset))
    (model / "plans.json").write_text(json.dumps(rival_plans(planned)))
    subprocess.run(
        [rival_python, rivals.HERE / "nnunetv2_predict.py", "draw", model, name, str(folds)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "training", "import-nnunet", model, "--out", folder / "weights"],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    imported = bundle.load_model(folder / "weights").plans
    if imported.configuration(name).architecture != configuration.architecture:
        raise SystemExit(f"error: {name}: the imported network is not that of {plans_file}")
    return Network(configuration, folder / "weights", folder / "results")


def make_cases(folder: Path, shape: tuple[int, int, int], count: int) -> Cases:
    """Make scans without air, so that both sides see the same tiles: ours skips none."""
    names = tuple(f"case{number}" for number in range(count))
    cases = Cases(folder / "ours", folder / "rival", names)
    for number, name in enumerate(names):
        scan = Volume(make_scan(shape, number), SPACING_MM)
        volume.write(scan, cases.ours / f"{name}.nii.gz")
        cases.rival.mkdir(exist_ok=True)
        (cases.rival / f"{name}_0000.nii.gz").hardlink_to(cases.ours / f"{name}.nii.gz")
    return cases


def make_scan(shape: tuple[int, int, int], seed: int) -> npt.NDArray[np.int16]:
    """Make a scan of tissue with noise, and a brighter ball in it."""
    random = np.random.default_rng(seed)
    z, y, x = np.ogrid[tuple(slice(-1, 1, size * 1j) for size in shape)]
    voxels = random.normal(30, 3, shape)
    voxels[z**2 + (y - 0.3) ** 2 + (x + 0.1 * seed) ** 2 < 0.1] += 35
    return voxels.astype(np.int16)


def make_scores(shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Make smooth logits ``(2, z, y, x)``: a background, and a foreground of a few blobs."""
    axes = (
        np.linspace(0, turns * math.pi, size) for turns, size in zip((3, 5, 4), shape, strict=True)
    )
    z, y, x = (np.sin(axis).astype(np.float32) for axis in axes)
    lead = z[:, None, None] * y[:, None] * x * 8 - 4
    return np.stack((-lead / 2, lead / 2))


def gflop(configuration: Configuration, channels: int, scores: int) -> float:
    """Count the operations of one tile's convolutions; a multiply-add counts as two."""
    a: Architecture = configuration.architecture
    size = list(configuration.patch)
    voxels = []
    for stride in a.strides:
        size = [length // step for length, step in zip(size, stride, strict=True)]
        voxels.append(math.prod(size))
    total, inputs = 0, channels
    for level, features in enumerate(a.features):
        weights = inputs * features + (a.encoder_convs[level] - 1) * features**2
        total += voxels[level] * math.prod(a.kernels[level]) * weights
        inputs = features
    for level, convolutions in enumerate(a.decoder_convs):
        features = a.features[level]
        weights = 2 * features**2 + (convolutions - 1) * features**2
        total += voxels[level] * math.prod(a.kernels[level]) * weights
        total += voxels[level] * features * a.features[level + 1]  # the transposed convolution
    total += voxels[0] * a.features[0] * scores
    return 2 * total / 1e9


def rival_plans(planned: Plans) -> dict[str, Any]:
    """The rival's ``plans.json``."""
    scheme = planned.normalisations[0]
    first = planned.configurations[0]
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(first.spacing_mm),
        "original_median_shape_after_transp": list(first.median_shape),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(planned.transpose),
        "transpose_backward": list(planned.transpose),
        "configurations": {c.name: _rival_configuration(c) for c in planned.configurations},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {
                "mean": scheme.mean,
                "std": scheme.deviation,
                "percentile_00_5": scheme.clip_low,
                "percentile_99_5": scheme.clip_high,
            }
        },
    }


def _rival_configuration(configuration: Configuration) -> dict[str, Any]:
    a = configuration.architecture
    axes = a.dimensions
    resampling: dict[str, Any] = {}
    for kind, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        resampling[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        resampling[f"resampling_fn_{kind}_kwargs"] = {
            "is_seg": kind == "seg", "order": order, "order_z": 0, "force_separate_z": None,
        }  # fmt: skip
    return {
        "data_identifier": f"nnUNetPlans_{configuration.name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": configuration.batch,
        "patch_size": list(configuration.patch),
        "median_image_size_in_voxels": list(map(float, configuration.median_shape[-axes:])),
        "spacing": list(configuration.spacing_mm[-axes:]),
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        **resampling,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": len(a.features),
                "features_per_stage": list(a.features),
                "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
                "kernel_sizes": [list(kernel) for kernel in a.kernels],
                "strides": [list(stride) for stride in a.strides],
                "n_conv_per_stage": list(a.encoder_convs),
                "n_conv_per_stage_decoder": list(a.decoder_convs[::-1]),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": configuration.batch_dice,
    }
