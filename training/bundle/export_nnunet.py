"""A weights bundle becomes trained nnU-Net v2 folders, which nnunetv2 loads and predicts with.

The counterpart of ``import_nnunet``. What nnU-Net cannot express is said in the log, one line each.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ichseg.errors import OutputError, PlansError, WeightsError
from ichseg.files import make_folder, remove_unfinished, unfinished_folder
from ichseg.model import bundle
from ichseg.model.architecture import NORM_EPSILON, Architecture
from ichseg.model.bundle import Member, Model
from ichseg.model.network import build_network
from ichseg.model.plans import Configuration, Normalisation, Plans
from training.bundle.import_nnunet import CHECKPOINTS
from training.bundle.nnunet_checkpoint import their_names
from training.bundle.nnunet_plans import (
    ARCHITECTURES,
    ENCODER,
    NETWORKS,
    RESAMPLING,
)
from training.data.regions import BACKGROUND, IGNORE
from training.data.workspace import DATASET_FILE, PLANS_FILE
from training.fit import checkpoint
from training.planning.recipes import ANISOTROPY

TRAINER = "nnUNetTrainer"
_PLANS_NAMES = {ours: theirs for theirs, ours in ARCHITECTURES.items()}
_READERS = {"LPS": "SimpleITKIO", "as_stored": "SimpleITKIO", "RAS": "SimpleITKIOWithReorient"}
_SCHEMES = {
    "ct": "CTNormalization",
    "zscore": "ZScoreNormalization",
    "none": "NoNormalization",
}
_ARRAYS = {"image": "data", "label": "seg", "score": "probabilities"}

_log = logging.getLogger(__name__)


def export_folders(source: Path, out: Path) -> list[Path]:
    """Write one trained-model folder for each configuration of a bundle, all of them or none.

    Args:
        source: The bundle's folder.
        out: Where the model folders come to lie, ``Trainer__Plans__configuration`` each, as in
            ``nnUNet_results/DatasetXXX_Name``.

    Returns:
        The folders, the first stage of a cascade before its second.

    Raises:
        WeightsError: The bundle cannot be read, or its tensors are not those of its plans.
        PlansError: nnU-Net has no place for the bundle's labels or regions.
        OutputError: There is a folder of that name already, or the files cannot be written.
    """
    model = bundle.load_model(source)
    dataset, plans = write_dataset(model), write_plans(model.plans)
    names = {name: f"{TRAINER}__{plans['plans_name']}__{name}" for name in model.configurations}
    for name in names.values():
        if (out / name).exists():
            raise OutputError(f"{out / name}: exists already, expected no such folder")
    make_folder(out)
    remove_unfinished(out)
    try:
        with unfinished_folder(out) as beside:
            for configuration, name in names.items():
                folder = beside / name
                folder.mkdir()
                (folder / DATASET_FILE).write_text(json.dumps(dataset, indent=4), encoding="utf-8")
                (folder / PLANS_FILE).write_text(json.dumps(plans, indent=4), encoding="utf-8")
                for member in model.members_of(configuration):
                    fold = folder / f"fold_{member.fold}"
                    fold.mkdir()
                    with (fold / CHECKPOINTS["final"]).open("wb") as stream:
                        checkpoint.save(write_checkpoint(source, model, member), stream)
            for name in names.values():
                (beside / name).replace(out / name)
    except OSError as error:
        raise OutputError(f"{out}: cannot write ({error.strerror})") from error
    return [out / name for name in names.values()]


def lost(model: Model) -> Iterator[str]:
    """What nnU-Net does otherwise than the bundle says, one sentence each."""
    plans = model.plans
    if plans.orientation == "LPS":
        yield (
            "nnU-Net takes scans as they are stored, this bundle turns them to LPS first: scans "
            "stored in another direction reach the network unturned"
        )
    if model.average == "probabilities":
        yield (
            "nnU-Net averages logits over tiles, mirrorings and folds, this bundle probabilities: "
            "borders may move by a voxel"
        )
    if not plans.normalise_first:
        yield (
            "nnU-Net normalises before it resamples, this bundle afterwards: intensities at sharp "
            "edges differ where a scan is resampled"
        )
    if plans.crop == "head":
        yield (
            "nnU-Net does not cut to the head: what lies outside of it is segmented as well, and "
            "prediction takes longer"
        )
    if plans.padding != "zero":
        yield (
            "nnU-Net pads a scan that is smaller than the patch with zeros, this bundle with the "
            "nearest voxel: the masks of such scans differ"
        )
    if any(plans.configuration(name).previous_stage for name in model.configurations):
        if model.cascade == "scores":
            yield (
                "nnU-Net hands a mask in the scan's grid from the first stage to the second, this "
                "bundle scores: borders may move by a voxel"
            )
        yield (
            "nnU-Net runs a cascade's stages one by one: give the second the first one's masks "
            "with -prev_stage_predictions"
        )
    if len(model.averaged) > 1:
        yield (
            f"nnU-Net predicts by {' and '.join(model.averaged)} separately: let each save its "
            "probabilities, and average them with nnUNetv2_ensemble"
        )
    for rule in model.rules:
        dropped = [
            *(["all components but the largest"] if rule.keep_largest else []),
            *([f"components below {rule.drop_below_ml:g} mL"] if rule.drop_below_ml else []),
            *(
                [f"components of a mean probability below {rule.drop_below_probability:g}"]
                if rule.drop_below_probability
                else []
            ),
        ]
        yield (
            f"nnU-Net keeps {' and '.join(dropped)} of {plans.labels[rule.label]}, which this "
            "bundle drops"
        )


def write_dataset(model: Model) -> dict[str, Any]:
    """The contents of nnU-Net's ``dataset.json``.

    Raises:
        PlansError: Two labels or regions have one name, one is called as nnU-Net calls the label
            to ignore, or it is not known which labels the regions hold.
    """
    plans = model.plans
    names = [region.name for region in plans.foreground]
    for name in names:
        if names.count(name) > 1 or name in (BACKGROUND, IGNORE):
            raise PlansError(
                f"label {name!r} in the bundle's plans, expected names that differ from one "
                f"another and from {BACKGROUND} and {IGNORE}"
            )
    members = [
        list(region.labels) if plans.regions else region.label for region in plans.foreground
    ]
    cases = model.provenance.get("cases", 0)
    return {
        "name": plans.dataset,
        "description": model.description,
        "channel_names": {str(i): name for i, name in enumerate(plans.channels)},
        "labels": {BACKGROUND: 0} | dict(zip(names, members, strict=True)),
        **({"regions_class_order": list(plans.regions)} if plans.regions else {}),
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }


def write_plans(plans: Plans) -> dict[str, Any]:
    """The contents of nnU-Net's ``plans.json``, with all configurations."""
    plans_name = _PLANS_NAMES.get(plans.architecture, "nnUNetPlans")
    # A 2D configuration takes its first axis, which it does not use, from the dataset's medians.
    flat = [c for c in plans.configurations if c.architecture.dimensions == 2]
    finest = min(plans.configurations, key=lambda c: math.prod(c.spacing_mm))
    median = flat[0] if flat else finest
    configurations = {c.name: _configuration(plans, c, plans_name) for c in plans.configurations}
    for own in plans.configurations:
        if own.previous_stage in configurations:
            configurations[own.previous_stage]["next_stage"] = own.name
    return {
        "dataset_name": plans.dataset,
        "plans_name": plans_name,
        "original_median_spacing_after_transp": list(median.spacing_mm),
        "original_median_shape_after_transp": list(median.median_shape),
        "image_reader_writer": _READERS[plans.orientation],
        "transpose_forward": list(plans.transpose),
        "transpose_backward": [plans.transpose.index(axis) for axis in range(3)],
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(i): _intensities(own) for i, own in enumerate(plans.normalisations)
        },
    }


