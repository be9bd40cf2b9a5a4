"""Trained model folders as nnU-Net v2 leaves them: the keys of its files, on tiny networks."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

_RESAMPLING = "resample_data_or_seg_to_shape"
DATASET: dict[str, Any] = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "hemorrhage": 1},
    "numTraining": 5,
    "file_ending": ".nii.gz",
}
# made by benchmarks/nnunetv2_networks.py, of nnunetv2's own networks
NETWORKS: dict[str, dict[str, Any]] = {
    described["name"]: described
    for described in json.loads(
        Path(__file__).with_name("nnunetv2_networks.json").read_text(encoding="utf-8")
    )["networks"]
}
SMALL = NETWORKS["residual_2d"] | {"input": [1, 1, 16, 24]}
VOLUME = NETWORKS["residual_3d"]


def resampling(theirs: str, order: int) -> dict[str, Any]:
    """The entries of one kind of array in a configuration."""
    return {
        f"resampling_fn_{theirs}": _RESAMPLING,
        f"resampling_fn_{theirs}_kwargs": {
            "is_seg": theirs == "seg",
            "order": order,
            "order_z": 0,
            "force_separate_z": None,
        },
    }


def configuration(described: dict[str, Any]) -> dict[str, Any]:
    """One configuration, with a network as ``nnunetv2_networks.json`` describes it."""
    axes = len(described["kernels"][0])
    plain = described["network"] == "PlainConvUNet"
    patch = described["input"][2:]
    return {
        "data_identifier": "nnUNetPlans_x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch,
        "median_image_size_in_voxels": [30.0, 250.5, 260.0][-axes:],
        "spacing": [5.0, 0.5, 0.5][-axes:],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        **resampling("data", 3),
        **resampling("seg", 1),
        **resampling("probabilities", 1),
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet."
            + described["network"],
            "arch_kwargs": {
                "n_stages": len(described["features"]),
                "features_per_stage": described["features"],
                "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
                "kernel_sizes": described["kernels"],
                "strides": described["strides"],
                "n_conv_per_stage" if plain else "n_blocks_per_stage": described["encoder"],
                "n_conv_per_stage_decoder": described["decoder"],
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
        "batch_dice": True,
    }


def plans(configurations: dict[str, Any]) -> dict[str, Any]:
    """``plans.json``."""
    return {
        "dataset_name": "Dataset001_Bleeds",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [5.0, 0.5, 0.5],
        "original_median_shape_after_transp": [30, 250, 260],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {
                "max": 99.0,
                "mean": 52.25,
                "median": 50.0,
                "min": 1.0,
                "percentile_00_5": 9.5,
                "percentile_99_5": 88.5,
                "std": 13.75,
            }
        },
    }


def with_old_architecture(new: dict[str, Any], first: int, most: int) -> dict[str, Any]:
    """The same configuration as it was written before version 2.2."""
    old = copy.deepcopy(new)
    network = old.pop("architecture")
    arguments = network["arch_kwargs"]
    encoder = "n_conv_per_stage" if "n_conv_per_stage" in arguments else "n_blocks_per_stage"
    return old | {
        "UNet_class_name": network["network_class_name"].rpartition(".")[2],
        "UNet_base_num_features": first,
        "n_conv_per_stage_encoder": arguments[encoder],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [1, 2, 2],
        "pool_op_kernel_sizes": arguments["strides"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
        "unet_max_num_features": most,
    }


def weights(described: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A state dict under nnU-Net's names: sin(0), sin(1), ... in the order that
    ``nnunetv2_networks.json`` gives, and the encoder's and the convolutions' duplicates."""
    state: dict[str, torch.Tensor] = {}
    first = 0
    for name, shape in _parameters(described):
        count = int(np.prod(shape))
        index = torch.arange(first, first + count, dtype=torch.float64)
        state[name] = index.sin().reshape(shape)
        first += count
    for name in list(state):
        for own, position in ((".conv.", ".all_modules.0."), (".norm.", ".all_modules.1.")):
            if own in name:
                state[name.replace(own, position)] = state[name]
    state |= {f"decoder.{k}": v for k, v in state.items() if k.startswith("encoder.")}
    return state


