"""Read nnU-Net v2's ``plans.json`` and ``dataset.json`` as our plans.

Both formats are read: since version 2.2 a configuration describes its network under
``architecture``, before that by ``UNet_class_name`` and its like. What our inference would do
otherwise than nnU-Net is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ichseg.errors import PlansError
from ichseg.model import strict_json
from ichseg.model.architecture import LEAKY_SLOPE, NORM_EPSILON, Architecture
from ichseg.model.plans import (
    SCHEMA_VERSION,
    Configuration,
    Normalisation,
    Plans,
    Resampling,
)
from training.bundle.nnunet_values import listed, real, refused_as, text, whole, wholes
from training.data.regions import BACKGROUND, IGNORE, Declared, declare
from training.data.workspace import DATASET_FILE, PLANS_FILE
from training.planning.recipes import ANISOTROPY

NETWORKS = {"PlainConvUNet": "plain", "ResidualEncoderUNet": "residual"}
ARCHITECTURES = {
    "nnUNetResEncUNetMPlans": "resenc_m",
    "nnUNetResEncUNetLPlans": "resenc_l",
    "nnUNetResEncUNetXLPlans": "resenc_xl",
}
ORIENTATIONS = {
    "SimpleITKIO": "as_stored",
    "NibabelIO": "as_stored",
    "SimpleITKIOWithReorient": "RAS",
    "NibabelIOWithReorient": "RAS",
}
RESAMPLING = "resample_data_or_seg_to_shape"
# Beyond what any network of nnU-Net has; so a damaged file cannot ask for years of work.
MOST_LEVELS, MOST_FEATURES, MOST_CONVS, MOST_KERNEL, MOST_STRIDE = 16, 8192, 64, 15, 16
MOST_VOXELS, LEAST_MM, MOST_MM = 1_000_000, 1e-6, 1e6
_FAR = 1e9
_NAME = re.compile(r"\w[\w.-]{0,99}")
_PACKAGE = "dynamic_network_architectures."
ENCODER = {"plain": "n_conv_per_stage", "residual": "n_blocks_per_stage"}
# Arguments of a network that do not change what it answers, or whose value is checked below.
_ARGUMENTS = {
    "n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "conv_bias",
    "n_conv_per_stage_decoder", "norm_op", "norm_op_kwargs", "dropout_op", "dropout_op_kwargs",
    "nonlin", "nonlin_kwargs", "deep_supervision",
}  # fmt: skip

Json = Mapping[str, Any]


def read_plans(folder: Path, name: str) -> Plans:
    """Read nnU-Net's plans of a model folder as ours, with one configuration.

    Args:
        folder: The model folder, with ``plans.json`` and ``dataset.json``.
        name: The name of the configuration.

    Raises:
        PlansError: A file is missing or damaged, lacks something, or asks for something that this
            code cannot do; the text names the file and the value.
    """
    path = folder / DATASET_FILE
    dataset = strict_json.load_object(path, strict=False)
    with refused_as(path):
        declared = _labels(dataset)
        channels = _channels(dataset)
    path = folder / PLANS_FILE
    plans = strict_json.load_object(path, strict=False)
    with refused_as(path):
        _expect_name(name)
        raw = _resolve(plans, name)
        _expect("preprocessor_name", raw["preprocessor_name"], ["DefaultPreprocessor"])
        _expect("label_manager", plans.get("label_manager", "LabelManager"), ["LabelManager"])
        reader = plans["image_reader_writer"]
        _expect("image_reader_writer", reader, list(ORIENTATIONS))
        i, j, k = wholes("transpose_forward", plans["transpose_forward"], 0, 2, longest=3)
        return Plans(
            schema_version=SCHEMA_VERSION,
            recipe="nnunetv2",
            dataset=text("dataset_name", plans["dataset_name"]),
            channels=channels,
            labels=declared.labels,
            orientation=ORIENTATIONS[reader],
            transpose=(i, j, k),
            normalise_first=True,
            normalisations=_normalisations(plans, raw, len(channels)),
            resampling=_resampling(raw),
            configurations=(_configuration(plans, raw, name),),
            architecture=ARCHITECTURES.get(plans["plans_name"], "plain"),
            regions=declared.regions,
            region_labels=declared.region_labels,
        )


def _expect_name(name: str) -> None:
    """A configuration's name becomes part of file names."""
    if not _NAME.fullmatch(name):
        raise PlansError(f"configuration {name!r}, expected letters, digits, _, - and . alone")


def _resolve(plans: Json, name: str) -> Json:
    """The configuration with everything that it inherits."""
    known = plans["configurations"]
    chain = [name]
    while (parent := known.get(chain[-1], {}).get("inherits_from")) is not None:
        if parent in chain:
            raise PlansError(f"configuration {name}: inherits from itself, by {' -> '.join(chain)}")
        chain.append(parent)
    if chain[-1] not in known:
        raise PlansError(f"no configuration {chain[-1]!r}, found {', '.join(known)}")
    merged: dict[str, Any] = {}
    for ancestor in reversed(chain):
        merged |= known[ancestor]
    return merged