def write_checkpoint(source: Path, model: Model, member: Member) -> dict[str, Any]:
    """What nnU-Net needs of a checkpoint to predict, or to begin a training with its weights.

    Raises:
        WeightsError: The tensors are not those of the bundle's plans.
    """
    configuration = model.plans.configuration(member.configuration)
    state = bundle.load_state(source, member)
    weights = their_state(
        {key: torch.from_numpy(array) for key, array in state.items()},
        model.plans,
        configuration,
        source / member.file,
    )
    first = 3 - configuration.architecture.dimensions
    return {
        "network_weights": weights,
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": 0,
        "init_args": {
            "configuration": configuration.name,
            "fold": int(member.fold) if member.fold.isdecimal() else member.fold,
        },
        "trainer_name": TRAINER,
        "inference_allowed_mirroring_axes": tuple(
            axis - first for axis in model.mirror_axes if axis >= first
        )
        or None,  # nnU-Net takes None for no mirroring, and fails on an empty tuple
    }


def their_state(
    state: dict[str, Tensor], plans: Plans, configuration: Configuration, path: Path
) -> dict[str, Tensor]:
    """Tensors under nnU-Net's names, also those that it registers twice.

    nnU-Net's networks have a bias in every convolution and a head at every level of the decoder;
    where ours have none it is 0, which changes no score.

    Args:
        state: The tensors under our names.
        plans: The plans that they fit.
        configuration: The configuration of the network.
        path: The file that they come from, for errors.

    Raises:
        WeightsError: A tensor is missing, left over or of another shape.
    """
    own = configuration.architecture
    complete = replace(own, upsampling_bias=True, head_bias=True, deep_supervision=True)
    expected = _shapes(own, plans, configuration)
    found = {key: tensor.shape for key, tensor in state.items()}
    if found != expected:
        wrong = min(key for key in found | expected if found.get(key) != expected.get(key))
        raise WeightsError(f"{path}: tensor {wrong} is not that of the bundle's plans")
    names = their_names(complete)
    weights = {}
    for key, shape in _shapes(complete, plans, configuration).items():
        module, _, kind = key.rpartition(".")
        tensor = state[key] if key in state else torch.zeros(shape)
        theirs = names[module]
        weights[f"{theirs}.{kind}"] = tensor
        block, _, part = theirs.rpartition(".")
        if part in ("conv", "norm"):  # the modules of a block are in a sequence as well
            weights[f"{block}.all_modules.{int(part == 'norm')}.{kind}"] = tensor
    encoder = {f"decoder.{key}": t for key, t in weights.items() if key.startswith("encoder.")}
    return weights | encoder  # the decoder holds the encoder


