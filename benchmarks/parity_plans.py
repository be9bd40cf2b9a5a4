"""nnU-Net's plans and dataset descriptions of the tiny networks of ``parity.py``."""

from __future__ import annotations

from typing import Any

FEATURES = (6, 12, 24)
NETWORKS = {"PlainConvUNet": "plain", "ResidualEncoderUNet": "residual"}
GRIDS_MM = {"3d_fullres": (4.0, 2.0, 2.0), "3d_lowres": (6.0, 3.2, 3.2), "2d": (2.0, 2.0)}
DATASET: dict[str, Any] = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "bone": 1, "dense": 2},
    "numTraining": 2,
    "file_ending": ".mha",
}
REGIONS = DATASET | {
    "labels": {"background": 0, "any": [1, 2], "dense": [2]},
    "regions_class_order": [1, 2],
}


def make_plans(network: str) -> dict[str, Any]:
    """nnU-Net's plans, of tiny networks."""
    configurations: dict[str, Any] = {}
    for name, spacing in GRIDS_MM.items():
        axes = len(spacing)
        resampling = {"force_separate_z": None, "order_z": 0}
        configurations[name] = {
            "data_identifier": f"nnUNetPlans_{name}",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [96, 96] if axes == 2 else [8, 96, 96],
            "median_image_size_in_voxels": [36.0, 125.0, 125.0][-axes:],
            "spacing": list(spacing),
            "normalization_schemes": ["CTNormalization"],
            "use_mask_for_norm": [False],
            "batch_dice": False,
            "architecture": architecture(network, axes),
        }
        for kind, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
            configurations[name] |= {
                f"resampling_fn_{kind}": "resample_data_or_seg_to_shape",
                f"resampling_fn_{kind}_kwargs": resampling
                | {"is_seg": kind == "seg", "order": order},
            }
    configurations["3d_lowres"]["next_stage"] = "3d_cascade_fullres"
    configurations["3d_cascade_fullres"] = {
        "inherits_from": "3d_fullres",
        "previous_stage": "3d_lowres",
    }
    return {
        "dataset_name": "Dataset001_Parity",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [5.0, 0.6, 0.6],
        "original_median_shape_after_transp": [29, 400, 400],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {
                "mean": 350.0,
                "std": 350.0,
                "percentile_00_5": -20.0,
                "percentile_99_5": 1200.0,
                "median": 70.0,
                "min": -1000.0,
                "max": 2000.0,
            }
        },
    }


def architecture(network: str, axes: int) -> dict[str, Any]:
    """An architecture of three levels, the first thick-sliced as in plans for head CT."""
    plain = network == "PlainConvUNet"
    encoder = {"n_conv_per_stage": [2, 2, 2]} if plain else {"n_blocks_per_stage": [1, 2, 2]}
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": list(FEATURES),
            "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
            "kernel_sizes": [[1, 3, 3][-axes:], [3] * axes, [3] * axes],
            "strides": [[1] * axes, [1, 2, 2][-axes:], [2] * axes],
            **encoder,
            "n_conv_per_stage_decoder": [2, 2] if plain else [1, 1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
