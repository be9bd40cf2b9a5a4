"""A checkpoint of nnU-Net v2: its tensors, brought under our names.

Only tensors, plain values and a few literal names are read: nothing in the file is ever called, so
one from elsewhere can do no harm.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ichseg.errors import PlansError, WeightsError
from ichseg.model import bundle
from ichseg.model.architecture import Architecture
from ichseg.model.network import build_network
from ichseg.model.plans import Configuration, Plans
from ichseg.wording import times
from training.bundle.nnunet_values import text, wholes

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LONGEST_REASON = 200  # a file may hold anything, and is quoted
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_DUPLICATES = re.compile(r"^decoder\.encoder\.|\.all_modules\.")  # modules registered twice


class _Unread:
    """Stands in for a NumPy number, or for its type, in a checkpoint; keeps nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What nnU-Net's log and optimiser leave in checkpoints beside tensors and plain values.
_NUMPY: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Unread, "numpy.dtype"),
    (_Unread, "numpy._core.multiarray.scalar"),
    (_Unread, "numpy.core.multiarray.scalar"),  # before NumPy 2
]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint says.

    Attributes:
        path: The checkpoint's file.
        trainer: The name of nnU-Net's trainer class.
        configuration: The name of the configuration that it trained.
        mirror_axes: The axes of the network's input that prediction may mirror.
        weights: The tensors under nnU-Net's names.
    """

    path: Path
    trainer: str
    configuration: str
    mirror_axes: tuple[int, ...]
    weights: Mapping[str, Tensor]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read tensors and plain values of a checkpoint; nothing in it is run.

    Raises:
        WeightsError: The file cannot be read, or holds anything but tensors, plain values and
            numbers.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: not a plain file, expected a checkpoint of nnU-Net v2")
    try:
        with torch.serialization.safe_globals(_NUMPY):
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {named[1]}" if named else "is damaged, or holds more than nnU-Net's do"
        raise WeightsError(
            f"{path}: {what}, expected tensors, plain values and NumPy's numbers; nothing in it "
            "was run"
        ) from error
    except Exception as error:  # of a damaged file about any may come
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{path}: cannot read ({reason})") from error
    try:
        axes, settings = raw.get("inference_allowed_mirroring_axes"), raw["init_args"]
        if not isinstance(settings, Mapping):
            raise TypeError(f"init_args is of type {type(settings).__name__}")
        return Checkpoint(
            path=path,
            trainer=text("trainer_name", raw["trainer_name"]),
            configuration=text("configuration", settings["configuration"]),
            mirror_axes=wholes(
                "mirroring axes", [] if axes is None else list(axes), 0, 2, longest=3
            ),
            weights={
                _bare(text("tensor", key)): tensor for key, tensor in raw["network_weights"].items()
            },
        )
    except PlansError as error:
        raise WeightsError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = repr(error)[:_LONGEST_REASON]
        raise WeightsError(
            f"{path}: not a checkpoint of nnU-Net v2, {reason} in its contents"
        ) from error


def rename(checkpoint: Checkpoint, plans: Plans) -> dict[str, Tensor]:
    """Bring the weights under our names; each of ours has one of theirs, of the same shape.

    Raises:
        WeightsError: A tensor is missing, left over or of another shape.
    """
    configuration = plans.configuration(checkpoint.configuration)
    with torch.device("meta"):
        network = build_network(
            configuration.architecture, plans.input_channels(configuration), plans.scores
        )
    names = their_names(configuration.architecture)
    theirs = {key: t for key, t in checkpoint.weights.items() if not _DUPLICATES.search(key)}
    state = {}
    for key, expected in network.state_dict().items():
        module, _, kind = key.rpartition(".")
        name = f"{names[module]}.{kind}"
        if name not in theirs:
            raise WeightsError(f"{checkpoint.path}: no tensor {name}, which the plans ask for")
        tensor = theirs.pop(name)
        _require_numbers(checkpoint.path, name, tensor)
        if tensor.shape != expected.shape:
            raise WeightsError(
                f"{checkpoint.path}: {name} is {_times(tensor)}, expected {_times(expected)} "
                "of the plans"
            )
        state[key] = tensor.float()
        bundle.require_finite({name: state[key].numpy()}, checkpoint.path)
    if theirs:
        raise WeightsError(
            f"{checkpoint.path}: {len(theirs)} tensors that the plans have no place for, such as "
            f"{min(theirs)}; expected the network of {checkpoint.configuration} and no other"
        )
    return state


def their_names(architecture: Architecture) -> dict[str, str]:
    """nnU-Net's name of each module that has parameters, by our name of it."""
    a, last = architecture, len(architecture.features) - 2
    names = {}

    def block(ours: str, theirs: str, convolutions: int) -> None:
        for i in range(convolutions):  # in ours with a normalisation and a ReLU in between
            names[f"{ours}.{3 * i}"] = f"{theirs}.convs.{i}.conv"
            names[f"{ours}.{3 * i + 1}"] = f"{theirs}.convs.{i}.norm"

    block("stem", "encoder.stem", 1)
    for level, (count, stride) in enumerate(zip(a.encoder_convs, a.strides, strict=True)):
        if a.block == "plain":
            block(f"encoder.{level}", f"encoder.stages.{level}.0", count)
            continue
        for i in range(count):
            ours, theirs = f"encoder.{level}.{i}", f"encoder.stages.{level}.blocks.{i}"
            for part, conv in (("first", "conv1"), ("second", "conv2")):
                names[f"{ours}.{part}.0"] = f"{theirs}.{conv}.conv"
                names[f"{ours}.{part}.1"] = f"{theirs}.{conv}.norm"
            k = int(i == 0 and max(stride) > 1)  # after a pooling
            names[f"{ours}.shortcut.{k}"] = f"{theirs}.skip.{k}.conv"
            names[f"{ours}.shortcut.{k + 1}"] = f"{theirs}.skip.{k}.norm"
    for level, count in enumerate(a.decoder_convs):  # theirs are counted from the coarsest
        block(f"decoder.{level}", f"decoder.stages.{last - level}", count)
        names[f"upsampling.{level}"] = f"decoder.transpconvs.{last - level}"
        names[f"heads.{level}"] = f"decoder.seg_layers.{last - level}"
    return names