def _configuration(plans: Json, raw: Json, name: str) -> Configuration:
    patch = wholes("patch_size", raw["patch_size"], 1, MOST_VOXELS, longest=3)
    flat = len(patch) == 2
    missing = slice(int(flat))  # a 2D configuration leaves the first axis out; ours does not use it
    spacing = *plans["original_median_spacing_after_transp"][missing], *raw["spacing"]
    shape = (
        *plans["original_median_shape_after_transp"][missing],
        *raw["median_image_size_in_voxels"],
    )
    z, y, x = (real("spacing", size, LEAST_MM, MOST_MM) for size in spacing)
    a, b, c = (max(1, round(real("median_image_size", n, 0, MOST_VOXELS))) for n in shape)
    previous = raw.get("previous_stage")
    return Configuration(
        name=name,
        spacing_mm=(z, y, x),
        median_shape=(a, b, c),
        patch=patch,
        batch=whole("batch_size", raw["batch_size"], 1, MOST_VOXELS),
        batch_dice=bool(raw["batch_dice"]),
        dummy_2d=not flat and max(patch) / patch[0] > ANISOTROPY,
        previous_stage=None if previous is None else text("previous_stage", previous),
        architecture=_architecture(raw, len(patch)),
    )


def _architecture(raw: Json, dimensions: int) -> Architecture:
    """The network of a configuration of either format."""
    if "architecture" not in raw:
        return _old_architecture(raw, dimensions)
    found, arguments = raw["architecture"]["network_class_name"], raw["architecture"]["arch_kwargs"]
    name = found.rpartition(".")[2]
    if name not in NETWORKS or not found.startswith(_PACKAGE):
        raise PlansError(f"network class {found}, expected {' or '.join(NETWORKS)}")
    block = NETWORKS[name]
    unknown = sorted(arguments.keys() - _ARGUMENTS - {ENCODER[block]})
    if unknown:
        raise PlansError(f"network argument {unknown[0]}, expected those of nnU-Net's planners")
    _expect("conv_op", arguments["conv_op"].rpartition(".")[2], [f"Conv{dimensions}d"])
    _expect("conv_bias", arguments["conv_bias"], [True])
    _expect("norm_op", arguments["norm_op"].rpartition(".")[2], [f"InstanceNorm{dimensions}d"])
    _expect("norm_op_kwargs", arguments["norm_op_kwargs"], [{"eps": NORM_EPSILON, "affine": True}])
    _expect("nonlin", arguments["nonlin"].rpartition(".")[2], ["LeakyReLU"])
    slope = (arguments.get("nonlin_kwargs") or {}).get("negative_slope", LEAKY_SLOPE)
    _expect("negative_slope", slope, [LEAKY_SLOPE])
    return _numbers(
        block,
        dimensions,
        arguments["features_per_stage"],
        arguments["kernel_sizes"],
        arguments["strides"],
        arguments[ENCODER[block]],
        arguments["n_conv_per_stage_decoder"],
    )


def _old_architecture(raw: Json, dimensions: int) -> Architecture:
    """The network of plans before version 2.2, where features double up to a limit."""
    name = raw["UNet_class_name"]
    if name not in NETWORKS:
        raise PlansError(f"network class {name}, expected {' or '.join(NETWORKS)}")
    encoder = listed("n_conv_per_stage_encoder", raw["n_conv_per_stage_encoder"], MOST_LEVELS)
    first, most = (
        whole(key, raw[key], 1, MOST_FEATURES)
        for key in ("UNet_base_num_features", "unet_max_num_features")
    )
    return _numbers(
        NETWORKS[name],
        dimensions,
        [min(first * 2**level, most) for level in range(len(encoder))],
        raw["conv_kernel_sizes"],
        raw["pool_op_kernel_sizes"],
        encoder,
        raw["n_conv_per_stage_decoder"],
    )


def _numbers(
    block: str,
    dimensions: int,
    features: object,
    kernels: object,
    strides: object,
    encoder: object,
    decoder: object,
) -> Architecture:
    """An architecture by numbers; ``decoder`` is listed coarsest first, as nnU-Net has it."""
    sizes = _per_axis("kernel_sizes", kernels, MOST_KERNEL)
    steps = _per_axis("strides", strides, MOST_STRIDE)
    if any(len(axes) != dimensions for axes in (*sizes, *steps)):
        raise PlansError(f"kernels {kernels} and strides {strides} of a {dimensions}D network")
    if any(size % 2 == 0 for kernel in sizes for size in kernel):
        raise PlansError(f"kernels {kernels}, expected odd sizes")
    return Architecture(
        features=wholes("features_per_stage", features, 1, MOST_FEATURES, longest=MOST_LEVELS),
        kernels=sizes,
        strides=steps,
        encoder_convs=wholes("encoder blocks", encoder, 1, MOST_CONVS, longest=MOST_LEVELS),
        decoder_convs=wholes("decoder blocks", decoder, 1, MOST_CONVS, longest=MOST_LEVELS)[::-1],
        upsampling_bias=True,
        head_bias=True,
        deep_supervision=True,
        block=block,
    )


