"""A weights bundle: a folder with ``model.json`` and one safetensors file per network.

Tensors and JSON only; nothing is unpickled. Weights may be stored as fp16, they are fp32 in memory.
Files are checked against the sha256 in ``model.json`` before they are used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from ichseg.errors import PlansError, WeightsError
from ichseg.files import replacing, sha256
from ichseg.model import strict_json
from ichseg.model.folder import MODEL_FILE, check_slug, plain_file, read_description, refused
from ichseg.model.plans import Plans, check_name
from ichseg.model.rules import ComponentRule

if TYPE_CHECKING:  # not imported: OpenVINO does without it
    from torch import Tensor

SCHEMA_VERSION = 1
_LONGEST_REASON = 400  # a file may hold anything, and is quoted
_LONGEST_NAME = 100
_FLOATS = ("F16", "F32", "F64")
_LFS_POINTER = b"version https://git-lfs"
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+() -]*")


@dataclass(frozen=True, slots=True)
class Member:
    """One trained network.

    Attributes:
        configuration: The name of its configuration in the plans.
        fold: The fold that it was trained on, ``0`` to ``4``, or ``all``.
        file: The name of its file in the bundle's folder.
        sha256: The checksum of that file, in hexadecimal digits.
    """

    configuration: str
    fold: str
    file: str
    sha256: str

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file or not self.file.endswith(".safetensors"):
            raise ValueError(f"member file {self.file!r}, expected a plain *.safetensors name")
        for text in (self.configuration, self.fold):  # folders and files are called so
            if Path(text).name != text:
                raise ValueError(f"{text[:100]!r} in the name of a member, expected a plain name")
        for text in (self.configuration, self.fold, self.file):
            check_name(text)


@dataclass(frozen=True, slots=True)
class Model:
    """Everything about an ensemble but its tensors.

    Attributes:
        schema_version: The version of this layout.
        name: The model's name, for people.
        version: The model's version, for people.
        description: What the model does, and what it must not be used for.
        input_slug: The Grand Challenge socket of the CT.
        output_slug: The Grand Challenge socket of the mask.
        average: Whether tiles, mirrors and folds are averaged as ``probabilities`` or as
            ``logits``.
        mirror_axes: The axes (0, 1, 2 for z, y, x) that prediction may mirror.
        plans: What the training data decided.
        members: The networks.
        provenance: Where the networks come from: data, settings, dates, scores; free-form.
        cascade: How a cascade's first stage reaches its second: as ``scores``, brought to the
            second stage's grid and decided there, or as ``labels``, decided in the volume's own
            grid and resampled like a label map (V2's prediction).
        rules: The rules by which components are dropped of the labels found.
        averages: The names of the configurations whose mean decides; empty for all but those that
            are only the first stage of another's cascade.
        licence: Under which the weights are given, as an SPDX expression such as
            ``CC-BY-NC-SA-4.0``; empty where nobody has said.
    """

    schema_version: int
    name: str
    version: str
    description: str
    input_slug: str
    output_slug: str
    average: str
    mirror_axes: tuple[int, ...]
    plans: Plans
    members: tuple[Member, ...]
    provenance: Mapping[str, Any]
    cascade: str = strict_json.optional("scores")
    rules: tuple[ComponentRule, ...] = strict_json.optional(())
    averages: tuple[str, ...] = strict_json.optional(())
    licence: str = strict_json.optional("")

    def __post_init__(self) -> None:
        strict_json.check_schema("model", self.schema_version, SCHEMA_VERSION)
        if self.average not in ("probabilities", "logits"):
            raise ValueError(f"average {self.average!r}, expected probabilities or logits")
        if self.plans.regions and self.average != "logits":
            raise ValueError(f"average {self.average!r} of regions, expected logits")
        if self.cascade not in ("scores", "labels"):
            raise ValueError(f"cascade {self.cascade!r}, expected scores or labels")
        if sorted(self.mirror_axes) != sorted({0, 1, 2} & set(self.mirror_axes)):
            raise ValueError(f"mirror axes {self.mirror_axes}, expected among 0, 1, 2, each once")
        for text in (self.name, self.version):
            check_name(text)
        for slug in (self.input_slug, self.output_slug):
            check_slug(slug)
        if self.licence and not _LICENCE.fullmatch(self.licence):
            raise ValueError(f"licence {self.licence!r}, expected one such as CC-BY-NC-SA-4.0")
        if not self.members:
            raise ValueError("no members")
        for member in self.members:
            self.plans.configuration(member.configuration)
        for name in self.configurations:
            first = self.plans.configuration(name).previous_stage
            if first is not None and first not in self.configurations:
                raise ValueError(f"{name} needs the segmentation of {first}, which has no members")
        missing = set(self.averages) - set(self.configurations)
        if missing:
            raise ValueError(f"averages {sorted(missing)}, which have no members")
        for rule in self.rules:
            if rule.label >= len(self.plans.labels):
                raise ValueError(f"rule for label {rule.label}, expected one of the plan's labels")

    @property
    def configurations(self) -> tuple[str, ...]:
        """Names of the configurations that have members, in order of appearance."""
        return tuple(dict.fromkeys(member.configuration for member in self.members))

    @property
    def expects_hu(self) -> bool:
        """Whether every channel is normalised as CT."""
        return self.plans.expects_hu

    @property
    def averaged(self) -> tuple[str, ...]:
        """Names of the configurations whose mean decides."""
        stages = {self.plans.configuration(name).previous_stage for name in self.configurations}
        return self.averages or tuple(n for n in self.configurations if n not in stages)

    @property
    def in_order(self) -> tuple[str, ...]:
        """The configurations that have to run, first stages before the second ones."""
        return self.plans.with_first_stages(self.averaged)

    def members_of(self, configuration: str) -> tuple[Member, ...]:
        """The networks of one configuration."""
        return tuple(m for m in self.members if m.configuration == configuration)


def load_model(folder: Path) -> Model:
    """Read ``model.json`` and check that every member's file is there, whole and unaltered.

    Raises:
        WeightsError: Something is missing, altered or of another version.
    """
    raw, path = read_description(folder), folder / MODEL_FILE
    try:
        model = strict_json.from_json(Model, raw, where=str(path))
    except PlansError as error:
        raise refused(path, error) from error
    for member in model.members:
        file = plain_file(folder, member.file, f"which {MODEL_FILE} names")
        _verify(file, member.sha256)
    return model


def load_state(folder: Path, member: Member) -> dict[str, npt.NDArray[np.float32]]:
    """One network's tensors as fp32 numpy arrays.

    Raises:
        WeightsError: The file cannot be read, or a tensor is not finite.
    """
    path = folder / member.file
    try:
        stored = safetensors.numpy.load_file(path)
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            state = {name: tensor.astype(np.float32) for name, tensor in stored.items()}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        reason = str(error)[:_LONGEST_REASON]
        raise WeightsError(f"{path}: cannot read the weights ({reason})") from error
    require_finite(state, path)
    return state


def weights_bytes(folder: Path, member: Member) -> int:
    """Bytes that one network's tensors take as fp32; only the file's header is read.

    Raises:
        WeightsError: The file cannot be read.
    """
    return 4 * sum(math.prod(shape) for shape in _shapes(folder / member.file))


def require_finite(state: Mapping[str, npt.NDArray[Any]], where: object) -> None:
    """Refuse tensors with NaN or infinity: they would empty every mask that they take part in.

    Args:
        state: Tensors by name, as numpy arrays.
        where: The file or network that they are of, for the error.

    Raises:
        WeightsError: A tensor has a value that is not finite; the text names it.
    """
    for name, tensor in state.items():
        broken = tensor.size - int(np.isfinite(tensor).sum())
        if broken:
            raise WeightsError(
                f"{where}: {broken} of {tensor.size} values of {name} are not finite as "
                f"{tensor.dtype}, expected finite weights"
            )


def save_member(
    folder: Path,
    configuration: str,
    fold: str,
    state: Mapping[str, Tensor],
    *,
    dtype: npt.DTypeLike = np.float16,
) -> Member:
    """Write a network's tensors as ``<configuration>_fold_<fold>.safetensors``, whole or not.

    Raises:
        WeightsError: A tensor is not finite, or not when stored as ``dtype``.
        OutputError: The file cannot be written.
    """
    path = folder / f"{configuration}_fold_{fold}.safetensors"
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        stored = {name: np.ascontiguousarray(array, dtype) for name, array in arrays.items()}
    require_finite(stored, f"{configuration} fold {fold}")
    with replacing(path, suffix=".safetensors") as temporary:
        # a full disk is an OSError here, and an error of its own in safetensors' `save_file`
        temporary.write_bytes(safetensors.numpy.save(stored))
    return Member(configuration, fold, path.name, sha256(path))


def save_model(folder: Path, model: Model) -> None:
    """Write ``model.json`` and ``SHA256SUMS`` (checkable with ``sha256sum -c``)."""
    with replacing(folder / MODEL_FILE, suffix=".json") as temporary:
        temporary.write_text(strict_json.dumps(model), encoding="utf-8")
    files = [*(folder / member.file for member in model.members), folder / MODEL_FILE]
    with replacing(folder / "SHA256SUMS") as temporary:
        temporary.write_text("".join(f"{sha256(f)}  {f.name}\n" for f in files), encoding="utf-8")


def _shapes(path: Path) -> list[list[int]]:
    """The shapes of a file's tensors, from its header.

    Raises:
        WeightsError: The file cannot be read, or a tensor is not of floating-point numbers.
    """
    shapes = []
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                check_name(name)
                tensor = opened.get_slice(name)
                if tensor.get_dtype() not in _FLOATS:
                    raise ValueError(
                        f"{name[:_LONGEST_NAME]} is of type {tensor.get_dtype()}, "
                        f"expected one of {', '.join(_FLOATS)}"
                    )
                shapes.append(tensor.get_shape())
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        reason = str(error)[:_LONGEST_REASON]
        raise WeightsError(f"{path}: cannot read the weights ({reason})") from error
    return shapes


def _verify(path: Path, expected: str) -> None:
    """Refuse a member's file that is not what ``model.json`` says, or holds no tensors."""
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
        found = sha256(path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot read the weights ({error.strerror})") from error
    if start == _LFS_POINTER:
        raise WeightsError(f"{path}: a Git LFS pointer, expected the weights; run `git lfs pull`")
    if found != expected:
        raise WeightsError(
            f"{path}: altered, sha256 is {found[:12]}..., {MODEL_FILE} says {expected[:12]}..."
        )
    if not _shapes(path):
        raise WeightsError(f"{path}: no tensors in it, expected a network's")