def mirrored_axes(checkpoint: Checkpoint, configuration: Configuration) -> tuple[int, ...]:
    """The axes that prediction may mirror, 0, 1, 2 for z, y, x; a 2D network has the last two.

    Raises:
        WeightsError: The checkpoint names an axis that the network does not have.
    """
    dimensions = configuration.architecture.dimensions
    axes = set(checkpoint.mirror_axes)
    if not axes <= set(range(dimensions)) or len(axes) < len(checkpoint.mirror_axes):
        raise WeightsError(
            f"{checkpoint.path}: mirrors axes {checkpoint.mirror_axes} of a {dimensions}D network"
        )
    return tuple(sorted(axis + 3 - dimensions for axis in checkpoint.mirror_axes))


def _require_numbers(path: Path, name: str, tensor: object) -> None:
    """Refuse what is not a plain tensor of floating-point numbers, all of them in the file."""
    if not isinstance(tensor, Tensor):
        raise WeightsError(f"{path}: {name} is of type {type(tensor).__name__}, expected a tensor")
    plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
    if not plain or tensor.is_meta or tensor.dtype not in _FLOATS:
        kind = "nested" if tensor.is_nested else f"{tensor.layout} {tensor.dtype} {tensor.device}"
        raise WeightsError(
            f"{path}: {name} is a tensor of another kind ({kind.replace('torch.', '')}), expected "
            "a dense one of floating-point numbers"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise WeightsError(f"{path}: {name} is {_times(tensor)}, more than the file holds of it")


def _bare(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.partition(".")[2]
    return key


def _times(tensor: Tensor) -> str:
    return times(tensor.shape) or "a number"