def _per_axis(what: str, levels: object, most: int) -> tuple[tuple[int, ...], ...]:
    """One whole number for each axis of each level."""
    return tuple(
        wholes(what, axes, 1, most, longest=3) for axes in listed(what, levels, MOST_LEVELS)
    )


def _labels(dataset: Json) -> Declared:
    """The names of the labels by value; of regions, if there are any, what they write and hold.

    The ignore label is for training alone and is left out.
    """
    declared = {name: value for name, value in dataset["labels"].items() if name != IGNORE}
    values = {
        name: [whole(f"label {name}", v, 0, 255) for v in _as_list(value)]
        for name, value in declared.items()
    }
    every = sorted({value for listed in values.values() for value in listed})
    if values.get(BACKGROUND) != [0] or every != list(range(len(every))) or len(every) > 255:
        raise PlansError(f"labels {dataset['labels']}, expected background 0, then 1, 2, ... 254")
    if all(len(listed) == 1 for listed in values.values()):
        names = {listed[0]: name for name, listed in values.items()}
        return Declared(tuple(names[value] for value in every))
    order = wholes("regions_class_order", dataset["regions_class_order"], 1, every[-1], longest=255)
    return declare({name: held for name, held in values.items() if set(held) != {0}}, order)


def _channels(dataset: Json) -> tuple[str, ...]:
    named = dataset["channel_names"] if "channel_names" in dataset else dataset["modality"]
    return tuple(text("channel name", named[key]) for key in sorted(named, key=int))


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _normalisations(plans: Json, raw: Json, channels: int) -> tuple[Normalisation, ...]:
    new, old = (f"foreground_intensity_properties_{by}" for by in ("per_channel", "by_modality"))
    statistics = plans[new] if new in plans or old not in plans else plans[old]
    schemes, masks = raw["normalization_schemes"], raw["use_mask_for_norm"]
    if not len(schemes) == len(masks) == channels:
        raise PlansError(f"normalization_schemes {schemes} of {channels} channels")
    found = []
    for channel, (scheme, masked) in enumerate(zip(schemes, masks, strict=True)):
        if scheme == "CTNormalization":
            own = statistics[str(channel)]
            found.append(
                Normalisation(
                    "ct",
                    clip_low=real("percentile_00_5", own["percentile_00_5"], -_FAR, _FAR),
                    clip_high=real("percentile_99_5", own["percentile_99_5"], -_FAR, _FAR),
                    mean=real("mean", own["mean"], -_FAR, _FAR),
                    deviation=real("std", own["std"], 0, _FAR),
                )
            )
        elif scheme == "ZScoreNormalization":
            found.append(Normalisation("zscore", masked=bool(masked)))
        elif scheme == "NoNormalization":
            found.append(Normalisation("none"))
        else:
            raise PlansError(
                f"normalisation {scheme}, expected CTNormalization, ZScoreNormalization or "
                "NoNormalization"
            )
    return tuple(found)


def _resampling(raw: Json) -> Resampling:
    orders, apart, anisotropy = {}, [], set()
    for kind, theirs in (("image", "data"), ("label", "seg"), ("score", "probabilities")):
        key = f"resampling_fn_{theirs}"
        _expect(key, raw[key], [RESAMPLING])
        arguments = raw[f"{key}_kwargs"]
        orders[kind] = arguments["order"]
        _expect(f"{key} order", orders[kind], [0, 1] if kind != "image" else [0, 1, 3])
        _expect(f"{key} order_z", arguments.get("order_z", 0), [0])
        _expect(f"{key} force_separate_z", arguments.get("force_separate_z", False), [None, False])
        if arguments.get("force_separate_z", False) is None:
            apart.append(kind)
        threshold = arguments.get("separate_z_anisotropy_threshold", ANISOTROPY)
        anisotropy.add(real("separate_z_anisotropy_threshold", threshold, 1, _FAR))
    if len(anisotropy) != 1:
        raise PlansError(f"separate_z_anisotropy_threshold {sorted(anisotropy)}, expected one")
    return Resampling(
        image_order=orders["image"],
        label_order=orders["label"],
        score_order=orders["score"],
        separate_z=tuple(apart),
        anisotropy=anisotropy.pop(),
    )


def _expect(what: str, found: object, known: Sequence[object]) -> None:
    if found not in known:
        raise PlansError(f"{what} {found}, expected {' or '.join(map(str, known))}")