def _shapes(
    architecture: Architecture, plans: Plans, configuration: Configuration
) -> dict[str, torch.Size]:
    """The shapes of a network's tensors, by our names."""
    with torch.device("meta"):
        network = build_network(architecture, plans.input_channels(configuration), plans.scores)
    return {key: tensor.shape for key, tensor in network.state_dict().items()}


def _configuration(plans: Plans, own: Configuration, plans_name: str) -> dict[str, Any]:
    """One entry of nnU-Net's ``configurations``."""
    first = 3 - own.architecture.dimensions
    described: dict[str, Any] = {
        "data_identifier": f"{plans_name}_{own.name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": own.batch,
        "patch_size": list(own.patch),
        "median_image_size_in_voxels": list(own.median_shape[first:]),
        "spacing": list(own.spacing_mm[first:]),
        "normalization_schemes": [_SCHEMES[n.scheme] for n in plans.normalisations],
        "use_mask_for_norm": [n.masked for n in plans.normalisations],
        "batch_dice": own.batch_dice,
        "architecture": _architecture(own.architecture),
    }
    resampling = plans.resampling
    for kind, theirs in _ARRAYS.items():
        described[f"resampling_fn_{theirs}"] = RESAMPLING
        described[f"resampling_fn_{theirs}_kwargs"] = {
            "is_seg": kind == "label",
            "order": getattr(resampling, f"{kind}_order"),
            "order_z": 0,
            "force_separate_z": None if kind in resampling.separate_z else False,
            **(
                {"separate_z_anisotropy_threshold": resampling.anisotropy}
                if resampling.anisotropy != ANISOTROPY
                else {}
            ),
        }
    if own.previous_stage is not None:
        described["previous_stage"] = own.previous_stage
    return described


def _architecture(own: Architecture) -> dict[str, Any]:
    """nnU-Net's description of a network; it lists the decoder coarsest first."""
    network = next(name for name, block in NETWORKS.items() if block == own.block)
    axes = own.dimensions
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
        "arch_kwargs": {
            "n_stages": len(own.features),
            "features_per_stage": list(own.features),
            "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
            "kernel_sizes": [list(kernel) for kernel in own.kernels],
            "strides": [list(stride) for stride in own.strides],
            ENCODER[own.block]: list(own.encoder_convs),
            "n_conv_per_stage_decoder": list(reversed(own.decoder_convs)),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
            "norm_op_kwargs": {"eps": NORM_EPSILON, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _intensities(own: Normalisation) -> dict[str, float]:
    """What nnU-Net normalises CT by; nothing for images that are normalised by themselves."""
    if own.scheme != "ct":
        return {}
    return {
        "mean": own.mean,
        "std": own.deviation,
        "percentile_00_5": own.clip_low,
        "percentile_99_5": own.clip_high,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the ``export-nnunet`` command."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of a weights bundle")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where the model folders come to lie, such as nnUNet_results/Dataset101_ICH",
    )


def main(args: argparse.Namespace) -> int:
    """Run the ``export-nnunet`` command."""
    folders = export_folders(args.bundle, args.out)
    for sentence in lost(bundle.load_model(args.bundle)):
        _log.warning("%s", sentence)
    for folder in folders:
        _log.info("%s", folder)
    return 0