def checkpoint(described: dict[str, Any], name: str, **changes: object) -> dict[str, Any]:
    """A checkpoint of that configuration, with NumPy numbers where nnU-Net has them."""
    axes = len(described["kernels"][0])
    return {
        "network_weights": weights(described),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": np.float64(0.01)}]},
        "grad_scaler_state": None,
        "logging": {"ema_fg_dice": [np.float64(0.5), np.float32(0.6)], "lrs": [0.01]},
        "_best_ema": np.float64(0.6),
        "current_epoch": 1000,
        "init_args": {"configuration": name, "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": tuple(range(axes)),
    } | changes


def write(
    folder: Path,
    described: dict[str, Any],
    name: str = "3d_fullres",
    *,
    planned: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    folds: tuple[str, ...] = ("0",),
    file: str = "checkpoint_final.pth",
    **changes: object,
) -> Path:
    """A model folder; ``changes`` are of the checkpoint."""
    model = folder / f"nnUNetTrainer__nnUNetPlans__{name}"
    model.mkdir(parents=True, exist_ok=True)
    planned = planned or plans({name: configuration(described)})
    (model / "plans.json").write_text(json.dumps(planned))
    (model / "dataset.json").write_text(json.dumps(dataset or DATASET))
    for fold in folds:
        (model / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(checkpoint(described, name, **changes), model / f"fold_{fold}" / file)
    return model


def _parameters(described: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    features, kernels = described["features"], described["kernels"]
    strides, levels = described["strides"], len(described["features"])

    def convolution(name: str, inputs: int, outputs: int, kernel: list[int], bias: bool = True):
        yield f"{name}.conv.weight", (outputs, inputs, *kernel)
        if bias:
            yield f"{name}.conv.bias", (outputs,)
        yield f"{name}.norm.weight", (outputs,)
        yield f"{name}.norm.bias", (outputs,)

    inputs = described["input"][1]
    if described["network"] == "ResidualEncoderUNet":
        yield from convolution("encoder.stem.convs.0", inputs, features[0], kernels[0])
        inputs = features[0]
        for level in range(levels):
            for i in range(described["encoder"][level]):
                block = f"encoder.stages.{level}.blocks.{i}"
                yield from convolution(f"{block}.conv1", inputs, features[level], kernels[level])
                yield from convolution(
                    f"{block}.conv2", features[level], features[level], kernels[level]
                )
                if inputs != features[level]:
                    after_pooling = int(i == 0 and set(strides[level]) != {1})
                    ones = [1] * len(kernels[0])
                    yield from convolution(
                        f"{block}.skip.{after_pooling}", inputs, features[level], ones, bias=False
                    )
                inputs = features[level]
    else:
        for level in range(levels):
            for i in range(described["encoder"][level]):
                name = f"encoder.stages.{level}.0.convs.{i}"
                yield from convolution(name, inputs, features[level], kernels[level])
                inputs = features[level]
    finest_first = range(levels - 1)
    for level in finest_first:
        name = f"decoder.transpconvs.{levels - 2 - level}"
        yield f"{name}.weight", (features[level + 1], features[level], *strides[level + 1])
        yield f"{name}.bias", (features[level],)
    for level in finest_first:
        stage = levels - 2 - level
        for i in range(described["decoder"][stage]):
            yield from convolution(
                f"decoder.stages.{stage}.convs.{i}",
                features[level] * (2 if i == 0 else 1),
                features[level],
                kernels[level],
            )
    for level in finest_first:
        name = f"decoder.seg_layers.{levels - 2 - level}"
        yield f"{name}.weight", (described["classes"], features[level], *[1] * len(kernels[0]))
        yield f"{name}.bias", (described["classes"],)
